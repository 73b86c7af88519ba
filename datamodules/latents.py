"""Data module of latents written by `vidtwin encode` (docs/latents.md)."""

import warnings
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vidtwin.data import LatentDescription, LatentSource, is_varying
from vidtwin.errors import UserError, few
from vidtwin.storage.latent_files import LOGVAR, Manifest, OpenShards, VideoEntry

from .loader import WorkerLoader
from .resumable import ResumableDataModule
from .sampler import hash_to_unit


class LatentClips(Dataset[dict[str, Any]]):
    """Windows of the chosen videos of a folder of latents, in the order of the videos.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is `{"latents": {name: float32 (...)}, "codes": {name: int64
    (...)}, "label": int, "name": str, "start_frame": int, "num_frames": int}`. It reads no other window of the shard.

    Args:
        folder: Folder of the latents.
        chosen: Returns whether to take a video.
        posterior: "mean", or "sample": drawn by (seed, epoch, index).
        seed: Seed of the samples.
    """

    def __init__(
        self,
        folder: str | Path,
        chosen: Callable[[VideoEntry], bool] = lambda video: True,
        posterior: Literal["mean", "sample"] = "mean",
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read_complete(folder)
        self.posterior, self.seed = posterior, seed
        wanted = [chosen(video) for video in self.manifest.videos]
        rows = [
            (number, place, piece.video, piece.first_window, piece.stored or 0)
            for number, pieces in enumerate(self.manifest.shards)
            for place, piece in enumerate(pieces)
            if wanted[piece.video] and piece.stored
        ]
        self.pieces: NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 5)
        self.ends: NDArray[np.int64] = np.cumsum(self.pieces[:, 4])
        self._shards = OpenShards(folder, self.manifest)
        for number in np.unique(self.pieces[:, 0]).tolist():
            self._shards[number]  # refuses a truncated one before an epoch begins

    @property
    def videos(self) -> list[VideoEntry]:
        """Videos that have windows."""
        return [self.manifest.videos[video] for video in np.unique(self.pieces[:, 2]).tolist()]

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def __getitem__(self, key: int | tuple[int, int]) -> dict[str, Any]:
        epoch, index = key if isinstance(key, tuple) else (0, key)
        if not 0 <= index < len(self):
            raise IndexError(f"Expected an index below {len(self)}, got {index}.")
        at = bisect_right(self.ends, index)
        shard_number, place, video_number, first_window, stored = self.pieces[at].tolist()
        row = index - (int(self.ends[at]) - stored)
        shard = self._shards[shard_number]
        video = self.manifest.videos[video_number]
        random = torch.Generator()
        if self.posterior == "sample":
            random.manual_seed(int(np.random.SeedSequence((self.seed, epoch, index)).generate_state(1, np.uint64)[0]))
        latents, codes = {}, {}
        for name, latent in self.manifest.latents.items():
            value = shard.rows(place, name, row, row + 1)[0]
            if latent.kind == "codes":
                codes[name] = value.long()
                continue
            latents[name] = value = value.float()
            if self.posterior == "sample" and latent.kind == "gaussian":
                logvar = shard.rows(place, name, row, row + 1, LOGVAR)[0].float()
                latents[name] = value + torch.exp(0.5 * logvar) * torch.randn(value.shape, generator=random)
        values = {key: value for key, value in (("latents", latents), ("codes", codes)) if value}
        start, num_frames = (first_window + row) * self.manifest.settings["num_frames"], shard.pieces[place].num_frames
        return {**values, "label": video.label, "name": video.name, "start_frame": start, "num_frames": num_frames[row]}


class LatentDataModule(ResumableDataModule, LatentSource):
    """Data module of latents written by `vidtwin encode`. A batch is

        {"latents": {name: float32 (B, ...)}, "codes": {name: int64 (B, ...)}, "label": int64 (B,), "name": list[str],
         "start_frame": int64 (B,), "num_frames": int64 (B,), real frames, after which a video's last one is repeated}

    without "latents" if all are codes, and without "codes" if none are. The order of training depends on (seed, epoch)
    alone; ranks have equal shares, and a resumed run continues with the very next batch.

    Args:
        root: Folder of the latents.
        val_root: Folder of latents for validation, encoded by the same weights.
        val_share: Instead of `val_root`, the share of the videos of `root` that is held out for validation; the choice
            depends on their names alone.
        batch_size: Windows per batch and device.
        num_workers: Reading processes per device; null shares the cores among the devices, with at most 8 each.
        seed: Seed of the order and of the samples.
        posterior: The "mean" of a Gaussian latent, or a "sample", drawn anew in each epoch of training; samples need
            latents encoded with --posterior moments.
        normalize: Give each channel (axis 1) mean 0 and standard deviation 1, by the statistics of `root`; codes stay.
            `denormalize` undoes it.
    """

    def __init__(
        self,
        root: str,
        val_root: str | None = None,
        val_share: float = 0.0,
        batch_size: int = 32,
        num_workers: int | None = None,
        seed: int = 0,
        posterior: Literal["mean", "sample"] = "mean",
        normalize: bool = True,
    ) -> None:
        super().__init__(batch_size, num_workers)
        if not 0 <= val_share < 1:
            raise UserError(f"Expected data.val_share from 0 to below 1, got {val_share}.")
        if val_root is not None and val_share:
            raise UserError("Expected data.val_root or data.val_share, got both.")
        if posterior not in ("mean", "sample"):
            raise UserError(f"Expected data.posterior to be mean or sample, got {posterior!r}.")
        self.root, self.val_root, self.val_share = root, val_root, val_share
        self.seed, self.normalize = seed, normalize
        self.posterior: Literal["mean", "sample"] = posterior
        self._datasets: dict[str, LatentClips] = {}
        self._scale: dict[Any, tuple[Tensor, Tensor]] = {}  # mean and standard deviation on the device

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ()):
            self.dataset(split)

    def dataset(self, split: str) -> LatentClips:
        """Return the windows of "train" or "val", created on first use; "val" may be empty."""
        if split not in self._datasets:
            self._datasets[split] = self._create(split)
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if len(self.dataset("val")):
            return self._loader("val")
        # Neither data.val_root nor data.val_share is set.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if "latents" in batch and self.normalize:
            batch["latents"] = self.normalized(batch["latents"])
        return batch

    def normalized(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Give each channel of latents (B, C, ...) mean 0 and standard deviation 1; a constant one is only shifted."""
        return {name: (value - mean) / std for name, (value, mean, std) in self._scales(latents).items()}

    def denormalize(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Turn the latents of a batch into those that the autoencoder decodes: undo `normalize`, if it is set."""
        if not self.normalize:
            return latents
        return {name: value * std + mean for name, (value, mean, std) in self._scales(latents).items()}

    def describe_latents(self) -> LatentDescription:
        clips = self.dataset("train")
        manifest = clips.manifest
        key = "sample_std" if self.posterior == "sample" else "std"
        shapes: dict[str, dict[str, tuple[int, ...]]] = {"continuous": {}, "codes": {}}
        statistics = {}
        for name, latent in manifest.latents.items():
            assert latent.shape is not None  # checked when the data were set up
            shapes["codes" if latent.kind == "codes" else "continuous"][name] = latent.shape
            if held := manifest.statistics.get(name):
                statistics[name] = held["mean"], held[key if key in held else "std"]
        sizes = Counter((video.height or 0, video.width or 0) for video in clips.videos)
        rates = Counter(video.fps for video in clips.videos)
        return LatentDescription(
            str(clips.folder),
            manifest.model,
            shapes["continuous"],
            shapes["codes"],
            statistics,
            manifest.classes,
            manifest.settings["num_frames"],
            sizes.most_common(1)[0][0],
            float(Fraction(rates.most_common(1)[0][0])),
            len(clips),
        )

    def _scales(self, latents: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Return each latent with its mean and standard deviation, in a shape that broadcasts."""
        scales = {}
        for name, value in latents.items():
            place = name, value.ndim, value.dtype, value.device
            if place not in self._scale:  # made once: the host would wait for the device in each step
                self._scale[place] = self._make_scale(name, value)
            scales[name] = value, *self._scale[place]
        return scales

    def _make_scale(self, name: str, latent: Tensor) -> tuple[Tensor, Tensor]:
        held = self.dataset("train").manifest.statistics[name]
        assert held is not None  # checked when the data were set up
        key = "sample_std" if self.posterior == "sample" and "sample_std" in held else "std"
        shape = (1, -1, *[1] * (latent.ndim - 2)) if latent.ndim > 1 else (1,)
        with torch.inference_mode(False):  # a validation may come first
            mean, std = (latent.new_tensor(held[k]).reshape(shape) for k in ("mean", key))
            variance = std.square()
            return mean, torch.where(is_varying(variance, variance + mean.square()), std, 1.0)

    def _create(self, split: str) -> LatentClips:
        shared = split == "train" or self.val_root is None
        folder = self.root if shared else str(self.val_root)

        def chosen(video: VideoEntry) -> bool:
            return not shared or (hash_to_unit(video.name) < self.val_share) == (split == "val")

        clips = LatentClips(folder, chosen, self.posterior, self.seed)
        if split == "train" and not len(clips):
            raise UserError(f"Expected latents to train on in {folder}, got none; lower data.val_share.")
        if split == "val" and self.val_share and not len(clips):
            raise UserError(
                f"Expected videos for validation, got none of the {len(clips.manifest.videos)} in {folder} by "
                f"data.val_share={self.val_share:g}; raise it, or set data.val_root."
            )
        self._check(clips)
        if not shared:
            self._check_same_model(clips.manifest)
        return clips

    def _check(self, clips: LatentClips) -> None:
        manifest, folder = clips.manifest, clips.folder
        for name, latent in manifest.latents.items():
            if latent.shape is None:
                sizes = {(video.height, video.width): video.name for video in reversed(clips.videos)}
                examples = [f"{example} ({height}x{width})" for (height, width), example in sizes.items()][-2:]
                raise UserError(
                    f"Expected {name} of one shape in {folder}, got others for pictures such as those of "
                    f"{' and '.join(examples[::-1])}; encode with --size, so that they stack."
                )
            held = manifest.statistics.get(name) or {}
            channels = latent.shape[0] if latent.shape else 1
            if latent.kind != "codes" and any(len(held.get(key, ())) != channels for key in ("mean", "std")):
                raise UserError(
                    f"Expected statistics of the {channels} channels of {name} in {folder}, got none; encode again."
                )
            if latent.kind == "gaussian" and self.posterior == "sample" and manifest.settings["posterior"] != "moments":
                raise UserError(
                    f"Expected moments of {name} for data.posterior=sample, got means alone in {folder}; encode with "
                    "--posterior moments, or set data.posterior=mean."
                )

    def _check_same_model(self, validated: Manifest) -> None:
        trained = self.dataset("train").manifest
        for which, ours, theirs in (
            ("weights", trained.model["weights_sha256"][:8], validated.model["weights_sha256"][:8]),
            ("kinds and shapes", trained.latents, validated.latents),
        ):
            if ours != theirs:
                raise UserError(
                    f"Expected latents of the same {which} in data.val_root={self.val_root} as in {self.root}, got "
                    f"{theirs} and {ours}; encode both with one checkpoint and one --size."
                )
        if trained.classes and validated.classes and trained.classes != validated.classes:
            differing = sorted(set(trained.classes) ^ set(validated.classes))
            raise UserError(
                f"Expected the same classes in data.val_root={self.val_root} as in {self.root}, whose numbers are the "
                f"labels; only one has {few(differing)}. Set data.val_share instead, or encode without --labels."
            )

    def _loader(self, split: str) -> DataLoader[Any]:
        clips = self.dataset(split)
        return WorkerLoader(clips, **self._loader_options(split, clips, self.batch_size, self.seed))
