"""Log reconstructions to TensorBoard."""

from typing import Any

from lightning.pytorch import Callback, Trainer

from vidtwin.autoencoder import Reconstruction
from vidtwin.clips import views
from vidtwin.training.boards import add_clips, boards_of
from vidtwin.training.task import AutoencoderTask


class ClipLogger(Callback):
    """Log the first validation clips as filmstrips and animations: input, reconstruction, each latent alone.

    Without a `TensorBoardLogger` nothing is decoded or drawn, nor in a training of anything but an autoencoder.

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
        boards = boards_of(trainer)
        if not isinstance(pl_module, AutoencoderTask):
            return
        if wanted <= 0 or trainer.state.fn != "fit" or not trainer.is_global_zero or not boards:
            return
        first = slice(0, wanted)
        kept = Reconstruction(outputs.clip[first], {name: z[first] for name, z in outputs.latents.items()})
        with trainer.precision_plugin.forward_context():  # callbacks run outside of it
            clips = views(pl_module.autoencoder, batch["clip"][first], kept)
        for number, shown in enumerate(clips, self._logged):
            add_clips(boards, f"val_clips/{number}", shown, trainer.global_step, self.fps)
        self._logged += len(clips)
