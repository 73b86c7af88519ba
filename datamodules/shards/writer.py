"""Write clips, or video files, of a data module as shards (`vidtwin cache`).

The arguments alone determine the content of a shard. A worker decodes and writes it, and it appears when it is
complete; after a kill only the missing ones are made, to the same bytes.
"""

import json
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

from tqdm import tqdm

from vidtwin.data import SPLITS, ClipSettings
from vidtwin.datamodules.clips import ClipDataset, Video
from vidtwin.datamodules.content import digest_all
from vidtwin.datamodules.loader import WorkerLoader
from vidtwin.errors import UserError
from vidtwin.files import write_text
from vidtwin.storage.resumable import Resumable, lock
from vidtwin.tables import write_table

from .cached import difference
from .format import FIELDS, MANIFEST, SHARD, TABLE, Format, Manifest, Shard, as_skip, check_shard
from .sources import ClipSource, Record, ShardWriter, Source, VideoSource, record_path

SHARD_BYTES = 64 * 2**20
_COLUMNS = {
    "clips": ["epoch", "index", "name", "label", "start_frame"],
    "videos": ["index", "name", "label", "num_frames", "fps", "duration", "width", "height"],
}
_LISTED = 10  # lines about unusable videos


class Cacheable(Protocol):
    """Data module of clips; see `ClipDataModule`."""

    settings: ClipSettings
    skipped: dict[str, dict[str, str]]

    def videos(self, split: str) -> list[Video]: ...
    def make_dataset(self, split: str) -> ClipDataset: ...
    def split_name(self, split: str) -> str: ...
    def describe(self, split: str, format: Format = "clips") -> dict[str, Any]: ...
    def workers(self) -> int: ...


@dataclass(frozen=True)
class Written:
    """Result of `write_cache` for a split; `made` counts the new shards."""

    split: str
    manifest: Manifest
    folder: Path
    made: int

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
        lines = [f"{total}new: {self.made}{more}", *(f"  {line}" for line in without[:_LISTED])]
        if len(without) > _LISTED:
            lines.append(f"  and {len(without) - _LISTED} more, see {self.folder / MANIFEST}")
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

    Existing shards of the right size (with `verify`, of the right checksum) are kept, others are made again. Of two
    processes that write the same cache, the second waits for the first.

    Args:
        data: Data module; `data.num_workers` processes decode, and their number changes no byte.
        out: Folder of the cache.
        splits: Some of "train", "val", "test".
        epochs: Number of epochs of training clips to draw; other splits, and all without `data.augment`, have one.
        format: "clips" stores decoded clips, "videos" the files as they are, to be decoded when they are streamed.
        verify: Compare the checksums of all existing shards.
        shard_bytes: Size of a shard, which holds at least one item.

    Raises:
        UserError: The folder holds something else, the videos have changed, the disk is full.
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
    name, description = data.split_name(split), data.describe(split, format)
    if format == "videos":
        videos = data.videos(split)
        source: Source = VideoSource(videos)
        digests = _digests(videos) if split == "test" else {}
        wanted = Manifest(format, split, name, description, 1, len(videos), digests=digests)
        sizes = [_file_size(video.path) for video in videos]
        ranges = list(_group_by_size(sizes, shard_bytes))
    else:
        data.settings.check(split)
        dataset = data.make_dataset(split)
        source = ClipSource(dataset, may_skip=split != "train")
        epochs = epochs if data.settings.draws(split) else 1
        left_out = dict(data.skipped[split])
        digests = dataset.digests(show=True) if split == "test" else {}
        wanted = Manifest(format, split, name, description, epochs, len(dataset), left_out, digests=digests)
        sizes = _clip_sizes(dataset, data.settings)
        # No shard holds clips of two epochs: streaming reads one epoch.
        ranges = [
            (epoch * len(dataset) + first, count)
            for epoch in range(epochs)
            for first, count in _group_by_size(sizes, shard_bytes)
        ]
    if not wanted.clips:
        raise UserError(f"Expected videos in the {split} split to store, got none; leave it out of --splits.")
    split_writer = _SplitWriter(folder, wanted, ranges, source, data.workers(), verify, sizes)
    with lock(folder, "`vidtwin cache`", wait=True):
        return split_writer.run()


@dataclass
class _SplitWriter:
    """Write the missing shards of a split, then the table, litdata's index and the manifest.

    Args:
        folder: Folder of the split.
        wanted: Manifest of the split, without shards.
        ranges: First place and number of places of each shard.
        source: Items.
        workers: Number of processes that write shards.
        verify: Compare the checksums of existing shards.
        sizes: Bytes of each item of an epoch.
    """

    folder: Path
    wanted: Manifest
    ranges: list[tuple[int, int]]
    source: Source
    workers: int
    verify: bool
    sizes: list[int]

    def __post_init__(self) -> None:
        self.found = self.wanted  # or the manifest of an earlier run
        self.units = Resumable(self.folder, SHARD, self._read, f"cached {self.wanted.format}", MANIFEST)

    def run(self) -> Written:
        if not self.units.begin(self._compare, "give another folder, or delete this one"):
            write_text(self.folder / MANIFEST, self.wanted.to_json())
        numbers = range(len(self.ranges))
        records = {number: record for number in numbers if (record := self.units.get(number)) is not None}
        missing = [number for number in numbers if number not in records]
        if self.wanted.format == "clips" and missing:
            wanted = [range(first, first + count) for first, count in (self.ranges[number] for number in missing)]
            clips = len(self.sizes)
            _expect_room(self.folder, sum(self.sizes[place % clips] for places in wanted for place in places))
        total = sum(count for _, count in self.ranges)
        with tqdm(total=total, desc=f"{self.wanted.split} {self.wanted.format}", unit="", disable=None) as bar:
            bar.update(sum(record.shard.places for record in records.values()))
            for record in self._write(missing):
                records[record.number] = record
                bar.update(record.shard.places)
        if not self.found.complete:
            self._finish([records[number] for number in numbers])
        for number in numbers:
            record_path(self.folder, number).unlink(missing_ok=True)
        return Written(self.wanted.split, self.found, self.folder, len(missing))

    def _compare(self) -> str | None:
        """Read the manifest of an earlier run → what differs from the wanted one."""
        self.found = Manifest.read(self.folder / MANIFEST)
        other = difference(_layout(self.wanted) | self.wanted.description, _layout(self.found) | self.found.description)
        if other is None and self.found.digests not in (None, self.wanted.digests):
            return "test videos of another content"
        ranges = [(shard.first, shard.places) for shard in self.found.shards]
        if other is None and self.found.complete and ranges != self.ranges:
            return "shards of another size"
        return other

    def _record(self, number: int) -> Record | None:
        """Return the record of a shard that was written at some time."""
        if self.found.complete:
            return Record(number, self.found.shards[number])
        record = Record.read(self.folder, number)
        return record if record and (record.shard.first, record.shard.places) == self.ranges[number] else None

    def _read(self, number: int, path: Path) -> Record | None:
        if record := self._record(number):
            check_shard(path, record.shard, self.verify)
        return record

    def _write(self, missing: list[int]) -> Iterator[Record]:
        earlier = {number: self._record(number) for number in missing}
        loader = WorkerLoader(
            ShardWriter(self.folder, self.source, [(number, *self.ranges[number]) for number in missing]),
            batch_size=None,
            num_workers=min(self.workers, len(missing)),
        )
        for record in loader:
            if isinstance(record, str):
                raise UserError(record)
            if (known := earlier[record.number]) and known.shard != record.shard:
                raise UserError(
                    f"{self.folder / record.shard.file}: expected the same content when made again, got another: the "
                    "videos or the decoder have changed; write another cache."
                )
            yield record

    def _finish(self, records: list[Record]) -> None:
        """Write the table and the index, and last the manifest, which says that the cache is complete."""
        shards = [record.shard for record in records]
        rows = (row for record in records for row in record.rows)
        write_table(self.folder / TABLE, _COLUMNS[self.wanted.format], rows)
        write_text(self.folder / "index.json", _make_litdata_index(self.wanted.format, shards))
        self.found = replace(
            self.wanted,
            shards=shards,
            skipped={place: as_skip(entry) for record in records for place, *entry in record.skipped},
            replaced={place: list(map(as_skip, what)) for record in records for place, what in record.replaced},
            padded={place: frames for record in records for place, frames in record.padded},
            complete=True,
        )
        write_text(self.folder / MANIFEST, self.found.to_json())


def _digests(videos: list[Video]) -> dict[str, str]:
    digests = digest_all([video.path for video in videos], show=True)
    return {video.name: digest for video, digest in zip(videos, digests, strict=True)}


def _layout(manifest: Manifest) -> dict[str, Any]:
    return {key: getattr(manifest, key) for key in ("format", "split", "epochs", "clips")}


def _make_litdata_index(format: str, shards: list[Shard]) -> str:
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


def _expect_room(folder: Path, wanted: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < wanted:
        raise UserError(
            f"{folder}: expected {wanted / 1e9:.1f} GB of free disk for the clips still to be written, got "
            f"{free / 1e9:.1f} GB; free some, choose another folder or fewer --epochs."
        )


def _clip_sizes(dataset: ClipDataset, settings: ClipSettings) -> list[int]:
    """Return the bytes of each decoded clip."""
    if settings.num_frames and settings.size:
        return [settings.num_frames * math.prod(settings.size) * 3] * len(dataset)
    return [math.prod(dataset.shape(index)) * 3 for index in range(len(dataset))]


def _file_size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0  # reported when it is read


def _group_by_size(sizes: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Group neighbours whose total stays within a limit → first index and count of each group."""
    first, total = 0, 0
    for index, size in enumerate(sizes):
        if index > first and total + size > limit:
            yield first, index - first
            first, total = index, 0
        total += size
    if first < len(sizes):
        yield first, len(sizes) - first
