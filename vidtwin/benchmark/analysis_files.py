"""Files of the analysis of a sweep: what its second pass has written, for tables and plots, which import no torch."""

from pathlib import Path
from typing import Any

from vidtwin.benchmark import rows
from vidtwin.console import log
from vidtwin.errors import UserError
from vidtwin.tables import read_table

VERSION = 1  # of what is computed: a higher one makes all files anew
ANALYSIS, CONTENT = "analysis.json", "content.csv"

MEASURES = {
    "motion": "Motion (px a frame)",
    "change": "Change (steps of 255)",
    "texture": "Texture (steps of 255 a px)",
    "cuts": "Cuts",
}
"""Titles by the names of what `clip_content.measure_content` returns."""


def read_analysis(folder: Path, row: rows.Row) -> dict[str, Any] | None:
    """Read the analysis of a row in its folder; None if it is missing, damaged (logged), or of another measurement."""
    path = folder / ANALYSIS
    if not path.exists():
        return None
    try:
        found = rows.read_json(path)
    except UserError as error:
        log(f"{row['name']} has no analysis: {error}")
        return None
    current = found.get("version") == VERSION and found.get("row_identity") == row.get("identity")
    # Clips that failed may have been measured since.
    return found if current and len(found["clips"]) == row["num_clips"] else None


def read_all(results: rows.Results) -> dict[str, dict[str, Any]]:
    """Read the analyses of all rows that have one, in the order of the table, with the common clips alone."""
    common = rows.common_clips(results)
    found = {}
    for row in rows.order(results):
        each = read_analysis(results.folder / "rows" / row["name"], row) if row["kind"] != "failed" else None
        clips = [clip for clip in each["clips"] if rows.key_of(clip) in common] if each else []
        if each and clips:
            found[row["name"]] = each | {"clips": clips}
    return found


def read_content(folder: Path, protocol_hash: str) -> list[rows.Clip]:
    """Read `content.csv` of a results folder: name, start frame and `MEASURES` of each clip.

    Returns:
        Nothing if the file is missing, damaged (logged) or of another protocol.
    """
    path = folder / CONTENT
    if not path.exists():
        return []
    try:
        lines = read_table(path)
        if any(line["protocol_hash"] != protocol_hash for line in lines):
            return []
        return [
            {"name": line["name"], "start_frame": int(line["start_frame"])}
            | {key: float(line[key]) for key in MEASURES}
            for line in lines
        ]
    except (OSError, KeyError, ValueError) as error:
        log(f"Expected a line for each clip in {path}, got none that can be read ({error}).")
        return []
