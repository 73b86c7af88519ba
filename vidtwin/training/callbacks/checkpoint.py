"""Which checkpoints training leaves behind."""

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
    """`step-00001000.ckpt` every `every_n_steps` steps and when training ends; `last.ckpt` is a link to the newest.

    At every moment from the first one on, `last.ckpt` is there and whole. The disk must have room for `keep` + 1 of
    them, beside `best.ckpt`.

    Args:
        every_n_steps: Steps between two writes.
        keep: How many of the newest stay. With 2 or more there is one to go back to if the newest is damaged.
        dirpath: Folder; None is `checkpoints` in the run's folder.
    """

    # Not Lightning's ModelCheckpoint: that one skips a step that it has saved before training was rolled back, warns of
    # every save under manual optimization, and removes `last.ckpt` before it links it anew.

    def __init__(self, every_n_steps: int = 1000, keep: int = 2, dirpath: str | None = None) -> None:
        if every_n_steps < 1 or keep < 1:
            raise UserError(f"Expected every_n_steps and keep to be 1 or more, got {every_n_steps} and {keep}.")
        self.every_n_steps = every_n_steps
        self.keep = keep
        self.dirpath: Path | None = None  # from `setup` on, the same on all ranks
        self._wanted = dirpath
        self._saved = 0  # the step of the newest; before the first step there is nothing to save

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit":
            self.dirpath = trainer.strategy.broadcast(self.folder(trainer))
            self._saved = 0

    def folder(self, trainer: Trainer) -> Path:
        """Where a training with this trainer writes, as this rank sees it; in `setup` all agree upon `dirpath`."""
        if self._wanted is not None:
            return Path(os.path.realpath(os.path.expanduser(self._wanted)))
        if not trainer.loggers:
            return Path(trainer.default_root_dir) / "checkpoints"
        logger = trainer.loggers[0]  # as Lightning's ModelCheckpoint does, that both write into one folder
        version = logger.version if isinstance(logger.version, str) else f"version_{logger.version}"
        return Path(logger.save_dir or trainer.default_root_dir) / str(logger.name) / version / "checkpoints"

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Refuse to write among the checkpoints of another run; remove what a killed one left unfinished."""
        if self.dirpath is None or _is_dry(trainer):
            return
        there = checkpoints.candidates(self.dirpath) if trainer.is_global_zero else []
        there = trainer.strategy.broadcast(there)
        if there and not _goes_on(trainer, self.dirpath):
            raise UserError(
                f"Expected a new run's folder, got one with {there[0]}; go on with it by --ckpt_path {there[0]} or by "
                "--resume auto, or name another by --trainer.logger.init_args.name."
            )
        if trainer.is_global_zero and self.dirpath.is_dir():
            for path in self.dirpath.iterdir():
                if checkpoints.is_checkpoint_name(files.intended_name(path) or ""):
                    path.unlink(missing_ok=True)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step < self._saved:
            self._saved = 0  # rolled back: these steps are taken, and saved, again
        if trainer.global_step % self.every_n_steps == 0:
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.save(trainer)

    def save(self, trainer: Trainer, again: bool = False) -> None:
        """Save now; a step that is saved already only `again`. All ranks must call it together."""
        step = trainer.global_step
        if self.dirpath is None or (step == self._saved and not again) or _is_dry(trainer):
            return
        path = checkpoints.step_path(self.dirpath, step)
        trainer.save_checkpoint(path)
        self._saved = step
        if trainer.is_global_zero:
            last = self.dirpath / "last.ckpt"
            with checkpoints.explaining_a_full_disk(last):
                files.link(last, path)
            self._remove_others(step)
        trainer.strategy.barrier("LatestCheckpoint.save")  # when it returns, `last.ckpt` is the new one on all ranks

    def _remove_others(self, newest: int) -> None:
        """All but the newest `keep`. Those of later steps are from before a rollback."""
        assert self.dirpath is not None
        found = checkpoints.step_files(self.dirpath)
        kept = [step for step in found if step <= newest][: self.keep]
        for step, path in found.items():
            if step not in kept:
                path.unlink(missing_ok=True)


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`, the highest of `monitor` over the validations so far.

    Args:
        monitor: What is compared, as it is logged. NaN is never the best.
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
        """Nothing: the checkpoint that is resumed may be older than `best.ckpt`, which itself says what to beat."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        if _is_dry(trainer):
            return
        path = Path(self.format_checkpoint_name({}))
        score = self._score_of(path) if trainer.is_global_zero and _goes_on(trainer, path.parent) else None
        score = trainer.strategy.broadcast(score)
        self.best_model_score = None if score is None else torch.tensor(score)
        self.best_k_models = {} if self.best_model_score is None else {str(path): self.best_model_score}
        self.best_model_path = self.kth_best_model_path = "" if score is None else str(path)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Lightning would pass over a step at which the best was saved before training was rolled back.
        self._last_global_step_saved = 0
        super().on_validation_end(trainer, pl_module)

    def check_monitor_top_k(self, trainer: Trainer, current: Tensor | None = None) -> bool:
        # Lightning takes anything, even NaN, where there is no best yet.
        value = float("nan") if current is None else float(current)
        acceptable = value > -torch.inf if self.mode == "max" else value < torch.inf
        acceptable = trainer.strategy.reduce_boolean_decision(acceptable)
        return acceptable and super().check_monitor_top_k(trainer, current)

    def _score_of(self, path: Path) -> float | None:
        """The score that a checkpoint was saved for; None if it is absent, damaged or the best by another measure."""
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


def _goes_on(trainer: Trainer, folder: Path) -> bool:
    """Whether this training continues the one whose checkpoints lie in the folder."""
    resumed = trainer.ckpt_path
    return trainer.global_step > 0 or bool(resumed and Path(resumed).resolve().parent == folder.resolve())


def _is_dry(trainer: Trainer) -> bool:
    return bool(getattr(trainer, "fast_dev_run", False))
