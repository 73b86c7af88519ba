"""Clips per CPU-second: decoded from files, from a cache, and as they are streamed (docs/cached_and_streamed.md).

    python benchmarks/cache.py path/to/UCF-101

One process, no workers; batches are collated as a loader does. Each repetition takes all ways in turn, so that what
else the machine does meets them alike. Prints medians and the range over the repetitions as a Markdown table.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset, default_collate

from vidtwin.datamodules.shards.cached import CachedClips
from vidtwin.datamodules.shards.writer import write_cache
from vidtwin.datamodules.streaming import Streamed
from vidtwin.datamodules.ucf101 import UCF101


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder in UCF-101's layout")
    parser.add_argument("--frames", type=int, default=16)
    parser.add_argument("--resolution", type=int, default=224)
    parser.add_argument("--batch", type=int, default=6)
    parser.add_argument("--epochs", type=int, default=2, help="cached, and read in each repetition")
    parser.add_argument("--repeats", type=int, default=7)
    return parser.parse_args(argv)


def read(dataset: Dataset[Any], length: int, epochs: int, batch: int) -> int:
    """All clips in order, in batches → how many."""
    for epoch in range(epochs):
        for first in range(0, length, batch):
            default_collate([dataset[epoch, index] for index in range(first, min(first + batch, length))])
    return length * epochs


def read_by_litdata(folder: Path, batch: int) -> int:
    """The same shards, decoded and iterated by litdata's own data set."""
    os.environ["LITDATA_DISABLE_VERSION_CHECK"] = "1"  # it would ask PyPI
    from litdata import StreamingDataset

    items: list[Any] = []
    count = 0
    for item in StreamingDataset(str(folder)):
        items.append({**item, "clip": torch.from_numpy(item["clip"])})
        count += 1
        if len(items) == batch:
            default_collate(items)
            items = []
    return count


def rate(way: Callable[[], int]) -> float:
    start = time.process_time()
    return way() / (time.process_time() - start)


def main(argv: list[str]) -> None:
    arguments = parse(argv)
    torch.set_num_threads(1)
    common: dict[str, Any] = {"num_frames": arguments.frames, "resolution": arguments.resolution, "num_workers": 0}
    data = UCF101(arguments.root, val_groups=(10,), **common)
    online = data.dataset("train")
    length, epochs, batch = len(online), arguments.epochs, arguments.batch
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder)
        writing = rate(lambda: sum(w.items for w in write_cache(data, out / "clips", ["train"], epochs)))
        write_cache(data, out / "videos", ["train"], format="videos")

        def streamed(url: str) -> Any:
            return Streamed(url, cache_dir=str(out / "here"), lanes=4, **common).dataset("train")

        def cold() -> int:
            shutil.rmtree(out / "here", ignore_errors=True)
            return read(streamed(f"local:{out / 'clips'}"), length, epochs, batch)

        cached, clips, videos = CachedClips(out / "clips/train"), streamed(f"{out}/clips"), streamed(f"{out}/videos")
        ways: dict[str, Callable[[], int]] = {
            "files, decoded": lambda: read(online, length, 1, batch),
            "cache, mapped": lambda: read(cached, length, epochs, batch),
            "stream of clips, in a folder": lambda: read(clips, length, epochs, batch),
            "stream of videos, in a folder": lambda: read(videos, length, 1, batch),
        }
        if find_spec("litdata"):
            ways["stream of clips, each shard copied and its checksum compared"] = cold
            ways["the same shards by litdata's own data set"] = lambda: read_by_litdata(out / "clips/train", batch)
        for way in ways.values():
            way()  # files into memory, code warm
        rates: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(arguments.repeats):
            for name, way in ways.items():
                rates[name].append(rate(way))
            print(f"repetition {repeat + 1} of {arguments.repeats}", file=sys.stderr)
    base = statistics.median(rates["files, decoded"])
    shape = f"{arguments.frames}x{arguments.resolution}x{arguments.resolution}x3"
    print(f"{length} clips of {shape}, batches of {batch}, {arguments.repeats} repetitions\n")
    print("| way | clips per CPU-second, median (range) | times decoding |\n|---|---|---|")
    for name, found in rates.items():
        median = statistics.median(found)
        print(f"| {name} | {median:,.0f} ({min(found):,.0f} to {max(found):,.0f}) | {median / base:.1f} |")
    print(f"| writing the cache | {writing:,.0f} | {writing / base:.1f} |")


if __name__ == "__main__":
    main(sys.argv[1:])
