"""Train and validate any video autoencoder.

A step also updates the discriminator, if there is one: its optimizer does not step through Lightning's wrapper, which
counts, so that the GAN's start is counted in batches too (`vidtwin.training.base` says how steps are counted).
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import AdamW, Optimizer

from vidtwin import console
from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.data import ClipSource
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.frame_distance import FrameDistance
from vidtwin.metrics.collection import ClipMetrics
from vidtwin.metrics.frames import psnr
from vidtwin.metrics.latents import codebook_use
from vidtwin.posteriors import Latents
from vidtwin.schedules import WarmupCosine
from vidtwin.storage import checkpoints
from vidtwin.training.base import Batch, Player, Terms, TrainingTask
from vidtwin.training.checks import check_training, freeze
from vidtwin.training.sharding import Placement
from vidtwin.training.teacher import Teacher
from vidtwin.training.teacher import check_resumed as check_resumed_teacher


class AutoencoderTask(TrainingTask):
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
        metrics: Metrics of validation; by default LPIPS uses the loss's backbone.
    """

    trained = "autoencoder"
    rate_name = "generator"

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
        metrics: ClipMetrics | None = None,
    ) -> None:
        super().__init__(gradient_clip_norm, accumulation, ema_decay, use_ema)
        self.autoencoder = autoencoder
        self.loss = loss or AutoencoderLoss()
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.discriminator_optimizer = discriminator_optimizer
        self.discriminator_scheduler = discriminator_scheduler
        self.freeze_parts = freeze or []
        self.teacher = teacher
        self.metrics = metrics or ClipMetrics(getattr(self.loss.perceptual, "backbone", None))

    # Configure.

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

    def players(self) -> list[Player]:
        players = [Player("", self._generator_parameters(), self.optimizer, self.scheduler)]
        if self.loss.discriminator is not None:
            parameters = list(self.loss.discriminator.parameters())
            made = self.discriminator_optimizer, self.discriminator_scheduler
            players.append(Player("discriminator_", parameters, *made))
        return players

    def _generator_parameters(self) -> list[nn.Parameter] | list[dict[str, Any]]:
        parameters = [p for p in self.autoencoder.parameters() if p.requires_grad]
        if self.loss.logvar is None:
            return parameters
        # In its own group: it is not sharded like the others, and an optimizer's kernel takes one kind at a time.
        return [{"params": parameters}, {"params": [self.loss.logvar]}]

    def start_from(self, path: str) -> None:
        for line in checkpoints.load_part(self.autoencoder, path):
            console.log(f"{path}: {line}", rank_zero=True)

    def prepare_replay(self, dump: Mapping[str, Any]) -> None:
        self.loss.setup()
        if self.teacher is not None:
            self.teacher.setup(self.autoencoder, None)

    def compilable(self) -> dict[str, list[nn.Module]]:
        parts = super().compilable()
        if isinstance(self.loss.perceptual, FrameDistance) and self.loss.perceptual.network is not None:
            parts["perceptual"] = [self.loss.perceptual.network]
        if self.loss.discriminator is not None and not self.loss.r1_weight:  # R1 differentiates its gradient again
            parts["discriminator"] = [self.loss.discriminator]
        return parts

    @property
    def may_skip_parameters(self) -> bool:
        # The student's encoder does not run beside a teacher's latents.
        return self.autoencoder.may_skip_parameters or (self.teacher is not None and self.teacher.only_decoder)

    def on_train_start(self) -> None:
        if self.trainer.world_size > 1 and type(self._placement) is Placement and self.loss.discriminator is not None:
            for tensor in self.loss.discriminator.state_dict(keep_vars=True).values():
                dist.broadcast(tensor.detach(), src=0)  # ranks may have drawn different initial values
        super().on_train_start()

    # Train.

    def train(self, mode: bool = True) -> "AutoencoderTask":
        super().train(mode)
        for part in self.freeze_parts:  # without dropout and batch statistics
            if part in dict(self.autoencoder.named_modules()):
                self.autoencoder.get_submodule(part).eval()
        return self

    def forward(self, clip: Tensor) -> Reconstruction:
        return self.autoencoder(clip)

    def count_clips(self, batch: Batch) -> int:
        return len(_get_clip(batch))

    def part_losses(self, batch: Batch, step: int) -> list[tuple[float, Iterator[tuple[str, Terms]]]]:
        parts = []
        for clip, latents in self.split(batch):
            share = len(clip) / len(batch["clip"])
            parts.append((share, self.losses(clip, step, share, latents)))
        return parts

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
        generator, *others = self._optimizers()
        if not others or not self.loss.gan_is_on(step):
            return {"train": generator}
        # Lightning's wrapper counts a step; the bare optimizer does not.
        return {"train": generator, "discriminator": others[0].optimizer}

    def _average_gradients(self) -> None:
        self._placement.average_gradients(self.loss)

    # Evaluate.

    def validation_step(self, batch: Batch, batch_idx: int) -> Reconstruction:  # type: ignore[override]
        clip = _get_clip(batch)
        latents = self.teacher.latents(batch)[0] if self.teacher is not None and self.teacher.only_decoder else None
        reconstruction = self._reconstruct(clip, latents)
        terms = self.loss.generator_loss(reconstruction, clip, None, step=-1) if self._loss_is_ready() else {}
        self._add_validation_terms(terms, len(clip))
        self.metrics.update(self.metrics(reconstruction.clip, clip))
        return reconstruction

    def _shown_metrics(self) -> dict[str, Tensor]:
        values = self.metrics.compute()
        self.metrics.reset()
        return values

    def on_predict_epoch_start(self) -> None:
        self._placement.gather(self.autoencoder)

    def predict_step(self, batch: Batch, batch_idx: int) -> Reconstruction:
        return self.autoencoder(_get_clip(batch))

    def _loss_is_ready(self) -> bool:
        """Return whether the loss can be computed: `fit` has set it up, `validate` may lack LPIPS' backbone."""
        return self.trainer.state.fn == "fit"

    # Checkpoints.

    def describe(self) -> dict[str, Any]:
        return {"model_spec": self.autoencoder.spec()}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.teacher is not None:
            checkpoint["teacher"] = {**self.teacher.identity, "only_decoder": self.teacher.only_decoder}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of the same model; outside of `fit` take the autoencoder's weights alone."""
        if self.trainer.state.fn != "fit":
            checkpoints.keep_autoencoder(checkpoint, self.state_dict(), self.ema.evaluate)
            return
        check_resumed_teacher(self.teacher, checkpoint)
        trained = sum(p.requires_grad for p in self.autoencoder.parameters()) + (self.loss.logvar is not None)
        self._resume(checkpoint, trained)


def _get_clip(batch: dict[str, Any]) -> Tensor:
    if "clip" not in batch:
        raise UserError(f"Expected batches with a clip, got {', '.join(batch)}; set --data to one of videos.")
    clip: Tensor = batch["clip"]
    return clip
