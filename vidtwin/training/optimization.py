"""Make learning-rate schedules that end with the training, and take steps at a scaled rate."""

from collections.abc import Sequence
from inspect import Parameter, signature
from typing import Any

from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor
from torch.optim import Optimizer, SparseAdam
from torch.optim.lr_scheduler import LRScheduler, OneCycleLR, ReduceLROnPlateau

from vidtwin.errors import UserError
from vidtwin.schedules import WarmupCosine

# Options that most of torch's optimizers share, so that they do not identify one.
_COMMON = {"params", "param_names", "lr", "initial_lr", "weight_decay", "decoupled_weight_decay", "maximize"}
_COMMON |= {"foreach", "fused", "capturable", "differentiable"}
_OF_WARMUP = {"last_epoch", "_step_count"}  # all that the state of WarmupCosine has


def make_optimizer(parameters: Any, make: OptimizerCallable, option: str) -> Optimizer:
    """Make an optimizer of `parameters`; raise `UserError` for one that can't be made, or can't take these steps.

    `option` is the name of the config's key.
    """
    try:
        optimizer = make(parameters)
    except (ValueError, TypeError, RuntimeError) as error:
        raise UserError(f"Expected arguments that an optimizer takes in {option}, got: {error}.") from error
    closure = signature(type(optimizer).step).parameters.get("closure")
    if closure is not None and closure.default is Parameter.empty:
        raise UserError(
            f"Expected an optimizer that steps by one gradient, got {type(optimizer).__name__}, which computes "
            f"the loss several times a step; set {option} to torch.optim.AdamW."
        )
    if isinstance(optimizer, SparseAdam):
        raise UserError(f"Expected an optimizer of dense gradients, got SparseAdam; set {option} to torch.optim.AdamW.")
    return optimizer


def make_schedule(optimizer: Optimizer, make: LRSchedulerCallable, max_steps: int | None, option: str) -> LRScheduler:
    """Make an optimizer's schedule, which ends at `max_steps`; None ends it after the warm-up.

    Raises `UserError` for one that can't be made, or does not reach `max_steps`. `option` is the name of its key.
    """
    try:
        scheduler = make(optimizer)
    except (ValueError, TypeError) as error:
        raise UserError(f"Expected arguments that a schedule takes in {option}, got: {error}.") from error
    if isinstance(scheduler, ReduceLROnPlateau):
        raise UserError(
            "Expected a schedule that counts steps, got ReduceLROnPlateau, which waits for validations; set "
            "--model.scheduler (and discriminator_scheduler) vidtwin.schedules.WarmupCosine."
        )
    if isinstance(scheduler, WarmupCosine):
        scheduler.set_total_steps(scheduler.warmup_steps + 1 if max_steps is None else max_steps)
    check_length(scheduler, max_steps, option)
    return scheduler


def check_length(scheduler: LRScheduler, max_steps: int | None, option: str) -> None:
    """Raise `UserError` for a OneCycleLR that ends before the training, since its next step would fail."""
    if isinstance(scheduler, OneCycleLR) and max_steps is not None and scheduler.total_steps < max_steps:
        raise UserError(
            f"Expected a OneCycleLR of trainer.max_steps={max_steps} steps at least, got {scheduler.total_steps}; set "
            f"{option}.total_steps. A resumed one keeps its length."
        )


def check_resumed(
    optimizers: Sequence[Optimizer], schedulers: Sequence[LRScheduler], groups: Sequence[Any], schedules: Sequence[Any]
) -> None:
    """Raise `UserError` if a checkpoint is of other optimizers or schedules.

    Args:
        optimizers: Those of the config.
        schedulers: Likewise.
        groups: `param_groups` of each optimizer in the checkpoint.
        schedules: State of each schedule in the checkpoint.
    """
    for optimizer, (held, *_) in zip(optimizers, groups, strict=True):
        if _options(held) != _options(optimizer.param_groups[0]):
            raise UserError(_describe(optimizer, _options(held)))
    for scheduler, state in zip(schedulers, schedules, strict=True):
        other = set(state) - set(vars(scheduler))
        if not other and (set(state) == _OF_WARMUP) != isinstance(scheduler, WarmupCosine):
            other = set(state)
        if other:
            raise UserError(_describe(scheduler, other))


def _options(group: dict[str, Any]) -> set[str]:
    """Return the options that identify an optimizer; Adam and AdamW differ by a value alone."""
    decoupled = {"decoupled_weight_decay"} if group.get("decoupled_weight_decay") else set()
    return set(group) - _COMMON | decoupled


def _describe(own: Optimizer | LRScheduler, held: set[str]) -> str:
    return (
        f"Expected a checkpoint of a training with {type(own).__name__}, got one with another class (of "
        f"{', '.join(sorted(held))}); --init_from starts a new training from its weights."
    )


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
