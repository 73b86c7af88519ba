"""Measure how fast clips are read, beside FFmpeg's decoder alone in the same run.

    python benchmarks/reading.py ../shared/data/ucf_like/UCF-101

Prints Markdown tables for docs/reading_videos.md: clips per CPU-second of one process (16 frames at 8 fps from a random
start, 224 px) for several ways, as medians over interleaved repetitions; then clips per second of wall time through the
data loader, by the number of workers.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch

from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import Video, VideoClips
from vidtwin.datamodules.loader import WorkerLoader, collate
from vidtwin.video import read_clip, survey
from vidtwin.video.convert import to_clip

FRAMES, FPS, SIZE = 16, 8, 224
Job = tuple[Path, float, int, tuple[float, float]]  # file, start in seconds, last decoded frame, crop


def draw_jobs(root: Path, count: int) -> list[Job]:
    """Draw one random clip of each of the first `count` videos."""
    random = np.random.default_rng(0)
    jobs: list[Job] = []
    for path in sorted(root.rglob("*.avi"))[:count]:
        info = survey(path)
        span = int((FRAMES - 1) * info.fps / FPS)
        if info.num_frames > span:
            start = int(random.integers(info.num_frames - span))
            jobs.append((path, float(start / info.fps), start + span, tuple(random.random(2))))
    return jobs


def decode_only(job: Job) -> None:
    path, _, last, _ = job
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "NONE"
        for index, _ in enumerate(container.decode(video=0)):
            if index == last:
                return


def read(job: Job) -> None:
    path, start, _, crop = job
    read_clip(path, start, FRAMES, FPS, SIZE, crop)


def read_as_floats(job: Job) -> None:
    path, start, _, crop = job
    clip = torch.from_numpy(read_clip(path, start, FRAMES, FPS, SIZE, crop))
    to_clip(clip[None])


def convert_every_frame(job: Job) -> None:
    """Convert every frame to an array, select frames afterwards and resize in torch, as a simple loader does."""
    path, start, last, crop = job
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        stream.thread_type = "NONE"
        rate = float(stream.average_rate or 25)
        frames = []
        for index, frame in enumerate(container.decode(video=0)):
            frames.append(frame.to_ndarray(format="rgb24"))
            if index == last:
                break
        chosen = [frames[min(len(frames) - 1, int(start * rate + k * rate / FPS + 1e-6))] for k in range(FRAMES)]
        side = min(chosen[0].shape[:2])
        left, top = int((chosen[0].shape[1] - side) * crop[0]), int((chosen[0].shape[0] - side) * crop[1])
        clip = torch.from_numpy(np.stack(chosen)[:, top : top + side, left : left + side]).permute(0, 3, 1, 2)
        torch.nn.functional.interpolate(clip.float(), (SIZE, SIZE), mode="bilinear", antialias=True)


WAYS: dict[str, Callable[[Job], None]] = {
    "decoding only (PyAV)": decode_only,
    "**`read_clip`, uint8**": read,
    "`read_clip`, floats made by the worker": read_as_floats,
    "every frame converted, then chosen, floats": convert_every_frame,
}


def measure_ways(jobs: list[Job], ways: dict[str, Callable[[Job], None]], repetitions: int) -> dict[str, list[float]]:
    """Measure clips per CPU-second of each way, in turns → one number per repetition."""
    for way in ways.values():  # warm up the page cache
        for job in jobs:
            way(job)
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repetitions):
        for name, way in ways.items():
            begin = time.process_time()
            for job in jobs:
                way(job)
            rates[name].append(len(jobs) / (time.process_time() - begin))
    return rates


def measure_workers(jobs: list[Job], workers: int, repetitions: int) -> list[float]:
    """Measure clips per second of a data loader → one number per repetition."""
    videos = [Video(job[0], job[0].name, info=survey(job[0])) for job in jobs]
    clips = VideoClips(videos, ClipSettings(FRAMES, SIZE, FPS), "train")
    loader = WorkerLoader(clips, batch_size=4, num_workers=workers, collate_fn=collate, persistent_workers=True)
    speeds = []
    for repetition in range(repetitions + 1):
        begin = time.perf_counter()
        for _ in loader:
            pass
        if repetition:  # the first repetition starts the workers
            speeds.append(len(clips) / (time.perf_counter() - begin))
    return speeds


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure how fast clips are read.")
    parser.add_argument("root", type=Path, help="folder of .avi files, such as UCF-101")
    parser.add_argument("--videos", type=int, default=60)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--workers", type=int, nargs="*", default=[1, 2])
    args = parser.parse_args()
    torch.set_num_threads(1)
    jobs = draw_jobs(args.root, args.videos)
    rates = measure_ways(jobs, WAYS, args.repetitions)
    raw = rates["decoding only (PyAV)"]
    decoded = statistics.mean(job[2] + 1 for job in jobs)
    print(
        f"{len(jobs)} clips of {FRAMES} frames, {decoded:.0f} frames decoded for each on average, "
        f"PyAV {av.__version__}, {os.cpu_count()} cores\n"
    )
    print("| way | clips per CPU-second (min … max) | share of decoding only |")
    print("|---|---:|---:|")
    for name, values in rates.items():
        share = statistics.median(a / b for a, b in zip(values, raw, strict=True))
        print(
            f"| {name} | {statistics.median(values):.0f} ({min(values):.0f} … {max(values):.0f}) | {100 * share:.0f}% |"
        )
    print("\n| workers | clips per second |")
    print("|---:|---:|")
    for workers in args.workers:
        speeds = measure_workers(jobs, workers, args.repetitions)
        print(f"| {workers} | {statistics.median(speeds):.0f} ({min(speeds):.0f} … {max(speeds):.0f}) |")


if __name__ == "__main__":
    main()
