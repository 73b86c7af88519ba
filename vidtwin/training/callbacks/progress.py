"""Show the progress of a training, with the time left until its end."""

import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import TQDMProgressBar

from vidtwin.training.base import TrainingTask

_INTERVAL = 0.5  # seconds


class ProgressBar(TQDMProgressBar):
    """Lightning's bar with loss, PSNR, clips per second (all ranks) and the time left until max_steps.

    It is drawn every half second, since the values that it shows are read from the device, which then has to be waited
    for.
    """

    def __init__(self) -> None:
        super().__init__()
        self._drawn = 0.0
        self._started: tuple[float, int] | None = None
        self._clips = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        super().on_train_start(trainer, pl_module)
        self._started = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._started is None:  # the first batch includes starting workers and choosing kernels
            self._started = (time.monotonic(), trainer.global_step)
            self._clips = 0
        else:
            self._clips += cast(TrainingTask, pl_module).count_clips(batch) * trainer.world_size
        is_last = batch_idx + 1 == trainer.num_training_batches or trainer.global_step == trainer.max_steps
        if is_last or time.monotonic() - self._drawn >= _INTERVAL:
            super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)
            self._drawn = time.monotonic()

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        metrics: dict[str, Any] = dict(super().get_metrics(trainer, pl_module))
        metrics.pop("v_num", None)
        for name in ("loss", "psnr"):
            if (value := trainer.callback_metrics.get(f"train/{name}")) is not None:
                metrics[name] = float(value)
        if self._started is not None and self._clips:
            elapsed = time.monotonic() - self._started[0]
            steps = trainer.global_step - self._started[1]
            metrics["clips/s"] = f"{self._clips / elapsed:.1f}"
            if trainer.max_steps > 0 and steps:
                left = (trainer.max_steps - trainer.global_step) * elapsed / steps
                metrics["ETA"] = str(timedelta(seconds=round(left)))
        return metrics

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        with suppress(TypeError):  # no bar yet
            self.train_progress_bar.close()  # ends its line, so that the error gets its own
