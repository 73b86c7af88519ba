"""Synchronize the list of unreadable videos across ranks."""

from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from vidtwin.data import ClipSource


class SkippedVideos(Callback):
    """Share at the end of each epoch which videos any rank could not read, if the data are a `ClipSource`.

    So a video is reported once, results list what any rank skipped, and too many of them stop all ranks together.
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
        data = getattr(trainer, "datamodule", None)  # missing if loaders were passed
        if isinstance(data, ClipSource) and trainer.world_size > 1:
            data.share_skipped(_gather)


def _gather(value: Any) -> list[Any]:
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
