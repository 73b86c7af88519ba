"""The table of a results folder, made from its files alone."""

import csv
import io
import json
from pathlib import Path
from typing import Any

from vidtwin.files import write_text

Row = dict[str, Any]

COLUMNS = ("model", "parameters", "rate (%)", "bits/pixel", "PSNR (dB)", "SSIM", "LPIPS", "clips", "note")
LEFT = (0, len(COLUMNS) - 1)  # texts; the others are numbers


def read_rows(folder: Path) -> list[Row]:
    """Every `rows/<name>/results.json`: trained models by falling PSNR, then untrained ones, then references."""
    rows = [json.loads(path.read_text()) for path in sorted(folder.glob("rows/*/results.json"))]
    kinds = ["trained", "untrained", "reference"]
    return sorted(rows, key=lambda row: (kinds.index(row["kind"]), -row["metrics"]["psnr"]["mean"]))


def cells(row: Row) -> tuple[str, ...]:
    """One row as text, in the order of `COLUMNS`."""

    def metric(name: str, digits: int) -> str:
        value = row["metrics"][name]
        return value if isinstance(value, str) else f"{value['mean']:.{digits}f}"

    return (
        row["name"],
        f"{row['parameters']:,}",
        f"{100 * row['compression_rate']:.4f}",
        "" if row["bits_per_pixel"] is None else f"{row['bits_per_pixel']:.5f}",  # of continuous numbers: not known
        metric("psnr", 2),
        metric("ssim", 4),
        metric("lpips", 4),
        str(row["num_clips"]),
        {"trained": "", "untrained": "untrained weights: not ranked", "reference": "reference"}[row["kind"]],
    )


def markdown(rows: list[Row]) -> str:
    """A Markdown table with aligned columns, which reads well in a terminal too."""
    lines = [COLUMNS, *(cells(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(COLUMNS))]
    texts = [
        "| "
        + " | ".join(c.ljust(w) if i in LEFT else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
        + " |"
        for line in lines
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in LEFT else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([texts[0], rule, *texts[1:]]) + "\n"


def write(folder: Path) -> str:
    """Write `table.csv` and `table.md` of a results folder → the table as Markdown."""
    rows = read_rows(folder)
    text = markdown(rows)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow([*COLUMNS, "protocol_hash"])
    writer.writerows([*cells(row), row["protocol_hash"]] for row in rows)
    write_text(folder / "table.csv", buffer.getvalue())
    write_text(folder / "table.md", text)
    return text
