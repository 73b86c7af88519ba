"""The file format of latents of many videos (docs/latents.md).

    manifest.json              model, settings, videos, the planned content of each shard and, when complete, totals
    shard-00000.safetensors    tensors "<piece>.<latent>" (n, ...); a piece is a run of windows of one video

A shard's header describes its pieces, so each shard can be read by itself. Videos and settings alone determine which
windows a shard holds; these and the model determine its bytes.
"""

import hashlib
import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from itertools import chain
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.files import parse_json, replacing, write_text
from vidtwin.video import parse_rate

MANIFEST = "manifest.json"
SHARD = "shard-{:05d}.safetensors"
SCHEMA_VERSION = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_FLOATS = ("F32", "F16", "BF16")  # of safetensors
LOGVAR = "logvar"  # "<piece>.<latent>.logvar"
_UNIT = re.compile(r"1(/[1-9][0-9]{0,30})?|[1-9][0-9]{0,8}(/[1-9][0-9]{0,30})?")  # as str(Fraction) writes it
_LATEST = 10**9  # seconds
_KEY = "vidtwin"  # a single key of safetensors' metadata, since the order of several is not fixed


@dataclass(frozen=True)
class Latent:
    """Storage of a latent.

    Attributes:
        kind: Kind of posterior: stored are a Gaussian's mean (with its log-variance if moments are kept), a
            deterministic value, or a quantizer's codes.
        shape: Shape for one clip, without batch axis; None if it depends on the picture's size.
        codebook_size: Number of codebook entries; None without codes.
    """

    kind: Literal["gaussian", "deterministic", "codes"]
    shape: tuple[int, ...] | None = None
    codebook_size: int | None = None


@dataclass(frozen=True)
class Piece:
    """A run of windows of one video, in one shard.

    Attributes:
        video: Index in `Manifest.videos`.
        first_window: Index of the first window in the video.
        windows: Planned number of windows. A video's last piece takes all that remain, be they more or fewer.
        stored: Stored number of windows; None until known.
    """

    video: int
    first_window: int
    windows: int
    stored: int | None = None


@dataclass(frozen=True)
class VideoEntry:
    """A video of a manifest; fields that only decoding reveals are None before.

    Attributes:
        name: Path below a folder of outputs, without a suffix.
        source: Path as given by the user.
        label: Class index, -1 if unlabelled.
        fps: Average frames per second, a fraction as text.
        planned_frames: Number of frames according to the container.
        bytes: Size of the file.
        changed: Modification time of the file in ns.
        num_frames: Number of encoded frames.
        height: In pixels.
        width: In pixels.
        damage: Reason why the video ends early.
    """

    name: str
    source: str
    label: int
    fps: str
    planned_frames: int
    bytes: int
    changed: int
    num_frames: int | None = None
    height: int | None = None
    width: int | None = None
    damage: str | None = None


@dataclass(frozen=True)
class StoredPiece:
    """An encoded piece.

    Attributes:
        video: Name of the video.
        first_window: Index of the first window in the video.
        num_frames: Real frames per window; the others repeat the last one.
        height: In pixels.
        width: In pixels.
        times: Presentation times of the real frames if they differ from the video's rate (`pack_times`).
        damage: Reason why the video ends early.
    """

    video: str
    first_window: int
    num_frames: list[int] = field(default_factory=list)
    height: int | None = None
    width: int | None = None
    times: dict[str, Any] | None = None
    damage: str | None = None


@dataclass
class Manifest:
    """Content of a folder of latents.

    Attributes:
        model: class_path, init_args and weights_sha256; checkpoint, config and use_ema as given by the user.
        settings: Settings of the encoding: num_frames per window, size, posterior, dtype, ….
        classes: Names of the labels.
        skipped: Name → reason of videos without a readable frame.
        unread: Name → reason of videos at which the system failed: without them, the latents are not complete.
        statistics: "mean" and "std" per channel (axis 1) of each continuous latent; with moments also "sample_std",
            that of samples. None if the channels differ between videos.
        totals: clips, videos, frames, bytes, compression_rate, bits_per_pixel.
    """

    model: dict[str, Any]
    settings: dict[str, Any]
    latents: dict[str, Latent]
    videos: list[VideoEntry]
    shards: list[list[Piece]]
    classes: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    unread: dict[str, str] = field(default_factory=dict)
    complete: bool = False
    statistics: dict[str, dict[str, list[float]] | None] = field(default_factory=dict)
    totals: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def read_complete(cls, folder: str | Path) -> Self:
        """Read the manifest of a folder, as `read`; raise `UserError` for unfinished latents too."""
        manifest = cls.read(folder)
        if not manifest.complete:
            raise UserError(
                f"Expected complete latents in {folder}, got unfinished ones; run `vidtwin encode` again to resume."
            )
        return manifest

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Read the manifest of a folder.

        Raises:
            UserError: It is missing, damaged, or of another version.
        """
        path = Path(folder) / MANIFEST
        try:
            content = parse_json(path.read_text(encoding="utf-8"))
            version = content.pop("schema_version")
        except (FileNotFoundError, NotADirectoryError):
            raise UserError(
                f"Expected a folder of latents with {path}, got none; write it by `vidtwin encode`."
            ) from None
        except (ValueError, TypeError, KeyError, AttributeError):
            raise UserError(f"Expected a manifest written by `vidtwin encode` in {path}, got something else.") from None
        if version != SCHEMA_VERSION:
            raise UserError(
                f"Expected latents of schema version {SCHEMA_VERSION}, got {version} in {path}; use the version of "
                "vidtwin that wrote them, or encode again."
            )
        try:
            content["latents"] = {
                name: Latent(**{**held, "shape": None if held["shape"] is None else tuple(held["shape"])})
                for name, held in content["latents"].items()
            }
            content["videos"] = [VideoEntry(**video) for video in content["videos"]]
            content["shards"] = [[Piece(**piece) for piece in pieces] for pieces in content["shards"]]
            manifest = cls(**content)
            manifest._check()
            return manifest
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(f"Expected a manifest written by `vidtwin encode`, {path} is damaged: {error}.") from None

    def _check(self) -> None:
        """Raise `ValueError`, `KeyError` or `TypeError` for values that `vidtwin encode` does not write."""
        model = self.model
        _check_text(model["class_path"], model["weights_sha256"])
        _check_text(model.get("checkpoint", ""), model.get("config") or "")
        _check_counts(self.settings["num_frames"], model.get("use_ema", False))
        _check_text(*self.classes, *self.skipped, *self.skipped.values(), *self.unread, *self.unread.values())
        for name, latent in self.latents.items():
            if latent.kind not in ("gaussian", "deterministic", "codes"):
                raise ValueError(f"a kind of {ascii(name)[:100]}")
            _check_counts(*(latent.shape or ()), latent.codebook_size or 0)
            if latent.kind == "codes" and not latent.codebook_size:
                raise ValueError(f"no size of the codebook of {ascii(name)[:100]}")
        for video in self.videos:
            _check_text(video.name, video.source)
            if not isinstance(video.label, int) or video.label >= len(self.classes):
                raise TypeError(f"a label of {ascii(video.name)[:100]}")
            _check_counts(video.planned_frames, video.num_frames or 0, video.height or 0, video.width or 0)
            parse_rate(video.fps)
        for piece in (piece for pieces in self.shards for piece in pieces):
            _check_counts(piece.video, piece.first_window, piece.windows, piece.stored or 0)
            if piece.video >= len(self.videos):
                raise ValueError(f"a piece of video {piece.video} of {len(self.videos)}")

    def write(self, folder: str | Path) -> None:
        """Write the manifest atomically."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        if not self.unread:  # a key that earlier versions refuse
            del content["unread"]
        write_text(Path(folder) / MANIFEST, json.dumps(content, indent=1) + "\n")

    @property
    def digest(self) -> str:
        """SHA-256 of everything that determines the shards, whose headers store it."""
        plan = {
            "model": {key: self.model[key] for key in ("class_path", "weights_sha256")},
            "settings": self.settings,
            "latents": {name: [latent.kind, latent.codebook_size] for name, latent in self.latents.items()},
            "videos": [[video.name, video.fps, video.planned_frames] for video in self.videos],
            "shards": [[[piece.video, piece.first_window, piece.windows] for piece in shard] for shard in self.shards],
        }
        return hashlib.sha256(json.dumps(plan, sort_keys=True).encode()).hexdigest()

    def places(self) -> list[list[tuple[int, int]]]:
        """Return (shard, index in the shard) of each video's pieces in order of their windows."""
        found: list[list[tuple[int, int]]] = [[] for _ in self.videos]
        for number, pieces in enumerate(self.shards):
            for place, piece in enumerate(pieces):
                found[piece.video].append((number, place))
        return found


def _check_text(*values: object) -> None:
    if not all(isinstance(value, str) for value in values):
        raise TypeError(f"expected texts, got {values}")


def _check_counts(*values: object) -> None:
    if not all(isinstance(value, int) and value >= 0 for value in values):
        raise TypeError(f"expected counts, got {values}")


def _check_piece(piece: StoredPiece) -> StoredPiece:
    _check_text(piece.video)
    _check_counts(piece.first_window, *piece.num_frames, piece.height or 0, piece.width or 0)
    if piece.times is not None:
        unit, at = piece.times["unit"], piece.times["at"]
        whole = _UNIT.fullmatch(unit) and len(at) == sum(piece.num_frames) and all(isinstance(time, int) for time in at)
        if not whole or any(abs(time * Fraction(unit)) > _LATEST for time in at):
            raise ValueError(f"times of {ascii(piece.video)[:100]}")
    return piece


def _check_sums(sums: Mapping[str, Mapping[str, Any]]) -> None:
    for held in sums.values():
        if held["count"] is None:
            continue
        columns = [held[key] for key in ("sum", "squares", *(["noise"] if "noise" in held else []))]
        if held["count"] < 1 or len(set(map(len, columns))) > 1 or not all(map(math.isfinite, chain(*columns))):
            raise ValueError("sums of its values")


def shard_path(folder: str | Path, number: int) -> Path:
    """Return the path of a shard."""
    return Path(folder) / SHARD.format(number)


def code_dtype(codebook_size: int) -> torch.dtype:
    """Return the smallest integer type that holds codes of a codebook."""
    for bits, dtype in ((8, torch.uint8), (16, torch.uint16), (31, torch.int32)):
        if codebook_size <= 2**bits:
            return dtype
    return torch.int64


def pack_times(times: Sequence[Fraction], fps: Fraction, start_frame: int) -> dict[str, Any] | None:
    """Convert times in seconds to multiples of a unit; return None if frame k of the video is shown at k / fps."""
    if all(time == (start_frame + index) / fps for index, time in enumerate(times)):
        return None
    unit = Fraction(1, math.lcm(*(time.denominator for time in times)))
    return {"unit": str(unit), "at": [int(time / unit) for time in times]}


def unpack_times(packed: dict[str, Any] | None, fps: Fraction, start_frame: int, num_frames: int) -> list[Fraction]:
    """Invert `pack_times` → times in seconds."""
    if packed is None:
        return [(start_frame + index) / fps for index in range(num_frames)]
    unit = Fraction(packed["unit"])
    return [at * unit for at in packed["at"]]


def write_shard(path: Path, digest: str, pieces: Sequence[StoredPiece], tensors: Mapping[str, Tensor]) -> None:
    """Write a shard atomically.

    Args:
        path: Target file.
        digest: Digest of the manifest.
        pieces: Pieces in order.
        tensors: "<piece>.<latent>" and "<piece>.<latent>.logvar" (n, ...), on the CPU; see `tensor_name`.
    """
    held = {name: tensors[name].contiguous() for name in sorted(tensors)}
    header = {
        "schema_version": SCHEMA_VERSION,
        "plan": digest,
        "pieces": [asdict(piece) for piece in pieces],
        "sums": _sum_channels(held),
        "sha256": _hash_tensors(held.items()),
    }
    content = safetensors.torch.save(held, {_KEY: json.dumps(header, separators=(",", ":"))})
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def tensor_name(piece: int, latent: str, part: str | None = None) -> str:
    """Return the name of a tensor in a shard; `part` is `LOGVAR` or None."""
    return f"{piece:04d}.{latent}" + (f".{part}" if part else "")


class Shard:
    """A shard mapped into memory; only requested windows are read.

    Raises:
        UserError: It is missing, truncated, damaged, or belongs to other latents; the message begins with the path.
    """

    def __init__(self, path: Path, digest: str) -> None:
        self.path = path
        self._codebooks: dict[str, int | None] = {}  # known when it is compared to a manifest
        try:
            self._file = safe_open(path, "pt")
            header = parse_json((self._file.metadata() or {})[_KEY])
            version, plan = header["schema_version"], header["plan"]
        except FileNotFoundError:
            raise UserError(f"{path}: expected a shard, got no such file; encode again.") from None
        except (SafetensorError, OSError) as error:
            raise UserError(
                f"{path}: expected a whole shard, got one that is cut off or damaged ({error}); encode again."
            ) from None
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}: expected a shard written by `vidtwin encode`, got something else; encode again."
            ) from None
        if version != SCHEMA_VERSION or plan != digest:
            raise UserError(f"{path}: expected a shard of these latents, got one of others; encode again.")
        self.names = set(self._file.keys())
        try:
            self.pieces = [_check_piece(StoredPiece(**piece)) for piece in header["pieces"]]
            self.sums: dict[str, dict[str, Any]] = header["sums"]
            _check_sums(self.sums)
            self._digest: str = header["sha256"]
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise UserError(
                f"{path}: expected a shard written by `vidtwin encode`, got a damaged one ({error}); encode again."
            ) from None

    def rows(self, piece: int, latent: str, first: int, last: int, part: str | None = None) -> Tensor:
        """Read windows `first` to `last` (exclusive) of a piece as stored: (n, ...)."""
        held: Tensor = self._file.get_slice(tensor_name(piece, latent, part))[first:last]
        size = self._codebooks.get(latent)
        if size is not None and held.numel() and not 0 <= held.numpy().min() <= held.numpy().max() < size:
            raise UserError(f"{self.path}: expected codes of {latent} below {size}, got others; encode again.")
        return held

    def compare(self, manifest: Manifest, number: int) -> Self:
        """Compare the header to that of shard `number` of a manifest → the shard; raise `UserError` if it differs."""
        planned = [(manifest.videos[piece.video].name, piece.first_window) for piece in manifest.shards[number]]
        fault = None if planned == [(piece.video, piece.first_window) for piece in self.pieces] else "other pieces"
        moments = manifest.settings.get("posterior") == "moments"
        expected = set()
        for place, piece in enumerate([] if fault else self.pieces):
            stored = manifest.shards[number][place].stored
            counts = piece.num_frames
            if stored not in (None, len(counts)) or not all(0 < n <= manifest.settings["num_frames"] for n in counts):
                fault = f"other windows of {ascii(piece.video)[:100]}"
            for name, latent in manifest.latents.items() if counts else ():
                for part in (None, LOGVAR) if moments and latent.kind == "gaussian" else (None,):
                    expected.add(tensor_name(place, name, part))
                    if not self._fits(tensor_name(place, name, part), latent, len(counts)):
                        fault = f"no {ascii(name)[:100]} of {ascii(piece.video)[:100]}"
        summed = {name for name, latent in manifest.latents.items() if latent.kind != "codes" and expected}
        if fault is None and (expected != self.names or summed != set(self.sums)):
            fault = "more tensors, or sums of others"
        if fault is not None:
            raise UserError(
                f"{self.path}: expected a shard of these latents, got a damaged one ({fault}); encode again."
            )
        self._codebooks = {name: latent.codebook_size for name, latent in manifest.latents.items()}
        return self

    def _fits(self, name: str, latent: Latent, count: int) -> bool:
        if name not in self.names:
            return False
        held = self._file.get_slice(name)
        first, *shape = held.get_shape() or [0]
        whole = first == count and latent.shape in (None, tuple(shape))
        return whole and (held.get_dtype() in _FLOATS) == (latent.kind != "codes")

    def sizes(self) -> Iterator[tuple[str, list[int]]]:
        """Yield the name and shape of each tensor."""
        for name in sorted(self.names):
            yield name, self._file.get_slice(name).get_shape()

    def check(self) -> Self:
        """Verify the checksum of the whole shard → the shard; raise `UserError` if it differs."""
        if _hash_tensors((name, self._file.get_tensor(name)) for name in sorted(self.names)) != self._digest:
            raise UserError(
                f"{self.path}: expected a whole shard, got one whose content is damaged (checksum); encode again."
            )
        return self


def open_shard(folder: str | Path, manifest: Manifest, number: int) -> Shard:
    """Open a shard whose header agrees with its manifest; errors as of `Shard`."""
    return Shard(shard_path(folder, number), manifest.digest).compare(manifest, number)


class OpenShards:
    """Map the shards of a folder on first use, and keep the last ones that were used; pickled, it holds none.

    Args:
        folder: Folder of the latents.
        manifest: Its manifest.
        number: Number of shards to keep.
    """

    def __init__(self, folder: str | Path, manifest: Manifest, number: int = 32) -> None:
        self.folder, self.manifest, self.number = folder, manifest, number
        self._shards: OrderedDict[int, Shard] = OrderedDict()

    def __getitem__(self, number: int) -> Shard:
        """Return shard `number`; errors as of `Shard`."""
        shard = self._shards.pop(number, None) or open_shard(self.folder, self.manifest, number)
        self._shards[number] = shard  # the last one in the order of use
        if len(self._shards) > self.number:
            self._shards.popitem(last=False)
        return shard

    def __getstate__(self) -> dict[str, Any]:
        """Leave out the shards, which a worker maps itself."""
        return self.__dict__ | {"_shards": OrderedDict()}


def channel_statistics(shards: Sequence[Mapping[str, Mapping[str, Any]]]) -> dict[str, dict[str, list[float]] | None]:
    """Compute the mean and standard deviation per channel over all shards from their `Shard.sums`.

    NumPy sums each piece in one thread, and `math.fsum`, which rounds once, sums pieces and shards: the result does not
    depend on the order of shards nor on the processes that encoded them.
    """
    found: dict[str, dict[str, list[float]] | None] = {}
    for latent in sorted({name for sums in shards for name in sums}):
        held = [sums[latent] for sums in shards if latent in sums]
        if any(sums["count"] is None for sums in held) or len({len(sums["sum"]) for sums in held}) > 1:
            found[latent] = None
            continue
        count = sum(sums["count"] for sums in held)
        means = [total / count for total in _sum_exactly([sums["sum"] for sums in held])]
        squares = [total / count for total in _sum_exactly([sums["squares"] for sums in held])]
        variances = [max(0.0, square - mean * mean) for mean, square in zip(means, squares, strict=True)]
        found[latent] = result = {"mean": means, "std": [math.sqrt(value) for value in variances]}
        if "noise" in held[0]:  # the law of total variance
            noise = [total / count for total in _sum_exactly([sums["noise"] for sums in held])]
            result["sample_std"] = [math.sqrt(a + b) for a, b in zip(variances, noise, strict=True)]
    return found


def _sum_channels(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Any]]:
    """Sum each continuous latent per channel: values ("sum"), squares and, with moments, variances ("noise").

    `count` is the number of values per channel, None if the pieces differ in their channels.
    """
    parts: dict[str, dict[str, list[list[float]]]] = {}
    counts: dict[str, int] = {}
    for name, tensor in tensors.items():
        _, latent, *part = name.split(".")
        if not tensor.is_floating_point():
            continue
        values = _split_channels(tensor)
        held = parts.setdefault(latent, {})
        if part:
            held.setdefault("noise", []).append(np.exp(values).sum((0, 2)).tolist())
            continue
        counts[latent] = counts.get(latent, 0) + values.shape[0] * values.shape[2]
        held.setdefault("sum", []).append(values.sum((0, 2)).tolist())
        held.setdefault("squares", []).append(np.square(values).sum((0, 2)).tolist())
    return {
        latent: {"count": counts[latent]} | {key: _sum_exactly(rows) for key, rows in held.items()}
        if len({len(row) for row in held["sum"]}) == 1
        else {"count": None}
        for latent, held in parts.items()
    }


def _split_channels(tensor: Tensor) -> NDArray[np.float64]:
    """Reshape (n, C, ...) → (n, C, values per channel) in double precision."""
    values = tensor.double().numpy()
    channels = values.shape[1] if values.ndim > 1 else 1
    return np.ascontiguousarray(values).reshape(len(values), channels, -1)


def _sum_exactly(rows: Sequence[Sequence[float]]) -> list[float]:
    return [math.fsum(column) for column in zip(*rows, strict=True)]


def _hash_tensors(tensors: Any) -> str:
    total = hashlib.sha256()
    for name, tensor in tensors:
        total.update(name.encode())
        total.update(memoryview(tensor.contiguous().view(torch.uint8).numpy()))
    return total.hexdigest()
