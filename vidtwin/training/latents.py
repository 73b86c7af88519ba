"""The autoencoder whose latents a diffusion model learns, frozen, and its latents of a batch."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from vidtwin import weights
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.data import LatentDescription
from vidtwin.diffusion.codebooks import snap
from vidtwin.errors import UserError
from vidtwin.posteriors import Latents
from vidtwin.storage import checkpoints

Statistics = dict[str, tuple[Tensor, Tensor]]


@dataclass
class Origin:
    """Origin of the latents of a training: the entries of a checkpoint beside the model's spec.

    Attributes:
        latent_shapes: Shapes by name, without batch axis, as the autoencoder decodes them.
        classes: Names of the labels.
        num_frames: Frames of a clip.
        size: Height and width of the pictures.
        fps: Frames per second of the clips.
        autoencoder: class_path, weights_sha256; checkpoint, use_ema and config.
    """

    latent_shapes: dict[str, tuple[int, ...]]
    classes: list[str]
    num_frames: int
    size: tuple[int, int]
    fps: float
    autoencoder: dict[str, Any]

    def entries(self) -> dict[str, Any]:
        """Return those that the model's spec lacks, of plain types."""
        return {
            "classes": list(self.classes),
            "num_frames": self.num_frames,
            "size": list(self.size),
            "fps": self.fps,
            "autoencoder": dict(self.autoencoder),
        }

    def check(self, held: Mapping[str, Any]) -> None:
        """Raise `UserError` unless a checkpoint's `diffusion` is of these latents and classes."""
        theirs = held["autoencoder"]
        check_same(self.autoencoder, theirs["weights_sha256"], theirs["class_path"], "the checkpoint was trained on")
        ours = {name: list(shape) for name, shape in self.latent_shapes.items()}
        for what, own, other in (
            ("latents of the shapes", ours, held["latent_shapes"]),
            ("the classes", self.classes, held["classes"]),
            ("clips with a number of frames of", self.num_frames, held["num_frames"]),
            ("pictures of the size", list(self.size), list(held["size"])),
            ("clips with frames per second of", self.fps, held["fps"]),
        ):
            if own != other:
                raise UserError(f"Expected {what} {other}, which the checkpoint was trained on, got {own}.")


def check_same(model: Mapping[str, Any], sha256: str, class_path: str, reason: str) -> None:
    """Raise `UserError` unless a model, by its class_path and weights_sha256, is the one that `reason` speaks of."""
    if model["weights_sha256"] != sha256:
        raise UserError(
            f"Expected latents of {class_path.rpartition('.')[2]} {sha256[:8]}, which {reason}, got those of "
            f"{str(model['class_path']).rpartition('.')[2]} {model['weights_sha256'][:8]}."
        )


class FrozenAutoencoder:
    """A trained autoencoder in evaluation mode. It is no submodule: optimizers, DDP and checkpoints do not see it.

    Args:
        path: A checkpoint, a folder of `save_pretrained`, or hf://owner/name.
        use_ema: Take its averaged weights.
    """

    def __init__(self, path: str, use_ema: bool = False) -> None:
        self.path, self.use_ema = path, use_ema
        self.model: VideoAutoencoder = checkpoints.load_autoencoder(path, use_ema).requires_grad_(False)

    def identity(self) -> dict[str, Any]:
        """Return the entries of a checkpoint."""
        return {
            "class_path": self.model.class_path,
            "weights_sha256": weights.sha256(self.model.state_dict()),
            "checkpoint": self.path,
            "use_ema": self.use_ema,
            "config": None,
        }

    @torch.no_grad()
    def encode(self, clip: Tensor, posterior: Literal["mean", "sample"]) -> Latents:
        """Encode clips (B, 3, T, H, W) in [-1, 1]; the "mean" of a latent is its posterior's mode."""
        encoding = self.model.to(clip.device).encode(clip)
        latents = encoding.sample() if posterior == "sample" else encoding.mode()
        return {name: z.float() for name, z in latents.items()}

    @torch.no_grad()
    def dequantize(self, codes: Mapping[str, Tensor]) -> Latents:
        """Look up the embedded vectors of codes (B, ...)."""
        device = next(iter(codes.values())).device
        return {name: z.float() for name, z in self.model.to(device).dequantize(dict(codes)).items()}

    @torch.no_grad()
    def decode(self, latents: Latents, num_frames: int, size: tuple[int, int]) -> Tensor:
        """Decode sampled latents, moved to the codebooks if there are any: (B, 3, T, height, width) without padding."""
        device = next(iter(latents.values())).device
        self.model.to(device)
        clip = self.model.decode(snap(self.model, latents, (3, num_frames, *size)), num_frames)
        return clip[..., : size[0], : size[1]]


def find(description: LatentDescription, path: str | None, use_ema: bool) -> FrozenAutoencoder:
    """Load the autoencoder of latents on disk: from `path`, or from the path that they name.

    Raises:
        UserError: There is none, or it is another one.
    """
    model = description.model
    named = path or str(model.get("checkpoint"))
    if not path:
        use_ema = bool(model.get("use_ema"))
        if model.get("config"):
            raise UserError(
                f"Expected an autoencoder with its class in the checkpoint, {description.folder} was encoded with "
                f"--config {model['config']}; give --model.autoencoder PATH of a folder that `vidtwin convert` wrote."
            )
    if not named.startswith("hf://") and not Path(named).exists():
        raise UserError(
            f"Expected the autoencoder of {description.folder} at {named}, got none; give --model.autoencoder PATH."
        )
    found = FrozenAutoencoder(named, use_ema)
    reason = f"{description.folder} holds"
    check_same(found.identity(), str(model["weights_sha256"]), str(model["class_path"]), reason)
    return found


def channel_statistics(parts: list[Latents]) -> Statistics:
    """Compute the mean and standard deviation (C,) of each channel over latents (B, C, ...), in double precision."""
    found = {}
    for name in parts[0]:
        values = torch.cat([part[name] for part in parts]).double()
        values = values.movedim(1, 0).flatten(1)
        found[name] = values.mean(1), values.std(1, correction=0)
    return found
