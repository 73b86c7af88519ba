"""The running average of a model's weights, which reconstructs better than the last step's and does not flicker."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.training.sharding import like, local


class WeightAverage:
    """Exponential moving average of the trainable parameters: after step n (from 1) a ← d·a + (1 − d)·w,

        d = min(decay, (1 + n) / (10 + n)),

    so that a short run, or the start of a long one, does not drag its initial values along (the warm-up of TensorFlow's
    ExponentialMovingAverage and of latent diffusion's). Buffers and frozen parameters are the model's own.

    Args:
        model: Gives the first values.
        decay: d in the long run, in (0, 1); 0.999 looks back about 1,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"Expected model.ema_decay between 0 and 1, or null for no average, got {decay}.")
        self.decay = decay
        self.updates = 0
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights after a step."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(model.named_parameters())
        average = get_ema_multi_avg_fn(decay)
        ours = [local(value) for value in self.values.values()]
        average(ours, [local(current[name].detach()) for name in self.values], self.updates)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Swap the model's weights and the average; a second call swaps them back."""
        current = dict(model.named_parameters())
        for name, average in self.values.items():
            kept = current[name].detach().clone()
            current[name].copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """`{"updates": int, "values": {name: Tensor}}`; the decay is the config's."""
        return {"updates": self.updates, "values": dict(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        values: dict[str, Tensor] = state["values"]
        weights.check_fit(values, self.values, "The checkpoint's weight average")
        for name, average in self.values.items():
            average.copy_(like(values[name], average))
        self.updates = state["updates"]
