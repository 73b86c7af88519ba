"""Parse command lines: one parser, one form of error, one reader of `--config`. Import nothing heavy."""

import argparse
import re
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NoReturn

import yaml
from jsonargparse import ArgumentParser, DefaultHelpFormatter, Namespace

from vidtwin import plugins
from vidtwin.cli import bases, messages
from vidtwin.errors import UserError, causes, name_choices, suggestion

# Options whose values configs hold, by the modules of their classes.
_VALUES = {
    "vidtwin.datamodules": "data",
    "vidtwin.models": "model.autoencoder",
    "vidtwin.baselines": "model.autoencoder",
    "vidtwin.losses": "model.loss",
    "torch.optim": "model.optimizer",
}
_KEYS = tuple(dict.fromkeys(_VALUES.values()))
_CLASS_NAME = re.compile(r"""(\bclass_path["']?\s*:\s*["']?)(\w+)(?=["']?\s*(?:[,}#]|$))""", re.MULTILINE)


class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """Show the description as written, and the default of each option."""


class Parser(ArgumentParser):
    """Refuse abbreviations, and report mistakes as a `UserError` of one line."""

    def __init__(self, *args: Any, allow_abbrev: bool = False, **keywords: Any) -> None:
        # Without abbreviations: --trainer.max_step is a mistake to point out, not to guess.
        super().__init__(*args, allow_abbrev=allow_abbrev, **keywords)

    def parse_string(self, content: str, *args: Any, **keywords: Any) -> Namespace:
        return super().parse_string(_resolve_class_names(bases.remove(content)), *args, **keywords)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise one line with a suggestion; jsonargparse would print its usage and a tree of reasons."""
        raise messages.shorten(message, self, ex) from ex

    def exit(self, status: int = 0, message: str | None = None) -> NoReturn:
        """End the command after --help and the like; `commands.run` lets no other SystemExit pass as success."""
        raise messages.ParserExit(status)

    def parse_words(self, argv: Sequence[str]) -> Namespace:
        """Parse `argv`, in which positional words may stand anywhere and `--flag` means `--flag=true`."""
        return self.parse_args(self._arrange(argv))

    def split_unknown(self, argv: Sequence[str]) -> tuple[list[str], list[tuple[str, str]]]:
        """Split `argv` into the words of this parser, and unknown options with their values ("" if missing)."""
        known: list[str] = []
        unknown: list[tuple[str, str]] = []
        words = list(argv)
        while words:
            word = words.pop(0)
            option, equals, value = word.partition("=")
            if not word.startswith("--") or option in self._option_string_actions:
                known.append(word)
            elif equals:
                unknown.append((option[2:], value))
            else:
                unknown.append((option[2:], words.pop(0) if words and not words[0].startswith("--") else ""))
        return known, unknown

    def _arrange(self, argv: Sequence[str]) -> list[str]:
        """Put positional words last, since argparse wants them together, and `true` behind bare flags."""
        bare: list[str] = []
        options: list[str] = []
        words = list(argv)
        while words:
            word = words.pop(0)
            action = self._option_string_actions.get(word.partition("=")[0])
            if word == "--":
                bare += words
                break
            if not word.startswith("-"):
                bare.append(word)
            elif "=" in word or action is None or action.nargs == 0:
                options.append(word)
            elif getattr(action, "_typehint", None) is bool:
                given = words.pop(0) if words and words[0] in ("true", "false") else "true"
                options.append(f"{word}={given}")
            elif action.nargs == "+":
                options.append(word)
                while words and not words[0].startswith("-"):
                    options.append(words.pop(0))
            else:
                options += [word, *([words.pop(0)] if words else [])]
        return [*options, *(["--", *bare] if bare else [])]


def command_parser(name: str, usage: str, description: str) -> Parser:
    """Make the parser of a command, whose options follow."""
    usage = f"vidtwin {name} {usage}".rstrip()
    return Parser(prog=f"vidtwin {name}", usage=usage, description=description, formatter_class=Help)


@contextmanager
def user_errors(config: Namespace | None = None) -> Iterator[None]:
    """Turn errors of classes that are built from a config into a `UserError`: jsonargparse wraps them into a tree.

    A package that is missing and a `ValueError` of a constructor or of Lightning are the user's to fix, and a
    `TypeError` if the config has `dict_kwargs`, which no parser checks. Other errors are bugs of the classes.
    """
    try:
        yield
    except (ValueError, TypeError, ImportError) as error:
        chain = list(causes(error))
        for cause in chain:
            if isinstance(cause, UserError):
                raise cause from None
        root = chain[-1]
        if isinstance(root, ModuleNotFoundError):  # as which Lightning names packages that it requires too
            text = " ".join(str(root).split())
            raise UserError(f"Expected the packages that the config's classes need, got none: {text}") from error
        unchecked = list(_find_dict_kwargs(config)) if isinstance(root, TypeError) else []
        if not (unchecked or (isinstance(root, ValueError) and _is_refusal(root))):
            raise
        if unchecked:
            given = ", ".join(unchecked)
            raise UserError(f"Expected arguments that {given} takes in dict_kwargs, got others: {root}.") from error
        from vidtwin.testing import describe  # which imports torch

        raise UserError(f"Expected arguments that the config's classes take, got {describe(root)}.") from error


def _is_refusal(error: ValueError) -> bool:
    """Return whether an error speaks of arguments: a constructor raised it, or a library that checks them."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return bool(frames) and (
        frames[-1].f_code.co_name in ("__init__", "__post_init__")
        or str(frames[-1].f_globals.get("__name__")).partition(".")[0] in ("jsonargparse", "lightning")
    )


def _find_dict_kwargs(config: Any) -> Iterator[str]:
    """Yield the class path of each specification with `dict_kwargs`."""
    if isinstance(config, Namespace):
        config = vars(config)
    if isinstance(config, dict):
        if config.get("dict_kwargs"):
            yield str(config.get("class_path"))
        config = list(config.values())
    if isinstance(config, list):
        for value in config:
            yield from _find_dict_kwargs(value)


def wants_help(argv: Sequence[str]) -> bool:
    """Return whether the command's own help is asked for."""
    return bool({"-h", "--help"} & set(argv))


def option_value(argv: Sequence[str], *names: str) -> str | None:
    """Return the last value of `--NAME VALUE` or `--NAME=VALUE`, of any of the names."""
    return next(reversed(_option_values(argv, names)), None)


def check_name(option: str, name: str, known: Iterable[str], prefix: str = "") -> None:
    """Refuse a mistyped option: `name` is not among the `known` names, but close to one; the parser refuses others."""
    known = list(known)
    if name not in known and (near := get_close_matches(name, known, n=1)):
        raise UserError(f"Expected options that exist, got {option}; did you mean {prefix + near[0]!r}?")


def config_paths(argv: Sequence[str]) -> list[Path]:
    """Return the files that are given by --config, in their order."""
    return [Path(path) for path in _option_values(argv, ("config", "c"))]


def read_config(paths: Iterable[str | Path]) -> dict[str, Any]:
    """Merge config files, each over those before it. Raises `UserError` for a missing or broken file."""
    merged: dict[str, Any] = {}
    for path in map(Path, paths):
        if not path.is_file():
            near = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
            raise UserError(f"Expected a config at {path}, got no such file{suggestion(path.name, near)}")
        try:
            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise UserError(f"Expected YAML in {path}, got {' '.join(str(error).split())}.") from error
        merged = _merge(merged, content if isinstance(content, dict) else {})
    merged.pop("base", None)
    return merged


def _merge(old: Any, new: Any) -> Any:
    """Merge nested keys; arguments of one class do not go to another."""
    both = isinstance(old, dict) and isinstance(new, dict)
    if not both or ("class_path" in new and new["class_path"] != old.get("class_path")):
        return new
    return old | {key: _merge(old.get(key), value) for key, value in new.items()}


def refuse_values(paths: Iterable[str | Path]) -> None:
    """Raise `UserError` for a config that is the value of an option, such as configs/data/folder.yaml of --data."""
    for path in paths:
        if not isinstance(given := read_config([path]).get("class_path"), str):
            continue
        for group in messages.SHORT_NAMES.values():
            given = plugins.resolve(given, group)
        option = next((option for module, option in _VALUES.items() if given.startswith(f"{module}.")), None)
        advice = f"give it as --{option} {path}" if option else f"give it to one of --{', --'.join(_KEYS)}"
        raise UserError(
            f"Expected a config with keys such as model and data, got the value of one in {path}, of the class "
            f"{given.rpartition('.')[2]}; {advice}."
        )


def name_data_first(argv: Sequence[str]) -> list[str]:
    """Move `--data NAME` before the settings of a data module whose class no config names.

    The parser takes settings of a class that it knows by then, so `--config PROTOCOL --data NAME` would be refused.
    """
    words = list(argv)
    places = [index for index, word in enumerate(words) if word.partition("=")[0] in ("--config", "-c")]
    settings: list[tuple[int, Path]] = []
    for index in places:
        for path in config_paths(words[index : index + 2])[:1]:
            if set(str(path)) & set("{\n"):  # a config in the place of its path: it may name the class
                return words
            data = read_config([path]).get("data") if path.is_file() else None
            if isinstance(data, str) or (isinstance(data, dict) and "class_path" in data):
                return words
            if isinstance(data, dict):
                settings.append((index, path))
    if not settings:
        return words
    name = option_value(words, "data")
    if name is None:
        if any(word.startswith(("--data.class_path", "--data.help")) for word in words) or wants_help(words):
            return words
        raise UserError(f"Expected a data module for the settings in {settings[0][1]}, got none; add --data NAME.")
    first = min(index for index, word in enumerate(words) if index == settings[0][0] or word.startswith("--data."))
    names = [index for index, word in enumerate(words) if word.partition("=")[0] == "--data"]
    taken = {index + more for index in names for more in ((0,) if "=" in words[index] else (0, 1))}
    before, after = (
        [words[index] for index in part if index not in taken] for part in (range(first), range(first, len(words)))
    )
    return [*before, f"--data={name}", *after]


def resolve_short_names(argv: Sequence[str]) -> list[str]:
    """Replace the names of `--data ucf101` and `--model.autoencoder vidtwin` by class paths, importing no plug-in."""
    resolved = list(argv)
    for index, word in enumerate(argv):
        option, equals, value = word.partition("=")
        group = messages.SHORT_NAMES.get(option.removeprefix("--"))
        if group is None:
            continue
        if equals:
            resolved[index] = f"{option}={_resolve(value, group)}"
        elif index + 1 < len(argv):
            resolved[index + 1] = _resolve(argv[index + 1], group)
    return resolved


def _resolve_class_names(content: str) -> str:
    """Replace `class_path: ucf101` in the text of a config by the class path; lines keep their numbers."""

    def replace(match: re.Match[str]) -> str:
        found = {plugins.resolve(match[2], group) for group in messages.SHORT_NAMES.values()} - {match[2]}
        return match[1] + (found.pop() if found else match[2])

    return _CLASS_NAME.sub(replace, content)


def _resolve(name: str, group: str) -> str:
    path = plugins.resolve(name, group)
    if path == name and re.fullmatch(r"\w+", name):  # neither a class path, nor a file, nor JSON
        choices = name_choices(name, plugins.available(group))
        raise UserError(f"Expected a short name or a class path, got {name!r}{choices}")
    return path


def _option_values(argv: Sequence[str], names: Iterable[str]) -> list[str]:
    options = {f"-{name}" if len(name) == 1 else f"--{name}" for name in names}
    values = []
    for index, word in enumerate(argv):
        option, equals, after = word.partition("=")
        if option not in options:
            continue
        following = argv[index + 1] if index + 1 < len(argv) else "--"
        if equals or not following.startswith("--"):
            values.append(after if equals else following)
    return values
