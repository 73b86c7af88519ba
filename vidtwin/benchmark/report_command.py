"""`vidtwin report`: table, plots and page of a results folder, from its files alone."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "RESULTS"
DESCRIPTION = """\
Make again what can be made from the files of a results folder: the means over the clips that all trained rows have,
the table, the plots and the page.

  vidtwin report results

It reads protocol.json, rows/*/results.json, rows/*/clips.csv and players/, measures nothing and needs no model, no
data and no GPU. Remove rows/NAME to leave a model out; rFVD over the clips that then are common needs `vidtwin test`.
It writes comparison.json, table.csv, table.md, table.tex, plots/ and report.html, a page in one file that opens from
disk and asks the network for nothing.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the folder."""
    parser.add_argument("results", metavar="RESULTS", help="Folder that `vidtwin test` wrote.")


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    from vidtwin.benchmark import analysis_plots, curve_plots, plots, render, report, rows, statistics

    folder = Path(options.results)
    results = rows.read(folder)
    rows.write_comparison(folder, results.comparison | {"statistics": statistics.of(results)})
    sys.stdout.write(f"{render.write(folder)}\n")
    written = [folder / "comparison.json", *(folder / f"table.{kind}" for kind in ("csv", "md", "tex"))]
    drawn = [*plots.write(folder), *curve_plots.write(folder), *analysis_plots.write(folder)]
    for path in [*written, *drawn, report.write(folder)]:
        sys.stdout.write(f"{path}\n")
    return 0
