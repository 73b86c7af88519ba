"""Learning-rate schedules, counted in steps (one step is one batch that updated the generator)."""

import math
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vidtwin.errors import UserError


class WarmupCosine(LRScheduler):
    """Linear warm-up from `start_factor` to the optimizer's rate, then half a cosine down to `end_factor` of it.

    Args:
        optimizer: Its learning rate is the peak.
        warmup_steps: Steps of the warm-up.
        total_steps: Steps until the end of the cosine; None takes the trainer's max_steps.
        start_factor: Rate at step 0, relative to the peak.
        end_factor: Rate at the end, relative to the peak.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        warmup_steps: int = 5000,
        total_steps: int | None = None,
        start_factor: float = 0.0,
        end_factor: float = 0.0,
    ) -> None:
        self.warmup_steps = warmup_steps
        self.total_steps = total_steps
        self.start_factor = start_factor
        self.end_factor = end_factor
        super().__init__(optimizer)

    def set_total_steps(self, total_steps: int) -> None:
        """Set `total_steps` if it is None; raise `UserError` if the warm-up does not end before it."""
        if self.total_steps is None:
            self.total_steps = total_steps
        if self.warmup_steps >= self.total_steps:
            raise UserError(
                f"Expected a warm-up shorter than the training, got warmup_steps={self.warmup_steps} and "
                f"{self.total_steps} steps; lower --model.scheduler.warmup_steps (with a GAN "
                "--model.discriminator_scheduler.warmup_steps too), or raise trainer.max_steps."
            )

    def state_dict(self) -> dict[str, Any]:
        """Return the step alone; the shape is the config's, so a run resumed with more steps has a longer cosine."""
        return {name: value for name, value in super().state_dict().items() if name in ("last_epoch", "_step_count")}

    def factor(self, step: int) -> float:
        """Return the rate at a step, relative to the peak."""
        if step < self.warmup_steps:
            return self.start_factor + (1 - self.start_factor) * step / self.warmup_steps
        if self.total_steps is None:
            return 1.0
        progress = min((step - self.warmup_steps) / max(self.total_steps - self.warmup_steps, 1), 1.0)
        return self.end_factor + (1 - self.end_factor) * 0.5 * (1 + math.cos(math.pi * progress))

    def get_lr(self) -> list[float | Tensor]:
        return [rate * self.factor(self.last_epoch) for rate in self.base_lrs]
