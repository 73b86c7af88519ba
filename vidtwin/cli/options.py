"""Names of the options of the heavy commands, and the help of `vidtwin test` from its sources. Import nothing heavy."""

import argparse

from vidtwin.cli.parser import Parser
from vidtwin.cli.sources import read_options

# First parts of the options; a test compares them with the parsers.
_SHARED = (
    "best_checkpoint", "clip_logger", "config", "data", "guard", "health", "help", "latest_checkpoint", "model",
    "print_config", "seed_everything", "trainer",
)  # fmt: skip
NAMES = {
    "fit": (*_SHARED, "ckpt_path", "init_from", "resume"),
    "validate": (*_SHARED, "ckpt_path", "verbose", "weights_only"),
    "predict": (*_SHARED, "ckpt_path", "out"),
    "replay": (*_SHARED, "dump"),
    "plan": (*_SHARED, "devices", "clips", "tflops", "utilization"),
}
DESCRIPTION = """\
Measure one autoencoder, or several, on the same clips under one protocol, and write rows, table, plots and a report.

  vidtwin test --ckpt_path last.ckpt --data ucf101 --data.root data/UCF-101
  vidtwin test --config configs/demo.yaml --ckpt_path last.ckpt
  vidtwin test --config configs/benchmark/paper.yaml --data.root data/MCL-JCV --devices 8 --accelerator cuda
  vidtwin test --config configs/benchmark/seed_systems.yaml --meta

A config with a list of autoencoders measures all of them. Otherwise the model is that of --model.autoencoder or of a
config of `fit`, of which trainer.accelerator and trainer.precision hold too, and by default that of the checkpoint. The
same command resumes an interrupted sweep: complete rows in --results_dir are not measured again. Exit code: 0 if every
row is there, 1 if a model could not be measured (its row has the error), 2 for a command that is not usable.
"""
USAGE = "vidtwin test [--config FILE ...] [--OPTION VALUE ...]"
INTERNAL = {"read_config", "pictures", "strict"}  # arguments of `Sweep` that the command line sets itself
OF_ONE = {  # options of the form that measures one model
    "ckpt_path": "Trained weights; without them the row is marked as untrained.",
    "name": "Name of the row (default: the autoencoder's class).",
    "model.autoencoder": "The model, by name or class path (default: that of the checkpoint).",
}
CONFIG = "Config of a sweep, or of `fit`, of which the autoencoder and the data count; several are joined."
_GROUPS = {
    "protocol": ("vidtwin.benchmark.protocol", "ProtocolSettings"),
    "fvd": ("vidtwin.benchmark.options", "FVD"),
    "rate_distortion": ("vidtwin.benchmark.options", "RateDistortion"),
}


def names_of_test() -> set[str]:
    """Return the first part of each option of `test`."""
    sweep = set(read_options("vidtwin.benchmark.options", "SweepOptions")) - INTERNAL
    return {"config", "help", "print_config", "trainer", *sweep, *(name.partition(".")[0] for name in OF_ONE)}


def print_help_of_test() -> None:
    """Print every option of `test` but those of the model's and the data's classes."""
    parser = Parser(
        prog="vidtwin test",
        usage=USAGE,
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Arguments of the data and of the model: --data.NAME VALUE, --model.autoencoder.NAME VALUE.",
    )
    parser.add_argument("-c", "--config", metavar="FILE", help=CONFIG)
    for name, text in OF_ONE.items():
        parser.add_argument(f"--{name}", metavar="VALUE", help=text)
    for name, option in read_options("vidtwin.benchmark.options", "SweepOptions").items():
        group = read_options(*_GROUPS[name]) if name in _GROUPS else {}
        shown = {f"{name}.{key}": each for key, each in group.items()} or {name: option}
        for key, (text, default) in shown.items():
            if key not in INTERNAL:
                parser.add_argument(f"--{key}", metavar="VALUE", help=text + _show_default(default))
    parser.print_help()


def _show_default(source: str) -> str:
    return "" if source in ("", "None") else f" (default: {source.strip(chr(39))})"
