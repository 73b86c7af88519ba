"""The latents of any autoencoder as one sequence of tokens, and back.

    each latent ── patches of 2 on every axis but the first ── Linear ──> its tokens ┐
                                                                                     ├─> one sequence
    another     ── patches                                  ── Linear ──> its tokens ┘

An odd axis is padded by a zero; a latent that is a vector is one token. The DiT that generates and the one of appendix
C.2, whose cost is measured, share this code; the side of the patches is an argument.
"""

import math
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vidtwin.errors import UserError
from vidtwin.layers.patches import sincos_1d

PATCH = 2

LatentShapes = Mapping[str, Sequence[int]]


class LatentTokens(nn.Module):
    """Linear layers between the latents of a clip and one sequence of tokens.

    Args:
        latent_shapes: Shapes by name, see `VideoAutoencoder.latent_shapes`.
        width: Numbers of a token.
        patch: Side of the patches.

    Attributes:
        counts: Number of tokens by latent.
    """

    def __init__(self, latent_shapes: LatentShapes, width: int, patch: int = PATCH) -> None:
        super().__init__()
        self.latent_shapes = {name: tuple(shape) for name, shape in latent_shapes.items()}
        self.patch = patch
        self.counts = count_tokens(latent_shapes, patch)
        sizes = [shape[0] * patch ** len(shape[1:]) for shape in self.latent_shapes.values()]
        # In lists, since a latent's name may be no name of a module.
        self.embeddings = nn.ModuleList(nn.Linear(size, width) for size in sizes)
        self.heads = nn.ModuleList(nn.Linear(width, size) for size in sizes)

    @property
    def total(self) -> int:
        """Number of tokens of all latents."""
        return sum(self.counts.values())

    def embed(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Map latents by name, each (B, C, ...), to tokens (B, N, width)."""
        parts = [fold(latents[name], self.patch) for name in self.latent_shapes]
        return torch.cat([embed(part) for embed, part in zip(self.embeddings, parts, strict=True)], dim=1)

    def restore(self, tokens: Tensor) -> dict[str, Tensor]:
        """Map tokens (B, N, width) to latents by name, each (B, C, ...)."""
        parts = tokens.split(list(self.counts.values()), dim=1)
        return {
            name: unfold(head(part), shape, self.patch)
            for (name, shape), head, part in zip(self.latent_shapes.items(), self.heads, parts, strict=True)
        }


def count_tokens(latent_shapes: LatentShapes, patch: int = PATCH) -> dict[str, int]:
    """Count each latent's tokens: patches on every axis but the first, padded to whole ones; a vector is one."""
    for name, shape in latent_shapes.items():
        if not shape or any(size < 1 for size in shape):
            raise UserError(f"Expected a latent of shape (channels, ...), got {name} of {tuple(shape)}.")
    if not latent_shapes:
        raise UserError("Expected at least one latent, got none.")
    return {name: math.prod(_grid(shape, patch)) for name, shape in latent_shapes.items()}


def count_numbers(latent_shapes: LatentShapes) -> int:
    """Count the numbers in all latents of a clip."""
    return sum(math.prod(shape) for shape in latent_shapes.values())


def flatten(latents: Mapping[str, Tensor], latent_shapes: LatentShapes) -> Tensor:
    """Join latents by name, each (B, C, ...), in the order of their shapes to (B, numbers)."""
    return torch.cat([latents[name].flatten(1) for name in latent_shapes], dim=1)


def split(flat: Tensor, latent_shapes: LatentShapes) -> dict[str, Tensor]:
    """Invert `flatten`: split (B, numbers) into latents by name, each (B, C, ...)."""
    parts = flat.split([math.prod(shape) for shape in latent_shapes.values()], dim=1)
    return {
        name: part.unflatten(1, tuple(shape)) for (name, shape), part in zip(latent_shapes.items(), parts, strict=True)
    }


def fold(latent: Tensor, patch: int = PATCH) -> Tensor:
    """Fold a latent (B, C, A1, ..., Ak) to patches (B, N, C·patch^k); axes are padded by zeros to multiples."""
    axes = latent.ndim - 2
    padding = [(0, -size % patch) for size in reversed(latent.shape[2:])]
    latent = F.pad(latent, tuple(chain.from_iterable(padding)))
    for axis in range(axes):
        latent = latent.unflatten(2 + 2 * axis, (-1, patch))  # (B, C, A1/p, p, ..., Ak/p, p)
    places, inside = range(2, 2 + 2 * axes, 2), range(3, 2 + 2 * axes, 2)
    latent = latent.permute(0, *places, 1, *inside)
    return latent.reshape(len(latent), math.prod(latent.shape[1 : 1 + axes]), -1)


def unfold(patches: Tensor, shape: Sequence[int], patch: int = PATCH) -> Tensor:
    """Unfold patches (B, N, C·patch^k) to the latent (B, *shape) that they were cut from."""
    axes = len(shape) - 1
    grid = _grid(shape, patch)
    latent = patches.reshape(len(patches), *grid, shape[0], *[patch] * axes)
    pairs = chain.from_iterable((1 + axis, 2 + axes + axis) for axis in range(axes))
    latent = latent.permute(0, 1 + axes, *pairs)
    latent = latent.reshape(len(patches), shape[0], *(patch * size for size in grid))
    return latent[(slice(None), slice(None), *(slice(size) for size in shape[1:]))]


def grid_positions(latent_shapes: LatentShapes, width: int, patch: int = PATCH) -> Tensor:
    """Embed each token's place in its latent's grid: (N, width) float32, an equal share of the channels for each axis.

    Each axis has sines and cosines of its coordinate, in patches; channels that remain are 0, and so are those of a
    vector's one token.
    """
    found = []
    for shape in latent_shapes.values():
        grid = _grid(shape, patch)
        place = torch.zeros(math.prod(grid), width, dtype=torch.float64)
        if grid:
            share = width // (2 * len(grid)) * 2
            axes = torch.meshgrid(*(torch.arange(size) for size in grid), indexing="ij")
            place[:, : share * len(grid)] = torch.cat([sincos_1d(share, axis.flatten()) for axis in axes], dim=1)
        found.append(place)
    return torch.cat(found).float()


def _grid(shape: Sequence[int], patch: int) -> list[int]:
    """Return the number of patches along each axis but the first."""
    return [-(-size // patch) for size in shape[1:]]
