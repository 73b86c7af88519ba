"""Items of a shard, clips or video files, and the writing of a shard's file in a worker."""

import hashlib
import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset

from vidtwin.data import Skip
from vidtwin.datamodules.clips import ClipDataset, Video
from vidtwin.datamodules.index import Fault
from vidtwin.errors import UserError
from vidtwin.files import no_room, replacing, write_text
from vidtwin.storage.resumable import read_json
from vidtwin.video import VideoError, survey

from .format import SHARD, UINT8, Shard, as_skip


@dataclass
class Record:
    """A written shard, with its part of the manifest and of the table."""

    number: int
    shard: Shard
    rows: list[list[Any]] = field(default_factory=list)
    skipped: list[tuple[Any, ...]] = field(default_factory=list)
    replaced: list[tuple[int, list[Skip]]] = field(default_factory=list)
    padded: list[tuple[int, int]] = field(default_factory=list)

    @classmethod
    def read(cls, folder: Path, number: int) -> "Record | None":
        """Read the record beside a shard; None if it is missing."""
        content = read_json(record_path(folder, number))
        if content is None:
            return None
        try:
            record = cls(**content | {"shard": Shard(**content["shard"])})
            known = all(isinstance(row, list) for row in record.rows)
            for place, *entry in [*record.skipped, *([place, *e] for place, some in record.replaced for e in some)]:
                known = known and isinstance(place, int) and bool(as_skip(entry))
            if not known or not all(isinstance(place, int) for place, _ in record.padded):
                raise ValueError("invalid rows or notes")
            return record
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"{record_path(folder, number)}: expected the record of a shard, got {error}.") from None


def record_path(folder: Path, number: int) -> Path:
    """Return the path of a shard's record, which goes when the manifest is complete."""
    return folder / f"chunk-0-{number}.json"


@dataclass
class _Item:
    """An item: its bytes and arrays of bytes in order, its row of the table, and its notes for the manifest."""

    pieces: list[Any]
    row: list[Any]
    replaced: list[Skip] = field(default_factory=list)
    padded: int = 0


class ClipSource:
    """Clips in order, epoch by epoch."""

    advice = "give --data.num_frames or --data.resolution"  # for clips that no shard can hold

    def __init__(self, dataset: ClipDataset, may_skip: bool) -> None:
        self.dataset = dataset
        self.may_skip = may_skip  # not in training, where another clip stands in for an unreadable one

    def name(self, place: int) -> str:
        """Return the name of an evaluation clip."""
        return self.dataset.identity(place % len(self.dataset))[0]

    def describe(self, place: int, error: VideoError) -> Skip:
        """Return the name of an unreadable clip and the reason."""
        return self.dataset.skip(place % len(self.dataset), error)

    def row_without_item(self, place: int) -> list[list[Any]]:
        """Return the row of an evaluation clip that can't be read: protocols name all requested clips."""
        name, start = self.dataset.identity(place)
        return [[0, place, name, "", start]]

    def read(self, place: int) -> _Item:
        epoch, index = divmod(place, len(self.dataset))
        item = self.dataset.clip(epoch, index)
        clip = np.ascontiguousarray(item["clip"])
        header = np.array([UINT8, clip.ndim, *clip.shape], np.uint32).tobytes()
        name, label, start = item["name"], int(item["label"]), int(item["start_frame"])
        text = name.encode()
        sizes = np.array([len(header) + clip.nbytes, 8, len(text), 8], np.uint32).tobytes()
        tail = np.int64(label).tobytes() + text + np.int64(start).tobytes()
        row = [epoch, index, name, label, start]
        return _Item([sizes, header, clip, tail], row, list(item.get("skipped", ())), item.get("padded", 0))


class VideoSource:
    """Video files as they are."""

    advice = "use --format clips for these data"

    may_skip = True

    def __init__(self, videos: list[Video]) -> None:
        self.videos = videos

    def name(self, place: int) -> str:
        return self.videos[place].name

    def describe(self, place: int, error: VideoError) -> Skip:
        return self.videos[place].name, Fault.of(error, self.videos[place].path).reason

    def row_without_item(self, place: int) -> list[list[Any]]:
        return []

    def read(self, place: int) -> _Item:
        video = self.videos[place]
        try:
            content = video.path.read_bytes()
        except FileNotFoundError:  # an incomplete download
            raise VideoError(f"{video.path}: there is no such file.") from None
        except OSError as error:
            raise UserError(
                f"{video.path}: expected to read it, got {error.strerror!r}; run the same command again."
            ) from None
        try:
            info = survey(content)  # broken files are reported here, not in a training
        except VideoError as error:  # whose text lacks the name
            raise VideoError(
                f"{video.path}: {str(error).partition(': ')[2]}", kind=error.kind, lasting=error.lasting
            ) from None
        text = video.name.encode()
        sizes = np.array([8, len(text), len(content)], np.uint32).tobytes()
        row = [place, video.name, video.label, info.num_frames, str(info.fps), info.duration, info.width, info.height]
        return _Item([sizes, np.int64(video.label).tobytes(), text, content], row)


Source = ClipSource | VideoSource


class ShardWriter(Dataset[Record | str]):
    """Write shards on request, in a worker → their records, which are small; a `UserError` as its text.

    Args:
        folder: Folder of the shards.
        source: Items.
        todo: Number, first place and number of places of each shard.
    """

    def __init__(self, folder: Path, source: Source, todo: list[tuple[int, int, int]]) -> None:
        self.folder = folder
        self.source = source
        self.todo = todo

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, index: int) -> Record | str:
        try:
            return self._write(*self.todo[index])
        except UserError as error:
            return str(error)
        except OSError as error:
            if no_room(error) is None:
                raise
            return (
                f"{self.folder}: the disk is full; free some of it and run the same command again, the shards written "
                "so far are kept."
            )

    def _write(self, number: int, first: int, count: int) -> Record:
        pieces: list[list[Any]] = []
        record = Record(number, Shard(SHARD.format(number), first, count, 0, 0, ""))
        for place in range(first, first + count):
            try:
                item = self.source.read(place)
            except VideoError as error:
                if not self.source.may_skip or not error.lasting:
                    raise  # a disk that fails for a moment must not leave a gap for good
                record.skipped.append((place, *self.source.describe(place, error)))
                record.rows += self.source.row_without_item(place)
                continue
            pieces.append(item.pieces)
            record.rows.append(item.row)
            if item.replaced:
                record.replaced.append((place, item.replaced))
            if item.padded:
                record.padded.append((place, item.padded))
        lengths = [sum(memoryview(piece).nbytes for piece in parts) for parts in pieces]
        offsets = 4 * (len(pieces) + 2) + np.cumsum([0, *lengths])
        if offsets[-1] >= 2**32:
            raise UserError(
                f"Expected items below 4 GB, the limit of a shard, got {self.source.name(first)}; {self.source.advice}."
            )
        digest = hashlib.sha256()
        with replacing(self.folder / record.shard.file) as temporary, temporary.open("wb") as stream:
            head = np.array([len(pieces), *offsets], np.uint32).tobytes()
            for piece in [head, *(piece for parts in pieces for piece in parts)]:
                stream.write(piece)
                digest.update(piece)
        record.shard = replace(record.shard, items=len(pieces), bytes=int(offsets[-1]), sha256=digest.hexdigest())
        write_text(record_path(self.folder, number), json.dumps(asdict(record)))
        return record
