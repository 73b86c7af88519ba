"""Run `VideoTrainer`'s methods as subcommands of LightningCLI, with the task and any data module.

Imported by `vidtwin.cli` only when a command needs it, since it imports torch and lightning.
"""

import json
import logging
import operator
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import reduce
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn, cast, get_args

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vidtwin import plugins
from vidtwin.cli import model_config, paths, unused_runs
from vidtwin.cli.parser import (
    Parser,
    config_paths,
    name_data_first,
    option_value,
    read_config,
    resolve_short_names,
    user_errors,
)
from vidtwin.console import log
from vidtwin.errors import Preempted, UserError
from vidtwin.storage import checkpoints
from vidtwin.training import replay
from vidtwin.training.base import TrainingTask
from vidtwin.training.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.training.callbacks.clips import ClipLogger
from vidtwin.training.callbacks.guard import StepGuard
from vidtwin.training.callbacks.health import Health
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer

_SKIPPED = {  # arguments of the trainer's methods that are not options
    "fit": {"model", "train_dataloaders", "val_dataloaders", "datamodule"},
    "validate": {"model", "dataloaders", "datamodule"},
    "predict": {"model", "dataloaders", "datamodule"},
    "replay": {"model"},
    "plan": {"model", "datamodule"},
}
# Files of errors without a name, by the beginning of a module that writes them.
_LOGS = {
    "tensorboard.": "TensorBoard's events",
    "lightning.pytorch.loggers.": "the logger's files",
    "lightning.fabric.loggers.": "the logger's files",
}
_STEPS = ("advance", "_evaluation_step", "_predict_step")  # methods of Lightning's loops for batches


def run(command: str, argv: list[str]) -> int:
    """Run one of the trainer's commands → exit code; raises `UserError` for invalid input."""
    if command == "test":
        from vidtwin.cli import benchmark

        _quieten(command)
        return benchmark.run(argv)
    foreign: set[str] = set()
    if command == "replay":
        argv, foreign = _expand_dump(argv)
    argv = [command, *argv]
    argv = name_data_first(resolve_short_names(argv))
    checkpoint = option_value(argv, "ckpt_path")
    if (
        checkpoint
        and command != "fit"
        and not option_value(argv, "config", "c")
        and not option_value(argv, "model.autoencoder")
    ):
        spec = checkpoints.model_spec(checkpoints.read(checkpoint, lazily=True), checkpoint)
        argv.insert(1, f"--model.autoencoder={json.dumps(spec)}")  # first, so that other options change it
        foreign = paths.texts(spec)
    _quieten(command)
    try:
        with _ending_by_sigterm() if command == "fit" else nullcontext(), _naming_logs():
            VidTwinCLI(argv, foreign, _trainer_class(command))
    except (MisconfigurationException, ValueError, RuntimeError, NotImplementedError, ImportError) as error:
        if isinstance(error, UserError) or not _is_of_lightning(error):
            raise
        raise UserError(str(error)) from error
    except SystemExit as end:
        if isinstance(end.__context__, KeyboardInterrupt):  # Lightning, after Ctrl-C
            raise KeyboardInterrupt from end
        raise
    return 0


def _trainer_class(command: str) -> type[VideoTrainer]:
    if command != "plan":
        return VideoTrainer
    from vidtwin.cli.plan import PlanningTrainer

    return PlanningTrainer


def _is_of_lightning(error: Exception) -> bool:
    """Return whether Lightning refuses options, before the first batch or by its own class of errors.

    Any other error of its code, perhaps after days of training, keeps its traceback.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    modules = [str(frame.f_globals.get("__name__")) for frame in frames]
    begun = any(
        module.startswith("lightning.pytorch.loops") and frame.f_code.co_name in _STEPS
        for module, frame in zip(modules, frames, strict=True)
    )
    return modules[-1].partition(".")[0] == "lightning" and (isinstance(error, MisconfigurationException) or not begun)


@contextmanager
def _ending_by_sigterm() -> Iterator[None]:
    """Raise `Preempted` on SIGTERM before and after the training itself, when there is nothing to save."""

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
def _naming_logs() -> Iterator[None]:
    """Name TensorBoard's events, or the files of Lightning's loggers, in an error of the system on writing them.

    TensorBoard's thread of writing ends by such an error, which the next event raises again: Python would show a
    traceback of the thread too. An error that no later event raised is logged at the end.
    """
    before = threading.excepthook
    failed: list[OSError] = []

    def hook(args: threading.ExceptHookArgs) -> None:
        if isinstance(args.exc_value, OSError) and type(args.thread).__module__.startswith("tensorboard."):
            failed.append(args.exc_value)
        else:
            before(args)

    threading.excepthook = hook
    raised: OSError | None = None
    try:
        yield
    except OSError as error:
        raised = error
        modules = [str(frame.f_globals.get("__name__")) for frame, _ in traceback.walk_tb(error.__traceback__)]
        for begins, named in _LOGS.items():
            if error.errno and error.filename is None and any(module.startswith(begins) for module in modules):
                error.filename = named
        raise
    finally:
        for thread in threading.enumerate():
            # The thread hands its error over before it ends and calls the hook.
            if type(thread).__module__.startswith("tensorboard.") and getattr(thread, "exception", None) is not None:
                thread.join()
        threading.excepthook = before
        for unraised in failed:
            if unraised is not raised:
                log(f"TensorBoard can't write its events: {unraised.strerror or unraised}")


class LightningParser(Parser, LightningArgumentParser):
    """Parse as every command does, with Lightning's classes; 1 is an integer wherever int and float are possible."""

    def add_class_arguments(self, *args: Any, **keywords: Any) -> Any:
        added = super().add_class_arguments(*args, **keywords)
        for action in self._actions:
            # Types are tried in their order. `Union` caches its members in the order of whoever came first, so that
            # Lightning's Union[int, float] may be (float, int), in which 1 batch becomes 1.0, all of them; `|` doesn't.
            types = list(get_args(getattr(action, "_typehint", None)))
            if int in types and float in types and types.index(float) < types.index(int):
                cast(Any, action)._typehint = reduce(operator.or_, sorted(types, key=lambda each: each is not int))
        return added


class _SaveConfig(SaveConfigCallback):
    """Save the config of a training beside its checkpoints; other commands save none."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Do nothing yet: a run that is still refused must not replace the config of another one."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # For dumps of skipped steps, which `vidtwin replay` runs again.
        text = self.parser.dump(self.config, skip_unset=False)
        self.config = paths.escape(self.config)  # expanded again when the file is read
        super().setup(trainer, pl_module, "fit")
        cast(TrainingTask, pl_module).config = yaml.safe_load(text)["model"]


class VidTwinCLI(LightningCLI):
    """Commands of the trainer; `args` starts with the subcommand, and `foreign` are texts in it that others wrote."""

    def __init__(
        self, args: list[str], foreign: Collection[str] = (), trainer_class: type[VideoTrainer] = VideoTrainer
    ) -> None:
        self._foreign = foreign
        self._command = args[0]
        self._names_task = _names_task(args)
        super().__init__(
            TrainingTask if self._names_task else AutoencoderTask,
            LightningDataModule,
            subclass_mode_model=self._names_task,
            subclass_mode_data=True,
            trainer_class=trainer_class,
            parser_class=LightningParser,
            parser_kwargs={"prog": "vidtwin", self._command: {"usage": _usage(self._command)}},
            save_config_callback=_SaveConfig,
            save_config_kwargs={"overwrite": True},
            seed_everything_default=0,
            auto_configure_optimizers=False,
            load_from_checkpoint_support=False,
            args=args,
        )

    def subcommands(self) -> dict[str, set[str]]:  # type: ignore[override]
        """Return the given command alone: building the options of all takes longer than parsing."""
        return {self._command: _SKIPPED[self._command]}

    def add_core_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(self.trainer_class, "trainer")
        if self._names_task:
            parser.add_lightning_class_args(TrainingTask, "model", subclass_mode=True)
        else:
            parser.add_lightning_class_args(AutoencoderTask, "model")
        parser.add_lightning_class_args(LightningDataModule, "data", subclass_mode=True, required=False)

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        parser.add_lightning_class_args(LatestCheckpoint, "latest_checkpoint")
        parser.add_lightning_class_args(BestCheckpoint, "best_checkpoint")
        parser.add_lightning_class_args(StepGuard, "guard")
        parser.add_lightning_class_args(Health, "health")
        parser.add_lightning_class_args(ClipLogger, "clip_logger")
        if data := (parser.groups or {}).get("data"):  # Lightning's title is the first line of a longer text
            data.title = "Data module, the source of clips"

    def fit(self, **arguments: Any) -> None:
        """Train, as Lightning runs the command `fit`; a run that is refused leaves no folder."""
        with unused_runs.remove_if_unused(self.trainer):
            self.trainer.fit(**arguments)

    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> None:
        # Lightning's own method warns if sys.argv holds arguments too, as it does for every command line.
        words = cast(list[str], args)
        self.config = paths.expand(parser.parse_args(words), {*self._foreign, *paths.values(words)})

    def _parse_ckpt_path(self) -> None:
        """Let `--config` win over the checkpoint's arguments, and report differences; Lightning would not."""
        config = self._own_config()
        if not (path := config.get("ckpt_path")):
            return
        checkpoint = checkpoints.read(path, lazily=True)
        stored = checkpoint.get("model_spec")
        if stored and not self._names_task and config.model.autoencoder:
            for line in checkpoints.differences(model_config.spec(config), stored):
                sys.stderr.write(f"vidtwin: {path} differs from the config, which wins: {line}\n")

    def before_instantiate_classes(self) -> None:
        config = self._own_config()
        if self.subcommand not in ("fit", "replay", "plan") and not config.get("ckpt_path"):
            raise UserError(f"Expected trained weights to {self.subcommand} with; give --ckpt_path FILE.")
        if self.subcommand == "replay":
            config.data = None
        elif config.get("data") is None:
            raise UserError(
                f"Expected data to {self.subcommand} on; give --data ucf101 --data.root PATH or a --config."
            )
        if self.subcommand != "fit":
            config.trainer.logger = False  # evaluation creates no logger run; it only writes results
        elif config.get("resume") == "auto":
            _continue_latest_run(config.trainer)

    def instantiate_classes(self) -> None:
        with user_errors(self._own_config()):
            super().instantiate_classes()

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        try:
            return super().instantiate_trainer(**kwargs)
        except ValueError as error:  # an unknown accelerator, precision or strategy
            raise UserError(str(error)) from error

    def _own_config(self) -> Namespace:
        return self.config[str(self.config.subcommand)]


def _names_task(args: Sequence[str]) -> bool:
    """Return whether the class of the task is given, as configs/diffusion do; else it is that of autoencoders."""
    given = option_value(args, "model", "model.class_path") or ""
    if given.startswith("{"):  # of a dump, or by hand
        try:
            content = yaml.safe_load(given)
        except yaml.YAMLError:
            return False  # refused by the parser
        return isinstance(content, dict) and "class_path" in content
    model = read_config(path for path in config_paths(args) if path.is_file()).get("model")
    return bool(given) or (isinstance(model, dict) and "class_path" in model)


def _continue_latest_run(trainer: Namespace) -> None:
    """Let loggers that number their runs continue the newest one that has a checkpoint."""
    loggers = trainer.get("logger")
    if loggers in (None, True):  # Lightning's default, in a folder that can be searched
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
    """Rename metrics.csv of a run that continues, since Lightning's CSVLogger would delete it."""
    folder = runs / (version if isinstance(version, str) else f"version_{version}")
    if (folder / "metrics.csv").exists():
        earlier = len(list(folder.glob("metrics-*.csv")))
        (folder / "metrics.csv").rename(folder / f"metrics-{earlier}.csv")


def _usage(command: str) -> str:
    """Return a short usage; argparse would list every option, on sixty lines."""
    before = " DUMP" if command == "replay" else ""
    return f"vidtwin {command}{before} [--config FILE ...] [--OPTION VALUE ...]"


def _expand_dump(argv: list[str]) -> tuple[list[str], set[str]]:
    """Turn `replay DUMP` into `--dump DUMP` and options for the config that the dump holds; return its texts too."""
    if argv and not argv[0].startswith("-"):
        argv = ["--dump", *argv]
    if not (path := option_value(argv, "dump")):
        if {"-h", "--help"} & set(argv):
            return argv, set()
        raise UserError("Expected the dump of a skipped step, got none: vidtwin replay DUMP.")
    content = replay.read(path)
    argv = [f"--trainer.precision={content['precision']}", *argv]
    plugins.check_trusted(content["config"], path)
    if content["config"]:
        return [f"--model={json.dumps(content['config'])}", *argv], paths.texts(content["config"])
    if not option_value(argv, "config", "c"):
        raise UserError(f"Expected --config FILE: {path} comes from a training without one, so the loss is not known.")
    return argv, set()


def _quieten(command: str) -> None:
    """Silence Lightning's messages about intended settings."""
    expected = ("GPU available", "TPU available", "Tip:", "`weights_only` was not set")
    for module in ("utilities.rank_zero", "trainer.connectors.checkpoint_connector"):
        logging.getLogger(f"lightning.pytorch.{module}").addFilter(
            lambda record: not any(text in record.getMessage() for text in expected)
        )
    if command != "fit":  # callbacks that only watch a training are absent
        warnings.filterwarnings("ignore", message=r".*callbacks used to create the checkpoint.*")
    for message in (
        r".*does not have many workers.*",  # data modules choose the number themselves
        r".*srun.*",
        r".*`training_step` returned `None`.*",  # manual optimization
        r".*isinstance\(treespec, LeafSpec\).*",
        r".*sync_dist=True.*",  # the metrics are means over all ranks already
        r".*`lr_scheduler.step\(\)` before `optimizer.step\(\)`.*",  # the discriminator's steps from the start
        r".*module\(s\) in eval mode at the start of training.*",  # those of model.freeze
        r".*exists and is not empty.*",  # the folder of a run that continues
    ):
        warnings.filterwarnings("ignore", message=message)
