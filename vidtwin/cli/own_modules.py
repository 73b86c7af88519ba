"""Modules of the user's own: those that the command line or its configs name, and those of --trust_module.

The current folder is searched for modules only then: what lies in it may come from others.
"""

import os
import re
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from vidtwin import plugins
from vidtwin.errors import UserError

_OPTION = "--trust_module"
_FIRST_NAME = re.compile(r"(?<![\w./-])([A-Za-z_]\w*)\.[A-Za-z_]")
_CONFIG_NAME = re.compile(r"[^\s'\"=,:{}\[\]]+\.(?:ya?ml|json)\b")


@contextmanager
def admit(argv: list[str]) -> Iterator[list[str]]:
    """Yield `argv` without --trust_module; inside, the named modules can be imported, also from the current folder."""
    words, modules = _split(argv)
    folder = plugins.current_folder()
    found = (match for text in _texts(words) for match in _FIRST_NAME.findall(text))
    added = folder not in ("", *sys.path) and (bool(modules) or any(map(_lies_here, found)))
    if added:
        sys.path.append(folder)
    try:
        with plugins.trusting(modules):
            yield words
    finally:
        if added and folder in sys.path:
            sys.path.remove(folder)


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    words: list[str] = []
    modules: list[str] = []
    waiting = iter(argv)
    for word in waiting:
        option, equals, value = word.partition("=")
        if option != _OPTION:
            words.append(word)
            continue
        module = value if equals else next(waiting, "")
        if not all(part.isidentifier() for part in module.split(".")):
            raise UserError(f"Expected {_OPTION} MODULE, as Python imports it, got {module!r}.")
        modules.append(module)
    return words, modules


def _texts(words: Iterable[str]) -> Iterator[str]:
    """Yield the words that are not files, and the texts of the configs that they and other configs name."""
    waiting: list[tuple[Path, Path]] = []
    for word in words:
        path = Path(word.partition("=")[2] or word)
        if path.suffix in (".yaml", ".yml", ".json"):
            waiting.append((Path(), path))
        elif not os.path.exists(path):
            yield word
    seen: set[Path] = set()
    for folder, name in waiting:  # grows while it is iterated
        for config in {(folder / name).resolve(), name.resolve()} - seen:
            seen.add(config)
            if os.path.isfile(config):
                text = config.read_text(encoding="utf-8", errors="replace")
                waiting += [(config.parent, Path(other)) for other in _CONFIG_NAME.findall(text)]
                yield re.sub(r"(^|\s)#.*", "", text)  # comments name options and files


def _lies_here(module: str) -> bool:
    return Path(f"{module}.py").is_file() or any(Path(module).glob("*.py"))
