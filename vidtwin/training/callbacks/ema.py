"""Average a model's weights over the steps; the average reconstructs better than the weights of the last step."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

from vidtwin import weights
from vidtwin.errors import UserError
from vidtwin.training.sharding import like, local, placement_of

if TYPE_CHECKING:
    from vidtwin.training.base import TrainingTask


class WeightAverage:
    """Exponential moving average of the trainable parameters: after step n (from 1) a ← d·a + (1 − d)·w,

        d = min(decay, (1 + n) / (10 + n)),

    so that a short run, or the start of a long one, forgets its initial values (the warm-up in TensorFlow's
    ExponentialMovingAverage and in latent diffusion). Buffers and frozen parameters are not averaged.

    Args:
        model: Its weights are the first values.
        decay: d after the warm-up, in (0, 1); 0.999 looks back about 1,000 steps.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise UserError(f"Expected model.ema_decay between 0 and 1, or null for no average, got {decay}.")
        self.decay = decay
        self.updates = 0
        self.values = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Add the weights after a step to the average."""
        self.updates += 1
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        current = dict(model.named_parameters())
        average = get_ema_multi_avg_fn(decay)
        ours = [local(value) for value in self.values.values()]
        average(ours, [local(current[name].detach()) for name in self.values], self.updates)

    @torch.no_grad()
    def exchange(self, model: nn.Module) -> None:
        """Swap the model's weights and the average."""
        current = dict(model.named_parameters())
        for name, average in self.values.items():
            kept = current[name].detach().clone()
            current[name].copy_(average)
            average.copy_(kept)

    def state_dict(self) -> dict[str, Any]:
        """Return `{"updates": int, "values": {name: Tensor}}`; the decay is the config's."""
        return {"updates": self.updates, "values": dict(self.values)}

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        values: dict[str, Tensor] = state["values"]
        weights.check_fit(values, self.values, "The checkpoint's weight average")
        for name, average in self.values.items():
            average.copy_(like(values[name], average))
        self.updates = state["updates"]


class EMA(Callback):
    """Average the trained network's weights over the steps, save the average, and evaluate with it.

    `TrainingTask` adds this callback, configured by its options `ema_decay` and `use_ema`, and stores the average in
    its checkpoints under `ema`, beside the weights themselves.

    Args:
        decay: As of `WeightAverage`; None keeps no average.
        evaluate: Validate and predict with the averaged weights.

    Attributes:
        average: The average of the current training, if it keeps one.
    """

    # Lightning's EMAWeightAveraging copies the whole task, loss included, which fails for sharded weights; it stores
    # the average as the model's weights, so existing checkpoints could not resume; and it updates after a batch, when
    # other callbacks may have saved already.

    def __init__(self, decay: float | None = None, evaluate: bool = False) -> None:
        self.decay = decay
        self.evaluate = evaluate
        self.average: WeightAverage | None = None
        self._to_load: dict[str, Any] | None = None
        self._in_use = False  # weights and average are swapped

    def setup(self, trainer: Trainer, pl_module: TrainingTask, stage: str) -> None:  # type: ignore[override]
        if stage != "fit" and trainer.ckpt_path:
            self.average = None  # that of an earlier training; the task loads the checkpoint's

    def on_fit_start(self, trainer: Trainer, pl_module: TrainingTask) -> None:  # type: ignore[override]
        if self.decay is None:
            if self.evaluate:
                raise UserError("Expected model.ema_decay (such as 0.999) if model.use_ema is set, got none.")
            return
        if trainer.ckpt_path and self._to_load is None:
            rank_zero_warn("The checkpoint has no averaged weights (ema); the average starts from its weights.")
        self.restore(pl_module, self._to_load)
        self._to_load = None
        # A hook of the optimizer: the average is up to date before any callback saves at the end of the batch.
        trainer.optimizers[0].register_step_post_hook(lambda *_: self._update(pl_module))

    def restore(self, task: TrainingTask, state: dict[str, Any] | None) -> None:
        """Start an average from the task's weights, or from `state`, the `ema` of a checkpoint."""
        if self.decay is not None:
            self.average = WeightAverage(task.network, self.decay)
            if state is not None:
                self.average.load_state_dict(state)

    def _update(self, task: TrainingTask) -> None:
        if self.average is not None:
            self.average.update(task.network)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: TrainingTask, checkpoint: dict[str, Any]) -> None:  # type: ignore[override]
        if trainer.state.fn == "fit":
            self._to_load = checkpoint.get("ema")

    def save(self, checkpoint: dict[str, Any], prefix: str) -> None:
        """Add the average to a checkpoint, in which the names of the network's weights begin with `prefix`.

        Called by the task, since Lightning skips callbacks if `weights_only`.
        """
        if self.average is None:
            return
        checkpoint["ema"] = self.average.state_dict()
        if self._in_use:  # saved in a validation, or after an error in one
            own, average = checkpoint["state_dict"], checkpoint["ema"]["values"]
            for name, value in average.items():
                key = f"{prefix}{name}"
                own[key], average[name] = value, own[key]

    @contextmanager
    def averaged(self, trainer: Trainer, task: TrainingTask) -> Iterator[None]:
        """Let the network have the averaged weights for a while, if it is evaluated with them."""
        self._swap(trainer, task, averaged=True)
        try:
            yield
        finally:
            self._swap(trainer, task, averaged=False)

    def _use_average(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        self._swap(trainer, pl_module, averaged=True)

    def _use_weights(self, trainer: Trainer, pl_module: TrainingTask) -> None:
        self._swap(trainer, pl_module, averaged=False)

    on_validation_epoch_start = on_predict_epoch_start = _use_average  # type: ignore[assignment]
    on_validation_epoch_end = on_predict_epoch_end = _use_weights  # type: ignore[assignment]

    def _swap(self, trainer: Trainer, task: TrainingTask, averaged: bool) -> None:
        placement_of(trainer).reshard(task.network)  # the average is sharded as the weights are
        if self.average is not None and self.evaluate and averaged != self._in_use:
            self.average.exchange(task.network)
            self._in_use = averaged
