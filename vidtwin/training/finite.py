"""Find losses and gradients that are not finite on any rank."""

from collections.abc import Callable

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn


def find_reason(strategy: Strategy, value: Tensor, explain: Callable[[], tuple[str, str]]) -> str | None:
    """Return None if `value` is finite on all ranks; else this rank's reason ("" if another rank is the cause).

    `explain` returns the reason in this rank's own values, and that in values that the ranks share. All ranks must call
    this function together.
    """
    bad, any_rank = not bool(torch.isfinite(value)), strategy.reduce_boolean_decision
    if not any_rank(bad, all=False):
        return None
    own, shared = explain() if bad else ("", "")
    return own if any_rank(bool(own), all=False) else shared


def bad_terms(terms: dict[str, Tensor]) -> tuple[str, str]:
    """Name the non-finite terms of a loss: those of the rank's own clips, and those that depend on other ranks."""
    bad = [f"{name} is {float(value.detach()):g}" for name, value in terms.items() if not value.isfinite()]
    shared = [text for text in bad if text.startswith(("total", "adaptive_weight", "lecam"))]
    own = [text for text in bad if text not in shared]
    return f"loss: {', '.join(own)}" if own else "", f"loss: {', '.join(shared)}"


def bad_gradients(module: nn.Module) -> str:
    """Name the parameters whose gradients are not finite."""
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"gradient of {', '.join(bad[:3])}{more} is not finite" if bad else "the gradient's norm is not finite"
