"""LightningCLI for `vidtwin`: the task, any data module, and `VideoTrainer`'s methods as subcommands.

Imported by `vidtwin.cli` only when a command needs it, since it imports torch and lightning.
"""

import argparse
import inspect
import json
import logging
import pkgutil
import re
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast

import yaml
from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vidtwin import plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.cli import bases
from vidtwin.errors import Preempted, UserError, suggestion
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.storage import checkpoints
from vidtwin.training import replay
from vidtwin.training.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.training.callbacks.clips import ClipLogger
from vidtwin.training.callbacks.guard import StepGuard
from vidtwin.training.callbacks.health import Health
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer


def run(command: str, argv: list[str]) -> int:
    """Run one of the trainer's commands → exit code; raises `UserError` for what the user can mend."""
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # class paths of files in the current folder, as with `python -m`
    if command == "test":
        from vidtwin.cli import benchmark  # which imports this module

        _quieten(command)
        return benchmark.run(argv)
    if command == "replay":
        argv = _dump(argv)
    argv = [command, *argv]
    argv = resolve_short_names(argv)
    checkpoint = option_value(argv, "ckpt_path")
    if (
        checkpoint
        and command != "fit"
        and not option_value(argv, "config")
        and not option_value(argv, "model.autoencoder")
    ):
        spec = checkpoints.model_spec(checkpoints.read(checkpoint, lazily=True), checkpoint)
        argv.insert(1, f"--model.autoencoder={json.dumps(spec)}")  # first, so that other options change it
    _quieten(command)
    try:
        with _ending_early() if command == "fit" else nullcontext():
            VidTwinCLI(argv)
    except MisconfigurationException as error:
        raise UserError(str(error)) from error
    except SystemExit as end:  # --help and --print_config end this way, with 0; Lightning after Ctrl-C, with 1
        if isinstance(end.__context__, KeyboardInterrupt):
            raise KeyboardInterrupt from end
        if end.code:
            raise
    return 0


@contextmanager
def _ending_early() -> Iterator[None]:
    """SIGTERM before the training (which then has its own handler) or after it: nothing to save, and no failure."""

    def end(number: int, frame: FrameType | None) -> NoReturn:
        raise Preempted

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def user_errors() -> Iterator[None]:
    """A `UserError` of a class that is built: jsonargparse wraps it into the types that it tried."""
    try:
        yield
    except ValueError as error:
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, UserError):
            cause = cause.__cause__ or cause.__context__
        if cause is None:
            raise
        raise cause from None


class Parser(LightningArgumentParser):
    def parse_string(self, content: str, *args: Any, **kwargs: Any) -> Namespace:
        return super().parse_string(bases.remove(content), *args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """One line with what was meant, where jsonargparse prints its usage and a tree of reasons."""
        raise UserError(_shorten(message, self)) from ex


class _SaveConfig(SaveConfigCallback):
    """Keep the config of a training beside its checkpoints; other commands leave none behind."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Too early: what is still refused after this must not have replaced the config of another run."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().setup(trainer, pl_module, "fit")
        # For the dumps of steps that `vidtwin replay` runs again.
        text = self.parser.dump(self.config, skip_none=False)
        cast(AutoencoderTask, pl_module).config = yaml.safe_load(text)["model"]


class VidTwinCLI(LightningCLI):
    """The configurable commands. `args` starts with the subcommand."""

    def __init__(self, args: list[str]) -> None:
        super().__init__(
            AutoencoderTask,
            LightningDataModule,
            subclass_mode_data=True,
            trainer_class=VideoTrainer,
            parser_class=Parser,
            # Without abbreviations: --trainer.max_step is a mistake to point out, not to guess.
            parser_kwargs={"prog": "vidtwin", "allow_abbrev": False}
            | {name: {"usage": _usage(name), "allow_abbrev": False} for name in self.subcommands()},
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
            "predict": {"model", "dataloaders", "datamodule"},
            "replay": {"model"},
        }

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(VideoTrainer, "trainer")
        parser.add_lightning_class_args(AutoencoderTask, "model")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LatestCheckpoint, "latest_checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(StepGuard, "guard")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(ClipLogger, "clip_logger")

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own warns when sys.argv holds something too, which it does for every command line.
        self.config = parser.parse_args(args)  # type: ignore[arg-type]

    def _parse_ckpt_path(self) -> None:
        """Lightning would let the checkpoint's arguments win over the config; here `--config` wins, and says so."""
        config = self._own_config()
        if not (path := config.get("ckpt_path")):
            return
        checkpoint = checkpoints.read(path, lazily=True)
        stored = checkpoint.get("model_spec")
        given = config.model.autoencoder
        if stored and given:
            given = {"class_path": given.class_path, "init_args": dict(given.get("init_args") or {})}
            for line in checkpoints.differences(given, stored):
                sys.stderr.write(f"vidtwin: {path} differs from the config, which wins: {line}\n")

    def before_instantiate_classes(self) -> None:
        config = self._own_config()
        if self.subcommand not in ("fit", "replay") and not config.get("ckpt_path"):
            raise UserError(f"Expected trained weights to {self.subcommand} with; give --ckpt_path FILE.")
        if self.subcommand == "replay":
            config.data = None
        elif config.get("data") is None:
            raise UserError(
                f"Expected data to {self.subcommand} on; give --data ucf101 --data.root PATH or a --config."
            )
        if self.subcommand != "fit":
            config.trainer.logger = False  # a measurement is no run: it leaves its results alone behind
        elif config.get("resume") == "auto":
            _return_to_latest_run(config.trainer)

    def instantiate_classes(self) -> None:
        with user_errors():
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # an accelerator, a precision or a strategy that does not exist
            raise UserError(str(error)) from error

    def _own_config(self) -> Namespace:
        return self.config[str(self.config.subcommand)]


def _return_to_latest_run(trainer: Namespace) -> None:
    """Let loggers that number their runs go on with the newest one that has left a checkpoint."""
    loggers = trainer.get("logger")
    if loggers in (None, True):  # what Lightning then takes, by a name that can be looked for
        folder = trainer.get("default_root_dir") or "."
        chosen = {"class_path": "lightning.pytorch.loggers.TensorBoardLogger"}
        loggers = trainer["logger"] = Namespace(
            **chosen, init_args=Namespace(save_dir=folder, name="lightning_logs", version=None)
        )
    if not loggers:
        return  # checkpoints lie in default_root_dir
    loggers = loggers if isinstance(loggers, list) else [loggers]
    first = loggers[0].get("init_args") or Namespace()
    if "save_dir" not in first or "version" not in first:
        name = str(loggers[0].get("class_path")).rpartition(".")[2]
        raise UserError(
            f"Expected a logger whose run has a number in its folder for --resume auto (TensorBoardLogger, CSVLogger), "
            f"got {name}; name the run by --resume FOLDER, or put one of these first."
        )
    version = first.get("version")
    if version is None:
        runs = Path(first.save_dir) / (first.get("name") or "")
        found = [path for path in runs.glob("version_*/checkpoints/*.ckpt") if not path.name.startswith(".")]
        numbers = [int(path.parts[-3].removeprefix("version_")) for path in found if path.parts[-3][8:].isdecimal()]
        if not numbers:
            return
        version = max(numbers)
    for logger in loggers:
        arguments = logger.get("init_args") or Namespace()
        if "version" in arguments and arguments.get("version") is None:
            arguments["version"] = version
        if str(logger.get("class_path")).endswith(".CSVLogger"):
            _keep_metrics(Path(arguments.save_dir) / (arguments.get("name") or ""), arguments.version)


def _keep_metrics(runs: Path, version: int | str) -> None:
    """Lightning's CSVLogger deletes the numbers of a run that it goes on with."""
    folder = runs / (version if isinstance(version, str) else f"version_{version}")
    if (folder / "metrics.csv").exists():
        earlier = len(list(folder.glob("metrics-*.csv")))
        (folder / "metrics.csv").rename(folder / f"metrics-{earlier}.csv")


def _usage(command: str) -> str:
    """In place of argparse's list of every option, which is sixty lines long."""
    before = " DUMP" if command == "replay" else ""
    return f"vidtwin {command}{before} [--config FILE ...] [--OPTION VALUE ...]"


def _dump(argv: list[str]) -> list[str]:
    """`replay DUMP` → `--dump DUMP` and the task's config that the dump holds."""
    if argv and not argv[0].startswith("-"):
        argv = ["--dump", *argv]
    if not (path := option_value(argv, "dump")):
        if {"-h", "--help"} & set(argv):
            return argv
        raise UserError("Expected the dump of a skipped step, got none: vidtwin replay DUMP.")
    content = replay.read(path)
    argv = [f"--trainer.precision={content['precision']}", *argv]
    if content["config"]:
        return [f"--model={json.dumps(content['config'])}", *argv]
    if not option_value(argv, "config"):
        raise UserError(f"Expected --config FILE: {path} comes from a training that had none, which knows its loss.")
    return argv


def resolve_short_names(argv: list[str]) -> list[str]:
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


def option_value(argv: list[str], name: str) -> str | None:
    """The last value of `--name VALUE` or `--name=VALUE`."""
    value = None
    names = (f"--{name}", "-c") if name == "config" else (f"--{name}",)
    for index, word in enumerate(argv):
        option, equals, after = word.partition("=")
        if option in names:
            following = argv[index + 1] if index + 1 < len(argv) else "--"
            value = after if equals else (None if following.startswith("--") else following)
    return value


def _shorten(message: str, parser: argparse.ArgumentParser) -> str:
    """jsonargparse's message as one line: the innermost reason, and what was probably meant."""
    text = re.sub(r"\s+", " ", message).strip().rstrip(".")
    if match := re.search(r"arguments are required: (\w+)\.model\.autoencoder", text):
        wanted = "--ckpt_path FILE" if match[1] != "fit" else "--config FILE or --model.autoencoder NAME"
        return f"Expected an autoencoder to {match[1]}, got none; give {wanted}."
    if "Union subtypes" in text:
        text = _innermost(text)
    text = re.sub(r"- Expected a path but \S+ either not accessible or invalid - ", "", text)
    text = text.replace("unrecognized arguments:", "Expected options that exist, got")
    text = re.sub(r"Expected a dot import path string: (\S+)", r"Expected a class path, got '\1'", text)
    # An inner parser's error comes back through the outer one's, with its suggestion.
    return text if text.endswith("'?") else text + _meant(text, parser)


def _innermost(text: str) -> str:
    """Of the reasons why a value fits none of several types, the one about the type that was meant."""
    key = ".".join(re.findall(r'Parser key "([\w.]+)"', text))
    reasons, _, given = text.rpartition("Errors: - ")[2].partition(" Given value type: ")
    value = given.partition("Given value: ")[2].partition(" - Expected a ")[0]
    named = [reason for reason in reasons.split(" - ") if not re.match(r"Expected an? (<class|typing)", reason)]
    choices = re.findall(r"'([\w.-]+)'", " ".join(re.findall(r"typing\.Literal\[.*?\]", reasons)))
    if named:
        reason = re.sub(r'^Parser key "[\w.]+": ', "", named[0])
    elif choices:
        reason = f"Expected one of {', '.join(choices)}, got {value}"
    else:
        kinds = re.findall(r"<class '([\w.]+)'>", reasons)
        reason = f"Expected {' or '.join(kind.rpartition('.')[2] for kind in kinds)}, got {value}"
    return f"{key}: {reason}".rstrip(".")


def _meant(text: str, parser: argparse.ArgumentParser) -> str:
    """The end of the message: the nearest thing that exists, or a full stop."""
    if match := re.search(r"module '([\w.]+)' has no attribute '(\w+)'", text):
        return suggestion(match[2], dir(sys.modules[match[1]]) if match[1] in sys.modules else [])
    if match := re.search(r"No module named '([\w.]+)\.(\w+)'", text):
        paths = getattr(sys.modules.get(match[1]), "__path__", [])
        return suggestion(match[2], [module.name for module in pkgutil.iter_modules(paths)])
    if match := re.search(r"File does not exist: '(.+?)'", text):
        path = Path(match[1])
        return suggestion(path.name, [p.name for p in path.parent.iterdir()] if path.parent.is_dir() else [])
    if match := re.search(r"Expected a class path, got '(\w+)'", text):
        return suggestion(match[1], [cls.__name__ for cls in _classes()])
    if match := re.search(r"got --([\w.-]+)", text):
        return suggestion(match[1].replace("-", "_"), [name.lstrip("-") for name in _options(parser)])
    if match := re.search(r"[Oo]ption '([\w.]+)'", text):
        names = [name.rpartition(".")[2] for name in _options(parser)]
        return suggestion(match[1].rpartition(".")[2], sorted({*names, *_arguments()}))
    return "."


def _options(parser: argparse.ArgumentParser) -> set[str]:
    """Every option of the parser and of its subcommands."""
    names = set(parser._option_string_actions)
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for sub in action.choices.values():
                names |= set(sub._option_string_actions)
    return names


def _classes() -> list[type]:
    """All classes that a config may name and that are imported so far."""
    found: list[type] = []
    waiting: list[type] = [
        VideoAutoencoder,
        LightningDataModule,
        AutoencoderLoss,
        Optimizer,
        LRScheduler,
        Callback,
        Logger,
    ]
    while waiting:
        found.append(waiting.pop())
        waiting += found[-1].__subclasses__()
    return found


def _arguments() -> set[str]:
    """Names of their arguments, which are no options of the parser."""
    return {name for cls in _classes() for name in inspect.signature(cls).parameters}


def _quieten(command: str) -> None:
    """Silence what Lightning says of things that are as they should be here."""
    beside_the_point = ("GPU available", "TPU available", "Tip:", "`weights_only` was not set")
    for module in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{module}").addFilter(
            lambda record: not any(text in record.getMessage() for text in beside_the_point)
        )
    if command != "fit":  # what only watches a training is not there
        warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint.*")
    for message in (
        r".*does not have many workers.*",  # data modules choose the number themselves
        r".*srun.*",
        r".*`training_step` returned `None`.*",  # manual optimization
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*sync_dist=True.*",  # the metrics are means over all ranks already
        r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",  # the discriminator's runs from the first step on
        r".*exists and is not empty.*",  # the folder of a run that goes on
    ):
        warnings.filterwarnings("ignore", message=message)
