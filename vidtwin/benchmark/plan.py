"""A sweep's plan: the clips in chunks, and the rows to measure."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NotRequired, TypedDict

from vidtwin.benchmark import rows
from vidtwin.benchmark.levels import Level
from vidtwin.benchmark.loaded_model import LoadedModel
from vidtwin.errors import UserError


@dataclass
class Plan:
    """Clips of a sweep and the protocol by which they are measured.

    Attributes:
        chunks: Indices of the clips that are measured together.
        keys: Name and start frame of each clip.
        shape: Shape (3, T, H, W) of a clip; of clips that differ in it, that of the one with the median number of
            pixels, by which costs are measured.
        protocol: Content of `protocol.json`.
        digest: Hash of the protocol.
        smallest: Least T, H and W of a clip, by which metrics are available.
        varies: Whether clips differ in length or size; each is then a chunk of its own.
    """

    chunks: list[list[int]]
    keys: list[rows.Key]
    shape: tuple[int, int, int, int]
    protocol: dict[str, Any]
    digest: str
    smallest: tuple[int, int, int]
    varies: bool = False

    def __post_init__(self) -> None:
        self.index_of = {key: index for index, key in enumerate(self.keys)}

    def list_clips(self, chunk: int) -> list[list[Any]]:
        """Return name and start frame of a chunk's clips."""
        return [list(self.keys[index]) for index in self.chunks[chunk]]


@dataclass
class Job:
    """A row to measure.

    Attributes:
        name: Name of the row.
        identity: Settings of the model that decide the row's numbers, known before it is built.
        build: Build the model; raises any error of the model's own.
        error: Reason why it can't be built, if it is known before.
        claimed_rate: Compression rate stated by its authors.
        seed_of: Name of the model of which it is one of several trainings.
    """

    name: str
    identity: dict[str, Any]
    build: Callable[[], LoadedModel]
    error: str | None = None
    claimed_rate: float | None = None
    seed_of: str | None = None


class ModelError(Exception):
    """A model can't be measured; the message is one line."""


class Failure(TypedDict):
    """A clip on which a model failed."""

    name: str
    start_frame: int
    reason: str


class CodeCounts(TypedDict):
    """Occurrences of a latent's codes: times by code, of a codebook of `size` entries."""

    size: int
    counts: dict[str, int]


class Part(TypedDict):
    """Numbers of a chunk's clips, and the content of its file beside `identity` and `chunk`.

    Attributes:
        clips: Name, start, length and metrics of each.
        failed: Clips that the model could not reconstruct.
        features: Of each clip for rFVD, as text of base64; arrays once all parts are joined.
        latents: By name, `LoadedModel.describe_latents`, or `sum_latents` if clips differ in size; None without clips.
        codes: By latent.
        levels: Of each clip, its numbers at each level of its curves; absent in parts of earlier versions.
        skipped: Name and reason of each video that could not be read.
    """

    clips: list[rows.Clip]
    failed: list[Failure]
    features: list[Any]
    latents: dict[str, Any] | None
    codes: dict[str, CodeCounts]
    levels: NotRequired[list[list[Level]]]
    skipped: list[list[str]]


def make_empty_part() -> Part:
    """Return a part without clips."""
    return {"clips": [], "failed": [], "features": [], "latents": None, "codes": {}, "levels": [], "skipped": []}


def compute_digest(value: Any) -> str:
    """Return the first 16 digits of the SHA-256 of a value as JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]


def format_error(error: BaseException) -> str:
    """Format an error on one line, with its type unless its message is for the user."""
    line, kind = " ".join(str(error).split()), type(error).__name__
    return line if isinstance(error, (UserError, ModelError)) else f"{kind}: {line}" if line else kind
