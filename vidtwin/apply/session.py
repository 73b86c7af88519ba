"""Run a trained autoencoder on the devices of a command, from uint8 frames to latents and back.

Imports torch and lightning, so commands import it after their refusals.
"""

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidtwin import console, weights
from vidtwin.apply import pipeline
from vidtwin.apply.options import SessionOptions
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.clips import as_clip
from vidtwin.compilation import CompiledUnits, check_backend, copy_encoding, list_units
from vidtwin.distributed import forward_context, gather_objects, launch
from vidtwin.errors import UserError
from vidtwin.posteriors import Encoding, Latents
from vidtwin.storage import checkpoints
from vidtwin.video import Frames
from vidtwin.video.convert import to_frames


class Download:
    """A tensor on its way from the device to memory, beside the work that the device is given after it."""

    def __init__(self, value: Tensor) -> None:
        self._value, self._done = value, None
        if value.device.type == "cuda":
            self._value = torch.empty(value.shape, dtype=value.dtype, pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._done = torch.cuda.current_stream(value.device).record_event()

    def wait(self) -> Tensor:
        """Return the tensor in memory when it has arrived; any thread may wait for it."""
        if self._done is not None:
            self._done.synchronize()
        return self._value.cpu()


class Session:
    """An autoencoder in evaluation mode on the device of this process.

    Attributes:
        model: The autoencoder.
        fabric: Lightning Fabric, which started the processes.
        checkpoint: Path of its weights.
        num_frames: T of the windows into which a video is cut.
    """

    gather = staticmethod(gather_objects)

    def __init__(self, options: SessionOptions) -> None:
        options.check()
        self.checkpoint = str(options.ckpt_path)
        self.precision = options.precision
        self.fabric = launch(options.accelerator, options.devices, options.num_nodes, options.precision)
        self.rank, self.world_size = self.fabric.global_rank, self.fabric.world_size
        self.is_main = self.fabric.is_global_zero
        self.model = _load(options).to(self.fabric.device).requires_grad_(False)
        self.dtype: torch.dtype | None = None  # of clips and latents, if it is not the usual one
        if options.precision == "64-true":
            _ = self.weights_sha256  # of the weights as they are stored
            self.dtype = torch.float64
            self.model.to(self.dtype)
        self.num_frames = self.model.temporal.usual_length
        self.compiled = self._compile(options) if options.compile else None
        self._largest: dict[tuple[int, ...], int] = {}  # batch of each shape of a compiled model

    def _compile(self, options: SessionOptions) -> CompiledUnits:
        check_backend(options.compile_backend, "--compile_backend")
        units = list_units(self.model)[:-1]  # the last one is the model
        if not units:
            raise UserError(f"Expected a model with repeated blocks for --compile, got {self._name}; leave it out.")
        return CompiledUnits(units, options.compile or "default", options.compile_backend)

    def _fill(self, value: Tensor) -> Tensor:
        """Repeat the last element of a short batch for a compiled model, whose graphs are of one size each."""
        if self.compiled is None:
            return value
        size = self._largest[value.shape[1:]] = max(len(value), self._largest.get(value.shape[1:], 0))
        return torch.cat([value, value[-1:].expand(size - len(value), *value.shape[1:])])

    @cached_property
    def weights_sha256(self) -> str:
        """SHA-256 of the tensors' names, types, shapes and bytes: the same in every file format."""
        return weights.sha256(self.model.state_dict())

    def describe(self, size: int | None) -> dict[str, Any]:
        """Return the entries on weights and windows for a file of results."""
        return {
            "checkpoint": self.checkpoint,
            "weights_sha256": self.weights_sha256,
            "model": self.model.spec(),
            "window": self.num_frames,
            "size": size,
        }

    def count_numbers(self, shape: Sequence[int]) -> list[int]:
        """Count the numbers in the latents of a window (T, H, W, 3): of all latents, then of each."""
        multiple = self.model.spatial_multiple
        height, width = (-(-side // multiple) * multiple for side in shape[1:3])
        counts = [math.prod(size) for size in self.model.latent_shapes((3, shape[0], height, width)).values()]
        return [sum(counts), *counts]

    def size(self, asked: int | None) -> int | None:
        """Return the side to which pictures are cropped and resized: the model's resolution, or `asked` if it has none.

        Raises:
            UserError: The model takes another size only.
        """
        own = self.model.resolution
        if asked is None or asked == own:
            return own
        if own is not None:
            raise UserError(f"Expected --size {own}, which {self._name} was built for, got {asked}; leave it out.")
        if asked < 1:
            raise UserError(f"Expected --size of at least 1, got {asked}.")
        return asked

    def run(
        self,
        jobs: Iterable[Any],
        read: Callable[[Any], Iterable[Any]],
        compute: Callable[[Any], Any],
        write: Callable[[Any, Iterator[Any]], bool | None],
    ) -> None:
        """Read, compute and write at the same time, see `pipeline.run`; only `compute` gives the device work."""
        with pipeline.ending_on_sigterm() if self.world_size == 1 else nullcontext():
            pipeline.run(jobs, read, compute, write, prepare=self._enter_thread)

    def _enter_thread(self) -> None:
        if self.fabric.device.type == "cuda":  # else page-locked memory would be of the first device
            torch.cuda.set_device(self.fabric.device)

    def stack(self, windows: Sequence[Frames]) -> Tensor:
        """Stack clips of one size → uint8 (B, T, H, W, 3), in memory from which the device copies by itself."""
        return self.pin(torch.from_numpy(np.stack(windows)))

    def pin(self, value: Tensor) -> Tensor:
        """Move a tensor to page-locked memory, if the device is a GPU."""
        return value.pin_memory() if self.fabric.device.type == "cuda" else value

    @torch.inference_mode()
    def encode(self, windows: Sequence[Frames] | Tensor) -> Encoding:
        """Encode clips of one size, uint8 (T, H, W, 3) each or from `stack`, padded to a size that the model takes."""
        stacked = windows if isinstance(windows, Tensor) else self.stack(windows)
        clip = as_clip(stacked.to(self.fabric.device, non_blocking=True), self.model.spatial_multiple)
        clip = self._fill(clip.to(self.dtype or clip.dtype))
        if self.compiled is not None:
            self.compiled.begin()
        with forward_context(self.fabric, self.precision):
            encoding = self.model.encode(clip)
        return encoding if self.compiled is None else copy_encoding(encoding, len(stacked))

    @torch.inference_mode()
    def decode(self, latents: Latents, height: int, width: int, num_frames: int | None = None) -> Download:
        """Decode latents (B, ...) to clips, uint8 (B, T, height, width, 3), without the padding of `encode`.

        T is `num_frames`, by default that of the windows.
        """
        count = len(next(iter(latents.values())))
        latents = {name: self._fill(z.to(self.fabric.device, self.dtype or z.dtype, non_blocking=True))
                   for name, z in latents.items()}  # fmt: skip
        if self.compiled is not None:
            self.compiled.begin()
        with forward_context(self.fabric, self.precision):
            decoded = self.model.decode(latents, num_frames or self.num_frames)
        return Download(to_frames(decoded[:count, ..., :height, :width]))

    def views(
        self, windows: Sequence[Frames] | Tensor, only: str | None = None, partial: bool = True
    ) -> dict[str, Download]:
        """Reconstruct clips of one size, from all latents and from each alone.

        Args:
            windows: uint8 (T, H, W, 3) each, or from `stack`.
            only: Decode this latent alone, and nothing else.
            partial: Decode each latent alone too, if the model supports it.

        Returns:
            Clips, uint8 (B, T, H, W, 3), by "reconstruction" and "<latent> only".
        """
        height, width = windows[0].shape[1:3]
        latents = self.encode(windows).mode()
        if only is not None:
            return {f"{only} only": self.decode({only: latents[only]}, height, width)}
        made = {"reconstruction": self.decode(latents, height, width)}
        if partial and self.model.partial_latents:
            for name, latent in latents.items():
                made[f"{name} only"] = self.decode({name: latent}, height, width)
        return made

    def check_partial(self, latent: str) -> None:
        """Raise `UserError` unless the model has this latent, among others, and decodes it alone."""
        names = self.model.latent_names
        if latent not in names:
            raise UserError(f"Expected one of {', '.join(names)}, the latents of {self._name}, got {latent!r}.")
        if len(names) < 2 or not self.model.partial_latents:
            raise UserError(f"Expected a model that decodes one of several latents alone, got {self._name}.")

    @property
    def usual_tile(self) -> int:
        """Default side of tiles for a model without a fixed resolution: 256 pixels, rounded up to what it takes."""
        multiple = self.model.spatial_multiple
        return -(-256 // multiple) * multiple

    def say(self, line: str) -> None:
        """Write a result to stdout, on the first process."""
        if self.is_main:
            console.write(line)

    @property
    def _name(self) -> str:
        return type(self.model).__name__


def _load(options: SessionOptions) -> VideoAutoencoder:
    path = str(options.ckpt_path)
    if options.config is None:
        return checkpoints.load_autoencoder(path, options.use_ema)
    if options.read_model is None:
        raise UserError(f"Expected no config, got {options.config}: only the command line reads them.")
    spec, build = options.read_model(options.config)
    stored = checkpoints.read(path, lazily=True).get("model_spec")
    for line in checkpoints.differences(spec, stored) if stored else []:
        sys.stderr.write(f"vidtwin: {path} differs from the config, which wins: {line}\n")
    model = build()
    checkpoints.load_weights(model, path, options.use_ema)
    return model.eval()
