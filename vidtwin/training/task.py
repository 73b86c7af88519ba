"""The one LightningModule: train and validate any video autoencoder.

One step is one batch that updated the generator. Lightning counts a step for every optimizer under manual
optimization; here only the generator's goes through Lightning's wrapper, so that max_steps, checkpoint intervals,
schedules, the GAN's start and every logged curve count batches. A batch whose loss or gradient is not finite on any
rank updates nothing on all of them and is no step.

All that a step draws at random depends on (seed, batches so far, rank) alone: nothing between two steps, and no
interruption, can shift it.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import psnr
from vidtwin.metrics.latents import codebook_use
from vidtwin.schedules import WarmupCosine
from vidtwin.storage import checkpoints
from vidtwin.training.buffers import copy_buffers, restore_buffers, share_buffers
from vidtwin.training.callbacks.ema import EMA
from vidtwin.training.checks import check_training, freeze
from vidtwin.training.finite import bad_gradients, bad_terms, find_reason
from vidtwin.training.optimization import gradients, resume_rates, schedule, step_at
from vidtwin.training.sharding import Placement, placement_of

Batch = dict[str, Any]
COUNTS = ("batches", "skipped", "rate_scale", "seed")  # what a checkpoint keeps of a training, beside Lightning's


class AutoencoderTask(LightningModule):
    """Train and evaluate a video autoencoder, with a GAN where the loss has a discriminator.

    A batch is `{"clip": (B, 3, T, H, W) in [-1, 1], "label": (B,), "name": list[str]}`.

    Args:
        autoencoder: The model.
        loss: Its training loss; None is L1, LPIPS and KL with the paper's weights.
        optimizer: Of the autoencoder (and of the loss's log-variance where that is learned).
        scheduler: Learning-rate schedule of `optimizer`, stepped once per step.
        discriminator_optimizer: Of the loss's discriminator.
        discriminator_scheduler: Schedule of `discriminator_optimizer`, stepped once per step of the generator.
        gradient_clip_norm: Largest norm of the gradient, for each of the two players; None does not clip.
        accumulation: Parts that each batch is split into; their gradients add up to one step, and only one part's
            activations are in memory at a time. The batch is that of the step: data.batch_size clips on each device.
        ema_decay: Decay of the running average of the autoencoder's weights (0.999 looks back about 1,000 steps);
            None keeps none.
        use_ema: Evaluate with that average: in validation, and in the commands that read a checkpoint.
        freeze: Parts of the autoencoder that are not trained, by the names of its modules (`encoder`,
            `structure.qformer`).
        metrics: Metrics of validation; None takes the loss's LPIPS backbone for LPIPS.

    Attributes:
        batches: Batches that this training has seen, skipped ones included.
        skipped: Those among them that updated nothing, since their loss or gradient was not finite.
        rate_scale: Factor on every learning rate; a rollback may lower it.
        config: The `model` section of the config that it was built from, if it came from one.
    """

    def __init__(
        self,
        autoencoder: VideoAutoencoder,
        loss: AutoencoderLoss | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1.6e-4, weight_decay=1e-4),
        scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o),
        discriminator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1.6e-4, weight_decay=1e-4),
        discriminator_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o),
        gradient_clip_norm: float | None = None,
        accumulation: int = 1,
        ema_decay: float | None = None,
        use_ema: bool = False,
        freeze: list[str] | None = None,
        metrics: ClipMetrics | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise UserError(f"Expected model.gradient_clip_norm above 0, or null for none, got {gradient_clip_norm}.")
        if accumulation < 1:
            raise UserError(f"Expected model.accumulation of at least 1, got {accumulation}.")
        self.autoencoder = autoencoder
        self.loss = loss or AutoencoderLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.discriminator_optimizer = discriminator_optimizer
        self.discriminator_scheduler = discriminator_scheduler
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulation = accumulation
        self.ema = EMA(ema_decay, use_ema)
        self.freeze_parts = freeze or []
        self.metrics = metrics or ClipMetrics(getattr(self.loss.perceptual, "backbone", None))
        self.batches = 0
        self.skipped = 0
        self.rate_scale = 1.0
        self.config: dict[str, Any] | None = None
        self.seed: int | None = None
        self._validation_terms: dict[str, MeanMetric] = {}

    # Configure.

    def configure_callbacks(self) -> list[Callback]:
        # One and the same in all commands of a process, since it holds the average of the training before.
        return [] if self.ema in cast(Any, self.trainer).callbacks else [self.ema]

    def prepare_data(self) -> None:
        """On one rank of each machine, before the others: fetch what the loss may have to download."""
        if self.trainer.state.fn == "fit":
            self.loss.setup()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            freeze(self.autoencoder, self.freeze_parts)
            self.train(self.training)
            check_training(self.autoencoder, self.loss, self.trainer)
            self.loss.setup()
        self.metrics.setup()

    def configure_model(self) -> None:
        self._placement.shard(self.autoencoder)

    @property
    def _placement(self) -> Placement:
        return placement_of(self._trainer)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        players: list[tuple[Any, OptimizerCallable, LRSchedulerCallable]]
        players = [(self._generator_parameters(), self.optimizer, self.scheduler)]
        if self.loss.discriminator is not None:
            parameters = list(self.loss.discriminator.parameters())
            players.append((parameters, self.discriminator_optimizer, self.discriminator_scheduler))
        # A dry run ends within the warm-up, which is no mistake there.
        max_steps = None if getattr(self.trainer, "fast_dev_run", False) else self.trainer.max_steps
        optimizers = [make_optimizer(parameters) for parameters, make_optimizer, _ in players]
        makers = [make_scheduler for *_, make_scheduler in players]
        return optimizers, [
            schedule(optimizer, make, max_steps) for optimizer, make in zip(optimizers, makers, strict=True)
        ]

    def _generator_parameters(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        parameters = [p for p in self.autoencoder.parameters() if p.requires_grad]
        if self.loss.logvar is None:
            return parameters
        # In a group of its own: it is not sharded with the others, and an optimizer's kernel takes one kind at a time.
        return [{"params": parameters}, {"params": [self.loss.logvar]}]

    def on_fit_start(self) -> None:
        if self.seed is None:
            self.seed = self.trainer.strategy.broadcast(torch.initial_seed())

    def on_train_start(self) -> None:
        for scheduler in self._schedulers():
            resume_rates(scheduler)

    # Train.

    def train(self, mode: bool = True) -> "AutoencoderTask":
        super().train(mode)
        for part in self.freeze_parts:  # no dropout, no batch statistics
            if part in dict(self.autoencoder.named_modules()):
                self.autoencoder.get_submodule(part).eval()
        return self

    def forward(self, clip: Tensor) -> Reconstruction:
        return self.autoencoder(clip)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, str] | None:
        """One step; or none, where a loss or a gradient is not finite on any rank.

        Returns:
            None, or on all ranks `{"rejected": reason}`; the reason is empty where the own part of the batch is sound.
        """
        clip, step = _clip(batch), self.global_step
        if len(clip) < self.accumulation:
            raise UserError(
                f"Expected at least model.accumulation={self.accumulation} clips in a batch, got {len(clip)}; raise "
                "data.batch_size."
            )
        self.batches += 1
        before = copy_buffers(self)  # which a batch changes before it is known to be finite
        self.seed_draws(self.global_rank)
        means, reason = self._backward(clip, step)
        players = self._players(step)
        if reason is not None:
            self.skipped += 1
            for optimizer in players.values():
                optimizer.zero_grad()
            restore_buffers(self, before)
            self._log_step({"train/skipped": self.skipped / self.batches}, step, now=True)
            return {"rejected": reason}

        logged: dict[str, Any] = dict(means)
        for name, optimizer in players.items():
            self._update(optimizer, means[f"{name}/gradient_norm"])
            rate = optimizer.param_groups[0]["lr"] * self.rate_scale
            logged[f"lr/{'generator' if name == 'train' else name}"] = rate
        for scheduler in self._schedulers():
            scheduler.step()
        if self.trainer.world_size > 1:  # under manual optimization DDP does so before the first step only
            share_buffers(self)
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged["train/skipped"] = self.skipped / self.batches
        self._log_step(logged, step, now=every > 0 and (step + 1) % every == 0)
        shown = {"loss": logged["train/loss"], "psnr": logged["train/psnr"]}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=1)
        return None

    def seed_draws(self, rank: int) -> None:
        """Seed what the next step draws at random, by (seed, batches so far, rank)."""
        words = np.random.SeedSequence((self.seed or 0, self.batches, rank)).generate_state(2)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))  # models of others may draw from these two
        random.seed(int(words[1]))

    def losses(self, clip: Tensor, step: int, share: float = 1.0) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """One forward pass of (B, 3, T, H, W), then each player's terms: `total`, whose backward pass comes in between.

        The discriminator's are computed when the generator's graph is gone. `share` is the clip's part of the step's
        batch.
        """
        reconstruction = self.autoencoder(clip)
        last_layer = self.autoencoder.last_layer if self.loss.gan_is_on(step) else None
        with self._placement.probing(self.autoencoder):
            terms = self.loss.generator_loss(reconstruction, clip, last_layer, step)
        with torch.no_grad():
            terms["psnr"] = psnr(reconstruction.clip, clip).mean()
        if reconstruction.encoding is not None:
            terms |= codebook_use(reconstruction.encoding)
        yield "train", terms
        if terms := self.loss.discriminator_loss(reconstruction.clip, clip, step, share):
            yield "discriminator", terms

    def _players(self, step: int) -> dict[str, LightningOptimizer | Optimizer]:
        """Who is trained in a step: optimizers by the first part of the names in the logs."""
        generator, discriminator = self._optimizers()
        if discriminator is None or not self.loss.gan_is_on(step):
            return {"train": generator}
        # Lightning's wrapper counts a step; the bare optimizer does not.
        return {"train": generator, "discriminator": discriminator.optimizer}

    def _backward(self, clip: Tensor, step: int) -> tuple[dict[str, Tensor], str | None]:
        """Gradients of the players for a batch, part by part: what to log, and why it has to be skipped (or None)."""
        means: dict[str, Tensor] = {}
        parts = clip.tensor_split(self.accumulation)
        for index, part in enumerate(parts):
            share = len(part) / len(clip)
            with nullcontext() if index == len(parts) - 1 else self._without_sync():
                for player, terms in self.losses(part, step, share):
                    # Agreed upon before the backward pass, in which the ranks wait for each other.
                    reason = find_reason(self.trainer.strategy, terms["total"], partial(bad_terms, terms))
                    if reason is not None:
                        return means, reason
                    self.manual_backward(share * terms["total"])
                    for name, value in terms.items():
                        key = f"{player}/{'loss' if name == 'total' else name}"
                        means[key] = means.get(key, 0.0) + share * value.detach()
        self._placement.average_gradients(self.loss)
        norms = {
            name: self._placement.gradient_norm(gradients(optimizer)).detach()
            for name, optimizer in self._players(step).items()
        }
        means |= {f"{name}/gradient_norm": norm for name, norm in norms.items()}
        return means, find_reason(
            self.trainer.strategy, torch.stack([*norms.values()]).sum(), lambda: ("", bad_gradients(self))
        )

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            yield

    def _log_step(self, values: dict[str, Any], step: int, now: bool) -> None:
        """To the loggers at this step (which Lightning would count in batches, and give old values to skipped ones)."""
        self.log_dict(values, logger=False, batch_size=1)
        if now:
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in values.items()}, step)

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer | None]:
        optimizers = self.optimizers()
        if isinstance(optimizers, list):
            return optimizers[0], optimizers[1]
        return optimizers, None

    def _schedulers(self) -> list[LRScheduler]:
        schedulers = self.lr_schedulers() or []
        return cast(list[LRScheduler], schedulers if isinstance(schedulers, list) else [schedulers])

    def _update(self, optimizer: LightningOptimizer | Optimizer, norm: Tensor) -> None:
        """Clip to the largest norm and step, at the schedule's rate times `rate_scale`."""
        if self.gradient_clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._placement.clip_gradients(parameters, self.gradient_clip_norm, norm)
        step_at(optimizer, self.rate_scale)

    # Evaluate.

    def validation_step(self, batch: Batch, batch_idx: int) -> Reconstruction:  # type: ignore[override]
        clip = _clip(batch)
        reconstruction = self.autoencoder(clip)
        terms = self.loss.generator_loss(reconstruction, clip, None, step=-1) if self._loss_is_ready() else {}
        for name, value in terms.items():
            mean = self._validation_terms.setdefault(name, MeanMetric().to(self.device))
            mean.update(value.detach(), weight=len(clip))
        self.metrics.update(self.metrics(reconstruction.clip, clip))
        return reconstruction

    def on_validation_epoch_start(self) -> None:
        self._placement.gather(self.autoencoder)

    def on_validation_epoch_end(self) -> None:
        values = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        shown = dict(values)
        for name, mean in self._validation_terms.items():
            values[f"val/{'loss' if name == 'total' else name}"] = mean.compute()
            mean.reset()
        self.metrics.reset()
        if not self.trainer.sanity_checking:
            self.log_dict(shown, prog_bar=True, logger=self.trainer.state.fn != "fit")
            # For best_checkpoint.monitor, which may be any of them.
            self.log_dict({name: value for name, value in values.items() if name not in shown}, logger=False)
        # Lightning logs nothing of the validation before the first step, where the curves start. So all of them are
        # logged here, at the number of steps that were taken (unless that first one saw only a few clips).
        if not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == float("inf"):
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in values.items()}, self.global_step)

    def on_predict_epoch_start(self) -> None:
        self._placement.gather(self.autoencoder)

    def predict_step(self, batch: Batch, batch_idx: int) -> Reconstruction:
        return self.autoencoder(_clip(batch))

    def _loss_is_ready(self) -> bool:
        """`vidtwin validate` on a machine without LPIPS' backbone measures what it can; `fit` has checked before."""
        return self.trainer.state.fn == "fit"

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model_spec"] = self.autoencoder.spec()
        checkpoint["training"] = {name: getattr(self, name) for name in COUNTS}
        self.ema.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how a checkpoint of another model differs; outside of `fit` take the autoencoder's weights alone."""
        if self.trainer.state.fn != "fit":
            checkpoints.keep_autoencoder(checkpoint, self.state_dict(), self.ema.evaluate)
            return
        trained = sum(p.requires_grad for p in self.autoencoder.parameters()) + (self.loss.logvar is not None)
        checkpoints.check_resumable(checkpoint, self.state_dict(), trained)
        for name in COUNTS:  # absent from checkpoints of older versions
            setattr(self, name, checkpoint.get("training", {}).get(name, getattr(self, name)))


def _clip(batch: dict[str, Any]) -> Tensor:
    if "clip" not in batch:
        raise UserError(f"Expected batches with a clip, got {', '.join(batch)}; set --data to one of videos.")
    clip: Tensor = batch["clip"]
    return clip
