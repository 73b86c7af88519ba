"""The one training loop: steps, skipped batches, accumulation, schedules, average, random draws, resumption.

One step is one batch that updated the trained network. Under manual optimization Lightning counts a step per optimizer;
here only the network's uses Lightning's wrapper, so max_steps, checkpoint intervals, schedules and all logged curves
count batches. A batch with a non-finite loss or gradient on any rank updates no rank and is not a step.

All random draws of a step depend on (seed, batches so far, rank) alone, whatever happens between two steps.
"""

import random
from abc import abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any, ClassVar, NamedTuple, cast

import numpy as np
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchmetrics import MeanMetric

from vidtwin.compilation import list_units
from vidtwin.errors import UserError, few
from vidtwin.storage import checkpoints
from vidtwin.training.buffers import RunningBuffers
from vidtwin.training.callbacks.ema import EMA
from vidtwin.training.compilation import Compilation
from vidtwin.training.finite import agree, bad_gradients, bad_terms, find_reason
from vidtwin.training.optimization import (
    check_length,
    check_resumed,
    list_gradients,
    make_optimizer,
    make_schedule,
    resume_rates,
    step_at,
)
from vidtwin.training.sharding import Placement, placement_of

Batch = dict[str, Any]
Terms = dict[str, Tensor]
COUNTS = ("batches", "skipped", "rate_scale", "seed")  # stored in checkpoints


class Player(NamedTuple):
    """Parameters that an optimizer updates, with their optimizer and schedule.

    Attributes:
        prefix: Before `optimizer` and `scheduler` in the names of its options.
        parameters: Parameters, or groups of them.
        optimizer: Makes its optimizer.
        scheduler: Makes its schedule.
    """

    prefix: str
    parameters: Any
    optimizer: OptimizerCallable
    scheduler: LRSchedulerCallable


def describe_missing_gradients(names: str) -> str:
    """Describe parameters without a gradient in a training whose DDP does not search for them."""
    return (
        f"Expected a gradient of every parameter in each step on several devices, got none of {names}; set "
        "--trainer.strategy ddp_find_unused_parameters_true, or may_skip_parameters = True in the model's class."
    )


class TrainingTask(LightningModule):
    """Base of the tasks: it takes the steps, and a subclass says what is trained on what.

    A subclass has its network under the attribute `trained` and implements `players`, `part_losses` and `count_clips`.

    Args:
        gradient_clip_norm: Maximum norm of the gradient, for each player; None does not clip.
        accumulation: Number of parts into which each batch is split. Their gradients add up to one step, and one part's
            activations at a time are in memory. A step still takes data.batch_size clips on each device.
        ema_decay: Decay of the running average of the network's weights (0.999 looks back about 1,000 steps); None
            keeps no average.
        use_ema: Evaluate with that average.

    Attributes:
        trained: Name of the attribute with the trained network, whose tensors are `trained.*` in checkpoints.
        rate_name: The network in the logged learning rates, `lr/NAME`.
        batches: Number of batches so far, including skipped ones.
        skipped: Number of batches that updated nothing, since a loss or gradient was not finite.
        rate_scale: Factor on every learning rate; a rollback may lower it.
        stop_requested: Whether this rank is to stop (`Preemption`).
        stopping: Whether any rank was to stop in the last step, agreed by all.
        config: The `model` section of the config from which the task was built, if there is one.
    """

    trained: ClassVar[str]
    rate_name: ClassVar[str]

    def __init__(
        self,
        gradient_clip_norm: float | None = None,
        accumulation: int = 1,
        ema_decay: float | None = None,
        use_ema: bool = False,
    ) -> None:
        super().__init__()
        self.automatic_optimization = False
        if gradient_clip_norm is not None and not gradient_clip_norm > 0:
            raise UserError(f"Expected model.gradient_clip_norm above 0, or null for none, got {gradient_clip_norm}.")
        if accumulation < 1:
            raise UserError(f"Expected model.accumulation of at least 1, got {accumulation}.")
        self.gradient_clip_norm = gradient_clip_norm
        self.accumulation = accumulation
        self.ema = EMA(ema_decay, use_ema)
        self.batches = self.skipped = 0
        self.rate_scale = 1.0
        self.stop_requested = self.stopping = False
        self.config: dict[str, Any] | None = None
        self.seed: int | None = None
        self._resumed: tuple[list[Any], list[Any]] | None = None  # of the checkpoint: param_groups, schedules
        self._validation_terms: dict[str, MeanMetric] = {}
        self._running: RunningBuffers | None = None
        self._exchanged: dict[str, nn.Parameter] = {}  # of which DDP expects a gradient in each step

    # To be implemented by a task.

    @abstractmethod
    def players(self) -> list[Player]:
        """List what optimizers update; the network is the first."""

    @abstractmethod
    def part_losses(self, batch: Batch, step: int) -> Sequence[tuple[float, Iterator[tuple[str, Terms]]]]:
        """Split a training batch into `accumulation` parts.

        Returns:
            For each part its share of the batch, and an iterator that runs its forward pass and yields each player's
            terms by the prefix of their logs; the caller runs the backward pass of `total` in between.
        """

    @abstractmethod
    def count_clips(self, batch: Batch) -> int:
        """Return the number of clips in a batch; raise `UserError` for a batch of other data."""

    def describe(self) -> dict[str, Any]:
        """Return the entries of checkpoints and dumps from which the network is built again."""
        return {}

    def start_from(self, path: str) -> None:
        """Take weights from a file, as far as they fit, as the first ones of a training, and log which."""
        raise UserError(f"Expected no --init_from for {type(self).__name__}, got {path}; leave it out.")

    def to_dump(self, batch: Batch) -> Batch:
        """Return a batch as dumps hold it: `part_losses` must take it without the data module."""
        return batch

    def prepare_replay(self, dump: Mapping[str, Any]) -> None:
        """Build or load what the step of a dump needs beside its weights."""

    def compilable(self) -> dict[str, list[nn.Module]]:
        """Return what torch.compile may compile, by the names of `trainer.compilation.parts`.

        The network's units are the blocks that FSDP2 shards: blocks of one shape share a graph, and hooks stay outside.
        """
        return {self.trained: list_units(self.network)[:-1] or [self.network]}  # the last one is the network

    @property
    def may_skip_parameters(self) -> bool:
        """Return whether a step may leave trained parameters without a gradient; DDP then searches for them."""
        return False

    @property
    def network(self) -> nn.Module:
        """The trained network."""
        return cast(nn.Module, getattr(self, self.trained))

    # Configure.

    def configure_callbacks(self) -> list[Callback]:
        # The same object in all commands of a process, since it holds the average of an earlier training.
        return [] if self.ema in cast(Any, self.trainer).callbacks else [self.ema]

    def configure_model(self) -> None:
        self._placement.shard(self.network)

    @property
    def _placement(self) -> Placement:
        return placement_of(self._trainer)

    def configure_optimizers(self) -> tuple[list[Optimizer], list[LRScheduler]]:
        optimizers, schedulers = [], []
        for prefix, parameters, optimizer, scheduler in self.players():
            optimizers.append(make_optimizer(parameters, optimizer, f"model.{prefix}optimizer"))
            option = f"model.{prefix}scheduler"
            schedulers.append(make_schedule(optimizers[-1], scheduler, self._max_steps, option))
        if self._resumed is not None:
            check_resumed(optimizers, schedulers, *self._resumed)
            self._resumed = None
        return optimizers, schedulers

    @property
    def _max_steps(self) -> int | None:
        """Number of steps of the training; None in a dry run, which may end within the warm-up."""
        return None if getattr(self.trainer, "fast_dev_run", False) else self.trainer.max_steps

    def on_fit_start(self) -> None:
        self.stop_requested = self.stopping = False  # by an earlier run of this process
        if self.seed is None:
            self.seed = self.trainer.strategy.broadcast(torch.initial_seed())
        if compilation := self._compilation:  # after FSDP2 has sharded
            compilation.compile(self.compilable())

    def on_validation_start(self) -> None:
        self._compile_evaluation()

    def on_predict_start(self) -> None:
        self._compile_evaluation()

    def _compile_evaluation(self) -> None:
        """Compile for `validate` and `predict`, which may lack networks of the loss."""
        if (compilation := self._compilation) and self.trainer.state.fn != "fit":
            compilation.compile(self.compilable(), all_parts=False)

    @property
    def _compilation(self) -> Compilation | None:
        return getattr(self.trainer, "compilation", None)

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self._begin_step()

    def on_validation_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._begin_step()

    def on_predict_batch_start(self, batch: Batch, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._begin_step()

    def _begin_step(self) -> None:
        if compilation := self._compilation:
            compilation.begin_step()

    def teardown(self, stage: str) -> None:
        if compilation := self._compilation:
            compilation.restore()

    def on_train_start(self) -> None:
        self._running = RunningBuffers(self)
        self._exchanged = {}
        wrapper = self.trainer.strategy.model
        if isinstance(wrapper, DistributedDataParallel) and not wrapper.find_unused_parameters:
            parameters, ignored = wrapper.module.named_parameters(), wrapper.parameters_to_ignore
            self._exchanged = {name: p for name, p in parameters if p.requires_grad and name not in ignored}
        for scheduler, prefix in zip(self._schedulers(), [player.prefix for player in self.players()], strict=True):
            check_length(scheduler, self._max_steps, f"model.{prefix}scheduler")
            resume_rates(scheduler)

    # Train.

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, str] | None:
        """Take a step, or skip it if a loss or a gradient is not finite on any rank.

        Returns:
            None for a step. For a skipped one `{"rejected": reason}` on all ranks, with an empty reason on ranks that
            did not cause it.
        """
        clips, step = self.count_clips(batch), self.global_step
        if clips < self.accumulation:
            raise UserError(
                f"Expected at least model.accumulation={self.accumulation} clips in a batch, got {clips}; raise "
                "data.batch_size."
            )
        self.batches += 1
        buffers = self._running or RunningBuffers(self)
        before = buffers.copy()  # the forward pass changes them
        self.seed_draws(self.global_rank)
        means, reason = self._backward(batch, step)
        players = self._players(step)
        if reason is not None:
            self.skipped += 1
            for optimizer in players.values():
                optimizer.zero_grad()
            buffers.restore(before)
            self._log_step({"train/skipped": self.skipped / self.batches}, step, now=True)
            return {"rejected": reason}

        logged: dict[str, Any] = dict(means)
        for name, optimizer in players.items():
            self._update(optimizer, means[f"{name}/gradient_norm"])
            rate = optimizer.param_groups[0]["lr"] * self.rate_scale
            logged[f"lr/{self.rate_name if name == 'train' else name}"] = rate
        for scheduler in self._schedulers():
            scheduler.step()
        if self.trainer.world_size > 1:  # under manual optimization DDP shares them before the first step only
            buffers.share()
        every: int = self.trainer.log_every_n_steps  # type: ignore[attr-defined]
        logged["train/skipped"] = self.skipped / self.batches
        self._log_step(logged, step, now=every > 0 and (step + 1) % every == 0)
        return None

    def seed_draws(self, rank: int) -> None:
        """Seed the random draws of the next step by (seed, batches so far, rank)."""
        words = np.random.SeedSequence((self.seed or 0, self.batches, rank)).generate_state(2)
        torch.manual_seed(int(words[0]))
        np.random.seed(int(words[1]))  # other people's models may draw from these two
        random.seed(int(words[1]))

    def _players(self, step: int) -> dict[str, LightningOptimizer | Optimizer]:
        """Return the optimizers to step, by their prefix in the logs."""
        return {"train": self._optimizers()[0]}

    def _backward(self, batch: Batch, step: int) -> tuple[dict[str, Tensor], str | None]:
        """Compute the players' gradients part by part → values to log, and the reason to skip the batch (or None).

        Backward passes, in which the ranks wait for each other, run on values that are not finite too; whether any is,
        is asked once, at the end.
        """
        means: dict[str, Tensor] = {}
        computed: list[Terms] = []
        parts = self.part_losses(batch, step)
        for index, (share, losses) in enumerate(parts):
            with nullcontext() if index == len(parts) - 1 else self._without_sync():
                for player, terms in losses:
                    if player == "train":
                        self.manual_backward(share * terms["total"])
                    else:  # without the exchange of the network's gradients
                        (share * terms["total"]).backward()
                    computed.append({name: value.detach() for name, value in terms.items()})
                    for name, value in computed[-1].items():
                        key = f"{player}/{'loss' if name == 'total' else name}"
                        means[key] = means.get(key, 0.0) + share * value
        # Before any update: DDP exchanges none of the gradients that share a bucket with a missing one.
        if missing := [name for name, parameter in self._exchanged.items() if parameter.grad is None]:
            raise UserError(describe_missing_gradients(few(missing)))
        self._average_gradients()
        norms = {
            name: self._placement.gradient_norm(list_gradients(optimizer)).detach()
            for name, optimizer in self._players(step).items()
        }
        means |= {f"{name}/gradient_norm": norm for name, norm in norms.items()}
        finite, self.stopping = agree([*(terms["total"] for terms in computed), *norms.values()], self.stop_requested)
        if finite:
            return means, None
        found = [*map(bad_terms, computed), ("", bad_gradients(self))]
        return means, find_reason(self.trainer.strategy, found)

    def _average_gradients(self) -> None:
        """Average the gradients that no backward pass exchanges."""

    @contextmanager
    def _without_sync(self) -> Iterator[None]:
        strategy = self.trainer.strategy
        with strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext():
            yield

    def _log_step(self, values: dict[str, Any], step: int, now: bool) -> None:
        """Log values at this step; Lightning would count batches, and repeat old values for skipped ones."""
        measured = {name: value.detach().float() for name, value in values.items() if isinstance(value, Tensor)}
        known = {name: float(value) for name, value in values.items() if name not in measured}
        # As tensors of the device: Lightning would copy a number to it, and wait.
        filled = {name: torch.full((), value, device=self.device) for name, value in known.items()}
        self.log_dict(measured | filled, logger=False, batch_size=1)
        if now:
            numbers = torch.stack([*measured.values()]).tolist() if measured else []
            for logger in self.loggers:
                logger.log_metrics(dict(zip(measured, numbers, strict=True)) | known, step)

    def _optimizers(self) -> list[LightningOptimizer]:
        optimizers = self.optimizers()
        return cast(list[LightningOptimizer], optimizers if isinstance(optimizers, list) else [optimizers])

    def _schedulers(self) -> list[LRScheduler]:
        schedulers = self.lr_schedulers() or []
        return cast(list[LRScheduler], schedulers if isinstance(schedulers, list) else [schedulers])

    def _update(self, optimizer: LightningOptimizer | Optimizer, norm: Tensor) -> None:
        """Clip the gradients and step, at the schedule's rate times `rate_scale`."""
        if self.gradient_clip_norm is not None:
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            self._placement.clip_gradients(parameters, self.gradient_clip_norm, norm)
        step_at(optimizer, self.rate_scale)

    # Evaluate.

    def _add_validation_terms(self, terms: Mapping[str, Tensor], clips: int) -> None:
        """Add the terms of a validation batch to their means."""
        for name, value in terms.items():
            mean = self._validation_terms.setdefault(name, MeanMetric().to(self.device))
            mean.update(value.detach(), weight=clips)

    def on_validation_epoch_start(self) -> None:
        self._placement.gather(self.network)

    def on_validation_epoch_end(self) -> None:
        shown = {f"val/{name}": value for name, value in self._shown_metrics().items()}
        values = dict(shown)
        for name, mean in self._validation_terms.items():
            values[f"val/{'loss' if name == 'total' else name}"] = mean.compute()
            mean.reset()
        if not self.trainer.sanity_checking:
            self.log_dict(shown, prog_bar=True, logger=self.trainer.state.fn != "fit")
            # best_checkpoint.monitor may name any of them.
            self.log_dict({name: value for name, value in values.items() if name not in shown}, logger=False)
        # Lightning does not log the validation before the first step, where the curves start. So all validations are
        # logged here, at the number of steps taken (except a sanity check of a few clips).
        if not self.trainer.sanity_checking or self.trainer.num_sanity_val_steps == float("inf"):
            for logger in self.loggers:
                logger.log_metrics({name: float(value) for name, value in values.items()}, self.global_step)

    def _shown_metrics(self) -> dict[str, Tensor]:
        """Compute the metrics of a validation beside its loss, for the progress bar and the logs, and reset them."""
        return {}

    # Checkpoints.

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint.update(self.describe())
        checkpoint["training"] = {name: getattr(self, name) for name in COUNTS}
        self.ema.save(checkpoint, f"{self.trained}.")

    def _resume(self, checkpoint: dict[str, Any], trained: int) -> None:
        """Check that a training with `trained` trained tensors can resume from a checkpoint, and take its counts."""
        checkpoints.check_resumable(checkpoint, self.state_dict(), trained)
        groups = [state["param_groups"] for state in checkpoint["optimizer_states"]]
        self._resumed = groups, checkpoint["lr_schedulers"]
        for name in COUNTS:  # missing in checkpoints of older versions
            setattr(self, name, checkpoint.get("training", {}).get(name, getattr(self, name)))
