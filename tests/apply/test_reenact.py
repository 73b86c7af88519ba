"""`vidtwin reenact`: crossings are decoded from two videos' latents, files have the motion's times, refusals."""

import json
import re
import shlex
import shutil
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sweeping import Two, checkpoint
from tiny import BASELINES, tiny_model

from vidtwin import plugins
from vidtwin.apply import reenact
from vidtwin.apply.reenact import blend_latents
from vidtwin.cli import main
from vidtwin.posteriors import DiagonalGaussian, Encoding
from vidtwin.video import iter_frames, probe, write_video
from vidtwin.video.convert import to_uint8

FRAMES, SIDE = 16, 32
A_FIRST, B_FIRST = "a_structure__b_dynamics", "b_structure__a_dynamics"


def moving(length, seed, height=40, width=56):
    """A pattern that is shifted by a pixel a frame."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    picture = np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))
    return [np.roll(picture, shift, axis=1) for shift in range(length)]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tiny_model(num_frames=FRAMES).eval()


@pytest.fixture(scope="module")
def place(tmp_path_factory, model):
    """Checkpoints; a video of 40 frames and one of 21 at another rate, others that are refused or damaged."""
    folder = tmp_path_factory.mktemp("reenact")
    checkpoint(folder / "vidtwin.ckpt", model=model)
    checkpoint(folder / "two.ckpt", model=Two(frames=8))
    torch.manual_seed(0)
    quantized = plugins.load("ivideogpt", "vidtwin.autoencoders")(**BASELINES["ivideogpt"])
    checkpoint(folder / "ivideogpt.ckpt", model=quantized)
    write_video(folder / "a.mp4", moving(40, 0), 25)
    write_video(folder / "b.mp4", moving(21, 1), 10)
    write_video(folder / "other" / "a.mp4", moving(5, 2, height=64, width=64), 25)
    (folder / "text.mp4").write_text("no video")
    whole = write_video(folder / "whole.avi", moving(60, seed=2, height=64, width=96), 25, "mpeg4").read_bytes()
    (folder / "half.avi").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """Pictures as they go to each file's encoder, with their times."""
    found = {}

    def record(writer, frames, at):
        pictures, times = found.setdefault(writer.path.stem, ([], []))
        pictures.extend(frames)
        times.extend(at)
        original(writer, frames, at)

    original = reenact.write_frames
    monkeypatch.setattr(reenact, "write_frames", record)
    return found


def run(place, out, *arguments, weights="vidtwin.ckpt"):
    words = ["reenact", *map(str, arguments), "--out", str(out), "--ckpt_path", str(place / weights)]
    return main([*words, "--accelerator", "cpu"])


def crossed(place, out, *arguments):
    return run(place, out, "--structure", place / "a.mp4", "--dynamics", place / "b.mp4", *arguments)


def windows(path, length):
    """Clips (1, 3, 16, 32, 32) of the first `length` frames; the last frame of the video fills the last one up."""
    frames = list(iter_frames(path, SIDE))
    for start in range(0, length, FRAMES):
        window = frames[start : start + FRAMES]
        filled = np.stack(window + [window[-1]] * (FRAMES - len(window)))
        yield torch.from_numpy(filled).permute(3, 0, 1, 2)[None] / 127.5 - 1


@torch.no_grad()
def naive(model, place, mix, length=21):
    """Frames that are decoded of `mix(latents of a, latents of b)`."""
    frames = []
    for a, b in zip(windows(place / "a.mp4", length), windows(place / "b.mp4", length), strict=True):
        frames += list(to_uint8(model.decode(mix(model.encode(a).mode(), model.encode(b).mode()))[0]))
    return np.stack(frames[:length]).astype(int)


def test_crossings_are_decoded_from_one_latent_of_each_video(place, model, recorded, tmp_path, capsys):
    assert crossed(place, tmp_path) == 0
    expected = {
        A_FIRST: naive(model, place, lambda a, b: {**a, "dynamics": b["dynamics"]}),
        B_FIRST: naive(model, place, lambda a, b: {**b, "dynamics": a["dynamics"]}),
    }
    for name, frames in expected.items():
        shown = np.stack(recorded[name][0]).astype(int)
        assert shown.shape == (21, SIDE, SIDE, 3)
        assert abs(shown - frames).max() <= 1, name
    assert "structure of A, dynamics of B" in capsys.readouterr().out


def test_files_have_the_frames_of_the_shorter_video_at_the_rate_of_the_motions_video(place, recorded, tmp_path):
    assert crossed(place, tmp_path) == 0
    rates = {A_FIRST: 10, B_FIRST: 25, "grid": 10, "interpolation": 10}
    assert {path.name for path in tmp_path.iterdir()} == {
        *(f"{name}.mp4" for name in rates),
        "grid.png",
        "interpolation.png",
        "reenact.json",
    }
    for name, rate in rates.items():
        assert recorded[name][1] == [Fraction(k, rate) for k in range(21)]
        assert probe(tmp_path / f"{name}.mp4").fps == rate
        assert len(list(iter_frames(tmp_path / f"{name}.mp4"))) == 21


def test_a_is_the_video_of_the_models_first_latent_in_whichever_order_options_come(place, tmp_path):
    assert (
        run(place, tmp_path, f"--dynamics={place / 'b.mp4'}", "--structure", place / "a.mp4", "--max_windows", 1) == 0
    )
    assert (tmp_path / f"{A_FIRST}.mp4").exists()
    content = json.loads((tmp_path / "reenact.json").read_text())
    assert (content["a"], content["b"]) == (str(place / "a.mp4"), str(place / "b.mp4"))
    assert content["num_frames"] == FRAMES


def test_measures_are_those_of_the_views(place, model, tmp_path):
    assert crossed(place, tmp_path) == 0
    content = json.loads((tmp_path / "reenact.json").read_text())
    frames = {
        "reconstruction A": naive(model, place, lambda a, b: a),
        "reconstruction B": naive(model, place, lambda a, b: b),
        "structure of A, dynamics of B": naive(model, place, lambda a, b: {**a, "dynamics": b["dynamics"]}),
        "structure of B, dynamics of A": naive(model, place, lambda a, b: {**b, "dynamics": a["dynamics"]}),
    }
    assert list(content["views"]) == ["input A", "input B", *frames]
    inputs = {name: np.stack(list(iter_frames(place / f"{name}.mp4", SIDE))[:21]).astype(int) for name in "ab"}
    for name, shown in (frames | {"input A": inputs["a"], "input B": inputs["b"]}).items():
        steps = [abs(shown[k] - shown[k - 1]).mean() for k in range(1, 21) if k % FRAMES]
        assert content["views"][name]["change"] == pytest.approx(np.mean(steps), abs=0.02)
    for name, shown in frames.items():
        for letter, target in inputs.items():
            errors = ((shown - target) ** 2).mean(axis=(1, 2, 3))
            value = np.mean(10 * np.log10(255**2 / errors))
            assert content["views"][name][f"psnr_{letter}"] == pytest.approx(value, abs=0.01)


def test_interpolation_goes_from_a_to_b_in_rows_of_all_latents_and_of_each(place, model, recorded, tmp_path):
    assert crossed(place, tmp_path, "--steps", 3, "--max_windows", 1) == 0
    picture = np.asarray(recorded["interpolation"][0][FRAMES // 2])
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "interpolation.png")), picture)
    scale, side = 4, 128
    height = (len(picture) - 3 * side) // 3
    title = next(h for h in range(10, height + 1) if np.ptp(picture[h, :side]) and h % 16 == 0)

    def half(a, b):
        return {name: (a[name] + b[name]) / 2 for name in a}

    mixes = {
        (0, 0): lambda a, b: a,
        (0, 1): half,
        (0, 2): lambda a, b: b,
        (1, 0): lambda a, b: a,
        (1, 1): lambda a, b: {**a, "structure": half(a, b)["structure"]},
        (1, 2): lambda a, b: {**a, "structure": b["structure"]},
        (2, 1): lambda a, b: {**a, "dynamics": half(a, b)["dynamics"]},
        (2, 2): lambda a, b: {**a, "dynamics": b["dynamics"]},
    }
    for (row, column), mix in mixes.items():
        top, left = row * (title + side) + title, column * side
        shown = picture[top : top + side : scale, left : left + side : scale].astype(int)
        assert abs(shown - naive(model, place, mix, FRAMES)[FRAMES // 2]).max() <= 1, (row, column)


def test_ends_of_a_blend_are_the_latents_and_between_them_lie_the_means_of_gaussians():
    first, second = (Encoding(z=DiagonalGaussian(torch.randn(1, 5), torch.randn(1, 5))) for _ in range(2))
    assert blend_latents([first, second], (0.0,))["z"] is first["z"].mean
    assert blend_latents([first, second], (1.0,))["z"] is second["z"].mean
    between = blend_latents([first, second], (0.25,))["z"]
    torch.testing.assert_close(between, 0.75 * first["z"].mean + 0.25 * second["z"].mean)


def test_vectors_between_codes_are_decoded_and_reported(place, tmp_path, capsys):
    videos = ["--context", place / "a.mp4", "--dynamics", place / "b.mp4", "--max_windows", 1]
    assert run(place, tmp_path, *videos, weights="ivideogpt.ckpt") == 0
    assert "context and dynamics are entries of codebooks" in capsys.readouterr().out
    assert json.loads((tmp_path / "reenact.json").read_text())["between_codes"] == ["context", "dynamics"]
    assert (tmp_path / "a_context__b_dynamics.mp4").exists()


def test_a_damaged_video_is_used_up_to_its_damage_and_named(place, tmp_path, capsys):
    assert run(place, tmp_path, "--structure", place / "half.avi", "--dynamics", place / "a.mp4") == 1
    assert "half.avi" in capsys.readouterr().err
    number = json.loads((tmp_path / "reenact.json").read_text())["num_frames"]
    assert number == len(list(iter_frames(tmp_path / "half_structure__a_dynamics.mp4")))
    assert 10 < number < 40


def test_videos_of_one_name_are_distinguished_by_their_folders(place, tmp_path):
    videos = ["--structure", place / "a.mp4", "--dynamics", place / "other" / "a.mp4"]
    assert run(place, tmp_path, *videos) == 0
    assert (tmp_path / f"{place.name}_a_structure__other_a_dynamics.mp4").exists()


def test_a_model_of_any_size_wants_videos_of_one_size(place, tmp_path, capsys):
    videos = ["--still", place / "b.mp4", "--moving", place / "other" / "a.mp4"]
    assert run(place, tmp_path, *videos, weights="two.ckpt") == 2
    told = capsys.readouterr().err
    assert "56x40 and 64x64" in told
    assert "--size" in told
    assert not list(tmp_path.glob("*.mp4"))
    assert run(place, tmp_path, *videos, "--size", 32, weights="two.ckpt") == 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--structure", "a.mp4"], "got only --structure"),
        ([], "got none"),
        (["--content", "a.mp4", "--motion", "b.mp4"], "--structure VIDEO --dynamics VIDEO for VidTwin, got --content"),
        (["--structure", "a.mp4", "--dynamic", "b.mp4"], "got --dynamic; did you mean 'dynamics'?"),
        (["--structure", "a.mp4", "--dynamics", "a.mp4"], "from two videos, got 1"),
        (["--structure", "a.mp4", "--structure", "b.mp4"], "--structure once"),
        (["--structure", "a.mp4", "--dynamics"], "a video after --dynamics, got none"),
        (["--structure", "a.mp4", "--dynamics", "missing.mp4"], "missing.mp4"),
        (["--structure", "a.mp4", "--dynamics", "text.mp4"], "text.mp4"),
        (["--structure", "a.mp4", "--dynamics", "other/.."], "one video for --dynamics"),
        (["--structure", "a.mp4", "--dynamics", "b.mp4", "--steps", "1"], "--steps of at least 2"),
        (["--structure", "a.mp4", "--dynamics", "b.mp4", "--size", "64"], "--size 32"),
    ],
)
def test_invalid_pairs_are_refused_in_one_line(place, tmp_path, capsys, monkeypatch, arguments, told):
    monkeypatch.chdir(place)
    assert run(place, tmp_path / "out", *arguments) == 2
    line = capsys.readouterr().err
    assert told in line
    assert line.count("\n") == 1
    assert not list(tmp_path.rglob("*.*"))


def test_outputs_are_replaced_only_when_asked(place, tmp_path, capsys):
    assert crossed(place, tmp_path, "--max_windows", 1) == 0
    assert crossed(place, tmp_path, "--max_windows", 1) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert crossed(place, tmp_path, "--max_windows", 1, "--overwrite") == 0


def test_the_pages_commands_run(place, model, tmp_path, monkeypatch):
    root = Path(__file__).resolve().parents[2]
    page = (root / "docs" / "latents_apart.md").read_text()
    commands = re.findall(r"^    vidtwin (.+)$", page, re.MULTILINE)
    assert [command.split()[0] for command in commands] == ["decouple", "reenact", "reenact"]
    monkeypatch.chdir(tmp_path)
    for name in "ab":
        shutil.copy(place / f"{name}.mp4", tmp_path)
    checkpoint(tmp_path / "runs/vidtwin/checkpoints/last.ckpt", model=model)
    cmd = plugins.load("cmd", "vidtwin.autoencoders")(**BASELINES["cmd"])
    checkpoint(tmp_path / "runs/cmd/checkpoints/last.ckpt", model=cmd)
    for command in commands:
        assert main([*shlex.split(command), "--accelerator", "cpu", "--max_windows", "1"]) == 0
    written = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("*/*.*")}
    crossed = [
        name for name in re.findall(r"`([\w.]+\.(?:mp4|png|json))`", page) if not name.startswith(("foreman", "v_"))
    ]
    assert written >= {f"crossed/{name}" for name in crossed}
    assert written >= {"decoupled/a.mp4", "decoupled/a.png", "decoupled/decouple.csv", "decoupled/decouple.json"}
    assert "crossed_cmd/a_content__b_motion.mp4" in written
    for picture in re.findall(r"\(images/([\w.]+)\)", page):
        assert (root / "docs" / "images" / picture).is_file()
