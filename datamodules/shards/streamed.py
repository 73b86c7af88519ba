"""Clips from shards that lie elsewhere: a folder, or object storage by litdata (docs/cached_and_streamed.md).

The shards are those of writer.py: decoded clips, or video files that the worker decodes. litdata knows the storage
(s3://, gs://, azure://, r2://, hf://) and fetches a shard to this machine. The choice of shards is made here: litdata's
own loader orders an epoch by the numbers of ranks and workers, drops clips to make the ranks equal, repeats some if
these numbers change in mid-epoch, and counts loaded clips instead of trained ones.

Here the order of an epoch depends on (seed, epoch) alone, as for files. Hence equal shares of the ranks, a place from
which any number of ranks and workers can resume, and every evaluation clip once. A shuffle of all clips would need all
shards at once; so the shuffled shards, one after the other, are cut into `lanes` lanes of equal length, and the order
takes one clip from each lane in turn. A rank then reads from a few shards at a time, and from other ones than the other
ranks, if their number divides the number of lanes.
"""

import hashlib
import os
import queue
import re
import tempfile
import threading
import time
from collections.abc import Callable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import Video, VideoClips
from vidtwin.errors import UserError
from vidtwin.files import inside
from vidtwin.storage.resumable import lock_file
from vidtwin.video import VideoInfo

from .cached import CachedClips
from .format import MANIFEST, TABLE, Items, Manifest, Shard, check_shards, read_rows

_ATTEMPTS = 4
# Errors that another attempt does not change.
_FINAL = re.compile(r"FileNotFound|NoSuch|\b40[34]\b|not found|credentials", re.IGNORECASE)
_PAUSE = 1.0  # seconds before the second attempt; four times as long before each further one


class RemoteShards:
    """Shards of a split on this machine: in their own folder, or fetched on first use.

    Args:
        url: `OUT/<split>`: a folder, or an address that litdata knows ("local:FOLDER" copies from a mounted drive).
        cache_dir: Folder for fetched shards, shared by all processes of this machine.
        limit: Bytes of this split to keep there; the least recently used shards go first. None keeps all.
        options: Options of litdata's client for the storage: credentials, endpoint.
    """

    def __init__(
        self, url: str, cache_dir: Path, limit: int | None = None, options: dict[str, Any] | None = None
    ) -> None:
        self.url = url.rstrip("/")
        self.limit = limit
        self.options = options
        self.remote = "://" in url or url.startswith("local:")
        self._client: tuple[int, Any] | None = None  # process, and litdata's downloader in it
        self._waiting: tuple[int, queue.SimpleQueue[Shard]] | None = None  # process, and shards for its thread to fetch
        if not self.remote:
            self.folder = Path(url)
            self.manifest = Manifest.read(self.folder / MANIFEST)
            check_shards(self.folder, self.manifest)
            return
        cache_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache_dir) as own:
            self._fetch(MANIFEST, Path(own) / MANIFEST)
            text = (Path(own) / MANIFEST).read_text(encoding="utf-8", errors="replace")
        # Other shards under the same address are other files here.
        self.folder = cache_dir / hashlib.sha256(f"{self.url}\n{text}".encode()).hexdigest()[:16]
        self.folder.mkdir(parents=True, exist_ok=True)
        self.manifest = Manifest.parse(text, f"{self.url}/{MANIFEST}")

    def table(self, columns: Mapping[str, Callable[[str], Any]]) -> list[list[Any]]:
        """Read columns of the table of items, each by its type, which needs no shard."""
        path = self.folder / TABLE
        if self.remote and not path.exists():
            with tempfile.TemporaryDirectory(dir=self.folder) as own:
                self._fetch(TABLE, Path(own) / TABLE)
                (Path(own) / TABLE).replace(path)
        try:
            return read_rows(self.folder, columns)
        except UserError:
            if self.remote:
                path.unlink(missing_ok=True)  # so that another one can be fetched
            raise

    def __call__(self, shard: Shard) -> Path:
        """Return the file of a shard, fetched if necessary."""
        path = self.folder / shard.file
        if self.remote:
            try:
                os.utime(path)  # used just now
                whole = path.stat().st_size == shard.bytes
            except FileNotFoundError:
                whole = False
            if not whole:
                self._ensure(shard)
        return path

    def prefetch(self, shard: Shard) -> None:
        """Fetch a shard in the background."""
        if not self.remote or (self.folder / shard.file).exists():
            return
        if self._waiting is None or self._waiting[0] != os.getpid():
            self._waiting = os.getpid(), queue.SimpleQueue()
            threading.Thread(target=self._download_expected, args=(self._waiting[1],), daemon=True).start()
        self._waiting[1].put(shard)

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_waiting": None, "_client": None}

    def _download_expected(self, waiting: "queue.SimpleQueue[Shard]") -> None:
        while True:
            shard = waiting.get()
            try:
                self._ensure(shard)
            except Exception:  # raised again where the shard is used
                continue

    def _ensure(self, shard: Shard) -> None:
        path = inside(self.folder, shard.file)
        with lock_file(path.with_name(f"{path.name}.lock")):  # one process fetches, the others wait
            if path.exists() and path.stat().st_size == shard.bytes:
                return
            partial = path.with_name(f".{path.name}.part")
            self._fetch(shard.file, partial, shard)
            partial.replace(path)
        if self.limit is not None:
            with lock_file(self.folder / ".limit.lock"):
                self._keep_limit(self.limit, path)

    def _fetch(self, file: str, target: Path, shard: Shard | None = None) -> None:
        """Download a file and verify it if it is a shard; `UserError` after repeated failures."""
        address = f"{self.url}/{file}"
        reason = ""
        for attempt in range(_ATTEMPTS):
            if attempt:
                time.sleep(_PAUSE * 4 ** (attempt - 1))
            downloader = self._downloader()
            try:
                # By the storage's own client: the other one that litdata has knows no http:// and no forked processes.
                with target.open("wb") as stream:
                    downloader.download_fileobj(address, stream)
                if not target.stat().st_size:  # a storage for which that call does nothing
                    target.unlink()  # or it would be taken for the file
                    downloader.download_file(address, str(target))
            except Exception as error:  # each storage has its own
                reason = f"{type(error).__name__}: {str(error).strip()}".splitlines()[0]
                if _FINAL.search(reason):
                    break
                continue
            reason = _fault(target, shard)
            if not reason:
                return
        target.unlink(missing_ok=True)
        raise UserError(f"{address}: expected a file written by `vidtwin cache`, could not get it: {reason}")

    def _downloader(self) -> Any:
        if self._client is None or self._client[0] != os.getpid():  # connections don't survive a fork
            self._client = os.getpid(), _downloader(self.url, self.options)
        return self._client[1]

    def _keep_limit(self, limit: int, newest: Path) -> None:
        files = []
        for entry in os.scandir(self.folder):
            if entry.name.endswith(".bin"):
                try:
                    status = entry.stat()
                except FileNotFoundError:
                    continue
                files.append((status.st_mtime_ns, status.st_size, Path(entry.path)))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= limit:
                return
            if path != newest:
                path.unlink(missing_ok=True)  # mapped clips of it stay readable
                total -= size


def _downloader(url: str, options: dict[str, Any] | None) -> Any:
    try:
        from litdata.streaming.downloader import get_downloader
    except ImportError as error:
        raise UserError(
            f"Expected litdata to stream from {url}, got an import error ({error}); pip install 'vidtwin[stream]'."
        ) from None
    try:
        return get_downloader(url, "", [], options)
    except ModuleNotFoundError as error:  # the client of that storage
        raise UserError(f"Expected litdata to know the storage of {url}: {error}") from None


def _fault(path: Path, shard: Shard | None) -> str:
    """Return the fault of a fetched file, or an empty string if it is intact."""
    if not path.exists():
        return "nothing was downloaded"
    if shard is None:
        return ""
    size = path.stat().st_size
    if size != shard.bytes:
        return f"{size:,} bytes, not {shard.bytes:,}"
    with path.open("rb") as file:
        whole = hashlib.file_digest(file, "sha256").hexdigest() == shard.sha256
    return "" if whole else "another checksum"


class InterleavedShuffle:
    """Order of training clips in shards.

    Args:
        shards: Number of the shard that holds the clip of each index, ascending.
        lanes: Number of shards to read from at a time.
        seed: Seed of the order.
    """

    def __init__(self, shards: NDArray[np.int64], lanes: int, seed: int) -> None:
        self.seed = seed
        self.sizes = np.bincount(shards)
        self.firsts = np.cumsum(self.sizes) - self.sizes
        self.lanes = max(1, min(lanes, int(np.count_nonzero(self.sizes))))
        self._following: tuple[int, dict[int, int]] = (-1, {})

    def order(self, epoch: int) -> NDArray[np.int64]:
        """Return all indices, each once."""
        random, shards = self._shuffled(epoch)
        stream = np.concatenate([self.firsts[s] + random.permutation(self.sizes[s]) for s in shards])
        length = len(stream) // self.lanes
        lanes = stream[: length * self.lanes].reshape(self.lanes, length)
        return np.concatenate([lanes.T.ravel(), stream[length * self.lanes :]])

    def following(self, epoch: int, shard: int) -> int | None:
        """Return the shard that follows this one in its lane; None at the end."""
        if self._following[0] != epoch:
            shards = self._shuffled(epoch)[1].tolist()
            self._following = epoch, dict(pairwise(shards))
        return self._following[1].get(shard)

    def _shuffled(self, epoch: int) -> tuple[np.random.Generator, NDArray[np.int64]]:
        random = np.random.default_rng((self.seed, epoch))
        return random, random.permutation(np.flatnonzero(self.sizes))


class _Prefetcher:
    """Prefetch the shard that follows when one is begun."""

    def __init__(self, shards: RemoteShards, lanes: InterleavedShuffle) -> None:
        self.shards = shards
        self.lanes = lanes
        self._begun: set[tuple[int, int]] = set()

    def __call__(self, epoch: int, number: int) -> None:
        if (epoch, number) in self._begun:
            return
        self._begun = {(e, n) for e, n in self._begun if e >= epoch - 1} | {(epoch, number)}
        manifest = self.shards.manifest
        of_epoch = len(manifest.shards) // manifest.epochs
        first = epoch % manifest.epochs * of_epoch
        training = manifest.split == "train"
        following = self.lanes.following(epoch, number - first) if training else number + 1
        if following is not None and following < of_epoch:
            self.shards.prefetch(manifest.shards[first + following])


class StreamedClips(CachedClips):
    """Decoded clips of shards that may lie elsewhere. Arguments as of `RemoteShards` and `InterleavedShuffle`."""

    def __init__(self, shards: RemoteShards, lanes: int, seed: int) -> None:
        self.shards = shards
        self.manifest = shards.manifest
        self.items = Items(self.manifest, shards)
        self._identities = None
        sizes = [shard.places for shard in self.manifest.shards[: len(self.manifest.shards) // self.manifest.epochs]]
        self.lanes = InterleavedShuffle(np.repeat(np.arange(len(sizes)), sizes), lanes, seed)
        self._prefetch = _Prefetcher(shards, self.lanes)

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        item = super().clip(epoch, index)
        self._prefetch(epoch, self.items.shard_of(epoch % self.manifest.epochs * len(self) + index))
        return item

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return self.lanes.order(epoch)

    @property
    def _place(self) -> str:
        return self.shards.url

    def _rows(self, columns: Mapping[str, Callable[[str], Any]]) -> list[list[Any]]:
        return self.shards.table(columns)


class StreamedVideoClips(VideoClips):
    """Clips of video files in shards that may lie elsewhere, equal to those of `VideoClips` from the files.

    Args:
        shards: Shards of the videos.
        lanes: Number of shards to read from at a time.
        places: Name of a video → place in the shards.
        videos: The videos with their `info`; the path of each is its name.
        settings: As of `VideoClips`.
        split: As of `VideoClips`.
    """

    def __init__(
        self,
        shards: RemoteShards,
        lanes: int,
        places: dict[str, int],
        videos: list[Video],
        settings: ClipSettings,
        split: str,
    ) -> None:
        super().__init__(videos, settings, split)
        self.shards = shards
        self.items = Items(shards.manifest, shards)
        self.places = places
        numbers = [self.items.shard_of(places[video.name]) for video in videos]
        self.lanes = InterleavedShuffle(np.array(numbers, np.int64), lanes, self.seed)
        self._prefetch = _Prefetcher(shards, self.lanes)

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        item = super().clip(epoch, index)
        self._prefetch(epoch, self.items.shard_of(self.places[self.videos[self._place(index)[0]].name]))
        return item

    def _together(self, run: list[int]) -> list[dict[str, Any]] | None:
        items = super()._together(run)
        self._prefetch(0, self.items.shard_of(self.places[self.videos[self._place(run[-1])[0]].name]))
        return items

    def order(self, seed: int, epoch: int) -> NDArray[np.int64]:
        return self.lanes.order(epoch)

    def digests(self, show: bool = False) -> dict[str, str]:
        known = self.shards.manifest.content()
        return known if self.shards.manifest.digests is None else {v.name: known.get(v.name, "") for v in self.videos}

    def content(self, info: VideoInfo) -> bytes:
        return self.items.video(self.places[str(info.path)])[0]
