"""Write and read tables as .csv files, without words that a spreadsheet would take for a formula."""

import csv
import io
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vidtwin.files import replacing

# Of a text that begins like a formula, be it behind apostrophes, which mark an escaped one.
_FORMULA = re.compile(r"'*[=+\-@\t\r]")
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)


def escape(cell: Any) -> Any:
    """Escape a text that spreadsheets would take for a formula by an apostrophe before it.

    Numbers, also as text, stay. `unescape` gives every text back; one that was never escaped, as those of older files,
    stays unless it begins with apostrophes before a formula.
    """
    formula = isinstance(cell, str) and _FORMULA.match(cell) and not _NUMBER.fullmatch(cell)
    return f"'{cell}" if formula else cell


def unescape(cell: str) -> str:
    """Invert `escape`."""
    return cell[1:] if cell.startswith("'") and _FORMULA.match(cell) else cell


def format_table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Format a header and rows as CSV with escaped cells; None is an empty cell."""
    text = io.StringIO()
    for row in (columns, *rows):
        line = io.StringIO()
        csv.writer(line).writerow(map(escape, row))  # with its own line ends, or it would not quote a lone "\r"
        text.write(line.getvalue().removesuffix("\r\n") + "\n")
    return text.getvalue()


def write_table(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Write a header and rows as a .csv file, atomically; cells as of `format_table`, names of files by their bytes."""
    with replacing(path) as temporary:
        temporary.write_bytes(format_table(columns, rows).encode(errors="surrogateescape"))


def read_table(path: Path, odd_names: bool = False) -> list[dict[str, str]]:
    """Read the rows of a file of `write_table`, by its columns; with `odd_names` also names that are not UTF-8.

    Raises:
        OSError: It can't be read.
        ValueError: It is not UTF-8 (without `odd_names`), or a row has more or fewer cells than the header.
    """
    # A spreadsheet puts a byte order mark at the beginning.
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape" if odd_names else "strict") as file:
        try:
            header, *rows = ([unescape(cell) for cell in row] for row in csv.reader(file, strict=True) if row)
        except csv.Error as error:
            raise ValueError(f"no table: {error}") from error
    if wrong := [number for number, row in enumerate(rows, 2) if len(row) != len(header)]:
        raise ValueError(f"{len(header)} columns, but not in row {wrong[0]}")
    return [dict(zip(header, row, strict=True)) for row in rows]
