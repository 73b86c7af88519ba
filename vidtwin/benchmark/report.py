"""`report.html`: one page that shows a results folder, made from its files alone.

The page asks the network for nothing: styles, script, numbers and the players' pictures are in it, and its content
security policy forbids the rest. Tables are HTML; `report_assets/report.js` sorts them, draws the plots and plays the
clips.
"""

import base64
import hashlib
import json
import math
from datetime import UTC, datetime
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2

from vidtwin.benchmark import plots, published, report_tables, rows
from vidtwin.benchmark.rows import Results, Row
from vidtwin.errors import UserError, few
from vidtwin.files import write_text

# Outlines around (0, 0), about 10 wide, told apart without colour. A reference has the last one.
MARKERS = (
    "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",  # circle
    "M-4.4 -4.4H4.4V4.4H-4.4Z",  # square
    "M0 -5.4L5.2 4.2H-5.2Z",  # triangle
    "M0 -6.2L5.2 0L0 6.2L-5.2 0Z",  # diamond
    "M0 5.4L5.2 -4.2H-5.2Z",  # triangle on its tip
    "M-1.8 -5.4H1.8V-1.8H5.4V1.8H1.8V5.4H-1.8V1.8H-5.4V-1.8H-1.8Z",  # plus
    "M0 -6L1.6 -2.2L5.7 -1.9L2.6 0.8L3.5 4.9L0 2.7L-3.5 4.9L-2.6 0.8L-5.7 -1.9L-1.6 -2.2Z",  # star
    "M-5 -3.2L-3.2 -5L0 -1.8L3.2 -5L5 -3.2L1.8 0L5 3.2L3.2 5L0 1.8L-3.2 5L-5 3.2L-1.8 0Z",  # cross
)
COLOURS = 7  # --c0 to --c6 in report.css


def write(folder: str | Path) -> Path:
    """Write `report.html` of a results folder → its path."""
    results = rows.read(folder)
    path = results.folder / "report.html"
    write_text(path, render(results))
    return path


def render(results: Results) -> str:
    """The page of a results folder."""
    assets = resources.files("vidtwin.benchmark") / "report_assets"
    template, style, script = (
        (assets / name).read_text(encoding="utf-8") for name in ("template.html", "report.css", "report.js")
    )
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters["base64"] = lambda text: base64.b64encode(text.encode()).decode()
    strips: list[str] = []
    data = _data(results, strips)
    names = [row["name"] for row in results.rows]
    beside = published.beside(results.protocol, names)
    tables = [
        report_tables.cost(results),
        report_tables.downstream(results),
        report_tables.codebooks(results),
    ]
    return environment.from_string(template).render(
        results=results,
        title=results.protocol.get("dataset") or results.protocol["data"].get("data", "video clips"),
        facts=_facts(results),
        quality=report_tables.quality(results),
        published=report_tables.published(beside),
        tables=[table for table in tables if table],
        protocol=report_tables.protocol(results),
        models=report_tables.models(results),
        lost=report_tables.lost(results),
        marks={model["name"]: model for model in data["models"]},
        markers=MARKERS,
        data=_json(data),
        strips=strips,
        drawings=plots.drawings(results),
        style=style,
        script=script,
        style_hash=_digest(style),
        script_hash=_digest(script),
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """What a reader must know before the numbers."""
    data = results.protocol["data"]
    size = data.get("resolution")
    clip = f"{data['num_frames']} frames" if "num_frames" in data else "of the data module's length"
    clip += f" of {size} x {size}" if size else ""
    clip += f" at {data['fps']:g} fps" if data.get("fps") else ""
    times = [
        datetime.fromtimestamp((results.folder / "rows" / row["name"] / "results.json").stat().st_mtime, UTC).date()
        for row in results.rows
    ]
    first, last = min(times), max(times)
    devices = sorted({row["device"] for row in results.rows if row.get("device")})
    return [
        ("Clips", f"{results.comparison['num_clips']:,} that all models have, {clip}"),
        ("Protocol", f"{results.protocol['name']} ({results.protocol_hash})"),
        ("Device", few(devices) or "not kept"),
        ("Measured", f"{first}" if first == last else f"{first} to {last}"),
    ]


def _data(results: Results, strips: list[str]) -> dict[str, Any]:
    """What the plots and players are drawn from: columns, since objects for each clip would be slow to read."""
    shown = report_tables.metrics(results)
    per_clip = {key for clips in results.clips.values() for clip in clips[:1] for key in clip}
    places: dict[rows.Key, int] = {}
    for clips in results.clips.values():
        for clip in clips:
            places.setdefault(rows.key_of(clip), len(places))
    measured = [row for row in rows.order(results) if row["kind"] != "failed"]
    common = rows.common_clips(results.clips)
    return {
        "metrics": [
            {
                "key": metric.key,
                "label": metric.label,
                "unit": metric.unit,
                "higher": metric.higher,
                "digits": metric.digits,
                "perClip": metric.key in per_clip,
            }
            for metric in shown
        ],
        "markers": MARKERS,
        "models": [
            {
                "name": row["name"],
                "kind": row["kind"],
                **_mark(index, row),
            }
            for index, row in enumerate(measured)
        ],
        "clips": {
            "names": [name for name, _ in places],
            "starts": [start for _, start in places],
            "partial": [place for key, place in places.items() if key not in common],
            "values": {
                metric.key: [_column(results.clips[row["name"]], metric.key, places) for row in measured]
                for metric in shown
                if metric.key in per_clip
            },
        },
        "players": _players(results, places, strips),
    }


def _mark(index: int, row: Row) -> dict[str, Any]:
    """Colour and marker: both change from one model to the next, so that 49 models have one of their own."""
    if row["kind"] == "reference":
        return {"colour": "reference", "marker": len(MARKERS) - 1}
    return {"colour": f"c{index % COLOURS}", "marker": (index + index // COLOURS) % (len(MARKERS) - 1)}


def _column(clips: list[rows.Clip], metric: str, places: dict[rows.Key, int]) -> list[float | str | None]:
    """A model's values of a metric in the order of `places`, to six digits; None for clips that it lacks."""
    column: list[float | str | None] = [None] * len(places)
    for clip in clips:
        if metric in clip:
            column[places[rows.key_of(clip)]] = _number(clip[metric])
    return column


def _number(value: float | None) -> float | str | None:
    """JSON has no NaN and no infinity: as words, which the script turns back."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.6g}")


def _players(results: Results, places: dict[rows.Key, int], strips: list[str]) -> dict[str, Any] | None:
    """The kept clips; each view's strip goes into `strips` as base64, and its number into the view."""
    kept = results.players
    if not kept or not kept["clips"]:
        return None
    clips = []
    for clip in kept["clips"]:
        views = []
        for view in clip["views"]:
            views.append({key: view[key] for key in ("title", "model", "kind")} | {"strip": len(strips)})
            strips.append(_strip(results.folder, view["file"]))
        place = places.get((clip["name"], clip["start_frame"]))
        clips.append(
            {"clip": place, "name": clip["name"], "start": clip["start_frame"], "why": clip["why"], "views": views}
        )
    return {"fps": kept["fps"], "frames": kept["num_frames"], "clips": clips}


def _strip(folder: Path, file: str) -> str:
    path = folder / file
    if not path.resolve().is_relative_to(folder.resolve()):
        raise UserError(
            f"Expected players' files inside {folder}, got {file}; remove players/ and run the sweep again."
        )
    content = path.read_bytes() if path.is_file() else b""
    if content[:4] != b"RIFF" or content[8:12] != b"WEBP":
        raise UserError(
            f"Expected a WebP picture in {path}, got {'another file' if content else 'none'}; remove {path.parents[1]} "
            "and run the sweep again, or remove the folder players."
        )
    return base64.b64encode(content).decode()


def _json(data: dict[str, Any]) -> str:
    """JSON that ends no script element and opens none, whatever the names hold."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _digest(text: str) -> str:
    """As a content security policy names a style or a script."""
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
