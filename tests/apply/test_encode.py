"""`vidtwin encode` as its user calls it, with a model of averages that needs no training."""

import errno
import fcntl
import json
import os
import shutil
import signal
from fractions import Fraction
from pathlib import Path

import av
import forked
import numpy as np
import pytest
import torch
from safetensors import safe_open
from sweeping import Coded, Interruption, Two, checkpoint

from vidtwin.apply import latent_plan
from vidtwin.apply.outputs import write_png
from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.storage.checkpoints import load_autoencoder
from vidtwin.storage.latent_files import Manifest, Shard, shard_path, unpack_times
from vidtwin.video import VideoWriter, iter_frames, timed_frames, write_video

LENGTH = 8


def moving(count: int, height: int = 32, width: int = 48, seed: int = 0) -> np.ndarray:
    """Smooth noise that slides to the right: no two frames are equal."""
    coarse = torch.rand(1, 3, 5, 9, generator=torch.Generator().manual_seed(seed))
    wide = torch.nn.functional.interpolate(coarse, (height, width + count), mode="bilinear")[0]
    frames = [wide[:, :, k : k + width].permute(1, 2, 0) for k in range(count)]
    return (torch.stack(frames) * 255).round().to(torch.uint8).numpy()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A folder with `videos` of 20, 3 and 17 frames in two classes, and a checkpoint for clips of 8 frames."""
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the processes that tests start: other numbers of threads round otherwise
    checkpoint(tmp_path / "pool.ckpt", scale=1.0, frames=LENGTH)
    write_video("videos/run/long.mp4", moving(20), 25)
    write_video("videos/run/short.avi", moving(3, seed=1), 10, codec="mpeg4")
    write_video("videos/walk/odd.mp4", moving(17, 36, 40, seed=2), Fraction(30000, 1001))
    yield tmp_path
    torch.set_num_threads(threads)


def encode(*words: str, videos: str = "videos", out: str = "latents", ckpt: str = "pool.ckpt") -> int:
    command = ["encode", videos, "--out", out, "--ckpt_path", ckpt, "--accelerator", "cpu", "--progress", "false"]
    return main([*command, *words])


def windows_of(path: str | Path, size: int | None = None) -> list[np.ndarray]:
    """Windows of 8 frames, the last one filled up, without any of the command's code."""
    frames = np.stack(list(iter_frames(path, size)))
    padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % LENGTH, 0)])
    return list(padded.reshape(-1, LENGTH, *frames.shape[1:]))


def stored(folder: str, video: str, latent: str = "grid", part: str = "") -> torch.Tensor:
    """All windows of a video, read by safetensors alone: tensors are named by piece, latent and part."""
    rows = []
    for path in sorted(Path(folder).glob("shard-*.safetensors")):
        with safe_open(path, "pt") as file:
            for place, piece in enumerate(json.loads(file.metadata()["vidtwin"])["pieces"]):
                name = f"{place:04d}.{latent}{part}"
                if piece["video"] == video and name in file.keys():  # noqa: SIM118 - it is no dict
                    rows.append(file.get_tensor(name))
    return torch.cat(rows)


def contents(folder: str | Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in Path(folder).iterdir() if not path.name.startswith(".")}


def test_every_window_is_stored_once_as_the_model_encodes_it(here, capsys):
    assert encode("--clips_per_shard", "2") == 0
    model = load_autoencoder("pool.ckpt")
    for name, path in (("run/long", "run/long.mp4"), ("run/short", "run/short.avi"), ("walk/odd", "walk/odd.mp4")):
        with torch.no_grad():
            wanted = model.encode(as_clip(windows_of(f"videos/{path}"), 4)).mode()["grid"]
        assert torch.equal(stored("latents", name), wanted)
    manifest = Manifest.read("latents")
    assert [video.num_frames for video in manifest.videos] == [20, 3, 17]
    assert [Fraction(video.fps) for video in manifest.videos] == [25, 10, Fraction(30000, 1001)]
    assert [len(pieces) for pieces in manifest.shards] == [1, 2, 1, 1]  # 2; 1 + 1; 2; 1 windows
    assert manifest.complete
    assert "7 clips of 3 videos, compression rate" in capsys.readouterr().out


def test_the_manifest_says_what_was_encoded_and_how(here):
    assert encode("--size", "16", "--dtype", "bfloat16", "--labels", "folders", "--posterior", "moments") == 0
    manifest = Manifest.read("latents")
    assert manifest.model["class_path"] == "sweeping.Pool"
    assert manifest.model["checkpoint"] == "pool.ckpt"
    assert manifest.settings["size"] == 16
    assert manifest.settings["padding"] == "last frame repeated"
    assert manifest.classes == ["run", "walk"]
    assert [video.label for video in manifest.videos] == [0, 0, 1]
    assert {(video.height, video.width) for video in manifest.videos} == {(16, 16)}
    assert manifest.latents["grid"].shape == (3, LENGTH, 4, 4)
    grid, logvar = stored("latents", "run/long"), stored("latents", "run/long", part=".logvar")
    assert grid.dtype == logvar.dtype == torch.bfloat16
    assert torch.allclose(logvar.float(), torch.tensor(2 * np.log(0.1)).float(), rtol=1e-2)
    with torch.no_grad():
        wanted = load_autoencoder("pool.ckpt").encode(as_clip(windows_of("videos/run/long.mp4", 16))).mode()["grid"]
    assert torch.equal(grid, wanted.bfloat16())
    # 7 windows of 3·8·4·4 numbers, over 40 real frames of 16 x 16 pixels
    assert manifest.totals["compression_rate"] == pytest.approx(7 * 3 * 8 * 4 * 4 / (3 * 40 * 16 * 16))


def test_codes_alone_are_stored_in_their_smallest_type_and_give_the_latents_back(here):
    checkpoint(here / "coded.ckpt", model=Coded(frames=LENGTH))
    assert encode("--size", "16", ckpt="coded.ckpt") == 0
    codes = stored("latents", "run/long")
    assert codes.dtype == torch.uint8
    model = load_autoencoder("coded.ckpt")
    with torch.no_grad():
        wanted = model.encode(as_clip(windows_of("videos/run/long.mp4", 16))).mode()
    assert torch.equal(model.dequantize({"grid": codes.long()})["grid"], wanted["grid"])
    totals = Manifest.read("latents").totals
    assert totals["bits_per_pixel"] == pytest.approx(7 * 3 * 8 * 4 * 4 / (40 * 16 * 16))
    assert Manifest.read("latents").statistics == {}


def test_statistics_are_those_of_all_windows_by_channel(here):
    checkpoint(here / "two.ckpt", model=Two(frames=LENGTH))
    assert encode("--size", "16", "--posterior", "moments", "--clips_per_shard", "2", ckpt="two.ckpt") == 0
    found = Manifest.read("latents").statistics
    for latent in ("still", "moving"):
        every = torch.cat([stored("latents", name, latent) for name in ("run/long", "run/short", "walk/odd")])
        channels = every.double().transpose(0, 1).flatten(1)
        assert found[latent]["mean"] == pytest.approx(channels.mean(1).tolist(), abs=1e-12)
        assert found[latent]["std"] == pytest.approx(channels.std(1, correction=0).tolist())
        noisy = (channels.var(1, correction=0) + 0.01).sqrt()  # the model's sigma is 0.1
        assert found[latent]["sample_std"] == pytest.approx(noisy.tolist(), rel=1e-6)


def test_times_of_a_variable_rate_are_kept(here):
    times = [Fraction(k * k, 100) for k in range(11)]
    with VideoWriter("vfr.mp4", 25, timed=True) as writer:
        for frame, time in zip(moving(11), times, strict=True):
            writer.write(frame, time)
    assert encode("--clips_per_shard", "1", videos="vfr.mp4") == 0
    manifest = Manifest.read("latents")
    found = []
    for number in range(2):
        piece = Shard(shard_path("latents", number), manifest.digest).pieces[0]
        found += unpack_times(piece.times, Fraction(manifest.videos[0].fps), 8 * number, sum(piece.num_frames))
    assert found == [time for time, _ in timed_frames("vfr.mp4")]
    assert len(set(np.diff([float(time) for time in found]).round(6))) > 5


@pytest.mark.parametrize("calls", [1, 2, 3])
def test_an_interrupted_encoding_resumes_to_the_same_bytes(here, monkeypatch, capsys, calls):
    words = ("--clips_per_shard", "2", "--batch_size", "2")
    assert encode(*words, out="whole") == 0
    monkeypatch.setattr(Interruption, "after", calls)
    assert encode(*words) == 130
    if calls > 1:
        assert "complete shards are in latents; run the same command again to continue" in capsys.readouterr().err
    made = {path.name: path.stat().st_mtime_ns for path in Path("latents").glob("shard-*")}
    assert len(made) == calls - 1
    monkeypatch.setattr(Interruption, "after", None)
    assert encode(*words) == 0
    assert contents("latents") == contents("whole")
    assert all(Path("latents", name).stat().st_mtime_ns == changed for name, changed in made.items())


KILLED = """
import os, signal, sys
import vidtwin.apply.latent_writer as writer
from vidtwin.cli import main
def write(path, *rest):
    if path.name == "shard-00002.safetensors":
        (path.parent / ".shard-00002-abcd1234.safetensors").write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, *rest)
real, writer.write_shard = writer.write_shard, write
main(sys.argv[1:])
"""


def test_two_processes_and_one_that_was_killed_give_the_bytes_of_one(here):
    words = ["--clips_per_shard", "3"]
    write_video("videos/a_long.mp4", moving(50, seed=5), 25)  # over several shards, and both processes
    assert encode(*words, out="whole") == 0
    command = ["encode", "videos", "--out", "killed", "--ckpt_path", "pool.ckpt", "--accelerator", "cpu", *words]
    command += ["--trust_module", "sweeping"]
    stderr = here / "stderr"
    assert forked.run_code(KILLED, command, stderr) == -signal.SIGKILL, stderr.read_text()
    assert sorted(path.name for path in Path("killed").glob("shard-*")) == [
        f"shard-0000{n}.safetensors" for n in (0, 1)
    ]
    assert encode(*words, out="killed") == 0
    assert contents("killed") == contents("whole")
    assert not list(Path("killed").glob(".*shard*"))

    forked.run_script(Path(__file__).with_name("two_ranks_encode.py"), ["videos", "pool.ckpt", str(here)], stderr)
    assert [Path(f"rank{rank}.txt").read_text() for rank in (0, 1)] == ["[0, 0, 0, 2]"] * 2
    assert contents("latents") == contents("whole")
    assert main(["decode", "whole", "--out", "one", "--accelerator", "cpu", "--progress", "false"]) == 0
    names = sorted(path.relative_to("one") for path in Path("one").rglob("*.mp4"))
    assert names == sorted(path.relative_to("two") for path in Path("two").rglob("*.mp4"))
    assert len(names) == 4
    for name in names:
        one, two = (np.stack(list(iter_frames(Path(out, name)))).astype(int) for out in ("one", "two"))
        assert np.abs(one - two).mean() < 1


def test_a_truncated_shard_is_logged_and_made_again(here, capsys):
    encode("--clips_per_shard", "2")
    before = contents("latents")
    path = Path("latents/shard-00001.safetensors")
    path.write_bytes(path.read_bytes()[:-7])
    assert encode("--clips_per_shard", "2") == 0
    assert "shard-00001.safetensors: expected a whole shard, got one that is cut off" in capsys.readouterr().err
    assert contents("latents") == before


def test_a_shard_with_a_changed_byte_is_logged_and_made_again(here, capsys):
    encode("--clips_per_shard", "2")
    before = contents("latents")
    path = Path("latents/shard-00001.safetensors")
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)
    assert encode("--clips_per_shard", "2") == 0
    assert "shard-00001.safetensors" in capsys.readouterr().err
    assert contents("latents") == before


def test_a_damaged_manifest_is_written_again_from_the_plan_in_the_shards(here, capsys):
    encode("--clips_per_shard", "2")
    before = contents("latents")
    Path("latents/manifest.json").write_bytes(before["manifest.json"][:50])
    assert encode("--clips_per_shard", "3") == 2  # another plan
    assert "--overwrite to begin anew" in capsys.readouterr().err
    assert encode("--clips_per_shard", "2") == 0
    assert "it is written anew" in capsys.readouterr().err
    assert contents("latents") == before


def test_damaged_and_unreadable_videos_are_named_and_the_others_encoded(here, capsys):
    whole = Path("videos/run/long.mp4").read_bytes()
    Path("videos/run/text.mp4").write_text("no video")
    write_video("videos/run/cut.avi", moving(40, 96, 128, seed=3), 25, codec="mpeg4")
    cut = Path("videos/run/cut.avi")
    cut.write_bytes(cut.read_bytes()[: cut.stat().st_size * 3 // 4])
    assert encode() == 1
    said = capsys.readouterr()
    assert "vidtwin: run/text: " in said.err
    assert "vidtwin: run/cut: truncated: " in said.err
    assert "of 4 videos" in said.out
    manifest = Manifest.read("latents")
    held = {video.name: video for video in manifest.videos}
    assert 0 < held["run/cut"].num_frames < 40
    assert held["run/cut"].damage.startswith("truncated")
    assert list(manifest.skipped) == ["run/text"]
    assert Path("videos/run/long.mp4").read_bytes() == whole
    assert encode() == 1  # nothing to do, and the same is told again
    assert "run/text" in capsys.readouterr().err


def fail_to_read(name: str, real):
    """Return `Path.read_bytes` of a disk that fails at a file."""

    def read(path):
        if path.name == name:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    return read


def fail_at(monkeypatch, name: str, number: int, opened: int = 0) -> None:
    """Let the system fail whenever a video is opened once more after `opened` times."""
    count, real = 0, av.open

    def fail(path, *rest, **options):
        nonlocal count
        count += Path(path).name == name
        if Path(path).name == name and count > opened:
            raise av.error.OSError(number, os.strerror(number), str(path))
        return real(path, *rest, **options)

    monkeypatch.setattr(av, "open", fail)


@pytest.fixture
def whole(here) -> dict[str, bytes]:
    """The latents of an undisturbed run, two clips per shard."""
    assert encode("--clips_per_shard", "2", out="whole") == 0
    return contents("whole")


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_fails_while_a_video_is_decoded_leaves_no_gap(here, whole, capsys, number):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "long.mp4", number, opened=1)
        assert encode("--clips_per_shard", "2") == 1
    said = capsys.readouterr().err
    assert (
        "shard-00000.safetensors is not made: Expected to read videos/run/long.mp4, got an error of the system: "
        in said
    )
    assert os.strerror(number) in said
    made = contents("latents")
    assert not json.loads(made.pop("manifest.json"))["complete"]
    assert made == {name: whole[name] for name in ("shard-00002.safetensors", "shard-00003.safetensors")}
    assert encode("--clips_per_shard", "2") == 0
    assert contents("latents") == whole


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_disk_that_fails_while_a_video_is_surveyed_leaves_no_gap(here, whole, capsys, number):
    with pytest.MonkeyPatch.context() as patch:
        fail_at(patch, "long.mp4", number)
        for _ in range(2):
            assert encode("--clips_per_shard", "2") == 1
            said = capsys.readouterr().err
            assert f"{os.strerror(number)}; left out until it can be read" in said
            assert "run/long could not be read, so the latents in latents are not complete" in said
    manifest = Manifest.read("latents")
    assert not manifest.complete
    assert [video.name for video in manifest.videos] == ["run/short", "walk/odd"]
    shutil.copytree("latents", "others")
    assert encode("--clips_per_shard", "2") == 0
    assert "run/long can be read now" in capsys.readouterr().err
    assert contents("latents") == whole

    assert encode("--clips_per_shard", "3", out="others") == 2  # other latents are not replaced
    Path("videos/run/long.mp4").unlink()
    assert encode("--clips_per_shard", "2", out="others") == 0  # the others alone, which are all there
    assert Manifest.read("others").complete


def test_a_video_that_was_surveyed_before_and_can_not_be_found_ends_it(here, whole, capsys, monkeypatch):
    def refuse(path):
        if path.name == "long.mp4":
            raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))
        return real(path)

    real = latent_plan.identity
    monkeypatch.setattr(latent_plan, "identity", refuse)
    assert encode("--clips_per_shard", "2", out="whole") == 2
    assert "Expected to read videos/run/long.mp4, got an error of the system: " in capsys.readouterr().err
    assert contents("whole") == whole


def test_an_image_that_the_disk_fails_at_is_not_the_end_of_its_folder(here, capsys, monkeypatch):
    for number, frame in enumerate(moving(5)):
        write_png(Path("videos/images", f"{number}.png"), frame)
    monkeypatch.setattr(Path, "read_bytes", fail_to_read("3.png", Path.read_bytes))
    assert encode() == 1
    assert "images: the image 3.png can't be read: " in capsys.readouterr().err
    assert list(Manifest.read("latents").unread) == ["images"]


def test_an_error_that_all_videos_would_have_ends_it(here, capsys, monkeypatch):
    fail_at(monkeypatch, "long.mp4", errno.ENFILE)
    assert encode() == 2
    said = capsys.readouterr().err
    assert "Expected to read videos/run/long.mp4, got an error of the system: " in said
    assert said.endswith(f"FFmpeg says: {os.strerror(errno.ENFILE)}. Try again.\n")
    assert not Path("latents").exists()


def test_without_a_usable_video_nothing_is_written(here, capsys):
    Path("videos/text.mp4").write_text("no video")
    assert encode(videos="videos/text.mp4") == 2
    assert "Expected a video that can be read, got none of 1; nothing was written." in capsys.readouterr().err
    assert not Path("latents").exists()


def change_model(here: Path) -> None:
    checkpoint(here / "pool.ckpt", scale=0.5, frames=LENGTH)


def change_video(here: Path) -> None:
    write_video("videos/run/long.mp4", moving(30), 25)


def add_video(here: Path) -> None:
    write_video("videos/run/more.mp4", moving(9), 25)


@pytest.mark.parametrize(
    ("change", "words", "named"),
    [
        (change_model, (), "those of Pool "),
        (None, ("--dtype", "float16"), "dtype=float32, not dtype=float16"),
        (None, ("--size", "16"), "crop=none, not crop=largest centre square"),
        (None, ("--posterior", "moments"), "posterior=mean, not posterior=moments"),
        (None, ("--labels", "folders"), "0 classes, not 2 or others"),
        (change_video, (), "latents of run/long as it was before it changed"),
        (add_video, (), "no video run/more"),
    ],
)
def test_a_folder_of_other_latents_is_refused_and_replaced_on_request(here, capsys, change, words, named):
    encode()
    if change:
        change(here)
    before = contents("latents")
    assert encode(*words) == 2
    assert named in (said := capsys.readouterr().err)
    assert "--overwrite to begin anew" in said
    assert contents("latents") == before
    assert encode(*words, "--overwrite") == 0
    assert Manifest.read("latents").complete


def test_a_manifest_that_is_older_than_an_argument_of_the_model_is_of_the_same_latents(here):
    encode()
    whole = contents("latents")
    manifest = json.loads(whole["manifest.json"])
    assert manifest["model"]["init_args"].pop("sigma") == 0.1
    Path("latents/manifest.json").write_text(json.dumps(manifest))
    assert encode() == 0
    manifest["model"]["init_args"]["sigma"] = 0.2
    Path("latents/manifest.json").write_text(json.dumps(manifest))
    assert encode() == 2


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (("--clips_per_shard", "0"), "Expected --clips_per_shard of at least 1, got 0."),
        (("--batch_size", "-1"), "Expected --batch_size of at least 1, got -1."),
        (("--size", "0"), "Expected --size of at least 1, got 0."),
        (("--dtype", "float8"), "dtype"),
        (("--labels", "folders", "videos/run/long.mp4"), "Expected each video in a folder of its class"),
        (("--out", "pool.ckpt"), "Expected --out to be a folder, got the file pool.ckpt"),
        (("--out", "videos"), "Expected an empty folder or one of latents, got videos with other files"),
        (("--ckpt_path", "absent.ckpt"), "absent.ckpt"),
        (("absent.mp4",), "Expected a video at absent.mp4, got no such file"),
    ],
)
def test_what_can_not_be_is_one_line(here, capsys, words, expected):
    videos = "videos/run/long.mp4" if "folders" in words else "videos"
    assert encode(*words, videos=videos) == 2
    said = capsys.readouterr().err
    assert expected in said
    assert said.count("\n") == 1


def test_moments_of_codes_are_refused(here, capsys):
    checkpoint(here / "coded.ckpt", model=Coded(frames=LENGTH))
    assert encode("--posterior", "moments", ckpt="coded.ckpt") == 2
    assert "Expected Gaussian latents for --posterior moments, got grid (codes) of Coded" in capsys.readouterr().err
    assert not Path("latents").exists()


def test_a_second_run_on_the_same_folder_is_refused(here, capsys):
    Path("latents").mkdir()
    with open("latents/.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert encode() == 2
    assert "Expected latents for this encoding alone" in capsys.readouterr().err


def test_a_full_disk_is_one_line_and_what_is_whole_stays(here, capsys, monkeypatch):
    import vidtwin.apply.latent_writer as writer

    real = writer.write_shard

    def full(path, *rest):
        if path.name == "shard-00001.safetensors":
            raise OSError(28, "No space left on device")
        real(path, *rest)

    monkeypatch.setattr(writer, "write_shard", full)
    assert encode("--clips_per_shard", "2") == 1
    said = capsys.readouterr().err
    assert "Expected to write latents/shard-00001.safetensors, got 'No space left on device'" in said
    assert "1 of 4 shards are complete in latents; run the same command again to continue" in said
    monkeypatch.setattr(writer, "write_shard", real)
    assert encode("--clips_per_shard", "2") == 0


def test_latents_that_are_not_finite_are_named_and_the_other_shards_made(here, capsys):
    frames = moving(8)
    frames[0, 0, 0] = 0
    write_video("videos/black.mp4", np.zeros_like(frames), 25)
    checkpoint(here / "nan.ckpt", frames=LENGTH, nan_on=[0])
    assert encode("--clips_per_shard", "1", ckpt="nan.ckpt") == 1
    said = capsys.readouterr().err
    assert "black: expected grid of finite numbers in float32, got others in the window from frame 0 on" in said
    assert "7 of 8 shards are complete" in said


def test_the_hard_clips_are_encoded_with_their_frames(shared, tmp_path, monkeypatch):
    """Upright, and counted as a decoder of its own counts them: every frame that decodes is there once."""
    clips = [shared / "data/clips/hard" / name for name in HARD]
    monkeypatch.chdir(tmp_path)
    checkpoint(tmp_path / "pool.ckpt", scale=1.0, frames=LENGTH)
    for clip in clips:
        Path("videos").mkdir(exist_ok=True)
        shutil.copy(clip, "videos")
    assert encode("--batch_size", "4") == 1  # two are damaged
    manifest = Manifest.read("latents")
    assert {video.name: (video.num_frames, video.height, video.width) for video in manifest.videos} == {
        Path(name).stem: found for name, found in HARD.items()
    }


HARD = {
    "corrupted.mp4": (28, 720, 1280),
    "eight_frames.avi": (8, 240, 320),
    "one_frame.avi": (1, 240, 320),
    "rotate_90.mov": (3, 568, 320),
    "short_19f_720p.mp4": (19, 720, 1280),
    "small_120x90.avi": (84, 90, 150),
    "truncated_half.avi": (78, 240, 320),
}
