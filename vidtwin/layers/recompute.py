"""Activation checkpointing: rerun layers in the backward pass instead of keeping their activations."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

# Products and attention of every device, whose results "elementwise" keeps.
_PRODUCTS = ("mm", "addmm", "bmm", "baddbmm", "convolution", "_scaled_dot_product_")


class Recomputing(nn.Module):
    """Base class of sequential networks whose layers go through `run`.

    Args:
        activation_checkpointing: Keep only a layer's inputs, and rerun it in the backward pass. "elementwise" keeps the
            results of its products and attentions too, and reruns only norms, activations, sums and conversions; in a
            compiled layer torch.compile chooses what to rerun. Not for attentions with dropout: what is drawn after
            them would be drawn differently in the rerun.
    """

    def __init__(self, activation_checkpointing: bool | Literal["elementwise"]) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing

    def run(self, layer: Callable[..., Tensor], *inputs: Tensor | None) -> Tensor:
        """Run `layer(*inputs)`; a rerun in the backward pass draws the same dropout."""
        selective = self.activation_checkpointing == "elementwise"
        if not (self.activation_checkpointing and torch.is_grad_enabled()) or (
            selective and torch.compiler.is_compiling()
        ):
            return layer(*inputs)
        chosen: dict[str, Any] = (
            {"context_fn": partial(create_selective_checkpoint_contexts, _keep_products)} if selective else {}
        )
        output: Tensor = checkpoint(layer, *inputs, use_reentrant=False, **chosen)
        return output

    def run_all(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Run layers in sequence."""
        for layer in layers:
            x = self.run(layer, x)
        return x


def _keep_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    name = operation.name().removeprefix("aten::").partition(".")[0]
    kept = name.startswith(_PRODUCTS)
    return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE
