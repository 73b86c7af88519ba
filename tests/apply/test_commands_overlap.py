"""Commands that overlap their steps write the bytes of one step after the other, and end cleanly."""

import signal
import threading
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sweeping import Interruption, Two, checkpoint

from vidtwin import weights
from vidtwin.apply import pipeline
from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.storage.checkpoints import load_autoencoder
from vidtwin.storage.latent_files import Manifest, Shard, shard_path
from vidtwin.video import iter_frames, write_video

LENGTH = 8
QUIET = ("--accelerator", "cpu", "--progress", "false")
CROSSED = ("--still", "videos/a.mp4", "--moving", "videos/d.mp4", "--steps", "2")


def moving(count: int, seed: int, height: int = 32, width: int = 48) -> np.ndarray:
    coarse = torch.rand(1, 3, 5, 9, generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.interpolate(coarse, (height, width + count), mode="bilinear")[0]
    frames = [wide[:, :, k : k + width].permute(1, 2, 0) for k in range(count)]
    return (torch.stack(frames) * 255).round().to(torch.uint8).numpy()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Iterator[Path]:
    """Videos of 20, 3, 0 (damaged) and 30 frames, and a model of two latents for clips of 8 frames."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "two.ckpt", model=Two(frames=LENGTH), scale=1.0)
    write_video("videos/a.mp4", moving(20, 0), 25)
    write_video("videos/b.mp4", moving(3, 1), Fraction(30000, 1001))
    Path("videos/c.mp4").write_text("no video")
    write_video("videos/d.mp4", moving(30, 2), 25)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path
    torch.set_num_threads(threads)
    monkeypatch.setattr(Interruption, "after", None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(pipeline.THREADS)]


def run(command: str, *words: str, out: str = "out") -> int:
    return main([command, *words, "--out", out, "--ckpt_path", "two.ckpt", *QUIET])


def contents(folder: str) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if path.name != ".lock"}


def one_after_the_other(jobs: Any, read: Any, compute: Any, write: Any, **_: Any) -> None:
    for job in jobs:
        if write(job, map(compute, read(job))) is False:
            return


@pytest.mark.parametrize(
    "words",
    [
        ("reconstruct", "videos", "--batch_size", "2", "--side_by_side"),
        ("reconstruct", "videos", "--tile", "--tile_size", "16"),
        ("decouple", "videos", "--batch_size", "2"),
        ("encode", "videos", "--batch_size", "2", "--clips_per_shard", "3"),
        ("decode", "latents", "--batch_size", "2"),
        ("reenact", *CROSSED, "--size", "32", "--batch_size", "2"),
    ],
)
def test_outputs_are_those_of_one_step_after_the_other(here, monkeypatch, words):
    if words[0] == "decode":
        assert run("encode", "videos", out="latents") == 1
    codes = []
    for out in ("overlapping", "serial"):
        codes.append(run(*words, out="out"))
        Path("out").rename(out)
        monkeypatch.setattr(pipeline, "run", one_after_the_other)
    assert codes[0] == codes[1]
    assert len(contents("serial")) > 2
    assert contents("overlapping") == contents("serial")


@pytest.mark.parametrize("words", [("decouple", "videos/a.mp4"), ("reenact", *CROSSED)])
def test_windows_that_are_decoded_together_are_those_that_are_decoded_alone(here, words):
    run(*words, out="one")
    run(*words, "--batch_size", "3", out="three")
    videos = sorted(path.name for path in Path("one").glob("*.mp4"))
    assert videos
    assert videos == sorted(path.name for path in Path("three").glob("*.mp4"))
    for name in videos:
        one, three = (np.stack(list(iter_frames(Path(out, name)))).astype(int) for out in ("one", "three"))
        assert one.shape == three.shape
        assert np.abs(one - three).mean() < 0.1  # sums may be taken in another order


class SignalError(Exception):
    def __init__(self) -> None:
        signal.raise_signal(signal.SIGTERM)  # the handler raises from here


@pytest.mark.parametrize(("error", "code"), [(KeyboardInterrupt, 130), (SignalError, 143)])
def test_an_interrupted_command_keeps_whole_files_and_leaves_nothing_else(here, monkeypatch, error, code):
    monkeypatch.setattr(Interruption, "error", error)
    monkeypatch.setattr(Interruption, "after", 5)  # in the second window of the last video
    before = signal.getsignal(signal.SIGTERM)
    assert run("reconstruct", "videos") == code
    assert signal.getsignal(signal.SIGTERM) is before
    assert sorted(contents("out")) == ["a.mp4", "b.mp4", "reconstructions.csv"]
    monkeypatch.setattr(Interruption, "after", None)
    assert run("reconstruct", "videos", "--skip_existing") == 1
    assert "d.mp4" in contents("out")


def test_double_precision_gives_the_numbers_of_the_model_in_doubles(here):
    assert run("encode", "videos/a.mp4", "--precision", "64-true", "--size", "32", out="latents") == 0
    manifest = Manifest.read("latents")
    assert manifest.settings["precision"] == "64-true"
    stored = weights.sha256(load_autoencoder("two.ckpt").state_dict())
    assert manifest.model["weights_sha256"] == stored  # in single precision
    frames = np.stack(list(iter_frames("videos/a.mp4", 32)))[:LENGTH]
    with torch.no_grad():
        wanted = load_autoencoder("two.ckpt").double().encode(as_clip([frames]).double()).mode()
    shard = Shard(shard_path("latents", 0), manifest.digest)
    for name in ("still", "moving"):
        assert torch.equal(shard.rows(0, name, 0, 1), wanted[name].float())
    assert run("decode", "latents", "--precision", "64-true") == 0
    assert run("encode", "videos/a.mp4", "--size", "32", out="latents") == 2  # other latents
