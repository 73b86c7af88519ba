"""The interface of every video autoencoder.

    clip (B, 3, T, H, W) in [-1, 1] ── encode ──> Encoding ── sample | mode ──> latents ── decode ──> clip

A subclass implements `_encode`, `_decode`, `_latent_shapes` and `last_layer`. The base class checks shapes, pads to a
legal length and crops back, maps the range of values, and computes rates.
"""

import inspect
import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from vidtwin import plugins
from vidtwin.errors import UserError
from vidtwin.hub import Pretrained
from vidtwin.posteriors import Encoding, Latents


@dataclass(frozen=True)
class TemporalSpec:
    """Legal clip lengths of a model: `offset + k * multiple` frames, from `minimum` to `maximum`.

    A clip of another length is padded to the next legal one by repeating its last (`pad="last"`) or first
    (`pad="first"`) frame, and the output is cropped back; with `pad=None` it is rejected.
    """

    multiple: int = 1
    offset: int = 0
    minimum: int = 1
    maximum: int | None = None
    pad: str | None = None

    @classmethod
    def exactly(cls, num_frames: int) -> Self:
        """Create the spec of a model whose length is fixed when it is built."""
        return cls(minimum=num_frames, maximum=num_frames)

    def is_legal(self, num_frames: int) -> bool:
        """Return whether the model takes `num_frames` frames without padding."""
        above_minimum = num_frames >= self.minimum and (self.maximum is None or num_frames <= self.maximum)
        return above_minimum and (num_frames - self.offset) % self.multiple == 0

    def legal_length(self, num_frames: int) -> int:
        """Return the length to which a clip of `num_frames` frames is padded.

        Raises:
            UserError: No legal length can be reached by padding.
        """
        if self.is_legal(num_frames):
            return num_frames
        length = max(num_frames, self.minimum)
        length += -(length - self.offset) % self.multiple
        if self.pad is None or not self.is_legal(length):
            raise UserError(f"Expected a clip of {self}, got {num_frames}; set data.num_frames accordingly.")
        return length

    @property
    def usual_length(self) -> int:
        """The default length: the first legal one from 16 frames on, else the last legal one below."""
        length = max(self.minimum, 16 if self.maximum is None else min(16, self.maximum))
        length += -(length - self.offset) % self.multiple
        if not self.is_legal(length):  # above the maximum
            length -= self.multiple
        if not self.is_legal(length):
            raise UserError(f"Expected a temporal that some length keeps, got {self}; correct minimum and maximum.")
        return length

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"{self.minimum} frames"
        step = f"{self.multiple}k+{self.offset}" if self.offset else f"{self.multiple}k"
        legal = "any number of" if self.multiple == 1 else step
        limits = f"at least {self.minimum}" + (f", at most {self.maximum}" if self.maximum is not None else "")
        return f"{legal} frames ({limits})"


@dataclass(frozen=True)
class Coding:
    """Settings with which a codec was run.

    Attributes:
        curve: Codec and settings but the one of the quality: rows that share it are one rate-distortion curve.
        settings: All settings, for readers.
        numbers: Whether its latent stands for a known number of values, as that of a transform does.
    """

    curve: str
    settings: str
    numbers: bool = False


@dataclass
class Reconstruction:
    """The result of a forward pass.

    Attributes:
        clip: (B, 3, T, H, W), about in [-1, 1].
        latents: The latents from which it was decoded.
        regularization: The posteriors' unweighted terms by name.
        encoding: The posteriors, for metrics of the latent space; None if not kept.
    """

    clip: Tensor
    latents: Latents
    regularization: dict[str, Tensor] = field(default_factory=dict)
    encoding: Encoding | None = None


class VideoAutoencoder(Pretrained, nn.Module, ABC):
    """Base class of models that encode a clip into named latents and decode it from these alone.

    `save_pretrained`, `from_pretrained` and `push_to_hub` come from `vidtwin.hub.Pretrained`.

    Attributes:
        latent_names: Names of the latents that `encode` returns and `decode` takes.
        partial_latents: Whether `decode` accepts some of them alone (VidTwin: structure only, dynamics only).
        temporal: Legal clip lengths.
        may_skip_parameters: Whether a training step may leave trainable parameters without a gradient, as layers that
            are dropped at random; on several devices they are then searched for in each step.
        resolution: Height and width if they are fixed when the model is built, else None.
        spatial_multiple: Height and width must be multiples of this if they are not fixed.
        value_range: The range of pixel values in `_encode` and `_decode`; the public methods use [-1, 1].
        codes_bytes: Whether its latents are `Stream`s of bytes, as those of codecs are.
        coding: The settings of a codec; None for other models.
        init_args: The arguments of the constructor, defaults included; `spec` stores them.
        class_path: The import path of the class; `spec` stores it.
    """

    latent_names: ClassVar[tuple[str, ...]]
    partial_latents: ClassVar[bool] = False
    may_skip_parameters: ClassVar[bool] = False
    temporal: TemporalSpec = TemporalSpec()
    resolution: int | None = None
    spatial_multiple: int = 1
    value_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
    codes_bytes: ClassVar[bool] = False
    coding: Coding | None = None
    init_args: dict[str, Any]
    class_path: str

    def __new__(cls, *args: Any, **kwargs: Any) -> Self:
        # Recorded here, before nn.Module.__init__ runs, so that no subclass has to repeat its own arguments.
        model = super().__new__(cls)
        signature = inspect.signature(cls.__init__)
        bound = signature.bind_partial(model, *args, **kwargs)
        bound.apply_defaults()
        arguments = {k: list(v) if isinstance(v, tuple) else v for k, v in list(bound.arguments.items())[1:]}
        for name, parameter in signature.parameters.items():
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                arguments |= arguments.pop(name)
        object.__setattr__(model, "init_args", arguments)
        object.__setattr__(model, "class_path", f"{cls.__module__}.{cls.__qualname__}")  # FSDP2 changes the class
        return model

    # To be implemented by a model.

    @abstractmethod
    def _encode(self, clip: Tensor) -> Encoding:
        """Encode (B, 3, T, H, W) of a legal length, in `value_range` → one posterior per latent."""

    @abstractmethod
    def _decode(self, latents: Latents) -> Tensor:
        """Decode latents → (B, 3, T, H, W) of the legal length, in `value_range`."""

    @abstractmethod
    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Compute the latent shapes of a clip (3, T, H, W) of a legal length, without batch axis and forward pass."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The last weight before the pixels: the adaptive GAN weight compares gradients here."""

    def code_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], int]]:
        """Return the shape of the integer codes and the codebook size per discrete latent of a clip (3, T, H, W)."""
        return {}

    def dequantize(self, codes: Latents) -> Latents:
        """Look up integer codes by name → the latents that `decode` takes; for models with codebooks only."""
        raise UserError(f"{type(self).__name__} has no codebook: decode() takes its latents as they are.")

    # Shared by all models.

    def encode(self, clip: Tensor) -> Encoding:
        """Encode a clip (B, 3, T, H, W) in [-1, 1], after padding it to a legal length.

        Raises:
            UserError: The clip has the wrong type or shape.
        """
        self.check_clip(clip)
        length = self.temporal.legal_length(clip.shape[2])
        if extra := length - clip.shape[2]:
            first = self.temporal.pad == "first"
            edge = clip[:, :, :1] if first else clip[:, :, -1:]
            padding = edge.expand(-1, -1, extra, -1, -1)
            clip = torch.cat([padding, clip] if first else [clip, padding], dim=2)
        return self._encode(self._map_range(clip, (-1.0, 1.0), self.value_range))

    def decode(self, latents: Latents, num_frames: int | None = None) -> Tensor:
        """Decode a clip from latents alone.

        Args:
            latents: By name, each (B, ...) with the same B. With `partial_latents` some may be left out.
            num_frames: Length of the user's clip, to crop the padding of `encode`; None keeps all frames.

        Returns:
            (B, 3, T, H, W), about in [-1, 1] (not clamped).

        Raises:
            UserError: Latents are unknown, missing, or of different batches, or `num_frames` exceeds their length.
        """
        unknown = sorted(set(latents) - set(self.latent_names))
        missing = sorted(set(self.latent_names) - set(latents))
        if unknown or not latents or (missing and not self.partial_latents):
            raise UserError(
                f"Expected latents {list(self.latent_names)} for {type(self).__name__}, got {sorted(latents)}."
            )
        batches = [latent.shape[:1] for latent in latents.values()]
        if any(batch != batches[0] for batch in batches):
            shapes = {name: tuple(latent.shape) for name, latent in latents.items()}
            raise UserError(f"Expected latents of one batch, got {shapes}.")
        clip = self._map_range(self._decode(latents), self.value_range, (-1.0, 1.0))
        if num_frames is None:
            return clip
        if num_frames > clip.shape[2]:
            raise UserError(f"Expected at most {clip.shape[2]} frames from these latents, got num_frames={num_frames}.")
        return clip[:, :, -num_frames:] if self.temporal.pad == "first" else clip[:, :, :num_frames]

    def forward(self, clip: Tensor) -> Reconstruction:
        """Encode and decode a clip, with a posterior sample in training and the mode in evaluation."""
        encoding = self.encode(clip)
        latents = encoding.sample() if self.training else encoding.mode()
        return Reconstruction(self.decode(latents, clip.shape[2]), latents, encoding.regularization(), encoding)

    def check_clip(self, clip: Tensor) -> None:
        """Raise `UserError` unless `clip` is a float tensor of a shape that the model takes."""
        side = self.resolution
        frames = "T" if self.temporal.pad or self.temporal.minimum != self.temporal.maximum else self.temporal.minimum
        wanted = f"(B, 3, {frames}, {side or 'H'}, {side or 'W'})"
        fits = clip.ndim == 5 and clip.shape[1] == 3 and clip.is_floating_point()
        fits = fits and (side is None or clip.shape[3:] == (side, side))
        if fits and not isinstance(frames, str) and clip.shape[2] != frames:
            fits = False
        if fits and (clip.shape[3] % self.spatial_multiple or clip.shape[4] % self.spatial_multiple):
            raise UserError(
                f"Expected a clip whose height and width are multiples of {self.spatial_multiple}, got "
                f"{tuple(clip.shape)}; set data.resolution accordingly."
            )
        if not fits:
            advice = f"; set data.num_frames={frames}" if not isinstance(frames, str) else ""
            advice += f"{' and' if advice else '; set'} data.resolution={side}" if side else ""
            raise UserError(
                f"Expected a float clip of shape {wanted} in [-1, 1], got {tuple(clip.shape)} of {clip.dtype}{advice}."
            )

    def latent_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """Compute latent shapes of a clip (3, T, H, W), padding included, without batch axis and forward pass."""
        channels, frames, height, width = clip_shape
        return self._latent_shapes((channels, self.temporal.legal_length(frames), height, width))

    def compression_rate(self, clip_shape: Sequence[int]) -> float:
        """Return latent numbers over numbers in the user's clip (3, T, H, W), as in the paper's B.1; 0.002 is 0.2%."""
        return sum(math.prod(shape) for shape in self.latent_shapes(clip_shape).values()) / math.prod(clip_shape)

    def bits_per_pixel(self, clip_shape: Sequence[int]) -> float | None:
        """Return bits of code per pixel (T·H·W of them) of the user's clip; None unless every latent is discrete."""
        codes = self.code_shapes(clip_shape)
        if set(codes) != set(self.latent_names):
            return None
        bits = sum(math.prod(shape) * math.log2(size) for shape, size in codes.values())
        return bits / math.prod(clip_shape[1:])

    def spec(self) -> dict[str, Any]:
        """Return `class_path` and `init_args`, from which the model is rebuilt; each checkpoint stores them."""
        return {"class_path": self.class_path, "init_args": self.init_args}

    @staticmethod
    def _map_range(clip: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
        if source == target:
            return clip
        scale = (target[1] - target[0]) / (source[1] - source[0])
        return (clip - source[0]) * scale + target[0]


def complete(spec: dict[str, Any]) -> dict[str, Any]:
    """Return a spec's `init_args` with the defaults of those that it lacks; a stored one is older than some."""
    parameters = inspect.signature(plugins.class_of(spec["class_path"], VideoAutoencoder)).parameters
    defaults = {name: p.default for name, p in parameters.items() if p.default is not inspect.Parameter.empty}
    return defaults | spec.get("init_args", {})


def build(spec: dict[str, Any]) -> VideoAutoencoder:
    """Build an autoencoder from its `spec()`, with new weights."""
    model: VideoAutoencoder = plugins.build(spec, VideoAutoencoder)
    return model
