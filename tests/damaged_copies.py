"""Damaged copies of real clips through the reader.

    python tests/damaged_copies.py ../shared/data/clips --copies 500

Copy `seed` is a real clip with flipped bits, cut off, or with shuffled chunks: clip, kind and places are drawn from the
seed, so that a copy that fails can be made again. Each is surveyed and read at three places, in a process that is
watched: a crash, more than a minute, or memory that grows is a failure. What comes out without an error is held against
what FFmpeg itself says of that copy when it is asked to conceal damage: a frame that it marks as corrupt, an error in
the range that was decoded, or frames that are absent must have been told.
"""

import argparse
import multiprocessing
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np

from vidtwin.video import VideoError, VideoInfo, read_clip, survey

CLIPS = (
    "v_ApplyEyeMakeup_g01_c01.avi", "v_BaseballPitch_g01_c01.avi", "paddle_example.avi", "anet_GGSY1Qvo990.mp4",
    "carphone_pristine.mp4", "flipping_a_pancake.mkv", "foreman_cif_openh264.mp4", "mma_demo.mp4",
    "mobile_cif_30f.mp4", "realshort.mp4", "hard/av1.mkv", "hard/bframes_unpacked.avi", "hard/h265_10bit.mp4",
    "hard/odd_171x129_yuv444.mp4", "hard/small_120x90.avi",
)  # fmt: skip
KINDS = ("bit flips", "cut off", "shuffled chunks")
SECONDS = 60
FRAMES, FPS, SIZE = 8, 8.0, 64


@dataclass(frozen=True)
class Outcome:
    """What became of a copy.

    Attributes:
        told: Kind of the `VideoError` that the survey or the first failing clip gave; None: all was read.
        silent: What FFmpeg knew and the reader did not tell.
        changed: Whether clips came out that differ from those of the whole file, without a sign from FFmpeg.
        megabytes: Memory of the process afterwards.
    """

    seed: int
    clip: str
    kind: str
    told: str | None
    silent: str
    changed: bool
    megabytes: float


def mutate(content: bytes, kind: str, random: np.random.Generator) -> bytes:
    damaged = bytearray(content)
    if kind == "bit flips":
        for place in random.integers(0, len(damaged), int(random.integers(1, 30))):
            damaged[place] ^= 1 << int(random.integers(8))
    elif kind == "cut off":
        del damaged[int(random.integers(1, len(damaged))) :]
    else:
        size = int(random.integers(512, 8192))
        chunks = [damaged[k : k + size] for k in range(0, len(damaged), size)]
        first = int(random.integers(0, max(1, len(chunks) - 4)))
        part = chunks[first : first + 4]
        chunks[first : first + 4] = [part[k] for k in random.permutation(len(part))]
        damaged = bytearray(b"".join(chunks))
    return bytes(damaged)


def starts_of(info: VideoInfo) -> list[int]:
    """Frames at which clips begin: the first, the middle and the last possible one."""
    last = info.num_frames - 1 - int((FRAMES - 1) * info.fps / FPS)
    return sorted({0, max(0, last // 2), max(0, last)})


def known_to_ffmpeg(path: Path, info: VideoInfo, start: int) -> str:
    """Damage that a plain, concealing decode shows from the beginning of the file to the end of a clip."""
    until = start + int((FRAMES - 1) * info.fps / FPS)
    try:
        with av.open(str(path)) as container:
            container.streams.video[0].thread_type = "NONE"
            count = 0
            for frame in container.decode(video=0):
                if frame.is_corrupt:
                    return f"frame {count} is marked as corrupt"
                if count == until:
                    return ""
                count += 1
        return f"ends after {count} of {until + 1} frames" if count + 3 <= until else ""
    except (av.error.FFmpegError, MemoryError) as error:
        return f"decoding raises {type(error).__name__}"


def examine(folder: Path, seed: int, scratch: Path) -> Outcome:
    random = np.random.default_rng(seed)
    name, kind = CLIPS[int(random.integers(len(CLIPS)))], KINDS[seed % len(KINDS)]
    original = folder / name
    path = scratch / f"{seed}{original.suffix}"
    path.write_bytes(mutate(original.read_bytes(), kind, random))
    told, silent, changed = None, "", False
    try:
        info = survey(path)
        for start in starts_of(info):
            try:
                clip = read_clip(path, start / info.fps, FRAMES, FPS, SIZE)
            except VideoError as error:
                told = told or error.kind
                continue
            if start == 0 or path.suffix == ".avi":  # elsewhere the reader seeks, and need not see all before
                silent = silent or known_to_ffmpeg(path, info, start)
            try:
                whole = read_clip(original, start / info.fps, FRAMES, FPS, SIZE)
                changed |= bool(np.abs(whole.astype(int) - clip).mean() > 2)
            except VideoError:
                changed = True
    except VideoError as error:
        told = error.kind
    finally:
        path.unlink()
    pages = int(Path("/proc/self/statm").read_text().split()[1]) if Path("/proc/self/statm").exists() else 0
    return Outcome(seed, name, kind, told, silent, changed, pages * 4096 / 1e6)


def _worker(folder: Path, seeds: Sequence[int], pipe: "multiprocessing.connection.Connection") -> None:
    with tempfile.TemporaryDirectory() as scratch:
        for seed in seeds:
            pipe.send(examine(folder, seed, Path(scratch)))


def run(folder: Path, seeds: Sequence[int]) -> list[Outcome]:
    """Examine the copies of these seeds in one watched process; `RuntimeError` names the seed that ends or stops it."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_worker, args=(folder, seeds, sender))
    process.start()
    sender.close()
    outcomes: list[Outcome] = []
    try:
        for seed in seeds:
            if not receiver.poll(SECONDS):
                raise RuntimeError(f"copy {seed} took more than {SECONDS} s")
            try:
                outcomes.append(receiver.recv())
            except EOFError:
                process.join()
                raise RuntimeError(f"copy {seed} ended the process with {process.exitcode}") from None
    finally:
        process.terminate()
        process.join()
    return outcomes


def growth(outcomes: list[Outcome]) -> float:
    """Megabytes that the second half of the copies needed beyond the first, by their medians."""
    half = len(outcomes) // 2
    return float(np.median([o.megabytes for o in outcomes[half:]]) - np.median([o.megabytes for o in outcomes[:half]]))


def main() -> int:
    parser = argparse.ArgumentParser(description="Damaged copies of real clips through the reader.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--copies", type=int, default=500)
    args = parser.parse_args()
    outcomes = run(args.folder, range(args.copies))
    print("| damage | copies | unreadable | truncated | corrupt | short | unchanged | changed without an error |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    for kind in KINDS:
        own = [outcome for outcome in outcomes if outcome.kind == kind]
        told = Counter(outcome.told for outcome in own)
        unchanged = sum(outcome.told is None and not outcome.changed for outcome in own)
        counts = [told[key] for key in ("unreadable", "truncated", "corrupt", "short")]
        print(f"| {kind} | {len(own)} | {' | '.join(map(str, counts))} | {unchanged} | {told[None] - unchanged} |")
    silent = [outcome for outcome in outcomes if outcome.silent]
    print(f"\nno crash, no hang; memory grew by {growth(outcomes):.1f} MB from the first half to the second")
    for outcome in silent:
        print(f"NOT TOLD: seed {outcome.seed}, {outcome.clip}, {outcome.kind}: {outcome.silent}")
    return bool(silent) or growth(outcomes) > 20


if __name__ == "__main__":
    sys.exit(main())
