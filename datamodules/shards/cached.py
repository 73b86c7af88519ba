"""Clips decoded once, read from shards on this machine, and the check that they are the requested ones.

Written by writer.py in the format of format.py; see docs/cached_and_streamed.md.
"""

import csv
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vidtwin.datamodules.clips import ClipDataset, Key
from vidtwin.errors import UserError
from vidtwin.video import VideoError

from .format import MANIFEST, TABLE, Format, Items, Manifest, Shard, check_shards


def difference(expected: Mapping[str, Any], found: Mapping[str, Any]) -> str | None:
    """Return "key=found, not key=expected" of the first key in which two descriptions differ; None if they agree."""
    default = {"eval_clips": "middle", "frame_steps": "timed"}  # not stored, so that older caches stay valid
    expected, found = default | dict(expected), default | dict(found)
    for key in [*expected, *(key for key in found if key not in expected)]:
        if key == "videos" and (key not in expected or key not in found):
            continue  # the videos themselves are not here
        if expected.get(key) != found.get(key):
            return f"{key}={json.dumps(found.get(key))}, not {key}={json.dumps(expected.get(key))}"
    return None


class CachedClips(ClipDataset):
    """Clips decoded by `vidtwin cache`, bit for bit those of their data set.

    `dataset[epoch, index]` is the clip of `epoch` modulo the number of cached epochs.

    Args:
        folder: `OUT/<split>`.
        expected: Requested description of the clips, from `describe`; None takes any.

    Raises:
        UserError: The cache is missing, incomplete, of something else, or a shard is damaged. `clip` raises
            `VideoError` for a video that was unreadable when the cache was written.
    """

    def __init__(self, folder: Path | str, expected: Mapping[str, Any] | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(self.folder / MANIFEST)
        check(self.manifest, str(self.folder), "clips", expected)
        check_shards(self.folder, self.manifest)
        self.split_name = self.manifest.split_name
        self.items = Items(self.manifest, self._locate)
        self._identities: dict[int, tuple[str, int]] | None = None

    @property
    def num_videos(self) -> int:
        """Number of videos that the clips of an epoch come from."""
        if self.manifest.description.get("eval_clips") != "all":
            return len(self)
        return len({self.identity(index)[0] for index in range(len(self))})

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

    def digests(self, show: bool = False) -> dict[str, str]:
        return self.manifest.content()

    def _locate(self, shard: Shard) -> Path:
        return self.folder / shard.file

    def _rows(self) -> list[dict[str, str]]:
        with (self.folder / TABLE).open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))


def check(manifest: Manifest, where: str, format: Format, expected: Mapping[str, Any] | None) -> None:
    """Raise `UserError` unless a manifest is that of a complete cache of the expected clips."""
    if not manifest.complete:
        raise UserError(f"{where}: expected a finished cache; run `vidtwin cache` again, which goes on with it.")
    if manifest.format != format:
        use = "stream them by --data streamed --data.url" if manifest.format == "videos" else "write --format videos"
        raise UserError(f"{where}: expected {format}, it holds {manifest.format}; {use}.")
    if expected is not None and (found := difference(expected, manifest.description)):
        raise UserError(
            f"{where}: expected the requested clips, got {found}; use the arguments of the cache, or write "
            "another one by `vidtwin cache`."
        )
