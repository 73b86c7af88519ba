"""Layers that are run again in the backward pass, so that what they compute on the way need not be kept."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Recomputing(nn.Module):
    """What networks share that are a row of layers: `run` runs one of them.

    Args:
        activation_checkpointing: Keep only what goes into a layer, and run it again in the backward pass.
    """

    def __init__(self, activation_checkpointing: bool) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing

    def run(self, layer: nn.Module, *inputs: Tensor | None) -> Tensor:
        """`layer(*inputs)`, with the same dropout when it is run again."""
        if self.activation_checkpointing and torch.is_grad_enabled():
            output: Tensor = checkpoint(layer, *inputs, use_reentrant=False)
        else:
            output = layer(*inputs)
        return output
