"""One model on clips: what it reconstructs, whole or in windows, and what its latents and its row say of it."""

import hashlib
import math
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from einops import rearrange
from torch import Tensor

import vidtwin
from vidtwin import hub
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.cost import device_name
from vidtwin.benchmark.rows import SCHEMA_VERSION
from vidtwin.errors import UserError
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.posteriors import Encoding, Latents

LAST, AVERAGE = "of the last step", "running average"
CLAIM_TOLERANCE = 0.05  # of a rate: papers print two digits


@dataclass
class Subject:
    """A model with what its row says of it.

    Attributes:
        model: In evaluation mode.
        window: Frames that it takes at a time, where a clip goes through in windows.
        differs: Where the model that the checkpoint was trained as differs from this one, a line each.
    """

    name: str
    kind: Literal["trained", "untrained", "reference"]
    model: VideoAutoencoder
    checkpoint: str | None = None
    fingerprint: str | None = None
    weights: str = LAST
    claimed_rate: float | None = None
    window: int | None = None
    differs: list[str] = field(default_factory=list)

    def windows(self, num_frames: int) -> int:
        """How many a clip goes through in; 1: whole."""
        if self.window is None or num_frames <= self.window:
            return 1
        if num_frames % self.window:
            raise UserError(
                f"Expected a clip whose length is a multiple of the windows of {self.window} frames that {self.name} "
                f"takes, got {num_frames}; set data.num_frames accordingly."
            )
        return num_frames // self.window

    def check(self, num_frames: int, resolution: int) -> None:
        """`UserError` for clips that the model does not take."""
        length = num_frames // self.windows(num_frames)
        try:
            self.model.check_clip(torch.empty(1, 3, length, resolution, resolution, device="meta"))
            self.model.temporal.legal_length(length)
        except UserError as error:
            maximum = self.model.temporal.maximum
            short = self.window is None and maximum is not None and maximum < num_frames
            raise UserError(
                f"{str(error).rstrip('.')}{'; or give its entry windows: true' if short else ''}."
            ) from error

    def encode(self, clip: Tensor) -> Encoding:
        """Clips (B, 3, T, H, W) → posteriors of (B · windows, …)."""
        windows = self.windows(clip.shape[2])
        return self.model.encode(rearrange(clip, "b c (w t) h x -> (b w) c t h x", w=windows))

    def decode(self, latents: Latents, num_frames: int) -> Tensor:
        """Latents (B · windows, …) → clips (B, 3, T, H, W)."""
        windows = self.windows(num_frames)
        clip = self.model.decode(latents, num_frames // windows)
        return rearrange(clip, "(b w) c t h x -> b c (w t) h x", w=windows)

    def latents(self, latents: Latents, clip_shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """Shape, numbers, rate and bits of each latent of a clip (3, T, H, W), from the latents that were encoded."""
        windows = self.windows(clip_shape[1])
        inner = (clip_shape[0], clip_shape[1] // windows, *clip_shape[2:])
        codes = self.model.code_shapes(inner)
        found = {}
        for name, latent in latents.items():
            shape = [windows, *latent.shape[1:]] if windows > 1 else list(latent.shape[1:])
            numbers = math.prod(shape)
            bits = None
            if name in codes:
                size, entries = codes[name]
                bits = windows * math.prod(size) * math.log2(entries)
            found[name] = {
                "shape": shape,
                "numbers": numbers,
                "rate": numbers / math.prod(clip_shape),
                "bits": bits,
            }
        return found


def describe(
    subject: Subject,
    latents: dict[str, dict[str, Any]],
    clip_shape: tuple[int, ...],
    codes: LatentStatistics,
    device: torch.device,
) -> dict[str, Any]:
    """What a row says of the model itself: rates from the latents that were encoded, parameters, codebooks."""
    rate = sum(latent["numbers"] for latent in latents.values()) / math.prod(clip_shape)
    bits = [latent["bits"] for latent in latents.values()]
    windows = subject.windows(clip_shape[1])
    return {
        "schema_version": SCHEMA_VERSION,
        "name": subject.name,
        "kind": subject.kind,
        "error": None,
        "model": subject.model.spec(),
        "checkpoint": subject.checkpoint,
        "fingerprint": subject.fingerprint,
        "weights": subject.weights,
        "differs_from_checkpoint": subject.differs,
        "windows": {"num_frames": clip_shape[1] // windows, "windows": windows} if windows > 1 else None,
        "parameters": sum(p.numel() for p in subject.model.parameters()),
        "latents": latents,
        "compression_rate": rate,
        "bits_per_pixel": None if None in bits else sum(bits) / math.prod(clip_shape[1:]),
        "claimed": claim(rate, subject.claimed_rate),
        "codebooks": {
            name: {
                "size": int(found["codebook_size"]),
                "dead_codes": int(found["dead_codes"]),
                "perplexity": float(found["perplexity"]),
            }
            for name, found in codes.compute().items()
        },
        "device": device_name(device),
        "versions": {"vidtwin": vidtwin.__version__, "torch": torch.__version__},
    }


def claim(rate: float, claimed: float | None) -> dict[str, Any] | None:
    """What a row says of the rate that its authors state."""
    if claimed is None:
        return None
    return {"rate": claimed, "agrees": abs(rate - claimed) <= CLAIM_TOLERANCE * claimed}


def fingerprint(path: str | Path) -> str:
    """SHA-256 that tells one checkpoint from another: of the names, sizes and checksums of what the file holds.

    Of a folder of `save_pretrained` it is that of the weights.
    """
    if hub.is_pretrained(path):
        return str(hub.read_config(hub.fetch(path), path)["weights_sha256"])
    digest = hashlib.sha256()
    try:
        with zipfile.ZipFile(path) as archive:
            for entry in archive.infolist():
                # torch names the folder in the archive after the file.
                inner = entry.filename.partition("/")[2]
                digest.update(f"{inner}\t{entry.file_size}\t{entry.CRC}\n".encode())
    except FileNotFoundError as error:
        raise UserError(f"Expected a checkpoint at {path}, got no such file.") from error
    except Exception as error:  # zipfile has many for headers that are damaged
        raise UserError(f"Expected a whole checkpoint, got {path}: it is damaged or cut off ({error}).") from error
    return digest.hexdigest()


def seeded(seed: int, device: torch.device, run: Callable[[], Any]) -> Any:
    """Call with random numbers of its own on the device; those outside go on as if it had not been."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        return run()
