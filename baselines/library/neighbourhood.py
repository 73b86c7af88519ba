"""Neighbourhood attention in three dimensions (Hassani et al., arXiv 2204.07143) by torch alone.

The kernels of NATTEN need a GPU and a download; torch's FlexAttention holds every score unless it is compiled, and has
no gradient on a CPU. Here queries are taken by tiles, each with the keys that one of its queries sees.
"""

from itertools import product
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

TILE = (4, 8, 8)


def attend_to_neighbours(query: Tensor, key: Tensor, value: Tensor, kernel: tuple[int, int, int]) -> Tensor:
    """Attend from each place to the `kernel` of places around it, without scaling the scores.

    At a border the window is moved inwards, so that each has the same number of places.

    Args:
        query: (B, T, H, W, heads, D).
        key: As `query`.
        value: As `query`.
        kernel: Places of the window along T, H and W; at most as many as there are.

    Returns:
        (B, T, H, W, heads, D).
    """
    windows = [
        _list_windows(size, tile, span, query.device)
        for size, tile, span in zip(query.shape[1:4], TILE, kernel, strict=True)
    ]
    tiles = []
    for (own_t, near_t, seen_t), (own_h, near_h, seen_h), (own_w, near_w, seen_w) in product(*windows):
        queries = query[:, own_t, own_h, own_w]
        places = _list_places(queries)
        near_keys, near_values = (_list_places(x[:, near_t, near_h, near_w]) for x in (key, value))
        seen = (
            seen_t[:, None, None, :, None, None]
            & seen_h[None, :, None, None, :, None]
            & seen_w[None, None, :, None, None, :]
        ).reshape(places.shape[2], near_keys.shape[2])
        attended = F.scaled_dot_product_attention(places, near_keys, near_values, seen, scale=1.0)
        tiles.append(attended.transpose(1, 2).unflatten(1, queries.shape[1:4]))
    _, high, wide = map(len, windows)
    rows = [torch.cat(tiles[first : first + wide], dim=3) for first in range(0, len(tiles), wide)]
    slabs = [torch.cat(rows[first : first + high], dim=2) for first in range(0, len(rows), high)]
    return torch.cat(slabs, dim=1)


def _list_windows(size: int, tile: int, span: int, device: torch.device) -> list[tuple[slice, slice, Tensor]]:
    """List each tile's queries along an axis, the keys that any of them sees, and which of these it sees (q, k)."""
    windows = []
    for start in range(0, size, tile):
        stop = min(start + tile, size)
        low, high = (min(max(place - span // 2, 0), size - span) for place in (start, stop - 1))
        first = (torch.arange(start, stop, device=device) - span // 2).clamp(0, size - span)[:, None]
        keys = torch.arange(low, high + span, device=device)
        windows.append((slice(start, stop), slice(low, high + span), (keys >= first) & (keys < first + span)))
    return windows


def _list_places(x: Tensor) -> Tensor:
    """Rearrange (B, t, h, w, heads, D) to (B, heads, t·h·w, D)."""
    return x.flatten(1, 3).transpose(1, 2)


class NeighbourhoodProcessor:
    """Attention processor of diffusers' `LTX2VideoVaeNeighborhoodAttention`."""

    def __call__(self, attention: Any, features: Tensor, block_mask: None = None) -> Tensor:
        """Attend over features (B, T, H, W, C) → (B, T, H, W, C)."""
        query, key, value = attention.project_qkv(features)
        attended = attend_to_neighbours(query, key, value, attention.kernel_size)
        output: Tensor = attention.to_out[0](attended.flatten(-2))
        return output
