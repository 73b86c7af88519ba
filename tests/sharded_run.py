"""Run by test_sharding.py: trainings that FSDP2 shards over two ranks, whose outcomes each rank writes to a file."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

import torch
from generation import tiny_diffusion
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.loggers import TensorBoardLogger
from tiny import BASELINES, Clips, Poisoned, tiny_model, tiny_task, trainer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR

from vidtwin import plugins
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.posteriors import Deterministic, Encoding
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.callbacks.clips import ClipLogger
from vidtwin.training.callbacks.guard import StepGuard
from vidtwin.training.callbacks.health import Health
from vidtwin.training.sharding import placement_of
from vidtwin.training.task import AutoencoderTask

STEPS = 2


class Diary(Callback):
    def __init__(self) -> None:
        self.losses: list[float] = []
        self.rejected: list[str | None] = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.rejected.append(outputs["rejected"] if outputs else None)
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0.0)))


class BrokenGradient(Callback):
    """Once, the loss of the last rank is finite and its gradient is not."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        if task.batches != self.at or trainer.global_rank != trainer.world_size - 1:
            return
        sound = task.loss.generator_loss

        def broken(reconstruction: Any, *arguments: Any) -> dict[str, Tensor]:
            terms = sound(reconstruction, *arguments)
            terms["total"] = terms["total"] + (0 * reconstruction.clip.sum()).sqrt()
            del task.loss.generator_loss
            return terms

        task.loss.generator_loss = broken


class Uneven(Clips):
    """Two steps of clips to train on, three to evaluate: two batches on the first rank, one on the second."""

    def __init__(self, world_size: int) -> None:
        super().__init__(count=4 * STEPS, batch_size=4 // world_size)
        self.eval_batch_size = 1

    def make_dataset(self, split: str) -> Any:
        dataset: Any = super().make_dataset(split)
        dataset.clips = dataset.clips if split == "train" else dataset.clips[:3]
        return dataset


class Convolutions(VideoAutoencoder):
    """A model of others, without a list of blocks: it is one unit."""

    latent_names = ("z",)

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Conv3d(3, 4, 3, padding=1)
        self.outer = nn.Conv3d(4, 3, 3, padding=1)

    @property
    def last_layer(self) -> nn.Parameter:
        return self.outer.weight

    def _encode(self, clip: Tensor) -> Encoding:
        return Encoding(z=Deterministic(self.inner(clip)))

    def _decode(self, latents: dict[str, Tensor]) -> Tensor:
        return self.outer(latents["z"].tanh())

    def _latent_shapes(self, clip_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        return {"z": (4, *clip_shape[1:])}


def momentum(parameters: Any, lr: float = 0.3) -> SGD:
    # Linear in the gradient: AdamW makes of rounding, where a gradient is about 0, a step as long as the others.
    return SGD(parameters, lr=lr, momentum=0.9)


def task_of(model: VideoAutoencoder | None = None, depth: int = 1, **arguments: Any) -> AutoencoderTask:
    """A GAN from the first step on, with all that is not sharded: discriminator, log-variance, running means."""
    torch.manual_seed(0)
    loss = AutoencoderLoss(
        perceptual_weight=0,
        adversarial_start=0,
        adaptive_weight_maximum=1e9,
        discriminator=PatchDiscriminator2d(channels=4, num_layers=1),
        lecam_weight=0.1,
        r1_weight=0.1,
        regularization_weights={"commitment": 0.25, "codebook": 1.0},  # of the baseline
        learn_logvar=True,
    )
    players = {
        "optimizer": momentum,
        "scheduler": partial(ConstantLR, factor=1.0),
        "discriminator_optimizer": partial(momentum, lr=0.1),
        "discriminator_scheduler": partial(ConstantLR, factor=1.0),
    }
    model = model or tiny_model(depth=depth, qformer_dropout=0.0, activation_checkpointing=True)
    defaults = {"gradient_clip_norm": 0.1, "ema_decay": 0.5}
    return AutoencoderTask(model, loss, **{**players, **defaults, **arguments})


def saved(folder: Path, every: int) -> LatestCheckpoint:
    return LatestCheckpoint(every_n_steps=every, keep=9, dirpath=str(folder))


def train(
    folder: Path,
    task: AutoencoderTask,
    callbacks: list[Any] | None = None,
    ckpt_path: Path | None = None,
    steps: int = STEPS,
    data: Clips | None = None,
    every: int = STEPS,
    **devices: Any,
) -> dict[str, Any]:
    """From the mode of the posterior: what ranks would draw differs from what one process would."""
    sample, Encoding.sample = Encoding.sample, Encoding.mode  # type: ignore[method-assign]
    diary = Diary()
    callbacks = [saved(folder, every), diary, *(callbacks or [])]
    run = trainer(folder, steps, callbacks=callbacks, num_sanity_val_steps=0, **devices)
    try:
        run.fit(task, datamodule=data or Uneven(devices.get("devices", 1)), ckpt_path=ckpt_path)
    finally:
        Encoding.sample = sample  # type: ignore[method-assign]
    names = ("train/adaptive_weight", "train/gradient_norm", "val/psnr")
    return {"losses": diary.losses, "rejected": diary.rejected, "step": run.global_step} | {
        name: float(run.callback_metrics[name]) for name in names if name in run.callback_metrics
    }


def whole(folder: Path, **devices: Any) -> dict[str, Any]:
    """Callbacks that run parts of the model: on all ranks, and on the first alone."""
    task = task_of(depth=2)
    board = TensorBoardLogger(str(folder), name="", version="")
    outcome = train(folder, task, [ClipLogger(num_clips=1), Health()], every=1, logger=board, **devices)
    own = [*task.autoencoder.parameters(), *task.optimizers()[0].state.keys()]
    outcome["sharded"] = sum(isinstance(parameter, DTensor) for parameter in own) / len(own)
    outcome["share"] = sum(p.to_local().numel() if isinstance(p, DTensor) else p.numel() for p in own)
    outcome["share"] /= sum(parameter.numel() for parameter in own)
    outcome["units"] = [type(m).__name__ for m in task.modules() if type(m).__name__.startswith("FSDP")]
    return outcome


def parts(folder: Path, **devices: Any) -> dict[str, Any]:
    """Each batch in two parts, validated with the average; half of the model is frozen."""
    return train(folder, task_of(accumulation=2, use_ema=True, freeze=["structure", "encoder"]), **devices)


def one_unit(folder: Path, **devices: Any) -> dict[str, Any]:
    """The ranks begin with other weights each, as without a seed."""
    torch.manual_seed(int(os.environ.get("LOCAL_RANK", "0")))
    return train(folder, task_of(Convolutions()), **devices)


def baseline(folder: Path, **devices: Any) -> dict[str, Any]:
    """A plug-in with two codebooks, whose levels are units."""
    model = plugins.load("ivideogpt", "vidtwin.autoencoders")(**BASELINES["ivideogpt"], attention_dropout=0.0)
    task = task_of(model)
    outcome = train(folder, task, **devices)
    outcome["units"] = [type(m).__name__ for m in task.modules() if type(m).__name__.startswith("FSDP")]
    return outcome


def poisoned(folder: Path, **devices: Any) -> dict[str, Any]:
    """A clip without finite pixels, then a gradient that is not finite; each time the training goes back."""
    callbacks = [StepGuard(patience=1, rollbacks=9), BrokenGradient(at=5)]
    data = Poisoned(count=12, batch_size=4 // devices.get("devices", 1))
    return train(folder, task_of(), callbacks, steps=4, data=data, every=1, **devices)


def adaptive(folder: Path, ckpt_path: Path | None = None, **devices: Any) -> dict[str, Any]:
    """With AdamW, a GAN that starts later, dropout, and the schedules as they are."""
    task = tiny_task(gan_start=3, ema_decay=0.9, model={"qformer_dropout": 0.3})
    return train(folder, task, ckpt_path=ckpt_path, steps=5, data=Clips(count=12), every=2, **devices)


def averaged(folder: Path, **devices: Any) -> dict[str, Any]:
    """Training, validation and prediction in one process, each with the average; whether it went away behind each."""
    task, data = task_of(use_ema=True), Uneven(devices.get("devices", 1))
    run = trainer(folder, STEPS, callbacks=[saved(folder, STEPS)], **devices)
    run.fit(task, datamodule=data)
    outcome: dict[str, Any] = {"val/psnr": float(run.callback_metrics["val/psnr"])}
    own = placement_of(run).whole({name: parameter.detach() for name, parameter in task.autoencoder.named_parameters()})
    own = {name: value.clone() for name, value in own.items()}
    commands = {
        "validate": partial(run.validate, verbose=False),
        "predict": partial(run.predict, out=str(folder / "predicted")),
    }
    for name, command in commands.items():
        means = command(task, datamodule=data)
        outcome |= {"again": means[0]["val/psnr"]} if name == "validate" else {}
        placement_of(run).reshard(task.autoencoder)
        after = placement_of(run).whole(
            {name: parameter.detach() for name, parameter in task.autoencoder.named_parameters()}
        )
        outcome[name] = all(torch.equal(value, after[name]) for name, value in own.items())
    return outcome


def measured(folder: Path, checkpoint: Path, **devices: Any) -> dict[str, Any]:
    """`vidtwin validate`, with the averaged weights."""
    task = task_of(depth=2, use_ema=True)
    data = Uneven(devices.get("devices", 1))
    run = trainer(folder, **devices)
    return dict(run.validate(task, datamodule=data, ckpt_path=checkpoint, verbose=False)[0])


def refused(folder: Path, checkpoint: Path, **devices: Any) -> dict[str, Any]:
    """Files that were cut off, hold code, or come from another model."""
    bytes_ = checkpoint.read_bytes()
    files = {"cut": folder / "cut.ckpt", "code": folder / "code.ckpt", "other": checkpoint}
    folder.mkdir(parents=True, exist_ok=True)
    files["cut"].write_bytes(bytes_[: len(bytes_) // 2])
    torch.save({"state_dict": {}, "run": partial(print)}, files["code"])
    errors = {}
    for name, path in files.items():
        task = tiny_task(model={"hidden_size": 16}) if name == "other" else task_of(depth=2)
        try:
            train(folder / name, task, ckpt_path=path, **devices)
        except UserError as error:
            errors[name] = str(error)
    return errors


def diffusion(folder: Path, **devices: Any) -> dict[str, Any]:
    """A diffusion model on clips: sharded, whole on each rank (DDP), and sharded but ended and resumed."""
    torch.manual_seed(0)
    if int(os.environ.get("LOCAL_RANK", "0")) == 0:
        tiny_model().save_pretrained(folder / "model")
    outcome = {}

    def run(name: str, strategy: str, ckpt_path: Path | None = None) -> None:
        task = tiny_diffusion(
            optimizer=momentum,
            scheduler=partial(ConstantLR, factor=1.0),
            autoencoder=str(folder / "model"),
            gradient_clip_norm=0.1,
            ema_decay=0.5,
            use_ema=True,
            accumulation=2,
            sample_every_n_steps=2,
            num_samples=1,
        )
        diary, board = Diary(), TensorBoardLogger(str(folder / name), name="", version="")
        callbacks = [saved(folder / name, 1), diary]
        options = {**devices, "strategy": strategy, "logger": board, "num_sanity_val_steps": 0}
        run = trainer(folder, 3, callbacks=callbacks, **options)
        run.strategy.barrier()  # the model is written
        run.fit(task, datamodule=Uneven(devices["devices"]), ckpt_path=ckpt_path)
        sharded = [isinstance(parameter, DTensor) for parameter in task.denoiser.parameters()]
        units = [type(m).__name__ for m in task.modules() if type(m).__name__.startswith("FSDP")]
        value = float(run.callback_metrics["val/loss"])
        outcome[name] = {"losses": diary.losses, "sharded": all(sharded), "units": units, "val/loss": value}

    run("sharded", "fsdp2")
    run("whole", "ddp")
    run("resumed", "fsdp2", folder / "sharded" / "step-00000001.ckpt")
    return outcome


def low_precision(folder: Path, **devices: Any) -> dict[str, Any]:
    return train(folder, task_of(), precision="bf16-mixed", **devices)


def main(out: Path) -> None:
    """Run all on this rank; `out`/alone/whole has to hold `whole` by one process."""
    two = {"devices": 2, "strategy": "fsdp2"}
    outcomes = {
        scenario.__name__: scenario(out / scenario.__name__, **two)
        for scenario in (whole, parts, one_unit, baseline, poisoned, adaptive, averaged, low_precision, diffusion)
    }
    alone = out / "alone" / "whole"
    outcomes["from_one"] = train(out / "from_one", task_of(depth=2), ckpt_path=alone / "step-00000001.ckpt", **two)
    outcomes["again"] = adaptive(out / "again", out / "adaptive" / "step-00000002.ckpt", **two)
    outcomes["measured"] = measured(out / "measured", alone / "last.ckpt", **two)
    rank = torch.distributed.get_rank()
    outcomes["refused"] = refused(out / f"refused{rank}", alone / "last.ckpt", **two)
    (out / f"rank{rank}.json").write_text(json.dumps(outcomes))
