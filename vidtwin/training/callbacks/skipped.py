"""What one rank could not read is known to all."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer


class SkippedVideos(Callback):
    """At the end of each epoch the ranks tell each other which videos they could not read.

    So a video is told once, results list what any rank skipped, and too many of them stop all ranks together. It works
    with data modules that have `share_skipped`.
    """

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share(trainer)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share(trainer)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share(trainer)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._share(trainer)

    def _share(self, trainer: Trainer) -> None:
        share: Any = getattr(getattr(trainer, "datamodule", None), "share_skipped", None)
        if share is not None and trainer.world_size > 1:
            share(_gather)


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
