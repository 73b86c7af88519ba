"""What the commands on videos share: their parsers. Nothing heavy is imported at the top."""

import argparse
import inspect
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from vidtwin.cli.training import Parser

T = TypeVar("T")


def make_parser(name: str, usage: str, description: str, *classes: type) -> "Parser":
    """A parser whose options are the arguments of `classes`; `build` makes them of what it has read.

    An argument called `inputs` is what stands without an option, wherever it stands. `--flag` is `--flag=true`.

    Args:
        name: Of the command.
        usage: What follows `vidtwin NAME`.
        description: Shown by --help, as it stands.
        classes: With arguments of different names.
    """
    from jsonargparse import DefaultHelpFormatter

    from vidtwin.cli.training import Parser

    class Help(argparse.RawDescriptionHelpFormatter, DefaultHelpFormatter):
        """The description as it stands, and the default of each option."""

    class CommandParser(Parser):
        def error(self, message: str, ex: Exception | None = None) -> NoReturn:
            if match := re.search(r"arguments are required: (.+?)\.?$", message):
                bare = [action.dest for action in self._actions if not action.option_strings]
                words = [word if word in ("IN", *bare) else f"--{word.lstrip('-')}" for word in match[1].split(", ")]
                raise UserError(f"Expected {' and '.join(words)}, got none; vidtwin {name} --help says what it is.")
            super().error(message, ex)

        def parse_args(self, args: Sequence[str] | None = None, *rest: Any, **keywords: Any) -> "Namespace":  # type: ignore[override]
            return super().parse_args(_arranged(list(args or []), self), *rest, **keywords)

    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # class paths of files in the current folder
    parser = CommandParser(
        prog=f"vidtwin {name}",
        usage=f"vidtwin {name} {usage}",
        description=description,
        allow_abbrev=False,
        formatter_class=Help,
    )
    for cls in classes:
        bare = {"inputs"} & set(inspect.signature(cls).parameters)
        if bare:
            parser.add_argument("inputs", nargs="+", metavar="IN", help="Videos: files, folders of them, globs.")
        parser.add_class_arguments(cls, fail_untyped=False, skip=bare)
    return parser


def build(cls: type[T], config: "Namespace", **others: Any) -> T:
    """An object of the arguments in `config` that are its own; its `UserError` is told as such."""
    from vidtwin.cli.training import user_errors

    own = {name: config[name] for name in inspect.signature(cls).parameters if name in config}
    with user_errors():
        return cls(**own, **others)


def exit_code(done: int, failed: int) -> int:
    """0 all done, 1 a part failed, 2 nothing could be done."""
    if not failed:
        return 0
    return 1 if done else 2


def _arranged(argv: list[str], parser: "Parser") -> list[str]:
    """Words without an option first, since argparse wants them together, and `true` behind bare flags."""
    bare: list[str] = []
    options: list[str] = []
    words = iter(range(len(argv)))
    for place in words:
        word = argv[place]
        action = parser._option_string_actions.get(word.partition("=")[0])
        following = argv[place + 1] if place + 1 < len(argv) else None
        if word == "--":
            bare += argv[place + 1 :]
            break
        if not word.startswith("-"):
            bare.append(word)
        elif "=" in word or action is None or action.nargs == 0:
            options.append(word)
        elif _is_flag(action):
            given = following if following in ("true", "false") else "true"
            options.append(f"{word}={given}")
            if given == following:
                next(words)
        else:
            options.append(word)
            if following is not None:
                options.append(argv[next(words)])
    return [*options, *(["--", *bare] if bare else [])]


def _is_flag(action: argparse.Action) -> bool:
    return getattr(action, "_typehint", None) is bool
