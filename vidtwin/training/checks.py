"""Check a training's options against its model, loss and trainer, before anything is computed."""

from collections.abc import Sequence
from typing import Any, cast

from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    BatchSizeFinder,
    GradientAccumulationScheduler,
    LearningRateFinder,
    StochasticWeightAveraging,
)
from torch import nn

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError, suggestion
from vidtwin.losses.autoencoder import AutoencoderLoss


def freeze(autoencoder: nn.Module, parts: Sequence[str]) -> None:
    """Exclude parts of an autoencoder from training; raise `UserError` for the name of a missing module."""
    for part in parts:
        modules = dict(autoencoder.named_modules())
        if part not in modules or not part:
            children = [name for name in modules if name and name.count(".") < 2]
            raise UserError(
                f"Expected model.freeze to name modules of {type(autoencoder).__name__} "
                f"({', '.join(name for name in children if '.' not in name)}), got {part!r}"
                f"{suggestion(part, children)}"
            )
        modules[part].requires_grad_(False)


def check_trainer(trainer: Trainer) -> None:
    """Raise `UserError` for options of Lightning's Trainer that the task has under its own names."""
    if (parts := trainer.accumulate_grad_batches) != 1:
        raise UserError(
            f"Expected trainer.accumulate_grad_batches 1, got {parts}; --model.accumulation {parts} splits each batch "
            f"of data.batch_size clips into {parts} parts."
        )
    if trainer.gradient_clip_val is not None or trainer.gradient_clip_algorithm is not None:
        raise UserError(
            f"Expected no trainer.gradient_clip_val and gradient_clip_algorithm, got {trainer.gradient_clip_val} and "
            f"{trainer.gradient_clip_algorithm}; --model.gradient_clip_norm NORM clips each player's gradient."
        )
    _check_callbacks(trainer)


def _check_callbacks(trainer: Trainer) -> None:
    """Raise `UserError` for callbacks of Lightning that change the one optimizer of an automatic optimization."""
    instead: tuple[tuple[type[Callback], str, str], ...] = (
        (LearningRateFinder, "varies the rate of one optimizer", "compare short trainings by --model.optimizer.lr"),
        (BatchSizeFinder, "takes steps before a GAN starts and needs its memory", "set --data.batch_size"),
        (GradientAccumulationScheduler, "joins batches to a step", "--model.accumulation splits each batch"),
        (StochasticWeightAveraging, "replaces the schedule", "--model.ema_decay averages weights"),
    )
    for callback in cast(Any, trainer).callbacks:
        for kind, action, advice in instead:
            if isinstance(callback, kind):
                raise UserError(
                    f"Expected callbacks for a task that steps its optimizers itself, got {type(callback).__name__}, "
                    f"which {action}; leave it out: {advice}."
                )


def check_training(autoencoder: VideoAutoencoder, loss: AutoencoderLoss, trainer: Trainer) -> None:
    """Raise `UserError` for a training without trainable weights, or with invalid steps, precision or GAN."""
    if not any(p.requires_grad for p in autoencoder.parameters()):
        raise UserError(f"{type(autoencoder).__name__} has nothing to train; shorten model.freeze or run a test.")
    if not getattr(trainer, "fast_dev_run", False):
        _check_steps(loss, trainer.max_steps)
    if str(trainer.precision) not in ("32-true", "bf16-mixed"):
        raise UserError(
            f"Expected trainer.precision bf16-mixed or 32-true, got {trainer.precision}: losses are in fp32, and the "
            "one gradient scaler of 16-mixed cannot serve the two players of a GAN."
        )
    adaptive = loss.adaptive_weight and loss.adversarial_weight > 0
    if loss.discriminator is not None and adaptive and not autoencoder.last_layer.requires_grad:
        raise UserError(
            "Expected a trained last layer for the adaptive GAN weight, got one that model.freeze names; train it or "
            "set --model.loss.adaptive_weight false."
        )


def _check_steps(loss: AutoencoderLoss, max_steps: int) -> None:
    if max_steps <= 0:
        raise UserError(
            f"Expected trainer.max_steps above 0, got {max_steps}: warm-up, GAN start and schedules count steps."
        )
    if loss.discriminator is not None and loss.adversarial_start >= max_steps:
        raise UserError(
            f"Expected a GAN that starts within the training, got adversarial_start={loss.adversarial_start} and "
            f"trainer.max_steps={max_steps}; lower the first, or train without GAN by --model.loss.discriminator null."
        )
