"""VidTwin's spatial-temporal transformer: the encoder from pixels to features, the decoder from features to pixels.

    encoder   clip (B, 3, T, H, W) ─ patches ─ linear ─ + position ─ depth × block ─> features (B, T, S, C)
    decoder   features (B, T, S, C)                   ─ + position ─ depth × block ─ norm, linear ─> clip

    block     x += gate · attention over S (norm(x))
              x += gate · causal attention over T (x)          the raw residual: neither norm nor modulation
              x += gate · MLP (norm(x))

Paper D.1; sizes as in the released code. T frames, S = (H/p)·(W/p) patches, C = hidden_size.
"""

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidtwin.errors import UserError
from vidtwin.layers.attention import SelfAttention
from vidtwin.layers.patches import patchify, sincos_1d, sincos_2d, unpatchify
from vidtwin.layers.recompute import Recomputing

_CACHED = 2**23  # bytes of an MLP's hidden values at a time


def modulated_norm(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply LayerNorm without learned affine to (..., C), then · (1 + scale) + shift, both (C,)."""
    # In the type of x: FSDP2 may gather weights in bfloat16.
    return F.layer_norm(x, x.shape[-1:], weight=(1 + scale).to(x.dtype), bias=shift.to(x.dtype), eps=1e-6)


def add_gated(x: Tensor, gate: Tensor, y: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute x + gate · y for (..., C) and a gate (C,), in `out` if it is given; in one pass if types are equal."""
    if x.dtype == gate.dtype == y.dtype:
        return torch.addcmul(x, gate, y, out=out)
    return torch.add(x, gate * y, out=out)


class SpatialTemporalBlock(Recomputing):
    """Attention within each frame, causal attention over time at each position, MLP.

    `modulation` (6, C) is learned: shift, scale and gate of the attentions (one gate for both), then of the MLP.
    `activation_checkpointing` "mlp" recomputes the MLP in the backward pass, "elementwise" all but products and
    attentions.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, activation_checkpointing: Literal[False, "mlp", "elementwise"] = False
    ) -> None:
        super().__init__(True if activation_checkpointing == "mlp" else activation_checkpointing)
        self.modulation = nn.Parameter(torch.randn(6, hidden_size) / hidden_size**0.5)
        self.spatial_attention = SelfAttention(hidden_size, num_heads)
        self.temporal_attention = SelfAttention(hidden_size, num_heads, causal=True)
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size),
            nn.GELU(approximate="tanh"),
            nn.Linear(4 * hidden_size, hidden_size),
        )

    def forward(self, x: Tensor, temporal_embedding: Tensor | None = None) -> Tensor:
        """Transform (B, T, S, C); `temporal_embedding` (T, 1, C) only enters the temporal attention."""
        if self.activation_checkpointing == "elementwise":
            return self.run(self._transform, x, temporal_embedding)
        return self._transform(x, temporal_embedding)

    def _transform(self, x: Tensor, temporal_embedding: Tensor | None) -> Tensor:
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.modulation
        x = add_gated(x, gate, self.spatial_attention(modulated_norm(x, shift, scale)))
        over_time = x if temporal_embedding is None else x + temporal_embedding
        # Contiguous, so that its linear layer adds the bias in the product.
        x = add_gated(x, gate, self.temporal_attention(over_time.transpose(1, 2).contiguous()).transpose(1, 2))
        if not self._takes_few_frames(x):
            normed = modulated_norm(x, shift_mlp, scale_mlp)
            hidden = self.run(self.mlp, normed) if self.activation_checkpointing is True else self.mlp(normed)
            return add_gated(x, gate_mlp, hidden)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)  # x may be transposed
        frames = max(1, _CACHED // (x.shape[2] * 4 * x.shape[3] * x.element_size()))
        for part, out in zip(x.flatten(0, 1).split(frames), result.flatten(0, 1).split(frames), strict=True):
            add_gated(part, gate_mlp, self.mlp(modulated_norm(part, shift_mlp, scale_mlp)), out)
        return result

    def _takes_few_frames(self, x: Tensor) -> bool:
        """Return whether the MLP takes a few frames at a time, so that its hidden values stay in a CPU's caches."""
        if not x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return False
        return not torch.is_autocast_enabled("cpu")  # which would convert the weights for each part


class SpatialTemporalTransformer(Recomputing):
    """Position embeddings and `depth` blocks over a grid of T frames and `grid_size`² patches.

    `activation_checkpointing` recomputes each block in the backward pass, or what `SpatialTemporalBlock` says.
    """

    position: Tensor
    time: Tensor

    def __init__(
        self,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_frames: int,
        grid_size: int,
        activation_checkpointing: bool | Literal["mlp", "elementwise"] = False,
    ) -> None:
        super().__init__(activation_checkpointing is True)
        if hidden_size % 4:
            raise UserError(f"Expected hidden_size divisible by 4 (two axes of sine and cosine), got {hidden_size}.")
        within = False if activation_checkpointing is True else activation_checkpointing
        self.blocks = nn.ModuleList(SpatialTemporalBlock(hidden_size, num_heads, within) for _ in range(depth))
        position = sincos_2d(hidden_size, grid_size, grid_size)
        time = sincos_1d(hidden_size, torch.arange(num_frames))[:, None]
        self.register_buffer("position", position.float(), persistent=False)
        self.register_buffer("time", time.float(), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, S, C); return the residual stream after the last block, without a final norm."""
        x = x + self.position
        for index, block in enumerate(self.blocks):
            x = self.run(block, x, self.time if index == 0 else None)
        return x


class Encoder(nn.Module):
    """Encoder from a clip (B, 3, T, H, W) to features (B, T, S, C)."""

    def __init__(self, patch_size: int, transformer: SpatialTemporalTransformer, hidden_size: int) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.patch_embed = nn.Linear(3 * patch_size**2, hidden_size)
        self.transformer = transformer

    def forward(self, clip: Tensor) -> Tensor:
        return self.transformer(self.patch_embed(patchify(clip, self.patch_size)))


class Decoder(nn.Module):
    """Decoder from features (B, T, S, C) to a clip (B, 3, T, H, W)."""

    def __init__(
        self, patch_size: int, transformer: SpatialTemporalTransformer, hidden_size: int, grid_size: int
    ) -> None:
        super().__init__()
        self.patch_size = patch_size
        self.grid_size = grid_size
        self.transformer = transformer
        self.modulation = nn.Parameter(torch.randn(2, hidden_size) / hidden_size**0.5)  # shift, scale
        self.linear = nn.Linear(hidden_size, 3 * patch_size**2)

    def forward(self, features: Tensor) -> Tensor:
        x = self.transformer(features)
        return unpatchify(self.linear(modulated_norm(x, *self.modulation)), self.patch_size, self.grid_size)
