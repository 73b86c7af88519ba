"""What happens when a loss or a gradient is not finite: the step is skipped, told, dumped, undone, ended."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from vidtwin import console
from vidtwin.errors import UserError
from vidtwin.files import replacing
from vidtwin.storage import checkpoints
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.sharding import placement_of
from vidtwin.training.task import AutoencoderTask, Batch


class StepGuard(Callback):
    """Act on the steps that the task has skipped, since a loss or a gradient was not finite on some rank.

    Each is told on stderr with its clips. The first ones are dumped: `vidtwin replay DUMP` runs such a step again and
    says where it breaks. After `patience` of them in a row the training goes back to its last checkpoint (one further
    with each time that it fails again before it has passed the step where it failed), and goes on with the next clips.
    When that has happened `rollbacks` times it stops with the reason.

    Args:
        patience: Skipped steps in a row before the training goes back.
        rollbacks: How often it may go back.
        rate_factor: Factor on all learning rates each time that it goes back; 1 keeps them.
        dumps: Steps that are dumped, on each rank where they break; each holds a batch and all weights.
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

    def on_fit_start(self, trainer: Trainer, pl_module: AutoencoderTask) -> None:  # type: ignore[override]
        # Asked for on all ranks here: a run's folder is agreed upon among them.
        self.folder = Path(trainer.log_dir or trainer.default_root_dir) / "nonfinite"

    def on_train_batch_end(  # type: ignore[override]
        self, trainer: Trainer, pl_module: AutoencoderTask, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        if not (outputs and "rejected" in outputs):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        reason = outputs["rejected"]
        dumps = bool(reason) and len(self.dumped) < self.dumps
        weights: dict[str, Tensor] | None = None
        if trainer.strategy.reduce_boolean_decision(dumps, all=False):
            weights = placement_of(trainer).whole(
                pl_module.state_dict(), keep=dumps
            )  # by all ranks, for those that dump
        if reason:
            self._tell(trainer, pl_module, reason, batch, weights if dumps else None)
        if self.in_a_row >= self.patience:
            self._go_back(trainer, pl_module, reason, batch)

    def state_dict(self) -> dict[str, Any]:
        return {"gone_back": self.gone_back, "failed_at": self.failed_at, "went_to": self.went_to}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.gone_back, self.failed_at = state_dict["gone_back"], state_dict["failed_at"]
        self.went_to = state_dict["went_to"]

    def _tell(
        self, trainer: Trainer, task: AutoencoderTask, reason: str, batch: Batch, weights: dict[str, Tensor] | None
    ) -> None:
        where = f"step {trainer.global_step}" + (f", rank {trainer.global_rank}" if trainer.world_size > 1 else "")
        line = f"skipped {where}: {reason}; clips: {clip_names(batch)}"
        if weights is not None:
            name = f"step-{trainer.global_step:08d}-batch-{task.batches:08d}-rank-{trainer.global_rank}.pt"
            try:
                self.dumped.append(dump(self.folder / name, trainer, task, reason, batch, weights))
                line += f"; to run it again: vidtwin replay {self.dumped[-1]}"
            except (OSError, RuntimeError) as error:  # a full disk: the training goes on without
                line += f"; no dump was written: {error}"
        console.log(line)

    def _go_back(self, trainer: Trainer, task: AutoencoderTask, reason: str, batch: Batch) -> None:
        saved = next((c for c in trainer.checkpoint_callbacks if isinstance(c, LatestCheckpoint)), None)
        history: list[Path] = []
        if trainer.is_global_zero and saved is not None and saved.dirpath:
            history = checkpoints.history(saved.dirpath, console.log)
        history = trainer.strategy.broadcast(history)
        step = trainer.global_step
        ended = f"{self.in_a_row} steps in a row were not finite at step {step}, {reason or 'on another rank'}"
        clips = f"the last batch: {clip_names(batch)}"
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
        # Where the step that failed was not passed since, the checkpoint may hold what broke it already.
        again = step <= self.failed_at
        older = [path for path in history if not again or checkpoints.step_of(path) < self.went_to]
        target = older[0] if older else history[-1]
        self.failed_at, self.went_to = max(step, self.failed_at), checkpoints.step_of(target)
        self.gone_back += 1
        self.in_a_row = 0
        rewind(trainer, task, target)
        task.rate_scale *= self.rate_factor
        assert saved is not None
        saved.save(trainer, again=True)  # with the rate, the place in the data and this count
        if trainer.is_global_zero:
            rate = f", learning rates times {task.rate_scale:g}" if self.rate_factor != 1 else ""
            console.log(f"{ended}; back to {target} (step {trainer.global_step}){rate}; {clips}")


def rewind(trainer: Trainer, task: AutoencoderTask, path: Path) -> None:
    """Go back to a checkpoint's weights, optimizers, schedules, average and step in the middle of a training.

    The data go on from where they are, so that batches that came after the checkpoint are not repeated.
    """
    strategy = trainer.strategy
    checkpoint = strategy.load_checkpoint(path, weights_only=True)
    strategy.load_model_state_dict(checkpoint)
    strategy.load_optimizer_state_dict(checkpoint)
    schedulers = [config.scheduler for config in trainer.lr_scheduler_configs]
    for scheduler, state in zip(schedulers, checkpoint["lr_schedulers"], strict=True):
        scheduler.load_state_dict(state)
    task.ema.restore(task, checkpoint.get("ema"))  # missing from a training that had none when it was saved
    steps = trainer.fit_loop.epoch_loop.manual_optimization.optim_step_progress.total
    steps.ready = steps.completed = checkpoint["global_step"]


def clip_names(batch: Batch) -> str:
    """The clips of a batch for a message, those with pixels that are not finite first."""
    finite = batch["clip"].isfinite().flatten(1).all(dim=1).tolist()
    starts = batch.get("start_frame", [None] * len(finite))
    names = batch.get("name", [f"number {index} of the batch" for index in range(len(finite))])
    named = sorted(zip(finite, names, starts, strict=True), key=lambda entry: entry[0])
    texts = [
        f"{name}{'' if start is None else f' from frame {int(start)}'}{'' if sound else ' (its pixels are not finite)'}"
        for sound, name, start in named
    ]
    return ", ".join(texts)


def dump(
    path: Path, trainer: Trainer, task: AutoencoderTask, reason: str, batch: Batch, weights: dict[str, Tensor]
) -> Path:
    """Write what `vidtwin replay` needs: batch, weights, seed and config of a step that was skipped."""
    content = {
        "reason": reason,
        "step": trainer.global_step,
        "rank": trainer.global_rank,
        "world_size": trainer.world_size,
        "precision": str(trainer.precision),
        "batch": {key: _on_cpu(value) for key, value in batch.items()},
        "state_dict": {name: value.detach().cpu() for name, value in weights.items()},
        "training": {"batches": task.batches, "seed": task.seed},
        "model_spec": task.autoencoder.spec(),
        "config": task.config,
    }
    with replacing(path) as temporary:
        torch.save(content, temporary)
    return path


def _on_cpu(value: Any) -> Any:
    return value.detach().cpu() if isinstance(value, Tensor) else value
