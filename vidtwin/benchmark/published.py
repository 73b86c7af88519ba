"""Numbers that papers print, each with the known part of its protocol (`published.csv`).

A column `protocol.KEY` holds what `protocol.json` calls KEY; it is empty if the source doesn't say, "native" for a
video's own size or frame rate. If a source computes something that no protocol of ours has, its words stand there.
"""

import csv
import re
from dataclasses import dataclass
from importlib import resources
from typing import Any

from vidtwin.benchmark.protocol import flat

NUMBERS = ("psnr", "ssim", "lpips", "rfvd")
# These decide every number: the compared pictures, and how clips are averaged.
_OF_ALL = {
    "compared": "compared",
    "average": "average",
    "posterior": "posterior",
    "precision": "precision",
    "data.split": "split",
    "data.num_clips": "clips",
    "data.num_frames": "frames",
    "data.resolution": "resolution",
    "data.fps": "fps",
    "data.clip": "choice of clips",
    "data.tail": "tail",
    "data.crop": "crop",
    "data.resize": "resize filter",
    "data.colour": "colour conversion",
}
_OF_ONE = {
    "psnr": {"psnr": "PSNR of one MSE a", "psnr_epsilon": "PSNR epsilon"},
    "ssim": {"ssim": "SSIM"},
    "lpips": {"lpips.net": "LPIPS network", "lpips.version": "LPIPS version"},
    "rfvd": {"fvd.convention": "FVD"},
}


@dataclass(frozen=True)
class Published:
    """One line of a paper's table.

    Attributes:
        method: As the source calls it.
        source: Paper and table.
        dataset: As the source calls it.
        claimed_rate: Compression rate as printed; 0.002 is 0.2%.
        rate: Latent numbers / clip numbers, from the latents' sizes.
        psnr: dB.
        ssim: At most 1.
        lpips: By the network of `protocol["lpips.net"]`.
        rfvd: Fréchet distance.
        protocol: By the dotted keys of `protocol.json`, as text; without those that the source doesn't state.
        note: A remark for readers.
    """

    method: str
    source: str
    dataset: str
    claimed_rate: float | None
    rate: float | None
    psnr: float | None
    ssim: float | None
    lpips: float | None
    rfvd: float | None
    protocol: dict[str, str]
    note: str


def read() -> list[Published]:
    """Read all lines of `published.csv`, in its order."""
    text = (resources.files("vidtwin.benchmark") / "published.csv").read_text(encoding="utf-8")
    return [_parse(line) for line in csv.DictReader(text.splitlines())]


def beside(protocol: dict[str, Any], methods: list[str] | None = None) -> list[dict[str, Any]]:
    """Find published numbers on the measured data set, each with whether it can be compared.

    Args:
        protocol: As `protocol.json` has it. Without a name under "dataset" nothing is known to be on the same videos,
            and nothing is given.
        methods: Names of rows; None gives all methods. "MAGVIT2, 16 frames" stands for MAGVIT-v2.

    Returns:
        For each its numbers, "matches", "differs" (`fps 25 for 8`: the paper's for the measured one) and "unknown". It
        matches only if all that decides its numbers is stated and equal.
    """
    dataset = protocol.get("dataset")
    if not dataset:
        return []
    entries = read()
    known = {_words(entry.method) for entry in entries}
    wanted = known if methods is None else {_method(_words(name), known) for name in methods}
    return [
        _beside(entry, protocol)
        for entry in entries
        if "".join(_words(entry.dataset)) == "".join(_words(dataset)) and _words(entry.method) in wanted
    ]


def _beside(entry: Published, protocol: dict[str, Any]) -> dict[str, Any]:
    differs, unknown = _compare(entry, protocol)
    numbers = {name: getattr(entry, name) for name in NUMBERS}
    return {
        "method": entry.method,
        "source": entry.source,
        "dataset": entry.dataset,
        **numbers,
        "claimed_rate": entry.claimed_rate,
        "rate": entry.rate,
        "matches": not differs and not unknown,
        "differs": differs,
        "unknown": unknown,
        "lpips_net": entry.protocol.get("lpips.net"),
        "note": entry.note,
    }


def _compare(entry: Published, protocol: dict[str, Any]) -> tuple[list[str], list[str]]:
    """List how a number's protocol differs from the measured one, and the keys that one of the two doesn't state."""
    ours = flat(protocol)
    labels = dict(_OF_ALL)
    for number, keys in _OF_ONE.items():
        if getattr(entry, number) is not None:
            labels |= keys
    differs, unknown = [], []
    for key, label in labels.items():
        theirs = entry.protocol.get(key)
        if theirs is None or key not in ours:
            unknown.append(label)
        elif not _equal(theirs, ours[key]):
            differs.append(f"{label} {theirs} for {_text(ours[key])}")
    if skipped := protocol.get("skipped"):
        differs.append(f"all videos for all but {len(skipped)}")
    return differs, unknown


def _equal(theirs: str, ours: Any) -> bool:
    if isinstance(ours, (int, float)):
        try:
            return float(theirs) == ours
        except ValueError:  # in words
            return False
    return theirs == _text(ours)


def _text(value: Any) -> str:
    """Write a value of `protocol.json` as `published.csv` does: a size or a frame rate of None is the video's own."""
    if value is None:
        return "native"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _method(name: tuple[str, ...], methods: set[tuple[str, ...]]) -> tuple[str, ...] | None:
    """Find the published method that a row's name begins with, the longest of several."""
    return max((method for method in methods if name[: len(method)] == method), key=len, default=None)


def _words(name: str) -> tuple[str, ...]:
    """Split a name into runs of letters and digits, without case, punctuation or the v of a version."""
    return tuple(re.findall(r"[a-z]+|\d+", re.sub(r"(?<![a-z])v(?=\d)", "", name.lower())))


def _parse(line: dict[str, str]) -> Published:
    numbers = {key: float(line[key]) if line[key] else None for key in ("claimed_rate", "rate", *NUMBERS)}
    prefix = "protocol."
    stated = {key.removeprefix(prefix): value for key, value in line.items() if key.startswith(prefix) and value}
    return Published(line["method"], line["source"], line["dataset"], **numbers, protocol=stated, note=line["note"])
