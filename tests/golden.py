"""Tensors of released implementations: how far off numbers are, and what modules give on the way."""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn


def largest_error(actual: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest number expected."""
    actual, expected = actual.detach().double(), expected.detach().double()
    return float((actual - expected).abs().max() / expected.abs().max())


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Draw numbers between -1 and 1, in double precision."""
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) * 2 - 1


def weights_of(golden: dict[str, Tensor]) -> dict[str, Tensor]:
    """Select the released weights among golden tensors."""
    return {name.removeprefix("sd."): tensor for name, tensor in golden.items() if name.startswith("sd.")}


def read_keys(path: Path) -> dict[str, list[int]]:
    """Read the names and shapes of a released model's tensors."""
    rows = (line.split("\t") for line in path.read_text().splitlines() if not line.startswith("#"))
    return {name: json.loads(shape) for name, shape, *_ in rows}


@contextmanager
def watch(model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Collect what modules give."""
    seen: dict[str, Tensor] = {}
    hooks = [
        model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: seen.update({name: output}))
        for name in names
    ]
    yield seen
    for hook in hooks:
        hook.remove()
