"""The training loop: one step is one batch, two players, checkpoints that resume."""

import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.strategies import DDPStrategy
from torch.optim import AdamW
from torch.utils.data import DataLoader

from vidtwin.callbacks.checkpoint import BestCheckpoint, LatestCheckpoint
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.models.vidtwin import VidTwin
from vidtwin.schedules import WarmupCosine
from vidtwin.task import AutoencoderTask
from vidtwin.trainer import VideoTrainer


class Clips(LightningDataModule):
    """Six smooth clips of 4 frames of 32 px, two a batch."""

    def __init__(self) -> None:
        super().__init__()
        coarse = torch.rand(6, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0)) * 2 - 1
        clips = torch.nn.functional.interpolate(coarse, (4, 32, 32), mode="trilinear")
        self.items = [
            {"clip": clip, "label": index, "name": f"clip{index}.avi", "start_frame": 0}
            for index, clip in enumerate(clips)
        ]

    def train_dataloader(self):
        return DataLoader(self.items, batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


class Watcher(Callback):
    """Counts batches and keeps the discriminator's weights before each."""

    def __init__(self) -> None:
        self.batches = 0
        self.steps: list[int] = []
        self.weights: list[torch.Tensor] = []

    def on_train_batch_start(self, trainer, task, batch, batch_idx):
        self.batches += 1
        self.steps.append(trainer.global_step)
        if task.loss.discriminator is not None:
            self.weights.append(next(task.loss.discriminator.parameters()).detach().clone())


def tiny_model(**arguments) -> VidTwin:
    sizes = {"num_frames": 4, "resolution": 32, "patch_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2}
    sizes |= {"num_queries": 2, "structure_width": 8, "query_size": 16, "qformer_depth": 1, "qformer_heads": 2}
    return VidTwin(**{**sizes, "qformer_intermediate_size": 16, **arguments})


def tiny_task(gan_start: int | None = None, warmup_steps: int = 2, **arguments) -> AutoencoderTask:
    torch.manual_seed(0)
    gan = {} if gan_start is None else {"discriminator": PatchDiscriminator2d(channels=4, num_layers=1)}
    loss = AutoencoderLoss(perceptual_weight=0, adversarial_start=gan_start or 0, **gan)
    return AutoencoderTask(
        tiny_model(),
        loss,
        optimizer=lambda p: AdamW(p, lr=1e-3),
        scheduler=lambda o: WarmupCosine(o, warmup_steps),
        discriminator_optimizer=lambda p: AdamW(p, lr=1e-3),
        discriminator_scheduler=lambda o: WarmupCosine(o, warmup_steps),
        **arguments,
    )


def trainer(folder: Path, max_steps: int = 7, **arguments) -> VideoTrainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return VideoTrainer(
        **{"accelerator": "cpu", "max_steps": max_steps, "default_root_dir": folder, **quiet, **arguments}
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Seven steps with a GAN from step 3 on: folder, watcher, trainer and task."""
    folder = tmp_path_factory.mktemp("trained")
    watcher = Watcher()
    saved = LatestCheckpoint(every_n_steps=5, dirpath=str(folder / "checkpoints"))
    run = trainer(folder, callbacks=[watcher, saved, BestCheckpoint(dirpath=str(folder / "checkpoints"))])
    task = tiny_task(gan_start=3)
    run.fit(task, Clips())
    return folder, watcher, run, task


def test_one_step_is_one_batch_with_two_optimizers(trained):
    _, watcher, run, task = trained
    assert run.global_step == watcher.batches == 7
    assert watcher.steps == [0, 1, 2, 3, 4, 5, 6]
    assert [s.last_epoch for s in task.lr_schedulers()] == [7, 7]


def test_the_discriminator_first_moves_in_the_batch_where_the_gan_starts(trained):
    _, watcher, _, _ = trained
    moved = [not torch.equal(a, b) for a, b in zip(watcher.weights, watcher.weights[1:], strict=False)]
    assert moved == [False, False, False, True, True, True]


def test_the_last_and_the_best_checkpoint_stay(trained):
    folder, _, _, task = trained
    assert sorted(p.name for p in (folder / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    last = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 7  # not a multiple of 5: written when training ended
    assert last["model_spec"]["init_args"]["hidden_size"] == 32
    assert torch.equal(last["state_dict"]["autoencoder.decoder.linear.weight"], task.autoencoder.last_layer)


def test_a_resumed_run_counts_and_schedules_on(trained, tmp_path):
    folder, *_ = trained
    watcher = Watcher()
    run = trainer(tmp_path, max_steps=10, callbacks=[watcher])
    task = tiny_task(gan_start=3)
    run.fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")
    assert watcher.steps == [7, 8, 9]
    # The cosine now ends at step 10: at 9 it is in its last eighth, not at the 0 where the first run's ended.
    rates = [float(run.callback_metrics["lr/generator"]), float(task.optimizers()[0].param_groups[0]["lr"])]
    assert rates == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * 7 / 8)), 0.0])


def test_testing_takes_the_autoencoder_alone_from_a_checkpoint_with_a_gan(trained, tmp_path):
    folder, _, _, original = trained
    task = tiny_task()
    trainer(tmp_path).test(
        task,
        datamodule=Clips(),
        ckpt_path=folder / "checkpoints" / "last.ckpt",
        results_dir=str(tmp_path / "results"),
        verbose=False,
    )
    assert torch.equal(task.autoencoder.last_layer, original.autoencoder.last_layer)


def test_a_checkpoint_of_another_size_is_named_tensor_by_tensor(trained, tmp_path):
    folder, *_ = trained
    task = tiny_task()
    task.autoencoder = tiny_model(hidden_size=48)
    with pytest.raises(UserError, match=r"another model or size: .* is \(.*\), expected \("):
        trainer(tmp_path).fit(task, Clips(), ckpt_path=folder / "checkpoints" / "last.ckpt")


@pytest.mark.parametrize(
    ("arguments", "task_arguments", "message"),
    [
        ({}, {"warmup_steps": 7}, "warmup_steps=7 and 7 steps"),
        ({}, {"gan_start": 7}, "adversarial_start=7 and trainer.max_steps=7"),
        ({"max_steps": -1, "max_epochs": 1}, {}, "max_steps above 0, got -1"),
    ],
)
def test_what_cannot_work_is_refused_before_the_first_step(tmp_path, arguments, task_arguments, message):
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, **arguments).fit(tiny_task(**task_arguments), Clips())


def test_fp16_is_refused(monkeypatch):
    # Lightning itself turns 16-mixed into bf16-mixed on CPU, so no run here can show it.
    monkeypatch.setattr(AutoencoderTask, "trainer", SimpleNamespace(precision="16-mixed"))
    with pytest.raises(UserError, match=r"Expected trainer\.precision bf16-mixed .* got 16-mixed"):
        tiny_task()._check_precision()


def test_missing_lpips_weights_stop_training_but_not_testing(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDTWIN_OFFLINE", "1")
    absent = str(tmp_path / "vgg16.pth")
    task = tiny_task()
    task.loss = AutoencoderLoss(perceptual_backbone=absent)
    with pytest.raises(UserError, match=r"vgg16\.pth.*perceptual_weight 0"):
        trainer(tmp_path).fit(task, Clips())
    trainer(tmp_path).test(task, datamodule=Clips(), results_dir=str(tmp_path / "results"), verbose=False)


def test_gradient_clipping_bounds_each_players_gradient(tmp_path):
    norms: list[float] = []

    class Norms(Callback):
        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            norms.append(float(trainer.callback_metrics["train/gradient_norm"]))

    free, clipped = [], []
    for limit, kept in ((None, free), (1e-6, clipped)):
        task = tiny_task(gradient_clip_norm=limit)
        before = task.autoencoder.last_layer.detach().clone()
        task.optimizer = lambda p: torch.optim.SGD(p, lr=1.0)
        trainer(tmp_path, max_steps=3, callbacks=[Norms()]).fit(task, Clips())
        kept.append(float((task.autoencoder.last_layer.detach() - before).norm()))
    assert min(norms) > 1e-6  # what is logged is the norm before the clip
    assert clipped[0] <= 2e-6 * 1.01  # two steps with a rate above 0 (the first of the warm-up has none)
    assert free[0] > 100 * clipped[0]


def test_bf16_trains_with_finite_losses(tmp_path):
    run = trainer(tmp_path, max_steps=4, precision="bf16-mixed")
    run.fit(tiny_task(gan_start=2), Clips())
    losses = [run.callback_metrics[name] for name in ("train/loss", "discriminator/loss", "val/psnr")]
    assert all(value.isfinite() for value in losses)


def test_training_lowers_the_error(tmp_path):
    task = tiny_task(warmup_steps=2)
    clip = torch.stack([item["clip"] for item in Clips().items])
    with torch.no_grad():
        before = (task.autoencoder.eval()(clip).clip - clip).abs().mean()
    trainer(tmp_path, max_steps=40).fit(task.train(), Clips())
    with torch.no_grad():
        after = (task.autoencoder.eval()(clip).clip - clip).abs().mean()
    assert after < 0.7 * before


def test_several_devices_look_for_parameters_without_a_gradient(tmp_path):
    run = trainer(tmp_path, devices=2)
    assert run.strategy._ddp_kwargs["find_unused_parameters"] is True
    assert trainer(tmp_path, devices=2, strategy="ddp").strategy._ddp_kwargs["find_unused_parameters"] is True
    chosen = DDPStrategy(find_unused_parameters=False)  # a strategy object is the user's own
    assert trainer(tmp_path, devices=2, strategy=chosen).strategy._ddp_kwargs["find_unused_parameters"] is False
