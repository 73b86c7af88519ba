"""The one LightningModule: trains, validates and tests any video autoencoder.

One step is one batch that updated the generator. Lightning counts a step for every optimizer under manual
optimization; here only the generator's goes through Lightning's wrapper, so that max_steps, checkpoint intervals,
schedules, the GAN's start and every logged curve count batches.
"""

from typing import Any, cast

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from vidtwin import checkpoints, weights
from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import psnr
from vidtwin.schedules import WarmupCosine

Batch = dict[str, Any]


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
        metrics: What validation and test measure; None takes the loss's LPIPS backbone for LPIPS.
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
        metrics: ClipMetrics | None = None,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.autoencoder = autoencoder
        self.loss = loss or AutoencoderLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.discriminator_optimizer = discriminator_optimizer
        self.discriminator_scheduler = discriminator_scheduler
        self.gradient_clip_norm = gradient_clip_norm
        self.metrics = metrics or ClipMetrics(getattr(self.loss.perceptual, "backbone", None))
        self._validation_terms: dict[str, MeanMetric] = {}

    # Configure.

    def prepare_data(self) -> None:
        """On one rank of each machine, before the others: fetch what the loss may have to download."""
        if self.trainer.state.fn == "fit":
            self.loss.setup()

    def setup(self, stage: str) -> None:
        if stage == "fit":
            if not any(p.requires_grad for p in self.autoencoder.parameters()):
                raise UserError(f"{type(self.autoencoder).__name__} has nothing to train; run `vidtwin test` with it.")
            self._check_steps()
            self._check_precision()
            self.loss.setup()
        self.metrics.setup()

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        players = [(self._generator_parameters(), self.optimizer, self.scheduler)]
        if self.loss.discriminator is not None:
            parameters = list(self.loss.discriminator.parameters())
            players.append((parameters, self.discriminator_optimizer, self.discriminator_scheduler))
        optimizers, schedulers = [], []
        for parameters, make_optimizer, make_scheduler in players:
            optimizers.append(make_optimizer(parameters))
            scheduler = make_scheduler(optimizers[-1])
            if isinstance(scheduler, WarmupCosine):
                # A dry run ends within the warm-up, which is no mistake there.
                dry = bool(getattr(self.trainer, "fast_dev_run", False))
                scheduler.set_total_steps(scheduler.warmup_steps + 1 if dry else self.trainer.max_steps)
            schedulers.append(scheduler)
        return optimizers, schedulers

    def _generator_parameters(self) -> list[nn.Parameter]:
        parameters = [p for p in self.autoencoder.parameters() if p.requires_grad]
        return parameters if self.loss.logvar is None else [*parameters, self.loss.logvar]

    def _check_steps(self) -> None:
        max_steps = self.trainer.max_steps
        if getattr(self.trainer, "fast_dev_run", False):
            return
        if max_steps <= 0:
            raise UserError(
                f"Expected trainer.max_steps above 0, got {max_steps}: warm-up, GAN start and schedules count steps."
            )
        if self.loss.discriminator is not None and self.loss.adversarial_start >= max_steps:
            raise UserError(
                f"Expected a GAN that starts within the training, got adversarial_start={self.loss.adversarial_start} "
                f"and trainer.max_steps={max_steps}; lower the first, or train without GAN by "
                "--model.loss.discriminator null."
            )

    def _check_precision(self) -> None:
        if str(self.trainer.precision) == "16-mixed":
            raise UserError(
                "Expected trainer.precision bf16-mixed or 32-true, got 16-mixed: one gradient scaler cannot serve the "
                "two players of a GAN."
            )

    # Train.

    def forward(self, clip: Tensor) -> Reconstruction:
        return self.autoencoder(clip)

    def training_step(self, batch: Batch, batch_idx: int) -> None:
        clip, step = batch["clip"], self.global_step
        generator, discriminator = self._optimizers()
        reconstruction = self.autoencoder(clip)

        terms = self.loss.generator_loss(reconstruction, clip, self._last_layer(step), step)
        norm = self._update(generator, terms["total"])
        logged = {f"train/{name}": value for name, value in terms.items() if name != "total"}
        logged |= {"train/loss": terms["total"].detach(), "train/gradient_norm": norm}
        logged["lr/generator"] = generator.param_groups[0]["lr"]

        if discriminator is not None and (terms := self.loss.discriminator_loss(reconstruction.clip, clip, step)):
            norm = self._update(discriminator.optimizer, terms["total"])
            logged |= {f"discriminator/{name}": value for name, value in terms.items() if name != "total"}
            logged |= {"discriminator/loss": terms["total"].detach(), "discriminator/gradient_norm": norm}
            logged["lr/discriminator"] = discriminator.param_groups[0]["lr"]

        for scheduler in self._schedulers():
            scheduler.step()
        self.log_dict(logged, batch_size=len(clip))
        with torch.no_grad():
            quality = psnr(reconstruction.clip.detach(), clip).mean()
        shown = {"loss": logged["train/loss"], "psnr": quality}
        self.log_dict(shown, prog_bar=True, logger=False, batch_size=len(clip))
        self.log("train/psnr", quality, batch_size=len(clip))

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer | None]:
        optimizers = self.optimizers()
        if isinstance(optimizers, list):
            return optimizers[0], optimizers[1]
        return optimizers, None

    def _schedulers(self) -> list[LRScheduler]:
        schedulers = self.lr_schedulers() or []
        return cast(list[LRScheduler], schedulers if isinstance(schedulers, list) else [schedulers])

    def _last_layer(self, step: int) -> Tensor | None:
        return self.autoencoder.last_layer if self.loss.gan_is_on(step) else None

    def _update(self, optimizer: LightningOptimizer | Optimizer, loss: Tensor) -> Tensor:
        """Backward, clip, step. Lightning's wrapper counts a step; the discriminator's bare optimizer does not."""
        self.manual_backward(loss)
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.gradient_clip_norm is not None:
            nn.utils.clip_grads_with_norm_(parameters, self.gradient_clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        return norm.detach()

    # Evaluate.

    def validation_step(self, batch: Batch, batch_idx: int) -> Reconstruction:  # type: ignore[override]
        clip = batch["clip"]
        reconstruction = self.autoencoder(clip)
        terms = self.loss.generator_loss(reconstruction, clip, None, step=-1) if self._loss_is_ready() else {}
        for name, value in terms.items():
            mean = self._validation_terms.setdefault(name, MeanMetric().to(self.device))
            mean.update(value.detach(), weight=len(clip))
        self.metrics.update(self.metrics(reconstruction.clip, clip))
        return reconstruction

    def on_validation_epoch_end(self) -> None:
        values = {f"val/{name}": value for name, value in self.metrics.compute().items()}
        shown = dict(values)
        for name, mean in self._validation_terms.items():
            values[f"val/{'loss' if name == 'total' else name}"] = mean.compute()
            mean.reset()
        self.metrics.reset()
        if not self.trainer.sanity_checking:
            self.log_dict(shown, prog_bar=True, logger=self.trainer.state.fn != "fit")
        # Lightning logs nothing of the validation before the first step, where the curves start. So all of them are
        # logged here, at the number of steps that were taken (unless that first one saw only a few clips).
        if not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == float("inf"):
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in values.items()}, self.global_step)

    def test_step(self, batch: Batch, batch_idx: int) -> Reconstruction:  # type: ignore[override]
        return self.autoencoder(batch["clip"])

    def predict_step(self, batch: Batch, batch_idx: int) -> Reconstruction:
        return self.autoencoder(batch["clip"])

    def _loss_is_ready(self) -> bool:
        """`vidtwin validate` on a machine without LPIPS' backbone measures what it can; `fit` has checked before."""
        return self.trainer.state.fn == "fit"

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model_spec"] = self.autoencoder.spec()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say how a checkpoint of another model differs; outside of `fit` take the autoencoder's weights alone."""
        state, own = checkpoint["state_dict"], self.state_dict()
        weights.check_fit(checkpoints.autoencoder_weights(state), self.autoencoder.state_dict(), "The checkpoint")
        if self.trainer.state.fn != "fit":
            rest = {name: value for name, value in own.items() if not name.startswith(checkpoints.PREFIX)}
            kept = {name: value for name, value in state.items() if name.startswith(checkpoints.PREFIX)}
            checkpoint["state_dict"] = rest | kept
