"""PatchGAN discriminators (Isola et al. 2017): one logit per patch, none for the whole clip.

    conv s2 → [conv s2, norm] × (num_layers − 1) → conv s1, norm → conv s1 → logits      LeakyReLU 0.2 in between

The modules stand in an `nn.Sequential` called `main` at the indices of the released code, so that with `norm="batch"`
released weights `loss.discriminator.main.*` load as they are.
"""

import math
from itertools import pairwise
from typing import Literal

from einops import rearrange
from torch import Tensor, nn

Norm = Literal["group", "batch", "none"]


def _norm(norm: Norm, width: int, dims: int) -> nn.Module:
    if norm == "batch":
        return nn.BatchNorm2d(width) if dims == 2 else nn.BatchNorm3d(width)
    # 32 groups at the usual widths; never fewer than four channels in one, or small models would lose their signal.
    return nn.GroupNorm(math.gcd(32, max(1, width // 4)), width) if norm == "group" else nn.Identity()


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
            layers.append(nn.Conv3d(width_in, width_out, (3, 4, 4), stride, padding=1, bias=bias))
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
        norm: After all layers but the first and the last. The released code has "batch"; "group" does not mix the
            clips of a batch and needs no exchange between ranks.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        self.main = _patch_gan(channels, num_layers, norm, dims=2)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] → logits (B·T, 1, h, w)."""
        return self.main(rearrange(clip, "b c t h w -> (b t) c h w"))


class PatchDiscriminator3d(nn.Module):
    """PatchGAN over time and space: like `PatchDiscriminator2d`, with 3x4x4 convolutions that halve T too.

    The kernel is 3 in time because one of 4 would leave no frame of a 16-frame clip after the last layer.
    """

    def __init__(self, channels: int = 64, num_layers: int = 3, norm: Norm = "group") -> None:
        super().__init__()
        self.main = _patch_gan(channels, num_layers, norm, dims=3)

    def forward(self, clip: Tensor) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] → logits (B, 1, t, h, w)."""
        return self.main(clip)
