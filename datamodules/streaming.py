"""Data module of shards in a folder or in object storage (docs/cached_and_streamed.md)."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vidtwin.errors import UserError
from vidtwin.listing import cache_home, excluded_names
from vidtwin.video import VideoInfo, parse_rate

from .clips import ClipDataset, Video, VideoClips
from .data_module import ClipDataModule
from .index import Fault
from .shards.cached import check
from .shards.format import Format
from .shards.streamed import RemoteShards, StreamedClips, StreamedVideoClips

_COLUMNS: dict[str, Callable[[str], Any]] = {"name": str, "label": int, "num_frames": int, "fps": parse_rate}
_COLUMNS |= {"duration": float, "width": int, "height": int}
_NOT_ALWAYS = ("eval_clips", "tail", "frame_steps")  # keys of a description that a default setting leaves out


class Streamed(ClipDataModule):
    """Clips from shards written by `vidtwin cache`, in a folder or in object storage.

    Shards of decoded clips need the arguments that they were written with. Shards of video files are decoded here, with
    any arguments, to the clips that the files themselves give.

    Args:
        url: Parent of the splits' folders: s3://BUCKET/PATH, gs://…, azure://…, r2://…, hf://…, a folder, or
            local:FOLDER for a mounted drive from which shards are copied. All but a folder need `vidtwin[stream]`.
        cache_dir: Folder of this machine for fetched shards; null: `~/.cache/vidtwin/shards`.
        cache_gb: Gigabytes to keep there per split; null keeps all.
        lanes: Number of shards from which training clips come in turn. A multiple of the number of ranks lets each rank
            read shards of its own.
        storage_options: Options of litdata's client: credentials, endpoint.
        **kwargs: Arguments of `ClipDataModule`.
    """

    def __init__(
        self,
        url: str,
        cache_dir: str | None = None,
        cache_gb: float | None = 50.0,
        lanes: int = 48,
        storage_options: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if lanes < 1:
            raise UserError(f"Expected data.lanes of at least 1, got {lanes}.")
        self.url = url
        self.cache_dir = Path(cache_dir) if cache_dir else cache_home() / "shards"
        self.cache_gb = cache_gb
        self.lanes = lanes
        self.storage_options = storage_options
        self._shards: dict[str, RemoteShards] = {}

    def shards(self, split: str) -> RemoteShards:
        """Return the shards of a split."""
        if split not in self._shards:
            limit = None if self.cache_gb is None else int(self.cache_gb * 1e9)
            shards = RemoteShards(f"{self.url.rstrip('/')}/{split}", self.cache_dir, limit, self.storage_options)
            self._check_room(shards)
            self._shards[split] = shards
        return self._shards[split]

    def videos(self, split: str) -> list[Video]:
        shards = self.shards(split)
        self._check(shards, "videos")
        return [
            Video(Path(name), name, label, VideoInfo(Path(name), count, rate, duration, width, height))
            for name, label, count, rate, duration, width, height in shards.table(_COLUMNS)
        ]

    def make_dataset(self, split: str) -> ClipDataset:
        shards = self.shards(split)
        manifest = shards.manifest
        if manifest.format == "clips":
            self._check(shards, "clips", split)
            clips = StreamedClips(shards, self.lanes, self.settings.seed)
            self.unusable.restart(split, clips.num_videos + len(manifest.left_out), manifest.left_out)
            return clips
        listed = self._included(split)
        places = dict(shards.table({"name": str, "index": int}))
        every = VideoClips(listed, self.settings, split)
        excluded = excluded_names(Path(self.exclude)) if self.exclude else set()
        faults = {n: Fault("unreadable", reason) for n, reason, *_ in manifest.skipped.values() if n not in excluded}
        total = len(listed) + len(faults)
        faults |= {video.name: fault for i, video in enumerate(listed) if (fault := every.fault(i))}
        self.unusable.sift(split, total, faults, self._reports)
        usable = [video for video in listed if video.name not in faults]
        return StreamedVideoClips(shards, self.lanes, places, usable, self.settings, split)

    def protocol(self) -> dict[str, Any]:
        return {**super().protocol(), "data": self.shards("test").manifest.description["data"]}

    def split_name(self, split: str) -> str:
        return self.shards(split).manifest.split_name

    def _check(self, shards: RemoteShards, format: Format, split: str | None = None) -> None:
        expected = None
        if split is not None:
            known = shards.manifest.description
            own = {key: value for key, value in self.describe(split).items() if key != "data"}
            # The cache alone holds the arguments of the data module that wrote it.
            expected = {key: value for key, value in known.items() if key not in _NOT_ALWAYS} | own
        check(shards.manifest, shards.url, format, expected)

    def _check_room(self, remote: RemoteShards) -> None:
        """Raise `UserError` if the limit is below the size of the shards in use: every clip would fetch one again."""
        if remote.limit is None or not remote.remote or remote.manifest.split != "train":
            return
        shards = remote.manifest.shards
        wanted = sum(sorted((shard.bytes for shard in shards), reverse=True)[: 2 * self.lanes + 1])
        if remote.limit < wanted:
            raise UserError(
                f"Expected data.cache_gb of at least {wanted / 1e9:.3g} for data.lanes={self.lanes}, of which each "
                f"holds a shard and the next one, got {self.cache_gb}; raise it, or lower data.lanes."
            )
