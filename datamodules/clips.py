"""Clips of videos for training and evaluation: which frames, in which order, on which rank.

All that is random depends on (seed, epoch, index) alone: the sampler hands out (epoch, index) pairs, so workers (also
persistent ones) need no state, and their number and that of the ranks changes no clip.
"""

import hashlib
import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning import LightningDataModule
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from vidtwin.errors import UserError
from vidtwin.video import RESIZE_FILTER, VideoError, VideoInfo, probe, read_clip

from .transforms import to_batch

Key = int | tuple[int, int]
SPLITS = ("train", "val", "test")


@dataclass(frozen=True)
class Video:
    """One video of a data set: its file, its name in results, and its class (-1: none)."""

    path: Path
    name: str
    label: int = -1


class ClipDataset(Dataset[dict[str, Any]], ABC):
    """One clip for each index, in training another one in each epoch.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is `{"clip": uint8 (T, H, W, 3), "label": int, "name": str,
    "start_frame": int}`.
    """

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        """One clip, as numpy array, with its label, name and start frame."""

    @abstractmethod
    def identity(self, index: int) -> tuple[str, int]:
        """Name and start frame of an evaluation clip, without decoding it."""

    def __getitem__(self, key: Key) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        item = self.clip(epoch, index)
        return {**item, "clip": torch.from_numpy(np.ascontiguousarray(item["clip"]))}


class VideoClips(ClipDataset):
    """Clips of video files.

    Training takes a random start, a random square crop and, with `horizontal_flip`, the mirror image of every second
    clip. Evaluation takes the clip in the middle of the video, centre-cropped.

    Raises:
        VideoError: From `__getitem__`, for a file that can't be decoded, is too short for a clip, or (in evaluation)
            has fewer frames per second than the clip.
    """

    def __init__(
        self,
        videos: list[Video],
        num_frames: int,
        resolution: int,
        fps: float | None,
        seed: int = 0,
        training: bool = False,
        horizontal_flip: bool = False,
    ) -> None:
        self.videos = videos
        self.num_frames = num_frames
        self.resolution = resolution
        self.fps = fps
        self.seed = seed
        self.training = training
        self.horizontal_flip = horizontal_flip
        self._headers: dict[int, VideoInfo] = {}  # filled in each worker: a header is read once, not once an epoch

    def __len__(self) -> int:
        return len(self.videos)

    def identity(self, index: int) -> tuple[str, int]:
        return self.videos[index].name, self._last_start(self._header(index)) // 2

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        random = np.random.default_rng((self.seed, epoch, index))
        position, x, y, mirror = random.random(4) if self.training else (0.5, 0.5, 0.5, 1.0)
        video, header = self.videos[index], self._header(index)
        try:
            start, frames = self._read(header, position, (x, y))
        except VideoError as error:
            if error.decodable is None or error.decodable >= header.num_frames:
                raise
            # The header promised more than there is: choose again from what was decoded.
            header = self._headers[index] = replace(header, num_frames=error.decodable)
            start, frames = self._read(header, position, (x, y))
        if self.horizontal_flip and mirror < 0.5:
            frames = frames[:, :, ::-1]
        return {"clip": frames, "label": video.label, "name": video.name, "start_frame": start}

    def _header(self, index: int) -> VideoInfo:
        if index not in self._headers:
            self._headers[index] = probe(self.videos[index].path)
        return self._headers[index]

    def _read(self, header: VideoInfo, position: float, crop: tuple[float, float]) -> tuple[int, Any]:
        last = self._last_start(header)
        start = min(int(position * (last + 1)), last) if self.training else last // 2
        time = start / header.fps
        return start, read_clip(header.path, time, self.num_frames, self.fps, self.resolution, crop)

    def _last_start(self, header: VideoInfo) -> int:
        """The last frame of the video at which a clip can begin."""
        if self.fps is None:
            span = self.num_frames - 1
        else:
            if not self.training and self.fps > header.fps * 1.001:
                raise VideoError(
                    f"{header.path}: expected at least data.fps={self.fps:g} frames per second, the video has "
                    f"{float(header.fps):.4g}; lower data.fps (null: every frame)."
                )
            span = int((self.num_frames - 1) * header.fps / Fraction(self.fps).limit_denominator(10**7))
        if header.num_frames <= span:
            raise VideoError(
                f"{header.path}: expected at least {span + 1} frames for data.num_frames={self.num_frames} at "
                f"data.fps={self.fps}, the video has {header.num_frames}; lower data.num_frames, raise data.fps or "
                "leave the video out."
            )
        return header.num_frames - 1 - span


class ClipSampler(DistributedSampler[Any]):
    """Hands out (epoch, index) pairs: this rank's share of the clips.

    Training shuffles by (seed, epoch) and gives every rank the same number, leaving out fewer clips than there are
    ranks, others in each epoch. Evaluation gives rank r the clips r, r + world_size, …: none is repeated or lost.

    A `DistributedSampler` only so that Lightning, which calls `set_epoch`, does not wrap it into another one.
    """

    def __init__(self, num_clips: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1) -> None:
        super().__init__(range(num_clips), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        if shuffle and num_clips < world_size:
            raise UserError(f"Expected at least one training clip for each of {world_size} ranks, got {num_clips}.")
        self.num_clips = num_clips

    def __len__(self) -> int:
        if self.shuffle:
            return self.num_clips // self.num_replicas
        return len(range(self.rank, self.num_clips, self.num_replicas))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        epoch = self.epoch if self.shuffle else 0
        order = np.arange(self.num_clips)
        if self.shuffle:
            order = np.random.default_rng((self.seed, epoch)).permutation(order)
        for index in order[self.rank :: self.num_replicas][: len(self)]:
            yield epoch, int(index)


class ClipDataModule(LightningDataModule, ABC):
    """Base of the data modules. Batches are on the device

        {"clip": float32 (B, 3, T, H, W) in [-1, 1], "label": int64 (B,), "name": list[str], "start_frame": int64 (B,)}

    and leave the workers with the clip as uint8 (B, T, H, W, 3). A subclass says which videos there are (`videos`), or
    makes the data set itself (`make_dataset`). Splits are called "train", "val" and "test"; prediction takes "test".

    Args:
        num_frames: Frames per clip, T.
        resolution: Side of the square picture in pixels.
        fps: Frames per second of the clip; null takes every frame of the video.
        batch_size: Clips per batch and device in training.
        eval_batch_size: The same in evaluation; null: `batch_size`.
        num_workers: Processes that decode, for each device; null: the cores shared by the devices, at most 8.
        seed: Of everything random: order, start, crop, mirroring.
        horizontal_flip: Mirror half of the training clips.
    """

    def __init__(
        self,
        num_frames: int = 16,
        resolution: int = 224,
        fps: float | None = 8.0,
        batch_size: int = 6,
        eval_batch_size: int | None = None,
        num_workers: int | None = None,
        seed: int = 0,
        horizontal_flip: bool = True,
    ) -> None:
        super().__init__()
        for key, value in {"num_frames": num_frames, "resolution": resolution, "batch_size": batch_size}.items():
            if value < 1:
                raise UserError(f"Expected data.{key} of at least 1, got {value}.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"Expected data.num_workers of at least 0, or null for one a core, got {num_workers}.")
        if fps is not None and fps <= 0:
            raise UserError(f"Expected data.fps above 0, or null for every frame, got {fps}.")
        self.num_frames = num_frames
        self.resolution = resolution
        self.fps = fps
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self.horizontal_flip = horizontal_flip
        self._datasets: dict[str, ClipDataset] = {}

    @abstractmethod
    def videos(self, split: str) -> list[Video]:
        """The videos of a split; `UserError` if the data are not there. Only the split asked for is read."""

    def make_dataset(self, split: str) -> ClipDataset:
        training = split == "train"
        return VideoClips(
            self.videos(split),
            self.num_frames,
            self.resolution,
            self.fps,
            self.seed,
            training,
            self.horizontal_flip and training,
        )

    def dataset(self, split: str) -> ClipDataset:
        """The clips of a split, made when first asked for."""
        if split not in self._datasets:
            self._datasets[split] = self.make_dataset(split)
        return self._datasets[split]

    def prepare_data(self) -> None:
        """Data that are not there are named before anything else is fetched or built."""
        if self.trainer and self.trainer.state.fn:
            self.setup(self.trainer.state.fn.value)

    def setup(self, stage: str) -> None:
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

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        return to_batch(batch)

    def protocol(self) -> dict[str, Any]:
        """What was evaluated: equal protocols mean equal clips. Reads the headers of the test videos."""
        dataset = self.dataset("test")
        identities = [dataset.identity(index) for index in range(len(dataset))]
        listing = "".join(f"{name}\t{start}\n" for name, start in identities)
        return {
            "data": type(self).__name__,
            "split": self.split_name("test"),
            "num_clips": len(identities),
            "num_frames": self.num_frames,
            "resolution": self.resolution,
            "fps": self.fps,
            "crop": "largest centre square",
            "resize": RESIZE_FILTER,
            "clip": "one per video, from its middle",
            "clips_sha256": hashlib.sha256(listing.encode()).hexdigest(),
        }

    def split_name(self, split: str) -> str:
        """A split's name in the protocol."""
        return split

    def _loader(self, split: str) -> DataLoader[Any]:
        training = split == "train"
        dataset = self.dataset(split)
        rank, world_size = (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
        if not training and len(dataset) < world_size:
            # A rank without a clip would leave the others waiting for it where means are taken over all ranks.
            raise UserError(
                f"Expected at least one clip of the {self.split_name(split)} split for each of {world_size} ranks, "
                f"got {len(dataset)}; use fewer devices or more clips."
            )
        sampler = ClipSampler(len(dataset), training, self.seed, rank, world_size)
        if training and self.trainer:
            # Lightning starts the workers of a resumed run before it calls set_epoch.
            progress = self.trainer.fit_loop.epoch_progress.current
            sampler.set_epoch(getattr(progress, "processed", 0))
        batch_size = self.batch_size if training else self.eval_batch_size
        workers = self._workers()
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=training and len(sampler) >= batch_size,
            num_workers=workers,
            worker_init_fn=_use_one_thread,
            pin_memory=self._device_type() == "cuda",
            persistent_workers=workers > 0 and split != "test",
        )

    def _workers(self) -> int:
        if self.num_workers is not None:
            return self.num_workers
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        devices = self.trainer.num_devices if self.trainer else 1
        return max(1, min(8, cores // devices))

    def _device_type(self) -> str:
        if self.trainer:
            return self.trainer.strategy.root_device.type
        return "cuda" if torch.cuda.is_available() else "cpu"


def _use_one_thread(worker: int) -> None:
    # Each worker has a core; more threads than that only wait for each other.
    torch.set_num_threads(1)
