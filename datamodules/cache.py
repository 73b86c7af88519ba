"""Clips that were decoded once: a data set of shards on this machine, and what it has to be a cache of.

Written by cache_writer.py in the form of shards.py; docs/cached_and_streamed.md.
"""

import csv
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidtwin.errors import UserError
from vidtwin.video import RESIZE_FILTER, VideoError

from .clips import ClipDataModule, ClipDataset, Key, excluded_names
from .listing import identity
from .shards import MANIFEST, TABLE, Format, Items, Manifest, Shard, expect_shards


def describe(data: ClipDataModule, split: str) -> dict[str, Any]:
    """All arguments on which the clips of a split depend, as JSON.

    Where the data lie is none of them, so that a cache can be moved and used without the videos. `videos` (a checksum
    of names, labels and sizes) is there only where the videos are.
    """
    drawn = data._is_drawn(split)
    description: dict[str, Any] = {
        "data": type(data).__name__,
        "num_frames": data.num_frames,
        "resolution": data.resolution,
        "fps": data.fps if drawn else data.eval_fps,
        "short_videos": data.short_videos,
        "resize": RESIZE_FILTER,
        "augment": drawn,
    }
    if drawn:
        description |= {"seed": data.seed, "horizontal_flip": data.horizontal_flip}
    return _as_json(description | _source(data, split))


def describe_videos(data: ClipDataModule, split: str) -> dict[str, Any]:
    """The same for video files, which depend on less."""
    return _as_json({"data": type(data).__name__, **_source(data, split)})


def _source(data: ClipDataModule, split: str) -> dict[str, Any]:
    """Which videos, or what takes their place."""
    described = data.cache_key(split)
    if data.exclude:
        names = "\n".join(sorted(excluded_names(Path(data.exclude))))
        described["exclude"] = f"names of sha256 {hashlib.sha256(names.encode()).hexdigest()[:16]}"
    try:
        videos = data.videos(split)
    except UserError:
        return described
    lines = "".join(f"{video.name}\t{video.label}\t{_size(video.path)}\n" for video in videos)
    checksum = hashlib.sha256(lines.encode()).hexdigest()[:16]
    return {**described, "videos": f"{len(videos)}, names, labels and sizes of sha256 {checksum}"}


def _size(path: Path) -> int | None:
    """In bytes. The time of its last change is left out: a copy of a video is the same video."""
    try:
        return identity(path)[0]
    except OSError:  # a list may name what is not there
        return None


def _as_json(description: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(description)))


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """The first key in which two descriptions differ, with both values; None if they say the same."""
    for key in [*expected, *(key for key in found if key not in expected)]:
        if key == "videos" and (key not in expected or key not in found):
            continue  # the videos themselves are not here
        if expected.get(key) != found.get(key):
            return f"{key}={json.dumps(expected.get(key))}, it holds {key}={json.dumps(found.get(key))}"
    return None


class CachedClips(ClipDataset):
    """Clips that `vidtwin cache` has decoded: bit for bit those of the data set they come from.

    `dataset[epoch, index]` is the clip of `epoch` modulo the number of cached epochs.

    Args:
        folder: `OUT/<split>`.
        expected: What the clips should be, from `describe`; None: whatever they are.

    Raises:
        UserError: There is no cache, it is not finished, of something else, or a shard is not whole. From `clip`
            `VideoError` for a video that could not be read when the cache was written.
    """

    def __init__(self, folder: Path | str, expected: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder / MANIFEST)
        check(self.manifest, str(self.folder), "clips", expected)
        expect_shards(self.folder, self.manifest)
        self.split_name = self.manifest.split_name
        self.items = Items(self.manifest, self._locate)
        self._identities: dict[int, tuple[str, int]] | None = None

    def __len__(self) -> int:
        return self.manifest.clips

    def __getitem__(self, key: Key) -> dict[str, Any]:
        try:
            return super().__getitem__(key)
        except VideoError:
            place = key[1] if isinstance(key, tuple) else key
            return {"skipped": [self.manifest.skipped[place]]}

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        return self.items.clip(epoch % self.manifest.epochs * len(self) + index)

    def identity(self, index: int) -> tuple[str, int]:
        if self._identities is None:
            rows = [row for row in self._rows() if row["epoch"] == "0"]
            self._identities = {int(row["index"]): (row["name"], int(row["start_frame"])) for row in rows}
        return self._identities[index]

    def _locate(self, shard: Shard) -> Path:
        return self.folder / shard.file

    def _rows(self) -> list[dict[str, str]]:
        with (self.folder / TABLE).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def check(manifest: Manifest, where: str, format: Format, expected: Mapping[str, Any] | None) -> None:
    """`UserError` if a manifest is not that of a whole cache of what is expected."""
    if not manifest.complete:
        raise UserError(f"{where}: expected a finished cache; run `vidtwin cache` again, which goes on with it.")
    if manifest.format != format:
        use = "stream them by --data streamed --data.url" if manifest.format == "videos" else "write --format videos"
        raise UserError(f"{where}: expected {format}, it holds {manifest.format}; {use}.")
    if expected is not None and (found := difference(expected, manifest.description)):
        raise UserError(
            f"{where}: expected a cache of {found}; use the arguments it was made with, or write another one by "
            "`vidtwin cache`."
        )
