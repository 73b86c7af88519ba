"""The diffusion transformer on the latents of any autoencoder (VidTwin, supplement D.3).

    latents ── tokens + place + kind of latent ── depth × block ── norm, linear ──> as many numbers

    block    x += gate · attention (norm(x))         modulated by the time (adaLN-Zero: DiT, Peebles and Xie 2023)
             x += cross-attention to the class vector (norm(x))
             x += gate · MLP (norm(x))               modulated by the time

D.3 gives 18 layers of width 1,152 and a class vector of 256 numbers, attended to. With one vector to attend to, each
token gets the same projection of it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from timm.layers import Attention, Mlp
from torch import Tensor, nn
from torch.nn import functional as F

from vidtwin.diffusion.tokens import LatentShapes, LatentTokens, grid_positions
from vidtwin.errors import UserError
from vidtwin.layers.attention import CrossAttention
from vidtwin.layers.patches import sincos_1d
from vidtwin.layers.recompute import Recomputing

_TIME = 256  # sines and cosines of a time


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of a `DiT`.

    Args:
        depth: Number of blocks.
        width: Numbers of a token, divisible by `heads`.
        heads: Attention heads.
        class_width: Numbers of the class vector.
        mlp_ratio: Width of the MLP, relative to that of a token.
        patch: Side of the patches of latents that are a token each; larger ones are fewer tokens and coarser.
        activation_checkpointing: Rerun each block in the backward pass instead of keeping its activations.
    """

    depth: int = 18
    width: int = 1152
    heads: int = 16
    class_width: int = 256
    mlp_ratio: float = 4.0
    patch: int = 2
    activation_checkpointing: bool = False

    def __post_init__(self) -> None:
        for name in ("depth", "width", "heads", "class_width", "mlp_ratio", "patch"):
            if not 0 < getattr(self, name) < math.inf:
                raise UserError(f"Expected model.transformer.{name} above 0, got {getattr(self, name)}.")
        if self.width % self.heads or self.width % 2:
            raise UserError(
                f"Expected an even model.transformer.width divisible by heads, got {self.width} and {self.heads}."
            )


class DiT(Recomputing):
    """A transformer that maps noisy latents, a time and a class to latents.

    Args:
        latent_shapes: Shapes by name, without batch axis.
        num_classes: Number of classes; label `num_classes` stands for no condition.
        sizes: Depth, widths, heads.
    """

    positions: Tensor

    def __init__(self, latent_shapes: LatentShapes, num_classes: int, sizes: TransformerSizes | None = None) -> None:
        sizes = sizes or TransformerSizes()
        super().__init__(sizes.activation_checkpointing)
        width = sizes.width
        self.num_classes = num_classes
        self.tokens = LatentTokens(latent_shapes, width, sizes.patch)
        self.register_buffer("positions", grid_positions(latent_shapes, width, sizes.patch), persistent=False)
        self.kinds = nn.Parameter(torch.randn(len(self.tokens.counts), width) * 0.02)
        self.time = nn.Sequential(nn.Linear(_TIME, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.classes = nn.Embedding(num_classes + 1, sizes.class_width)
        hidden = int(sizes.mlp_ratio * width)
        self.blocks = nn.ModuleList(DiTBlock(width, sizes.heads, sizes.class_width, hidden) for _ in range(sizes.depth))
        self.modulation = _zeros(nn.Linear(width, 2 * width))
        for head in self.tokens.heads:
            _zeros(head)

    def forward(self, latents: Mapping[str, Tensor], times: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Map latents by name, each (B, C, ...), at times (B,) from 0 to 1,000 with labels int64 (B,) to latents."""
        counts = self.tokens.counts.values()
        kinds = [kind.expand(count, -1) for kind, count in zip(self.kinds, counts, strict=True)]
        x = self.tokens.embed(latents) + self.positions + torch.cat(kinds)
        time = self.time(sincos_1d(_TIME, times).to(x.dtype))
        context = self.classes(labels)[:, None]
        for block in self.blocks:
            x = self.run(block, x, time, context)
        shift, scale = self.modulation(time)[:, None].chunk(2, dim=-1)
        return self.tokens.restore(modulated(x, shift, scale))


class DiTBlock(nn.Module):
    """Self-attention, cross-attention to a context, MLP; it changes nothing before it is trained."""

    def __init__(self, width: int, heads: int, context_width: int, hidden: int) -> None:
        super().__init__()
        self.attention = Attention(width, heads, qkv_bias=True, qk_norm=True, norm_layer=nn.RMSNorm)
        self.cross_norm = nn.LayerNorm(width, eps=1e-6)
        self.cross_attention = CrossAttention(width, context_width, heads)
        gelu: Any = partial(nn.GELU, approximate="tanh")
        self.mlp = Mlp(width, hidden, act_layer=gelu)
        self.modulation = _zeros(nn.Linear(width, 6 * width))
        _zeros(self.cross_attention.proj)

    def forward(self, x: Tensor, time: Tensor, context: Tensor) -> Tensor:
        """Transform tokens (B, N, C) by a time (B, C) and a context (B, M, D)."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation(time)[:, None].chunk(6, dim=-1)
        x = x + gate * self.attention(modulated(x, shift, scale))
        x = x + self.cross_attention(self.cross_norm(x), context)
        return x + gate_mlp * self.mlp(modulated(x, shift_mlp, scale_mlp))


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm to tokens (B, N, C), then · (1 + scale) + shift, each (B, 1, C)."""
    return F.layer_norm(x, x.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _zeros(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
