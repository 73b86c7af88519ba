"""Small clips, autoencoders and checkpoints for tests of sweeps.

The first pixel of each clip is its number, by which a model fails on chosen clips.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.benchmark.protocol import ProtocolSettings
from vidtwin.benchmark.sweep import FVD, Entry, Sweep
from vidtwin.cli.benchmark import read_model
from vidtwin.datamodules.clips import ClipDataset, Video
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.metrics.fvd import file_sha256
from vidtwin.posteriors import DiagonalGaussian, Encoding, Latents, Quantized

FRAMES, SIDE = 8, 32

calls: list[list[int]] = []
"""Numbers of the clips of each call of an encoder in this process."""


class Interruption:
    """Interrupt the process's `after`-th next call of an encoder by `error`; None: never."""

    after: int | None = None
    error: type[BaseException] = KeyboardInterrupt


class NumberedClips(ClipDataset):
    """Smooth clips, two of each video; those in `unreadable` can't be read."""

    split_name = "test"

    def __init__(self, count: int, num_frames: int, side: int, unreadable: list[int]) -> None:
        coarse = torch.rand(count, 3, 3, 5, 5, generator=torch.Generator().manual_seed(7))
        self.clips = nn.functional.interpolate(coarse, (num_frames, side, side), mode="trilinear")
        self.unreadable = unreadable

    def __len__(self) -> int:
        return len(self.clips)

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        name, start = self.identity(index)
        frames = (self.clips[index] * 255).to(torch.uint8).permute(1, 2, 3, 0).numpy()
        frames[0, 0, 0] = index
        return {"clip": np.ascontiguousarray(frames), "label": 0, "name": name, "start_frame": start}

    def __getitem__(self, key: Any) -> dict[str, Any]:
        index = key[1] if isinstance(key, tuple) else key
        if index in self.unreadable:
            return {"skipped": [(self.identity(index)[0], "cut off")]}
        return super().__getitem__(key)

    def identity(self, index: int) -> tuple[str, int]:
        return f"v{index // 2}.avi", index % 2 * self.clips.shape[2]


class NumberedData(ClipDataModule):
    def __init__(
        self,
        count: int = 6,
        num_frames: int = FRAMES,
        resolution: int = SIDE,
        eval_batch_size: int = 2,
        unreadable: list[int] | None = None,
    ) -> None:
        super().__init__(
            eval_batch_size=eval_batch_size,
            num_workers=0,
            num_frames=num_frames,
            resolution=resolution,
            fps=8.0,
            eval_clips="all",
            tail="drop",
        )
        self.count = count
        self.unreadable = unreadable or []

    def videos(self, split: str) -> list[Video]:
        return []

    def make_dataset(self, split: str) -> ClipDataset:
        self.unusable.restart(split, 100)  # so that an unreadable one is a small share
        return NumberedClips(self.count, self.num_frames, self.resolution, self.unreadable)


def numbers_of(clip: Tensor) -> list[int]:
    """Read the clips' numbers from their first pixels."""
    return [round(value) for value in ((clip[:, 0, 0, 0, 0] + 1) * 127.5).tolist()]


class Pool(VideoAutoencoder):
    """Means over blocks as the mean of a Gaussian, repeated and scaled by the one weight.

    Args:
        pool: Side of a block.
        frames: Length of clips; None: any.
        raise_on: Numbers of the clips on which it raises; [-1]: all.
        nan_on: Numbers of the clips that it reconstructs as NaN.
        sigma: Standard deviation of the posterior.
    """

    latent_names = ("grid",)

    def __init__(
        self,
        pool: int = 4,
        frames: int | None = None,
        raise_on: list[int] | None = None,
        nan_on: list[int] | None = None,
        sigma: float = 0.1,
    ) -> None:
        super().__init__()
        self.pool, self.sigma = pool, sigma
        self.raise_on, self.nan_on = raise_on or [], nan_on or []
        self.spatial_multiple = pool
        self.temporal = TemporalSpec() if frames is None else TemporalSpec.exactly(frames)
        self.scale = nn.Parameter(torch.tensor(0.9))

    def _encode(self, clip: Tensor) -> Encoding:
        numbers = [] if clip.is_meta or torch.compiler.is_exporting() else numbers_of(clip)
        calls.append(numbers)
        if Interruption.after is not None:
            Interruption.after -= 1
            if Interruption.after < 0:
                raise Interruption.error
        if self.raise_on == [-1] or set(numbers) & set(self.raise_on):
            raise RuntimeError("this clip\nbreaks the encoder")
        mean = nn.functional.avg_pool3d(clip, (1, self.pool, self.pool))
        for place, number in enumerate(numbers):
            if number in self.nan_on:
                mean[place] = torch.nan
        return Encoding(grid=self._posterior(mean))

    def _posterior(self, mean: Tensor) -> Any:
        return DiagonalGaussian(mean, torch.full_like(mean, 2 * np.log(self.sigma)))

    def _decode(self, latents: Latents) -> Tensor:
        grid = latents["grid"]
        return self.scale * grid.repeat_interleave(self.pool, 3).repeat_interleave(self.pool, 4)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        channels, frames, height, width = clip_shape
        return {"grid": (channels, frames, height // self.pool, width // self.pool)}

    @property
    def last_layer(self) -> nn.Parameter:
        return self.scale


class Coded(Pool):
    """`Pool` with each number rounded to -0.5 or 0.5: one bit."""

    def _posterior(self, mean: Tensor) -> Any:
        codes = (mean > 0).long()
        return Quantized(codes - 0.5, codes, 2)

    def code_shapes(self, clip_shape: Any) -> dict[str, Any]:
        return {"grid": (self.latent_shapes(clip_shape)["grid"], 2)}

    def dequantize(self, codes: Latents) -> Latents:
        return {"grid": codes["grid"] - 0.5}


class Signs(Pool):
    """`Pool` with one bit a position: the sign of its mean over the channels."""

    def _posterior(self, mean: Tensor) -> Any:
        codes = (mean.mean(1) > 0).long()
        return Quantized(self.dequantize({"grid": codes})["grid"], codes, 2)

    def code_shapes(self, clip_shape: Any) -> dict[str, Any]:
        return {"grid": (self.latent_shapes(clip_shape)["grid"][1:], 2)}

    def dequantize(self, codes: Latents) -> Latents:
        return {"grid": (codes["grid"][:, None] - 0.5).expand(-1, 3, -1, -1, -1)}


class Two(Pool):
    """Two latents that can be decoded alone: the mean over the clip's time, and the difference to it."""

    latent_names = ("still", "moving")
    partial_latents = True

    def _encode(self, clip: Tensor) -> Encoding:
        grid = super()._encode(clip).mode()["grid"]
        still = grid.mean(2)
        return Encoding(still=self._posterior(still), moving=self._posterior(grid - still[:, :, None]))

    def _decode(self, latents: Latents) -> Tensor:
        parts = [value[:, :, None].expand(-1, -1, FRAMES, -1, -1) if value.ndim == 4 else value for value in
                 latents.values()]  # fmt: skip
        return super()._decode({"grid": sum(parts[1:], parts[0])})

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        grid = super()._latent_shapes(clip_shape)["grid"]
        return {"still": (grid[0], *grid[2:]), "moving": grid}


def checkpoint(path: Path, scale: float = 0.9, model: VideoAutoencoder | None = None, **arguments: Any) -> str:
    """Write a checkpoint of `Pool` (or of another model) with what a sweep reads of it → its path."""
    model = model or Pool(**arguments)
    if isinstance(model, Pool):
        model.scale.data.fill_(scale)
    state = {f"autoencoder.{name}": value for name, value in model.state_dict().items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({"state_dict": state, "model_spec": model.spec(), "global_step": 1}, path)
    return str(path)


class Features(torch.nn.Module):
    """400 features of a clip by fixed random weights, with the arguments of StyleGAN-V's I3D."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(400, 3 * 2 * 7 * 7, generator=draw) / 10)

    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        pooled = torch.nn.functional.adaptive_avg_pool3d(x, (2, 7, 7)).flatten(1)
        return pooled @ self.weight.t()


def feature_network(path: Path) -> FVD:
    """Write `Features` as a TorchScript file."""
    torch.jit.script(Features()).save(str(path))
    return FVD(str(path), file_sha256(path))


def sweep(folder: Path, entries: list[Entry], data: ClipDataModule | None = None, **arguments: Any) -> Sweep:
    """Make a sweep on a CPU without costs and progress."""
    given: dict[str, Any] = {
        "protocol": ProtocolSettings(posterior="mode", ssim="uniform7"),
        "accelerator": "cpu",
        "cost": False,
        "downstream": False,
        "progress": False,
        "players": 0,
        "read_config": partial(read_model, folders=[]),
    }
    return Sweep(entries, data or NumberedData(), results_dir=str(folder), **given | arguments)


FILES = ("protocol.json", "comparison.json", "table.csv", "table.md", "table.tex")


def contents(folder: Path) -> dict[str, str]:
    """Read the files that do not depend on processes and interruptions."""
    paths = [folder / name for name in FILES] + sorted(folder.glob("rows/*/clips.csv"))
    paths += [*sorted(folder.glob("rows/*/results.json")), *sorted(folder.glob("rows/*/analysis.json"))]
    paths += folder.glob("content.csv")
    return {str(path.relative_to(folder)): path.read_text() for path in paths}
