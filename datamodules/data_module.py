"""What all data modules share: their arguments, datasets and loaders, what they skip, and where training is."""

import hashlib
import sys
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from vidtwin.errors import UserError
from vidtwin.listing import excluded_names
from vidtwin.video import COLOUR, RESIZE_FILTER, VideoInfo

from .cache import CachedClips
from .cache_writer import write_cache
from .clips import SPLITS, ClipDataset, EvalClips, Tail, Video, VideoClips, rates_of
from .description import describe
from .index import Fault, survey_all
from .loader import ChunkLoader, ClipLoader, init_worker
from .resumable import ResumableDataModule
from .sampler import ClipSampler
from .transforms import to_batch

_NAMED = 1000  # unusable videos that are told one by one
_ADVICE = "; for short ones lower data.num_frames, raise data.fps or set data.short_videos to loop."


class ClipDataModule(ResumableDataModule, ABC):
    """Base of the data modules. Batches are on the device

        {"clip": float32 (B, 3, T, H, W) in [-1, 1], "label": int64 (B,), "name": list[str], "start_frame": int64 (B,),
         "padded": int64 (B,), frames at a clip's end that repeat the one before}

    and leave the workers with the clip as uint8 (B, T, H, W, 3). A subclass says which videos there are (`videos`), or
    makes the data set itself (`make_dataset`). Splits are called "train", "val" and "test"; prediction takes "test".

    Args:
        num_frames: Frames per clip, T.
        resolution: Side of the square picture in pixels.
        fps: Frames per second of the clip; null takes every frame of the video. Of a list, training draws a rate for
            each clip among those that the video has, evaluation takes the first. A video of a lower rate repeats frames
            in training and is refused in evaluation.
        batch_size: Clips per batch and device in training.
        eval_batch_size: The same in evaluation; null: `batch_size`.
        num_workers: Processes that decode, for each device; null: the cores shared by the devices, at most 8.
        seed: Of everything random: order, start, crop, mirroring.
        horizontal_flip: Mirror half of the training clips, if `augment`.
        augment: Draw start, crop and mirroring of the training clips at random, others in each epoch; false takes the
            clip in the middle of each video: to overfit on purpose.
        short_videos: What becomes of a video that ends before the clip does: "skip", or "loop", which begins it again.
        eval_clips: What evaluation takes of a video: the clip in its "middle", or "all" of them, one behind the other
            from its first frame on; two clips of a video differ in `start_frame`.
        tail: What "all" does with the frames that are left at a video's end: "drop" leaves them out, "pad" repeats the
            last one until their clip is full, also for a video shorter than a clip, whatever `short_videos` says.
        max_broken: Share of a split's videos that may be unreadable, truncated or corrupt; more stop the run. One may
            be, unless the share is 0.
        exclude: Text file of videos to leave out, as `vidtwin doctor` writes it: a name on each line, after a tab
            anything.
        cache: Folder that `vidtwin cache` has written, from which the clips are taken instead of being decoded.
    """

    def __init__(
        self,
        num_frames: int = 16,
        resolution: int = 224,
        fps: float | list[float] | None = 8.0,
        batch_size: int = 6,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        horizontal_flip: bool = True,
        augment: bool = True,
        short_videos: Literal["skip", "loop"] = "skip",
        eval_clips: EvalClips = "middle",
        tail: Tail = "drop",
        max_broken: float = 0.05,
        exclude: str | None = None,
        cache: str | None = None,
    ) -> None:
        super().__init__()
        for key, value in {"num_frames": num_frames, "resolution": resolution, "batch_size": batch_size}.items():
            if value < 1:
                raise UserError(f"Expected data.{key} of at least 1, got {value}.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"Expected data.num_workers of at least 0, or null for one a core, got {num_workers}.")
        rates = rates_of(fps)
        if not rates or any(rate is not None and rate <= 0 for rate in rates) or (None in rates and len(rates) > 1):
            raise UserError(f"Expected data.fps above 0, a list of such rates, or null for every frame, got {fps}.")
        if short_videos not in ("skip", "loop"):
            raise UserError(f"Expected data.short_videos to be skip or loop, got {short_videos!r}.")
        if eval_clips not in ("middle", "all"):
            raise UserError(f"Expected data.eval_clips to be middle or all, got {eval_clips!r}.")
        if tail not in ("drop", "pad"):
            raise UserError(f"Expected data.tail to be drop or pad, got {tail!r}.")
        if tail == "pad" and eval_clips == "middle":
            raise UserError("Expected data.eval_clips: all with data.tail: pad, got middle, which has no tail.")
        if not 0 <= max_broken <= 1:
            raise UserError(f"Expected data.max_broken, a share, between 0 and 1, got {max_broken}.")
        self.num_frames = num_frames
        self.resolution = resolution
        self.fps = fps
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self.augment = augment
        self.short_videos = short_videos
        self.eval_clips = eval_clips
        self.tail = tail
        self.max_broken = max_broken
        self.exclude = exclude
        self.cache = cache
        self.skipped: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        self._broken: dict[str, set[str]] = {split: set() for split in SPLITS}
        self._totals: dict[str, int] = {}  # videos of a split, unusable ones included
        self._datasets: dict[str, ClipDataset] = {}

    @abstractmethod
    def videos(self, split: str) -> list[Video]:
        """The videos of a split; `UserError` if the data are not there. Only the split asked for is read."""

    def make_dataset(self, split: str) -> ClipDataset:
        """The clips of a split; videos of which none can be taken are named and left out."""
        listed = self._wanted(split)
        shown = self.trainer is None or self.trainer.global_rank == 0
        findings = survey_all([video.path for video in listed], self._workers(), show=shown)
        faults = {v.name: found for v, found in zip(listed, findings, strict=True) if isinstance(found, Fault)}
        drawn = self._is_drawn(split)
        clips = VideoClips(
            [replace(v, info=found) for v, found in zip(listed, findings, strict=True) if isinstance(found, VideoInfo)],
            self.num_frames,
            self.resolution,
            self.fps,
            self.seed,
            training=drawn,
            horizontal_flip=self.horizontal_flip and drawn,
            loop=self.short_videos == "loop",
            replace=split == "train",
            eval_clips="all" if self.takes_all(split) else "middle",
            tail=self.tail,
        )
        faults |= {video.name: fault for i, video in enumerate(clips.videos) if (fault := clips.fault(i))}
        self._sift(split, len(listed), faults, tell=shown)
        clips.leave_out(faults)
        return clips

    @property
    def eval_fps(self) -> float | None:
        """Frames per second of evaluation clips; None: those of each video."""
        return rates_of(self.fps)[0]

    def takes_all(self, split: str) -> bool:
        """Whether a split has all clips of each video."""
        return split != "train" and self.eval_clips == "all"

    def short_rule(self, split: str) -> str:
        """What becomes of a video of a split that is shorter than a clip: "skip", "loop" or "pad"."""
        return "pad" if self.takes_all(split) and self.tail == "pad" else self.short_videos

    def dataset(self, split: str) -> ClipDataset:
        """The clips of a split, made when first asked for."""
        if split not in self._datasets:
            self._datasets[split] = self._cached(split) if self.cache else self.make_dataset(split)
        return self._datasets[split]

    def _cached(self, split: str) -> ClipDataset:
        clips = CachedClips(Path(str(self.cache)) / split, describe(self, split))
        self.skipped[split] = dict(clips.manifest.left_out)
        self._broken[split] = set()
        self._totals[split] = clips.num_videos + len(clips.manifest.left_out)
        return clips

    def cache_key(self, split: str) -> dict[str, Any]:
        """Arguments of a subclass on which its clips depend, beside the base class's: a cache is known by them."""
        return {}

    def write_cache(
        self,
        out: str | Path,
        splits: Sequence[str] = SPLITS,
        epochs: int = 1,
        format: Literal["clips", "videos"] = "clips",
        verify: bool = False,
    ) -> Any:
        """`vidtwin cache`: see `write_cache` in cache_writer.py."""
        return write_cache(self, out, splits, epochs, format, verify)

    def prepare_data(self) -> None:
        """Data that are not there are named before anything else is fetched or built."""
        if self.trainer and self.trainer.state.fn:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ("test",)):
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
        """A loader of given evaluation clips, without a trainer: one batch for each list of indices, in their order.

        A batch is as in evaluation, before `on_after_batch_transfer`, with `"indices": list[int]`, the clips that it
        holds, and `"skipped": [(index, name, reason), …]`, those that could not be read; a list of which none can be
        read gives these two keys alone. What is skipped is told, kept and counted as in evaluation.

        Args:
            split: "val" or "test".
            chunks: Indices into `dataset(split)`.
            device_type: Where the batches go: "cuda" pins their memory.
            processes: How many on this machine share its cores, each with a loader of its own.
        """
        if split not in ("val", "test"):
            raise UserError(
                f"Expected chunks of the split val or test, whose clips are always the same, got {split!r}."
            )
        if processes < 1:
            raise UserError(f"Expected at least one process, got {processes}.")
        dataset = self.dataset(split)
        if wrong := [index for chunk in chunks for index in chunk if not 0 <= index < len(dataset)]:
            raise UserError(f"Expected indices below {len(dataset)} of clips of the split {split}, got {wrong[0]}.")
        return ChunkLoader(
            dataset,
            chunks,
            told=partial(self._skip, split),
            num_workers=min(self._workers(processes), len(chunks)),
            worker_init_fn=init_worker,
            pin_memory=device_type == "cuda",
            generator=torch.Generator().manual_seed(self.seed),
        )

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return to_batch(batch)

    def protocol(self) -> dict[str, Any]:
        """What was evaluated: equal protocols mean equal clips. Reads the headers of the test videos."""
        dataset = self.dataset("test")
        identities = [dataset.identity(index) for index in range(len(dataset))]
        listing = "".join(f"{name}\t{start}\n" for name, start in identities)
        return {
            "data": type(self).__name__,
            "split": dataset.split_name or self.split_name("test"),
            "num_clips": len(identities),
            "num_frames": self.num_frames,
            "resolution": self.resolution,
            "fps": self.eval_fps,
            "short_videos": self.short_rule("test"),
            "crop": "largest centre square",
            "resize": RESIZE_FILTER,
            "colour": COLOUR,
            "clip": "all clips of a video" if self.eval_clips == "all" else "one per video, from its middle",
            "tail": self.tail if self.eval_clips == "all" else "none",
            "clips_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }

    def split_name(self, split: str) -> str:
        """A split's name in the protocol."""
        return split

    def _loader(self, split: str) -> DataLoader[Any]:
        training = split == "train"
        dataset = self.dataset(split)
        rank, world_size = self._ranks()
        if not training and len(dataset) < world_size:
            # A rank without a clip would leave the others waiting for it where means are taken over all ranks.
            raise UserError(
                f"Expected at least one clip of the {self.split_name(split)} split for each of {world_size} ranks, "
                f"got {len(dataset)}; use fewer devices or more clips."
            )
        batch_size = self.batch_size if training else self.eval_batch_size
        sampler = ClipSampler(len(dataset), training, self.seed, rank, world_size, batch_size, dataset.order)
        if training and self.trainer:
            self._go_on(sampler)
        workers = self._workers()
        return ClipLoader(
            dataset,
            told=partial(self._skip, split),
            batch_size=batch_size,
            sampler=sampler,
            drop_last=training and len(sampler) >= batch_size,
            num_workers=workers,
            worker_init_fn=init_worker,
            pin_memory=self._device_type() == "cuda",
            persistent_workers=workers > 0 and split != "test",
            # Its own: each iterator draws a seed, which would shift what the model draws in a run that was resumed.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _wanted(self, split: str) -> list[Video]:
        videos = self.videos(split)
        if not self.exclude:
            return videos
        excluded = excluded_names(Path(self.exclude))
        listed = [video for video in videos if video.name not in excluded]
        if not listed:
            raise UserError(
                f"Expected videos in split {split}, data.exclude={self.exclude} leaves none of {len(videos)}."
            )
        if self.trainer is None or self.trainer.global_rank == 0:
            left_out = len(videos) - len(listed)
            foreign = ""
            if not left_out and excluded:
                foreign = f"; it names {min(excluded)}, where this split has {videos[0].name}"
            _tell(f"{split}: data.exclude leaves out {left_out} of {len(videos)} videos{foreign}")
        return listed

    def _sift(self, split: str, total: int, faults: dict[str, Fault], tell: bool) -> None:
        """Name what can't be used of a split; `UserError` if that is too much."""
        slow = [(name, fault.reason) for name, fault in faults.items() if fault.kind == "slow"]
        if slow:
            raise UserError(
                f"{slow[0][0]}: {slow[0][1]}, or leave such videos out by data.exclude (split {split} has {len(slow)} "
                f"of them among {total})."
            )
        for name, fault in faults.items():
            if not fault.lasting:  # others may have read it, and would then have another epoch
                raise UserError(
                    f"Expected to read {name}, the system failed: {fault.reason}; try again, or leave it out by "
                    "data.exclude."
                )
        self._totals[split] = total
        self._broken[split] = {name for name, fault in faults.items() if fault.broken}
        self.skipped[split] = {name: fault.reason for name, fault in faults.items()}
        self._check_broken(split)
        if len(faults) == total:
            name, fault = next(iter(faults.items()))
            raise UserError(
                f"Expected usable videos in split {split}, got none of {total}; {name}: {fault.reason}"
                f"{_ADVICE if fault.kind == 'short' else '.'}"
            )
        if faults and tell:
            for name, fault in list(faults.items())[:_NAMED]:
                _tell(f"skipped {name}: {fault.reason}")
            if len(faults) > _NAMED:
                _tell(f"skipped {len(faults) - _NAMED} more, which `vidtwin doctor` lists")
            counts = Counter(fault.kind for fault in faults.values())
            kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            _tell(
                f"{split}: {total - len(faults)} of {total} videos can be used; {kinds}"
                f"{_ADVICE if counts['short'] else ''}"
            )

    def share_skipped(self, gather: Callable[[Any], list[Any]]) -> None:
        """Make what one rank could not read known to all, at a point that all of them reach.

        Args:
            gather: A value of this rank → those of all ranks in their order.

        Raises:
            UserError: On all ranks, if it is too much.
        """
        for skipped, broken in gather((self.skipped, self._broken)):
            for split in SPLITS:
                self.skipped[split] |= skipped[split]
                self._broken[split] |= broken[split]
        for split in self._totals:
            self._check_broken(split)

    def _skip(self, split: str, name: str, reason: str, broken: bool = True) -> None:
        """A clip that a worker could not read; not `broken`, that its video ends before."""
        if name in (self._broken if broken else self.skipped)[split]:
            return
        self.skipped[split][name] = reason
        if broken:
            self._broken[split].add(name)
        _tell(f"skipped {name}: {reason} ({len(self.skipped[split])} of {self._totals[split]} videos of {split})")
        if self.trainer is None or self.trainer.world_size == 1:  # others are to be stopped with this one
            self._check_broken(split)

    def _check_broken(self, split: str) -> None:
        broken, total = self._broken[split], self._totals[split]
        # In a small split a single one would be a large share.
        if len(broken) > (max(1, self.max_broken * total) if self.max_broken else 0):
            some = "; ".join(f"{name}: {self.skipped[split][name]}" for name in sorted(broken)[:3])
            more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise UserError(
                f"Expected at most a share of data.max_broken={self.max_broken:g} broken videos in split {split}, got "
                f"{len(broken)} of {total} ({some}{more}); raise data.max_broken, or find them all by `vidtwin doctor` "
                "and leave them out by data.exclude."
            )

    def _is_drawn(self, split: str) -> bool:
        """Whether each epoch draws other clips."""
        return split == "train" and self.augment


def _tell(line: str) -> None:
    tqdm.write(f"vidtwin: {line}", file=sys.stderr)  # above the progress bar, where there is one
