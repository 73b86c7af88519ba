"""`vidtwin test` with a list of autoencoders: the command line of a sweep.

Imported only when it is needed, since it imports torch and lightning.
"""

import argparse
from typing import Any

from jsonargparse import ActionConfigFile

from vidtwin.benchmark.sweep import Sweep
from vidtwin.cli.parser import Parser, config_paths, read_config, resolve_short_names, user_errors

_DESCRIPTION = """\
Measure several autoencoders on the same clips under one protocol, and write rows, table, plots and a report.

  vidtwin test --config configs/benchmark/demo.yaml
  vidtwin test --config configs/benchmark/paper.yaml --data.root data/MCL-JCV --devices 8 --accelerator cuda

Without a list of autoencoders `vidtwin test` measures one model. A sweep that was ended goes on by the same command:
what is complete in --results_dir is not measured again. Exit code: 0 every row is there, 1 a model could not be
measured (its row has the error), 2 the command is not usable.
"""


def is_sweep(argv: list[str]) -> bool:
    """Return whether the arguments of `vidtwin test`, or one of its configs, have a list of autoencoders."""
    if any(word.partition("=")[0].rstrip("+") == "--autoencoders" for word in argv):
        return True
    return "autoencoders" in read_config(config_paths(argv))


def run(argv: list[str]) -> int:
    """Run a sweep → exit code."""
    parser = _parser()
    argv = resolve_short_names(argv)
    config = parser.parse_args(argv)
    with user_errors():
        built: Any = parser.instantiate(config)
        arguments = {key: value for key, value in built.as_dict().items() if key != "config"}
        sweep = Sweep(**arguments)
    sweep.config_folders = [path.resolve().parent for path in config_paths(argv)]
    return sweep.run()


def _parser() -> Parser:
    parser = Parser(
        prog="vidtwin test",
        usage="vidtwin test --config FILE [--OPTION VALUE ...]",
        description=_DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", action=ActionConfigFile, help="Config of the sweep; several are joined.")
    parser.add_class_arguments(Sweep, fail_untyped=False, sub_configs=True)
    return parser
