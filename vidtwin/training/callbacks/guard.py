"""React to losses and gradients that are not finite: log and dump skipped steps, roll back, stop."""

from pathlib import Path
from typing import Any

import torch
from lightning.fabric.utilities import move_data_to_device
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from vidtwin import console
from vidtwin.errors import UserError
from vidtwin.files import replacing
from vidtwin.storage import checkpoints
from vidtwin.training.base import Batch, TrainingTask
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.sharding import placement_of

_STATE = ("gone_back", "failed_at", "went_to")  # counters in checkpoints


class StepGuard(Callback):
    """React to steps that the task skipped since a loss or a gradient was not finite on some rank.

    Each is logged on stderr with its clips. The first ones are dumped: `vidtwin replay DUMP` reruns such a step. After
    `patience` of them in a row the training rolls back to its last checkpoint and continues with the next clips. If it
    fails again before it has passed the step where it failed, it rolls back one checkpoint further. After `rollbacks`
    times it stops with the reason.

    Args:
        patience: Skipped steps in a row before a rollback.
        rollbacks: Maximum number of rollbacks.
        rate_factor: Factor on all learning rates at each rollback; 1 keeps them.
        dumps: Maximum number of dumps per rank; each holds a batch and all weights.
    """

    def __init__(self, patience: int = 5, rollbacks: int = 3, rate_factor: float = 1.0, dumps: int = 3) -> None:
        if patience < 1 or rollbacks < 0 or dumps < 0:
            raise UserError(
                "Expected guard.patience of at least 1, guard.rollbacks and guard.dumps of at least 0, got "
                f"{patience}, {rollbacks} and {dumps}."
            )
        if not 0 < rate_factor <= 1:
            raise UserError(f"Expected guard.rate_factor above 0 and at most 1, got {rate_factor}.")
        self.patience = patience
        self.rollbacks = rollbacks
        self.rate_factor = rate_factor
        self.dumps = dumps
        self.in_a_row = 0
        self.gone_back = 0
        self.failed_at = -1
        self.went_to = -1
        self.dumped: list[Path] = []
        self.folder = Path()

    def on_fit_start(self, trainer: Trainer, pl_module: TrainingTask) -> None:  # type: ignore[override]
        # `log_dir` broadcasts, so all ranks have to read it here.
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "nonfinite"

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: TrainingTask, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not (outputs and "rejected" in outputs):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        reason = outputs["rejected"]
        dumps = bool(reason) and len(self.dumped) < self.dumps
        weights: dict[str, Tensor] | None = None
        if trainer.strategy.reduce_boolean_decision(dumps, all=False):
            # By all ranks, also those that do not dump.
            weights = placement_of(trainer).whole(pl_module.state_dict(), keep=dumps)
        if reason:
            self._report(trainer, pl_module, reason, batch, weights if dumps else None)
        if self.in_a_row >= self.patience:
            self._roll_back(trainer, pl_module, reason, batch)

    def state_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in _STATE}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        vars(self).update({name: state_dict[name] for name in _STATE})

    def _report(
        self, trainer: Trainer, task: TrainingTask, reason: str, batch: Batch, weights: dict[str, Tensor] | None
    ) -> None:
        where = f"step {trainer.global_step}" + (f", rank {trainer.global_rank}" if trainer.world_size > 1 else "")
        line = f"skipped {where}: {reason}; clips: {format_clips(batch)}"
        if weights is not None:
            name = f"step-{trainer.global_step:08d}-batch-{task.batches:08d}-rank-{trainer.global_rank}.pt"
            try:
                self.dumped.append(dump(self.folder / name, trainer, task, reason, batch, weights))
                line += f"; to run it again: vidtwin replay {self.dumped[-1]}"
            except (OSError, RuntimeError) as error:  # such as a full disk, which need not stop the training
                line += f"; no dump was written: {error}"
        console.log(line)

    def _roll_back(self, trainer: Trainer, task: TrainingTask, reason: str, batch: Batch) -> None:
        saved = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LatestCheckpoint)), None)
        history: list[Path] = []
        if trainer.is_global_zero and saved is not None and saved.dirpath:
            history = checkpoints.history(saved.dirpath, console.log)
        history = trainer.strategy.broadcast(history)
        step = trainer.global_step
        ended = f"{self.in_a_row} steps in a row were not finite at step {step}, {reason or 'on another rank'}"
        clips = f"the last batch: {format_clips(batch)}"
        if self.gone_back >= self.rollbacks or not history:
            tried = f"after going back {self.gone_back} times" if self.gone_back else "with no checkpoint to go back to"
            if not self.gone_back and self.rollbacks == 0:
                tried = "and guard.rollbacks is 0"
            dumps = f"; dumps in {self.folder}" if self.dumped else ""
            raise UserError(
                f"Expected finite losses and gradients, got none {tried}: {ended}; {clips}{dumps}. Lower the learning "
                "rates (or let guard.rate_factor do so), clip gradients by model.gradient_clip_norm, or leave the "
                "clips out."
            )
        # If training has not passed the failed step since, the fault may be in the checkpoint itself.
        again = step <= self.failed_at
        older = [path for path in history if not again or checkpoints.step_of(path) < self.went_to]
        target = older[0] if older else history[-1]
        self.failed_at, self.went_to = max(step, self.failed_at), checkpoints.step_of(target)
        self.gone_back += 1
        self.in_a_row = 0
        rewind(trainer, task, target)
        task.rate_scale *= self.rate_factor
        assert saved is not None
        saved.save(trainer, again=True)  # with the new rate, place in the data and counters
        if trainer.is_global_zero:
            rate = f", learning rates times {task.rate_scale:g}" if self.rate_factor != 1 else ""
            console.log(f"{ended}; back to {target} (step {trainer.global_step}){rate}; {clips}")


def rewind(trainer: Trainer, task: TrainingTask, path: Path) -> None:
    """Restore a checkpoint's weights, optimizers, schedules, average and step during a training.

    The place in the data is kept, so that the batches after the checkpoint are not repeated.
    """
    strategy = trainer.strategy
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    strategy.load_model_state_dict(checkpoint)
    strategy.load_optimizer_state_dict(checkpoint)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler, state in zip(schedulers, checkpoint["lr_schedulers"], strict=True):
        scheduler.load_state_dict(state)
    task.ema.restore(task, checkpoint.get("ema"))  # missing if it was saved without an average
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    steps.ready = steps.completed = checkpoint["global_step"]


def format_clips(batch: Batch) -> str:
    """List the clips of a batch for a message, those with non-finite values first."""
    values = [batch["clip"]] if "clip" in batch else [*(batch.get("latents") or batch["codes"]).values()]
    finite = torch.stack([value.isfinite().flatten(1).all(dim=1) for value in values]).all(dim=0).tolist()
    fault = f" (its {'pixels' if 'clip' in batch else 'latents'} are not finite)"
    starts = batch.get("start_frame", [None] * len(finite))
    names = batch.get("name", [f"number {index} of the batch" for index in range(len(finite))])
    named = sorted(zip(finite, names, starts, strict=True), key=lambda entry: entry[0])
    texts = [
        f"{name}{'' if start is None else f' from frame {int(start)}'}{'' if sound else fault}"
        for sound, name, start in named
    ]
    return ", ".join(texts)


def dump(
    path: Path, trainer: Trainer, task: TrainingTask, reason: str, batch: Batch, weights: dict[str, Tensor]
) -> Path:
    """Write batch, weights, seed and config of a skipped step, from which `vidtwin replay` reruns it."""
    content = {
        "reason": reason,
        "step": trainer.global_step,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        **move_data_to_device({"batch": task.to_dump(batch), "state_dict": dict(weights)}, "cpu"),
        "training": {"batches": task.batches, "seed": task.seed},
        **task.describe(),
        "config": task.config,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return path
