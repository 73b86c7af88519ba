"""Conversion between clips and patch tokens, and fixed sine–cosine position embeddings."""

import torch
from einops import rearrange
from torch import Tensor


def patchify(clip: Tensor, patch_size: int) -> Tensor:
    """Split (B, C, T, H, W) into (B, T, S, C·p·p), S = (H/p)·(W/p) row by row; in a vector the channel runs slowest."""
    return rearrange(clip, "b c t (h p) (w q) -> b t (h w) (c p q)", p=patch_size, q=patch_size)


def unpatchify(patches: Tensor, patch_size: int, height: int) -> Tensor:
    """Join (B, T, S, p·p·C) into (B, C, T, height·p, W); in a patch vector the channel runs fastest."""
    return rearrange(patches, "b t (h w) (p q c) -> b c t (h p) (w q)", h=height, p=patch_size, q=patch_size)


def sincos_1d(size: int, positions: Tensor) -> Tensor:
    """Embed positions (N,) as [sin | cos] at `size / 2` frequencies 10000^(-i / (size / 2)): (N, size), float64."""
    frequencies = 10000.0 ** (-torch.arange(size // 2, dtype=torch.float64, device=positions.device) / (size / 2))
    angles = positions.to(torch.float64)[:, None] * frequencies
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def sincos_2d(size: int, height: int, width: int) -> Tensor:
    """Embed a grid as (height·width, size), float64: column in the first half of the channels, row in the second."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    return torch.cat([sincos_1d(size // 2, columns.flatten()), sincos_1d(size // 2, rows.flatten())], dim=1)
