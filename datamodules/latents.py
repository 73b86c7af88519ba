"""Latents that `vidtwin encode` has written, to train on (docs/latents.md)."""

import hashlib
import warnings
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vidtwin.errors import UserError
from vidtwin.storage.latent_files import LOGVAR, Manifest, Shard, VideoEntry, shard_path

from .loader import WorkerLoader
from .resumable import ResumableDataModule
from .sampler import ClipSampler

_OPEN = 32  # shards that a worker holds mapped


class LatentClips(Dataset[dict[str, Any]]):
    """The windows of the chosen videos of a folder of latents, in the order of the videos.

    `dataset[epoch, index]` (or `dataset[index]`, epoch 0) is `{"latents": {name: float32 (...)}, "codes": {name: int64
    (...)}, "label": int, "name": str, "start_frame": int, "num_frames": int}`. Of a shard only that window is read.

    Args:
        folder: Of the latents.
        chosen: Which videos.
        posterior: "mean", or "sample": a draw by (seed, epoch, index).
        seed: Of the samples.
    """

    def __init__(
        self,
        folder: str | Path,
        chosen: Callable[[VideoEntry], bool] = lambda video: True,
        posterior: Literal["mean", "sample"] = "mean",
        seed: int = 0,
    ) -> None:
        self.folder = Path(folder)
        self.manifest = Manifest.read(folder)
        self.posterior, self.seed = posterior, seed
        if not self.manifest.complete:
            raise UserError(
                f"Expected whole latents in {folder}, they are not complete; run `vidtwin encode` again, which goes on."
            )
        self.digest = self.manifest.digest
        wanted = [chosen(video) for video in self.manifest.videos]
        rows = [
            (number, place, piece.video, piece.first_window, piece.stored or 0)
            for number, pieces in enumerate(self.manifest.shards)
            for place, piece in enumerate(pieces)
            if wanted[piece.video] and piece.stored
        ]
        self.pieces: NDArray[np.int64] = np.array(rows, np.int64).reshape(-1, 5)
        self.ends: NDArray[np.int64] = np.cumsum(self.pieces[:, 4])
        self._shards: OrderedDict[int, Shard] = OrderedDict()
        for number in np.unique(self.pieces[:, 0]).tolist():
            self._opened(number)  # each of them whole, before an epoch begins

    @property
    def videos(self) -> list[VideoEntry]:
        """Those of which there are windows."""
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
        shard = self._opened(shard_number)
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
        held = {"latents": latents} if latents else {}
        return held | ({"codes": codes} if codes else {}) | {
            "label": video.label,
            "name": video.name,
            "start_frame": (first_window + row) * self.manifest.settings["num_frames"],
            "num_frames": shard.pieces[place].num_frames[row],
        }  # fmt: skip

    def _opened(self, number: int) -> Shard:
        shard = self._shards.pop(number, None)
        if shard is None:
            shard = Shard(shard_path(self.folder, number), self.digest)
        self._shards[number] = shard
        if len(self._shards) > _OPEN:
            self._shards.popitem(last=False)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        """For a worker, which maps the shards itself."""
        return self.__dict__ | {"_shards": OrderedDict()}


class LatentDataModule(ResumableDataModule):
    """Batches of latents that `vidtwin encode` has written:

        {"latents": {name: float32 (B, ...)}, "codes": {name: int64 (B, ...)}, "label": int64 (B,), "name": list[str],
         "start_frame": int64 (B,), "num_frames": int64 (B,), of which the others repeat a video's end}

    with "latents" where there are some that are no codes, and "codes" where there are some. The order of training
    depends on (seed, epoch) alone; ranks have equal shares, and a resumed run goes on with the very next batch.

    Args:
        root: Folder of the latents.
        val_root: Folder of those for validation, encoded by the same weights.
        val_share: In place of `val_root`, the share of the videos of `root` that is for validation; which ones depends
            on their names alone.
        batch_size: Windows per batch and device.
        num_workers: Processes that read, for each device; null: the cores shared by the devices, at most 8.
        seed: Of the order and of the samples.
        posterior: The mean of a Gaussian latent, or a "sample" of it, another one in each epoch of training; that
            needs latents that were encoded with --posterior moments.
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
        super().__init__()
        if batch_size < 1:
            raise UserError(f"Expected data.batch_size of at least 1, got {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"Expected data.num_workers of at least 0, or null for one a core, got {num_workers}.")
        if not 0 <= val_share < 1:
            raise UserError(f"Expected data.val_share from 0 to below 1, got {val_share}.")
        if val_root is not None and val_share:
            raise UserError("Expected data.val_root or data.val_share, got both.")
        if posterior not in ("mean", "sample"):
            raise UserError(f"Expected data.posterior to be mean or sample, got {posterior!r}.")
        self.root, self.val_root, self.val_share = root, val_root, val_share
        self.batch_size, self.num_workers, self.seed = batch_size, num_workers, seed
        self.posterior: Literal["mean", "sample"] = posterior
        self.normalize = normalize
        self._datasets: dict[str, LatentClips] = {}

    def setup(self, stage: str) -> None:
        super().setup(stage)
        for split in {"fit": ("train", "val"), "validate": ("val",)}.get(stage, ()):
            self.dataset(split)

    def dataset(self, split: str) -> LatentClips:
        """The windows of "train" or "val", made when first asked for; "val" may be empty."""
        if split not in self._datasets:
            self._datasets[split] = self._made(split)
        return self._datasets[split]

    def train_dataloader(self) -> DataLoader[Any]:
        return self._loader("train")

    def val_dataloader(self) -> DataLoader[Any] | list[Any]:
        if len(self.dataset("val")):
            return self._loader("val")
        # Nothing was asked for by data.val_root or data.val_share.
        warnings.filterwarnings("ignore", message="Total length of `list` across ranks is zero")
        return []

    def on_after_batch_transfer(self, batch: dict[str, Any], dataloader_idx: int) -> dict[str, Any]:
        if "latents" in batch and self.normalize:
            batch["latents"] = self.normalized(batch["latents"])
        return batch

    def normalized(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """Latents (B, C, ...) by name, each channel with mean 0 and standard deviation 1; a constant one only moved."""
        return {name: (value - mean) / std for name, (value, mean, std) in self._scales(latents).items()}

    def denormalize(self, latents: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the autoencoder decodes, from latents as the batches have them; without `normalize` they are it."""
        if not self.normalize:
            return latents
        return {name: value * std + mean for name, (value, mean, std) in self._scales(latents).items()}

    def _scales(self, latents: dict[str, Tensor]) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
        """Each latent with mean and standard deviation in a shape that fits it."""
        statistics = self.dataset("train").manifest.statistics
        key = "sample_std" if self.posterior == "sample" else "std"
        scales = {}
        for name, value in latents.items():
            held = statistics[name]
            assert held is not None  # looked at when the data were set up
            shape = (1, -1, *[1] * (value.ndim - 2)) if value.ndim > 1 else (1,)
            mean, std = (value.new_tensor(held[k]).reshape(shape) for k in ("mean", key if key in held else "std"))
            scales[name] = value, mean, torch.where(std > 0, std, 1.0)
        return scales

    def _made(self, split: str) -> LatentClips:
        from_root = split == "train" or self.val_root is None
        folder = self.root if from_root else str(self.val_root)
        validated = split == "val"
        clips = LatentClips(
            folder,
            (lambda video: self._is_for_validation(video.name) == validated) if from_root else (lambda video: True),
            self.posterior,
            self.seed,
        )
        if split == "train" and not len(clips):
            raise UserError(f"Expected latents to train on in {folder}, got none; lower data.val_share.")
        if split == "val" and self.val_share and not len(clips):
            raise UserError(
                f"Expected videos for validation, data.val_share={self.val_share:g} takes none of the "
                f"{len(clips.manifest.videos)} in {folder}; raise it, or give data.val_root."
            )
        self._check(clips)
        if not from_root:
            self._check_same_model(clips.manifest)
        return clips

    def _is_for_validation(self, name: str) -> bool:
        number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
        return number < self.val_share * 2**64

    def _check(self, clips: LatentClips) -> None:
        manifest, folder = clips.manifest, clips.folder
        for name, latent in manifest.latents.items():
            if latent.shape is None:
                raise UserError(f"{_differing(clips.videos, name, folder)}; encode with --size, so that they stack.")
            if latent.kind == "gaussian" and self.posterior == "sample" and manifest.settings["posterior"] != "moments":
                raise UserError(
                    f"Expected moments of {name} for data.posterior=sample, {folder} holds means alone; encode with "
                    "--posterior moments, or take data.posterior=mean."
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

    def _loader(self, split: str) -> DataLoader[Any]:
        training = split == "train"
        clips = self.dataset(split)
        rank, world_size = self._ranks()
        if not training and len(clips) < world_size:
            raise UserError(
                f"Expected at least one window for validation for each of {world_size} ranks, got {len(clips)}; use "
                "fewer devices or more videos."
            )
        sampler = ClipSampler(len(clips), training, self.seed, rank, world_size, self.batch_size)
        if training and self.trainer:
            self._go_on(sampler)
        workers = self.workers()
        return WorkerLoader(
            clips,
            batch_size=self.batch_size,
            sampler=sampler,
            drop_last=training and len(sampler) >= self.batch_size,
            num_workers=workers,
            pin_memory=self._device_type() == "cuda",
            persistent_workers=workers > 0,
            generator=torch.Generator().manual_seed(self.seed),  # its own, which shifts no other draw
        )


def _differing(videos: Sequence[VideoEntry], latent: str, folder: Path) -> str:
    """Two videos whose latents differ."""
    sizes: dict[tuple[int | None, int | None], str] = {}
    for video in videos:
        sizes.setdefault((video.height, video.width), video.name)
    some = [f"{name} ({height}x{width})" for (height, width), name in sizes.items()]
    return f"Expected {latent} of one shape in {folder}, it has others for pictures as of {' and '.join(some[:2])}"
