"""Gradients against differences of forward passes, for functions whose values another test has verified."""

from collections.abc import Callable, Sequence

import pytest
import torch
from torch import Tensor


def check_gradients(loss: Callable[[], Tensor], leaves: Sequence[Tensor], step: float = 1e-6) -> None:
    """Compare the gradient along a random direction of all `leaves`, in float64, to a relative 1e-6."""
    gradients = torch.autograd.grad(loss(), leaves)
    generator = torch.Generator().manual_seed(0)
    directions = [torch.randn(leaf.shape, generator=generator, dtype=torch.float64) for leaf in leaves]
    along = sum((gradient * way).sum() for gradient, way in zip(gradients, directions, strict=True))

    @torch.no_grad()
    def moved(distance: float) -> Tensor:
        for leaf, way in zip(leaves, directions, strict=True):
            leaf += distance * way
        value = loss()
        for leaf, way in zip(leaves, directions, strict=True):
            leaf -= distance * way
        return value

    # Central differences, from which the error of order step² is removed.
    first, second = ((moved(k * step) - moved(-k * step)) / (2 * k * step) for k in (1, 2))
    assert float((4 * first - second) / 3) == pytest.approx(float(along), rel=1e-6)
