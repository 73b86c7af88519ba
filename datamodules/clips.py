"""Clips of videos for training and evaluation: which frames, in which order, on which rank.

All that is random depends on (seed, epoch, index) alone: the sampler hands out (epoch, index) pairs, so workers (also
persistent ones) need no state, and their number and that of the ranks changes no clip. What training has seen is
therefore a place in one endless order of clips, (epoch, clips of it), which a checkpoint holds.
"""

import hashlib
import os
import signal
import threading
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
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
Place = tuple[int, int]  # an epoch, and how many of its clips all ranks together have consumed
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

    Training shuffles by (seed, epoch). A step takes the next clips of that order, rank r the r-th of every
    `world_size`; what is left at the end of an epoch and fills no step is left out, other clips in each epoch. So ranks
    always have equally many batches, and a place in the order means the same for any batch size and number of ranks.

    Evaluation gives rank r the clips r, r + world_size, …: none is repeated or lost.

    A `DistributedSampler` only so that Lightning, which calls `set_epoch`, does not wrap it into another one.

    Attributes:
        start: Tells the place where iterating over the training clips begins; None is the start of `set_epoch`'s epoch.
            It goes on for as many steps as an epoch has, from the middle of one into the next.
    """

    def __init__(
        self, num_clips: int, shuffle: bool, seed: int = 0, rank: int = 0, world_size: int = 1, batch_size: int = 1
    ) -> None:
        super().__init__(range(num_clips), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        if shuffle and num_clips < world_size:
            raise UserError(f"Expected at least one training clip for each of {world_size} ranks, got {num_clips}.")
        self.num_clips = num_clips
        self.clips_per_step = world_size * min(batch_size, max(1, num_clips // world_size))  # of all ranks
        self.steps_per_epoch = num_clips // self.clips_per_step
        self.start: Callable[[], Place] | None = None

    def __len__(self) -> int:
        if self.shuffle:
            return self.steps_per_epoch * self.clips_per_step // self.num_replicas
        return len(range(self.rank, self.num_clips, self.num_replicas))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self.shuffle:
            yield from ((0, index) for index in range(self.rank, self.num_clips, self.num_replicas))
            return
        start = self.start() if self.start else (self.epoch, 0)
        shuffled, order = -1, np.arange(0)
        for step in range(self.steps_per_epoch):
            epoch, first = self.after(start, step)
            if epoch != shuffled:
                shuffled, order = epoch, np.random.default_rng((self.seed, epoch)).permutation(self.num_clips)
            for index in order[first + self.rank : first + self.clips_per_step : self.num_replicas]:
                yield epoch, int(index)

    def after(self, place: Place, steps: int) -> Place:
        """Where that many training steps lead; an epoch too short for another one is over."""
        epoch, clips = place
        left = max(0, self.num_clips - clips) // self.clips_per_step
        if steps < left:
            return epoch, clips + steps * self.clips_per_step
        epochs, steps = divmod(steps - left, self.steps_per_epoch)
        return epoch + 1 + epochs, steps * self.clips_per_step


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
        horizontal_flip: Mirror half of the training clips, if `augment`.
        augment: Draw start, crop and mirroring of the training clips at random, others in each epoch; false takes the
            clip that evaluation would take: to overfit on purpose.
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
        augment: bool = True,
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
        self.augment = augment
        self._datasets: dict[str, ClipDataset] = {}
        self._sampler: ClipSampler | None = None  # of the training clips, in `fit`
        self._start: tuple[Place, int] | None = None  # a place in the data, and Lightning's count of batches there

    @abstractmethod
    def videos(self, split: str) -> list[Video]:
        """The videos of a split; `UserError` if the data are not there. Only the split asked for is read."""

    def make_dataset(self, split: str) -> ClipDataset:
        drawn = self._is_drawn(split)
        return VideoClips(
            self.videos(split),
            self.num_frames,
            self.resolution,
            self.fps,
            self.seed,
            training=drawn,
            horizontal_flip=self.horizontal_flip and drawn,
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
        if stage == "fit":
            self._sampler = self._start = None  # of an earlier run, or of a checkpoint that was tested
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

    def state_dict(self) -> dict[str, int]:
        """Where training is in its data: `epoch`, `clips` of it that all ranks consumed, Lightning's count `batches`.

        Lightning saves it in each checkpoint, and a resumed run goes on with the very next batch; with another batch
        size or number of ranks, with the next clips.
        """
        if self._sampler is None:
            return {}
        epoch, clips = self._place()
        return {"epoch": epoch, "clips": clips, "batches": self._trained_batches()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = (state_dict["epoch"], state_dict["clips"]), state_dict["batches"]
        # Lightning looks for the state in the loader, and says so.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

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
        batch_size = self.batch_size if training else self.eval_batch_size
        sampler = ClipSampler(len(dataset), training, self.seed, rank, world_size, batch_size)
        if training and self.trainer:
            if self._start is None:  # a new run, or a checkpoint that only says which epoch it was
                epoch = getattr(self.trainer.fit_loop.epoch_progress.current, "processed", 0)
                self._start = (epoch, 0), self._trained_batches()
            self._sampler = sampler
            sampler.start = self._place
        workers = self._workers()
        return DataLoader(
            dataset,
            batch_size=batch_size,
            sampler=sampler,
            drop_last=training and len(sampler) >= batch_size,
            num_workers=workers,
            worker_init_fn=_init_worker,
            pin_memory=self._device_type() == "cuda",
            persistent_workers=workers > 0 and split != "test",
            # Its own: each iterator draws a seed, which would shift what the model draws in a run that was resumed.
            generator=torch.Generator().manual_seed(self.seed),
        )

    def _is_drawn(self, split: str) -> bool:
        """Whether each epoch draws other clips."""
        return split == "train" and self.augment

    def _place(self) -> Place:
        """Where training is in its data.

        Counted in batches that went through the training step: not in those that workers have ready or that are on
        the device, and not in Lightning's epochs. These don't keep step with the data: a run that `max_steps` ends
        counts its last epoch as a whole one, and one that goes on from the end of an epoch may begin with an epoch of
        no batch or of one.
        """
        assert self._sampler is not None
        assert self._start is not None
        place, batches = self._start
        # Lightning's count is restored after the first call here if configure_optimizers asks for the number of steps.
        return self._sampler.after(place, max(0, self._trained_batches() - batches))

    def _trained_batches(self) -> int:
        assert self.trainer is not None
        return getattr(self.trainer.fit_loop.epoch_loop.batch_progress.total, "processed", 0)

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


def _init_worker(worker: int) -> None:
    # Each worker has a core; more threads than that only wait for each other.
    torch.set_num_threads(1)
    # A job scheduler sends SIGTERM to all processes; the main one then needs its workers until it has ended its batch.
    # It ends them by SIGTERM too, so the signal can't just be ignored: Python would wait for them forever at its exit.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
