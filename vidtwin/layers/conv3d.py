"""Causal 3-D convolutions: the blocks of convolutional video autoencoders (MAGVIT-v2 and its successors).

    residual block   x ┬─ norm, Swish, conv 3³ ─ norm, Swish, conv 3³ ┬ + ─>
                       └────────── (1³ conv if the width changes) ────┘

Strictly causal, bit for bit: output frame t depends only on input frames up to t (after a strided convolution, up to
the last frame of its group). Convolutions therefore pad time in front only, and norms compute their statistics per
frame: torch's GroupNorm of (B, C, T, H, W) would let the first frame see the last. Open-Sora's blocks have the latter.

The padding in front is zeros, like at the borders of a frame, and as in the public implementation of MAGVIT-v2
(cofe-ai/O2-MAGVIT2); some later models repeat the first frame instead.

A model that starts with `channels_last` keeps this memory format and runs faster on a CPU: its convolutions are
twice as fast at 8 channels (a tenth faster at 128), and folding time into the batch is a view. Results do not change.
"""

import math

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtwin.errors import UserError
from vidtwin.layers.vqgan import group_norm


def norm_groups(width: int) -> int:
    """Return the number of groups: 32 at the usual widths, fewer to keep four channels (and so the signal) in each."""
    groups = math.gcd(32, width)
    while groups > 1 and width < 4 * groups:
        groups //= 2
    return groups


def channels_last(x: Tensor) -> Tensor:
    """Store (B, C, T, H, W) as (B, T, H, W, C) in memory; shape and values stay."""
    return x.contiguous(memory_format=torch.channels_last_3d)


def depth_to_space(x: Tensor, factors: tuple[int, int, int]) -> Tensor:
    """Move channels to time and space: (B, C·q·p·r, T, H, W) → (B, C, T·q, H·p, W·r); C runs slowest.

    With q = 1 of `factors` (q, p, r) this is torch's pixel shuffle per frame. The output is channels-last in memory.

    Raises:
        UserError: q·p·r does not divide the number of channels.
    """
    q, p, r = factors
    if x.shape[1] % math.prod(factors):
        raise UserError(f"Expected a number of channels that {q}·{p}·{r} divides, got {x.shape[1]}.")
    return rearrange(x, "b (c q p r) t h w -> b (t q) (h p) (w r) c", q=q, p=p, r=r).movedim(-1, 1)


class Conv3d(nn.Conv3d):
    """torch's layer, with the correct gradient of its weights for a few frames in bfloat16 on a CPU.

    There oneDNN returns unwritten memory if the convolution itself pads fewer frames than its kernel spans, but not one
    frame (torch 2.15): NaN, or wrong numbers.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Convolve (B, C, T, H, W)."""
        assert not isinstance(self.padding, str)
        time, *space = self.padding
        if x.device.type != "cpu" or not (time and 1 < x.shape[2] < self.kernel_size[0]):
            return super().forward(x)
        padded = F.pad(x, (0, 0, 0, 0, time, time))
        return F.conv3d(padded, self.weight, self.bias, self.stride, (0, *space), self.dilation, self.groups)


class CausalConv3d(nn.Conv3d):
    """3-D convolution that pads time in front only; height and width are padded on both sides.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output.
        kernel_size: k, odd, on all three axes.
        stride: Of time, height and width.
        bias: Add a learned bias.
        front: Frames of zeros in front. None is k − 1: with stride s, T frames give 1 + (T − 1) // s, and the first
            output depends only on the first frame. k − s gives T // s: frame i comes from group i of s frames.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        kernel_size: int = 3,
        stride: tuple[int, int, int] = (1, 1, 1),
        bias: bool = True,
        front: int | None = None,
    ) -> None:
        if kernel_size % 2 == 0:
            raise UserError(f"Expected an odd kernel_size of a causal convolution, got {kernel_size}.")
        front = kernel_size - 1 if front is None else front
        # With fewer, group i would become output frame i - 1, which would then see later frames.
        if not max(0, kernel_size - stride[0]) <= front <= kernel_size - 1:
            raise UserError(
                f"Expected {max(0, kernel_size - stride[0])} to {kernel_size - 1} frames in front of a causal "
                f"convolution of kernel {kernel_size} and stride {stride[0]}, got {front}."
            )
        # The convolution pads height and width itself, without a copy.
        side = kernel_size // 2
        super().__init__(width_in, width_out, kernel_size, stride, padding=(0, side, side), bias=bias)
        self.front = front

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve: (B, width_in, T, H, W) → (B, width_out, T', H', W')."""
        return super().forward(F.pad(x, (0, 0, 0, 0, self.front, 0)) if self.front else x)


class FrameGroupNorm(nn.GroupNorm):
    """GroupNorm with statistics per frame.

    Args:
        width: C.
        affine: Learn a scale and a shift per channel.
    """

    def __init__(self, width: int, affine: bool = True) -> None:
        super().__init__(norm_groups(width), width, affine=affine)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize (B, C, T, H, W) per frame and group."""
        frames = x.transpose(1, 2)
        return super().forward(frames.flatten(0, 1)).view(frames.shape).transpose(1, 2)


class ResidualBlock(nn.Module):
    """x + conv(swish(norm(conv(swish(norm(x)))))): convolutions of 3x3x3 without bias.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output; if they differ, x goes through a convolution of 1x1x1.
        groups: Groups of norms over all frames, with epsilon 1e-5; None is norms per frame.

    Raises:
        UserError: `groups` does not divide a width.
    """

    def __init__(self, width_in: int, width_out: int, groups: int | None = None) -> None:
        super().__init__()
        self.norm1 = _make_norm(width_in, groups)
        self.conv1 = CausalConv3d(width_in, width_out, bias=False)
        self.norm2 = _make_norm(width_out, groups)
        self.conv2 = CausalConv3d(width_out, width_out, bias=False)
        changes = width_in != width_out
        self.shortcut = CausalConv3d(width_in, width_out, kernel_size=1, bias=False) if changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width_in, T, H, W) → (B, width_out, T, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + self.shortcut(x)  # in this order: torch's 1x1x1 convolutions do not keep x's memory format


def _make_norm(width: int, groups: int | None) -> nn.Module:
    return FrameGroupNorm(width) if groups is None else group_norm(groups, width, eps=1e-5)


class DepthToSpace(nn.Module):
    """Upsampling: a causal convolution to q·p·r times the channels, which then move to time, height and width.

    Args:
        width: Channels of input and output.
        factors: (q, p, r).
        drop: Frames dropped at the start. q − 1 inverts a strided `CausalConv3d` with `front=None`: T frames give
            1 + (T − 1)·q, and the first output depends only on the first frame.
    """

    def __init__(self, width: int, factors: tuple[int, int, int], drop: int = 0) -> None:
        super().__init__()
        if not 0 <= drop < factors[0]:
            raise UserError(f"Expected 0 to {factors[0] - 1} dropped frames of an upsampling by {factors}, got {drop}.")
        self.factors = factors
        self.drop = drop
        self.conv = CausalConv3d(width, width * math.prod(factors))

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T, H, W) → (B, C, T·q − drop, H·p, W·r)."""
        return depth_to_space(self.conv(x), self.factors)[:, :, self.drop :]
