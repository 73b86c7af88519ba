"""Layers of Open-Sora-Plan's video autoencoders (OD-VAE, WF-VAE), with the names of the released weights.

Convolutions over time are causal as in `vidtwin.layers.conv3d`, but what they see before a clip is its first frame
again, not zeros. In between, layers work on single frames. Two parts look ahead: group norms, whose statistics go over
all frames, and interpolation over time, by one frame.

Clips and features are (B, C, T, H, W). T frames become 1 + (T − 1) // 2 in a layer that halves time, and 2T − 1 in one
that doubles it: the first frame stays one frame.
"""

from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtwin.errors import UserError
from vidtwin.layers import vqgan

Norm = Literal["group", "layer"]
TimeInterpolation = Literal["linear", "nearest"]


def fold(x: Tensor) -> Tensor:
    """Make frames the batch: (B, C, T, H, W) → (B·T, C, H, W)."""
    return x.transpose(1, 2).flatten(0, 1)


def unfold(frames: Tensor, batch: int) -> Tensor:
    """Invert `fold`: (B·T, C, H, W) → (B, C, T, H, W)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)


def repeat_first(x: Tensor, count: int) -> Tensor:
    """Put `count` copies of the first frame in front: (B, C, T, H, W) → (B, C, count + T, H, W)."""
    return torch.cat([*[x[:, :, :1]] * count, x], dim=2) if count else x


class RepeatingConv3d(nn.Module):
    """3-D convolution with k − 1 copies of the first frame in front, and zeros around each frame.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output.
        kernel: Of time, height and width.
        stride: Of time, height and width.
        padding: Zeros on each side of height and width.
        bias: Add a learned bias.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel: tuple[int, int, int] = (3, 3, 3),
        stride: tuple[int, int, int] = (1, 1, 1),
        padding: int = 1,
        bias: bool = True,
    ) -> None:
        super().__init__()
        self.front = kernel[0] - 1
        self.conv = nn.Conv3d(width_in, width_out, kernel, stride, (0, padding, padding), bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve: (B, width_in, T, H, W) → (B, width_out, T', H', W')."""
        return self.conv(repeat_first(x, self.front))


class FrameConv2d(nn.Conv2d):
    """3x3 convolution of each frame."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__(width_in, width_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, width_in, T, H, W) → (B, width_out, T, H, W)."""
        return unfold(super().forward(fold(x)), len(x))


class ChannelNorm(nn.Module):
    """LayerNorm over the channels at each position, with epsilon 1e-6."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width, eps=1e-6)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, ...); the shape stays."""
        return self.norm(x.movedim(1, -1)).movedim(-1, 1)


def make_norm(norm: Norm, width: int, groups: int = 32) -> nn.Module:
    """Build a norm of `width` channels; "group" takes its statistics over all frames that it is given.

    Raises:
        UserError: `groups` does not divide `width`.
    """
    return ChannelNorm(width) if norm == "layer" else vqgan.group_norm(groups, width)


class ResidualBlock(nn.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), in 3x3x3 or in each frame.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output; if they differ, x goes through a convolution of size 1.
        norm: Kind of the norms.
        per_frame: Normalize and convolve each frame by itself.
        groups: Groups of group norms.
    """

    def __init__(
        self, width_in: int, width_out: int, norm: Norm = "group", per_frame: bool = False, groups: int = 32
    ) -> None:
        super().__init__()
        self.per_frame = per_frame
        self.norm1 = make_norm(norm, width_in, groups)
        self.conv1 = self._make_conv(width_in, width_out)
        self.norm2 = make_norm(norm, width_out, groups)
        self.conv2 = self._make_conv(width_out, width_out)
        self.nin_shortcut: nn.Module | None = None
        if width_in != width_out and per_frame:
            self.nin_shortcut = nn.Conv2d(width_in, width_out, 1)
        elif width_in != width_out:
            self.nin_shortcut = RepeatingConv3d(width_in, width_out, kernel=(1, 1, 1), padding=0)

    def _make_conv(self, width_in: int, width_out: int) -> nn.Module:
        if self.per_frame:
            return nn.Conv2d(width_in, width_out, 3, padding=1)
        return RepeatingConv3d(width_in, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width_in, T, H, W) → (B, width_out, T, H, W)."""
        return unfold(self._transform(fold(x)), len(x)) if self.per_frame else self._transform(x)

    def _transform(self, x: Tensor) -> Tensor:
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))  # in this order: see layers/conv3d.py


class FrameAttention(nn.Module):
    """Single-head self-attention over the pixels of each frame, without position embeddings; residual.

    Args:
        width: C.
        norm: Kind of the norm.
        groups: Groups of a group norm.
    """

    def __init__(self, width: int, norm: Norm = "group", groups: int = 32) -> None:
        super().__init__()
        self.norm = make_norm(norm, width, groups)
        self.q, self.k, self.v, self.proj_out = (
            RepeatingConv3d(width, width, kernel=(1, 1, 1), padding=0) for _ in range(4)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of (B, C, T, H, W); the shape stays."""
        y = self.norm(x)
        q, k, v = (self._split(conv(y)) for conv in (self.q, self.k, self.v))
        return self.proj_out(self._join(F.scaled_dot_product_attention(q, k, v), x)) + x

    def _split(self, x: Tensor) -> Tensor:
        """Make pixels the tokens: (B, C, T, H, W) → (B·T, 1, H·W, C)."""
        return rearrange(x, "b c t h w -> (b t) 1 (h w) c")

    def _join(self, tokens: Tensor, like: Tensor) -> Tensor:
        batch, _, _, height, _ = like.shape
        return rearrange(tokens, "(b t) 1 (h w) c -> b c t h w", b=batch, h=height)


class FrameDownsample(vqgan.Downsample):
    """Halve the height and width by a strided 3x3 convolution of each frame, padded on the right and at the bottom."""

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (B, C, T, H, W) → (B, C, T, H/2, W/2)."""
        return unfold(super().forward(fold(x)), len(x))


class FrameUpsample(vqgan.Upsample):
    """Double the height and width of each frame: nearest neighbour, then a 3x3 convolution."""

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T, H, W) → (B, C, T, 2H, 2W)."""
        return unfold(super().forward(fold(x)), len(x))


class Downsample3d(nn.Module):
    """Halve the height, width and, with `time`, frames by a strided convolution, padded on the right and at the bottom.

    Args:
        width: C.
        time: Convolve over time too (3x3x3 instead of 1x3x3), with stride 2.
    """

    def __init__(self, width: int, time: bool) -> None:
        super().__init__()
        kernel, stride = ((3, 3, 3), (2, 2, 2)) if time else ((1, 3, 3), (1, 2, 2))
        self.conv = RepeatingConv3d(width, width, kernel, stride, padding=0)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (B, C, T, H, W) → (B, C, T', H/2, W/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample3d(nn.Module):
    """Double the height, width and, with `time`, frames, then convolve.

    Args:
        width: C.
        time: Interpolate linearly in height and width and by `interpolation` in time, then convolve 3x3x3. Otherwise
            nearest neighbour in height and width, then 1x3x3.
        interpolation: See `double_frames`.
    """

    def __init__(self, width: int, time: bool, interpolation: TimeInterpolation = "linear") -> None:
        super().__init__()
        self.time, self.interpolation = time, interpolation
        self.conv = RepeatingConv3d(width, width, (3 if time else 1, 3, 3))

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T, H, W) → (B, C, T', 2H, 2W)."""
        if self.time:
            x = F.interpolate(double_frames(x, self.interpolation), scale_factor=(1, 2, 2), mode="trilinear")
        else:
            x = F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest")
        return self.conv(x)


def double_frames(x: Tensor, interpolation: TimeInterpolation) -> Tensor:
    """Keep the first frame and double the others by interpolation among themselves: T frames → 2T − 1."""
    if x.shape[2] == 1:
        return x
    mode = {"linear": "trilinear", "nearest": "nearest"}[interpolation]
    return torch.cat([x[:, :, :1], F.interpolate(x[:, :, 1:], scale_factor=(2, 1, 1), mode=mode)], dim=2)


def check_latent(latent: Tensor, channels: int) -> None:
    """Raise `UserError` unless the shape is (B, channels, T', h, w)."""
    if latent.ndim != 5 or latent.shape[1] != channels:
        raise UserError(f"Expected a latent of shape (B, {channels}, T', h, w), got {tuple(latent.shape)}.")
