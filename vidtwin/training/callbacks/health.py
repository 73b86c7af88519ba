"""What can go wrong in silence, as curves: latents that collapse or go unused, dead codes, a loader that lags."""

import math
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import Profiler

from vidtwin.autoencoder import Reconstruction
from vidtwin.metrics.frames import psnr
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.training.task import AutoencoderTask


class Health(Callback):
    """Log in each validation of a training, over the clips of all ranks in evaluation mode:

    - `val/kl/<latent>`: of Gaussian latents, KL to N(0, 1) in nats per clip; `val/kl/<latent>/<channel>` add up to it.
    - `val/active_units/<latent>`: the share (0 to 1) of the latent's numbers whose posterior mean varies over the clips
      by more than 0.01 (Burda et al. 2016, 5.2); `val/active_units/<latent>/<channel>`: the same within a channel.
      What does not vary tells the decoder nothing of the clip: 0 is a latent that has collapsed.
    - `val/codebook_usage/<latent>`, `val/dead_codes/<latent>`, `val/perplexity/<latent>`: of quantized latents in place
      of these two, the share of codes that occur, how many never do, and exp of the entropy of how often each does.
    - `val/psnr/<latent>_only`: PSNR (dB, mean over clips) of what the latent gives alone, where the model can do that.

    and in training

    - `train/loader_wait`: seconds per batch that the loop stood still for its loader, mean over the last
      `trainer.log_every_n_steps` batches, on the rank where it was longest (the others wait for it at the gradients).

    Args:
        partial: Whether to decode each latent alone: one more decoding of every validation clip for each latent.
        max_channels: Latents with more channels (axis 1) are logged as a whole only.
    """

    def __init__(self, partial: bool = True, max_channels: int = 64) -> None:
        self.partial = partial
        self.max_channels = max_channels
        self._latents = LatentStatistics()
        self._alone: dict[str, list[float]] = {}
        self._stopwatch: _Stopwatch | None = None
        self._batches = 0

    # Validation.

    def on_validation_epoch_start(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._latents = LatentStatistics()
        self._alone = {}

    def on_validation_batch_end(  # type: ignore[override]
        self,
        trainer: Trainer,
        pl_module: AutoencoderTask,
        outputs: Reconstruction,
        batch: dict[str, Any],
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        if not _is_logged(trainer):
            return
        if outputs.encoding is not None:
            self._latents.update(outputs.encoding)
        if self.partial and pl_module.autoencoder.partial_latents:
            clip = batch["clip"]
            for name, latent in outputs.latents.items():
                with trainer.precision_plugin.forward_context():  # callbacks run outside of it
                    alone = pl_module.autoencoder.decode({name: latent}, clip.shape[2])
                self._alone.setdefault(name, []).extend(psnr(alone, clip).mean(1).tolist())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        if not _is_logged(trainer):
            return
        self._gather(trainer)
        values: dict[str, float] = {}
        for name, statistics in self._latents.compute().items():
            if "kl" in statistics:
                values[f"val/kl/{name}"] = float(statistics["kl"].sum())
                values |= self._per_channel(f"val/kl/{name}", statistics["kl"])
            if "active_units" in statistics:
                shares = statistics["active_units"] / statistics["units"]
                values[f"val/active_units/{name}"] = float(shares.mean())
                values |= self._per_channel(f"val/active_units/{name}", shares)
            if "perplexity" in statistics:
                for key in ("codebook_usage", "dead_codes", "perplexity"):
                    values[f"val/{key}/{name}"] = float(statistics[key])
        for name, clips in self._alone.items():
            values[f"val/psnr/{name}_only"] = math.fsum(clips) / len(clips)
        if values:
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    def _per_channel(self, name: str, values: torch.Tensor) -> dict[str, float]:
        if len(values) > self.max_channels:
            return {}
        return {f"{name}/{channel}": float(value) for channel, value in enumerate(values)}

    def _gather(self, trainer: Trainer) -> None:
        """All ranks' clips, in one exchange that each takes part in, whatever it has seen."""
        if trainer.world_size == 1:
            return
        gathered: list[Any] = [None] * trainer.world_size
        torch.distributed.all_gather_object(gathered, (self._latents, self._alone))
        self._latents, self._alone = LatentStatistics(), {}
        for latents, alone in gathered:
            self._latents.merge(latents)
            for name, clips in alone.items():
                self._alone.setdefault(name, []).extend(clips)

    # Training.

    def on_train_start(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._stopwatch = _Stopwatch(trainer.profiler)  # type: ignore[attr-defined]
        self._batches = 0

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: AutoencoderTask, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._batches += 1
        every: int = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if self._stopwatch is None or not 0 < every <= self._batches:
            return
        wait = torch.tensor(self._stopwatch.read() / self._batches, device=pl_module.device)
        wait = trainer.strategy.reduce(wait, reduce_op="max")
        self._batches = 0
        for logger in trainer.loggers:
            logger.log_metrics({"train/loader_wait": float(wait)}, max(trainer.global_step - 1, 0))

    def on_train_end(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        self._detach()

    def on_exception(self, trainer: Trainer, pl_module: AutoencoderTask, exception: BaseException) -> None:  # type: ignore[override]
        self._detach()

    def _detach(self) -> None:
        if self._stopwatch is not None:
            self._stopwatch.detach()
            self._stopwatch = None


class _Stopwatch:
    """Seconds in `next()` of the training loader, which Lightning's loop reports to the trainer's profiler.

    From the end of one batch's hooks to the start of the next one's would count more: validations, checkpoints, and on
    a GPU the step itself, for whose end the progress bar waits when it reads the loss. What is not counted either is
    making the loader's workers; the wait for their first batch is.
    """

    ACTION = "train_dataloader_next"

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler
        self._start, self._stop = profiler.start, profiler.stop
        self._seconds = self._began = 0.0
        # On the object, not by a profiler of our own: Lightning looks at the class of the user's.
        profiler.start, profiler.stop = self.start, self.stop  # type: ignore[method-assign]

    def start(self, action_name: str) -> None:
        self._start(action_name)
        if action_name.endswith(self.ACTION):
            self._began = time.monotonic()

    def stop(self, action_name: str) -> None:
        if action_name.endswith(self.ACTION):
            self._seconds += time.monotonic() - self._began
        self._stop(action_name)

    def read(self) -> float:
        """Seconds since the last reading."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def detach(self) -> None:
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)


def _is_logged(trainer: Trainer) -> bool:
    """Validations whose values `AutoencoderTask` logs: not a sanity check of a few clips, but one of all."""
    whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
    return trainer.state.fn == "fit" and whole
