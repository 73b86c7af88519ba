"""Train a diffusion model on the latents of a trained autoencoder (VidTwin, supplement D.3 and E.1)."""

import math
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch import Callback
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.optim import Adam

from vidtwin import console, weights
from vidtwin.clips import as_clip
from vidtwin.data import ClipSource, LatentDescription, LatentSource
from vidtwin.diffusion.model import LatentDiffusion, build, draw_noise
from vidtwin.diffusion.process import DDPM, Process
from vidtwin.diffusion.transformer import TransformerSizes
from vidtwin.errors import UserError
from vidtwin.posteriors import Latents
from vidtwin.schedules import WarmupCosine
from vidtwin.storage import checkpoints
from vidtwin.storage.diffusion import KEY, PREFIX, load_part
from vidtwin.storage.diffusion import describe as read_description
from vidtwin.training.base import Batch, Player, Terms, TrainingTask
from vidtwin.training.callbacks.samples import SampleLogger
from vidtwin.training.latents import FrozenAutoencoder, Origin, channel_statistics, check_same, find
from vidtwin.video import Frames
from vidtwin.video.convert import to_uint8

_MEASURED = 256  # clips from which the scale of latents without statistics is measured


class DiffusionTask(TrainingTask):
    """Train a diffusion transformer on latents: of a folder that `vidtwin encode` wrote, or of clips as they come.

    The transformer is built when the shapes of the latents are known, at the start of the training.

    Args:
        transformer: Sizes of the transformer; by default the paper's.
        process: How noise is added and removed; None is the paper's `DDPM`.
        autoencoder: The autoencoder's weights: a checkpoint, a folder of `save_pretrained`, or hf://owner/name. Clips
            need it. Latents on disk name theirs, which is loaded for codes, and for samples.
        use_autoencoder_ema: Take the averaged weights of `autoencoder`.
        posterior: Of clips, the "mean" of their Gaussian latents or a "sample"; for latents on disk set data.posterior.
        condition_dropout: Share of the clips whose class the transformer does not see, for classifier-free guidance.
        guidance: Weight of the class in sampling; 1 is none. Checkpoints hold it.
        sampling_steps: Steps of sampling, likewise.
        optimizer: Optimizer of the transformer.
        scheduler: Its schedule, stepped once per step.
        gradient_clip_norm: Maximum norm of the gradient; None does not clip.
        accumulation: Number of parts into which each batch is split.
        ema_decay: Decay of the running average of the weights; None keeps no average.
        use_ema: Validate and sample with that average.
        sample_every_n_steps: Steps between two lots of samples in TensorBoard; 0 draws none.
        num_samples: Number of samples of a lot, one class after the other.

    Attributes:
        denoiser: The model, from `setup` on.
        origin: Where the latents come from, likewise.
    """

    trained = PREFIX.removesuffix(".")
    rate_name = "denoiser"
    denoiser: LatentDiffusion
    origin: Origin

    def __init__(
        self,
        transformer: TransformerSizes | None = None,
        process: Process | None = None,
        autoencoder: str | None = None,
        use_autoencoder_ema: bool = False,
        posterior: Literal["mean", "sample"] = "mean",
        condition_dropout: float = 0.2,
        guidance: float = 5.0,
        sampling_steps: int = 50,
        optimizer: OptimizerCallable = lambda p: Adam(p, lr=1e-4, betas=(0.9, 0.999)),
        scheduler: LRSchedulerCallable = lambda o: WarmupCosine(o, 10_000, end_factor=1.0),
        gradient_clip_norm: float | None = None,
        accumulation: int = 1,
        ema_decay: float | None = None,
        use_ema: bool = False,
        sample_every_n_steps: int = 1000,
        num_samples: int = 8,
    ) -> None:
        super().__init__(gradient_clip_norm, accumulation, ema_decay, use_ema)
        if not 0 <= condition_dropout <= 1:
            raise UserError(f"Expected model.condition_dropout from 0 to 1, got {condition_dropout}.")
        if num_samples < 1:
            raise UserError(f"Expected model.num_samples of at least 1, got {num_samples}.")
        if sample_every_n_steps < 0:
            raise UserError(f"Expected model.sample_every_n_steps of at least 0, got {sample_every_n_steps}.")
        if posterior not in ("mean", "sample"):
            raise UserError(f"Expected model.posterior to be mean or sample, got {posterior!r}.")
        if not math.isfinite(guidance):
            raise UserError(f"Expected a finite model.guidance, got {guidance}.")
        self.sizes = transformer or TransformerSizes()
        self.process = process or DDPM()
        self.process.check_steps(sampling_steps)
        self.autoencoder_path, self.use_autoencoder_ema = autoencoder, use_autoencoder_ema
        self.posterior: Literal["mean", "sample"] = posterior
        self.condition_dropout, self.guidance, self.sampling_steps = condition_dropout, guidance, sampling_steps
        self.optimizer, self.scheduler = optimizer, scheduler
        self.samples = SampleLogger(sample_every_n_steps, num_samples, self.draw_samples)
        self._frozen: list[FrozenAutoencoder] = []  # in a list, so that it is no submodule
        self._described: LatentDescription | None = None
        self._is_scaled = False
        self._start: str | None = None  # weights to start from
        self._is_replayed = False

    # Configure.

    def configure_callbacks(self) -> list[Callback]:
        known = cast(Any, self.trainer).callbacks
        return super().configure_callbacks() + ([] if self.samples in known else [self.samples])

    def setup(self, stage: str) -> None:
        data = getattr(self.trainer, "datamodule", None)  # missing if loaders were passed
        if isinstance(data, LatentSource):
            described = data.describe_latents()
            self._use_shards(described)
            self._check_count(described.num_clips)
        elif isinstance(data, ClipSource):
            self._use_clips(data)
            self._check_count(len(data.dataset("train")))
        else:
            raise UserError("Expected latents or clips to learn from, got other data; set --data latents or ucf101.")
        if not hasattr(self, "denoiser"):
            self.denoiser = LatentDiffusion(
                self.origin.latent_shapes, len(self.origin.classes), self.process, self.sizes
            )
        if self._start is not None:
            for line in load_part(self.denoiser, self.origin.classes, self._start):
                console.log(f"{self._start}: {line}", rank_zero=True)
            self._start = None
        self._is_scaled = self._is_replayed = False

    def start_from(self, path: str) -> None:
        self._start = path  # until the transformer is there

    @property
    def frozen(self) -> FrozenAutoencoder:
        """The autoencoder; `UserError` if it is not loaded."""
        if not self._frozen:
            raise UserError("Expected the autoencoder of the latents, got none; give --model.autoencoder PATH.")
        return self._frozen[0]

    def _check_count(self, clips: int) -> None:
        wanted = getattr(cast(Any, self.trainer).datamodule, "batch_size", 1) * self.trainer.world_size
        if self.trainer.state.fn == "fit" and clips < wanted:
            raise UserError(f"Expected at least {wanted} clips for a batch, got {clips}; lower data.batch_size.")

    def _use_shards(self, described: LatentDescription) -> None:
        self._described = described
        shows = self.trainer.state.fn == "fit" and self.samples.shows(self.trainer)
        if (described.codes or shows or self.autoencoder_path) and not self._frozen:
            self._frozen.append(find(described, self.autoencoder_path, self.use_autoencoder_ema))
        shapes = dict(described.shapes)
        if described.codes:
            multiple = self.frozen.model.spatial_multiple  # to which `vidtwin encode` pads pictures
            size = (side + -side % multiple for side in described.size)
            whole = self.frozen.model.latent_shapes((3, described.num_frames, *size))
            shapes = {name: whole[name] for name in self.frozen.model.latent_names}
        names = ("class_path", "weights_sha256", "checkpoint", "use_ema", "config")
        model = {name: described.model.get(name) for name in names}
        if self._frozen:
            model |= {"checkpoint": self.frozen.path, "use_ema": self.frozen.use_ema, "config": None}
        self.origin = Origin(shapes, described.classes, described.num_frames, described.size, described.fps, model)

    def _use_clips(self, data: ClipSource) -> None:
        if self.autoencoder_path is None:
            raise UserError(
                "Expected an autoencoder to encode the clips with, got none; give --model.autoencoder PATH."
            )
        if not self._frozen:
            self._frozen.append(FrozenAutoencoder(self.autoencoder_path, self.use_autoencoder_ema))
        settings = data.settings
        assert settings.num_frames is not None  # of training clips
        assert settings.size is not None
        shapes = self.frozen.model.latent_shapes((3, settings.num_frames, *settings.size))
        rate = settings.rates[0] or 25.0
        self.origin = Origin(
            shapes, data.class_names(), settings.num_frames, settings.size, rate, self.frozen.identity()
        )

    def players(self) -> list[Player]:
        return [Player("", list(self.denoiser.parameters()), self.optimizer, self.scheduler)]

    def on_fit_start(self) -> None:
        super().on_fit_start()
        if not self._is_scaled:
            self.denoiser.set_scale(self._statistics())
            self._is_scaled = True

    def _statistics(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Return the scale of each latent: that of the data, or, of codes and of clips, that of the first clips."""
        described = self._described
        known = dict(described.statistics) if described is not None else {}
        found = {name: (torch.tensor(mean), torch.tensor(std)) for name, (mean, std) in known.items()}
        if set(found) != set(self.origin.latent_shapes):
            measured = self._measure() if self.trainer.is_global_zero else None
            found = {**cast(Any, self.trainer.strategy.broadcast(measured)), **found}
        return found

    def _measure(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Measure the scale of codes' vectors, or of clips' latents, on clips spread over the training data."""
        clips = cast(Any, self.trainer).datamodule.dataset("train")
        count = min(len(clips), _MEASURED)
        items = (clips[place * len(clips) // count] for place in range(count))
        parts = [self._encode(item) for item in items if "skipped" not in item]
        if not parts:
            raise UserError("Expected clips to measure the scale of their latents on, got none that can be read.")
        return channel_statistics(parts)

    def _encode(self, item: dict[str, Any]) -> Latents:
        """Return the latents (1, ...) of an item of the training data, without those that are read from disk."""
        if "clip" in item:
            return self.frozen.encode(as_clip([item["clip"]]).to(self.device), self.posterior)
        codes = {name: value[None].to(self.device) for name, value in item["codes"].items()}
        return self.frozen.dequantize(codes)

    # Train.

    def count_clips(self, batch: Batch) -> int:
        if "label" not in batch or not {"clip", "latents", "codes"} & set(batch):
            raise UserError(f"Expected batches of latents or clips with labels, got {', '.join(batch)}.")
        return len(batch["label"])

    def part_losses(self, batch: Batch, step: int) -> list[tuple[float, Iterator[tuple[str, Terms]]]]:
        state, labels = self.states(batch), batch["label"]
        parts = zip(state.tensor_split(self.accumulation), labels.tensor_split(self.accumulation), strict=True)
        return [(len(part) / len(state), self._losses(part, label)) for part, label in parts]

    def _losses(self, state: Tensor, labels: Tensor) -> Iterator[tuple[str, Terms]]:
        yield "train", {"total": self.denoiser(state, labels, self.condition_dropout).mean()}

    @torch.no_grad()
    def states(self, batch: Batch) -> Tensor:
        """Return the normalized latents (B, numbers) of a batch of latents, codes or clips."""
        if "clip" in batch:
            return self.denoiser.normalize(self.frozen.encode(batch["clip"], self.posterior))
        latents = dict(batch.get("latents", {}))
        if latents and not self._is_replayed:  # a dump holds them as the autoencoder made them
            latents = cast(Any, self.trainer).datamodule.denormalize(latents)
        if "codes" in batch:
            latents |= self.frozen.dequantize(batch["codes"])
        return self.denoiser.normalize(latents)

    # Replay.

    def to_dump(self, batch: Batch) -> Batch:
        if "latents" not in batch:
            return batch
        return {**batch, "latents": cast(Any, self.trainer).datamodule.denormalize(batch["latents"])}

    def prepare_replay(self, dump: Mapping[str, Any]) -> None:
        held = read_description(dict(dump), "the dump")
        self.denoiser, self._is_replayed = build(held), True
        if {"clip", "codes"} & set(dump["batch"]) and not self._frozen:
            model = held["autoencoder"]
            path = self.autoencoder_path or str(model["checkpoint"])
            self._frozen.append(FrozenAutoencoder(path, self.use_autoencoder_ema or bool(model["use_ema"])))
            identity = self.frozen.identity()
            check_same(identity, model["weights_sha256"], model["class_path"], "the skipped step was trained on")

    # Evaluate.

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        # The same times and noise in each validation. Training steps seed their own draws.
        torch.manual_seed(batch_idx * self.trainer.world_size + self.global_rank)
        loss = self.denoiser(self.states(batch), batch["label"])
        self._add_validation_terms({"total": loss.mean()}, len(loss))

    @torch.no_grad()
    def draw_samples(self, number: int) -> dict[str, Frames]:
        """Sample clips, one class after the other, with the same noise each time → frames by name."""
        classes = self.origin.classes or [""]
        labels = [place % len(classes) for place in range(number)]
        noise = draw_noise(self.denoiser.numbers, [(0, place) for place in range(number)]).to(self.device)
        given = torch.tensor(labels if self.origin.classes else [-1] * number, device=self.device)
        self._begin_step()  # each pass is one for CUDA graphs
        latents = self.denoiser.sample(given, noise, self.guidance, self.sampling_steps, self._begin_step)
        clips = self.frozen.decode(latents, self.origin.num_frames, self.origin.size)
        names = [f"{classes[label]} {place}".strip() for place, label in enumerate(labels)]
        return {name: to_uint8(clip) for name, clip in zip(names, clips, strict=True)}

    # Checkpoints.

    def describe(self) -> dict[str, Any]:
        sampling = {"guidance": self.guidance, "steps": self.sampling_steps}
        return {KEY: self.denoiser.spec() | self.origin.entries() | sampling}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Check that the checkpoint is of the same latents and process; outside of `fit` take the weights alone."""
        held = read_description(checkpoint, "--ckpt_path")
        self.origin.check(held)
        if held["process"] != (ours := self.process.spec()):
            described = (
                f"{spec['class_path'].rpartition('.')[2]} of {spec['init_args']}" for spec in (held["process"], ours)
            )
            raise UserError("Expected model.process as the checkpoint was trained with, {}, got {}.".format(*described))
        self._is_scaled = True
        if self.trainer.state.fn == "fit":
            self._resume(checkpoint, len(list(self.denoiser.parameters())))
            return
        kept = checkpoints.network_weights(checkpoint, PREFIX, self.ema.evaluate)
        weights.check_fit(kept, self.denoiser.state_dict(), "The checkpoint")
        checkpoint["state_dict"] = {f"{PREFIX}{name}": value for name, value in kept.items()}
