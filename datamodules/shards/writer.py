"""Write clips, or video files, of a data module as shards (`vidtwin cache`).

Which clips a shard holds depends on the arguments alone. A worker decodes a shard and writes it, and it appears when
it is whole; after a kill only the missing ones are made, to the same bytes.
"""

import csv
import errno
import hashlib
import io
import json
import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from torch.utils.data import Dataset
from tqdm import tqdm

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from vidtwin.data import SPLITS, ClipSettings, Skip
from vidtwin.datamodules.clips import ClipDataset, Video
from vidtwin.datamodules.index import Fault
from vidtwin.datamodules.loader import WorkerLoader
from vidtwin.errors import UserError
from vidtwin.files import intended_name, replacing, write_text
from vidtwin.video import VideoError, survey

from .cached import difference
from .format import FIELDS, MANIFEST, TABLE, Format, Manifest, Shard, as_skip, is_whole

SHARD_BYTES = 64 * 2**20
_COLUMNS = {
    "clips": ["epoch", "index", "name", "label", "start_frame"],
    "videos": ["index", "name", "label", "num_frames", "fps", "duration", "width", "height"],
}
_TOLD = 10  # lines about videos that can't be used
_OLD = 3600  # seconds after which a temporary file is nobody's any more, where no lock can tell
_UINT8 = 4  # litdata's number of the type in the header of an array


class Cacheable(Protocol):
    """A data module whose clips can be written; see `ClipDataModule`."""

    settings: ClipSettings
    skipped: dict[str, dict[str, str]]

    def videos(self, split: str) -> list[Video]: ...
    def make_dataset(self, split: str) -> ClipDataset: ...
    def split_name(self, split: str) -> str: ...
    def describe(self, split: str, format: Format = "clips") -> dict[str, Any]: ...
    def workers(self) -> int: ...


@dataclass(frozen=True)
class Written:
    """What `write_cache` did for a split."""

    split: str
    manifest: Manifest
    folder: Path
    made: int  # shards

    @property
    def items(self) -> int:
        return sum(shard.items for shard in self.manifest.shards)

    @property
    def bytes(self) -> int:
        return sum(shard.bytes for shard in self.manifest.shards)

    def __str__(self) -> str:
        what, shards = self.manifest.format, len(self.manifest.shards)
        epochs = f" of {self.manifest.epochs} epochs" if self.manifest.epochs > 1 else ""
        without = [f"skipped {name}: {reason}" for name, reason, *_ in self.manifest.skipped.values()]
        without += [f"left out {name}: {reason}" for name, reason in self.manifest.left_out.items()]
        replaced = dict(entry[:2] for entries in self.manifest.replaced.values() for entry in entries)
        without += [f"replaced {name} by other clips: {reason}" for name, reason in replaced.items()]
        more = f"; {len(without)} could not be used" if without else ""
        total = f"{self.split}: {self.items} {what}{epochs}, {self.bytes / 1e9:.3g} GB, shards: {shards}, "
        lines = [f"{total}new: {self.made}{more}", *(f"  {line}" for line in without[:_TOLD])]
        if len(without) > _TOLD:
            lines.append(f"  and {len(without) - _TOLD} more, see {self.folder / MANIFEST}")
        return "\n".join(lines)


def write_cache(
    data: Cacheable,
    out: Path | str,
    splits: Sequence[str] = SPLITS,
    epochs: int = 1,
    format: Format = "clips",
    verify: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> list[Written]:
    """Store the clips, or the video files, of some splits in `out/<split>/`.

    What is there already is kept: shards of the right size, and with `verify` of the right checksum. A damaged or lost
    one of a finished cache can be made again after it was deleted. Two that write the same at a time do it twice, and
    end with the same.

    Args:
        data: What to store; `data.num_workers` processes decode, and their number changes no byte.
        out: Folder.
        splits: Some of "train", "val", "test".
        epochs: How many epochs of training clips to draw; of other splits, and without `data.augment`, there is one.
        format: "clips" stores decoded clips, "videos" the files as they are, to be decoded when they are streamed.
        verify: Compare the checksums of all shards that are there.
        shard_bytes: Size of a shard; one item at least.

    Raises:
        UserError: The folder holds something else, a shard is damaged, the disk is full.
    """
    if unknown := [split for split in splits if split not in SPLITS]:
        raise UserError(f"Expected splits of {', '.join(SPLITS)}, got {unknown[0]!r}.")
    if epochs < 1:
        raise UserError(f"Expected at least one epoch to store, got {epochs}.")
    if format not in FIELDS:
        raise UserError(f"Expected clips or videos as format, got {format!r}.")
    return [_write_split(data, Path(out) / split, split, epochs, format, verify, shard_bytes) for split in splits]


def _write_split(
    data: Cacheable, folder: Path, split: str, epochs: int, format: Format, verify: bool, shard_bytes: int
) -> Written:
    clip, name, description = 0, data.split_name(split), data.describe(split, format)
    if format == "videos":
        videos = data.videos(split)
        source: _Source = _VideoSource(videos)
        wanted = Manifest(format, split, name, description, 1, len(videos))
        ranges = list(_by_size([_size(video.path) for video in videos], shard_bytes))
    else:
        dataset = data.make_dataset(split)
        source = _ClipSource(dataset, may_skip=split != "train")
        epochs = epochs if data.settings.draws(split) else 1
        left_out = dict(data.skipped[split])
        wanted = Manifest(format, split, name, description, epochs, len(dataset), left_out)
        clip = data.settings.num_frames * data.settings.resolution**2 * 3
        each = max(1, shard_bytes // clip)
        # No shard holds clips of two epochs: who streams needs those of one.
        ranges = [
            (epoch * len(dataset) + first, min(each, len(dataset) - first))
            for epoch in range(epochs)
            for first in range(0, len(dataset), each)
        ]
    if not wanted.clips:
        raise UserError(f"Expected videos in the {split} split to store, there are none; leave it out of --splits.")
    with _temporaries_swept(folder):
        return _fill(folder, wanted, ranges, source, data.workers(), verify, clip)


def _fill(
    folder: Path,
    wanted: Manifest,
    ranges: list[tuple[int, int]],
    source: "_Source",
    workers: int,
    verify: bool,
    clip: int,
) -> Written:
    """Write the shards that are missing of `ranges`: first place, number of places. A clip has `clip` bytes."""
    found = _begin(folder, wanted, ranges)
    known = _known(folder, found, ranges)
    records = {number: record for number, record in known.items() if is_whole(folder, record["shard"], verify)}
    missing = [number for number in range(len(ranges)) if number not in records]
    if wanted.format == "clips" and missing:
        _expect_room(folder, sum(ranges[number][1] for number in missing) * clip)
    loader = WorkerLoader(
        _ShardWriter(folder, source, [(number, *ranges[number]) for number in missing]),
        batch_size=None,
        num_workers=min(workers, len(missing)),
    )
    places = sum(count for _, count in ranges)
    with tqdm(total=places, desc=f"{wanted.split} {wanted.format}", unit="", disable=None) as bar:
        bar.update(sum(ranges[number][1] for number in records))
        for number, record in zip(missing, loader, strict=True):
            if "error" in record:
                raise UserError(record["error"])
            if number in known and known[number]["shard"] != record["shard"]:
                raise UserError(
                    f"{folder / record['shard'].file}: made again it holds something else than before, so the videos "
                    "or the decoder have changed; write another cache."
                )
            records[number] = record
            bar.update(record["shard"].places)
    if not found.complete:
        found = _finish(folder, wanted, [records[number] for number in range(len(ranges))])
    for number in range(len(ranges)):
        (folder / _record_name(number)).unlink(missing_ok=True)
    return Written(wanted.split, found, folder, len(missing))


def _begin(folder: Path, wanted: Manifest, ranges: list[tuple[int, int]]) -> Manifest:
    """Begin a cache, or see that the folder holds the same thing → its manifest."""
    path = folder / MANIFEST
    others = [file for file in folder.iterdir() if intended_name(file) is None]
    if not path.exists():  # asked last: another process may have begun meanwhile
        if others:
            raise UserError(f"{folder}: expected an empty folder or a cache, it holds something else.")
        write_text(path, wanted.to_json())
        return wanted
    found = Manifest.read(path)
    other = difference(_layout(wanted) | wanted.description, _layout(found) | found.description)
    if other is None and found.complete and [(shard.first, shard.places) for shard in found.shards] != ranges:
        other = "shards of another size"
    if other:
        raise UserError(f"{folder}: expected a cache of {other}; give another folder, or delete this one.")
    return found


def _layout(manifest: Manifest) -> dict[str, Any]:
    return {key: getattr(manifest, key) for key in ("format", "split", "epochs", "clips")}


def _known(folder: Path, found: Manifest, ranges: list[tuple[int, int]]) -> dict[int, dict[str, Any]]:
    """What was recorded of shards that are written, by their number."""
    if found.complete:
        return {number: {"shard": shard} for number, shard in enumerate(found.shards)}
    records = {}
    for number, (first, places) in enumerate(ranges):
        try:
            record = json.loads((folder / _record_name(number)).read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            continue
        record["shard"] = Shard(**record["shard"])
        if (record["shard"].first, record["shard"].places) == (first, places):
            records[number] = record
    return records


def _finish(folder: Path, wanted: Manifest, records: list[dict[str, Any]]) -> Manifest:
    """Write what is known of all shards into one place; the manifest last, which says that the cache is whole."""
    shards = [record["shard"] for record in records]
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(_COLUMNS[wanted.format])
    for record in records:
        writer.writerows(record["rows"])
    write_text(folder / TABLE, table.getvalue())
    write_text(folder / "index.json", _litdata_index(wanted.format, shards))
    manifest = replace(
        wanted,
        shards=shards,
        skipped={place: as_skip(entry) for record in records for place, *entry in record["skipped"]},
        replaced={place: list(map(as_skip, what)) for record in records for place, what in record["replaced"]},
        padded={place: frames for record in records for place, frames in record.get("padded", ())},
        complete=True,
    )
    write_text(folder / MANIFEST, manifest.to_json())
    return manifest


def _litdata_index(format: str, shards: list[Shard]) -> str:
    fields = FIELDS[format]
    leaf: dict[str, Any] = {"type": None, "context": None, "children_spec": []}
    tree = {"type": "builtins.dict", "context": json.dumps(list(fields)), "children_spec": [leaf] * len(fields)}
    config = {
        "chunk_bytes": SHARD_BYTES,
        "chunk_size": None,
        "compression": None,
        "data_format": list(fields.values()),
        "data_spec": json.dumps([1, tree]),
        "encryption": None,
        "item_loader": "PyTreeLoader",
    }
    chunks = [
        {"chunk_bytes": shard.bytes, "chunk_size": shard.items, "dim": None, "filename": shard.file}
        for shard in shards
        if shard.items
    ]
    return json.dumps({"chunks": chunks, "config": config, "updated_at": "0"}) + "\n"


def _record_name(number: int) -> str:
    return f"chunk-0-{number}.json"


@contextmanager
def _temporaries_swept(folder: Path) -> Iterator[None]:
    """Remove what kills left behind, before and after the block, but nothing of another process that writes here.

    Each writer holds a lock on the folder, which the system lets go when it and its workers are dead. Where there are
    no such locks (some network file systems), old files alone are removed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{folder}: expected a folder to write a cache into, there is a file; give another.") from None
    if fcntl is None:
        _sweep(folder, _OLD)
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        _sweep(folder, 0 if _locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) else _OLD)
        _locks(handle, fcntl.LOCK_SH)
        yield
        _sweep(folder, 0 if _locks(handle, fcntl.LOCK_EX | fcntl.LOCK_NB) else _OLD)
    finally:
        os.close(handle)


def _locks(handle: int, how: int) -> bool:
    try:
        fcntl.flock(handle, how)
    except OSError:  # another one has it, or the file system has none
        return False
    return True


def _sweep(folder: Path, older_than: float) -> None:
    for path in folder.iterdir():
        try:
            if intended_name(path) is not None and time.time() - path.stat().st_mtime >= older_than:
                path.unlink()
        except FileNotFoundError:  # moved to its place, or removed by another one
            pass


def _expect_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder}: expected {wanted / 1e9:.1f} GB of free disk for the clips that are still to be written, there "
            f"are {free / 1e9:.1f} GB; free some, choose another folder or fewer --epochs."
        )


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # told when it is read


def _by_size(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Neighbours that together stay within a limit: first index, how many."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield first, index - first
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield first, len(sizes) - first


@dataclass
class _Item:
    pieces: list[Any]  # bytes and arrays of bytes, in order
    row: list[Any]
    replaced: list[Skip] = field(default_factory=list)
    padded: int = 0


class _ClipSource:
    """Clips in their order: epoch by epoch."""

    def __init__(self, dataset: ClipDataset, may_skip: bool) -> None:
        self.dataset = dataset
        self.may_skip = may_skip  # training has put another clip in the place of one, or there is none to be had

    def skipped(self, place: int, error: VideoError) -> Skip:
        """What to call a clip that can't be read, and why."""
        return self.dataset.skip(place % len(self.dataset), error)

    def row_without_item(self, place: int) -> list[list[Any]]:
        """What identifies an evaluation clip that is not there: a protocol names those that were to be measured."""
        name, start = self.dataset.identity(place)
        return [[0, place, name, "", start]]

    def item(self, place: int) -> _Item:
        epoch, index = divmod(place, len(self.dataset))
        item = self.dataset.clip(epoch, index)
        clip = np.ascontiguousarray(item["clip"])
        header = np.array([_UINT8, clip.ndim, *clip.shape], np.uint32).tobytes()
        name, label, start = item["name"], int(item["label"]), int(item["start_frame"])
        text = name.encode()
        sizes = np.array([len(header) + clip.nbytes, 8, len(text), 8], np.uint32).tobytes()
        tail = np.int64(label).tobytes() + text + np.int64(start).tobytes()
        row = [epoch, index, name, label, start]
        return _Item([sizes, header, clip, tail], row, list(item.get("skipped", ())), item.get("padded", 0))


class _VideoSource:
    """Video files as they are."""

    may_skip = True

    def __init__(self, videos: list[Video]) -> None:
        self.videos = videos

    def skipped(self, place: int, error: VideoError) -> Skip:
        return self.videos[place].name, Fault.of(error, self.videos[place].path).reason

    def row_without_item(self, place: int) -> list[list[Any]]:
        return []

    def item(self, place: int) -> _Item:
        video = self.videos[place]
        try:
            content = video.path.read_bytes()
        except FileNotFoundError:  # as of downloads that are not complete
            raise VideoError(f"{video.path}: there is no such file.") from None
        except OSError as error:
            raise UserError(
                f"{video.path}: expected to read it, got this: {error.strerror}; run the same command again."
            ) from None
        try:
            info = survey(content)  # what is broken is told now, with its name, and not in a training
        except VideoError as error:  # whose text can't know the name
            raise VideoError(
                f"{video.path}: {str(error).partition(': ')[2]}", kind=error.kind, lasting=error.lasting
            ) from None
        text = video.name.encode()
        sizes = np.array([8, len(text), len(content)], np.uint32).tobytes()
        row = [place, video.name, video.label, info.num_frames, info.fps, info.duration, info.width, info.height]
        return _Item([sizes, np.int64(video.label).tobytes(), text, content], [str(value) for value in row])


_Source = _ClipSource | _VideoSource


class _ShardWriter(Dataset[dict[str, Any]]):
    """Makes the shard when it is asked for it, in the worker; what comes back is a record of a few lines."""

    def __init__(self, folder: Path, source: _Source, todo: list[tuple[int, int, int]]) -> None:
        self.folder = folder
        self.source = source
        self.todo = todo  # number, first place, number of places

    def __len__(self) -> int:
        return len(self.todo)

    def __getitem__(self, index: int) -> dict[str, Any]:
        number, first, count = self.todo[index]
        try:
            return self._write(number, first, count)
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            return {
                "error": f"{self.folder}: the disk is full; free some of it and run the same command again, the shards "
                "written so far are kept."
            }

    def _write(self, number: int, first: int, count: int) -> dict[str, Any]:
        pieces: list[list[Any]] = []
        rows: list[list[Any]] = []
        skipped: list[tuple[Any, ...]] = []
        replaced: list[tuple[int, list[Skip]]] = []
        padded: list[tuple[int, int]] = []
        for place in range(first, first + count):
            try:
                item = self.source.item(place)
            except VideoError as error:
                if not self.source.may_skip or not error.lasting:
                    raise  # a disk that fails for a moment must not leave a hole for good
                skipped.append((place, *self.source.skipped(place, error)))
                rows += self.source.row_without_item(place)
                continue
            pieces.append(item.pieces)
            rows.append(item.row)
            if item.replaced:
                replaced.append((place, item.replaced))
            if item.padded:
                padded.append((place, item.padded))
        lengths = [sum(memoryview(piece).nbytes for piece in parts) for parts in pieces]
        offsets = 4 * (len(pieces) + 2) + np.cumsum([0, *lengths])
        if offsets[-1] >= 2**32:
            raise UserError(
                f"Expected video files below 4 GB, which a shard can hold, got {rows[0][1]}; use --format clips for "
                "these data."
            )
        file = f"chunk-0-{number}.bin"
        digest = hashlib.sha256()
        with replacing(self.folder / file) as temporary, temporary.open("wb") as stream:
            head = np.array([len(pieces), *offsets], np.uint32).tobytes()
            for piece in [head, *(piece for parts in pieces for piece in parts)]:
                stream.write(piece)
                digest.update(piece)
        shard = Shard(file, first, count, len(pieces), int(offsets[-1]), digest.hexdigest())
        record = {"number": number, "shard": shard, "rows": rows, "skipped": skipped, "replaced": replaced}
        record["padded"] = padded
        write_text(self.folder / _record_name(number), json.dumps(record | {"shard": vars(shard)}))
        return record
