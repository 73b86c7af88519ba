"""A model of a sweep: it takes clips whole or in windows, and describes itself and its latents for its row."""

import hashlib
import math
import zipfile
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
class LoadedModel:
    """A model with the origin of its weights.

    Attributes:
        name: Name of its row.
        kind: Kind of its row.
        model: In evaluation mode.
        checkpoint: Path as given by the user.
        fingerprint: Of the checkpoint, see `fingerprint`.
        weights: Which of the checkpoint's weights it has.
        claimed_rate: Compression rate stated by its authors.
        window: Frames per window, for a model that takes shorter clips.
        differs: Differences to the model that the checkpoint was trained as, a line each.
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

    def count_windows(self, num_frames: int) -> int:
        """Return the number of windows of a clip; 1 if the model takes it whole."""
        if self.window is None or num_frames <= self.window:
            return 1
        if num_frames % self.window:
            raise UserError(
                f"Expected a clip whose length is a multiple of the windows of {self.window} frames that {self.name} "
                f"takes, got {num_frames}; set data.num_frames accordingly."
            )
        return num_frames // self.window

    def check(self, num_frames: int, resolution: int) -> None:
        """Raise `UserError` for clips that the model does not take."""
        length = num_frames // self.count_windows(num_frames)
        try:
            self.model.check_clip(torch.empty(1, 3, length, resolution, resolution, device="meta"))
            self.model.temporal.legal_length(length)
        except UserError as error:
            maximum = self.model.temporal.maximum
            short = self.window is None and maximum is not None and maximum < num_frames
            advice = "; or give its entry windows: true" if short else ""
            raise UserError(f"{str(error).rstrip('.')}{advice}.") from error

    def encode(self, clip: Tensor) -> Encoding:
        """Encode clips (B, 3, T, H, W) to posteriors of (B · windows, …)."""
        windows = self.count_windows(clip.shape[2])
        return self.model.encode(rearrange(clip, "b c (w t) h x -> (b w) c t h x", w=windows))

    def decode(self, latents: Latents, num_frames: int) -> Tensor:
        """Decode latents (B · windows, …) to clips (B, 3, T, H, W)."""
        windows = self.count_windows(num_frames)
        clip = self.model.decode(latents, num_frames // windows)
        return rearrange(clip, "(b w) c t h x -> b c (w t) h x", w=windows)

    def latent_shapes(self, clip_shape: tuple[int, ...]) -> dict[str, tuple[int, ...]]:
        """Return the shapes of a clip's latents, channels first; several windows are an axis behind the channels."""
        windows = self.count_windows(clip_shape[1])
        shapes = self.model.latent_shapes(self._window_shape(clip_shape))
        return {name: s if windows == 1 else (s[0], windows, *s[1:]) for name, s in shapes.items()}

    def describe_latents(self, latents: Latents, clip_shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """Describe the encoded latents of a clip (3, T, H, W): shape, numbers, rate and bits of each."""
        windows = self.count_windows(clip_shape[1])
        codes = self.model.code_shapes(self._window_shape(clip_shape))
        found = {}
        for name, latent in latents.items():
            shape = [windows, *latent.shape[1:]] if windows > 1 else list(latent.shape[1:])
            numbers = math.prod(shape)
            bits = None
            if name in codes:
                size, entries = codes[name]
                bits = windows * math.prod(size) * math.log2(entries)
            rate = numbers / math.prod(clip_shape)
            found[name] = {"shape": shape, "numbers": numbers, "rate": rate, "bits": bits}
        return found

    def describe(
        self, latents: dict[str, Any], clip_shape: tuple[int, ...], codes: dict[str, Any], device: torch.device
    ) -> dict[str, Any]:
        """Describe the model for its row: rates of the encoded latents, parameters, use of the codebooks."""
        rate = sum(latent["numbers"] for latent in latents.values()) / math.prod(clip_shape)
        bits = [latent["bits"] for latent in latents.values()]
        windows = self.count_windows(clip_shape[1])
        return {
            "schema_version": SCHEMA_VERSION,
            "name": self.name,
            "kind": self.kind,
            "error": None,
            "model": self.model.spec(),
            "checkpoint": self.checkpoint,
            "fingerprint": self.fingerprint,
            "weights": self.weights,
            "differs_from_checkpoint": self.differs,
            "windows": {"num_frames": clip_shape[1] // windows, "windows": windows} if windows > 1 else None,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "latents": latents,
            "compression_rate": rate,
            "bits_per_pixel": None if None in bits else sum(bits) / math.prod(clip_shape[1:]),
            "claimed": compare_claim(rate, self.claimed_rate),
            "codebooks": _describe_codebooks(codes),
            "device": device_name(device),
            "versions": {"vidtwin": vidtwin.__version__, "torch": torch.__version__},
        }

    def _window_shape(self, clip_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        channels, frames, height, width = clip_shape
        return channels, frames // self.count_windows(frames), height, width


def compare_claim(rate: float, claimed: float | None) -> dict[str, Any] | None:
    """Compare a compression rate to the one that the authors state, for a row."""
    if claimed is None:
        return None
    return {"rate": claimed, "agrees": abs(rate - claimed) <= CLAIM_TOLERANCE * claimed}


def _describe_codebooks(codes: dict[str, Any]) -> dict[str, Any]:
    statistics = LatentStatistics()
    for name, found in codes.items():
        counts = torch.zeros(found["size"], dtype=torch.int64)
        counts[[int(code) for code in found["counts"]]] = torch.tensor(list(found["counts"].values()))
        statistics.sums[name] = {"codes": counts}
    keys = {"size": "codebook_size", "dead_codes": "dead_codes", "perplexity": "perplexity"}
    return {name: {key: use[value].item() for key, value in keys.items()} for name, use in statistics.compute().items()}


def fingerprint(path: str | Path) -> str:
    """Compute a SHA-256 of a checkpoint's content: of the names, sizes and checksums of the entries of the file.

    For a folder of `save_pretrained` it is that of the weights.
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
