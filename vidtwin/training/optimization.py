"""Make learning-rate schedules that end with the training, and take steps at a scaled rate."""

from lightning.pytorch.cli import LRSchedulerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from vidtwin.schedules import WarmupCosine


def make_schedule(optimizer: Optimizer, make: LRSchedulerCallable, max_steps: int | None) -> LRScheduler:
    """Make an optimizer's schedule, which ends at `max_steps`; None ends it after the warm-up."""
    scheduler = make(optimizer)
    if isinstance(scheduler, WarmupCosine):
        scheduler.set_total_steps(scheduler.warmup_steps + 1 if max_steps is None else max_steps)
    return scheduler


def resume_rates(scheduler: LRScheduler) -> None:
    """Set the rates of a resumed run by its config, not by the checkpoint."""
    if isinstance(scheduler, WarmupCosine):
        for group, rate in zip(scheduler.optimizer.param_groups, scheduler.get_lr(), strict=True):
            group["lr"] = rate


def list_gradients(optimizer: LightningOptimizer | Optimizer) -> list[Tensor]:
    """List the gradients of an optimizer's parameters."""
    return [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]


def step_at(optimizer: LightningOptimizer | Optimizer, rate_scale: float) -> None:
    """Take a step at the schedule's rate times `rate_scale`, and clear the gradients."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["lr"] * rate_scale
    optimizer.step()
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate  # a schedule may compute the next rate from this one
    optimizer.zero_grad()
