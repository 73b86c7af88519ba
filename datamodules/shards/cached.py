"""Clips decoded once, read from shards on this machine, and the check that they are the requested ones.

Written by writer.py in the format of format.py; see docs/cached_and_streamed.md.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vidtwin.datamodules.clips import ClipDataset, Key
from vidtwin.errors import UserError
from vidtwin.video import VideoError

from .format import AGAIN, MANIFEST, TABLE, Format, Items, Manifest, Shard, check_shards, read_rows


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
            rows = self._rows({"epoch": int, "index": int, "name": str, "start_frame": int})
            self._identities = {place: (name, start) for epoch, place, name, start in rows if epoch == 0}
            if missing := set(range(len(self))) - set(self._identities):
                raise UserError(f"{self._place}/{TABLE}: expected a line for clip {min(missing)}, got none; {AGAIN}.")
        return self._identities[index]

    def shape(self, index: int) -> tuple[int, int, int]:
        try:
            return self.items.shape(index)
        except VideoError:  # there is no clip
            return 0, 0, 0

    def digests(self, show: bool = False) -> dict[str, str]:
        return self.manifest.content()

    @property
    def _place(self) -> str:
        """Return the folder or the address of the shards."""
        return str(self.folder)

    def _locate(self, shard: Shard) -> Path:
        return self.folder / shard.file

    def _rows(self, columns: Mapping[str, Callable[[str], Any]]) -> list[list[Any]]:
        return read_rows(self.folder, columns)


def check(manifest: Manifest, where: str, format: Format, expected: Mapping[str, Any] | None) -> None:
    """Raise `UserError` unless a manifest is that of a complete cache of the expected clips."""
    if not manifest.complete:
        raise UserError(f"{where}: expected a finished cache; run `vidtwin cache` again to complete it.")
    if manifest.format != format:
        use = "stream them by --data streamed --data.url" if manifest.format == "videos" else "write --format videos"
        raise UserError(f"{where}: expected {format}, got {manifest.format}; {use}.")
    if expected is not None and (found := difference(expected, manifest.description)):
        raise UserError(
            f"{where}: expected the requested clips, got {found}; use the arguments of the cache, or write "
            "another one by `vidtwin cache`."
        )
