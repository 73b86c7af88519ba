"""A trained autoencoder on the devices of a command, between uint8 frames and latents.

Imported only when a command needs it, since it imports torch and lightning.
"""

import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from vidtwin import weights
from vidtwin.apply.options import SessionOptions
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.clips import as_clip
from vidtwin.distributed import forward_context, launch
from vidtwin.errors import UserError
from vidtwin.posteriors import Encoding, Latents
from vidtwin.storage import checkpoints
from vidtwin.video import Frames
from vidtwin.video.convert import to_uint8

T = TypeVar("T")


class Session:
    """An autoencoder in evaluation mode on the device of this process.

    Attributes:
        model: The autoencoder.
        fabric: Of the processes.
        checkpoint: Where its weights come from.
        num_frames: T of the windows that a video is cut into.
    """

    def __init__(self, options: SessionOptions) -> None:
        options.check()
        self.checkpoint = str(options.ckpt_path)
        self.precision = options.precision
        self.fabric = launch(options.accelerator, options.devices, options.num_nodes, options.precision)
        self.model = _load(options).to(self.fabric.device).requires_grad_(False)
        self.num_frames = self.model.temporal.usual_length

    @property
    def rank(self) -> int:
        return self.fabric.global_rank

    @property
    def world_size(self) -> int:
        return self.fabric.world_size

    @property
    def is_main(self) -> bool:
        return self.fabric.is_global_zero

    @cached_property
    def weights_sha256(self) -> str:
        """Of names, types, shapes and bytes of all tensors: the same in any kind of file, for the same model."""
        return weights.sha256(self.model.state_dict())

    def size(self, asked: int | None) -> int | None:
        """Side of the square that pictures are cropped and resized to: the model's own, or what is asked for."""
        own = self.model.resolution
        if asked is None or asked == own:
            return own
        if own is not None:
            raise UserError(f"Expected --size {own}, which {self._name} was built for, got {asked}; leave it out.")
        if asked < 1:
            raise UserError(f"Expected --size of at least 1, got {asked}.")
        return asked

    @torch.inference_mode()
    def encode(self, windows: Sequence[Frames]) -> Encoding:
        """Clips of one size, uint8 (T, H, W, 3) each → posteriors. Other sizes than the model takes are extended."""
        clip = as_clip(windows, self.model.spatial_multiple).to(self.fabric.device)
        with forward_context(self.fabric, self.precision):
            return self.model.encode(clip)

    @torch.inference_mode()
    def decode(self, latents: Latents, height: int, width: int) -> list[Frames]:
        """Latents (B, ...) → clips, uint8 (T, height, width, 3) each, without what `encode` extended."""
        latents = {name: latent.to(self.fabric.device) for name, latent in latents.items()}
        with forward_context(self.fabric, self.precision):
            decoded = self.model.decode(latents, self.num_frames)
        return [to_uint8(clip)[:, :height, :width] for clip in decoded]

    def views(
        self, windows: Sequence[Frames], only: str | None = None, partial: bool = True
    ) -> dict[str, list[Frames]]:
        """Clips of one size → "reconstruction" and, with `partial`, "<latent> only" of each latent, where models can.

        With `only` that latent's view alone.
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
        """Raise `UserError` unless the model has such a latent and decodes it alone."""
        names = self.model.latent_names
        if latent not in names:
            raise UserError(f"Expected one of {', '.join(names)}, the latents of {self._name}, got {latent!r}.")
        if len(names) < 2 or not self.model.partial_latents:
            raise UserError(f"Expected a model that decodes one of several latents alone, got {self._name}.")

    @property
    def usual_tile(self) -> int:
        """Side of tiles for a model of any size: 256 pixels, or next to it what the model takes."""
        multiple = self.model.spatial_multiple
        return -(-256 // multiple) * multiple

    def gather(self, thing: T) -> list[T]:
        """What each process gives, by rank, for all of them."""
        if self.world_size == 1:
            return [thing]
        gathered: list[Any] = [None] * self.world_size
        torch.distributed.all_gather_object(gathered, thing)
        return gathered

    def say(self, line: str) -> None:
        """A result, on stdout, once."""
        if self.is_main:
            self.report(line)

    def report(self, line: str) -> None:
        """What this process has done, on stdout."""
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()

    def tell(self, line: str) -> None:
        """What went wrong, on stderr, by the process that met it."""
        tqdm.write(f"vidtwin: {line}", file=sys.stderr)

    def tell_lack(self, path: Path, num_frames: int, damage: str | None, lost_sound: str | None) -> str | None:
        """Tell what a video that was written to `path` lacks → the reason; None where it lacks nothing."""
        if damage:
            self.tell(f"{damage} The {num_frames} frames before are in {path}.")
        elif lost_sound:
            self.tell(f"{path}: {lost_sound}")
        return damage or lost_sound

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
