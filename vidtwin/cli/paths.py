"""Expand `~` and `$VAR` in whatever the user writes: words of the command line, and values of configs.

Every command reads paths after this, so that all parts of it use the same folder. `$$` stands for `$`. Each text is
expanded once: the values of words stay when the config that they became part of is expanded. Values of files that come
from others (a checkpoint's class and arguments) stay too: a variable may hold a secret. Import nothing heavy.
"""

import os
import re
from collections.abc import Collection, Iterable
from typing import TypeVar

from vidtwin.errors import UserError

_VARIABLE = re.compile(r"\$(?:([A-Za-z_]\w*)|\{([A-Za-z_]\w*)\}|\$)")
T = TypeVar("T")


def expand_words(argv: Iterable[str]) -> list[str]:
    """Expand the words of a command line, in `--option=value` the value; `expand` serves for those with a structure."""
    expanded = []
    for word in argv:
        option, equals, value = _split(word)
        expanded.append(f"{option}{equals}{value if _has_structure(value) else expand_text(value)}")
    return expanded


def values(argv: Iterable[str]) -> set[str]:
    """Return the values of the words that `expand_words` has expanded."""
    return {value for *_, value in map(_split, argv) if not _has_structure(value)}


def _split(word: str) -> tuple[str, str, str]:
    return word.partition("=") if word.startswith("-") else ("", "", word)


def _has_structure(value: str) -> bool:
    return value.lstrip()[:1] in ("{", "[")


def expand(value: T, kept: Collection[str] = ()) -> T:
    """Expand every text in a parsed config, in its lists and in its classes' arguments.

    Args:
        value: A namespace is changed in place.
        kept: Texts that stay: those that others wrote, and the `values` of the command line.
    """
    from jsonargparse import Namespace

    if isinstance(value, str):
        return value if value in kept else expand_text(value)  # type: ignore[return-value]
    if isinstance(value, Namespace):
        vars(value).update({key: expand(inner, kept) for key, inner in vars(value).items()})
    elif isinstance(value, dict):
        return {key: expand(inner, kept) for key, inner in value.items()}  # type: ignore[return-value]
    elif type(value) in (list, tuple, set):
        return type(value)(expand(inner, kept) for inner in value)  # type: ignore[call-arg, attr-defined]
    return value


def expand_text(text: str) -> str:
    """Expand `~` at the start of a text, and variables in it; `$$` becomes `$`.

    The name of an existing file stays as it is.

    Raises:
        UserError: A variable is not set.
    """
    if text.startswith("~"):
        text = os.path.expanduser(text)
    if "$" not in text or os.path.lexists(text):
        return text

    def read(match: re.Match[str]) -> str:
        if match[0] == "$$":
            return "$"
        name = match[1] or match[2]
        if name not in os.environ:
            raise UserError(
                f"Expected the variable {name} of {text} to be set, got no value; set it, or write $$ for a $."
            )
        return os.environ[name]

    return _VARIABLE.sub(read, text)


def escape(value: T) -> T:
    """Return a parsed config with `$$` for each `$` in its texts, so that `expand` gives them back."""
    from jsonargparse import Namespace

    if isinstance(value, str):
        return value.replace("$", "$$")  # type: ignore[return-value]
    if isinstance(value, Namespace):
        return Namespace(**{key: escape(inner) for key, inner in vars(value).items()})  # type: ignore[return-value]
    if isinstance(value, dict):
        return {key: escape(inner) for key, inner in value.items()}  # type: ignore[return-value]
    return [escape(inner) for inner in value] if isinstance(value, list) else value  # type: ignore[return-value]


def texts(value: object) -> set[str]:
    """Return all texts in a structure of dicts and lists."""
    if isinstance(value, str):
        return {value}
    inner = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return {text for each in inner for text in texts(each)}
