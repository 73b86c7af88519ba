"""Log samples of a diffusion model to TensorBoard."""

from collections.abc import Callable
from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer

from vidtwin.training.base import TrainingTask
from vidtwin.training.boards import add_clips, boards_of
from vidtwin.training.sharding import placement_of
from vidtwin.video import Frames


class SampleLogger(Callback):
    """Draw samples every few steps, and log them as a filmstrip and an animation.

    All lots are of the same noise, so that they show how the model changes. Without a `TensorBoardLogger` none is
    drawn.

    Args:
        every_n_steps: Steps between two lots; 0 draws none.
        num_samples: Number of samples of a lot.
        draw: Draws a number of samples → frames (T, H, W, 3) by name.
        fps: Frames per second of the animation.
    """

    def __init__(
        self, every_n_steps: int, num_samples: int, draw: Callable[[int], dict[str, Frames]], fps: float = 8.0
    ) -> None:
        self.every_n_steps, self.num_samples, self.draw, self.fps = every_n_steps, num_samples, draw, fps

    def shows(self, trainer: Trainer) -> bool:
        """Return whether samples are drawn in a training."""
        return bool(self.every_n_steps and boards_of(trainer)) and not getattr(trainer, "fast_dev_run", False)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        step = trainer.global_step
        skipped = bool(outputs) and "rejected" in outputs
        if skipped or not self.shows(trainer) or step % self.every_n_steps:
            return
        task = cast(TrainingTask, pl_module)
        with task.ema.averaged(trainer, task):
            placement_of(trainer).gather(task.network)  # all ranks together
            if trainer.is_global_zero:
                with trainer.precision_plugin.forward_context():  # callbacks run outside of it
                    add_clips(boards_of(trainer), "samples", self.draw(self.num_samples), step, self.fps)
            placement_of(trainer).reshard(task.network)
