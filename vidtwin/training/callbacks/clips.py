"""Reconstructions in TensorBoard, from before the first step on."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from vidtwin.autoencoder import Reconstruction
from vidtwin.clips import views
from vidtwin.training.task import AutoencoderTask
from vidtwin.video import panels


class ClipLogger(Callback):
    """Log the first validation clips as filmstrips and animations: input, reconstruction, each latent alone.

    Args:
        num_clips: Clips shown; 0 shows none.
        fps: Frames per second of the animation.
    """

    def __init__(self, num_clips: int = 4, fps: float = 8.0) -> None:
        self.num_clips = num_clips
        self.fps = fps
        self._logged = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._logged = 0

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: AutoencoderTask,
        outputs: Reconstruction,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        wanted = self.num_clips - self._logged
        if wanted <= 0 or trainer.state.fn != "fit" or not trainer.is_global_zero:
            return
        first = slice(0, wanted)
        kept = Reconstruction(outputs.clip[first], {name: z[first] for name, z in outputs.latents.items()})
        with trainer.precision_plugin.forward_context():  # callbacks run outside of it: bf16 latents, fp32 weights
            shown_views = views(pl_module.autoencoder, batch["clip"][first], kept)
        for shown in shown_views:
            for logger in trainer.loggers:
                if isinstance(logger, TensorBoardLogger):
                    tag = f"val_clips/{self._logged}"
                    logger.experiment.add_image(
                        f"{tag}/frames", panels.filmstrip(shown), trainer.global_step, dataformats="HWC"
                    )
                    animation = panels.gif(panels.side_by_side(shown), self.fps)
                    self._add(logger, f"{tag}/video", animation, trainer.global_step)
            self._logged += 1

    @staticmethod
    def _add(logger: TensorBoardLogger, tag: str, encoded: bytes, step: int) -> None:
        # SummaryWriter.add_video needs moviepy to make the same GIF; the protocol buffer takes encoded bytes.
        from tensorboard.compat.proto.summary_pb2 import Summary

        image = Summary.Image(encoded_image_string=encoded, colorspace=3)
        writer = logger.experiment._get_file_writer()
        writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
