"""Log silent failures as curves: latents that collapse or go unused, dead codes, a loader that is too slow."""

import math
import time
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.profilers import Profiler

from vidtwin.autoencoder import Reconstruction
from vidtwin.distributed import gather_objects
from vidtwin.metrics.frames import psnr
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.training.task import AutoencoderTask


class Health(Callback):
    """Log statistics of the latents in each validation of an autoencoder's training.

    They are over the clips of all ranks, in evaluation mode:

    - `val/kl/<latent>`: KL of a Gaussian latent to N(0, 1) in nats per clip, the sum of `val/kl/<latent>/<channel>`.
    - `val/active_units/<latent>`: share (0 to 1) of the latent's numbers whose posterior mean has a variance above 0.01
      over the clips (Burda et al. 2016, 5.2); `val/active_units/<latent>/<channel>`: the same within a channel. The
      other numbers carry nothing of the clip: at 0 the latent has collapsed.
    - `val/codebook_usage/<latent>`, `val/dead_codes/<latent>`, `val/perplexity/<latent>`: for quantized latents,
      instead, the share of codes that occur, the number that do not, and exp of the entropy of their frequencies.
    - `val/psnr/<latent>_only`: PSNR (dB, mean over clips) of the latent decoded alone, if the model supports it.

    and in training

    - `train/loader_wait`: seconds per batch that the loop waited for its loader, mean over the last
      `trainer.log_every_n_steps` batches, of the slowest rank (the others wait for it at the gradients).

    Args:
        partial: Decode each latent alone, which costs one decoding of every validation clip per latent.
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
        self, trainer: Trainer, pl_module: AutoencoderTask, outputs: Reconstruction, batch: dict[str, Any], *_: Any
    ) -> None:
        if not _is_logged(trainer) or not isinstance(pl_module, AutoencoderTask):
            return
        if outputs.encoding is not None:
            self._latents.update(outputs.encoding)
        if self.partial and pl_module.autoencoder.partial_latents:
            clip = batch["clip"]
            for name, latent in outputs.latents.items():
                with trainer.precision_plugin.forward_context():  # callbacks run outside of it
                    decoded = pl_module.autoencoder.decode({name: latent}, clip.shape[2])
                self._alone.setdefault(name, []).extend(psnr(decoded, clip).mean(1).tolist())

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        if not _is_logged(trainer):
            return
        latents, alone = LatentStatistics(), dict[str, list[float]]()
        for others, their_clips in gather_objects((self._latents, self._alone)):
            latents.merge(others)
            for name, clips in their_clips.items():
                alone.setdefault(name, []).extend(clips)
        values: dict[str, float] = {}
        for name, statistics in latents.compute().items():
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
        for name, clips in alone.items():
            values[f"val/psnr/{name}_only"] = math.fsum(clips) / len(clips)
        if values:
            for logger in trainer.loggers:
                logger.log_metrics(values, trainer.global_step)

    def _per_channel(self, name: str, values: torch.Tensor) -> dict[str, float]:
        if len(values) > self.max_channels:
            return {}
        return {f"{name}/{channel}": float(value) for channel, value in enumerate(values)}

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

    def _detach(self, *_: Any) -> None:
        if self._stopwatch is not None:
            self._stopwatch.detach()
            self._stopwatch = None

    on_train_end = on_exception = _detach  # type: ignore[assignment]


class _Stopwatch:
    """Measure the seconds in `next()` of the training loader, which Lightning reports to the trainer's profiler.

    The time between the hooks of two batches would include validations, checkpoints, and on a GPU the step itself, for
    which the progress bar waits when it reads the loss. Starting the loader's workers is not counted; the wait for
    their first batch is.
    """

    ACTION = "train_dataloader_next"

    def __init__(self, profiler: Profiler) -> None:
        self._profiler = profiler
        self._start, self._stop = profiler.start, profiler.stop
        self._seconds = self._began = 0.0
        # Patch the object: Lightning behaves differently for another class of profiler than the user's.
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
        """Return the seconds since the last call."""
        seconds, self._seconds = self._seconds, 0.0
        return seconds

    def detach(self) -> None:
        """Restore the profiler."""
        for name in ("start", "stop"):
            vars(self._profiler).pop(name, None)


def _is_logged(trainer: Trainer) -> bool:
    """Return whether `AutoencoderTask` logs this validation: not a sanity check of a few clips."""
    whole = not trainer.sanity_checking or trainer.num_sanity_val_steps == float("inf")
    return trainer.state.fn == "fit" and whole
