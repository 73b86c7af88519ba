"""Which checkpoints training leaves behind."""

from datetime import timedelta
from pathlib import Path

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint


class LatestCheckpoint(ModelCheckpoint):
    """`last.ckpt`, replaced every `every_n_steps` steps and when training ends.

    Args:
        every_n_steps: Steps (batches) between two writes.
        train_time_interval: Write by the clock instead.
        dirpath: Folder; None is `checkpoints` in the run's folder.
    """

    def __init__(
        self, every_n_steps: int = 1000, train_time_interval: timedelta | None = None, dirpath: str | None = None
    ) -> None:
        super().__init__(
            dirpath=dirpath,
            filename="last",
            save_top_k=1,
            every_n_train_steps=None if train_time_interval else every_n_steps,
            train_time_interval=train_time_interval,
            enable_version_counter=False,
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
