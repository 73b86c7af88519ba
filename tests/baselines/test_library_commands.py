"""Adapters of diffusers and transformers in commands on real clips: latents on disk, a kill, two ranks."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
from library_models import CONFIGS, TINY, tiny
from sweeping import checkpoint

from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.storage import checkpoints
from vidtwin.video import VideoWriter, iter_frames, write_video
from vidtwin.video.convert import to_uint8


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_cogvideox_passes_fit_test_and_reconstruct_on_real_clips(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, clip in (("train", "bikes.mp4"), ("test", "carphone_pristine.mp4")):
        (tmp_path / "videos" / split).mkdir(parents=True)
        (tmp_path / "videos" / split / clip).symlink_to(shared / "data" / "clips" / clip)
    arguments = {
        f"--model.autoencoder.arguments.{key}={json.dumps(value)}" for key, value in TINY["cogvideox"][0].items()
    }
    data = ["--data=folder", "--data.root=videos", "--data.splits={train: train, val: test, test: test}"]
    data += ["--data.resolution=16", "--data.num_frames=12", "--data.batch_size=1", "--data.num_workers=0"]
    trainer = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    trainer += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false"]
    options = ["--config", str(CONFIGS / "cogvideox.yaml"), *sorted(arguments), *data]
    loss = ["--model.loss.perceptual_weight=0", "--model.scheduler.init_args.warmup_steps=0"]
    assert main(["fit", *options, *trainer, *loss, "--trainer.enable_model_summary=false"]) == 0
    (last,) = tmp_path.rglob("last.ckpt")
    quick = ["--trainer.accelerator=cpu", "--name=row", "--downstream=false", "--players=0"]
    assert main(["test", "--ckpt_path", str(last), *data, *quick]) == 0
    row = json.loads(Path("results/rows/row/results.json").read_text())
    assert row["kind"] == "trained"
    assert row["latents"]["latent"]["shape"] == [2, 4, 4, 4]  # 12 frames are padded to 16
    assert row["compression_rate"] == pytest.approx(2 * 4 * 4 * 4 / (3 * 12 * 16 * 16))
    assert min(row["cost"]["flops"].values()) > 0
    video = str(shared / "data" / "clips" / "carphone_pristine.mp4")
    assert main(["reconstruct", video, "--ckpt_path", str(last), "--accelerator=cpu"]) == 0


COMMANDED = ("cogvideox", "emu3")  # with a Gaussian, with codes


@pytest.mark.parametrize("name", COMMANDED)
def test_latents_on_disk_give_the_models_clip(name, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    video = tmp_path / "small.mp4"
    write_video(video, [frame[:32, :32] for frame in iter_frames(shared / "data" / "clips" / "mobile_cif_30f.mp4")], 30)
    model, length = tiny(name), tiny(name).temporal.usual_length
    ckpt = checkpoint(tmp_path / "model.ckpt", model=model)
    written: list[np.ndarray] = []

    class Recorder(VideoWriter):
        def write(self, picture: np.ndarray, time: Any = None) -> None:
            written.append(picture)
            super().write(picture, time)

    monkeypatch.setattr("vidtwin.apply.latent_reader.VideoWriter", Recorder)
    quiet = ["--accelerator", "cpu", "--progress", "false"]
    assert main(["encode", str(video), "--out", "latents", "--ckpt_path", ckpt, *quiet]) == 0
    assert main(["decode", "latents", "--out", "decoded", *quiet]) == 0
    frames = np.stack(list(iter_frames(video)))
    padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % length, 0)])
    with torch.no_grad():
        made = model(as_clip(list(padded.reshape(-1, length, *frames.shape[1:])), model.space)).clip
    wanted = np.concatenate([to_uint8(each) for each in made])[: len(frames), : frames.shape[1], : frames.shape[2]]
    apart = np.abs(np.stack(written).astype(int) - wanted)
    assert apart.max() <= (0 if name == "emu3" else 1)
    assert apart.mean() < 0.01


@pytest.fixture
def videos(shared, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train = ("bikes.mp4", "mma_demo.mp4", "foreman_cif_openh264.mp4", "mobile_cif_30f.mp4")
    for split, names in (("train", train), ("test", ("carphone_pristine.mp4", "v_BaseballPitch_g01_c01.avi"))):
        (tmp_path / "videos" / split).mkdir(parents=True)
        for name in names:
            (tmp_path / "videos" / split / name).symlink_to(shared / "data" / "clips" / name)
    saves = "vidtwin.training.callbacks.checkpoint.LatestCheckpoint"
    callback = {"class_path": saves, "init_args": {"every_n_steps": 1, "keep": 9}}
    (tmp_path / "saves.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    return tmp_path


def fit_options(name: str, run: str, *words: str) -> list[str]:
    """Return the words of a fit of four steps, a checkpoint each."""
    arguments = [f"--model.autoencoder.arguments.{key}={json.dumps(value)}" for key, value in TINY[name][0].items()]
    data = ["--data=folder", "--data.root=videos", "--data.splits={train: train, val: test, test: test}"]
    data += ["--data.resolution=16", "--data.num_frames=8", "--data.batch_size=1", "--data.num_workers=0"]
    trainer = ["--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.num_sanity_val_steps=0"]
    trainer += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    model = ["--model.loss.perceptual_weight=0", "--model.scheduler.init_args.warmup_steps=0"]
    configs = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", "saves.yaml"]
    return [
        "fit",
        *configs,
        *sorted(arguments),
        *data,
        *trainer,
        *model,
        f"--trainer.logger.init_args.name={run}",
        *words,
    ]


def read_run(run: str, step: int = 4) -> dict[str, torch.Tensor]:
    """Read the weights of a run after a step, and the averaged ones."""
    (path,) = Path("runs").glob(f"{run}/**/step-{step:08d}.ckpt")
    saved = checkpoints.read(path)
    return saved["state_dict"] | {f"ema.{name}": value for name, value in saved["ema"]["values"].items()}


def fit(options: Sequence[str]) -> None:
    assert main(options) == 0


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path

def kill():
    while not list(Path("runs").glob("killed/**/step-00000002.ckpt")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
from vidtwin.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDED)
def test_a_killed_training_resumes_bit_for_bit(name, videos):
    one = "--trainer.devices=1"
    fit(fit_options(name, "straight", one))
    assert forked.run_code(KILLED, fit_options(name, "killed", one), videos / "stderr", timeout=240) == -9
    fit(fit_options(name, "killed", one, "--resume=auto"))
    straight, resumed = read_run("straight"), read_run("killed")
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


@pytest.mark.slow
def test_two_ranks_train_emu3_as_one_does_with_their_clips(videos):
    """No posterior is sampled, so that ranks draw nothing; by SGD the weights move by the gradient."""
    sgd = "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}"
    forked.run_ranks(fit, fit_options("emu3", "two", sgd, "--trainer.devices=2"), stderr=videos / "stderr")
    fit(fit_options("emu3", "one", sgd, "--trainer.devices=1", "--data.batch_size=2"))
    moves = []
    for run in ("two", "one"):
        first, last = read_run(run, 3), read_run(run)
        moves.append(torch.cat([(last[key] - first[key]).double().flatten() for key in sorted(last)]))
    assert moves[1].norm() > 0
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[1].norm()


@pytest.mark.slow
def test_two_ranks_train_cogvideox(videos):
    forked.run_ranks(fit, fit_options("cogvideox", "two", "--trainer.devices=2"), stderr=videos / "stderr")
    assert all(value.isfinite().all() for value in read_run("two").values())
