"""Training of a diffusion model: resumption, sources of latents, refusals."""

import math
import os
import shutil
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from generation import CLASSES, QUIET, SIZES, latent_data, tiny_diffusion, write_latents, write_videos
from lightning.pytorch.callbacks import Callback
from sweeping import Coded, checkpoint
from tiny import Clips, tiny_model, trainer
from torch.optim import Adam

from vidtwin.apply.generator import load_sampler
from vidtwin.apply.options import GenerateOptions
from vidtwin.cli import main
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.diffusion.model import draw_noise
from vidtwin.diffusion.process import DDPM, RectifiedFlow
from vidtwin.diffusion.transformer import TransformerSizes
from vidtwin.errors import UserError
from vidtwin.metrics.frames import psnr
from vidtwin.schedules import WarmupCosine
from vidtwin.storage import checkpoints
from vidtwin.storage.latent_files import Manifest
from vidtwin.training.callbacks.checkpoint import LatestCheckpoint
from vidtwin.training.callbacks.guard import StepGuard
from vidtwin.training.compilation import Compilation
from vidtwin.video import write_video

STEPS = 8  # 6 batches an epoch


@pytest.fixture(scope="module")
def latents(tmp_path_factory) -> Path:
    return write_latents(tmp_path_factory.mktemp("latents"), posterior="moments")


class Diary(Callback):
    """Clips and losses of each batch; with `kill_at` SIGKILL at a step, after its checkpoint."""

    def __init__(self, kill_at: int | None = None) -> None:
        self.kill_at = kill_at
        self.entries: list[tuple[Any, ...]] = []

    def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
        self.entries.append((trainer.global_step, tuple(batch["name"]), float(trainer.callback_metrics["train/loss"])))
        if trainer.global_step == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)


def run(
    folder: Path,
    data: Path,
    kill_at: int | None = None,
    ckpt_path: Path | None = None,
    seed: int = 0,
    extra: Sequence[Callback] = (),
    steps: int = STEPS,
) -> list[tuple[Any, ...]]:
    """Train with everything that draws or counts: samples of posteriors, dropped classes, parts, an average."""
    task = tiny_diffusion(ema_decay=0.9, use_ema=True, accumulation=2)
    diary = Diary(kill_at)
    torch.manual_seed(seed)  # whatever state the process is in
    callbacks = [saved(folder), diary, *extra]
    fit = trainer(folder, steps, callbacks=callbacks, check_val_every_n_epoch=None, val_check_interval=2)
    fit.fit(task, datamodule=latent_data(data, posterior="sample", val_share=0.3), ckpt_path=ckpt_path)
    return diary.entries


def saved(folder: Path) -> LatestCheckpoint:
    return LatestCheckpoint(every_n_steps=1, keep=20, dirpath=str(folder / "checkpoints"))


def state_of(folder: Path) -> dict[str, Any]:
    checkpoint = checkpoints.read(folder / "checkpoints" / "last.ckpt")
    kept = ("state_dict", "optimizer_states", "lr_schedulers", "ema", "training", "global_step", "epoch", "diffusion")
    return {key: checkpoint[key] for key in kept if key in checkpoint}


def assert_equal(ours: Any, theirs: Any, where: str = "") -> None:
    """Nested states are equal bit for bit."""
    if isinstance(ours, dict):
        assert ours.keys() == theirs.keys(), where
        for key in ours:
            assert_equal(ours[key], theirs[key], f"{where}.{key}")
    elif isinstance(ours, list | tuple):
        assert len(ours) == len(theirs), where
        for index, (one, other) in enumerate(zip(ours, theirs, strict=True)):
            assert_equal(one, other, f"{where}[{index}]")
    elif isinstance(ours, torch.Tensor):
        assert torch.equal(ours, theirs), where
    else:
        assert ours == theirs, where


@pytest.fixture(scope="module")
def undisturbed(latents, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    return run(folder, latents), state_of(folder), folder


@pytest.mark.parametrize("end", [1, 4, 6])
def test_a_resumed_training_ends_with_the_same_bits(undisturbed, latents, tmp_path, end):
    """From the checkpoint of a step, as after a kill: in the first epoch, and at the start of another."""
    entries, state, folder = undisturbed
    (tmp_path / "checkpoints").mkdir()
    copy = shutil.copy(checkpoints.step_path(folder / "checkpoints", end), tmp_path / "checkpoints")
    resumed = run(tmp_path, latents, ckpt_path=Path(copy), seed=123)
    assert resumed == entries[end:]
    assert_equal(state_of(tmp_path), state)


def _killed(folder: str, data: str) -> None:
    run(Path(folder), Path(data), kill_at=3)


def test_a_training_that_was_killed_resumes_to_the_same_bits(undisturbed, latents, tmp_path):
    code = f"from generation import *; import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})\n"
    code += "import test_diffusion; test_diffusion._killed(*sys.argv[1:])"
    assert forked.run_code(code, [str(tmp_path), str(latents)], tmp_path / "stderr") == -signal.SIGKILL
    newest = checkpoints.newest(tmp_path / "checkpoints")
    assert newest is not None
    assert checkpoints.step_of(newest.resolve()) in (2, 3)  # the last one may be killed before it is linked
    run(tmp_path, latents, ckpt_path=newest)
    assert_equal(state_of(tmp_path), undisturbed[1])


def test_another_seed_gives_other_bits(undisturbed, latents, tmp_path):
    class OtherSeed(Callback):
        def on_train_start(self, trainer, task):
            task.seed += 1

    entries = run(tmp_path, latents, extra=[OtherSeed()], steps=2)
    assert entries[1][1] == undisturbed[0][1][1]  # the order of the clips is the data's
    assert entries[1][2] != undisturbed[0][1][2]


def test_latents_reach_the_model_with_mean_0_and_standard_deviation_1(latents, tmp_path):
    data = latent_data(latents, batch_size=12)
    task = tiny_diffusion()
    trainer(tmp_path, 1).fit(task, datamodule=data)
    (batch,) = iter(data.train_dataloader())
    data.on_after_batch_transfer(batch, 0)
    state = task.states(batch)
    torch.testing.assert_close(state, task.denoiser.normalize(data.denormalize(batch["latents"])))
    numbers = [torch.Size(shape).numel() for shape in task.origin.latent_shapes.values()]
    parts = state.split(numbers, dim=1)
    for part, shape in zip(parts, task.origin.latent_shapes.values(), strict=True):
        channels = part.unflatten(1, shape).movedim(1, 0).flatten(1)
        torch.testing.assert_close(channels.mean(1), torch.zeros(len(channels)), atol=1e-3, rtol=0)
        torch.testing.assert_close(channels.std(1, correction=0), torch.ones(len(channels)), atol=1e-2, rtol=0)
    unscaled = latent_data(latents, batch_size=12, normalize=False)
    trainer(tmp_path, 1).fit(other := tiny_diffusion(), datamodule=unscaled)
    (batch,) = iter(unscaled.train_dataloader())
    torch.testing.assert_close(other.states(batch), state, atol=1e-4, rtol=1e-4)


def test_the_loss_goes_down_in_a_compiled_training(latents, tmp_path):
    task = tiny_diffusion(process=RectifiedFlow(), gradient_clip_norm=1.0)
    diary = Diary()
    compilation = Compilation(["denoiser"], backend="eager")
    trainer(tmp_path, 60, callbacks=[diary], compilation=compilation).fit(
        task, datamodule=latent_data(latents, batch_size=12)
    )
    losses = [entry[2] for entry in diary.entries]
    assert sum(losses[-10:]) < 0.8 * sum(losses[:10])


def test_codes_are_learned_by_their_embedded_vectors(tmp_path):
    folder = write_latents(tmp_path, model=Coded(frames=8))
    task = tiny_diffusion()
    trainer(tmp_path, 2, callbacks=[saved(tmp_path)]).fit(task, datamodule=latent_data(folder))
    assert task.origin.latent_shapes == {"grid": (3, 8, 8, 8)}
    held = state_of(tmp_path)
    assert held["diffusion"]["latent_shapes"] == {"grid": [3, 8, 8, 8]}
    data = latent_data(folder)
    data.setup("fit")
    value = torch.cat([task.frozen.dequantize({"grid": data.dataset("train")[i]["codes"]["grid"][None]})["grid"]
                       for i in range(len(data.dataset("train")))])  # fmt: skip
    torch.testing.assert_close(task.denoiser.normalize({"grid": value}).mean(), torch.tensor(0.0), atol=1e-3, rtol=0)


def test_codes_of_padded_pictures_are_learned_and_codes_are_sampled(tmp_path, monkeypatch):
    folder = write_latents(tmp_path, model=Coded(pool=5, frames=8))  # 32 px are padded to 35
    task = tiny_diffusion()
    trainer(tmp_path, 1, callbacks=[saved(tmp_path)]).fit(task, datamodule=latent_data(folder))
    assert task.origin.latent_shapes == {"grid": (3, 8, 7, 7)}
    decoded = []
    decode = Coded.decode
    monkeypatch.setattr(Coded, "decode", lambda *given: decoded.append(given[1]["grid"]) or decode(*given))
    begun = []
    monkeypatch.setattr(task, "_begin_step", lambda: begun.append(len(decoded)))
    assert task.draw_samples(1)["Falling 0"].shape == (8, 32, 32, 3)
    assert begun == [0] * 3  # before and after each of two steps of sampling, for CUDA graphs
    options = GenerateOptions(str(tmp_path / "checkpoints" / "last.ckpt"), "unused", accelerator="cpu")
    assert load_sampler(options).sample([1], [0], seed=0)[0].shape == (8, 32, 32, 3)
    assert len(decoded) == 2
    assert all(torch.equal(grid.abs(), torch.full_like(grid, 0.5)) for grid in decoded)


def test_clips_are_encoded_as_they_come_by_a_frozen_autoencoder(tmp_path):
    torch.manual_seed(0)
    model = tiny_model()
    model.save_pretrained(tmp_path / "model")
    write_videos(tmp_path / "videos")
    data = VideoFolder(
        str(tmp_path / "videos"), batch_size=2, num_workers=0, num_frames=4, resolution=32, val_fraction=0.3
    )
    task = tiny_diffusion(autoencoder=str(tmp_path / "model"), posterior="sample")
    trainer(tmp_path, 3, callbacks=[saved(tmp_path)], limit_val_batches=0).fit(task, datamodule=data)
    assert task.origin.classes == list(CLASSES)
    held = state_of(tmp_path)
    assert not any("autoencoder" in name for name in held["state_dict"])
    assert held["diffusion"]["autoencoder"]["checkpoint"] == str(tmp_path / "model")
    for name, value in task.frozen.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])
    assert float(task.denoiser.std.min()) > 0
    assert not torch.equal(task.denoiser.std, torch.ones_like(task.denoiser.std))


def test_a_batch_that_is_not_finite_is_skipped_and_named(latents, tmp_path, capsys):
    class Poison(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            if batch_idx == 1:
                batch["latents"]["structure"][0] = torch.nan
                self.name = batch["name"][0]

    poison, diary = Poison(), Diary()
    task = tiny_diffusion()
    guard = StepGuard()
    trainer(tmp_path, 3, callbacks=[poison, diary, guard]).fit(task, datamodule=latent_data(latents))
    assert (task.batches, task.skipped) == (4, 1)
    error = capsys.readouterr().err
    assert "skipped step 1: loss: total is nan" in error
    assert "(its latents are not finite)" in error
    assert poison.name in error
    assert all(bool(p.isfinite().all()) for p in task.parameters())
    (path,) = guard.dumped
    assert f"vidtwin replay {path}" in error
    lines = trainer(tmp_path / "again").replay(tiny_diffusion(), str(path))
    assert any(f"clip {poison.name}: structure " in line and "are not finite; dynamics from" in line for line in lines)
    assert lines[-1] == "reproduced: loss: total is nan"


@pytest.mark.parametrize("source", ["latents", "clips"])
def test_a_skipped_step_is_run_again_with_its_draws(source, latents, tmp_path):
    """Without the fault its loss is the one that the step would have had."""
    losses = []

    class Fault(Callback):
        def on_train_batch_start(self, trainer, task, batch, batch_idx):
            process, sound = task.process, task.process.loss

            def loss(*given):
                losses.append(sound(*given).mean())
                return sound(*given) * (math.nan if batch_idx == 1 else 1)

            process.loss = loss

        def on_train_batch_end(self, trainer, task, outputs, batch, batch_idx):
            del task.process.loss

    guard = StepGuard()
    data = latent_data(latents, posterior="sample") if source == "latents" else Clips()
    task = tiny_diffusion(autoencoder=str(latents.parent / "model"), posterior="sample")
    trainer(tmp_path, 2, callbacks=[Fault(), guard]).fit(task, data)
    lines = trainer(tmp_path / "again").replay(tiny_diffusion(posterior="sample"), str(guard.dumped[0]))
    assert f"train/total = {float(losses[1]):.6g}" in lines
    assert lines[-1].startswith("not reproduced: all values are finite")


def test_a_training_starts_from_another_ones_weights(undisturbed, tmp_path, capsys):
    """The other training has other classes, clips and depth: classes and latents are matched by name."""
    other = write_latents(tmp_path, names=("Diving", "Rising"))
    task = tiny_diffusion(transformer=TransformerSizes(**SIZES | {"depth": 2}))
    seen = {}

    class Look(Callback):
        def on_train_start(self, trainer, task):
            seen.update({name: value.clone() for name, value in task.denoiser.state_dict().items()})

    last = undisturbed[2] / "checkpoints" / "last.ckpt"
    trainer(tmp_path, 1, callbacks=[Look()]).fit(task, datamodule=latent_data(other), init_from=str(last))
    given = checkpoints.network_weights(checkpoints.read(last), "denoiser.", ema=True)
    same = [name for name in given if name not in ("mean", "std", "transformer.classes.weight")]
    assert all(torch.equal(seen[name], given[name]) for name in same)
    classes, theirs = seen["transformer.classes.weight"], given["transformer.classes.weight"]
    assert torch.equal(classes[1:], theirs[1:])
    assert not torch.equal(classes[0], theirs[0])
    error = capsys.readouterr().err
    assert "averaged" in error
    assert "1 of 2 classes" in error
    assert "fresh: blocks.1." in error
    wide = tiny_diffusion(transformer=TransformerSizes(**SIZES | {"width": 32}))
    with pytest.raises(UserError, match=r"Expected a diffusion model of like sizes in .* got [\d.]+% of the"):
        trainer(tmp_path / "b", 1).fit(wide, datamodule=latent_data(other), init_from=str(last))


def test_latents_of_another_model_are_refused_in_one_line(latents, tmp_path):
    other = write_latents(tmp_path, seed=1)
    trainer(tmp_path, 1, callbacks=[saved(tmp_path)]).fit(tiny_diffusion(), datamodule=latent_data(other))
    last = tmp_path / "checkpoints" / "last.ckpt"
    ours, theirs = (Manifest.read(folder).model["weights_sha256"][:8] for folder in (latents, other))
    message = f"Expected latents of VidTwin {theirs}, which the checkpoint was trained on, got those of VidTwin {ours}"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path, 2).fit(tiny_diffusion(), datamodule=latent_data(latents), ckpt_path=last)
    message = f"Expected latents of VidTwin {ours}, which .*latents holds, got those of VidTwin {theirs}"
    with pytest.raises(UserError, match=message):
        trainer(tmp_path / "b", 1).fit(tiny_diffusion(autoencoder=str(tmp_path / "model")), latent_data(latents))


@pytest.mark.parametrize(
    ("entry", "other", "message"),
    [
        ("num_frames", 8, "clips with a number of frames of 8, which the checkpoint was trained on, got 4"),
        ("size", [32, 64], r"pictures of the size \[32, 64\], .* got \[32, 32\]"),
        ("fps", 25.0, r"clips with frames per second of 25.0, .* got 8.0"),
    ],
)
def test_other_clips_than_the_checkpoints_are_refused(undisturbed, latents, tmp_path, entry, other, message):
    content = checkpoints.read(undisturbed[2] / "checkpoints" / "last.ckpt")
    content["diffusion"][entry] = other
    torch.save(content, tmp_path / "other.ckpt")
    with pytest.raises(UserError, match=f"Expected {message}"):
        trainer(tmp_path, 9).fit(tiny_diffusion(), latent_data(latents), ckpt_path=tmp_path / "other.ckpt")


def test_another_process_than_the_checkpoints_is_refused(undisturbed, latents, tmp_path):
    last = undisturbed[2] / "checkpoints" / "last.ckpt"
    with pytest.raises(UserError, match=r"Expected model\.process as .* with, DDPM of .*, got RectifiedFlow of "):
        trainer(tmp_path, 9).fit(tiny_diffusion(process=RectifiedFlow()), latent_data(latents), ckpt_path=last)


def test_too_few_clips_and_unusable_options_are_refused_in_one_line(latents, tmp_path):
    with pytest.raises(UserError, match=r"Expected at least 40 clips for a batch, got 12; lower data.batch_size"):
        trainer(tmp_path, 1).fit(tiny_diffusion(), datamodule=latent_data(latents, batch_size=40))
    with pytest.raises(UserError, match=r"Expected model.condition_dropout from 0 to 1, got 2"):
        tiny_diffusion(condition_dropout=2.0)
    with pytest.raises(UserError, match=r"Expected a finite model.guidance, got nan"):
        tiny_diffusion(guidance=float("nan"))
    with pytest.raises(UserError, match="divides 1,000"):
        tiny_diffusion(sampling_steps=7)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("process", "steps"),
    [(DDPM(), 600), (RectifiedFlow("v"), 600), (RectifiedFlow("x"), 1500)],
    ids=["ddpm", "v", "x"],
)
def test_eight_clips_are_learned_by_heart(process, steps, tmp_path):
    """A class for each: its sample is that clip above 19 dB; other clips are below 17."""
    random = np.random.default_rng(0)
    for number in range(8):
        coarse = random.integers(30, 226, (2, 4, 4, 3)).astype(np.float32)
        frames = torch.nn.functional.interpolate(
            torch.from_numpy(coarse).permute(3, 0, 1, 2)[None], (8, 32, 32), mode="trilinear"
        )
        write_video(tmp_path / "videos" / f"class{number}" / "v.mp4", to_frames(frames), 8)
    checkpoint(tmp_path / "pool.ckpt", scale=1.0, frames=8)
    given = ["encode", str(tmp_path / "videos"), "--ckpt_path", str(tmp_path / "pool.ckpt"), "--labels", "folders"]
    assert main([*given, "--out", str(tmp_path / "latents"), *QUIET]) == 0
    task = tiny_diffusion(
        process=process,
        transformer=TransformerSizes(depth=2, width=96, heads=4, class_width=32),
        optimizer=lambda p: Adam(p, lr=2e-3),
        scheduler=lambda o: WarmupCosine(o, 20),
        autoencoder=str(tmp_path / "pool.ckpt"),
        gradient_clip_norm=1.0,
    )
    data = latent_data(tmp_path / "latents", batch_size=8)
    trainer(tmp_path, steps).fit(task, datamodule=data)
    clips = data.dataset("train")
    real = {clips[index]["label"]: clips[index]["latents"]["grid"] for index in range(8)}
    labels = torch.arange(8)
    latents = task.denoiser.sample(labels, draw_noise(task.denoiser.numbers, [(0, k) for k in range(8)]), 1.0, 50)
    made = task.frozen.decode(latents, 8, (32, 32))
    target = task.frozen.decode({"grid": torch.stack([real[label] for label in range(8)])}, 8, (32, 32))
    assert float(psnr(made, target).mean(1).min()) > 19
    assert float(psnr(target, target.roll(1, 0)).mean()) < 17


def to_frames(clip: torch.Tensor) -> np.ndarray:
    return clip[0].permute(1, 2, 3, 0).round().to(torch.uint8).numpy()
