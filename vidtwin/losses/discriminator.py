"""Discriminators: PatchGAN (Isola et al. 2017), and those of MAGVIT-v2 and iVideoGPT.

PatchGAN gives one logit per patch instead of one per clip:

    conv s2 → [conv s2, norm] × (num_layers − 1) → conv s1, norm → conv s1 → logits      LeakyReLU 0.2 in between

Modules have the indices of the released code in an `nn.Sequential` called `main`, so that with `norm="batch"` the
released weights `loss.discriminator.main.*` load as they are.
"""

import math
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm

from vidtwin.errors import UserError
from vidtwin.layers.conv3d import Conv3d, norm_groups

Norm = Literal["group", "batch", "none"]


def _norm(norm: Norm, width: int, dims: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width) if dims == 2 else nn.BatchNorm3d(width)
    return nn.GroupNorm(norm_groups(width), width) if norm == "group" else nn.Identity()


def _patch_gan(channels: int, num_layers: int, norm: Norm, dims: int) -> nn.Sequential:
    widths = [3, *(channels * min(2**i, 8) for i in range(num_layers + 1)), 1]
    layers: list[nn.Module] = []
    for i, (width_in, width_out) in enumerate(pairwise(widths)):
        inner = 0 < i <= num_layers
        bias = not (inner and norm == "batch")  # batch norm would cancel it
        stride = 2 if i < num_layers else 1
        if dims == 2:
            layers.append(nn.Conv2d(width_in, width_out, 4, stride, padding=1, bias=bias))
        else:
            layers.append(Conv3d(width_in, width_out, (3, 4, 4), stride, padding=1, bias=bias))
        if inner:
            layers.append(_norm(norm, width_out, dims))
        if i <= num_layers:
            layers.append(nn.LeakyReLU(0.2, inplace=True))
    for layer in layers:
        if isinstance(layer, nn.Conv2d | nn.Conv3d):
            nn.init.normal_(layer.weight, 0.0, 0.02)
        elif isinstance(layer, nn.BatchNorm2d | nn.BatchNorm3d | nn.GroupNorm):
            nn.init.normal_(layer.weight, 1.0, 0.02)
    return nn.Sequential(*layers)


class PatchDiscriminator2d(nn.Module):
    """PatchGAN on single frames: 4x4 convolutions, each logit sees 70x70 pixels.

    Args:
        channels: Width of the first layer; it doubles with each layer up to 8 times that.
        num_layers: Layers with stride 2.
        norm: Norm after all layers but the first and the last. The released code uses "batch"; "group" does not mix
            the clips of a batch and needs no communication between ranks.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        self.main = _patch_gan(channels, num_layers, norm, dims=2)

    def forward(self, clip: Tensor) -> Tensor:
        """Judge each frame: (B, 3, T, H, W) in [-1, 1] → logits (B·T, 1, h, w)."""
        return self.main(rearrange(clip, "b c t h w -> (b t) c h w"))


class PatchDiscriminator3d(nn.Module):
    """PatchGAN over time and space: like `PatchDiscriminator2d`, with 3x4x4 convolutions that halve T too.

    The kernel is 3 in time because one of 4 would leave no frame of a 16-frame clip after the last layer.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        self.main = _patch_gan(channels, num_layers, norm, dims=3)

    def forward(self, clip: Tensor) -> Tensor:
        """Judge each patch: (B, 3, T, H, W) in [-1, 1] → logits (B, 1, t, h, w)."""
        return self.main(clip)


class BlurPool3d(nn.Module):
    """Anti-aliased halving of time, height and width: a 1-2-1 filter on each axis, then stride 2 (Zhang 2019)."""

    kernel: Tensor

    def __init__(self) -> None:
        super().__init__()
        taps = torch.tensor([0.25, 0.5, 0.25])
        self.register_buffer("kernel", torch.einsum("t,h,w->thw", taps, taps, taps), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (B, C, T, H, W) → (B, C, ⌈T/2⌉, ⌈H/2⌉, ⌈W/2⌉); the border is repeated."""
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 3, 3, 3)
        return F.conv3d(F.pad(x, (1,) * 6, mode="replicate"), kernel, stride=2, groups=x.shape[1])


class _BlurPoolBlock(nn.Module):
    """conv ─ LeakyReLU ─ blur pool ─ conv ─ LeakyReLU, beside blur pool ─ 1x1x1 conv; the sum over √2."""

    def __init__(self, width_in: int, width_out: int) -> None:
        super().__init__()
        self.conv1 = Conv3d(width_in, width_out, 3, padding=1)
        self.conv2 = Conv3d(width_out, width_out, 3, padding=1)
        self.shortcut = nn.Conv3d(width_in, width_out, 1, bias=False)
        self.pool = BlurPool3d()

    def forward(self, x: Tensor) -> Tensor:
        y = self.pool(F.leaky_relu(self.conv1(x), 0.2))
        y = F.leaky_relu(self.conv2(y), 0.2)
        # As in StyleGAN2, from which MAGVIT's is inflated: the sum keeps the variance of its parts.
        return (self.shortcut(self.pool(x)) + y) / math.sqrt(2)


class BlurPoolDiscriminator3d(nn.Module):
    """MAGVIT-v2's discriminator: StyleGAN's in 3-D with blur pooling, one logit per clip (Yu et al. 2023, appendix A).

        conv ─ 5 × (residual block, half of T, H, W) ─ conv ─ linear ─ linear ─ logit        LeakyReLU 0.2 in between

    Initial values as in cofe-ai/O2-MAGVIT2, which also reflects the border in its blur and adds a norm after the last
    convolution.

    Args:
        num_frames: T of the clips (or `adversarial_frames` of the loss, if that is less).
        resolution: H = W of the clips.
        channels: Width of the first layer; the blocks have 2, 4, 4, 4 and 4 times that.
    """

    def __init__(self, num_frames: int = 16, resolution: int = 224, channels: int = 128) -> None:
        super().__init__()
        self.size = (num_frames, resolution, resolution)
        widths = [channels, *(channels * factor for factor in (2, 4, 4, 4, 4))]
        self.conv_in = Conv3d(3, channels, 3, padding=1)
        self.blocks = nn.Sequential(*(_BlurPoolBlock(before, after) for before, after in pairwise(widths)))
        self.conv_out = Conv3d(widths[-1], widths[-1], 3, padding=1)
        left = math.prod(-(-side // 2 ** len(self.blocks)) for side in self.size)
        self.linear1 = nn.Linear(widths[-1] * left, widths[-1])
        self.linear2 = nn.Linear(widths[-1], 1)
        for layer in self.modules():
            if isinstance(layer, nn.Conv3d | nn.Linear):
                # With torch's defaults the logit would hardly depend on the clip, and start with almost no gradient.
                nn.init.xavier_uniform_(layer.weight, math.sqrt(2))
                if layer.bias is not None:
                    nn.init.zeros_(layer.bias)

    def forward(self, clip: Tensor) -> Tensor:
        """Judge each clip: (B, 3, T, H, W) in [-1, 1] → logits (B, 1)."""
        if tuple(clip.shape[2:]) != self.size:
            raise UserError(
                f"Expected clips of {self.size[0]} frames of {self.size[1]} px for this discriminator, got "
                f"{tuple(clip.shape[2:])}; set --model.loss.discriminator.num_frames and .resolution accordingly."
            )
        x = self.blocks(F.leaky_relu(self.conv_in(clip), 0.2))
        x = F.leaky_relu(self.conv_out(x), 0.2).flatten(1)
        return self.linear2(F.leaky_relu(self.linear1(x), 0.2))


class SpectralDiscriminator2d(nn.Module):
    """iVideoGPT's discriminator: strided convolutions with spectral norm on single frames, one logit per patch.

        conv s2 → [conv s2, instance norm] × (num_layers − 1) → conv 1x1 → logits      LeakyReLU 0.2 in between

    Args:
        channels: Width of the first layer; it doubles with each layer up to 8 times that.
        num_layers: Layers with stride 2; 4 as in its training scripts (1,551,489 parameters).
    """

    def __init__(self, channels: int = 64, num_layers: int = 4) -> None:
        super().__init__()
        widths = [3, *(channels * min(2**i, 8) for i in range(num_layers))]
        layers: list[nn.Module] = []
        for i, (width_in, width_out) in enumerate(pairwise(widths)):
            layers.append(spectral_norm(nn.Conv2d(width_in, width_out, 3, stride=2, padding=1)))
            if i > 0:
                layers.append(nn.InstanceNorm2d(width_out))
            layers.append(nn.LeakyReLU(0.2))
        self.main = nn.Sequential(*layers, nn.Conv2d(widths[-1], 1, 1))
        self.least = 2**num_layers + 1  # an instance norm needs more than one position

    def forward(self, clip: Tensor) -> Tensor:
        """Judge each frame: (B, 3, T, H, W) in [-1, 1] → logits (B·T, 1, h, w)."""
        if min(clip.shape[3:]) < self.least:
            raise UserError(
                f"Expected clips of at least {self.least} px for this discriminator, got {tuple(clip.shape[3:])}; "
                "lower --model.loss.discriminator.num_layers."
            )
        return self.main(rearrange(clip, "b c t h w -> (b t) c h w"))
