"""Base class of data modules of clips: options, datasets, loaders, unusable videos."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader

from vidtwin.console import log
from vidtwin.data import SPLITS, ClipSettings, ClipSource
from vidtwin.errors import UserError
from vidtwin.listing import excluded_names
from vidtwin.video import COLOURS, RESIZE_FILTERS

from .broken import UnusableVideos
from .clips import ClipDataset, Video, VideoClips
from .description import describe_clips, describe_videos
from .index import Fault, survey_all
from .loader import ChunkLoader, ClipLoader
from .resumable import ResumableDataModule
from .shards.cached import CachedClips
from .shards.writer import Written, write_cache
from .transforms import to_batch

_CROPS = ("none", "largest centre square", "largest centre rectangle of that shape")
WHOLE_STEPS = "in whole steps of the source's frames"
_CLIPS = {
    "middle": "one per video, from its middle",
    "first": "one per video, from its first frame",
    "all": "all clips of a video",
}


class ClipDataModule(ResumableDataModule, ClipSource, ABC):
    """Base of the data modules of clips.

    Workers hand out clips as uint8 (B, T, H, W, 3); on the device a batch is a `vidtwin.data.Batch`. A subclass lists
    its videos (`videos`), or creates the dataset itself (`make_dataset`). One with arguments of its own that choose or
    change clips also returns them in `cache_key`. The splits are "train", "val" and "test"; prediction takes "test".

    Args:
        batch_size: Clips per batch and device in training.
        eval_batch_size: Clips per batch and device in evaluation; null: `batch_size`, or 1 if clips differ in length or
            size.
        num_workers: Decoding processes per device; null shares the cores among the devices, with at most 8 each.
        max_broken: Share of a split's videos that may be unreadable, truncated or corrupt; more stop the run. One
            video may be broken unless the share is 0.
        exclude: Text file of videos to leave out, as `vidtwin doctor` writes it: a name per line, a tab, and anything.
        cache: Folder written by `vidtwin cache`, from which clips are read instead of being decoded.
        **kwargs: Arguments of `ClipSettings`.

    Attributes:
        unusable: Videos that cannot be used, and the budget of broken ones.
    """

    def __init__(
        self,
        batch_size: int = 6,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        max_broken: float = 0.05,
        exclude: str | None = None,
        cache: str | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(batch_size, num_workers)
        self.settings = ClipSettings(**kwargs)
        if self.settings.varies and (eval_batch_size or 1) > 1:
            raise UserError(
                "Expected data.eval_batch_size: 1 for clips that differ in length or size (data.num_frames or "
                f"data.resolution is null), got {eval_batch_size}; leave it out."
            )
        self.eval_batch_size = eval_batch_size or (1 if self.settings.varies else batch_size)
        self.exclude, self.cache = exclude, cache
        self.unusable = UnusableVideos(max_broken)
        self.skipped = self.unusable.reasons
        self._datasets: dict[str, ClipDataset] = {}
        self._digests: dict[str, dict[str, str]] = {}

    @abstractmethod
    def videos(self, split: str) -> list[Video]:
        """List the videos of a split, without reading other splits; `UserError` if the data are missing."""

    def make_dataset(self, split: str) -> ClipDataset:
        """Create the clips of a split; unusable videos are reported and left out."""
        listed = self._included(split)
        surveyed = survey_all([video.path for video in listed], self.workers(), show=self._reports)
        faults: dict[str, Fault] = {}
        usable = []
        for video, found in zip(listed, surveyed, strict=True):
            if isinstance(found, Fault):
                faults[video.name] = found
            else:
                usable.append(replace(video, info=found))
        clips = VideoClips(usable, self.settings, split)
        faults |= {video.name: fault for i, video in enumerate(clips.videos) if (fault := clips.fault(i))}
        self.unusable.sift(split, len(listed), faults, self._reports)
        clips.leave_out(faults)
        return clips

    def dataset(self, split: str) -> ClipDataset:
        """Return the clips of a split, created on first use."""
        self.settings.check(split)
        if split not in self._datasets:
            self._datasets[split] = self._read_cache(split) if self.cache else self.make_dataset(split)
        return self._datasets[split]

    def _read_cache(self, split: str) -> ClipDataset:
        clips = CachedClips(Path(str(self.cache)) / split, self.describe(split))
        left_out = clips.manifest.left_out
        self.unusable.restart(split, clips.num_videos + len(left_out), left_out)
        return clips

    def cache_key(self, split: str) -> dict[str, Any]:
        """Return the arguments of the subclass on which its clips depend, by name, as JSON has them; here none.

        A subclass with arguments of its own overrides it: a cache made with other values is refused, even if the videos
        themselves are missing.
        """
        return {}

    def describe(self, split: str, format: Literal["clips", "videos"] = "clips") -> dict[str, Any]:
        """Describe everything on which the clips, or the video files, of a split depend."""
        try:
            videos = self.videos(split)
        except UserError:  # a cache can be used without them
            videos = None
        clips = describe_clips(self.settings, split) if format == "clips" else {}
        described = clips | describe_videos(self.cache_key(split), self.exclude, videos)
        return {"data": type(self).__name__, **json.loads(json.dumps(described))}  # as a manifest gives it back

    def write_cache(
        self,
        out: str | Path,
        splits: Sequence[str] = SPLITS,
        epochs: int = 1,
        format: Literal["clips", "videos"] = "clips",
        verify: bool = False,
    ) -> list[Written]:
        """Write the clips, or the video files, of some splits as shards: `vidtwin cache`."""
        return write_cache(self, out, splits, epochs, format, verify)

    def prepare_data(self) -> None:
        """Report missing data before anything is fetched or built."""
        if self.trainer and self.trainer.state.fn:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        splits: tuple[str, ...] = {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",))
        if stage == "fit" and self.trainer and self.trainer.limit_val_batches == 0:
            splits = ("train",)  # a training without validation needs no clips for it
        for split in splits:
            self.dataset(split)

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any]:
        return self._loader("val")

    def test_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def predict_dataloader(self) -> DataLoader[Any]:
        return self._loader("test")

    def chunk_loader(
        self, split: str, chunks: Sequence[Sequence[int]], device_type: str = "cpu", processes: int = 1
    ) -> DataLoader[Any]:
        """Load given evaluation clips without a trainer: one batch per list of indices, in their order.

        A batch is as in evaluation, before `on_after_batch_transfer`, with `"indices": list[int]`, the clips that it
        holds, and `"skipped": [(index, name, reason), …]`, those that could not be read; if none of a list can be
        read, it has these two keys alone. Skipped videos are reported and counted as in evaluation.

        Args:
            split: "val" or "test".
            chunks: Indices into `dataset(split)`.
            device_type: Device of the batches: "cuda" pins their memory.
            processes: Number of processes on this machine that share its cores, each with its own loader.
        """
        if split not in ("val", "test"):
            raise UserError(f"Expected chunks of the split val or test, whose clips are fixed, got {split!r}.")
        if processes < 1:
            raise UserError(f"Expected at least one process, got {processes}.")
        dataset = self.dataset(split)
        if wrong := [index for chunk in chunks for index in chunk if not 0 <= index < len(dataset)]:
            raise UserError(f"Expected indices below {len(dataset)} of clips of the split {split}, got {wrong[0]}.")
        return ChunkLoader(
            dataset,
            chunks,
            on_skip=partial(self._skip, split),
            num_workers=min(self.workers(processes), len(chunks)),
            pin_memory=device_type == "cuda",
            generator=torch.Generator().manual_seed(self.settings.seed),
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return to_batch(batch)

    def protocol(self) -> dict[str, Any]:
        """Describe the test clips, after reading the headers of their videos: equal protocols mean equal clips."""
        dataset = self.dataset("test")
        identities = [dataset.identity(index) for index in range(len(dataset))]
        listing = "".join(f"{name}\t{start}\n" for name, start in identities)
        entire, size = self.settings.takes_whole("test"), self.settings.size
        contents = "".join(f"{name}\t{digest}\n" for name, digest in sorted(self.digests().items()))
        return {
            "data": type(self).__name__,
            "split": dataset.split_name or self.split_name("test"),
            "num_clips": len(identities),
            "num_frames": "all of a video" if entire else self.num_frames,
            "resolution": self.resolution or "native",
            "fps": f"{self.eval_fps:g} {WHOLE_STEPS}" if self.settings.steps_whole("test") else self.eval_fps,
            "short_videos": self.settings.short_rule("test"),
            "crop": _CROPS[0 if size is None else 1 if size[0] == size[1] else 2],
            "resize": RESIZE_FILTERS[self.settings.resize] if size else "none",
            "colour": COLOURS[self.settings.resize],
            "clip": _CLIPS["all" if entire else self.eval_clips],
            "tail": self.settings.tail if self.settings.takes_all("test") else "none",
            "clips_sha256": hashlib.sha256(listing.encode()).hexdigest(),
            "videos_sha256": hashlib.sha256(contents.encode()).hexdigest() if contents else None,
        }

    def class_names(self) -> list[str]:
        """Return the folder of each label's videos, or its number if they are in several; none without labels."""
        folders: dict[int, set[str]] = {}
        for split in SPLITS:
            with suppress(UserError):  # a split that is empty, or a cache without its videos
                for video in self.videos(split):
                    folders.setdefault(video.label, set()).add(video.name.rpartition("/")[0])
        known = [folders.get(label, set()) for label in range(max(folders, default=-1) + 1)]
        return [names.pop() if len(names) == 1 and "" not in names else str(label) for label, names in enumerate(known)]

    def digests(self, split: str = "test") -> dict[str, str]:
        if split not in self._digests:
            self._digests[split] = self.dataset(split).digests(self._reports)
        return self._digests[split]

    def split_name(self, split: str) -> str:
        """Return a split's name in the protocol."""
        return split

    def _loader(self, split: str) -> DataLoader[Any]:
        clips = self.dataset(split)
        batch_size = self.batch_size if split == "train" else self.eval_batch_size
        options = self._loader_options(split, clips, batch_size, self.settings.seed, clips.order)
        return ClipLoader(clips, on_skip=partial(self._skip, split), **options)

    def _included(self, split: str) -> list[Video]:
        """List the videos of a split without the excluded ones."""
        videos = self.videos(split)
        if not self.exclude:
            return videos
        excluded = excluded_names(Path(self.exclude))
        listed = [video for video in videos if video.name not in excluded]
        if not listed:
            raise UserError(
                f"Expected videos in split {split}, got none of {len(videos)}: data.exclude={self.exclude} names all; "
                "remove some from it."
            )
        if self._reports:
            line = f"{split}: data.exclude leaves out {len(videos) - len(listed)} of {len(videos)} videos"
            if len(videos) == len(listed) and excluded:
                line += f"; it names {min(excluded)}, but this split has names such as {videos[0].name}"
            log(line)
        return listed

    @property
    def _reports(self) -> bool:
        """Return whether this process reports for all ranks."""
        return self.trainer is None or self.trainer.global_rank == 0

    def share_skipped(self, gather: Callable[[Any], list[Any]]) -> None:
        self.unusable.share(gather)

    def _skip(self, split: str, name: str, reason: str, broken: bool = True) -> None:
        """Register a video that a worker could not read."""
        self.unusable.add(split, name, reason, broken)
        if broken and (self.trainer is None or self.trainer.world_size == 1):  # several ranks stop together
            self.unusable.check(split)
