"""The rows of a results folder: one model's measurement each, and means over the clips that all trained ones have.

protocol.json, videos.json                the protocol, the same for every row; a digest of each test video
rows/<name>/results.json, clips.csv       the model, its rates, costs and means; a line for each clip
comparison.json                           means over the common clips
players/players.json                      clips kept for the report's players
"""

import hashlib
import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from vidtwin.benchmark.protocol import protocol_hash
from vidtwin.errors import UserError, few
from vidtwin.files import inside, parse_json, write_text
from vidtwin.metrics.registry import PER_CLIP
from vidtwin.tables import read_table, write_table

SCHEMA_VERSION = 2
FLOOR = 0.5  # of the test clips: with fewer common ones nothing is ranked
KINDS = ("trained", "untrained", "reference", "failed")

Row = dict[str, Any]
Clip = dict[str, Any]
Key = tuple[str, int]
Unit = tuple[str, int, dict[str, float]]
_IDENTITY = ("model", "name", "start_frame", "num_frames")


@dataclass
class Results:
    """The content of a results folder.

    Attributes:
        folder: Its path.
        protocol: That of all rows.
        protocol_hash: Its hash.
        rows: Each `results.json`, by name.
        clips: By a row's name, its clips' numbers.
        comparison: Means over the clips that all trained rows have; see `compare`.
        players: The content of `players.json`; empty without it.
    """

    folder: Path
    protocol: dict[str, Any]
    protocol_hash: str
    rows: list[Row]
    clips: dict[str, list[Clip]]
    comparison: dict[str, Any] = field(default_factory=dict)
    players: dict[str, Any] = field(default_factory=dict)


def read(folder: str | Path) -> Results:
    """Read a results folder; `UserError` if it is missing, empty, truncated or of several protocols."""
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"Expected a results folder, got {folder}, which does not exist.")
    paths = sorted(folder.glob("rows/*/results.json"))
    if not paths:
        raise UserError(f"Expected rows/<name>/results.json in {folder}, got none; `vidtwin test` writes them.")
    protocol = read_json(folder / "protocol.json")
    digest = protocol_hash(protocol)
    rows = [read_row(path) for path in paths]
    if foreign := [row["name"] for row in rows if row.get("protocol_hash") != digest]:
        raise UserError(
            f"Expected rows of protocol {digest} in {folder}, got others: {few(foreign)}; they can't be compared. "
            "Move them to a folder of their own."
        )
    for path, row in zip(paths, rows, strict=True):
        if inside(folder, f"rows/{row['name']}") != path.parent:
            raise UserError(
                f"Expected the row of {path.parent.name} in {path}, got that of {row['name']!r}; remove it."
            )
    clips = {row["name"]: read_clips(folder / "rows" / row["name"], row) for row in rows if row["kind"] != "failed"}
    results = Results(folder, protocol, digest, rows, clips)
    kept = inside(folder, "comparison.json")
    results.comparison = compare(results, read_json(kept) if kept.exists() else {})
    players = inside(folder, "players/players.json")
    results.players = read_json(players) if players.exists() else {}
    if results.players and not isinstance(results.players.get("clips"), list):
        raise UserError(f"Expected a list of clips in {players}, got none; remove it and run the sweep again.")
    return results


_NEEDED = {"name": str, "num_clips": int, "metrics": dict, "latents": dict, "compression_rate": int | float}
_PARTS: dict[str, dict[str, Any]] = {  # which not every row has
    "coding": {"curve": str, "settings": str, "numbers": bool},
    "rate_distortion": {"tables": str, "clips": int},
    "windows": {"num_frames": int, "windows": int | None},
}


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object of a results folder; `UserError` for a file that is absent or cut off."""
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"Expected {path}, got no such file; run the sweep again.") from error
    except ValueError as error:
        raise UserError(
            f"Expected JSON in {path}, got a file that is cut off or damaged ({error}); remove it and run the sweep "
            "again, which measures that again alone."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"Expected a JSON object in {path}, got a {type(content).__name__}.")
    return content


def read_row(path: Path) -> Row:
    """Read one `results.json` of this version's form."""
    row = read_json(path)
    if row.get("schema_version") != SCHEMA_VERSION or row.get("kind") not in KINDS:
        raise UserError(
            f"Expected a row of schema_version {SCHEMA_VERSION} in {path}, got {row.get('schema_version')} "
            f"(kind {row.get('kind')}); it is of another version of vidtwin: measure into another results folder."
        )
    needed = {"name": str} if row["kind"] == "failed" else _NEEDED
    wrong = [key for key, kind in needed.items() if not isinstance(row.get(key), kind)]
    wrong += [key for key in ("seed_of",) if not isinstance(row.get(key), str | None)]
    for key, kinds in _PARTS.items():
        part = row.get(key) or {}
        whole = isinstance(part, dict) and all(isinstance(part.get(name), kind) for name, kind in kinds.items())
        wrong += [key] if part and not whole else []
    if wrong:
        raise UserError(f"Expected {few(wrong)} of a row in {path}, got none of this kind; measure the row again.")
    return row


def read_clips(folder: Path, row: Row) -> list[Clip]:
    """Read `clips.csv` in a row's own folder, numbers as numbers; `UserError` if it is cut off."""

    def parse(line: dict[str, str]) -> Clip:
        return {"model": line["model"], **{m: float(line[m]) for m in PER_CLIP if m in line}}

    return read_lines(folder / "clips.csv", row, parse)


def read_lines(
    path: Path, row: Row, parse: Callable[[dict[str, str]], Clip], count: Callable[[list[Clip]], int] = lambda _: 1
) -> list[Clip]:
    """Read a table of a row's clips: name, start and number of frames of each, and what `parse` makes of the rest.

    Args:
        path: Of the table, whose last column is the hash of the protocol.
        row: The row.
        parse: From the texts of a line; any error says that the table can't be read.
        count: Number of lines for each clip, by all of them.

    Raises:
        UserError: The table is missing, damaged or cut off.
    """
    try:
        lines = read_table(path)
        clips = [
            {
                "name": line["name"],
                **{key: int(line[key]) for key in ("start_frame", "num_frames")},
                **parse(line),
            }
            for line in lines
        ]
        # The last column: a line that was cut off lacks it, or a part of it.
        whole = all(line["protocol_hash"] == row["protocol_hash"] for line in lines)
    except (OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(
            f"Expected lines for each clip in {path}, got none that can be read ({error}); run the sweep again."
        ) from error
    wanted = row["num_clips"] * count(clips)
    if not whole or len(clips) != wanted:
        raise UserError(
            f"Expected {wanted} whole lines in {path}, got {len(clips)}; remove {path.parent} and run "
            "the sweep again, which measures that row again alone."
        )
    return clips


def write_row(folder: Path, row: Row, clips: list[Clip]) -> None:
    """Write `clips.csv`, then `results.json`, without which a folder has no row."""
    target = inside(folder, f"rows/{row['name']}")
    metrics = [metric for metric in PER_CLIP if clips and metric in clips[0]]
    columns = [*_IDENTITY, *metrics]
    lines = ([*(clip[key] for key in columns), row["protocol_hash"]] for clip in clips)
    write_table(target / "clips.csv", [*columns, "protocol_hash"], lines)
    write_text(target / "results.json", json.dumps(row, indent=2) + "\n")


def key_of(clip: Clip) -> Key:
    """Return the name and start of a clip, by which it is the same in every model's row."""
    return clip["name"], clip["start_frame"]


def common_clips(results: Results) -> set[Key]:
    """Find the clips that every trained row has; without trained rows those that every row has."""
    trained = [row["name"] for row in results.rows if row["kind"] == "trained"]
    sets = [{key_of(clip) for clip in results.clips[name]} for name in trained or results.clips]
    return set.intersection(*sets) if sets else set()


def chosen_clips(results: Results, name: str) -> list[Clip]:
    """Return the clips of a row over which its means are taken."""
    common = common_clips(results)
    return [clip for clip in results.clips[name] if key_of(clip) in common]


def digest_of(keys: Iterable[Key]) -> str:
    """Compute the SHA-256 of a list of clips in order of their names."""
    return hashlib.sha256("".join(f"{name}\t{start}\n" for name, start in sorted(keys)).encode()).hexdigest()


def compare(results: Results, kept: dict[str, Any]) -> dict[str, Any]:
    """Average each row over the common clips.

    Args:
        results: The rows and their clips.
        kept: An earlier comparison. Its rFVD, which needs the clips' features, holds while the clips are the same.

    Returns:
        "num_clips" and "num_videos" of the common clips, "num_test_clips" of the data, "ranked" (whether the common
        clips are at least `FLOOR` of those), "clips_sha256", "left_out" (by row, the clips of other rows that it
        lacks), "counts" (by row, the number of clips of its means), "rows" (by row, "mean" and "std" of each metric;
        "rfvd" as in `results.json`).
    """
    common = common_clips(results)
    every: set[Key] = {key_of(clip) for clips in results.clips.values() for clip in clips}
    digest = digest_of(common)
    left_out = {
        name: sorted(every - {key_of(clip) for clip in clips})
        for name, clips in results.clips.items()
        if len(clips) < len(every)
    }
    rows: dict[str, dict[str, Any]] = {}
    counts: dict[str, int] = {}
    earlier = kept.get("rows", {}) if kept.get("clips_sha256") == digest else {}
    identities = {row["name"]: row.get("identity") for row in results.rows}
    earlier = {n: row for n, row in earlier.items() if kept.get("identities", {}).get(n) == identities.get(n)}
    for row in results.rows:
        name = row["name"]
        if name not in results.clips:
            continue
        chosen = chosen_clips(results, name)
        rows[name], counts[name] = means(chosen, results.protocol), len(chosen)
        if "rfvd" in row["metrics"]:
            known = earlier.get(name, {}).get("rfvd")
            whole = isinstance(known, dict) and known["num_clips"] == len(chosen)
            rows[name]["rfvd"] = known if whole else "unavailable"
            if len(chosen) == row["num_clips"]:  # the row's own clips are the common ones
                rows[name]["rfvd"] = row["metrics"]["rfvd"]
    total = max(len(every), results.protocol["data"].get("num_clips") or 0)
    return {
        "num_clips": len(common),
        "num_videos": len({name for name, _ in common}),
        "num_test_clips": total,
        "ranked": bool(common) and len(common) >= FLOOR * total,
        "clips_sha256": digest,
        "left_out": left_out,
        "counts": counts,
        "rows": rows,
        "identities": identities,
    }


def write_comparison(folder: Path, comparison: dict[str, Any]) -> None:
    """Write `comparison.json`."""
    write_text(folder / "comparison.json", json.dumps(comparison, indent=2) + "\n")


def means(clips: Sequence[Clip], protocol: dict[str, Any]) -> dict[str, dict[str, float | None]]:
    """Compute mean and sample standard deviation of each metric, weighted as the protocol says; `{}` without clips.

    "clip": each clip counts once. "frame": by its number of frames. "video": the clips of a video are averaged by
    their frames, then each video counts once; PSNR of one MSE per video is that of the mean of the clips' MSE.
    """
    if not clips:
        return {}
    units = units_of(clips, protocol)
    weights = [weight for _, weight, _ in units]
    return {
        name: {"mean": _mean(values, weights), "std": _deviation(values, weights)}
        for name in units[0][2]
        for values in [[found[name] for _, _, found in units]]
    }


def units_of(clips: Sequence[Clip], protocol: dict[str, Any]) -> list[Unit]:
    """List video, weight and numbers of each clip, or of each video if the protocol averages videos."""
    names = [metric for metric in PER_CLIP if clips and metric in clips[0] and metric != "mse"]
    average = protocol["average"]
    if average == "video":
        videos: dict[str, list[Clip]] = {}
        for clip in clips:
            videos.setdefault(clip["name"], []).append(clip)
        return [(video, 1, _of_video(parts, names, protocol)) for video, parts in videos.items()]
    return [
        (clip["name"], clip["num_frames"] if average == "frame" else 1, {name: clip[name] for name in names})
        for clip in clips
    ]


def psnr_of(mse: float, epsilon: float) -> float:
    """Compute −10 log10(MSE + epsilon), at most 100 dB, as `vidtwin.metrics.frames.decibels`."""
    return -10.0 * math.log10(max(mse + epsilon, 1e-10))


def _of_video(clips: list[Clip], names: list[str], protocol: dict[str, Any]) -> dict[str, float]:
    frames = [clip["num_frames"] for clip in clips]
    values = {name: _mean([clip[name] for clip in clips], frames) for name in names}
    if protocol["psnr"] == "video":
        values["psnr"] = psnr_of(_mean([clip["mse"] for clip in clips], frames), protocol["psnr_epsilon"])
    return values


def _mean(values: list[float], weights: list[int]) -> float:
    """Average by fsum: the mean is the same to the last bit whatever the order of the clips."""
    return math.fsum(value * weight for value, weight in zip(values, weights, strict=True)) / sum(weights)


def _deviation(values: list[float], weights: list[int]) -> float | None:
    """Estimate the standard deviation of which `values` are a sample; None for a single one.

    The variance is unbiased with weights too (reliability weights: frames of a clip are not independent): it is divided
    by sum(w) - sum(w^2) / sum(w), which is n - 1 for equal weights of 1.
    """
    if len(values) < 2:
        return None
    mean, total = _mean(values, weights), sum(weights)
    square = math.fsum((value - mean) ** 2 * weight for value, weight in zip(values, weights, strict=True))
    return math.sqrt(square / (total - sum(weight**2 for weight in weights) / total))


def look_up(found: dict[str, Any], path: str) -> Any:
    """Return the value at a dotted path of nested dictionaries; None if any part is absent."""
    value: Any = found
    for key in path.split("."):
        value = value.get(key) if isinstance(value, dict) else None
    return value


def order(results: Results) -> list[Row]:
    """Order trained models by falling PSNR over the common clips, then untrained, references, failed."""

    def place(row: Row) -> tuple[int, float, str]:
        found = results.comparison["rows"].get(row["name"], {}).get("psnr")
        return KINDS.index(row["kind"]), -found["mean"] if found else math.inf, row["name"]

    return sorted(results.rows, key=place)
