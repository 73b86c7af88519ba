"""Remove the folder of a training that ends before its first step: it would take the number of the next run."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import Callback

_FIRST_FILES = ("events.out.tfevents.*", "hparams.yaml", "config.yaml", "metrics.csv")  # written before a step


class _StepWatcher(Callback):
    """Note whether a batch was trained on."""

    done = False

    def on_train_batch_end(self, *_: Any, **__: Any) -> None:
        self.done = True


@contextmanager
def remove_if_unused(trainer: Trainer) -> Iterator[None]:
    """Remove the folders that loggers make in the block if it raises before the first step."""
    watcher, folders = _StepWatcher(), _list_new_folders(trainer)
    cast(Any, trainer).callbacks.append(watcher)
    try:
        yield
    except BaseException:
        for folder in () if watcher.done else folders:
            _remove(folder)
        raise


def _list_new_folders(trainer: Trainer) -> list[Path]:
    """List the folders of the loggers' runs, but for those of runs that continue."""
    if not trainer.is_global_zero:
        return []
    named = [getattr(logger, "log_dir", None) for logger in trainer.loggers]
    return [path for path in map(Path, filter(None, named)) if not path.exists()]


def _remove(folder: Path) -> None:
    """Remove a folder that holds nothing but what loggers write at their start."""
    held = list(folder.iterdir()) if folder.is_dir() else []
    if all(path.is_file() and any(map(path.match, _FIRST_FILES)) for path in held):
        for path in held:
            path.unlink()
        if folder.is_dir():
            folder.rmdir()
