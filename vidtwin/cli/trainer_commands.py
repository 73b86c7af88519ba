"""Refuse mistakes in the trainer's commands before torch and Lightning are imported, then run them."""

from collections.abc import Callable
from difflib import get_close_matches
from functools import partial

from vidtwin.apply.options import check_weights
from vidtwin.cli.parser import config_paths, option_value, read_config, wants_help
from vidtwin.errors import UserError

_SPECIAL = ("best", "last", "hpc")  # values of Lightning's --ckpt_path that are not paths
# First parts of the options; a test compares them with the parsers. `test` has those of the sweep.
_SHARED = (
    "best_checkpoint", "clip_logger", "config", "data", "guard", "health", "help", "latest_checkpoint", "model",
    "print_config", "seed_everything", "trainer",
)  # fmt: skip
OPTIONS = {
    "fit": (*_SHARED, "ckpt_path", "init_from", "resume"),
    "validate": (*_SHARED, "ckpt_path", "verbose", "weights_only"),
    "predict": (*_SHARED, "ckpt_path", "out"),
    "replay": (*_SHARED, "dump"),
}


def _run(command: str, argv: list[str]) -> int:
    if not wants_help(argv):
        refuse(command, argv)
    from vidtwin.cli.training import run

    return run(command, argv)


def refuse(command: str, argv: list[str]) -> None:
    """Raise `UserError` for missing files and mistyped options, as far as the classes' arguments are not needed."""
    for word in argv:
        name = word.partition("=")[0].partition(".")[0].removeprefix("--").rstrip("+")
        known = OPTIONS.get(command)
        if word.startswith("--") and known and name not in known and (near := get_close_matches(name, known, n=1)):
            raise UserError(f"Expected options that exist, got {word.partition('=')[0]}; did you mean {near[0]!r}?")
    paths = [path for path in config_paths(argv) if not set(str(path)) & set("{\n")]
    read_config(paths)
    if (path := option_value(argv, "ckpt_path")) and path not in (*_SPECIAL, "null") and "://" not in path:
        check_weights(path)
    if command == "replay":
        check_weights(argv[0] if argv and not argv[0].startswith("-") else option_value(argv, "dump"))


fit: Callable[[list[str]], int] = partial(_run, "fit")
validate: Callable[[list[str]], int] = partial(_run, "validate")
test: Callable[[list[str]], int] = partial(_run, "test")
predict: Callable[[list[str]], int] = partial(_run, "predict")
replay: Callable[[list[str]], int] = partial(_run, "replay")
