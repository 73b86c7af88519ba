"""The numbers of a row's clips at each level of its curves, in `rows/<name>/levels.csv`.

A level is a number of bits of the latents' quantizers ("bits"), the codes of codebooks ("codes"), or noise ("noise").
"""

import math
from pathlib import Path
from typing import Any, TypedDict

from vidtwin.benchmark import rows
from vidtwin.tables import write_table

NAME = "levels.csv"
MEASURED = ("mse", "psnr", "ssim", "lpips")
"""Metrics of a level, if they are available."""

_CODED = ("bytes", "bpp", "entropy_bpp")
_FIRST = ("name", "start_frame", "num_frames", "curve", "level")
_NUMBERS = ("level", *_CODED, *MEASURED)


class Level(TypedDict, total=False):
    """A clip's numbers at one level.

    Attributes:
        name: Of the clip.
        start_frame: Of the clip.
        num_frames: Of the clip.
        curve: "bits", "codes" or "noise".
        level: Bits a number, 0 for codes, or the standard deviation of the noise in those of the channels.
        bytes: Coded latents with what is sent with the clip; absent for noise.
        bpp: 8 · bytes / (T · H · W).
        entropy_bpp: The same of the symbols' empirical entropy, by channel.
        mse: Like the metrics of `clips.csv`, as are `psnr`, `ssim` and `lpips`.
        missing: Why the clip has no metrics at this level; absent if it has.
    """

    name: str
    start_frame: int
    num_frames: int
    curve: str
    level: float
    bytes: int
    bpp: float
    entropy_bpp: float
    mse: float
    psnr: float
    ssim: float
    lpips: float
    missing: str


def write(folder: Path, row: rows.Row, levels: list[Level]) -> None:
    """Write a row's levels; cells of noise have no bytes, those of a clip without metrics a reason."""
    known = {key for level in levels for key in level}
    columns = [*_FIRST, *_CODED, *(key for key in (*MEASURED, "missing") if key in known)]
    lines = ([*(level.get(key, "") for key in columns), row["protocol_hash"]] for level in levels)
    write_table(folder / NAME, [*columns, "protocol_hash"], lines)


def read(folder: Path, row: rows.Row) -> list[dict[str, Any]]:
    """Read the levels of a row in its own folder; `UserError` if the file is missing or cut off."""

    def parse(line: dict[str, str]) -> rows.Clip:
        numbers = {key: _read_number(line[key], key) for key in _NUMBERS if line.get(key) not in (None, "")}
        missing = {"missing": line["missing"]} if line.get("missing") else {}
        return {"curve": line["curve"], **numbers, **missing}

    return rows.read_lines(
        folder / NAME, row, parse, lambda found: len({(level["curve"], level["level"]) for level in found})
    )


def _read_number(text: str, key: str) -> float:
    number = float(text)
    if not math.isfinite(number) or (key in _CODED and number < 0):
        raise ValueError(f"{key} {text}")
    return number
