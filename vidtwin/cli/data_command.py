"""Parse the commands that work on a data module alone: `cache` and `score`. Import nothing heavy at the top."""

import argparse
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from vidtwin.cli import paths
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import Namespace

    from vidtwin.cli.parser import Parser


def add_data_options(parser: "Parser", shown: str, light: bool) -> None:
    """Add `--config` and `--data`, with `shown` as its help; without the classes' arguments if `light`."""
    from jsonargparse import ActionConfigFile

    parser.add_argument("--config", action=ActionConfigFile, help="Config as for fit; only its `data` is used.")
    if light:  # help needs no Lightning
        parser.add_argument("--data", metavar="NAME", help=shown)
        return
    from lightning.pytorch import LightningDataModule

    parser.add_subclass_arguments(
        LightningDataModule, "data", as_group=False, fail_untyped=False, required=False, help=shown
    )


def instantiate(
    argv: list[str], make_parser: Callable[[bool], "Parser"], own: Sequence[str], positional: str, wanted: str
) -> tuple["Namespace", "Namespace"]:
    """Parse the words of a command → its config, and the same with the data module built.

    Args:
        argv: Words after the command's name.
        make_parser: Makes the parser; with True one for help alone.
        own: Names of the options beside `--data` and `--config`.
        positional: Name of the positional argument.
        wanted: The data that are expected, for the message if there are none.
    """
    from vidtwin.cli.parser import (
        check_name,
        config_paths,
        name_data_first,
        read_config,
        refuse_values,
        resolve_short_names,
        user_errors,
        wants_help,
    )

    argv = name_data_first(resolve_short_names(argv))
    for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
        check_name(option, option[2:].partition(".")[0], ("config", "data", "help", "print_config", *own))
    refuse_values(config_paths(argv))
    parser = make_parser(wants_help(argv))
    for key in sorted(set(read_config(config_paths(argv))) - {"data", positional, "config", *own}):  # of other commands
        parser.add_argument(f"--{key}", type=Any, help=argparse.SUPPRESS)
    config = parser.parse_args(argv)
    if config.get("data") is None:
        raise UserError(f"Expected {wanted}; give --data ucf101 --data.root PATH or a --config.")
    paths.expand(config.data, paths.values(argv))
    with user_errors(config):
        return config, parser.instantiate(config)
