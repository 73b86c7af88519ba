"""`vidtwin doctor` on videos with known faults, motion, cuts and copies, and on the real ones."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest

from vidtwin.cli import commands
from vidtwin.datamodules.doctor import measure as measuring
from vidtwin.datamodules.doctor import pool
from vidtwin.datamodules.doctor.measure import Measurement, measure
from vidtwin.datamodules.doctor.report import cut_share, histogram
from vidtwin.datamodules.doctor.splits import check_ucf, find_copies
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError
from vidtwin.video import VideoError, iter_frames, write_video

SIZE = (48, 64)  # height and width


def texture(seed: int, size: tuple[int, int] = SIZE) -> np.ndarray:
    """Draw a picture with large, smooth areas, as real ones have, uint8 (H, W, 3)."""
    coarse = np.random.default_rng(seed).uniform(20, 235, (4, 5, 3))
    rows, columns = np.linspace(0, 3, size[0]), np.linspace(0, 4, size[1])
    upper, left = np.minimum(rows.astype(int), 2), np.minimum(columns.astype(int), 3)
    y, x = (rows - upper)[:, None, None], (columns - left)[None, :, None]
    top = coarse[upper][:, left] * (1 - x) + coarse[upper][:, left + 1] * x
    bottom = coarse[upper + 1][:, left] * (1 - x) + coarse[upper + 1][:, left + 1] * x
    return (top * (1 - y) + bottom * y).astype(np.uint8)


def scene(seed: int, frames: int = 50, step: int = 2) -> Iterator[np.ndarray]:
    """Pan a camera over a texture by `step` pixels per frame."""
    wide = texture(seed, (SIZE[0], SIZE[1] + frames * step))
    for frame in range(frames):
        yield wide[:, frame * step : frame * step + SIZE[1]]


def run_in_process(function: Any, jobs: Any, limits: Any, workers: int) -> Iterator[tuple[int, Any]]:
    """Replace `pool.run` without processes, which take a second to start."""
    for index, job in enumerate(jobs):
        yield index, function(*job)


@pytest.fixture
def in_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "run", run_in_process)


def scan(folder: Path, out: Path, *options: str) -> dict[str, Any]:
    """Run the command; return its report with the videos by name."""
    assert commands.run("doctor", [str(folder), "--out", str(out), *options]) == 0
    report = json.loads((out / "report.json").read_text())
    return {**report, "videos": {row["name"]: row for row in report["videos"]}}


def listed(out: Path) -> dict[str, str]:
    """Read the exclusion list as the data modules do: reasons by name."""
    lines = (out / "exclude.txt").read_text().splitlines()
    return dict(line.split("\t", 1) for line in lines if line and not line.startswith("#"))


# ---- one file


def test_motion_is_the_change_of_luma_in_an_eighth_of_a_second(tmp_path: Path) -> None:
    grey = [np.full((*SIZE, 3), 100 + 10 * (frame % 2), np.uint8) for frame in range(32)]
    flicker = measure(write_video(tmp_path / "a.mp4", grey, 8), "a.mp4")
    assert flicker.motion == pytest.approx(10, abs=1)
    assert flicker.luma == pytest.approx(105, abs=1)
    # Every grey is shown for a quarter of a second, whatever the rate: half of the steps see a change.
    slower = [grey[frame // 6 % 2] for frame in range(96)]
    assert measure(write_video(tmp_path / "b.mp4", slower, 24), "b.mp4").motion == pytest.approx(5, abs=1)
    still = measure(write_video(tmp_path / "c.mp4", [texture(1)] * 20, 10), "c.mp4")
    assert still.motion == pytest.approx(0, abs=0.1)
    assert measure(write_video(tmp_path / "d.mp4", [texture(1)], 10), "d.mp4").motion is None


def test_a_cut_is_found_at_its_time(tmp_path: Path) -> None:
    found = measure(write_video(tmp_path / "a.mp4", [*scene(1, 30), *scene(2, 45)], 25), "a.mp4")
    assert found.cuts == [1.2]
    assert (found.frames, found.fps, found.seconds) == (75, 25.0, 3.0)
    # Four frames at 8 fps last 0.375 s and can begin at the first 66 frames.
    assert cut_share(found, 4, 8.0) == pytest.approx(0.375 / (66 / 25))
    assert cut_share(found, 16, 8.0) == 1.0
    assert cut_share(found, 32, 8.0) is None


def test_a_fast_pan_with_repeated_frames_has_no_cut(tmp_path: Path) -> None:
    """A rate of 15 made 25 repeats frames; the next one then differs from its predecessor like a new scene."""
    pan = list(scene(3, 60, step=5))
    repeated = [pan[int(frame * 15 / 25)] for frame in range(100)]
    assert measure(write_video(tmp_path / "a.mp4", repeated, 25), "a.mp4").cuts == []


def test_the_container_is_described(tmp_path: Path) -> None:
    found = measure(write_video(tmp_path / "a.avi", scene(1, 20), 10, "mpeg4", g="5"), "a.avi")
    assert (found.container, found.codec, found.pixel_format) == ("avi", "mpeg4", "yuv420p")
    assert (found.width, found.height, found.shown_width, found.shown_height) == (64, 48, 64, 48)
    assert (found.header_frames, found.frames, found.keyframes) == (20, 20, 4)
    assert (found.rotation, found.aspect, found.variable_rate, found.disordered) == (0, "1:1", False, False)
    assert found.fault is None


@pytest.mark.parametrize("kind", ["unreadable", "truncated", "corrupt"])
def test_a_broken_file_has_its_kind_and_reason(tmp_path: Path, kind: str) -> None:
    path = write_video(tmp_path / "broken.avi", scene(1, 50), 25, "mpeg4")
    with av.open(str(path)) as container:
        place, size = [(packet.pos, packet.size) for packet in container.demux() if packet.size][30]
    assert place is not None
    whole = path.read_bytes()
    damaged = whole[: place + 20] + bytes(size - 20) + whole[place + size :]
    path.write_bytes({"unreadable": b"text" * 100, "truncated": whole[:place], "corrupt": damaged}[kind])
    found = measure(path, "broken.avi")
    assert found.fault == kind
    assert found.reason
    assert str(tmp_path) not in found.reason
    assert "\n" not in found.reason
    if kind != "unreadable":
        assert found.frames is not None
        assert 0 < found.frames < 50


def test_no_mutation_of_a_file_raises(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    for suffix, codec in ((".mp4", "libx264"), (".avi", "mpeg4"), (".mkv", "libx264")):
        whole = write_video(tmp_path / f"whole{suffix}", scene(1, 20), 25, codec).read_bytes()
        for trial in range(20):
            content = bytearray(whole)
            for _ in range(1 + trial):
                content[random.integers(len(content))] = random.integers(256)
            path = tmp_path / f"mutated{suffix}"
            path.write_bytes(bytes(content[: random.integers(1, len(content))] if trial % 4 == 0 else content))
            found = measure(path, path.name)
            assert found.fault is None or found.reason
            json.dumps(found.__dict__, allow_nan=False)
    assert measure(tmp_path / "absent.mp4", "absent.mp4").fault == "unreadable"


# ---- workers


KILLER = """
import os, signal, time
from tqdm.std import TqdmDefaultWriteLock
from vidtwin.console import log
from vidtwin.datamodules.doctor.measure import measure as measure_really

def measure(path, name):
    if "kills" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exits" in name:
        os._exit(3)
    if "hangs" in name:
        time.sleep(600)
    if "whole" in name:
        log("a message")
        if hasattr(TqdmDefaultWriteLock, "mp_lock"):
            os._exit(4)  # killed later, it would leave that lock's semaphore
    return measure_really(path, name)
"""


def test_a_file_that_kills_or_blocks_its_worker_is_named_and_the_scan_continues(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    module = tmp_path / "killer_for_doctor.py"
    module.write_text(KILLER)
    monkeypatch.syspath_prepend(str(tmp_path))
    import killer_for_doctor  # type: ignore[import-not-found]

    videos = tmp_path / "videos"
    first = write_video(videos / "whole0.mp4", scene(0, 20), 10)
    for name in ("kills", "exits", "hangs", "whole1", "whole2"):
        shutil.copy(first, videos / f"{name}.mp4")
    with monkeypatch.context() as patch:
        patch.setattr(measuring, "measure", killer_for_doctor.measure)
        report = scan(videos, tmp_path / "out", "--workers", "2", "--time_limit", "3")
    rows = report["videos"]
    assert {name: row["fault"] for name, row in rows.items() if row["fault"]} == {
        "kills.mp4": "crash",
        "exits.mp4": "crash",
        "hangs.mp4": "timeout",
    }
    assert rows["kills.mp4"]["reason"] == "its worker process was ended by SIGKILL"
    assert rows["exits.mp4"]["reason"] == "its worker process ended with exit code 3"
    assert rows["hangs.mp4"]["reason"] == "not done after 3 s"
    assert set(listed(tmp_path / "out")) == {"kills.mp4", "exits.mp4", "hangs.mp4"}
    assert "3 broken" in capsys.readouterr().out
    # A machine under load may cause such a verdict, so it is not kept.
    monkeypatch.setattr(pool, "run", run_in_process)
    assert scan(videos, tmp_path / "out")["totals"]["broken"] == 0


def test_workers_that_cannot_start_are_one_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "_serve", exec)  # called with a pipe for a program
    with pytest.raises(UserError, match=r"Expected worker processes to start; .* ended with exit code 1"):
        list(pool.run(len, [("a",)], [10.0], 1))


def test_ctrl_c_keeps_what_was_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for seed in range(3):
        write_video(tmp_path / "videos" / f"{seed}.mp4", scene(seed, 20), 10)
    counted: list[int] = []

    def interrupted(function: Any, jobs: Any, limits: Any, workers: int) -> Iterator[tuple[int, Any]]:
        counted.append(len(jobs))
        yield from list(run_in_process(function, jobs, limits, workers))[:2]
        raise KeyboardInterrupt

    monkeypatch.setattr(pool, "run", interrupted)
    command = [str(tmp_path / "videos"), "--out", str(tmp_path / "out")]
    assert commands.run("doctor", command) == 130
    assert "the same command measures the rest" in capsys.readouterr().err
    assert not (tmp_path / "out" / "report.json").exists()
    with (tmp_path / "out" / "measurements.jsonl").open("a") as file:
        file.write('{"name": "half a li')  # a kill in the middle of a line
    assert commands.run("doctor", command) == 130
    assert counted == [3, 1]
    monkeypatch.setattr(pool, "run", run_in_process)
    assert scan(tmp_path / "videos", tmp_path / "out")["totals"]["videos"] == 3


@pytest.mark.skipif(sys.platform == "win32", reason="sends a signal")
def test_ctrl_c_in_a_terminal_ends_all_processes(tmp_path: Path) -> None:
    (tmp_path / "killer_for_doctor.py").write_text(KILLER)
    write_video(tmp_path / "videos" / "hangs.mp4", scene(0, 20), 10)
    write_video(tmp_path / "videos" / "whole.mp4", scene(0, 20), 10)
    program = tmp_path / "program.py"
    program.write_text(
        "import signal, sys, killer_for_doctor\n"
        "from vidtwin.cli import main\n"
        "from vidtwin.datamodules.doctor import measure\n"
        "if __name__ == '__mp_main__':\n"  # a worker that still starts
        "    signal.raise_signal(signal.SIGINT)\n"
        "if __name__ == '__main__':\n"
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # ignored where tests run in the background
        "    measure.measure = killer_for_doctor.measure\n"
        "    sys.exit(main(['doctor', *sys.argv[1:]]))\n"
    )
    command = [sys.executable, str(program), str(tmp_path / "videos"), "--out", str(tmp_path / "out"), "--workers", "2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, start_new_session=True)
    journal = tmp_path / "out" / "measurements.jsonl"
    end = time.monotonic() + 60
    while process.poll() is None and time.monotonic() < end and not (journal.exists() and journal.read_text()):
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    _, text = process.communicate(timeout=30)
    assert process.returncode == 130
    assert "Traceback" not in text
    assert "whole.mp4" in journal.read_text()


def test_an_interrupt_that_python_drops_ends_the_scan_too(monkeypatch: pytest.MonkeyPatch) -> None:
    dropped: list[int] = []
    before = signal.signal(signal.SIGINT, lambda number, frame: dropped.append(number))  # raises nothing
    try:
        jobs = pool.run(time.sleep, [(0,), (60,)], [100.0, 100.0], 2)
        next(jobs)
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            next(jobs)
    finally:
        signal.signal(signal.SIGINT, before)
    assert dropped


def test_a_second_run_measures_what_is_new_or_changed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    measured: list[str] = []

    def counting(function: Any, jobs: Any, limits: Any, workers: int) -> Iterator[tuple[int, Any]]:
        measured[:] = sorted(name for _, name in jobs)
        return run_in_process(function, jobs, limits, workers)

    monkeypatch.setattr(pool, "run", counting)
    videos, out = tmp_path / "videos", tmp_path / "out"
    for seed in range(3):
        write_video(videos / f"{seed}.mp4", scene(seed, 20), 10)
    first = scan(videos, out)
    assert measured == ["0.mp4", "1.mp4", "2.mp4"]
    second = scan(videos, out)
    assert measured == []
    assert second == first
    write_video(videos / "1.mp4", scene(7, 20), 10)
    write_video(videos / "new.mp4", scene(8, 20), 10)
    third = scan(videos, out, "--num_frames", "8")
    assert measured == ["1.mp4", "new.mp4"]
    assert third["videos"]["1.mp4"]["fingerprint"] != first["videos"]["1.mp4"]["fingerprint"]
    assert third["videos"]["0.mp4"]["fingerprint"] == first["videos"]["0.mp4"]["fingerprint"]


def test_failures_of_the_system_are_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(pool, "run", run_in_process)
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in ("whole", "disk", "handles", "memory"):
        write_video(videos / f"{name}.mp4", scene(0, 20), 10)
    (videos / "text.mp4").write_bytes(b"text" * 100)
    digest, open_really = measuring._digest, measuring.open_video

    def failing_digest(path: Path) -> str:
        if path.stem == "disk":
            raise OSError(errno.EIO, "Input/output error", str(path))
        return digest(path)

    @contextmanager
    def failing_open(path: Path) -> Iterator[Any]:
        if path.stem == "handles":
            error = VideoError(f"{path}: expected a readable video, FFmpeg says: Too many open files.")
            error.lasting = False
            raise error
        if path.stem == "memory":
            raise MemoryError
        with open_really(path) as opened:
            yield opened

    with monkeypatch.context() as patch:
        patch.setattr(measuring, "_digest", failing_digest)
        patch.setattr(measuring, "open_video", failing_open)
        rows = scan(videos, out)["videos"]
    faults = {name: row["reason"] for name, row in rows.items() if row["fault"]}
    assert set(faults) == {"disk.mp4", "handles.mp4", "memory.mp4", "text.mp4"}
    assert faults["disk.mp4"] == "it can't be read: Input/output error"
    assert faults["memory.mp4"] == "there was not enough memory to measure it"
    assert "Too many open files" in faults["handles.mp4"]
    measured = [json.loads(line)["name"] for line in (out / "measurements.jsonl").read_text().splitlines()]
    assert sorted(measured) == ["text.mp4", "whole.mp4"]
    assert {name for name, row in scan(videos, out)["videos"].items() if row["fault"]} == {"text.mp4"}


def test_measurements_of_another_version_are_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pool, "run", run_in_process)
    videos, out = tmp_path / "videos", tmp_path / "out"
    for name in ("old", "new", "unknown"):
        write_video(videos / f"{name}.mp4", scene(0, 20), 10)
    scan(videos, out)
    rows = [json.loads(line) for line in (out / "measurements.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"fault": "corrupt", "reason": "as was thought"}
        if row["name"] == "old.mp4":
            row["version"] -= 1
        if row["name"] == "unknown.mp4":
            del row["version"]
    (out / "measurements.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert {name for name, row in scan(videos, out)["videos"].items() if row["fault"]} == {"new.mp4"}


# ---- verdicts and lists


@pytest.mark.usefixtures("in_process")
def test_the_list_holds_the_requested_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    write_video(videos / "train" / "fine.mp4", scene(0), 10)
    write_video(videos / "train" / "cut.mp4", [*scene(1, 25), *scene(2, 25)], 10)
    write_video(videos / "train" / "short.mp4", scene(3, 15), 10)
    write_video(videos / "train" / "slow.mp4", scene(4), 5)
    write_video(videos / "train" / "still.mp4", [texture(5)] * 50, 10)
    write_video(videos / "train" / "black.mp4", [np.zeros((*SIZE, 3), np.uint8)] * 50, 10)
    write_video(videos / "train" / "original.mp4", scene(6), 10)
    (videos / "train" / "broken.mp4").write_bytes(b"")
    (videos / "train" / "#odd.mp4").write_bytes(b"")
    (videos / "sound.mp3").write_bytes(b"")
    small = [picture[::2, ::2] for picture in scene(6)]
    write_video(videos / "test" / "copy.mp4", small, 10, crf="30")
    report = scan(videos, out)
    assert report["totals"] | {"bytes": 0, "frames": 0, "seconds": 0, "cut_share": 0} == {
        "videos": 10,
        "bytes": 0,
        "frames": 0,
        "seconds": 0,
        "cut_share": 0,
        "no_verdict": 2,
        "broken": 2,
        "short": 1,
        "slow": 1,
        "static": 2,
        "cuts": 1,
        "duplicates": 1,
    }
    assert report["other_files"] == {".mp3": 1}
    assert report["splits"] == {"test": 1, "train": 9}
    names = listed(out)
    assert set(names) == {"train/broken.mp4", "train/#odd.mp4", "train/original.mp4"}  # train leaves, test stays
    assert names["train/original.mp4"] == "duplicate: shows the same as test/copy.mp4 in test"
    assert names["train/broken.mp4"].startswith("unreadable: expected a readable video")
    text = capsys.readouterr().out
    assert f"--data.exclude {out / 'exclude.txt'}" in text
    assert "train/cut.mp4: 2.50" in text
    scan(videos, out, "--frame_steps", "whole", "--exclude", "short,slow")  # 8 fps: all frames of 10 and of 5
    assert listed(out) == {"train/short.mp4": "short: 15 frames at 10 per second"}
    scan(videos, out, "--exclude", "cuts,short,slow,static")
    assert listed(out) == {
        "train/cut.mp4": "cuts: 1, the first at 2.50 s",
        "train/short.mp4": "short: 15 frames at 10 per second",
        "train/slow.mp4": "slow: 50 frames at 5 per second",
        "train/still.mp4": "static: frozen",
        "train/black.mp4": "static: black",
    }


@pytest.mark.usefixtures("in_process")
def test_names_that_a_list_cannot_hold_are_comments_in_it(tmp_path: Path) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "#odd.mp4").write_bytes(b"")
    (tmp_path / "videos" / "two\tparts.mp4").write_bytes(b"")
    scan(tmp_path / "videos", tmp_path / "out")
    assert listed(tmp_path / "out") == {}
    assert (tmp_path / "out" / "exclude.txt").read_text().count("rename it: ") == 2


@pytest.mark.usefixtures("in_process")
@pytest.mark.skipif(sys.platform != "linux", reason="file names are text there")
def test_names_may_hold_any_bytes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    write_video(videos / "größe.mp4", scene(0), 10)
    odd = Path(os.fsdecode(os.fsencode(videos) + b"/caf\xe9.mp4"))
    odd.write_bytes(b"text" * 100)
    scan(videos, out)
    assert "caf\\udce9.mp4: unreadable" in capsys.readouterr().out
    assert r"rename it: 'caf\udce9.mp4' unreadable" in (out / "exclude.txt").read_text()
    with (out / "measurements.jsonl").open("ab") as file:
        file.write('{"name": "gr\u00f6'.encode()[:-1])  # cut off within a letter
    assert set(scan(videos, out)["videos"]) == {"größe.mp4", odd.name}
    with pytest.raises(UserError, match=r"expected names in UTF-8, 1 are not \('caf\\udce9.mp4'\); rename these"):
        VideoFolder(str(videos)).videos("train")


@pytest.mark.usefixtures("in_process")
def test_folders_of_images_are_videos_on_request(tmp_path: Path) -> None:
    import PIL.Image

    write_video(tmp_path / "videos" / "a.mp4", scene(0), 24)
    for index, picture in enumerate(scene(1, 48)):
        path = tmp_path / "videos" / "frames" / f"frame{index:05d}.png"
        path.parent.mkdir(exist_ok=True)
        PIL.Image.fromarray(picture).save(path)
    assert scan(tmp_path / "videos", tmp_path / "out")["other_files"] == {".png": 48}
    found = scan(tmp_path / "videos", tmp_path / "out", "--image_folders")["videos"]
    assert set(found) == {"a.mp4", "frames"}
    assert (found["frames"]["frames"], found["frames"]["seconds"]) == (48, 2.0)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["{}/absent"], "Expected a folder of videos, got .*absent, which is not a folder"),
        (["{}"], r"expected videos \(\.264, .*found none; with --image_folders"),
        ([], "Expected DIR, got none; vidtwin doctor --help"),
        (["{}", "--exclude", "broken,brokn"], "Expected --exclude with some of .*, got 'brokn'; did you mean 'broken'"),
        (["{}", "--workers", "0"], "Expected --workers of at least 1, got 0"),
        (["{}", "--fps", "-1"], "Expected --fps above 0, got -1"),
        (["{}", "--work", "2"], "Expected options that exist, got --work 2; did you mean 'workers'"),
    ],
)
def test_a_mistake_is_one_line(tmp_path: Path, argv: list[str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        commands.run("doctor", [word.format(tmp_path) for word in argv])


def test_help_succeeds_and_importing_is_light(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.run("doctor", ["--help"]) == 0
    assert "--image_folders" in capsys.readouterr().out
    heavy = "{'torch', 'lightning', 'av', 'numpy'}"
    code = f"import sys, vidtwin.datamodules.doctor.command; print({heavy} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_a_histogram_counts_from_edge_to_edge_and_its_last_bin_is_open() -> None:
    assert histogram([0, 0.5, 1, 9, 10, 1e9], [0, 1, 10]) == [2, 2, 2]


# ---- copies and splits


def copies_of(*videos: tuple[str, Path], **splits: str) -> dict[str, Any]:
    return find_copies([measure(path, name) for name, path in videos], splits)


def test_a_copy_is_found_and_another_clip_of_its_scene_is_not(tmp_path: Path) -> None:
    """All show one wall; copies show the same movement before it, the other clip another one."""

    def clip(direction: int, size: int = 1) -> Iterator[np.ndarray]:
        for frame in range(50):
            picture = texture(0).copy()
            place = abs(3 * frame % 80 - 40)
            place = place if direction > 0 else 40 - place
            picture[4:44, place : place + 20] = 255 - picture[4:44, place : place + 20]
            yield picture.repeat(size, 0).repeat(size, 1)

    clips = {
        "a": write_video(tmp_path / "a.mp4", clip(1), 10),
        "again": write_video(tmp_path / "again.avi", clip(1, 2), 10, "mpeg4"),
        "same": Path(shutil.copy(tmp_path / "a.mp4", tmp_path / "same.mp4")),
        "other": write_video(tmp_path / "other.mp4", clip(-1), 10),
        "longer": write_video(tmp_path / "longer.mp4", [*clip(1), *scene(3)], 10),
    }
    found = copies_of(*clips.items(), a="train", again="test", same="train", other="test", longer="val")
    assert {(c["name"], c["copy_of"], c["exact"]) for c in found["across"]} == {
        ("a", "again", False),
        ("same", "again", False),
    }
    assert [(c["name"], c["copy_of"], c["exact"]) for c in found["within"]] == [("same", "a", True)]
    assert found["alike"] == []


def test_still_lookalikes_are_listed_but_not_called_copies(tmp_path: Path) -> None:
    a = write_video(tmp_path / "a.mp4", [texture(0)] * 30, 10)
    b = write_video(tmp_path / "b.mp4", [texture(0)] * 30, 10, crf="30")
    black = [write_video(tmp_path / f"{n}.mp4", [np.zeros((*SIZE, 3), np.uint8)] * n, 10) for n in (30, 31)]
    found = copies_of(("a", a), ("b", b), ("c", black[0]), ("d", black[1]), a="train", b="test", c="train", d="test")
    assert [(c["name"], c["copy_of"]) for c in found["alike"]] == [("a", "b")]
    assert found["across"] == found["within"] == []


def test_one_copy_among_13320_videos_is_found() -> None:
    random = np.random.default_rng(0)
    words = [[f"{int(word):016x}" for word in row] for row in random.integers(0, 2**63, (13320, 8))]
    words[77] = words[13000]
    lengths = random.gamma(5, 1.4, 13320) + 1
    lengths[77] = lengths[13000]
    videos = [
        Measurement(f"{i}.avi", 1, 1, sha256=str(i), seconds=float(lengths[i]), motion=5.0, fingerprint=words[i])
        for i in range(13320)
    ]
    found = find_copies(videos, {video.name: "train" for video in videos} | {"77.avi": "test"})
    assert [(c["name"], c["copy_of"]) for c in found["across"]] == [("13000.avi", "77.avi")]
    assert found["within"] == []


def test_the_lists_of_ucf101_are_checked(small_ucf: Path, tmp_path: Path) -> None:
    data = shutil.copytree(small_ucf, tmp_path / "data")
    names = sorted(path.relative_to(data / "UCF-101").as_posix() for path in (data / "UCF-101").rglob("*.avi"))
    fine = check_ucf(names, data / "ucfTrainTestlist")
    assert fine["problems"] == []
    assert fine["splits"]["1"] | {"official_train": 0, "official_test": 0} == {
        "train": 12,
        "test": 4,
        "official_train": 0,
        "official_test": 0,
        "validation": 4,
    }
    train = data / "ucfTrainTestlist" / "trainlist01.txt"
    lines = train.read_text().splitlines()
    moved = (data / "ucfTrainTestlist" / "testlist01.txt").read_text().splitlines()[0]
    lines = [line for line in lines if "_g25_" not in line] + [f"{moved} 1"]
    train.write_bytes("\r\n".join([*lines, ""]).encode())
    wrong = check_ucf([*names[1:], "New/v_New_g01_c01.avi"], data / "ucfTrainTestlist")
    text = "\n".join(wrong["problems"])
    assert f"1 listed, but not there: {names[0]}" in text
    assert "there, but not listed: " in text
    assert f"1 in train and test: {moved}" in text
    assert "1 groups in train and test: Bounce g01" in text
    assert "no group 24 or 25 in the train list" in text
    assert "1 class folders that classInd.txt lacks: New" in text


# ---- real videos


@pytest.mark.usefixtures("in_process")
def test_every_real_clip_gets_its_verdict(shared: Path, tmp_path: Path) -> None:
    report = scan(shared / "data" / "clips", tmp_path)
    rows = report["videos"]
    assert report["other_files"] == {".mp3": 1, ".tsv": 1}
    assert {Path(name).name: row["fault"] for name, row in rows.items() if row["fault"]} == {
        "corrupted.mp4": "corrupt",
        "h264_raw_error_I_P.264": "corrupt",
        "header_only_300B.avi": "unreadable",
        "text_renamed.avi": "unreadable",
        "truncated_half.avi": "truncated",
        "truncated_half_moov_lost.mp4": "unreadable",
        "zero_byte.avi": "unreadable",
    }
    assert rows["hard/truncated_half.avi"]["frames"] == 78
    cut = {name: row["cuts"] for name, row in rows.items() if row["cuts"]}
    assert cut["bikes.mp4"] == [1.2, 3.04, 5.48, 7.48, 9.68]
    assert len(cut["hard/rapid_scene_cuts_LS_SVA_D.mp4"]) > 200
    # A smear of lost data, encoded as it was, ends in them all at once.
    assert set(cut) - {"bikes.mp4", "hard/rapid_scene_cuts_LS_SVA_D.mp4"} == {
        "mma_demo.mp4",
        "hard/nonzero_start_editlist.mp4",
    }
    turned = rows["hard/rotate_90.mov"]
    assert (turned["width"], turned["height"], turned["shown_width"], turned["shown_height"]) == (568, 320, 320, 568)
    assert (rows["hard/anamorphic_sar10_11.avi"]["shown_width"], rows["hard/gray.mp4"]["shown_width"]) == (320, 427)
    assert rows["v_ApplyEyeMakeup_g01_c01.avi"]["disordered"]
    assert rows["v_ApplyEyeMakeup_g01_c01.avi"]["keyframes"] == 1
    manifest = (shared / "data" / "clips" / "MANIFEST.tsv").read_text().splitlines()[1:]
    decoded = {fields[0]: int(fields[7]) for fields in (line.split("\t") for line in manifest)}
    wrong = {n: row["frames"] for n, row in rows.items() if not row["fault"] and row["frames"] != decoded.get(n)}
    assert wrong == {}


@pytest.mark.usefixtures("in_process")
def test_the_real_splits_share_nothing_until_a_copy_is_put_there(shared: Path, tmp_path: Path) -> None:
    tree = shutil.copytree(shared / "data" / "ucf_like", tmp_path / "data")
    report = scan(tree, tmp_path / "out")
    assert report["splits"] == {"test": 23, "train": 60}
    assert report["copies"]["across"] == report["copies"]["alike"] == []
    assert report["totals"]["broken"] == 0
    assert report["split_check"]["line_ends"] == "CRLF"
    assert report["split_check"]["other_spelling"] == ["HandstandPushups/v_HandStandPushups_…"]
    lists = tree / "ucfTrainTestlist"
    test_name = (lists / "testlist01.txt").read_text().split()[0]
    train_name = next(line.split()[0] for line in (lists / "trainlist01.txt").read_text().splitlines() if line)
    pictures = list(iter_frames(tree / "UCF-101" / test_name))
    write_video(tree / "UCF-101" / train_name, pictures, 25, "mpeg4", global_quality=str(10 * 118))
    report = scan(tree, tmp_path / "out")
    assert [(copy["name"], copy["copy_of"]) for copy in report["copies"]["across"]] == [(train_name, test_name)]
    assert set(listed(tmp_path / "out")) == {train_name}
