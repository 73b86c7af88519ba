"""A model of a sweep: it takes clips whole or in windows, and describes itself and its latents for its row."""

import hashlib
import math
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

import vidtwin
from vidtwin import hub
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.cost import device_name
from vidtwin.benchmark.rows import SCHEMA_VERSION
from vidtwin.compilation import CompiledUnits, copy_encoding
from vidtwin.errors import UserError
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.posteriors import Encoding, Latents, Stream

LAST, AVERAGE = "of the last step", "running average"
BLACK = -1.0
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
        claimed_rate: Compression rate that a paper states for it.
        window: Frames per window, for a model that takes shorter clips.
        differs: Differences to the model that the checkpoint was trained as, a line each.
        pads: Whether clips differ in length and size. Pictures are then padded with black at all sides to multiples
            that the model takes, and windows of a clip are encoded one after the other, the last one as it is or, if
            the model takes no such length, padded with copies of its last frame. Padding counts in the rate.
        dtype: Type of its weights and of the clips and latents that it takes; None leaves all as they are.
        compiled: Its compiled blocks, if there are any.
        rebuild: Make the model for clips of other frames, height and width, if one is not for all.
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
    pads: bool = False
    dtype: torch.dtype | None = None
    compiled: CompiledUnits | None = None
    rebuild: Callable[[int, int, int], VideoAutoencoder] | None = None

    def count_windows(self, num_frames: int) -> int:
        """Return the number of windows that are encoded at once of a clip; 1 if the model takes it whole."""
        if self.pads or self.window is None or num_frames <= self.window:
            return 1
        if num_frames % self.window:
            raise UserError(
                f"Expected a clip whose length is a multiple of the windows of {self.window} frames that {self.name} "
                f"takes, got {num_frames}; set data.num_frames accordingly."
            )
        return num_frames // self.window

    def cut(self, clip: Tensor) -> list[Tensor]:
        """Cut clips (B, 3, T, H, W) into the parts that are encoded one after the other."""
        return list(clip.split(self.window, 2)) if self.pads and self.window else [clip]

    def piece_shape(self, clip_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        """Return the shape of the first of the parts of a clip (3, T, H, W) that are encoded one after the other."""
        channels, frames, height, width = clip_shape
        return channels, min(frames, self.window) if self.pads and self.window else frames, height, width

    def check(self, num_frames: int, height: int, width: int) -> None:
        """Raise `UserError` for clips that the model does not take."""
        _, length, height, width = self._window_shape(self.piece_shape((3, num_frames, height, width)))
        try:
            self.model.check_clip(torch.empty(1, 3, length, height, width, device="meta"))
            self.model.temporal.legal_length(length)
        except UserError as error:
            maximum = self.model.temporal.maximum
            sized = self.model.resolution in (None, height) and self.model.resolution in (None, width)
            short = self.window is None and sized and maximum is not None and maximum < num_frames
            advice = "; or give its entry windows: true" if short else ""
            raise UserError(f"{str(error).rstrip('.')}{advice}.") from error

    def fit(self, clip_shape: tuple[int, ...], device: torch.device) -> None:
        """Rebuild the model for clips (3, T, H, W) if it takes those of one shape alone."""
        if self.rebuild is not None:
            _, frames, height, width = clip_shape
            self.model = self.rebuild(frames, height, width).eval().to(device, self.dtype)

    def encode(self, clip: Tensor) -> Encoding:
        """Encode clips (B, 3, T, H, W) to posteriors of (B · windows, …)."""
        self.fit(tuple(clip.shape[1:]), clip.device)
        clip = self._pad(clip.to(self.dtype or clip.dtype))
        clip = rearrange(clip, "b c (w t) h x -> (b w) c t h x", w=self.count_windows(clip.shape[2]))
        if self.compiled is None:
            return self.model.encode(clip)
        self.compiled.begin()
        return copy_encoding(self.model.encode(clip), len(clip))

    def decode(self, latents: Latents, num_frames: int, size: tuple[int, int] | None = None) -> Tensor:
        """Decode latents (B · windows, …) to clips (B, 3, T, H, W), cropped to `size` if pictures were padded."""
        windows = self.count_windows(num_frames)
        if self.dtype is not None:
            latents = {name: z.to(self.dtype) if z.is_floating_point() else z for name, z in latents.items()}
        if self.compiled is not None:
            self.compiled.begin()
        clip = self.model.decode(latents, num_frames // windows)
        if self.compiled is not None:
            clip = clip.clone()  # a graph may overwrite it
        height, width = size or clip.shape[3:]
        top, left = (clip.shape[3] - height) // 2, (clip.shape[4] - width) // 2
        clip = clip[..., top : top + height, left : left + width]
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

    def sum_streams(self, encoding: Encoding, clip_shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """Describe a codec's streams of some clips (3, T, H, W), to be added up by `add_latents`."""
        values = math.prod(clip_shape)
        found: dict[str, dict[str, Any]] = {}
        for name, stream in encoding.items():
            if isinstance(stream, Stream):
                numbers, clips = int(stream.numbers.sum()), len(stream.sizes) // self.count_windows(clip_shape[1])
                found[name] = {
                    "shape": None,
                    "numbers": numbers,
                    "rate": numbers / (clips * values),
                    "bits": 8 * int(stream.sizes.sum()),
                    "values": clips * values,
                }
        return found

    def sum_latents(self, pieces: Sequence[Latents], clip_shape: tuple[int, ...]) -> dict[str, dict[str, Any]]:
        """Describe the latents of a clip (3, T, H, W) that was encoded in parts, to be added up by `add_latents`."""
        total: dict[str, dict[str, Any]] = {}
        for place, latents in enumerate(pieces):
            frames = min(self.window or clip_shape[1], clip_shape[1] - place * (self.window or 0))
            shape = (clip_shape[0], frames, *clip_shape[2:])
            found = self.describe_latents(latents, shape)
            total = add_latents(total, {name: each | {"values": math.prod(shape)} for name, each in found.items()})
        return total

    def describe(
        self, latents: dict[str, Any], clip_shape: tuple[int, ...], codes: dict[str, Any], device: torch.device
    ) -> dict[str, Any]:
        """Describe the model for its row: rates of the encoded latents, parameters, use of the codebooks."""
        # Of clips that differ in size, the latents are those of all.
        values = next((latent["values"] for latent in latents.values() if "values" in latent), math.prod(clip_shape))
        rate = sum(latent["numbers"] for latent in latents.values()) / values
        bits = [latent["bits"] for latent in latents.values()]
        windows = self.count_windows(clip_shape[1])
        used: dict[str, int | None] | None = None
        if windows > 1:
            used = {"num_frames": clip_shape[1] // windows, "windows": windows}
        if self.pads and self.window:
            used = {"num_frames": self.window, "windows": None}
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
            "windows": used,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "latents": latents,
            "compression_rate": rate,
            "bits_per_pixel": None if None in bits else sum(bits) / (values // 3),
            "claimed": compare_claim(rate, self.claimed_rate),
            "codebooks": _describe_codebooks(codes),
            "coding": asdict(self.model.coding) if self.model.coding else None,
            "device": device_name(device),
            "versions": {"vidtwin": vidtwin.__version__, "torch": torch.__version__},
        }

    def _window_shape(self, clip_shape: tuple[int, ...]) -> tuple[int, int, int, int]:
        channels, frames, height, width = clip_shape
        frames //= self.count_windows(frames)
        if self.pads:
            temporal, step = self.model.temporal, self.model.spatial_multiple
            if temporal.pad is None and not temporal.is_legal(frames):
                longest = self.window or temporal.maximum or frames
                frames = next((length for length in range(frames, longest + 1) if temporal.is_legal(length)), frames)
            height, width = height + -height % step, width + -width % step
        return channels, frames, height, width

    def _pad(self, clip: Tensor) -> Tensor:
        """Pad clips (B, 3, T, H, W) that differ in size to a shape that the model takes."""
        if not self.pads:
            return clip
        _, frames, height, width = self._window_shape(tuple(clip.shape[1:]))
        if extra := frames - clip.shape[2]:
            clip = torch.cat([clip, clip[:, :, -1:].expand(-1, -1, extra, -1, -1)], 2)
        tall, wide = height - clip.shape[3], width - clip.shape[4]
        if tall or wide:
            clip = F.pad(clip, (wide // 2, wide - wide // 2, tall // 2, tall - tall // 2), value=BLACK)
        return clip


def add_latents(first: dict[str, Any], second: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Add up two descriptions of latents: their numbers and bits, and "values", the numbers of the clips."""
    total = {}
    for name in second:
        parts = [each[name] for each in (first, second) if name in each]
        bits = [part["bits"] for part in parts]
        numbers, values = (sum(part[key] for part in parts) for key in ("numbers", "values"))
        total[name] = {
            "shape": None,
            "numbers": numbers,
            "rate": numbers / values,
            "bits": None if None in bits else sum(bits),
            "values": values,
        }
    return total


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
