"""Train and validate any video autoencoder: the one LightningModule.

One step is one batch that updated the generator. Under manual optimization Lightning counts a step per optimizer; here
only the generator's uses Lightning's wrapper, so max_steps, checkpoint intervals, schedules, the GAN's start and all
logged curves count batches. A batch with a non-finite loss or gradient on any rank updates no rank and is not a step.

All random draws of a step depend on (seed, batches so far, rank) alone, whatever happens between two steps.
"""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.data import ClipSource
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import psnr
from vidtwin.metrics.latents import codebook_use
from vidtwin.posteriors import Latents
from vidtwin.schedules import WarmupCosine
from vidtwin.storage import checkpoints
from vidtwin.training.buffers import RunningBuffers
from vidtwin.training.callbacks.ema import EMA
from vidtwin.training.checks import check_training, freeze
from vidtwin.training.compilation import Compilation
from vidtwin.training.finite import agree, bad_gradients, bad_terms, find_reason
from vidtwin.training.optimization import (
    check_length,
    check_resumed,
    list_gradients,
    make_optimizer,
    make_schedule,
    resume_rates,
    step_at,
)
from vidtwin.training.sharding import Placement, placement_of
from vidtwin.training.teacher import Teacher
from vidtwin.training.teacher import check_resumed as check_resumed_teacher

Batch = dict[str, Any]
COUNTS = ("batches", "skipped", "rate_scale", "seed")  # stored in checkpoints


class AutoencoderTask(LightningModule):
    """Train and evaluate a video autoencoder, with a GAN if the loss has a discriminator.

    A batch is `{"clip": (B, 3, T, H, W) in [-1, 1], "label": (B,), "name": list[str]}`.

    Args:
        autoencoder: The model.
        loss: Its training loss; None is L1, LPIPS and KL with the paper's weights.
        optimizer: Optimizer of the autoencoder (and of the loss's log-variance if that is learned). Adam's `eps` of
            1e-8 is as large as the gradients of a large model under the loss's reduction "mean"; 1e-15 is far below.
        scheduler: Learning-rate schedule of `optimizer`, stepped once per step.
        discriminator_optimizer: Optimizer of the loss's discriminator.
        discriminator_scheduler: Schedule of `discriminator_optimizer`, stepped once per step of the generator.
        gradient_clip_norm: Maximum norm of the gradient, for each of the two players; None does not clip.
        accumulation: Number of parts into which each batch is split. Their gradients add up to one step, and one part's
            activations at a time are in memory. A step still takes data.batch_size clips on each device.
        ema_decay: Decay of the running average of the autoencoder's weights (0.999 looks back about 1,000 steps);
            None keeps no average.
        use_ema: Evaluate with that average: in validation, and in the commands that read a checkpoint.
        freeze: Modules of the autoencoder to exclude from training, by name (`encoder`, `structure.qformer`).
        teacher: Trained autoencoder whose latents this one learns, with the weights of its terms of the loss.
        compilation: What torch.compile compiles in training; None compiles nothing.
        metrics: Metrics of validation; by default LPIPS uses the loss's backbone.

    Attributes:
        batches: Number of batches so far, including skipped ones.
        skipped: Number of batches that updated nothing, since a loss or gradient was not finite.
        rate_scale: Factor on every learning rate; a rollback may lower it.
        stop_requested: Whether this rank is to stop (`Preemption`).
        stopping: Whether any rank was to stop in the last step, agreed by all.
        config: The `model` section of the config from which the task was built, if there is one.
    """

    def __init__(
        self,
        autoencoder: VideoAutoencoder,
        loss: AutoencoderLoss | None = None,
        optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1.6e-4, weight_decay=1e-4, eps=1e-15, fused=True),
        scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o),
        discriminator_optimizer: OptimizerCallable = lambda p: AdamW(p, lr=1.6e-4, weight_decay=1e-4, fused=True),
        discriminator_scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o),
        gradient_clip_norm: float | None = None,
        accumulation: int = 1,
        ema_decay: float | None = None,
        use_ema: bool = False,
        freeze: list[str] | None = None,
        teacher: Teacher | None = None,
        compilation: Compilation | None = None,
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
        self.teacher = teacher
        self.compilation = compilation
        self.metrics = metrics or ClipMetrics(getattr(self.loss.perceptual, "backbone", None))
        self.batches = self.skipped = 0
        self.rate_scale = 1.0
        self.stop_requested = self.stopping = False
        self.config: dict[str, Any] | None = None
        self.seed: int | None = None
        self._resumed: tuple[list[Any], list[Any]] | None = None  # of the checkpoint: param_groups, schedules
        self._validation_terms: dict[str, MeanMetric] = {}
        self._running: RunningBuffers | None = None

    # Configure.

    def configure_callbacks(self) -> list[Callback]:
        # The same object in all commands of a process, since it holds the average of an earlier training.
        return [] if self.ema in cast(Any, self.trainer).callbacks else [self.ema]

    def prepare_data(self) -> None:
        """Download the weights that the loss needs, on one rank of each machine before the others."""
        if self.trainer.state.fn == "fit":
            self.loss.setup()
        if self.trainer.state.fn is not None:
            self._set_up_teacher(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        if stage == "fit":
            freeze(self.autoencoder, self.freeze_parts)
            self.train(self.training)
            check_training(self.autoencoder, self.loss, self.trainer)
            if self.compilation is not None:
                self.compilation.check(self.loss)
            # DDP would exchange all gradients in the backward passes of both players.
            left_out = [name for name in self.state_dict() if name.startswith("loss.discriminator.")]
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(self, left_out)
            self.loss.setup()
        self._set_up_teacher(stage)
        self.metrics.setup()

    def _set_up_teacher(self, stage: str) -> None:
        if self.teacher is None or not (stage == "fit" or (stage == "validate" and self.teacher.only_decoder)):
            return
        if type(self._placement) is not Placement:
            raise UserError("Expected whole weights on each device for model.teacher, got sharded ones; train by ddp.")
        data = getattr(self.trainer, "datamodule", None)  # missing if loaders were passed
        self.teacher.setup(self.autoencoder, data.settings if isinstance(data, ClipSource) else None)

    def configure_model(self) -> None:
        self._placement.shard(self.autoencoder)

    @property
    def _placement(self) -> Placement:
        return placement_of(self._trainer)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        players: list[tuple[str, Any, OptimizerCallable, LRSchedulerCallable]]
        players = [("", self._generator_parameters(), self.optimizer, self.scheduler)]
        if self.loss.discriminator is not None:
            parameters = list(self.loss.discriminator.parameters())
            players.append(("discriminator_", parameters, self.discriminator_optimizer, self.discriminator_scheduler))
        optimizers, schedulers = [], []
        for prefix, parameters, optimizer, scheduler in players:
            optimizers.append(make_optimizer(parameters, optimizer, f"model.{prefix}optimizer"))
            option = f"model.{prefix}scheduler"
            schedulers.append(make_schedule(optimizers[-1], scheduler, self._max_steps, option))
        if self._resumed is not None:
            check_resumed(optimizers, schedulers, *self._resumed)
            self._resumed = None
        return optimizers, schedulers

    @property
    def _max_steps(self) -> int | None:
        """Number of steps of the training; None in a dry run, which may end within the warm-up."""
        return None if getattr(self.trainer, "fast_dev_run", False) else self.trainer.max_steps

    def _generator_parameters(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        parameters = [p for p in self.autoencoder.parameters() if p.requires_grad]
        if self.loss.logvar is None:
            return parameters
        # In its own group: it is not sharded like the others, and an optimizer's kernel takes one kind at a time.
        return [{"params": parameters}, {"params": [self.loss.logvar]}]

    def on_fit_start(self) -> None:
        self.stop_requested = self.stopping = False  # by an earlier run of this process
        if self.seed is None:
            self.seed = self.trainer.strategy.broadcast(torch.initial_seed())
        if self.compilation is not None:  # after FSDP2 has sharded
            self.compilation.compile(self.autoencoder, self.loss)

    def teardown(self, stage: str) -> None:
        if self.compilation is not None:
            self.compilation.restore()

    def on_train_start(self) -> None:
        self._running = RunningBuffers(self)
        if self.trainer.world_size > 1 and type(self._placement) is Placement and self.loss.discriminator is not None:
            for tensor in self.loss.discriminator.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.detach(), src=0)  # ranks may have drawn different initial values
        for scheduler, prefix in zip(self._schedulers(), ("", "discriminator_"), strict=False):
            check_length(scheduler, self._max_steps, f"model.{prefix}scheduler")
            resume_rates(scheduler)

    # Train.

    def train(self, mode: bool = True) -> "AutoencoderTask":
        super().train(mode)
        for part in self.freeze_parts:  # without dropout and batch statistics
            if part in dict(self.autoencoder.named_modules()):
                self.autoencoder.get_submodule(part).eval()
        return self

    def forward(self, clip: Tensor) -> Reconstruction:
        return self.autoencoder(clip)

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, str] | None:
        """Take a step, or skip it if a loss or a gradient is not finite on any rank.

        Returns:
            None for a step. For a skipped one `{"rejected": reason}` on all ranks, with an empty reason on ranks that
            did not cause it.
        """
        clip, step = _get_clip(batch), self.global_step
        if len(clip) < self.accumulation:
            raise UserError(
                f"Expected at least model.accumulation={self.accumulation} clips in a batch, got {len(clip)}; raise "
                "data.batch_size."
            )
        self.batches += 1
        buffers = self._running or RunningBuffers(self)
        before = buffers.copy()  # the forward pass changes them
        self.seed_draws(self.global_rank)
        means, reason = self._backward(batch, step)
        players = self._players(step)
        if reason is not None:
            self.skipped += 1
            for optimizer in players.values():
                optimizer.zero_grad()
            buffers.restore(before)
            self._log_step({"train/skipped": self.skipped / self.batches}, step, now=True)
            return {"rejected": reason}

        logged: dict[str, Any] = dict(means)
        for name, optimizer in players.items():
            self._update(optimizer, means[f"{name}/gradient_norm"])
            rate = optimizer.param_groups[0]["lr"] * self.rate_scale
            logged[f"lr/{'generator' if name == 'train' else name}"] = rate
        for scheduler in self._schedulers():
            scheduler.step()
        if self.trainer.world_size > 1:  # under manual optimization DDP shares them before the first step only
            buffers.share()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged["train/skipped"] = self.skipped / self.batches
        self._log_step(logged, step, now=every > 0 and (step + 1) % every == 0)
        return None

    def seed_draws(self, rank: int) -> None:
        """Seed the random draws of the next step by (seed, batches so far, rank)."""
        words = np.random.SeedSequence((self.seed or 0, self.batches, rank)).generate_state(2)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))  # other people's models may draw from these two
        random.seed(int(words[1]))

    def split(self, batch: Batch) -> list[tuple[Tensor, Latents | None]]:
        """Split a training batch into `accumulation` parts: clips, and their latents by the teacher if there is one."""
        clips = _get_clip(batch).tensor_split(self.accumulation)
        if self.teacher is None:
            return [(clip, None) for clip in clips]
        self.teacher.check(self.autoencoder, clips[0].shape[1:])
        latents = self.teacher.latents(batch, self.accumulation)
        self.teacher.measure(latents)
        return [*zip(clips, latents, strict=True)]

    def losses(
        self, clip: Tensor, step: int, share: float = 1.0, latents: Latents | None = None
    ) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """Run one forward pass and yield each player's terms; the caller runs the backward pass of `total` in between.

        So the generator's graph is gone when the discriminator's terms are computed.

        Args:
            clip: (B, 3, T, H, W).
            step: Number of the step.
            share: Share of the clips in the step's batch.
            latents: The teacher's latents of the clips, if there is one.
        """
        reconstruction = self._reconstruct(clip, latents)
        last_layer = self.autoencoder.last_layer if self.loss.gan_is_on(step) else None
        with self._placement.probing(self.autoencoder):
            terms = self.loss.generator_loss(reconstruction, clip, last_layer, step)
        if self.teacher is not None and latents is not None:
            terms = self.teacher.add_terms(terms, self.autoencoder, reconstruction, latents, clip, self.loss)
        with torch.no_grad():
            terms["psnr"] = psnr(reconstruction.clip, clip).mean()
        if reconstruction.encoding is not None:
            terms |= codebook_use(reconstruction.encoding)
        yield "train", terms
        if terms := self.loss.discriminator_loss(reconstruction.clip, clip, step, share):
            yield "discriminator", terms

    def _reconstruct(self, clip: Tensor, latents: Latents | None) -> Reconstruction:
        if self.teacher is None or latents is None or not self.teacher.only_decoder:
            return self.autoencoder(clip)
        return self.teacher.reconstruct(self.autoencoder, latents, clip)

    def _players(self, step: int) -> dict[str, LightningOptimizer | Optimizer]:
        """Return the optimizers to step, by their prefix in the logs."""
        generator, discriminator = self._optimizers()
        if discriminator is None or not self.loss.gan_is_on(step):
            return {"train": generator}
        # Lightning's wrapper counts a step; the bare optimizer does not.
        return {"train": generator, "discriminator": discriminator.optimizer}

    def _backward(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], str | None]:
        """Compute the players' gradients part by part → values to log, and the reason to skip the batch (or None).

        Backward passes, in which the ranks wait for each other, run on values that are not finite too; whether any is,
        is asked once, at the end.
        """
        means: dict[str, Tensor] = {}
        computed: list[dict[str, Tensor]] = []
        parts = self.split(batch)
        for index, (part, latents) in enumerate(parts):
            share = len(part) / len(batch["clip"])
            with nullcontext() if index == len(parts) - 1 else self._without_sync():
                for player, terms in self.losses(part, step, share, latents):
                    if player == "train":
                        self.manual_backward(share * terms["total"])
                    else:  # without the exchange of the generator's gradients
                        (share * terms["total"]).backward()
                    computed.append({name: value.detach() for name, value in terms.items()})
                    for name, value in computed[-1].items():
                        key = f"{player}/{'loss' if name == 'total' else name}"
                        means[key] = means.get(key, 0.0) + share * value
        self._placement.average_gradients(self.loss)
        norms = {
            name: self._placement.gradient_norm(list_gradients(optimizer)).detach()
            for name, optimizer in self._players(step).items()
        }
        means |= {f"{name}/gradient_norm": norm for name, norm in norms.items()}
        finite, self.stopping = agree([*(terms["total"] for terms in computed), *norms.values()], self.stop_requested)
        if finite:
            return means, None
        found = [*map(bad_terms, computed), ("", bad_gradients(self))]
        return means, find_reason(self.trainer.strategy, found)

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            yield

    def _log_step(self, values: dict[str, Any], step: int, now: bool) -> None:
        """Log values at this step; Lightning would count batches, and repeat old values for skipped ones."""
        measured = {name: value.detach().float() for name, value in values.items() if isinstance(value, Tensor)}
        known = {name: float(value) for name, value in values.items() if name not in measured}
        # As tensors of the device: Lightning would copy a number to it, and wait.
        filled = {name: torch.full((), value, device=self.device) for name, value in known.items()}
        self.log_dict(measured | filled, logger=False, batch_size=1)
        if now:
            numbers = torch.stack([*measured.values()]).tolist() if measured else []
            for logger in self.loggers:
                logger.log_metrics(dict(zip(measured, numbers, strict=True)) | known, step)

    def _optimizers(self) -> tuple[LightningOptimizer, LightningOptimizer | None]:
        optimizers = self.optimizers()
        if isinstance(optimizers, list):
            return optimizers[0], optimizers[1]
        return optimizers, None

    def _schedulers(self) -> list[LRScheduler]:
        schedulers = self.lr_schedulers() or []
        return cast(list[LRScheduler], schedulers if isinstance(schedulers, list) else [schedulers])

    def _update(self, optimizer: LightningOptimizer | Optimizer, norm: Tensor) -> None:
        """Clip the gradients and step, at the schedule's rate times `rate_scale`."""
        if self.gradient_clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._placement.clip_gradients(parameters, self.gradient_clip_norm, norm)
        step_at(optimizer, self.rate_scale)

    # Evaluate.

    def validation_step(self, batch: Batch, batch_idx: int) -> Reconstruction:  # type: ignore[override]
        clip = _get_clip(batch)
        latents = self.teacher.latents(batch)[0] if self.teacher is not None and self.teacher.only_decoder else None
        reconstruction = self._reconstruct(clip, latents)
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
            # best_checkpoint.monitor may name any of them.
            self.log_dict({name: value for name, value in values.items() if name not in shown}, logger=False)
        # Lightning does not log the validation before the first step, where the curves start. So all validations are
        # logged here, at the number of steps taken (except a sanity check of a few clips).
        if not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == float("inf"):
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in values.items()}, self.global_step)

    def on_predict_epoch_start(self) -> None:
        self._placement.gather(self.autoencoder)

    def predict_step(self, batch: Batch, batch_idx: int) -> Reconstruction:
        return self.autoencoder(_get_clip(batch))

    def _loss_is_ready(self) -> bool:
        """Return whether the loss can be computed: `fit` has set it up, `validate` may lack LPIPS' backbone."""
        return self.trainer.state.fn == "fit"

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["model_spec"] = self.autoencoder.spec()
        checkpoint["training"] = {name: getattr(self, name) for name in COUNTS}
        if self.teacher is not None:
            checkpoint["teacher"] = {**self.teacher.identity, "only_decoder": self.teacher.only_decoder}
        self.ema.save(checkpoint)

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of the same model; outside of `fit` take the autoencoder's weights alone."""
        if self.trainer.state.fn != "fit":
            checkpoints.keep_autoencoder(checkpoint, self.state_dict(), self.ema.evaluate)
            return
        check_resumed_teacher(self.teacher, checkpoint)
        trained = sum(p.requires_grad for p in self.autoencoder.parameters()) + (self.loss.logvar is not None)
        checkpoints.check_resumable(checkpoint, self.state_dict(), trained)
        groups = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        self._resumed = groups, checkpoint["lr_schedulers"]
        for name in COUNTS:  # missing in checkpoints of older versions
            setattr(self, name, checkpoint.get("training", {}).get(name, getattr(self, name)))


def _get_clip(batch: dict[str, Any]) -> Tensor:
    if "clip" not in batch:
        raise UserError(f"Expected batches with a clip, got {', '.join(batch)}; set --data to one of videos.")
    clip: Tensor = batch["clip"]
    return clip
