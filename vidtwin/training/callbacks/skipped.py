"""Synchronize the list of unreadable videos across ranks."""

from lightning.pytorch import Callback, LightningModule, Trainer

from vidtwin.data import ClipSource
from vidtwin.distributed import gather_objects


class SkippedVideos(Callback):
    """Share the unreadable videos of all ranks at the end of each epoch, if the data are a `ClipSource`.

    So a video is reported once, results list what any rank skipped, and too many of them stop all ranks together.
    """

    def _share(self, trainer: Trainer, pl_module: LightningModule) -> None:
        data = getattr(trainer, "datamodule", None)  # missing if loaders were passed
        if isinstance(data, ClipSource) and trainer.world_size > 1:
            data.share_skipped(gather_objects)

    on_train_epoch_end = on_validation_epoch_end = on_predict_epoch_end = _share
