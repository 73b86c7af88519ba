"""`vidtwin report`: table, plots and page of a results folder, from its files alone.

Nothing heavy is imported at the top: `vidtwin --help` reads the docstring of the command.
"""

import argparse
import sys
from pathlib import Path
from typing import NoReturn

from vidtwin.errors import UserError

_DESCRIPTION = """\
Make again what can be made from the files of a results folder: the means over the clips that all rows have, the table,
the plots and the page.

  vidtwin report results

It reads protocol.json, rows/*/results.json, rows/*/clips.csv and players/, measures nothing and needs no model, no
data and no GPU. Remove rows/NAME to leave a model out; rFVD over the clips that then are common needs `vidtwin test`.
It writes comparison.json, table.csv, table.md, table.tex, plots/ and report.html, a page in one file that opens from
disk and asks the network for nothing.
"""


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"vidtwin report: {message}; see vidtwin report --help.")


def report_command(argv: list[str]) -> int:
    """Make table, plots and page of a results folder again: vidtwin report RESULTS"""
    parser = _Parser(
        "vidtwin report",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("results", type=Path, metavar="RESULTS", help="folder that `vidtwin test` wrote")
    folder = parser.parse_args(argv).results

    from vidtwin.benchmark import plots, render, report, rows

    rows.write_comparison(folder, rows.read(folder).comparison)
    sys.stdout.write(f"{render.write(folder)}\n")
    written = [folder / "comparison.json", *(folder / f"table.{kind}" for kind in ("csv", "md", "tex"))]
    for path in [*written, *plots.write(folder), report.write(folder)]:
        sys.stdout.write(f"{path}\n")
    return 0
