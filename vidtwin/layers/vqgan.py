"""The 2-D convolutional encoder and decoder of VQGAN (Esser et al. 2021), layer for layer as diffusers has them.

    encoder   conv ─ level 0 ─ … ─ level n-1 ─ middle ─ norm, SiLU, conv            height and width / 2^(n-1)
    decoder   conv ─ middle ─ level 0 ─ … ─ level n-1 ─ norm, SiLU, conv            height and width · 2^(n-1)

A level is a sequence of residual blocks; all but the last level end by halving (doubling) height and width. Modules
are named as in diffusers' `VQModel`, so that its weight files load as they are.

`EncoderLayers` and `DecoderLayers` hold the layers and have no forward pass: `Encoder` and `Decoder` run them in order;
a model may add layers between two levels instead.
"""

from collections.abc import Sequence

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtwin.errors import UserError
from vidtwin.layers.recompute import Recomputing


class ResidualBlock(nn.Module):
    """norm ─ SiLU ─ conv ─ norm ─ SiLU ─ conv, plus the input (through a 1x1 convolution if the width changes)."""

    def __init__(self, width_in: int, width_out: int, norm_groups: int) -> None:
        super().__init__()
        self.norm1 = group_norm(norm_groups, width_in)
        self.conv1 = nn.Conv2d(width_in, width_out, 3, padding=1)
        self.norm2 = group_norm(norm_groups, width_out)
        self.conv2 = nn.Conv2d(width_out, width_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform (M, width_in, h, w) → (M, width_out, h, w)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.conv_shortcut is None else self.conv_shortcut(x))


class Downsample(nn.Module):
    """Downsampling by 2: a 3x3 convolution with stride 2, padded on the right and at the bottom only."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (M, C, h, w) → (M, C, h/2, w/2)."""
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Upsampling by 2: nearest neighbour, then a 3x3 convolution."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (M, C, h, w) → (M, C, 2h, 2w)."""
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class PixelAttention(nn.Module):
    """Single-head self-attention over the pixels of a map, without position embeddings; residual."""

    def __init__(self, width: int, norm_groups: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.group_norm = group_norm(norm_groups, width, eps)
        self.to_q = nn.Linear(width, width)
        self.to_k = nn.Linear(width, width)
        self.to_v = nn.Linear(width, width)
        self.to_out = nn.Sequential(nn.Linear(width, width))  # in a list only for its name, to_out.0

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of (M, C, h, w); the shape stays."""
        return x + self.attend(x)

    def attend(self, x: Tensor) -> Tensor:
        """Compute what attention adds to (M, C, h, w)."""
        pixels = rearrange(self.group_norm(x), "m c h w -> m 1 (h w) c")
        y = F.scaled_dot_product_attention(self.to_q(pixels), self.to_k(pixels), self.to_v(pixels))
        return rearrange(self.to_out(y), "m 1 (h w) c -> m c h w", h=x.shape[2])


class Middle(nn.Module):
    """Residual block ─ optional attention ─ residual block, at the lowest resolution."""

    def __init__(self, width: int, norm_groups: int, attention: bool) -> None:
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(width, width, norm_groups) for _ in range(2))
        self.attentions = nn.ModuleList([PixelAttention(width, norm_groups)] if attention else [])

    def forward(self, x: Tensor) -> Tensor:
        """Transform (M, C, h, w); the shape stays."""
        first, last = self.resnets
        x = first(x)
        for attention in self.attentions:
            x = attention(x)
        return last(x)


class DownLevel(nn.Module):
    """Residual blocks, then downsampling by 2 unless it is the last level."""

    def __init__(self, width_in: int, width_out: int, blocks: int, norm_groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = _stack_blocks(width_in, width_out, blocks, norm_groups)
        self.downsamplers = nn.ModuleList([] if last else [Downsample(width_out)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform (M, width_in, h, w) → (M, width_out, h/2, w/2)."""
        for layer in [*self.resnets, *self.downsamplers]:
            x = layer(x)
        return x


class UpLevel(nn.Module):
    """Residual blocks, then upsampling by 2 unless it is the last level."""

    def __init__(self, width_in: int, width_out: int, blocks: int, norm_groups: int, last: bool) -> None:
        super().__init__()
        self.resnets = _stack_blocks(width_in, width_out, blocks, norm_groups)
        self.upsamplers = nn.ModuleList([] if last else [Upsample(width_out)])

    def forward(self, x: Tensor) -> Tensor:
        """Transform (M, width_in, h, w) → (M, width_out, 2h, 2w)."""
        for layer in [*self.resnets, *self.upsamplers]:
            x = layer(x)
        return x


class EncoderLayers(Recomputing):
    """The layers of an encoder: `conv_in`, `down_blocks` (run by the subclass), `head`.

    Args:
        channels: Width of each level, highest resolution first.
        out_channels: Width of the output.
        blocks: Residual blocks per level.
        norm_groups: Groups of each group norm.
        attention: Add attention to the middle.
        activation_checkpointing: Recompute each level that goes through `run` in the backward pass.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        blocks: int,
        norm_groups: int,
        attention: bool,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = nn.Conv2d(3, channels[0], 3, padding=1)
        widths = [channels[0], *channels]
        self.down_blocks = nn.ModuleList(
            DownLevel(widths[i], widths[i + 1], blocks, norm_groups, last=i == len(channels) - 1)
            for i in range(len(channels))
        )
        self.mid_block = Middle(channels[-1], norm_groups, attention)
        self.conv_norm_out = group_norm(norm_groups, channels[-1])
        self.conv_out = nn.Conv2d(channels[-1], out_channels, 3, padding=1)

    def head(self, x: Tensor) -> Tensor:
        """Map the last level's output (M, C, h, w) → (M, out_channels, h, w)."""
        x = self.run(self.mid_block, x)
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Encoder(EncoderLayers):
    """Encoder from frames to a feature map."""

    def forward(self, frames: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Encode (M, 3, H, W) → (M, out_channels, h, w); also return the output of each level."""
        x = self.conv_in(frames)
        levels = []
        for level in self.down_blocks:
            x = self.run(level, x)
            levels.append(x)
        return self.head(x), levels


class DecoderLayers(Recomputing):
    """The layers of a decoder: `stem`, `up_blocks` (run by the subclass), `head`.

    Args:
        channels: Width of each level, highest resolution first, as for the encoder.
        in_channels: Width of the input.
        blocks: Residual blocks per level; VQGAN has one more than in its encoder.
        norm_groups: Groups of each group norm.
        attention: Add attention to the middle.
        activation_checkpointing: Recompute each level that goes through `run` in the backward pass.
    """

    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int,
        blocks: int,
        norm_groups: int,
        attention: bool,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = nn.Conv2d(in_channels, channels[-1], 3, padding=1)
        self.mid_block = Middle(channels[-1], norm_groups, attention)
        widths = [channels[-1], *reversed(channels)]
        self.up_blocks = nn.ModuleList(
            UpLevel(widths[i], widths[i + 1], blocks, norm_groups, last=i == len(channels) - 1)
            for i in range(len(channels))
        )
        self.conv_norm_out = group_norm(norm_groups, channels[0])
        self.conv_out = nn.Conv2d(channels[0], 3, 3, padding=1)

    def stem(self, z: Tensor) -> Tensor:
        """Map (M, in_channels, h, w) → the middle's output (M, C, h, w)."""
        return self.run(self.mid_block, self.conv_in(z))

    def head(self, x: Tensor) -> Tensor:
        """Map the last level's output (M, C, H, W) → (M, 3, H, W)."""
        return self.conv_out(F.silu(self.conv_norm_out(x)))


class Decoder(DecoderLayers):
    """Decoder from a feature map to frames, without a bound on their values."""

    def forward(self, z: Tensor) -> tuple[Tensor, list[Tensor]]:
        """Decode (M, in_channels, h, w) → (M, 3, H, W); also return the output of the middle and of each level."""
        x = self.stem(z)
        levels = [x]
        for level in self.up_blocks:
            x = self.run(level, x)
            levels.append(x)
        return self.head(x), levels


def group_norm(groups: int, width: int, eps: float = 1e-6) -> nn.GroupNorm:
    """Build a group norm, with VQGAN's epsilon by default; raise `UserError` if `groups` does not divide `width`."""
    if width % groups:
        raise UserError(f"Expected widths that are multiples of norm_groups, got {width} and {groups}.")
    return nn.GroupNorm(groups, width, eps=eps)


def _stack_blocks(width_in: int, width_out: int, blocks: int, norm_groups: int) -> nn.ModuleList:
    return nn.ModuleList(
        ResidualBlock(width_in if i == 0 else width_out, width_out, norm_groups) for i in range(blocks)
    )
