"""What the commands on videos share: their parsers. Nothing heavy is imported at the top."""

import argparse
import inspect
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from vidtwin.lightning_cli import Parser

T = TypeVar("T")


def make_parser(name: str, usage: str, description: str, *classes: type) -> "Parser":
    """A parser whose options are the arguments of `classes`; `build` makes them of what it has read.

    Args:
        name: Of the command.
        usage: What follows `vidtwin NAME`.
        description: Shown by --help, as it stands.
        classes: With arguments of different names.
    """
    from vidtwin.lightning_cli import Parser

    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # class paths of files in the current folder
    parser = Parser(
        prog=f"vidtwin {name}",
        usage=f"vidtwin {name} {usage}",
        description=description,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for cls in classes:
        parser.add_class_arguments(cls, fail_untyped=False)
    return parser


def build(cls: type[T], config: "Namespace", **others: Any) -> T:
    """An object of the arguments in `config` that are its own; its `UserError` is told as such."""
    from vidtwin.lightning_cli import user_errors

    own = {name: config[name] for name in inspect.signature(cls).parameters if name in config}
    with user_errors():
        return cls(**own, **others)


def exit_code(done: int, failed: int) -> int:
    """0 all done, 1 a part failed, 2 nothing could be done."""
    if not failed:
        return 0
    return 1 if done else 2
