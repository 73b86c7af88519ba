"""`vidtwin decouple`: views, measures and files against a naive version."""

import csv
import json
import os
import shutil
from fractions import Fraction

import av
import numpy as np
import pytest
import torch
from PIL import Image
from skimage.metrics import peak_signal_noise_ratio
from sweeping import Pool, checkpoint
from tiny import tiny_model

from vidtwin.apply import outputs
from vidtwin.cli import main
from vidtwin.video import iter_frames, probe, write_video
from vidtwin.video.convert import to_uint8

VIEWS = ["input", "reconstruction", "structure only", "dynamics only"]
FRAMES, SIDE, SCALE = 16, 32, 4  # SCALE: small views are shown enlarged to 128 pixels


def moving(length, seed=0, height=40, width=56):
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
    """A checkpoint of a model that takes exactly 16 frames, and videos."""
    folder = tmp_path_factory.mktemp("decouple")
    checkpoint(folder / "model.ckpt", model=model)
    write_video(folder / "long.mp4", moving(40), Fraction(30000, 1001))
    write_video(folder / "single.mp4", moving(1), 25)
    (folder / "text.mp4").write_text("no video")
    whole = write_video(folder / "whole.avi", moving(60, seed=2, height=64, width=96), 25, "mpeg4").read_bytes()
    (folder / "half.avi").write_bytes(whole[: len(whole) // 2])
    return folder


@pytest.fixture
def recorded(monkeypatch):
    """Pictures as they go to the encoder, with their times."""
    pictures, times = [], []

    def record(writer, frames, at):
        pictures.extend(frames)
        times.extend(at)
        original(writer, frames, at)

    original = outputs.write_frames
    monkeypatch.setattr(outputs, "write_frames", record)
    return pictures, times


def run(place, out, *arguments, weights="model.ckpt"):
    words = ["decouple", *map(str, arguments), "--out", str(out), "--ckpt_path", str(place / weights)]
    return main([*words, "--accelerator", "cpu"])


@torch.no_grad()
def naive(model, path):
    """Each view of a video, by a loop over its frames in windows; the last frame fills the last one up."""
    frames = list(iter_frames(path, SIDE))
    views = {name: [] for name in VIEWS}
    for start in range(0, len(frames), FRAMES):
        window = frames[start : start + FRAMES]
        filled = np.stack(window + [window[-1]] * (FRAMES - len(window)))
        latents = model.encode(torch.from_numpy(filled).permute(3, 0, 1, 2)[None] / 127.5 - 1).mode()
        views["input"] += window
        for name, part in (
            ("reconstruction", latents),
            ("structure only", {"structure": latents["structure"]}),
            ("dynamics only", {"dynamics": latents["dynamics"]}),
        ):
            views[name] += list(to_uint8(model.decode(part)[0]))[: len(window)]
    return {name: np.stack(shown) for name, shown in views.items()}


def shown_in(picture, column):
    """The view in a column of the picture, at its own size."""
    view = picture[-SIDE * SCALE :, column * SIDE * SCALE : (column + 1) * SIDE * SCALE]
    return view[::SCALE, ::SCALE]


def test_a_long_video_is_shown_frame_by_frame_as_the_model_decodes_it(place, model, recorded, tmp_path, capsys):
    assert run(place, tmp_path, place / "long.mp4") == 0
    pictures, times = recorded
    expected = naive(model, place / "long.mp4")
    assert len(pictures) == 40
    assert times == [k * Fraction(1001, 30000) for k in range(40)]
    for column, name in enumerate(VIEWS):
        shown = np.stack([shown_in(picture, column) for picture in pictures]).astype(int)
        assert abs(shown - expected[name]).max() <= 1, name  # float sums may end on the other side of a half
    written = probe(tmp_path / "long.mp4")
    assert (written.num_frames, written.fps) == (40, Fraction(30000, 1001))
    assert len(list(iter_frames(tmp_path / "long.mp4"))) == 40
    assert "structure only" in capsys.readouterr().out


def test_a_name_that_is_no_utf_8_stands_in_the_table(place, tmp_path):
    odd = tmp_path / os.fsdecode(b"caf\xe9.mp4")
    shutil.copy(place / "long.mp4", odd)
    assert run(place, tmp_path / "out", odd) == 0
    assert b"caf\xe9," in (tmp_path / "out/decouple.csv").read_bytes()


def test_measures_are_those_of_a_naive_version(place, model, tmp_path):
    assert run(place, tmp_path, place / "long.mp4") == 0
    expected = naive(model, place / "long.mp4")
    with (tmp_path / "decouple.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["view"] for row in rows] == VIEWS
    assert {(row["video"], row["num_frames"]) for row in rows} == {("long", "40")}
    within = [k for k in range(1, 40) if k % FRAMES]  # no difference over the border of windows
    for row in rows:
        frames = expected[row["view"]].astype(int)
        steps = [abs(frames[k] - frames[k - 1]).mean() for k in within]
        assert float(row["change"]) == pytest.approx(np.mean(steps), abs=0.02)
        if row["view"] == "input":
            assert row["psnr"] == row["ssim"] == row["share"] == row["numbers"] == ""
            continue
        pairs = zip(expected["input"], expected[row["view"]], strict=True)
        assert float(row["psnr"]) == pytest.approx(
            np.mean([peak_signal_noise_ratio(*pair, data_range=255) for pair in pairs]), abs=0.01
        )
        assert -1 <= float(row["ssim"]) <= 1
    shapes = model.latent_shapes((3, FRAMES, SIDE, SIDE))
    numbers = {name: int(np.prod(shape)) for name, shape in shapes.items()}
    assert int(rows[1]["numbers"]) == sum(numbers.values())
    assert float(rows[1]["share"]) == 1
    assert float(rows[1]["rate"]) == pytest.approx(model.compression_rate((3, FRAMES, SIDE, SIDE)))
    for row, name in zip(rows[2:], ("structure", "dynamics"), strict=True):
        assert int(row["numbers"]) == numbers[name]
        assert float(row["share"]) == pytest.approx(numbers[name] / sum(numbers.values()))
    content = json.loads((tmp_path / "decouple.json").read_text())
    assert content["model"] == model.spec()
    assert content["window"] == FRAMES
    (video,) = content["videos"]
    assert {name: str(view["psnr"] or "") for name, view in video["views"].items()} == {
        row["view"]: row["psnr"] for row in rows
    }


def test_a_still_has_a_row_for_each_view_and_the_frames_that_were_asked_for(place, tmp_path):
    assert run(place, tmp_path, place / "long.mp4", "--num_frames", 4) == 0
    still = np.asarray(Image.open(tmp_path / "long.png"))
    assert still.shape[0] == 4 * SIDE * SCALE
    label = still.shape[1] - 4 * SIDE * SCALE
    assert label > 0
    frames = list(iter_frames(place / "long.mp4", SIDE))
    for column, number in enumerate((0, 13, 26, 39)):
        shown = still[: SIDE * SCALE : SCALE, label + column * SIDE * SCALE :: SCALE][:, :SIDE]
        np.testing.assert_array_equal(shown, frames[number])


def test_the_first_windows_alone_can_be_taken(place, tmp_path):
    assert run(place, tmp_path, place / "long.mp4", "--max_windows", 1) == 0
    assert len(list(iter_frames(tmp_path / "long.mp4"))) == FRAMES


def test_a_video_of_one_frame_has_no_change(place, tmp_path):
    assert run(place, tmp_path, place / "single.mp4") == 0
    content = json.loads((tmp_path / "decouple.json").read_text())
    assert content["videos"][0]["num_frames"] == 1
    assert [view["change"] for view in content["videos"][0]["views"].values()] == [None] * 4


def test_damaged_and_invalid_videos_are_reported_and_the_others_processed(place, tmp_path, capsys):
    assert run(place, tmp_path, place / "text.mp4", place / "half.avi", place / "single.mp4") == 1
    told = capsys.readouterr()
    assert "text.mp4" in told.err
    assert "half.avi" in told.err
    assert "mean of 2" in told.out
    assert {path.name for path in tmp_path.iterdir()} == {
        f"{name}.{kind}" for name in ("half", "single") for kind in ("mp4", "png")
    } | {"decouple.csv", "decouple.json"}
    videos = json.loads((tmp_path / "decouple.json").read_text())["videos"]
    assert [video["name"] for video in videos] == ["text", "half", "single"]
    assert [bool(video["note"]) for video in videos] == [True, True, False]
    assert videos[0]["num_frames"] == 0
    assert 10 < videos[1]["num_frames"] < 60
    assert len(list(iter_frames(tmp_path / "half.mp4"))) == videos[1]["num_frames"]


def test_without_a_usable_video_the_command_fails(place, tmp_path, capsys):
    assert run(place, tmp_path / "out", place / "text.mp4") == 2
    assert "text.mp4" in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_the_sound_goes_along(place, tmp_path):
    with av.open(str(tmp_path / "loud.mp4"), "w") as container:
        pictures, sound = container.add_stream("libx264", rate=25), container.add_stream("aac", rate=16000)
        pictures.width, pictures.height, pictures.pix_fmt = 56, 40, "yuv420p"
        for picture in moving(20):
            container.mux(pictures.encode(av.VideoFrame.from_ndarray(picture)))
        wave = (0.3 * np.sin(np.arange(12800) / 5)).astype(np.float32)[None]
        frame = av.AudioFrame.from_ndarray(wave, format="fltp", layout="mono")
        frame.rate, frame.pts = 16000, 0
        container.mux([*pictures.encode(None), *sound.encode(frame), *sound.encode(None)])
    assert run(place, tmp_path / "out", tmp_path / "loud.mp4") == 0
    with av.open(str(tmp_path / "out" / "loud.mp4")) as container:
        assert len(container.streams.audio) == 1
        assert sum(frame.samples for frame in container.decode(audio=0)) >= 12000


def test_outputs_are_replaced_only_when_asked(place, tmp_path, capsys):
    assert run(place, tmp_path, place / "single.mp4") == 0
    assert run(place, tmp_path, place / "single.mp4") == 2
    assert "--overwrite" in capsys.readouterr().err
    assert run(place, tmp_path, place / "single.mp4", "--overwrite") == 0


def test_a_model_of_one_latent_is_refused_by_name(place, tmp_path, capsys):
    checkpoint(tmp_path / "pool.ckpt", model=Pool())
    assert run(tmp_path, tmp_path / "out", place / "long.mp4", weights="pool.ckpt") == 2
    assert "Pool" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["--num_frames", "0"], "--num_frames of at least 1"),
        (["--max_windows", "0"], "--max_windows of at least 1"),
        (["--size", "64"], "--size 32"),
    ],
)
def test_invalid_values_are_refused(place, tmp_path, capsys, arguments, told):
    assert run(place, tmp_path / "out", place / "long.mp4", *arguments) == 2
    assert told in capsys.readouterr().err


def test_a_file_instead_of_the_folder_is_refused(place, tmp_path, capsys):
    (tmp_path / "out").write_text("")
    assert run(place, tmp_path / "out", place / "long.mp4") == 2
    assert "got the file" in capsys.readouterr().err
