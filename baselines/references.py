"""Two parameter-free references for every table: reconstruction by a single colour and by a single frame.

They implement the interface of the models, so the same code computes their rates and scores.
"""

from typing import ClassVar, NoReturn

from torch import Tensor

from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.posteriors import Deterministic, Encoding, Latents


class _Mean(VideoAutoencoder):
    """The clip's mean over some axes, repeated.

    Args:
        num_frames: T.
        resolution: H = W in pixels, or [H, W].
    """

    axes: ClassVar[tuple[int, ...]]

    def __init__(self, num_frames: int = 16, resolution: int | list[int] = 224) -> None:
        super().__init__()
        self.temporal = TemporalSpec.exactly(num_frames)
        self.num_frames = num_frames
        self.resolution = resolution if isinstance(resolution, int) else None
        self.size = (resolution, resolution) if isinstance(resolution, int) else tuple(resolution)

    def _encode(self, clip: Tensor) -> Encoding:
        if clip.shape[3:] != self.size:
            raise UserError(f"Expected a clip of {self.size} pixels, got {tuple(clip.shape[3:])}.")
        return Encoding({self.latent_names[0]: Deterministic(clip.mean(self.axes))})

    def _decode(self, latents: Latents) -> Tensor:
        mean = latents[self.latent_names[0]]
        mean = mean[:, :, None] if mean.ndim == 4 else mean[:, :, None, None, None]
        return mean.expand(-1, -1, self.num_frames, *self.size)

    @property
    def last_layer(self) -> NoReturn:
        raise UserError(f"{type(self).__name__} has nothing to train; run `vidtwin test` with it.")


class MeanColour(_Mean):
    """One colour for the whole clip: 3 numbers."""

    latent_names = ("colour",)
    axes = (2, 3, 4)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        return {"colour": (3,)}


class TemporalMean(_Mean):
    """The mean frame, repeated: 1/T of the clip's numbers. Strong if little moves."""

    latent_names = ("frame",)
    axes = (2,)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        return {"frame": (3, *self.size)}
