"""The file format of shards of clips or of whole videos (docs/cached_and_streamed.md).

    OUT/train/manifest.json     settings, the shards with their checksums, skipped videos with the reason
    OUT/train/clips.csv         name, label and start frame of each clip
    OUT/train/index.json        the same shards as litdata lists them
    OUT/train/chunk-0-<n>.bin   a shard

A shard is a chunk as litdata 0.2 reads it, without compression: uint32 number of items, uint32 offsets of the items
and of their end, items. An item is the uint32 sizes of its fields and the fields: picture data as they are, behind a
header of a few bytes. So the same files are mapped into memory (cached.py) and streamed (streamed.py).
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from vidtwin.data import Skip
from vidtwin.errors import UserError
from vidtwin.files import parse_json
from vidtwin.tables import read_table
from vidtwin.video import VideoError

Format = Literal["clips", "videos"]
SCHEMA_VERSION = 1
MANIFEST = "manifest.json"
TABLE = "clips.csv"
SHARD = "chunk-0-{}.bin"
_SHARD_NAME = re.compile(SHARD.format("[0-9]{1,9}"))
# Fields of an item in alphabetical order, as litdata flattens a dict, with litdata's names of their formats.
FIELDS: dict[str, dict[str, str]] = {
    "clips": {"clip": "numpy", "label": "int", "name": "str", "start_frame": "int"},
    "videos": {"label": "int", "name": "str", "video": "bytes"},
}
AGAIN = "run `vidtwin cache` again, which makes it anew"
UINT8 = 4  # litdata's number of the type in the header of an array
_ATTEMPTS = 5  # to open a shard that other processes may remove


@dataclass(frozen=True)
class Shard:
    """A file of items.

    Attributes:
        first: Place of its first item among all requested ones, which are ordered by epoch and index.
        places: Number of places that it covers, with those of skipped items.
        items: Number of stored items.
        bytes: Size of the file.
    """

    file: str
    first: int
    places: int
    items: int
    bytes: int
    sha256: str

    def __post_init__(self) -> None:
        if not _SHARD_NAME.fullmatch(self.file):  # a manifest may come from anyone
            raise ValueError(f"no name of a shard: {ascii(self.file)[:100]}")
        if not all(map(_is_count, (self.first, self.places, self.items, self.bytes))):
            raise ValueError(f"no counts of items and bytes in {self.file}")


@dataclass(frozen=True)
class Manifest:
    """Content of a folder of shards.

    Attributes:
        split_name: Name of the split in the protocol of an evaluation.
        description: Settings that determine the clips; see `describe`.
        epochs: Number of stored epochs, each with other random clips.
        clips: Number of indices per epoch, with skipped ones.
        left_out: Name → reason of videos that were unusable from the start, and have no place.
        skipped: Place → (name, reason) of an unreadable item, which no shard holds; with False if the video is intact
            and merely ends before the clip.
        replaced: Place → the same for unreadable clips that another one replaces, under its own name.
        padded: Place → number of the clip's frames that repeat its last one, if any.
        digests: Name → SHA-256 of the content of each test video; None in caches that lack them.
    """

    format: Format
    split: str
    split_name: str
    description: dict[str, Any]
    epochs: int
    clips: int
    left_out: dict[str, str] = field(default_factory=dict)
    shards: list[Shard] = field(default_factory=list)
    skipped: dict[int, Skip] = field(default_factory=dict)
    replaced: dict[int, list[Skip]] = field(default_factory=dict)
    padded: dict[int, int] = field(default_factory=dict)
    digests: dict[str, str] | None = None
    complete: bool = False

    def content(self) -> dict[str, str]:
        """Return the digests of the test videos; without them one of the shards, which hold what is measured."""
        if self.digests is None:
            return {"(shards)": hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()}
        return self.digests

    def _check(self) -> None:
        """Raise `ValueError` for values that `vidtwin cache` does not write."""
        texts = [self.split, self.split_name, *self.left_out.values(), *(self.digests or {}).values()]
        places = [*self.skipped, *self.replaced, *self.padded]
        if self.format not in FIELDS or not all(isinstance(text, str) for text in texts):
            raise ValueError("an invalid format or invalid names")
        if not (
            _is_count(self.epochs) and _is_count(self.clips) and self.epochs and isinstance(self.description, dict)
        ):
            raise ValueError("no counts of epochs and clips, or no settings")
        total = 0
        for shard in self.shards:
            if shard.first != total or shard.items > shard.places or not isinstance(shard.sha256, str):
                raise ValueError(f"{shard.file} does not follow the one before it")
            total += shard.places
        if self.complete and (total != self.epochs * self.clips or len(self.shards) % self.epochs):
            raise ValueError(f"shards of {total} items, not of {self.epochs} times {self.clips}")
        if not all(0 <= place < max(total, 1) for place in places) or not all(map(_is_count, self.padded.values())):
            raise ValueError("invalid notes on items")

    def to_json(self) -> str:
        return json.dumps({"schema_version": SCHEMA_VERSION, **asdict(self)}, indent=1) + "\n"

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Read the manifest of a folder; `UserError` if it is missing or this version can't read it."""
        try:
            text = path.read_text(encoding="utf-8")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"Expected {path}, got no such file; write it by `vidtwin cache`, or give the folder that holds "
                "the folders of the splits."
            ) from None
        except UnicodeDecodeError:
            text = ""
        return cls.parse(text, str(path))

    @classmethod
    def parse(cls, text: str, where: str) -> "Manifest":
        """Parse a manifest; `UserError` if this version can't read it."""
        try:
            content = parse_json(text)
            version = content.pop("schema_version")
        except (ValueError, AttributeError, TypeError, KeyError):
            raise UserError(f"{where}: expected a manifest written by `vidtwin cache`, got something else.") from None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"{where}: expected schema version {SCHEMA_VERSION}, got {version}; write the cache again, or use the "
                "version of vidtwin that wrote it."
            )
        try:
            content["shards"] = [Shard(**shard) for shard in content["shards"]]
            content["skipped"] = {int(place): as_skip(entry) for place, entry in content["skipped"].items()}
            content["replaced"] = {int(place): list(map(as_skip, what)) for place, what in content["replaced"].items()}
            content["padded"] = {int(place): frames for place, frames in content.get("padded", {}).items()}
            manifest = cls(**content)
            manifest._check()
            return manifest
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{where}: expected a manifest written by `vidtwin cache`, got a damaged one ({error}); write the "
                "cache again."
            ) from None


def _is_count(value: object) -> bool:
    return isinstance(value, int) and value >= 0


def as_skip(entry: Sequence[Any]) -> Skip:
    """Convert a skipped video from JSON."""
    name, reason, *rest = entry
    if not isinstance(name, str) or not isinstance(reason, str):
        raise ValueError("a skipped item without name and reason")
    return (name, reason, False) if rest else (name, reason)


class Items:
    """Items of a split's shards by their places, mapped into memory: only used bytes are read.

    No file stays open between items, so the object can be sent to workers.

    Args:
        manifest: Manifest of the split.
        locate: Return the file of a shard on this machine.
    """

    def __init__(self, manifest: Manifest, locate: Callable[[Shard], Path]) -> None:
        self.manifest = manifest
        self.locate = locate
        frames, side = (manifest.description.get(key) for key in ("num_frames", "resolution"))
        sides = side if isinstance(side, list) and len(side) == 2 else (side, side)
        self._own = (frames, *sides, 3)  # the shape of every clip; None if clips differ in it
        self._firsts = [shard.first for shard in manifest.shards]
        self._total = sum(shard.places for shard in manifest.shards)
        self._offsets: dict[int, NDArray[np.uint32]] = {}
        self._missing = {
            number: sorted(p for p in manifest.skipped if shard.first <= p < shard.first + shard.places)
            for number, shard in enumerate(manifest.shards)
        } if manifest.skipped else {}  # fmt: skip

    def shard_of(self, place: int) -> int:
        """Return the number of the shard that covers a place."""
        return bisect_right(self._firsts, place) - 1

    def fields(self, place: int) -> list[NDArray[np.uint8]]:
        """Return the fields of an item as stored; writing into them changes no file.

        Raises:
            VideoError: The item was unreadable when the shards were written.
            UserError: There is no such item, or the shard is damaged.
        """
        if not 0 <= place < self._total:
            raise UserError(f"Expected an item of {self._total} in the shards, got number {place}; {AGAIN}.")
        if place in self.manifest.skipped:
            raise VideoError(self.manifest.skipped[place][1])
        number = self.shard_of(place)
        shard = self.manifest.shards[number]
        slot = place - shard.first - sum(missing < place for missing in self._missing.get(number, ()))
        for attempt in range(_ATTEMPTS):
            try:
                item = self._map(number, shard, slot, self.locate(shard))
                break
            except FileNotFoundError:  # another process removed it to keep a limit; it is fetched again
                if attempt == _ATTEMPTS - 1:
                    raise
        count = len(FIELDS[self.manifest.format])
        if len(item) < 4 * count:
            raise self._damaged(place)
        edges = 4 * count + np.cumsum([0, *item[: 4 * count].view(np.uint32)])
        if edges[-1] != len(item):
            raise self._damaged(place)
        return [item[a:b] for a, b in pairwise(edges)]

    def _damaged(self, place: int) -> UserError:
        path = self.locate(self.manifest.shards[self.shard_of(place)])
        return UserError(f"{path}: expected an item written by `vidtwin cache`, got a damaged one; {AGAIN}.")

    def _map(self, number: int, shard: Shard, slot: int, path: Path) -> NDArray[np.uint8]:
        offsets = self._offsets.get(number)
        if offsets is None:
            offsets = self._offsets[number] = _read_offsets(path, shard)
        begin, end = int(offsets[slot]), int(offsets[slot + 1])
        # Mapped privately: an array that can be written to is one that torch takes without a copy.
        return np.memmap(path, np.uint8, "c", begin, (end - begin,)).view(np.ndarray)

    def shape(self, place: int) -> tuple[int, int, int]:
        """Return frames, height and width of a clip."""
        frames, height, width, _ = self.clip(place)["clip"].shape  # mapped, not read
        return frames, height, width

    def clip(self, place: int) -> dict[str, Any]:
        """Return a decoded clip as `ClipDataset.clip` does."""
        array, label, name, start = self.fields(place)
        try:
            header = array[: 4 * 6].view(np.uint32).tolist()
            shape = header[2:]
            differs = any(own not in (None, found) for own, found in zip(self._own, shape, strict=True))
            if header[:2] != [UINT8, 4] or differs:
                raise self._damaged(place)
            item: dict[str, Any] = {
                "clip": array[4 * 6 :].reshape(shape),
                "label": int(label.view(np.int64)[0]),
                "name": bytes(name).decode(),
                "start_frame": int(start.view(np.int64)[0]),
            }
        except (ValueError, IndexError):  # of a size, a shape or a name
            raise self._damaged(place) from None
        if place in self.manifest.padded:
            item["padded"] = self.manifest.padded[place]
        if place in self.manifest.replaced:
            item["skipped"] = self.manifest.replaced[place]
        return item

    def video(self, place: int) -> tuple[bytes, str, int]:
        """Return the content of a video file, its name and its label."""
        label, name, content = self.fields(place)
        try:
            return bytes(content), bytes(name).decode(), int(label.view(np.int64)[0])
        except (ValueError, IndexError):
            raise self._damaged(place) from None


def _read_offsets(path: Path, shard: Shard) -> NDArray[np.uint32]:
    """Read where the items of a shard begin, and where the last one ends; `UserError` if that can't be."""
    head = np.fromfile(path, np.uint32, shard.items + 2)
    offsets: NDArray[np.uint32] = head[1:]
    whole = len(head) == shard.items + 2 and head[0] == shard.items and offsets[-1] == shard.bytes
    if not whole or offsets[0] != 4 * len(head) or (offsets[1:] < offsets[:-1]).any():
        raise UserError(f"{path}: expected the header of a shard of {shard.items} items, got a damaged one; {AGAIN}.")
    return offsets


def read_rows(folder: Path, columns: Mapping[str, Callable[[str], Any]]) -> list[list[Any]]:
    """Read columns of the table of a folder of shards, each by its type; `UserError` if it is missing or damaged."""
    path = folder / TABLE
    try:
        return [[kind(row[column]) for column, kind in columns.items()] for row in read_table(path)]
    except FileNotFoundError:
        raise UserError(f"{path}: expected the table of the shards, got no such file; {AGAIN}.") from None
    except KeyError as error:
        reason = f"no column {error}"
    except ValueError as error:
        reason = str(error)
    raise UserError(f"{path}: expected a table written by `vidtwin cache`, got a damaged one ({reason}); {AGAIN}.")


def check_shards(folder: Path, manifest: Manifest) -> None:
    """Raise `UserError` if a shard is missing or of another size.

    A shard that is read may be a link out of the folder, as in a snapshot of the Hub, whose files lie in `blobs`: its
    name, which a manifest gives, is that of a shard and nothing else.
    """
    for shard in manifest.shards:
        check_shard(folder / shard.file, shard, checksum=False)


def check_shard(path: Path, shard: Shard, checksum: bool) -> None:
    """Raise `UserError` if the file of a shard is missing, of another size or, with `checksum`, damaged."""
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        raise UserError(f"{path}: expected a shard of the cache, got no such file; {AGAIN}.") from None
    if size != shard.bytes:
        raise UserError(f"{path}: expected {shard.bytes:,} bytes, got {size:,}; {AGAIN}.")
    if checksum and _sha256(path) != shard.sha256:
        raise UserError(f"{path}: expected sha256 {shard.sha256[:16]}…, got another; {AGAIN}.")


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
