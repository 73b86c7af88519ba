"""Save the latest and the best checkpoints of a training."""

import os
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from torch import Tensor

from vidtwin import files
from vidtwin.errors import UserError
from vidtwin.storage import checkpoints


class LatestCheckpoint(Checkpoint):
    """Save `step-00001000.ckpt` every `every_n_steps` steps and at the end; `last.ckpt` is a link to the newest.

    From the first save on, `last.ckpt` exists and is intact at every moment. The disk must have room for `keep` + 1
    checkpoints, beside `best.ckpt`.

    Args:
        every_n_steps: Steps between two saves.
        keep: Number of checkpoints to keep; 2 or more give a fallback if the newest is damaged.
        dirpath: Folder; None is `checkpoints` in the run's folder.
    """

    # Lightning's ModelCheckpoint skips a step that it saved before a rollback, warns of every save under manual
    # optimization, and removes `last.ckpt` before it links it again.

    def __init__(self, every_n_steps: int = 1000, keep: int = 2, dirpath: str | None = None) -> None:
        if every_n_steps < 1 or keep < 1:
            raise UserError(f"Expected every_n_steps and keep to be 1 or more, got {every_n_steps} and {keep}.")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.dirpath: Path | None = None  # set by `setup`, the same on all ranks
        self._given = dirpath
        self._saved = 0  # step of the newest; step 0 is not saved

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.dirpath = trainer.strategy.broadcast(self.folder(trainer))
            self._saved = 0

    def folder(self, trainer: Trainer) -> Path:
        """Return the folder for a trainer, as this rank sees it; `setup` broadcasts it as `dirpath`."""
        if self._given is not None:
            return Path(os.path.realpath(self._given))
        if not trainer.loggers:
            return Path(trainer.default_root_dir) / "checkpoints"
        logger = trainer.loggers[0]  # as in ModelCheckpoint, so that both write to one folder
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse a folder with checkpoints of another run; remove the temporary files of a killed one."""
        if self.dirpath is None or _is_dry(trainer):
            return
        there = checkpoints.candidates(self.dirpath) if trainer.is_global_zero else []
        there = trainer.strategy.broadcast(there)
        if there and not _continues(trainer, self.dirpath):
            raise UserError(
                f"Expected a new run's folder, got one with {there[0]}; resume it by --ckpt_path {there[0]} or "
                "--resume auto, or name another by --trainer.logger.init_args.name."
            )
        if trainer.is_global_zero and self.dirpath.is_dir():
            for path in list(self.dirpath.iterdir()):
                target = files.intended_name(path, unmarked=True) or ""
                if checkpoints.is_checkpoint_name(target):
                    if path.is_symlink():  # of `files.link`, which locks nothing
                        path.unlink(missing_ok=True)
                    else:
                        files.remove_leftovers(self.dirpath, target)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < self._saved:
            self._saved = 0  # after a rollback steps are taken, and saved, again
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer, again: bool = False) -> None:
        """Save now; with `again` even if this step has been saved. All ranks must call it together."""
        step = trainer.global_step
        if self.dirpath is None or (step == self._saved and not again) or _is_dry(trainer):
            return
        path = checkpoints.step_path(self.dirpath, step)
        trainer.save_checkpoint(path)
        self._saved = step
        if trainer.is_global_zero:
            last = self.dirpath / "last.ckpt"
            with checkpoints.explain_full_disk(last):
                files.link(last, path)
            self._remove_others(step)
        trainer.strategy.barrier("LatestCheckpoint.save")  # after it `last.ckpt` is the new one for all ranks

    def _remove_others(self, newest: int) -> None:
        """Remove all but the newest `keep` checkpoints, and those of later steps that a rollback has left."""
        assert self.dirpath is not None
        found = checkpoints.step_files(self.dirpath)
        kept = [step for step in found if step <= newest][: self.keep]
        for step, path in found.items():
            if step not in kept:
                path.unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """Save `best.ckpt` at the validation with the best value of `monitor` so far.

    Args:
        monitor: Name of a logged value. NaN is never the best.
        mode: "max" or "min".
        dirpath: Folder; None is `checkpoints` in the run's folder.
    """

    def __init__(self, monitor: str = "val/psnr", mode: str = "max", dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_top_k=1,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Do nothing: the resumed checkpoint may be older than `best.ckpt`, which holds the score to beat."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if _is_dry(trainer):
            return
        path = Path(self.format_checkpoint_name({}))
        score = self._read_score(path) if trainer.is_global_zero and _continues(trainer, path.parent) else None
        score = trainer.strategy.broadcast(score)
        self.best_model_score = None if score is None else torch.tensor(score)
        self.best_k_models = {} if self.best_model_score is None else {str(path): self.best_model_score}
        self.best_model_path = self.kth_best_model_path = "" if score is None else str(path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would skip a step at which it saved before a rollback.
        self._last_global_step_saved = 0
        super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        # Lightning takes anything, even NaN, as the first best.
        value = float("nan") if current is None else float(current)
        acceptable = value > -torch.inf if self.mode == "max" else value < torch.inf
        acceptable = trainer.strategy.reduce_boolean_decision(acceptable)
        return acceptable and super().check_monitor_top_k(trainer, current)

    def _read_score(self, path: Path) -> float | None:
        """Read the score of best.ckpt; None if it is missing, damaged or the best by another `monitor`."""
        if not path.is_file():
            return None
        try:
            checkpoints.check(path)
            state = checkpoints.read(path, lazily=True).get("callbacks", {}).get(self.state_key, {})
        except UserError as error:
            warnings.warn(f"the next validation replaces best.ckpt: {error}", stacklevel=2)
            return None
        score = state.get("best_model_score")
        return None if score is None else float(score)


def _continues(trainer: Trainer, folder: Path) -> bool:
    """Return whether this training continues the one with its checkpoints in the folder."""
    resumed = trainer.ckpt_path
    return trainer.global_step > 0 or bool(resumed and Path(resumed).resolve().parent == folder.resolve())


def _is_dry(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
