"""Rate-distortion curves of a results folder: models at several numbers of bits, codecs at several qualities.

curves.csv      each point of each curve: bits per pixel of real bytes, means of the metrics over the common clips
bd.csv          BD-rate and BD-PSNR of each curve against each codec
"""

import importlib
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from vidtwin.benchmark import levels, rows
from vidtwin.benchmark.rows import Results
from vidtwin.benchmark.summary import Cell, Line, Table
from vidtwin.console import log
from vidtwin.files import inside, write_text
from vidtwin.metrics.registry import BY_KEY, Column, format_number
from vidtwin.tables import format_table

LEAST = 4  # points of a curve, by which a cubic is known
CODEC = "codec"
_METRICS = tuple(BY_KEY[key] for key in levels.MEASURED if BY_KEY[key].shown)


@dataclass(frozen=True)
class Point:
    """A point of a curve.

    Attributes:
        row: Name of the row.
        label: Bits a number, a codec's settings, or the noise.
        level: Their number; 0 if there is none.
        means: By metric the mean over the common clips; "bpp" and "entropy_bpp" too.
    """

    row: str
    label: str
    level: float
    means: dict[str, float]

    @property
    def bpp(self) -> float:
        """Bits per pixel."""
        return self.means["bpp"]


@dataclass(frozen=True)
class Curve:
    """Points of a model or a codec, by rising rate, or by rising noise.

    Attributes:
        name: Of the model's row, or of the codec with the settings that its rows share.
        kind: Of the row; "codec" for codecs.
        points: Its points.
    """

    name: str
    kind: str
    points: list[Point]


@dataclass(frozen=True)
class Delta:
    """Bjøntegaard's deltas of a curve to an anchor.

    Attributes:
        rate: Mean difference of the rate at equal PSNR, as a share: -0.1 saves 10%; None if it can't be computed.
        psnr: Mean difference of PSNR at equal rate in dB; None if it can't be computed.
        reasons: Why one of them is missing, by "rate" and "psnr".
    """

    rate: float | None = None
    psnr: float | None = None
    reasons: dict[str, str] = field(default_factory=dict)


def read(results: Results) -> list[Curve]:
    """Read the curves of rates: models by falling PSNR, references, codecs by that of their best point."""
    found = []
    for row in rows.order(results):
        points = [point for point in _read_levels(results, row) if point.means.get("bpp")]
        if points:
            found.append(Curve(row["name"], row["kind"], sorted(points, key=lambda point: point.bpp)))
    codecs: dict[str, list[Point]] = {}
    for row in results.rows:
        compared = results.comparison["rows"].get(row["name"], {})
        means = {key: each["mean"] for key, each in compared.items() if isinstance(each, dict) and "mean" in each}
        # Means over other clips than those of the curves beside it are no point.
        whole = results.comparison["counts"].get(row["name"]) == results.comparison["num_clips"]
        if (coding := row.get("coding")) and whole and 0 < means.get("bpp", 0) < math.inf:
            codecs.setdefault(coding["curve"], []).append(Point(row["name"], coding["settings"], 0, means))
    best = sorted(codecs, key=lambda name: (-max(point.means["psnr"] for point in codecs[name]), name))
    return found + [Curve(name, CODEC, sorted(codecs[name], key=lambda point: point.bpp)) for name in best]


def read_noise(results: Results) -> list[Curve]:
    """Read the curves of noise on the latents."""
    found = []
    for row in rows.order(results):
        if points := [point for point in _read_levels(results, row) if "bpp" not in point.means]:
            found.append(Curve(row["name"], row["kind"], sorted(points, key=lambda point: point.level)))
    return found


def _read_levels(results: Results, row: rows.Row) -> Iterator[Point]:
    """Yield the points of a row: means over the common clips, by the protocol's weights.

    A level at which one of them has no metrics is no point: the others' mean is not comparable.
    """
    for (curve, level), clips in _group_levels(results, row).items():
        if len(clips) < results.comparison["num_clips"] or any("missing" in clip for clip in clips):
            continue
        means = _mean(results, clips)
        if "entropy_bpp" in clips[0]:
            means["entropy_bpp"] = _mean(results, [clip | {"bpp": clip["entropy_bpp"]} for clip in clips])["bpp"]
        yield Point(row["name"], _label(curve, level), level, means)


def _group_levels(results: Results, row: rows.Row) -> dict[tuple[str, float], list[dict[str, Any]]]:
    """Group the common clips of a row by curve and level; none without curves."""
    groups: dict[tuple[str, float], list[dict[str, Any]]] = {}
    if not row.get("rate_distortion"):
        return groups
    common = rows.common_clips(results)
    for clip in levels.read(results.folder / "rows" / row["name"], row):
        if rows.key_of(clip) in common:
            groups.setdefault((clip["curve"], clip["level"]), []).append(clip)
    return groups


def _label(curve: str, level: float) -> str:
    unit = "1 bit" if level == 1 else f"{level:g} bits"
    return {"bits": f"{unit} a number", "codes": "codes"}.get(curve, f"noise {level:g}")


def _note_missing(results: Results, noise: bool) -> Iterator[str]:
    """Say which levels of rates, or of noise, are no points, and why; and which rows have none at all."""
    total = results.comparison["num_clips"]
    for row in rows.order(results):
        count = results.comparison["counts"].get(row["name"], 0)
        if count < total and (row.get("rate_distortion") or (row.get("coding") and not noise)):
            yield f"{row['name']} has no point: it lacks {total - count:,} of the {total:,} clips that the others have."
            continue
        for (curve, level), clips in _group_levels(results, row).items():
            reasons = Counter(clip["missing"] for clip in clips if "missing" in clip)
            if reasons and (curve == "noise") == noise:
                listed = ", ".join(
                    f"{reason} in {number:,} of {len(clips):,} clips" for reason, number in reasons.items()
                )
                yield f"{row['name']} has no point at {_label(curve, level)}: {listed}."


def _mean(results: Results, clips: list[dict[str, Any]]) -> dict[str, float]:
    return {key: float(each["mean"] or 0) for key, each in rows.means(clips, results.protocol).items()}


# --- Bjøntegaard's deltas ---


def compare(anchor: Sequence[tuple[float, float]], test: Sequence[tuple[float, float]]) -> Delta:
    """Compute BD-rate and BD-PSNR of `test` to `anchor` by PCHIP interpolation, as JCT-VC and JVET do.

    A point that has no more quality than a cheaper one of its curve is left out. Each delta needs four points of both
    curves: those inside the range that the curves share, and the next one beyond each of its ends.

    Args:
        anchor: Rate and PSNR of each point.
        test: The same.
    """
    package = _load()
    if package is None:
        return Delta(reasons=dict.fromkeys(("rate", "psnr"), "pip install 'vidtwin[rates]'"))
    curves = [_rise(anchor), _rise(test)]
    found: dict[str, float] = {}
    reasons: dict[str, str] = {}
    for key, axis, compute in (("rate", 1, package.bd_rate), ("psnr", 0, package.bd_psnr)):
        supporting = _count_supporting([[point[axis] for point in curve] for curve in curves])
        if supporting < LEAST:
            shared = "PSNR" if key == "rate" else "rate"
            reasons[key] = f"{supporting} of {LEAST} points at a shared {shared}"
            continue
        lists = [[point[axis] for point in curve] for curve in curves for axis in (0, 1)]
        found[key] = float(compute(*lists, method="pchip", require_matching_points=False, min_overlap=0))
    percent = found.get("rate")
    return Delta(None if percent is None else percent / 100, found.get("psnr"), reasons)


@cache
def _load() -> Any:
    """Import `bjontegaard`; None if it is missing."""
    try:
        return importlib.import_module("bjontegaard")
    except ImportError:
        return None


def _rise(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Return the points by rising rate whose quality is above that of all cheaper ones."""
    kept: list[tuple[float, float]] = []
    for rate, quality in sorted(points, key=lambda point: (point[0], -point[1])):
        if rate > 0 and math.isfinite(quality) and (not kept or (quality > kept[-1][1] and rate > kept[-1][0])):
            kept.append((rate, quality))
    return kept


def _count_supporting(curves: Sequence[Sequence[float]]) -> int:
    """Count the points of the curve with fewer that lie inside the shared range or next to it; 0 without one."""
    if not all(curves):
        return 0
    low, high = max(map(min, curves)), min(map(max, curves))
    if low >= high:
        return 0
    return min(
        sum(low <= value <= high for value in curve) + any(v < low for v in curve) + any(v > high for v in curve)
        for curve in curves
    )


def list_deltas(results: Results) -> list[tuple[Curve, Curve, Delta]]:
    """Compare each model and codec to each codec, or to each model without codecs → (anchor, curve, deltas)."""
    curves = [curve for curve in read(results) if curve.kind != "reference"]
    anchors = [curve for curve in curves if curve.kind == CODEC] or curves
    pairs = {curve.name: [(point.bpp, point.means["psnr"]) for point in curve.points] for curve in curves}
    return [
        (anchor, curve, compare(pairs[anchor.name], pairs[curve.name]))
        for curve in curves
        for anchor in anchors
        if curve.name != anchor.name
    ]


# --- tables ---


def bd_table(results: Results) -> Table | None:
    """Build the table of BD-rate and BD-PSNR to each anchor; None without curves to compare."""
    found = list_deltas(results)
    if not found:
        return None
    anchors = list(dict.fromkeys(anchor.name for anchor, _, _ in found))
    deltas = {(curve.name, anchor.name): delta for anchor, curve, delta in found}
    lines = []
    reasons: set[str] = set()
    for name, kind in dict.fromkeys((curve.name, curve.kind) for _, curve, _ in found):
        cells = []
        for anchor in anchors:
            delta = deltas.get((name, anchor), Delta())
            for key, value, text in (
                ("rate", delta.rate, "" if delta.rate is None else format_number(100 * delta.rate, "+.1f")),
                ("psnr", delta.psnr, "" if delta.psnr is None else format_number(delta.psnr, "+.2f")),
            ):
                reason = delta.reasons.get(key, "").replace(" points at a shared ", " at ")
                cells.append(Cell(text, value, small=reason))
            reasons |= set(delta.reasons.values())
        lines.append(Line(name, "reference" if kind == CODEC else kind, cells))
    notes = [
        "BD-rate, the mean difference of the bits at equal PSNR to the curve of the column (negative: fewer bits), and "
        "BD-PSNR, that of PSNR at equal bits; PCHIP on the logarithm of the bits, over means of the common clips.",
    ]
    if any("points" in reason for reason in reasons):
        notes.append(
            f"Each needs {LEAST} points of both curves at values that they share: BD-rate at PSNR, BD-PSNR at a rate. "
            "With fewer it is missing; the page and bd.csv have their number."
        )
    notes += [f"Nothing was computed: {reason}." for reason in reasons if "points" not in reason]
    columns = [
        column
        for index, anchor in enumerate(anchors)
        for column in (
            Column(f"rate{index}", f"BD-rate to {anchor}", "%", higher=False),
            Column(f"psnr{index}", f"BD-PSNR to {anchor}", "dB", higher=True),
        )
    ]
    return Table("bd", "BD-rate and BD-PSNR", columns, lines, notes, "Curve")


def points_table(results: Results) -> Table | None:
    """Build the table of all points of the curves; None without any."""
    curves = read(results)
    if not curves:
        return None
    metrics = [metric for metric in _METRICS if any(metric.key in p.means for c in curves for p in c.points)]
    columns = [
        Column("point", "Point", words=True),
        Column("bpp", "Bits/pixel", "real bytes", higher=False),
        Column("entropy", "Bits/pixel", "empirical entropy", higher=False),
        *metrics,
    ]
    lines = []
    for curve in curves:
        for point in curve.points:
            values = [point.means.get(key) for key in ("bpp", "entropy_bpp")]
            cells = [Cell(point.label, point.label), *(Cell() if v is None else Cell(f"{v:.5f}", v) for v in values)]
            cells += [Cell(m.text(point.means.get(m.key)), point.means.get(m.key)) for m in metrics]
            lines.append(Line(curve.name, "reference" if curve.kind == CODEC else curve.kind, cells))
    return Table("points", "Points of the rate-distortion curves", columns, lines, list(_notes(results)), "Curve")


def noise_table(results: Results) -> Table | None:
    """Build the table of PSNR, with SSIM below, at each strength of noise; None without any."""
    curves = read_noise(results)
    if not curves:
        return None
    strengths = sorted({point.level for curve in curves for point in curve.points})
    psnr, ssim = BY_KEY["psnr"], BY_KEY["ssim"]
    lines = []
    for curve in curves:
        means = {point.level: point.means for point in curve.points}
        cells = []
        for strength in strengths:
            found = means.get(strength, {})
            below = f"SSIM {ssim.text(found['ssim'])}" if "ssim" in found else ""
            cells.append(Cell(psnr.text(found.get("psnr")), found.get("psnr"), small=below))
        lines.append(Line(curve.name, curve.kind, cells))
    columns = [Column(f"n{i}", f"Noise {strength:g}", "dB", True) for i, strength in enumerate(strengths)]
    notes = [
        "PSNR of the clips decoded from the mode of the latents with Gaussian noise, whose standard deviation is given "
        "in those of the channels.",
        *_note_missing(results, noise=True),
    ]
    return Table("noise", "Robustness to noise on the latents", columns, lines, notes)


def tables(results: Results) -> list[Table]:
    """Build the tables that there are."""
    return [table for build in (bd_table, points_table, noise_table) if (table := build(results))]


def _notes(results: Results) -> Iterator[str]:
    """Say where the tables of each row's coder come from."""
    settings: dict[str, list[str]] = {}
    for row in results.rows:
        if not (chosen := row.get("rate_distortion")):
            continue
        text = "sent with each clip, 6 bytes a channel, which count"
        if chosen["tables"] == "val":
            text = f"fitted on {chosen['clips']:,} validation clips or all of fewer, and not sent"
        settings.setdefault(text, []).append(row["name"])
    yield from (f"Ranges and probabilities of the latents are {text}." for text in settings)
    if any(row.get("coding") for row in results.rows):
        yield "Codecs: bytes of the packets, without a container."
    yield from _note_missing(results, noise=False)


# --- files ---


def write(results: Results) -> None:
    """Write `curves.csv` and `bd.csv`; without curves an older one is removed."""
    columns = ["curve", "kind", "row", "point", "level", "bpp", "entropy_bpp", *(metric.key for metric in _METRICS)]
    every = [("rate", curve) for curve in read(results)] + [("noise", curve) for curve in read_noise(results)]
    lines = [
        [axis, curve.name, curve.kind, point.row, point.label, point.level, *map(point.means.get, columns[5:])]
        for axis, curve in every
        for point in curve.points
    ]
    _write(results, "curves.csv", ["axis", *columns], lines)
    deltas = [
        [curve.name, curve.kind, anchor.name, delta.rate, delta.psnr, *map(delta.reasons.get, ("rate", "psnr"))]
        for anchor, curve, delta in list_deltas(results)
    ]
    if deltas and _load() is None and inside(results.folder, "bd.csv").exists():
        log("bd.csv stays as it is: pip install 'vidtwin[rates]', which computes BD-rates")
        return
    _write(results, "bd.csv", ["curve", "kind", "anchor", "bd_rate", "bd_psnr", "no_bd_rate", "no_bd_psnr"], deltas)


def _write(results: Results, name: str, columns: list[str], lines: list[list[Any]]) -> None:
    path = inside(results.folder, name)
    if lines:
        write_text(path, format_table(columns, lines))
    else:
        path.unlink(missing_ok=True)
