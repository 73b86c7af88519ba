"""`vidtwin test` with a list of autoencoders: the command line of a sweep.

Imported only when it is needed, since it imports torch and lightning.
"""

import argparse
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ActionConfigFile

from vidtwin.benchmark.sweep import Sweep
from vidtwin.cli.training import Parser, option_value, resolve_short_names, user_errors

_DESCRIPTION = """\
Measure several autoencoders on the same clips under one protocol, and write rows, table, plots and a report.

  vidtwin test --config configs/benchmark/demo.yaml
  vidtwin test --config configs/benchmark/paper.yaml --data.root data/MCL-JCV --devices 8 --accelerator cuda

Without a list of autoencoders `vidtwin test` measures one model. A sweep that was ended goes on by the same command:
what is complete in --results_dir is not measured again. Exit code: 0 every row is there, 1 a model could not be
measured (its row has the error), 2 the command is not usable.
"""


def configs_of(argv: list[str]) -> list[Path]:
    """The files that are given by --config, in their order."""
    paths = [
        option_value(argv[index : index + 2], "config")
        for index, word in enumerate(argv)
        if word.partition("=")[0] in ("--config", "-c")
    ]
    return [Path(path) for path in paths if path]


def is_sweep(argv: list[str]) -> bool:
    """Whether the arguments of `vidtwin test`, or one of its configs, have a list of autoencoders."""
    if any(word.partition("=")[0].rstrip("+") == "--autoencoders" for word in argv):
        return True
    for path in configs_of(argv):
        if path.is_file():
            try:
                content = yaml.safe_load(path.read_text(encoding="utf-8"))
            except yaml.YAMLError:
                continue  # the parser says where it is broken
            if isinstance(content, dict) and "autoencoders" in content:
                return True
    return False


def run(argv: list[str]) -> int:
    """Run a sweep → exit code."""
    parser = _parser()
    argv = resolve_short_names(argv)
    try:
        config = parser.parse_args(argv)
    except SystemExit as end:  # --help and --print_config
        if end.code:
            raise
        return 0
    with user_errors():
        built: Any = parser.instantiate(config)
        arguments = {key: value for key, value in built.as_dict().items() if key != "config"}
        sweep = Sweep(**arguments)
    sweep.config_folders = [path.resolve().parent for path in configs_of(argv)]
    return sweep.run()


def _parser() -> Parser:
    parser = Parser(
        prog="vidtwin test",
        usage="vidtwin test --config FILE [--OPTION VALUE ...]",
        description=_DESCRIPTION,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="Config of the sweep; several are joined.")
    parser.add_class_arguments(Sweep, fail_untyped=False, sub_configs=True)
    return parser
