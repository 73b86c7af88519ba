"""The one interface behind which every video autoencoder stands.

    clip (B, 3, T, H, W) in [-1, 1] ── encode ──> Encoding ── sample | mode ──> latents ── decode ──> clip

A subclass fills in `_encode`, `_decode`, `_latent_shapes` and `last_layer`; what is the same for all (checking shapes,
padding to a legal length and cropping back, mapping the range of values, rates) is here.
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
    """Which clip lengths a model takes: `offset + k * multiple` frames, from `minimum` to `maximum`.

    A clip of another length is padded to the next legal one, by repeating its last (`pad="last"`) or first
    (`pad="first"`) frame, and the output is cropped back; with `pad=None` it is refused.
    """

    multiple: int = 1
    offset: int = 0
    minimum: int = 1
    maximum: int | None = None
    pad: str | None = None

    @classmethod
    def exactly(cls, num_frames: int) -> Self:
        """A model whose length is fixed when it is built."""
        return cls(minimum=num_frames, maximum=num_frames)

    def is_legal(self, num_frames: int) -> bool:
        above_minimum = num_frames >= self.minimum and (self.maximum is None or num_frames <= self.maximum)
        return above_minimum and (num_frames - self.offset) % self.multiple == 0

    def legal_length(self, num_frames: int) -> int:
        """The length that a clip of `num_frames` frames is padded to; `UserError` if it can't be."""
        if self.is_legal(num_frames):
            return num_frames
        length = max(num_frames, self.minimum)
        length += -(length - self.offset) % self.multiple
        if self.pad is None or not self.is_legal(length):
            raise UserError(f"Expected a clip of {self}, got {num_frames}; set data.num_frames accordingly.")
        return length

    @property
    def usual_length(self) -> int:
        """The legal length at or next to 16 frames, rather above than below: what is taken where none is asked for."""
        length = max(self.minimum, 16 if self.maximum is None else min(16, self.maximum))
        length += -(length - self.offset) % self.multiple
        if not self.is_legal(length):  # above the maximum
            length -= self.multiple
        if not self.is_legal(length):
            raise UserError(f"Expected a temporal that some length keeps, got {self}; mend minimum and maximum.")
        return length

    def __str__(self) -> str:
        if self.minimum == self.maximum:
            return f"{self.minimum} frames"
        step = f"{self.multiple}k+{self.offset}" if self.offset else f"{self.multiple}k"
        legal = "any number of" if self.multiple == 1 else step
        limits = f"at least {self.minimum}" + (f", at most {self.maximum}" if self.maximum is not None else "")
        return f"{legal} frames ({limits})"


@dataclass
class Reconstruction:
    """What one forward pass gives: the clip (B, 3, T, H, W), the latents it was decoded from, the encoder's terms.

    `encoding` is all that the encoder said, for those who watch it; None where it was not kept.
    """

    clip: Tensor
    latents: Latents
    regularization: dict[str, Tensor] = field(default_factory=dict)
    encoding: Encoding | None = None


class VideoAutoencoder(Pretrained, nn.Module, ABC):
    """A model that turns a clip into named latents, and latents alone back into a clip.

    `save_pretrained`, `from_pretrained` and `push_to_hub` are those of `vidtwin.hub.Pretrained`.

    Attributes:
        latent_names: The latents that `encode` gives and `decode` takes.
        partial_latents: Whether `decode` can do without some of them (VidTwin: structure only, dynamics only).
        temporal: Legal clip lengths.
        resolution: Height and width if they are fixed when the model is built, else None.
        spatial_multiple: What height and width have to be a multiple of, where they are not fixed.
        value_range: The range of pixel values that `_encode` and `_decode` work in; outside it is [-1, 1].
        init_args: The arguments that the model was built with, defaults included; `spec` stores them.
        class_path: Its class, likewise.
    """

    latent_names: ClassVar[tuple[str, ...]]
    partial_latents: ClassVar[bool] = False
    temporal: TemporalSpec = TemporalSpec()
    resolution: int | None = None
    spatial_multiple: int = 1
    value_range: ClassVar[tuple[float, float]] = (-1.0, 1.0)
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

    # What a model fills in.

    @abstractmethod
    def _encode(self, clip: Tensor) -> Encoding:
        """(B, 3, T, H, W) of a legal length, in `value_range` → one posterior per latent."""

    @abstractmethod
    def _decode(self, latents: Latents) -> Tensor:
        """Latents → (B, 3, T, H, W) of the legal length, in `value_range`."""

    @abstractmethod
    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        """Shapes for a clip (3, T, H, W) of a legal length, without a batch axis and without a forward pass."""

    @property
    @abstractmethod
    def last_layer(self) -> nn.Parameter:
        """The last weight before the pixels: the adaptive GAN weight compares gradients here."""

    def code_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], int]]:
        """For each discrete latent of a clip (3, T, H, W): the shape of its integer codes and the codebook's size."""
        return {}

    def dequantize(self, codes: Latents) -> Latents:
        """Integer codes by name → the latents that `decode` takes. Only for models with codebooks."""
        raise UserError(f"{type(self).__name__} has no codebook: decode() takes its latents as they are.")

    # What all share.

    def encode(self, clip: Tensor) -> Encoding:
        """Encode a clip (B, 3, T, H, W) in [-1, 1]; a length that is not legal is padded first."""
        self.check_clip(clip)
        length = self.temporal.legal_length(clip.shape[2])
        if extra := length - clip.shape[2]:
            first = self.temporal.pad == "first"
            edge = clip[:, :, :1] if first else clip[:, :, -1:]
            padding = edge.expand(-1, -1, extra, -1, -1)
            clip = torch.cat([padding, clip] if first else [clip, padding], dim=2)
        return self._encode(self._map_range(clip, (-1.0, 1.0), self.value_range))

    def decode(self, latents: Latents, num_frames: int | None = None) -> Tensor:
        """Decode latents alone: no encoder features, no video.

        Args:
            latents: By name, each (B, ...) with the same B. Where `partial_latents` is set some may be left out.
            num_frames: Length of the user's clip, to crop the padding of `encode`; None keeps every frame.

        Returns:
            (B, 3, T, H, W), about in [-1, 1] (not clamped).
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
        """Encode and decode: a sample of the posterior in training, its mode in evaluation."""
        encoding = self.encode(clip)
        latents = encoding.sample() if self.training else encoding.mode()
        return Reconstruction(self.decode(latents, clip.shape[2]), latents, encoding.regularization(), encoding)

    def check_clip(self, clip: Tensor) -> None:
        """Raise `UserError` unless `clip` is a float tensor of a shape that this model takes."""
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
        """Shape of each latent of one clip (3, T, H, W), padding included; no batch axis, no forward pass."""
        channels, frames, height, width = clip_shape
        return self._latent_shapes((channels, self.temporal.legal_length(frames), height, width))

    def compression_rate(self, clip_shape: Sequence[int]) -> float:
        """Numbers handed downstream over numbers in the user's clip (3, T, H, W), paper B.1; 0.002 is 0.2%."""
        return sum(math.prod(shape) for shape in self.latent_shapes(clip_shape).values()) / math.prod(clip_shape)

    def bits_per_pixel(self, clip_shape: Sequence[int]) -> float | None:
        """Bits of the codes per pixel (T·H·W of them) of the user's clip; None unless every latent is discrete."""
        codes = self.code_shapes(clip_shape)
        if set(codes) != set(self.latent_names):
            return None
        bits = sum(math.prod(shape) * math.log2(size) for shape, size in codes.values())
        return bits / math.prod(clip_shape[1:])

    def spec(self) -> dict[str, Any]:
        """`class_path` and `init_args`, from which a command rebuilds the model; it travels in each checkpoint."""
        return {"class_path": self.class_path, "init_args": self.init_args}

    @staticmethod
    def _map_range(clip: Tensor, source: tuple[float, float], target: tuple[float, float]) -> Tensor:
        if source == target:
            return clip
        scale = (target[1] - target[0]) / (source[1] - source[0])
        return (clip - source[0]) * scale + target[0]


def build(spec: dict[str, Any]) -> VideoAutoencoder:
    """Build the autoencoder of a `spec()` with new weights."""
    model: VideoAutoencoder = plugins.build(spec, VideoAutoencoder)
    return model
