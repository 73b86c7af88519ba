"""Haar wavelets of clips, as WF-VAE has them: in space and time, or in space alone.

A transform splits blocks of 2 x 2 (x 2) pixels of each channel into low and high bands: sums of the block's pixels,
with − for the second pixel along each axis of which the band is the high one. The output has the bands in order, the
low one first, each with all channels. Constants are the released ones: in 3-D 0.3536 for 1/√8, so that a transform and
its inverse multiply a clip by 1.0003.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin.layers.causal_vae import RepeatingConv3d, fold, repeat_first, unfold

# Sign of the second pixel along (time,) height and width, by the names of the released weights.
BANDS_2D: dict[str, tuple[int, ...]] = {"aa": (1, 1), "ad": (-1, 1), "da": (1, -1), "dd": (-1, -1)}
BANDS_3D: dict[str, tuple[int, ...]] = {
    "h": (1, 1, 1),
    "g": (1, 1, -1),
    "hh": (1, -1, 1),
    "gh": (1, -1, -1),
    "h_v": (-1, 1, 1),
    "g_v": (-1, 1, -1),
    "hh_v": (-1, -1, 1),
    "gh_v": (-1, -1, -1),
}
SCALE_2D, SCALE_3D = 0.5, 0.3536


def _make_filter(signs: tuple[int, ...], scale: float) -> Tensor:
    """Return the filter of one band, (1, 1, 2, 2) or (1, 1, 2, 2, 2)."""
    taps = torch.tensor(scale)
    for sign in signs:
        taps = taps[..., None] * torch.tensor([1.0, float(sign)])
    return taps[None, None]


class _Filters(nn.Module):
    """Fixed filters as buffers by band."""

    def __init__(self, bands: dict[str, tuple[int, ...]], scale: float) -> None:
        super().__init__()
        self.bands = tuple(bands)
        for name, signs in bands.items():
            self.register_buffer(name, _make_filter(signs, scale))

    def filters(self) -> Tensor:
        """Return the filters of all bands, (bands, 1, 2, 2, ...)."""
        return torch.cat([self.get_buffer(name) for name in self.bands])


class HaarTransform2d(_Filters):
    """Transform of each frame."""

    def __init__(self) -> None:
        super().__init__(BANDS_2D, SCALE_2D)

    def forward(self, x: Tensor) -> Tensor:
        """Split (B, C, T, H, W) → (B, 4·C, T, H/2, W/2)."""
        frames = fold(x)
        bands = F.conv2d(frames.flatten(0, 1)[:, None], self.filters(), stride=2)
        return unfold(_join_bands(bands, len(frames)), len(x))


class InverseHaarTransform2d(_Filters):
    """Inverse of `HaarTransform2d`."""

    def __init__(self) -> None:
        super().__init__(BANDS_2D, SCALE_2D)

    def forward(self, x: Tensor) -> Tensor:
        """Join (B, 4·C, T, H, W) → (B, C, T, 2H, 2W)."""
        frames = fold(x)
        pixels = F.conv_transpose2d(_split_bands(frames, 4), self.filters(), stride=2)
        return unfold(pixels[:, 0].unflatten(0, (len(frames), -1)), len(x))


class HaarTransform3d(nn.Module):
    """Transform of a clip with its first frame repeated once; the filters are frozen parameters, as in the releases."""

    def __init__(self) -> None:
        super().__init__()
        for name, signs in BANDS_3D.items():
            band = RepeatingConv3d(1, 1, (2, 2, 2), (2, 2, 2), padding=0, bias=False)
            band.conv.weight = nn.Parameter(_make_filter(signs, SCALE_3D), requires_grad=False)
            self.add_module(f"{name}_conv", band)

    def forward(self, x: Tensor) -> Tensor:
        """Split (B, C, T, H, W) → (B, 8·C, (T + 1)/2, H/2, W/2)."""
        # One convolution instead of eight.
        filters = torch.cat([self.get_parameter(f"{name}_conv.conv.weight") for name in BANDS_3D])
        bands = F.conv3d(repeat_first(x, 1).flatten(0, 1)[:, None], filters, stride=2)
        return _join_bands(bands, len(x))


class InverseHaarTransform3d(_Filters):
    """Inverse of `HaarTransform3d`: the first frame is dropped."""

    def __init__(self) -> None:
        super().__init__(BANDS_3D, SCALE_3D)

    def forward(self, x: Tensor) -> Tensor:
        """Join (B, 8·C, T, H, W) → (B, C, 2T − 1, 2H, 2W)."""
        pixels = F.conv_transpose3d(_split_bands(x, 8), self.filters(), stride=2)
        return pixels[:, 0].unflatten(0, (len(x), -1))[:, :, 1:]


def _join_bands(bands: Tensor, batch: int) -> Tensor:
    """Order channels by bands: (B·C, bands, ...) → (B, bands·C, ...)."""
    return bands.unflatten(0, (batch, -1)).transpose(1, 2).flatten(1, 2)


def _split_bands(x: Tensor, count: int) -> Tensor:
    """Invert `_join_bands`: (B, bands·C, ...) → (B·C, bands, ...)."""
    return x.unflatten(1, (count, -1)).transpose(1, 2).flatten(0, 1)
