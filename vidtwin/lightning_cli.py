"""LightningCLI for `vidtwin`: the task, any data module, and `VideoTrainer`'s methods as subcommands.

Imported by `vidtwin.cli` only when a command needs it, since it imports torch and lightning.
"""

import argparse
import inspect
import json
import logging
import re
import sys
import warnings
from typing import NoReturn

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vidtwin import checkpoints, plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.callbacks.clips import ClipLogger
from vidtwin.errors import UserError, suggestion
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.task import AutoencoderTask
from vidtwin.trainer import VideoTrainer


def run(command: str, argv: list[str]) -> None:
    """Run one of the trainer's commands; raises `UserError` for what the user can mend."""
    argv = [command, *(_inputs(argv) if command == "reconstruct" else argv)]
    argv = _resolve_short_names(argv)
    checkpoint = _option(argv, "ckpt_path")
    if checkpoint and command != "fit" and not _option(argv, "config") and not _option(argv, "model.autoencoder"):
        spec = checkpoints.model_spec(checkpoints.read(checkpoint), checkpoint)
        argv.append(f"--model.autoencoder={json.dumps(spec)}")
    _quieten()
    try:
        VidTwinCLI(argv)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except SystemExit as end:  # --help and --print_config end this way, with 0
        if end.code:
            raise


class _Parser(LightningArgumentParser):
    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line with what was meant, where jsonargparse prints its usage and a tree of reasons."""
        # An inner parser's error comes back through the outer one's.
        raise UserError(message if "did you mean" in message else _shorten(message, self)) from ex


class _SaveConfig(SaveConfigCallback):
    """Keep the config of a training beside its checkpoints; other commands leave none behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class VidTwinCLI(LightningCLI):
    """The configurable commands. `args` starts with the subcommand."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            AutoencoderTask,
            LightningDataModule,
            subclass_mode_data=True,
            trainer_class=VideoTrainer,
            parser_class=_Parser,
            parser_kwargs={"prog": "vidtwin"} | {name: {"usage": _usage(name)} for name in self.subcommands()},
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        return {
            "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
            "validate": {"model", "dataloaders", "datamodule"},
            "test": {"model", "dataloaders", "datamodule", "verbose"},
            "predict": {"model", "dataloaders", "datamodule"},
            "reconstruct": {"model"},
        }

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(VideoTrainer, "trainer")
        parser.add_lightning_class_args(AutoencoderTask, "model")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LatestCheckpoint, "latest_checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(ClipLogger, "clip_logger")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own warns when sys.argv holds something too, which it does for every command line.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's arguments win over the config; here `--config` wins, and says so."""
        config = self._own_config()
        if not (path := config.get("ckpt_path")):
            return
        checkpoint = checkpoints.read(path)
        stored = checkpoint.get("model_spec")
        given = config.model.autoencoder
        if stored and given:
            given = {"class_path": given.class_path, "init_args": dict(given.get("init_args") or {})}
            for line in checkpoints.differences(given, stored):
                sys.stderr.write(f"vidtwin: {path} differs from the config, which wins: {line}\n")

    def before_instantiate_classes(self) -> None:
        config = self._own_config()
        if self.subcommand == "reconstruct":
            config.data = None
        elif config.get("data") is None:
            raise UserError(
                f"Expected data to {self.subcommand} on; give --data ucf101 --data.root PATH or a --config."
            )
        if self.subcommand != "fit":
            config.trainer.logger = False  # a measurement is no run: it leaves its results alone behind

    def _own_config(self) -> Namespace:
        return self.config[str(self.config.subcommand)]


def _usage(command: str) -> str:
    """In place of argparse's list of every option, which is sixty lines long."""
    before = " VIDEO [VIDEO ...] --ckpt_path FILE" if command == "reconstruct" else ""
    return f"vidtwin {command}{before} [--config FILE ...] [--OPTION VALUE ...]"


def _inputs(argv: list[str]) -> list[str]:
    """Bare arguments (`reconstruct a.mp4 b.mp4 --out DIR`) → `--inputs=[...]`."""
    bare: list[str] = []
    options: list[str] = []
    takes_value = False
    for word in argv:
        if word.startswith("-"):
            takes_value = "=" not in word and word not in ("-h", "--help", "--side_by_side")
            options.append(word if word != "--side_by_side" else "--side_by_side=true")
        elif takes_value:
            takes_value = False
            options.append(word)
        else:
            bare.append(word)
    return [*options, f"--inputs={json.dumps(bare)}"] if bare else options


def _resolve_short_names(argv: list[str]) -> list[str]:
    """`--data ucf101` and `--model.autoencoder vidtwin` → class paths, without importing the other plug-ins."""
    groups = {"--data": "vidtwin.datamodules", "--model.autoencoder": "vidtwin.autoencoders"}
    resolved = list(argv)
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        if option not in groups:
            continue
        if equals:
            resolved[index] = f"{option}={_resolve(value, groups[option])}"
        elif index + 1 < len(argv):
            resolved[index + 1] = _resolve(argv[index + 1], groups[option])
    return resolved


def _resolve(name: str, group: str) -> str:
    path = plugins.resolve(name, group)
    if path == name and re.fullmatch(r"\w+", name):  # neither a class path, nor a file, nor JSON
        known = sorted(plugins.available(group))
        raise UserError(f"Expected one of {', '.join(known)} or a class path, got {name!r}{suggestion(name, known)}")
    return path


def _option(argv: list[str], name: str) -> str | None:
    """The last value of `--name VALUE` or `--name=VALUE`."""
    value = None
    names = (f"--{name}", "-c") if name == "config" else (f"--{name}",)
    for index, word in enumerate(argv):
        option, equals, after = word.partition("=")
        if option in names:
            value = after if equals else (argv[index + 1] if index + 1 < len(argv) else None)
    return value


def _shorten(message: str, parser: argparse.ArgumentParser) -> str:
    """jsonargparse's message as one line, with what was probably meant."""
    text = re.sub(r"\s+", " ", message).strip()
    text = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", text)
    text = text.rstrip(".").replace("unrecognized arguments:", "Expected options that exist, got")
    if match := re.search(r"Problem with given class_path '([\w.]+)\.(\w+)'", text):
        module = sys.modules.get(match[1])
        return text + suggestion(match[2], dir(module) if module else [])
    if match := re.search(r"got --([\w.]+)", text):
        return text + suggestion(match[1], [name.lstrip("-") for name in _options(parser)])
    if match := re.search(r"[Oo]ption '([\w.]+)'", text):
        word = match[1].rpartition(".")[2]
        names = [name.rpartition(".")[2] for name in _options(parser)]
        return text + suggestion(word, sorted({*names, *_arguments()}))
    return f"{text}."


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of the parser and of its subcommands."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                names |= set(sub._option_string_actions)
    return names


def _arguments() -> set[str]:
    """Names of the arguments of all classes that a config may have named so far: these are no options of the parser."""
    classes: list[type] = [VideoAutoencoder, LightningDataModule, AutoencoderLoss, Optimizer, LRScheduler, Callback]
    names: set[str] = set()
    while classes:
        cls = classes.pop()
        names |= set(inspect.signature(cls).parameters)
        classes += cls.__subclasses__()
    return names


def _quieten() -> None:
    """Silence what Lightning says of things that are as they should be here."""
    beside_the_point = ("GPU available", "TPU available", "Tip:", "`weights_only` was not set")
    logging.getLogger("lightning.pytorch.utilities.rank_zero").addFilter(
        lambda record: not any(text in record.getMessage() for text in beside_the_point)
    )
    for message in (
        r".*does not have many workers.*",  # data modules choose the number themselves
        r".*srun.*",
        r".*`training_step` returned `None`.*",  # manual optimization
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*The dirpath has changed.*",  # `vidtwin test` has no folder of checkpoints
        r".*AFTER optimization.*",  # a checkpoint after the step is what is wanted
    ):
        warnings.filterwarnings("ignore", message=message)
