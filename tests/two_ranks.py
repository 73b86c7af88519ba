"""Run by test_distributed.py: trainings on two ranks, whose outcomes each rank writes to a file.

python two_ranks.py FOLDER BASELINE...      Lightning starts the second process
"""

import json
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from generation import tiny_diffusion
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import ParallelStrategy
from tiny import Clips, Poisoned, baseline_task, tiny_model, tiny_task, trainer
from torch import nn
from torch.distributed import GradBucket
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD
from torch.optim.lr_scheduler import ConstantLR
from waits import Count

from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import Preempted, UserError
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.models.vidtwin import VidTwin
from vidtwin.posteriors import DiagonalGaussian, Encoding
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.callbacks.guard import StepGuard
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.teacher import Teacher


class Diary(Callback):
    """Clips of each batch, and whether it was skipped."""

    def __init__(self, end_at: int | None = None, by_signal: bool = False) -> None:
        self.end_at, self.by_signal = end_at, by_signal
        self.clips: list[list[str]] = []
        self.rejected: list[str | None] = []
        self.losses: list[float] = []
        self.validated: list[str] = []
        self.searched: list[bool] = []  # for parameters without a gradient

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.clips.append(list(batch["name"]))
        if self.by_signal and trainer.global_step + 1 == self.end_at and trainer.global_rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    def on_train_start(self, trainer, task):
        model = trainer.strategy.model
        self.searched += [model.find_unused_parameters] if isinstance(model, DistributedDataParallel) else []

    def on_validation_batch_end(self, trainer, task, outputs, batch, batch_idx, dataloader_idx=0):
        if not trainer.sanity_checking:
            self.validated += list(batch["name"])

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.rejected.append(outputs["rejected"] if outputs else None)
        self.losses.append(float(trainer.callback_metrics.get("train/loss", 0.0)))


class Sending(Callback):
    """Count the bytes that DDP exchanges in backward passes, in `sent[name]`."""

    def __init__(self, name: str, sent: dict[str, int]) -> None:
        self.name, self.sent = name, sent

    def on_train_start(self, trainer, task):
        if isinstance(trainer.strategy.model, DistributedDataParallel):
            trainer.strategy.model.register_comm_hook(None, self._exchange)

    def _exchange(self, state: None, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
        self.sent[self.name] = self.sent.get(self.name, 0) + bucket.buffer().nbytes
        return allreduce_hook(None, bucket)


def plain_task(accumulation: int = 1, **arguments: Any) -> AutoencoderTask:
    """A GAN from the first step on, in which a step is the gradient: what is compared with one process."""
    return tiny_task(
        gan_start=0,
        accumulation=accumulation,
        gradient_clip_norm=0.05,
        model={"qformer_dropout": 0.0},
        loss={"lecam_weight": 0.1, "r1_weight": 0.1, "adaptive_weight_maximum": 1e9},  # above what comes
        optimizer=lambda p: SGD(p, lr=1.0),
        scheduler=lambda o: ConstantLR(o, 1.0),
        discriminator_optimizer=lambda p: SGD(p, lr=0.1),
        discriminator_scheduler=lambda o: ConstantLR(o, 1.0),
        **arguments,
    )


def stochastic_task() -> AutoencoderTask:
    return tiny_task(gan_start=2, ema_decay=0.9, model={"qformer_dropout": 0.3})


def saved(folder: Path, every: int = 2) -> LatestCheckpoint:
    return LatestCheckpoint(every_n_steps=every, dirpath=str(folder / "checkpoints"))


def write_teacher(folder: Path) -> None:
    """Write the teacher's weights, which all ranks read."""
    torch.manual_seed(1)
    tiny_model().save_pretrained(folder / "teacher")


def gradients(folder: Path, **devices: Any) -> dict[str, Any]:
    """Three steps on 12 clips, 4 a step over all ranks, from the mode of the posterior; those in parts with a teacher.

    Its weights lie beside `folder`.
    """
    sample, Encoding.sample = Encoding.sample, Encoding.mode  # type: ignore[method-assign]
    blocked, without_sync = [], ParallelStrategy.block_backward_sync
    sent: dict[str, int] = {}

    def counting(strategy: ParallelStrategy) -> Any:
        blocked.append(strategy.lightning_module.batches)
        return without_sync(strategy)

    ParallelStrategy.block_backward_sync = counting  # type: ignore[method-assign]
    try:
        diary, count = Diary(), Count(at=1)
        for name, parts in (("whole", 1), ("parts", 2)):
            world = devices.get("devices", 1)
            teacher = Teacher(str(folder.parent / "teacher")) if parts == 2 else None
            task = plain_task(parts, ema_decay=0.5, teacher=teacher)
            callbacks = [diary, Sending(name, sent), saved(folder / name), *([count] if parts == 1 else [])]
            run = trainer(folder / name, 3, callbacks=callbacks, **devices)
            run.fit(task, datamodule=Clips(count=12, batch_size=4 // world))
    finally:
        Encoding.sample = sample  # type: ignore[method-assign]
        ParallelStrategy.block_backward_sync = without_sync  # type: ignore[method-assign]
    weight = float(run.callback_metrics["train/adaptive_weight"])
    return {
        "clips": diary.clips[:3],
        "without_sync": blocked,
        "sent": sent,
        "searched": diary.searched,
        "waits": count.lines,
        "parameters": sum(p.nbytes for p in task.autoencoder.parameters() if p.requires_grad),
        "adaptive_weight": weight,
        "psnr": float(run.callback_metrics["val/psnr"]),
    }


def baselines(folder: Path, names: Sequence[str] | None = None, **devices: Any) -> dict[str, Any]:
    """Two steps of each baseline on 8 clips, 4 a step over all ranks, from the mode of the posterior.

    By default of those that the command line names.
    """
    # Of Open-Sora's image latents too.
    sample, DiagonalGaussian.sample = DiagonalGaussian.sample, DiagonalGaussian.mode  # type: ignore[method-assign]
    psnr, diary = {}, Diary()
    try:
        for name in sys.argv[2:] if names is None else names:
            still = {"attention_dropout": 0.0} if name == "ivideogpt" else {}
            plain = {"optimizer": lambda p: SGD(p, lr=0.1), "scheduler": lambda o: ConstantLR(o, 1.0)}
            run = trainer(folder / name, 2, callbacks=[diary, saved(folder / name)], **devices)
            clips = Clips(count=8, batch_size=4 // devices.get("devices", 1))
            run.fit(baseline_task(name, still, **plain, ema_decay=0.5), datamodule=clips)
            psnr[name] = float(run.callback_metrics["val/psnr"])
    finally:
        DiagonalGaussian.sample = sample  # type: ignore[method-assign]
    return psnr | {"searched": diary.searched}


class Skipping(VidTwin):
    """A model with a layer that it does not use in every forward pass."""

    used: ClassVar[list[bool]] = []

    def __init__(self, **arguments: Any) -> None:
        super().__init__(**arguments)
        self.extra = nn.Linear(1, 1, bias=False)

    def _decode(self, latents: Any) -> torch.Tensor:
        clip = super()._decode(latents)
        return clip + self.extra.weight if self.training and self.used.pop(0) else clip


def skipping(folder: Path, **devices: Any) -> dict[str, Any]:
    """Two steps of two parts of a model that says so, of one that never uses a layer, of one that does now and then."""
    outcomes = {}
    for name, says, used in (
        ("searched", True, [False, False, True, False]),
        ("never", False, [False, False]),
        ("in part", False, [True, False, True, True]),
    ):
        Skipping.may_skip_parameters, Skipping.used = says, used
        task, diary = tiny_task(accumulation=2, warmup_steps=1), Diary()
        task.autoencoder = Skipping(**task.autoencoder.init_args)
        weight = float(task.autoencoder.extra.weight.detach())
        try:
            trainer(folder, 2, callbacks=[diary], **devices).fit(task, datamodule=Clips(count=8))
            error = ""
        except UserError as reason:
            error = str(reason)
        moved = float(task.autoencoder.extra.weight.detach()) != weight
        total = sum(float(p.detach().double().sum()) for p in task.autoencoder.parameters())
        outcomes[name] = {"error": error, "searched": diary.searched, "moved": moved, "weights": total}
    return outcomes


def odd_tail(folder: Path, **devices: Any) -> dict[str, Any]:
    """Seven training clips, three validation clips."""

    class Odd(Clips):
        def make_dataset(self, split: str) -> Any:
            dataset = super().make_dataset(split)
            dataset.clips = dataset.clips[: 7 if split == "train" else 3]
            return dataset

    diary = Diary()
    discriminator = PatchDiscriminator2d(channels=8, num_layers=1, norm="batch")
    task = tiny_task(gan_start=1, loss={"discriminator": discriminator})
    run = trainer(folder, 3, callbacks=[diary], **devices)
    run.fit(task, datamodule=Odd(count=7, eval_batch_size=1))
    statistics = [value.tolist() for name, value in discriminator.named_buffers()]
    return {"clips": diary.clips, "validated": diary.validated, "statistics": statistics}


def too_few(folder: Path, **devices: Any) -> dict[str, Any]:
    class One(Clips):
        def make_dataset(self, split: str) -> Any:
            dataset = super().make_dataset(split)
            dataset.clips = dataset.clips[: 4 if split == "train" else 1]
            return dataset

    try:
        trainer(folder, 4, **devices).fit(tiny_task(), datamodule=One())
    except UserError as error:
        return {"error": str(error)}
    return {}


def poisoned(folder: Path, **devices: Any) -> dict[str, Any]:
    """A clip without finite pixels, which each epoch one of the ranks meets; then one skipped step goes back."""
    diary = Diary()
    task = tiny_task(gan_start=1, ema_decay=0.9)
    run = trainer(folder, 6, callbacks=[diary, StepGuard(patience=1, rollbacks=9), saved(folder, 1)], **devices)
    run.fit(task, datamodule=Poisoned(count=12))
    total = sum(float(p.detach().double().sum()) for p in task.parameters())
    return {"clips": diary.clips, "rejected": diary.rejected, "step": run.global_step, "weights": total}


def resumed(folder: Path, **devices: Any) -> dict[str, Any]:
    """Seven steps of four an epoch; the same, ended after the third by SIGTERM to one rank and gone on with."""
    whole, first, second = Diary(), Diary(end_at=3, by_signal=True), Diary()
    data = {"count": 16, "num_workers": 2}
    run = trainer(folder / "whole", 7, callbacks=[whole, saved(folder / "whole")], **devices)
    run.fit(stochastic_task(), datamodule=Clips(**data))
    ended = ""
    try:
        run = trainer(folder / "parts", 7, callbacks=[first, saved(folder / "parts")], **devices)
        run.fit(stochastic_task(), datamodule=Clips(**data))
    except Preempted as end:
        ended = str(end)
    run = trainer(folder / "parts", 7, callbacks=[second, saved(folder / "parts")], **devices)
    run.fit(stochastic_task(), datamodule=Clips(**data), resume="auto")
    return {
        "ended": ended,
        "whole": [whole.clips, whole.losses],
        "parts": [first.clips + second.clips, first.losses + second.losses],
    }


def diffusion(folder: Path, **devices: Any) -> dict[str, Any]:
    """Four steps of a diffusion model on clips that the teacher encodes; the same, ended after two and resumed."""
    whole, first, second = Diary(), Diary(end_at=2, by_signal=True), Diary()
    options = {
        "autoencoder": str(folder.parent / "teacher"),
        "posterior": "sample",
        "ema_decay": 0.9,
        "accumulation": 2,
    }
    run = trainer(folder / "whole", 4, callbacks=[whole, saved(folder / "whole")], **devices)
    run.fit(task := tiny_diffusion(**options), datamodule=Clips(count=12))
    ended = ""
    try:
        run = trainer(folder / "parts", 4, callbacks=[first, saved(folder / "parts")], **devices)
        run.fit(tiny_diffusion(**options), datamodule=Clips(count=12))
    except Preempted as end:
        ended = str(end)
    run = trainer(folder / "parts", 4, callbacks=[second, saved(folder / "parts")], **devices)
    run.fit(tiny_diffusion(**options), datamodule=Clips(count=12), resume="auto")
    return {
        "ended": ended,
        "whole": [whole.clips, whole.losses],
        "parts": [first.clips + second.clips, first.losses + second.losses],
        "weights": sum(float(p.detach().double().abs().sum()) for p in task.parameters()),
        "scale": task.denoiser.std.tolist(),
    }


def broken_videos(folder: Path, **devices: Any) -> dict[str, Any]:
    """Two epochs over videos of which some can't be used, in the folder that the test has made."""
    diary = Diary()
    data = VideoFolder(
        str(folder.parent / "videos"), val_fraction=0.3, test_fraction=0.0, num_frames=4, resolution=32, batch_size=1,
        num_workers=1, max_broken=0.7,
    )  # fmt: skip
    trainer(folder, max_steps=8, callbacks=[diary], **devices).fit(tiny_task(), datamodule=data)
    skipped = {split: sorted(names) for split, names in data.skipped.items()}
    return {
        "clips": diary.clips,
        "validated": diary.validated,
        "usable": len(data.dataset("train")),
        "skipped": skipped,
    }


SCENARIOS = {
    f.__name__: f
    for f in (gradients, baselines, skipping, odd_tail, too_few, poisoned, resumed, diffusion, broken_videos)
}

if __name__ == "__main__":
    out = Path(sys.argv[1])
    outcomes = {name: scenario(out / name, devices=2) for name, scenario in SCENARIOS.items()}
    rank = torch.distributed.get_rank()
    (out / f"rank{rank}.json").write_text(json.dumps(outcomes))
    torch.distributed.barrier()
