"""Expand `~` and `$VAR` in whatever the user writes: words of the command line, and values of configs.

Every command reads paths after this, so that all parts of it use the same folder. Values of files that come from others
(a checkpoint's class and arguments) stay as they are: a variable may hold a secret. Import nothing heavy.
"""

import os
import re
from collections.abc import Collection, Iterable
from typing import TypeVar

from vidtwin.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\})")
T = TypeVar("T")


def expand_words(argv: Iterable[str]) -> list[str]:
    """Expand the words of a command line, in `--option=value` the value; `expand` serves for those with a structure."""
    expanded = []
    for word in argv:
        option, equals, value = word.partition("=") if word.startswith("-") else ("", "", word)
        structured = value.lstrip()[:1] in ("{", "[")
        expanded.append(f"{option}{equals}{value if structured else expand_text(value)}")
    return expanded


def expand(value: T, foreign: Collection[str] = ()) -> T:
    """Expand every text in a parsed config, in its lists and in its classes' arguments.

    Args:
        value: A namespace is changed in place.
        foreign: Texts that others wrote; these stay.
    """
    from jsonargparse import Namespace

    if isinstance(value, str):
        return value if value in foreign else expand_text(value)  # type: ignore[return-value]
    if isinstance(value, Namespace):
        vars(value).update({key: expand(inner, foreign) for key, inner in vars(value).items()})
    elif isinstance(value, dict):
        return {key: expand(inner, foreign) for key, inner in value.items()}  # type: ignore[return-value]
    elif type(value) in (list, tuple, set):
        return type(value)(expand(inner, foreign) for inner in value)  # type: ignore[call-arg, attr-defined]
    return value


def expand_text(text: str) -> str:
    """Expand `~` at the start of a text, and variables in it; raise `UserError` for a variable that is not set.

    The name of an existing file stays as it is.
    """
    if text.startswith("~"):
        text = os.path.expanduser(text)
    if "$" not in text or os.path.lexists(text):
        return text

    def read(match: re.Match[str]) -> str:
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"Expected the variable {name} of {text} to be set, got no value; set it, or write its value."
            )
        return os.environ[name]

    return _VARIABLE.sub(read, text)


def texts(value: object) -> set[str]:
    """Return all texts in a structure of dicts and lists."""
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {text for each in inner for text in texts(each)}
