"""Agreement of the ranks on whether a loss or a gradient is finite, and what is not."""

from collections.abc import Callable

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn


def find_reason(strategy: Strategy, value: Tensor, explain: Callable[[], tuple[str, str]]) -> str | None:
    """Return None if `value` is finite on all ranks; else why it is not on this one ("" if another rank broke).

    `explain` says what is not finite of this rank's own, and of what the ranks have computed together. All ranks must
    call it together.
    """
    bad, any_rank = not bool(torch.isfinite(value)), strategy.reduce_boolean_decision
    if not any_rank(bad, all=False):
        return None
    own, shared = explain() if bad else ("", "")
    return own if any_rank(bool(own), all=False) else shared


def bad_terms(terms: dict[str, Tensor]) -> tuple[str, str]:
    """Name the terms of a loss that are not finite: of the rank's own clips, and those that other ranks share in."""
    bad = [f"{name} is {float(value.detach()):g}" for name, value in terms.items() if not value.isfinite()]
    shared = [text for text in bad if text.startswith(("total", "adaptive_weight", "lecam"))]
    own = [text for text in bad if text not in shared]
    return f"loss: {', '.join(own)}" if own else "", f"loss: {', '.join(shared)}"


def bad_gradients(module: nn.Module) -> str:
    """Name the parameters whose gradients are not finite."""
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"gradient of {', '.join(bad[:3])}{more} is not finite" if bad else "the gradient's norm is not finite"
