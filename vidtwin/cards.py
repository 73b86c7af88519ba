"""Sections of a model card in Markdown, in which text from others (class names, paths, settings) stays text."""

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

_MARKUP = re.compile(r"[\\`*_\[\]|~]")
_ENTITIES = str.maketrans({"&": "&amp;", "<": "&lt;", ">": "&gt;"})
_SHORT = 12  # lines of a table that is shown without a click


def escape(text: Any, terminal: bool = False) -> str:
    """Escape text for Markdown, within a line: neither markup nor HTML.

    Args:
        text: Of any kind.
        terminal: Escape only `<` and `|`, which begin HTML and end a cell: the source reads well in a terminal too.
    """
    line = " ".join(str(text).split())
    if terminal:
        return line.replace("<", "\\<").replace("|", "\\|")
    return _MARKUP.sub(r"\\\g<0>", line).translate(_ENTITIES)


def code(text: Any, cell: bool = False) -> str:
    """Format text as code on one line, whatever backticks it holds; in a table's `cell` bars are escaped."""
    line = " ".join(str(text).split())
    runs = [len(run) for run in re.findall(r"`+", line)]
    fence = "`" * (max(runs, default=0) + 1)
    pad = " " if line.startswith("`") or line.endswith("`") or not line else ""
    return f"{fence}{pad}{line.replace('|', chr(92) + '|') if cell else line}{pad}{fence}"


def quote(text: str) -> str:
    """Write text as a string of Python and of JSON."""
    return json.dumps(text)


def table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> list[str]:
    """List the lines of a table of cells that are Markdown already."""
    return [f"| {' | '.join(cells)} |" for cells in (head, ["---"] * len(head), *lines)]


def training_section(record: Mapping[str, Any]) -> list[str]:
    """List the lines of the section on the training, from `training_record`; none if the record is empty.

    Args:
        record: Plain values, nested in dictionaries.
    """
    pairs = list(_flatten(record))
    if not pairs:
        return []
    return ["## Training", "", *settings_table(dict(pairs), "All settings")]


def settings_table(settings: Mapping[str, Any], title: str) -> list[str]:
    """List the lines of a table of settings and values as code; a long one opens at a click on its `title`."""
    cells = [[code(key, True), code(value, True)] for key, value in settings.items()]
    lines = table(["setting", "value"], cells)
    if len(cells) <= _SHORT:
        return lines
    return [f"<details><summary>{title}</summary>", "", *lines, "", "</details>"]


def _flatten(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    for key, value in record.items():
        if isinstance(value, Mapping) and value:
            yield from _flatten(value, f"{prefix}{key}.")
        elif value is not None and value != {}:
            yield f"{prefix}{key}", value if isinstance(value, str) else json.dumps(value, default=str)
