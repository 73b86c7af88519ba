"""Measure the targets of reading: its share of decoding, its growth with workers, and the start of a training.

    python benchmarks/loading.py ../shared/data/ucf_like/UCF-101

The start: a tree of UCF-101's layout with 13,320 videos, hard links to copies of the given ones, is made in a temporary
folder and surveyed once; then fresh processes read it to their first batch, by `vidtwin fit`'s data module. Prints each
figure beside its target (docs/performance.md).
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from experiments import as_markdown
from reading import decode_only, draw_jobs, measure_ways, measure_workers, read

CLASSES, GROUPS, TEST_GROUPS = 101, 25, 7
FIRST_BATCH = """
import json, sys, time
began = time.perf_counter()
from vidtwin.datamodules.ucf101 import UCF101
imported = time.perf_counter()
data = UCF101(sys.argv[1], batch_size=6)
data.setup("fit")
made = time.perf_counter()
batch = next(iter(data.train_dataloader()))
ended = time.perf_counter()
times = {"import": imported - began, "list": made - imported, "read": ended - made}
print(json.dumps(times | {"clips": len(batch["name"]), "videos": sum(len(data.dataset(s)) for s in ("train", "val"))}))
"""


def make_tree(clips: list[Path], folder: Path, number: int) -> Path:
    """Write a tree of `number` videos in UCF-101's layout with its lists, hard links to copies of clips → its root."""
    root, lists, kept = folder / "UCF-101", folder / "ucfTrainTestlist", folder / "copies"
    for made in (root, lists, kept):
        made.mkdir(parents=True)
    copies = [Path(shutil.copy(clip, kept / f"{index}.avi")) for index, clip in enumerate(clips)]
    names: dict[str, list[str]] = {"train": [], "test": []}
    for index in range(number):
        label, group, clip = index % CLASSES, index // CLASSES % GROUPS, index // CLASSES // GROUPS
        name = f"Class{label:03d}/v_Class{label:03d}_g{group + 1:02d}_c{clip + 1:02d}.avi"
        (root / name).parent.mkdir(exist_ok=True)
        os.link(copies[index % len(copies)], root / name)
        names["test" if group < TEST_GROUPS else "train"].append(f"{name} {label + 1}")
    labels = range(min(CLASSES, number))
    (lists / "classInd.txt").write_text("".join(f"{label + 1} Class{label:03d}\n" for label in labels))
    for split, listed in names.items():
        (lists / f"{split}list01.txt").write_text("".join(f"{line}\n" for line in listed))
    return root


def time_first_batch(root: Path, cache: Path) -> dict[str, float]:
    """Read a tree to its first batch in a fresh process → seconds of its parts and in all, and numbers of videos."""
    began = time.perf_counter()
    environment = {**os.environ, "VIDTWIN_CACHE": str(cache)}
    command = [sys.executable, "-c", FIRST_BATCH, str(root)]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found | {"all": time.perf_counter() - began}


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path, help="folder of .avi files, such as UCF-101")
    parser.add_argument("--clips", type=int, default=60, help="of them, for reading")
    parser.add_argument("--videos", type=int, default=13320, help="in the tree")
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    jobs = draw_jobs(args.root, args.clips)
    rates = measure_ways(jobs, {"decode": decode_only, "read": read}, args.repeats)
    shares = [ours / raw for ours, raw in zip(rates["read"], rates["decode"], strict=True)]
    one, two = (statistics.median(measure_workers(jobs, workers, args.repeats)) for workers in (1, 2))
    with tempfile.TemporaryDirectory() as name:
        root = make_tree([job[0] for job in jobs[:10]], Path(name), args.videos)
        surveyed = time_first_batch(root, Path(name) / "cache")
        starts = [time_first_batch(root, Path(name) / "cache") for _ in range(args.repeats)]
    first = statistics.median(start["all"] for start in starts)
    parts = ", ".join(f"{part} {statistics.median(s[part] for s in starts):.1f}" for part in ("import", "list", "read"))
    lines = [
        ["reading, share of decoding alone", f"{statistics.median(shares):.0%}", "at least 60%"],
        ["two workers, share of twice one", f"{two / one / 2:.2f} ({one:.0f} and {two:.0f} clips/s)", "at least 0.90"],
        [f"first batch of {args.videos:,} videos, seconds", f"{first:.1f} ({parts})", "under 10"],
        ["the first time, with the survey, seconds", f"{surveyed['all']:.1f}", ""],
    ]
    sys.stdout.write(as_markdown(["", "measured", "target"], lines) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
