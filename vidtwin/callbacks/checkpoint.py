"""Which checkpoints training leaves behind."""

from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from vidtwin.errors import UserError


class LatestCheckpoint(ModelCheckpoint):
    """`last.ckpt`, replaced every `every_n_steps` steps and when training ends.

    Args:
        every_n_steps: Steps (batches) between two writes.
        dirpath: Folder; None is `checkpoints` in the run's folder.
    """

    def __init__(self, every_n_steps: int = 1000, dirpath: str | None = None) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_top_k=1,
            every_n_train_steps=every_n_steps,
            enable_version_counter=False,
        )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_fit_start(trainer, pl_module)
        fresh = not trainer.ckpt_path and trainer.global_step == 0
        if fresh and self.dirpath and not getattr(trainer, "fast_dev_run", False):
            last = Path(self.dirpath) / "last.ckpt"
            if last.exists():
                raise UserError(
                    f"Expected a new run's folder, got one with {last}; go on with it by --ckpt_path {last}, "
                    "or name another by --trainer.logger.init_args.name."
                )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if self.dirpath and not getattr(trainer, "fast_dev_run", False):
            trainer.save_checkpoint(Path(self.dirpath) / "last.ckpt")
        super().on_train_end(trainer, pl_module)


class BestCheckpoint(ModelCheckpoint):
    """`best.ckpt`, the highest of `monitor` over the validations so far.

    Args:
        monitor: What is compared, as it is logged.
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
