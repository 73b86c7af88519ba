"""Find losses and gradients that are not finite on any rank."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from lightning.pytorch.strategies import Strategy
from torch import Tensor, nn


def agree(values: Sequence[Tensor], stop: bool) -> tuple[bool, bool]:
    """Return whether all scalars in `values` are finite on all ranks, and whether `stop` is true on any.

    All ranks must call this function together. The host waits for the device once.
    """
    bad = torch.stack([value.detach().float() for value in values]).isfinite().all().logical_not().float()
    flags = torch.stack([bad, torch.full_like(bad, float(stop))])
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(flags, op=dist.ReduceOp.MAX)
    code = int(flags[0] + 2 * flags[1])
    return code % 2 == 0, code >= 2


def find_reason(strategy: Strategy, found: Sequence[tuple[str, str]]) -> str:
    """Return this rank's reason to skip a step: of values of its own if any rank has such values, else of shared ones.

    All ranks must call this function together.

    Args:
        strategy: Of the trainer.
        found: Reasons in this rank's own values and in those that the ranks share; the first pair with a text counts.
    """
    own, shared = next((pair for pair in found if any(pair)), ("", ""))
    return own if strategy.reduce_boolean_decision(bool(own), all=False) else shared


def bad_terms(terms: dict[str, Tensor]) -> tuple[str, str]:
    """Name the non-finite terms of a loss: those of the rank's own clips, and those that depend on other ranks."""
    bad = [f"{name} is {float(value.detach()):g}" for name, value in terms.items() if not value.isfinite()]
    shared = [text for text in bad if text.startswith(("total", "adaptive_weight", "lecam"))]
    own = [text for text in bad if text not in shared]
    own_text, shared_text = (f"loss: {', '.join(part)}" if part else "" for part in (own, shared))
    return own_text, shared_text


def bad_gradients(module: nn.Module) -> str:
    """Name the parameters whose gradients are not finite."""
    bad = [name for name, p in module.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
    more = f" and {len(bad) - 3} more" if len(bad) > 3 else ""
    return f"gradient of {', '.join(bad[:3])}{more} is not finite" if bad else "the gradient's norm is not finite"
