"""Sampled latents of a model with codebooks, moved to the entries: no decoder was trained on vectors in between."""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.posteriors import Latents
from vidtwin.precision import full_precision

_DISTANCES = 1 << 24  # computed at a time


@torch.no_grad()
def snap(model: VideoAutoencoder, latents: Latents, clip_shape: Sequence[int]) -> Latents:
    """Replace each vector of the latents by the nearest entry of its codebook, by Euclidean distance.

    The entries are read through `dequantize`, so that any model with `code_shapes` will do; they equal those that
    `dequantize` returns for a clip's codes to the last bit. Latents without a codebook are returned as they are.

    Args:
        model: The autoencoder.
        latents: Latents by name, each (B, C, ...).
        clip_shape: (3, T, H, W) of a clip with such latents, without the padding of its pictures.
    """
    found = dict(latents)
    padded = [side + -side % model.spatial_multiple for side in clip_shape[2:]]
    for name, (shape, size) in model.code_shapes((*clip_shape[:2], *padded)).items():
        value = latents[name]
        # A code stands for a vector of all channels, or for one number.
        vectors = value.movedim(1, -1) if len(shape) == value.ndim - 2 else value[..., None]
        flat = vectors.reshape(-1, vectors.shape[-1]).float()
        codes = _nearest(flat, _entries(model, name, shape, size, max(_DISTANCES // len(flat), 1), value))
        found |= model.dequantize({name: codes.reshape(len(value), *shape)})
    return found


def _nearest(vectors: Tensor, blocks: Iterator[tuple[int, Tensor]]) -> Tensor:
    """Return for each vector (N, C) the number of the nearest entry: int64 (N,)."""
    best = vectors.new_full((len(vectors),), math.inf)
    codes = torch.zeros(len(vectors), dtype=torch.int64, device=vectors.device)
    for first, entries in blocks:
        # Without |vector|², which all entries share. In bfloat16 near entries would be as far as one another.
        with full_precision(vectors.device):
            distances = torch.addmm(entries.square().sum(1), vectors, entries.T, alpha=-2)
        least, place = distances.min(1)
        codes = torch.where(least < best, first + place, codes)
        best = torch.minimum(best, least)
    return codes


def _entries(
    model: VideoAutoencoder, name: str, shape: Sequence[int], size: int, block: int, like: Tensor
) -> Iterator[tuple[int, Tensor]]:
    """Yield the entries of a codebook, some at a time, as (number of the first, float32 (K, C)).

    Args:
        model: The autoencoder.
        name: The latent.
        shape: Shape of a clip's codes.
        size: Number of entries.
        block: Least number of entries at a time, rounded up to clips.
        like: A latent, for the device and the number of axes.
    """
    places = math.prod(shape)
    block = -(-min(block, size) // places) * places
    for first in range(0, size, block):
        numbers = torch.arange(first, first + block, device=like.device).clamp_max(size - 1)
        value = model.dequantize({name: numbers.reshape(-1, *shape)})[name]
        value = value.movedim(1, -1) if len(shape) == value.ndim - 2 else value[..., None]
        yield first, value.reshape(block, -1)[: size - first].float()
