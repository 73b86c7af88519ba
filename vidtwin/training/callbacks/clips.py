"""Log reconstructions to TensorBoard."""

from typing import Any

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from vidtwin.autoencoder import Reconstruction
from vidtwin.clips import views
from vidtwin.training.task import AutoencoderTask
from vidtwin.video import panels


class ClipLogger(Callback):
    """Log the first validation clips as filmstrips and animations: input, reconstruction, each latent alone.

    Without a `TensorBoardLogger` nothing is decoded or drawn.

    Args:
        num_clips: Number of clips; 0 logs none.
        fps: Frames per second of the animation.
    """

    def __init__(self, num_clips: int = 4, fps: float = 8.0) -> None:
        self.num_clips = num_clips
        self.fps = fps
        self._logged = 0

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._logged = 0

    def on_validation_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: AutoencoderTask, outputs: Reconstruction, batch: dict[str, Any], *_: Any
    ) -> None:
        wanted = self.num_clips - self._logged
        boards = [logger for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
        if wanted <= 0 or trainer.state.fn != "fit" or not trainer.is_global_zero or not boards:
            return
        first = slice(0, wanted)
        kept = Reconstruction(outputs.clip[first], {name: z[first] for name, z in outputs.latents.items()})
        with trainer.precision_plugin.forward_context():  # callbacks run outside of it
            clips = views(pl_module.autoencoder, batch["clip"][first], kept)
        for number, shown in enumerate(clips, self._logged):
            tag, step = f"val_clips/{number}", trainer.global_step
            still, animation = panels.filmstrip(shown), panels.gif(panels.side_by_side(shown), self.fps)
            for board in boards:
                board.experiment.add_image(f"{tag}/frames", still, step, dataformats="HWC")
                _add_gif(board, f"{tag}/video", animation, step)
        self._logged += len(clips)


def _add_gif(logger: TensorBoardLogger, tag: str, encoded: bytes, step: int) -> None:
    # SummaryWriter.add_video needs moviepy to make the same GIF; the protocol buffer takes encoded bytes.
    from tensorboard.compat.proto.summary_pb2 import Summary

    image = Summary.Image(encoded_image_string=encoded, colorspace=3)
    writer = logger.experiment._get_file_writer()
    writer.add_summary(Summary(value=[Summary.Value(tag=tag, image=image)]), step)
