"""`report.html`: one page that shows a results folder, made from its files alone.

The page asks the network for nothing: styles, script, numbers and pictures are in it, and its content security policy
forbids the rest. `report_assets/report.js` sorts tables, chooses a plot, draws the clips' values and plays the clips.
"""

import math
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vidtwin.benchmark import (
    analysis_files,
    analysis_plots,
    analysis_tables,
    curve_plots,
    curves,
    plots,
    rows,
    statistics_tables,
    summary,
)
from vidtwin.benchmark.pages import Assets, as_json, read_strip
from vidtwin.benchmark.protocol import flat
from vidtwin.benchmark.rows import Results, Row
from vidtwin.errors import few
from vidtwin.files import write_text


def write(folder: str | Path) -> Path:
    """Write `report.html` of a results folder; return its path."""
    results = rows.read(folder)
    path = results.folder / "report.html"
    write_text(path, render(results))
    return path


def render(results: Results) -> str:
    """Render the page of a results folder."""
    strips: list[str] = []
    data = _data(results, strips)
    tables = [
        *statistics_tables.build(results),
        *curves.tables(results),
        *analysis_tables.build(results),
        *(
            table
            for build in (summary.cost_table, summary.downstream_table, summary.codebook_table)
            if (table := build(results))
        ),
    ]
    return Assets.load("vidtwin.benchmark", "report_assets", "report").render(
        results=results,
        title=summary.data_set(results),
        facts=_facts(results),
        quality=summary.quality_table(results),
        tables=tables,
        published=summary.published_table(results),
        protocol=_pairs({"hash": results.protocol_hash, **flat(results.protocol | {"skipped": {}})}),
        models=[(row["name"], _pairs(_facts_of_model(row))) for row in rows.order(results)],
        missing=list(_missing_clips(results)),
        marks={model["name"]: model for model in data["models"]},
        markers=plots.MARKERS,
        data=as_json(data),
        strips=strips,
        drawings=[*plots.drawings(results), *curve_plots.drawings(results), *analysis_plots.drawings(results)],
    )


def _facts(results: Results) -> list[tuple[str, str]]:
    """List the facts that a reader must know before the numbers."""
    times = [
        datetime.fromtimestamp((results.folder / "rows" / row["name"] / "results.json").stat().st_mtime, UTC).date()
        for row in results.rows
    ]
    first, last = min(times), max(times)
    devices = sorted({row["device"] for row in results.rows if row.get("device")})
    clips = f"{results.comparison['num_clips']:,} that {summary.owners(results)} have, {summary.clip_format(results)}"
    return [
        ("Clips", clips),
        ("Protocol", f"{results.protocol['name']} ({results.protocol_hash})"),
        ("Device", few(devices) or "not kept"),
        ("Measured", f"{first}" if first == last else f"{first} to {last}"),
    ]


def _facts_of_model(row: Row) -> dict[str, Any]:
    """Collect the measured model, its checkpoint, the device and the versions of packages."""
    facts = {"kind": row["kind"], **flat(row.get("model") or {})}
    facts |= {key: row.get(key) for key in ("checkpoint", "fingerprint", "weights", "device", "error")}
    return {key: value for key, value in (facts | row.get("versions", {})).items() if value is not None}


def _pairs(facts: dict[str, Any]) -> list[tuple[str, str]]:
    """Write each value as text."""
    lists = {key: ", ".join(map(str, value)) for key, value in facts.items() if isinstance(value, (list, tuple))}
    return [(key, "none" if value in (None, "", {}) else str(value)) for key, value in (facts | lists).items()]


def _missing_clips(results: Results) -> Iterator[tuple[str, str, str]]:
    """Yield clips and videos without numbers: (model or "all", clip or video, reason)."""
    skipped = results.protocol.get("skipped", {})
    yield from (("all", name, reason) for name, reason in sorted(skipped.items()))
    for row in rows.order(results):
        own = row.get("skipped") or {}
        yield from ((row["name"], name, own[name]) for name in sorted(own) if name not in skipped)
        failed = {(clip["name"], clip["start_frame"]): clip["reason"] for clip in row.get("failed_clips") or []}
        lacks = {(name, start) for name, start in results.comparison["left_out"].get(row["name"], [])}
        for name, start in sorted({*failed, *lacks}):
            yield row["name"], f"{name}, frame {start}", failed.get((name, start), "no numbers of this model")


def _data(results: Results, strips: list[str]) -> dict[str, Any]:
    """Collect the numbers of each clip and the players: columns, since objects for each clip would be slow to read."""
    shown = summary.metrics(results)
    per_clip = {key for clips in results.clips.values() for clip in clips[:1] for key in clip}
    places: dict[rows.Key, int] = {}
    for clips in results.clips.values():
        for clip in clips:
            places.setdefault(rows.key_of(clip), len(places))
    measured = [row for row in rows.order(results) if row["kind"] != "failed"]
    common = rows.common_clips(results)
    looks = plots.looks(results)
    return {
        "metrics": [
            {key: getattr(metric, key) for key in ("key", "label", "unit", "higher", "digits")}
            | {"perClip": metric.key in per_clip}
            for metric in shown
        ],
        "markers": plots.MARKERS,
        "models": [
            {"name": row["name"], "kind": row["kind"], "colour": looks[row["name"]][0], "marker": looks[row["name"]][1]}
            for row in measured
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
        "content": _content(results, places),
        "players": _players(results, places, strips),
    }


def _content(results: Results, places: dict[rows.Key, int]) -> list[dict[str, Any]]:
    """List what is in each clip, in the order of `places`; nothing without an analysis."""
    clips = analysis_files.read_content(results.folder, results.protocol_hash)
    known = {rows.key_of(clip): clip for clip in clips}
    return [
        {"label": title, "values": [_number(known[key][measure]) if key in known else None for key in places]}
        for measure, title in (analysis_files.MEASURES if clips else {}).items()
    ]


def _column(clips: list[rows.Clip], metric: str, places: dict[rows.Key, int]) -> list[float | str | None]:
    """List a model's values of a metric in the order of `places`, to six digits; None for clips that it lacks."""
    column: list[float | str | None] = [None] * len(places)
    for clip in clips:
        if metric in clip:
            column[places[rows.key_of(clip)]] = _number(clip[metric])
    return column


def _number(value: float | None) -> float | str | None:
    """Write NaN and infinity, which JSON lacks, as words, which the script turns back."""
    if value is None:
        return None
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return float(f"{value:.6g}")


def _players(results: Results, places: dict[rows.Key, int], strips: list[str]) -> dict[str, Any] | None:
    """List the kept clips; each view's strip goes into `strips` as base64, and its number into the view."""
    kept = results.players
    if not kept or not kept["clips"]:
        return None
    clips = []
    for clip in kept["clips"]:
        views = []
        for view in clip["views"]:
            views.append({key: view[key] for key in ("title", "model", "kind")} | {"strip": len(strips)})
            strips.append(read_strip(results.folder, view["file"]))
        place = places.get((clip["name"], clip["start_frame"]))
        clips.append(
            {"clip": place, "name": clip["name"], "start": clip["start_frame"], "why": clip["why"], "views": views}
        )
    return {"fps": kept["fps"], "frames": kept["num_frames"], "clips": clips}
