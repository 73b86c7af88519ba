"""Activation checkpointing: rerun layers in the backward pass instead of keeping their activations."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """Base class of sequential networks whose layers go through `run`.

    Args:
        activation_checkpointing: Keep only a layer's inputs, and rerun it in the backward pass.
    """

    def __init__(self, activation_checkpointing: bool) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing

    def run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        """Run `layer(*inputs)`; a rerun in the backward pass draws the same dropout."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output

    def run_all(self, layers: Iterable[nn.Module], x: Tensor) -> Tensor:
        """Run layers in sequence."""
        for layer in layers:
            x = self.run(layer, x)
        return x
