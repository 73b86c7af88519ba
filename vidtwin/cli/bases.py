"""Configs that build on another: `base: FILE` on a line of its own, relative to the config that has it.

`--config VARIANT` is read as `--config BASE --config VARIANT`, so a variant states only what differs.
"""

import re
from collections.abc import Iterable
from pathlib import Path

import yaml

from vidtwin.cli import paths
from vidtwin.errors import UserError

_BASE = re.compile(r"^\ufeff?base:.*$", re.MULTILINE)  # Windows editors put a byte order mark in front


def expand(argv: list[str]) -> list[str]:
    """Put the bases of each `--config FILE` in front of it."""
    expanded: list[str] = []
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if option in ("--config", "-c"):
            value = value if equals else next(words, "")
            if not value or value.startswith("--"):  # the parser reports the missing value
                expanded += [word, value] if value else [word]
                continue
            expanded += [f"--config={path}" for path in chain(value)[:-1]]
            expanded += [word] if equals else [word, value]
        else:
            expanded.append(word)
    return expanded


def expand_paths(configs: Iterable[str | Path], foreign: bool = False) -> list[str | Path]:
    """Put the bases of each config in front of it; `foreign` as of `chain`."""
    return [each for config in configs for each in chain(config, foreign)]


def chain(config: str | Path, foreign: bool = False) -> list[str | Path]:
    """Return the bases of a config, the first one first, and the config itself.

    `~` and variables in the bases' paths are expanded, except in `foreign` configs, which others wrote.
    """
    found: list[str | Path] = [config]
    while base := _base(Path(found[0]), foreign):
        if base.resolve() in {Path(each).resolve() for each in found}:
            raise UserError(f"Expected a base that does not lead back to {base}, got it in {found[0]}.")
        if not base.is_file():
            raise UserError(
                f"Expected a config at {base}, the base of {found[0]}, got no such file; correct base or create it."
            )
        found.insert(0, base)
    return found


def remove(content: str) -> str:
    """Remove the line `base: FILE` from the text of a config; other lines keep their numbers."""
    return _BASE.sub("", content)


def _base(config: Path, foreign: bool) -> Path | None:
    try:
        text = config.read_text(encoding="utf-8")
        line = yaml.safe_load(match[0]) if (match := _BASE.search(text)) else {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError, ValueError):
        return None  # no file, or none that the parser can read: its error says so
    base = line.get("base")
    if base is not None and not isinstance(base, str):
        raise UserError(f"Expected the path of one config after base: in {config}, got {base!r}.")
    return config.parent / (base if foreign else paths.expand_text(base)) if base else None
