"""Refuse mistakes in the trainer's commands before torch and Lightning are imported, then run them."""

from collections.abc import Callable
from functools import partial

from vidtwin.apply.options import check_weights
from vidtwin.cli import benchmark_options
from vidtwin.cli.parser import check_name, config_paths, option_value, read_config, wants_help
from vidtwin.cli.sources import read_options

_SPECIAL = ("best", "last", "hpc")  # values of Lightning's --ckpt_path that are not paths
# First parts of the options; a test compares them with the parsers.
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
    elif command == "test":
        benchmark_options.print_help()
        return 0
    from vidtwin.cli.training import run

    return run(command, argv)


def refuse(command: str, argv: list[str]) -> None:
    """Raise `UserError` for missing files and mistyped options, as far as the classes' arguments are not needed."""
    known = OPTIONS[command] if command in OPTIONS else benchmark_options.names()
    for option in (word.partition("=")[0] for word in argv if word.startswith("--")):
        first, _, rest = option.removeprefix("--").rstrip("+").partition(".")
        check_name(option, first, known)
        if first == "trainer" and rest and command != "test":
            check_name(option, rest, read_options("lightning.pytorch.trainer.trainer", "Trainer"), "trainer.")
    data = option_value(argv, "data") or ""
    if data.endswith((".yaml", ".yml")):
        read_config([data])
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
