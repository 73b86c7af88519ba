"""Refuse mistakes in the trainer's commands before torch and Lightning are imported, then run them."""

from collections.abc import Callable
from functools import partial

from vidtwin.apply.options import check_weights
from vidtwin.cli import options
from vidtwin.cli.parser import (
    check_name,
    config_paths,
    option_value,
    read_config,
    refuse_values,
    resolve_short_names,
    wants_help,
)
from vidtwin.cli.sources import read_options

_SPECIAL = ("best", "last", "hpc")  # values of Lightning's --ckpt_path that are not paths


def _run(command: str, argv: list[str]) -> int:
    if not wants_help(argv):
        refuse(command, argv)
    elif command == "test":
        options.print_help_of_test()
        return 0
    from vidtwin.cli.training import run

    return run(command, argv)


def refuse(command: str, argv: list[str]) -> None:
    """Raise `UserError` for missing files and mistyped options, as far as the classes' arguments are not needed."""
    known = options.NAMES[command] if command in options.NAMES else options.names_of_test()
    for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
        first, _, rest = option.removeprefix("--").rstrip("+").partition(".")
        check_name(option, first, known)
        if first == "trainer" and rest and command != "test":
            check_name(
                option, rest.partition(".")[0], read_options("lightning.pytorch.trainer.trainer", "Trainer"), "trainer."
            )
    resolve_short_names(argv)
    data = option_value(argv, "data") or ""
    if data.endswith((".yaml", ".yml")):
        read_config([data])
    paths = [path for path in config_paths(argv) if not set(str(path)) & set("{\n")]
    read_config(paths)
    refuse_values(paths)
    for option, special in (("ckpt_path", _SPECIAL), ("init_from", ())):
        if (path := option_value(argv, option)) and path not in (*special, "null") and "://" not in path:
            check_weights(path)
    if command == "replay":
        dump = argv[0] if argv and not argv[0].startswith("-") else option_value(argv, "dump")
        check_weights(dump, "the dump of a skipped step")


fit: Callable[[list[str]], int] = partial(_run, "fit")
validate: Callable[[list[str]], int] = partial(_run, "validate")
test: Callable[[list[str]], int] = partial(_run, "test")
predict: Callable[[list[str]], int] = partial(_run, "predict")
replay: Callable[[list[str]], int] = partial(_run, "replay")
plan: Callable[[list[str]], int] = partial(_run, "plan")
