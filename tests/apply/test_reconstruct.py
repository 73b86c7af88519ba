"""`vidtwin reconstruct` as its user calls it, with a model of averages that needs no training."""

import csv
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from sound import with_tone
from sweeping import Two, checkpoint

from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.storage.checkpoints import load_autoencoder
from vidtwin.tables import read_table
from vidtwin.video import VideoError, VideoWriter, iter_frames, probe, survey, timed_frames, write_video
from vidtwin.video.convert import to_uint8


def moving(count: int, height: int = 48, width: int = 64) -> np.ndarray:
    """A smooth bright blob that goes from the left to the right, on a gradient: no two frames or sides are equal."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    frames = []
    for k in range(count):
        blob = np.exp(-((x - width * (k + 1) / (count + 1)) ** 2 + (y - height / 3) ** 2) / 60)
        frames.append(np.stack([40 + 2 * y, 60 + 150 * blob, 20 + 2 * x], -1))
    return np.stack(frames).clip(0, 255).round().astype(np.uint8)


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with a checkpoint that averages blocks of 4 pixels, for clips of 8 frames of any size."""
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "pool.ckpt", scale=1.0, frames=8)
    return tmp_path


def run(*words: str | Path, ckpt: str = "pool.ckpt") -> int:
    return main(["reconstruct", *map(str, words), "--ckpt_path", ckpt, "--accelerator", "cpu", "--progress", "false"])


def expected(path: Path, size: int | None = None, ckpt: str = "pool.ckpt") -> tuple[np.ndarray, np.ndarray]:
    """Input and output of the model, frame by frame, without the command's code."""
    given = np.stack(list(iter_frames(path, size)))
    model = load_autoencoder(ckpt)
    made = []
    for start in range(0, len(given), 8):
        window = given[start : start + 8]
        real = len(window)
        window = np.concatenate([window, np.repeat(window[-1:], 8 - real, 0)])
        with torch.no_grad():
            made.append(to_uint8(model(as_clip([window], 4)).clip[0])[:real])
    return given, np.concatenate(made)[:, : given.shape[1], : given.shape[2]]


def read(path: str | Path) -> np.ndarray:
    return np.stack(list(iter_frames(path)))


def table(folder: str) -> list[dict[str, str]]:
    with Path(folder, "reconstructions.csv").open() as file:
        return list(csv.DictReader(file))


def close(written: np.ndarray, wanted: np.ndarray) -> bool:
    """But for the codec, which is nearly lossless but for the colours' resolution."""
    return written.shape == wanted.shape and np.abs(written.astype(int) - wanted).mean() < 2.5


def test_the_table_holds_no_formula_and_goes_on_in_another_run(here, capsys):
    odd = os.fsdecode(b"caf\xe9.mp4")
    for name in ("=1.mp4", odd, "b.mp4"):
        write_video("b.mp4", moving(2), Fraction(24))
        os.replace("b.mp4", name)
        assert run(name) == 0
    rows = read_table(Path("reconstructions/reconstructions.csv"), odd_names=True)
    assert [row["input"] for row in rows] == ["=1.mp4", odd, "b.mp4"]
    assert b"\n'=1.mp4," in Path("reconstructions/reconstructions.csv").read_bytes()
    Path("reconstructions/reconstructions.csv").write_text('input\n"a')
    capsys.readouterr()
    assert run("b.mp4", "--overwrite") == 0
    assert "reconstructions.csv: expected a table of reconstructions, got another" in capsys.readouterr().err
    assert [row["input"] for row in table("reconstructions")] == ["b.mp4"]


def test_each_frame_goes_through_once_and_the_numbers_are_those_of_the_real_frames(here, capsys):
    write_video("in.mp4", moving(21), Fraction(30_000, 1001))
    assert run("in.mp4") == 0
    assert close(read("reconstructions/in.mp4"), expected(Path("in.mp4"))[1])
    assert survey("reconstructions/in.mp4").fps == Fraction(30_000, 1001)
    given, made = expected(Path("in.mp4"))
    error = ((given.astype(float) - made) ** 2).mean((1, 2, 3)) / 255**2
    psnr = (-10 * np.log10(error + 1e-8)).mean()
    ssim = np.mean([
        structural_similarity(a, b, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, channel_axis=2)
        for a, b in zip(given, made, strict=True)
    ])  # fmt: skip
    (row,) = table("reconstructions")
    assert float(row["psnr"]) == pytest.approx(psnr, abs=1e-4)
    assert float(row["ssim"]) == pytest.approx(ssim, abs=2e-3)  # scikit-image leaves out a border of 5 pixels
    assert row["frames"] == "21"
    assert f"in.mp4 -> reconstructions/in.mp4  21 frames  PSNR {psnr:.2f} dB  SSIM " in capsys.readouterr().out


def test_the_windows_batch_changes_nothing(here):
    write_video("in.mp4", moving(21), 25)
    assert run("in.mp4", "--out", "one") == 0
    assert run("in.mp4", "--out=four", "--batch_size", "4") == 0
    # Sums may be taken in another order, which a codec then turns into more.
    assert np.abs(read("one/in.mp4").astype(int) - read("four/in.mp4")).mean() < 0.1


def test_a_variable_rate_and_the_sound_stay(here):
    times = [Fraction(k, 25) for k in (0, 1, 2, 3, 10, 11, 12, 20, 21, 22)]
    with VideoWriter("in.mkv", 25, timed=True, sound=with_tone(here / "tone.mkv", "aac")) as writer:
        for picture, time in zip(moving(10), times, strict=True):
            writer.write(picture, time)
    assert run("in.mkv") == 0
    found = [time for time, _ in timed_frames("reconstructions/in.mp4")]
    assert len(found) == 10
    assert all(abs(a - b) < Fraction(1, 500) for a, b in zip(found, times, strict=True))
    from sound import first_loud, heard

    assert heard(Path("reconstructions/in.mp4"))[0] == "aac"
    assert abs(first_loud(Path("reconstructions/in.mp4")) - first_loud(Path("in.mkv"))) < 0.06


def test_a_picture_of_any_size_is_reconstructed_whole_or_as_a_square(here):
    write_video("in.mp4", moving(9, 46, 70), 25)
    assert run("in.mp4", "--out", "whole") == 0
    assert close(read("whole/in.mp4"), expected(Path("in.mp4"))[1])
    assert run("in.mp4", "--out", "square", "--size", "32") == 0
    assert close(read("square/in.mp4"), expected(Path("in.mp4"), 32)[1])


def test_tiles_keep_the_whole_picture(here):
    """Blocks of 4 pixels: where tiles begin at multiples of 4 they change nothing, with or without blending."""
    write_video("in.mp4", moving(9, 64, 96), 25)
    assert run("in.mp4", "--tile", "--tile_size", "32", "--overlap", "0.5", "--batch_size=3") == 0
    assert close(read("reconstructions/in.mp4"), expected(Path("in.mp4"))[1])


def test_a_fixed_resolution_is_taken_as_the_size_of_tiles_or_of_the_square(here):
    from tiny import tiny_model

    torch.manual_seed(0)
    checkpoint(here / "vidtwin.ckpt", model=tiny_model())
    side = tiny_model().resolution
    write_video("in.mp4", moving(6, 40, 72), 25)
    assert run("in.mp4", ckpt="vidtwin.ckpt") == 0
    assert read("reconstructions/in.mp4").shape == (6, side, side, 3)
    assert run("in.mp4", "--tile", "--out=tiles", ckpt="vidtwin.ckpt") == 0
    assert read("tiles/in.mp4").shape == (6, 40, 72, 3)


def test_views_stand_next_to_each_other(here):
    checkpoint(here / "two.ckpt", model=Two(frames=8), scale=1.0)
    write_video("in.mp4", moving(11, 128, 128), 25)
    assert run("in.mp4", "--side_by_side", "--error_map", ckpt="two.ckpt") == 0
    shown = read("reconstructions/in.mp4")
    assert len(shown) == 11
    columns = [shown[:, -128:, start : start + 128].astype(int) for start in range(0, shown.shape[2], 128)]
    assert len(columns) == 5
    given, made, still, moves, error = columns
    assert np.abs(given - moving(11, 128, 128)).mean() < 4
    assert np.abs(still[:8] - still[:1]).mean() < 1
    assert np.abs(moves[1:8] - moves[:7]).mean() > 0.3
    assert np.abs(error - np.abs(made - given) * 4).mean() < 6
    assert run("in.mp4", "--only", "still", "--out=still", ckpt="two.ckpt") == 0
    assert np.abs(read("still/in.mp4").astype(int) - still).mean() < 4
    assert run("in.mp4", "--error_map", "--out=error", ckpt="two.ckpt") == 0
    assert read("error/in.mp4").shape[2] == 256


def test_damaged_videos_are_reconstructed_up_to_the_damage_and_the_others_too(here, capsys):
    noise = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), np.uint8)
    data = bytearray(write_video("in/damaged.mp4", noise, 25, g="1").read_bytes())
    data[len(data) // 2 : len(data) // 2 + 2000] = bytes(2000)
    Path("in/damaged.mp4").write_bytes(data)
    Path("in/text.mp4").write_text("no video")
    write_video("in/whole.mp4", moving(5), 25)
    assert run("in") == 1
    told = capsys.readouterr()
    assert "in/damaged.mp4: decoding stops after 9 frames" in told.err
    assert "The 9 frames before are in reconstructions/damaged.mp4." in told.err
    assert "vidtwin: in/text.mp4: expected a readable video" in told.err
    assert [len(read(f"reconstructions/{name}.mp4")) for name in ("damaged", "whole")] == [9, 5]
    assert not Path("reconstructions/text.mp4").exists()
    assert [row["frames"] for row in table("reconstructions")] == ["9", "0", "5"]
    assert run("in/text.mp4") == 2


def test_existing_outputs_are_kept_unless_overwritten(here, capsys):
    write_video("in/a.mp4", moving(3), 25)
    write_video("in/b.mp4", moving(3), 25)
    assert run("in/a.mp4") == 0
    before = Path("reconstructions/a.mp4").stat().st_mtime_ns
    assert run("in") == 2
    assert "got reconstructions/a.mp4; --skip_existing makes the others, " in capsys.readouterr().err
    assert run("in", "--skip_existing") == 0
    assert "1 of 2 outputs exist in reconstructions and were skipped" in capsys.readouterr().err
    assert Path("reconstructions/a.mp4").stat().st_mtime_ns == before
    assert Path("reconstructions/b.mp4").exists()
    assert run("in", "--overwrite") == 0
    assert Path("reconstructions/a.mp4").stat().st_mtime_ns > before


def test_the_hidden_copy_of_a_killed_run_goes_when_its_video_is_made(here):
    write_video("in/a.mp4", moving(3), 25)
    Path("reconstructions").mkdir()
    for name in (".a-abcdefgh.mp4", ".b-abcdefgh.mp4"):
        Path("reconstructions", name).write_bytes(b"half")
    with VideoWriter("reconstructions/c.mp4", 25) as other:  # of another process
        other.write(moving(1)[0])
        in_use = other._partial.name
        assert run("in") == 0
        hidden = [path.name for path in Path("reconstructions").glob(".*.mp4")]
        assert sorted(hidden) == sorted([".b-abcdefgh.mp4", in_use])


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--only", "still"], "Expected one of grid, the latents of Pool, got 'still'."),
        (["--only", "grid"], "Expected a model that decodes one of several latents alone, got Pool."),
        (["--tile_size", "32"], "Expected --tile with --tile_size"),
        (["--tile", "--tile_size", "30"], "Expected --tile_size a multiple of 4, got 30."),
        (["--tile", "--size", "32"], "Expected --size or --tile, got both"),
        (["--overlap", "0.9"], "Expected --overlap from 0 to 0.5 of a tile, got 0.9."),
        (["--batch_size", "0"], "Expected --batch_size of at least 1, got 0."),
        (["--overwrite", "--skip_existing"], "Expected --overwrite or --skip_existing, got both."),
        (["--siez", "3"], "did you mean 'size'?"),
        (["--side-by-side"], "did you mean 'side_by_side'?"),
    ],
)
def test_a_mistake_is_one_line_before_anything_is_written(here, capsys, words, line):
    write_video("in.mp4", moving(3), 25)
    assert run("in.mp4", *words) == 2
    told = capsys.readouterr().err
    assert line in told
    assert len(told.strip().splitlines()) == 1
    assert not list(Path("reconstructions").glob("*.mp4"))


# Frames that can be decoded, in files that promise more or none at all.
DAMAGED = {"corrupted.mp4": 28, "truncated_half.avi": 78}
NO_VIDEO = (
    "h264_raw_error_I_P.264",  # its first frame is damaged already
    "audio_only.mp3",
    "header_only_300B.avi",
    "text_renamed.avi",
    "truncated_half_moov_lost.mp4",
    "zero_byte.avi",
)
HARDEST = *DAMAGED, *NO_VIDEO, "anamorphic_sar10_11.avi", "gray.mp4", "nonzero_start_editlist.mp4", "rotate_90.mov"


@pytest.mark.parametrize("chosen", [HARDEST, pytest.param(None, marks=pytest.mark.slow)], ids=["some", "all"])
def test_hard_clips_come_back_with_their_frames_and_upright(here, shared, capsys, chosen):
    """A model that leaves pictures as they are, at a small size: what comes out is what goes in."""
    clips = sorted(path for path in (shared / "data/clips/hard").iterdir() if not chosen or path.name in chosen)
    assert not chosen or len(clips) == len(chosen)
    checkpoint(here / "same.ckpt", scale=1.0, pool=1, frames=8)
    assert run(*clips, "--size", "64", "--out", "out", ckpt="same.ckpt") == 1
    told = capsys.readouterr().err
    rows = {Path(row["input"]).name: row for row in table("out")}
    for clip in clips:
        row = rows[clip.name]
        if clip.name in NO_VIDEO:
            assert row["frames"] == "0"
            assert f"{clip}: " in told
            continue
        if clip.name in DAMAGED:
            assert int(row["frames"]) == DAMAGED[clip.name]
            assert f"frames before are in {row['output']}" in told
        else:
            assert row["note"] == ""
            assert int(row["frames"]) == survey(clip).num_frames
        assert probe(row["output"]).num_frames == int(row["frames"])
        first = next(iter_frames(clip, 64)).astype(float)
        again = next(iter_frames(row["output"])).astype(float)
        errors = [np.abs(np.rot90(again, turns) - first).mean() for turns in range(4)]
        assert np.argmin(errors) == 0, f"{clip.name} is turned"
        assert errors[0] < 12, clip.name


def test_the_table_keeps_the_rows_of_earlier_runs(here):
    for name in ("a", "b", "c"):
        write_video(f"in/{name}.mp4", moving(3), 25)
    assert run("in/a.mp4", "in/b.mp4") == 0
    before = table("reconstructions")
    Path("reconstructions/b.mp4").unlink()
    assert run("in", "--skip_existing") == 0
    assert [row["input"] for row in table("reconstructions")] == ["in/a.mp4", "in/b.mp4", "in/c.mp4"]
    assert table("reconstructions")[0] == before[0]


def test_measures_are_written_video_by_video(here, monkeypatch):
    for name in ("a", "b"):
        write_video(f"in/{name}.mp4", moving(3), 25)
    write = VideoWriter.write

    def interrupted(self, *given):
        if self.path.name == "b.mp4":
            raise KeyboardInterrupt
        write(self, *given)

    monkeypatch.setattr(VideoWriter, "write", interrupted)
    assert run("in") == 130
    assert [row["input"] for row in table("reconstructions")] == ["in/a.mp4"]


@pytest.mark.parametrize("command", ["reconstruct", "encode", "decouple"])
def test_a_folder_that_can_not_be_is_refused_before_any_work(here, capsys, command):
    write_video("in.mp4", moving(3), 25)
    Path("file").write_text("")
    words = [command, "in.mp4", "--out", "file/sub", "--ckpt_path", "pool.ckpt", "--accelerator", "cpu"]
    assert main(words) == 2
    assert "Expected --out to be a folder, got the file" in capsys.readouterr().err


def test_a_full_disk_ends_the_command_and_keeps_finished_videos(here, capsys, monkeypatch):
    for name in ("a", "b", "c"):
        write_video(f"in/{name}.mp4", moving(3), 25)
    write = VideoWriter.write

    def full(self, *given):
        if self.path.name == "b.mp4":
            raise VideoError(f"{self.path}: can't be written.") from OSError(28, "No space left on device")
        write(self, *given)

    monkeypatch.setattr(VideoWriter, "write", full)
    assert run("in") == 1
    told = capsys.readouterr().err
    assert "reconstructions/b.mp4: can't be written" in told
    assert "finished videos are kept; free space and continue with --skip_existing" in told
    assert sorted(path.name for path in Path("reconstructions").glob("*.mp4")) == ["a.mp4"]
