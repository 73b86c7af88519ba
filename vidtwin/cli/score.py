"""`vidtwin score`: generation FVD of generated videos. Import nothing heavy at the top."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from vidtwin.cli import paths
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from vidtwin.cli.parser import Parser

_DESCRIPTION = """\
Measure the generation FVD of videos that `vidtwin generate` made, against real clips of the same classes.

  vidtwin score generated --data ucf101 --data.root data/UCF-101 --fvd.path i3d_torchscript.pt --fvd.sha256 HEX
  vidtwin score generated --data ucf101 --data.root data/UCF-101 --data.fps null --data.resolution 64 --split test

Without a network it is "unavailable". Number of samples, classes, split and clips are in the protocol, whose hash
stands beside the value: only values of one hash are comparable. GENERATED/score.json has all.
"""
_SPLITS = ["train", "val", "test"]
_OWN = ("split", "fvd", "convention", "batch_size", "accelerator", "progress")


def score_command(argv: list[str]) -> int:
    """Measure the generation FVD of generated videos: vidtwin score GENERATED --data NAME"""
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
        check_name(option, option[2:].partition(".")[0], ("config", "data", "help", "print_config", *_OWN))
    refuse_values(config_paths(argv))
    others = set(read_config(config_paths(argv))) - {"data", "generated", "config", *_OWN}  # of other commands
    config = (parser := _parser(sorted(others), light=wants_help(argv))).parse_args(argv)
    if config.get("data") is None:
        raise UserError("Expected real clips to compare with; give --data ucf101 --data.root PATH or a --config.")
    paths.expand(config.data, paths.values(argv))
    with user_errors(config):
        built = parser.instantiate(config)
    from vidtwin.benchmark.generation import SCORE, score
    from vidtwin.data import ClipSource
    from vidtwin.distributed import launch

    if not isinstance(built.data, ClipSource):
        raise UserError(
            f"Expected a data module of clips, got {type(built.data).__name__}; set --data to one of videos."
        )
    device = launch(config.accelerator, 1, 1, "32-true").device
    found = score(
        config.generated,
        built.data,
        config.split,
        built.fvd,
        config.convention,
        config.batch_size,
        str(device),
        config.progress,
    )
    gfvd, protocol = found["gfvd"], found["protocol"]
    value = f"unavailable: {found['reason']}" if gfvd == "unavailable" else f"{gfvd['value']:.1f}"
    note = f" ({gfvd['note']})" if gfvd != "unavailable" and gfvd["note"] else ""
    counts = protocol["samples"]
    sys.stdout.write(
        f"gFVD {value}{note}\n{sum(counts.values()):,} samples of {len(counts)} classes against "
        f"{protocol['reference']:,} clips of the {protocol['split']} split, protocol {found['protocol_hash']} -> "
        f"{config.generated}/{SCORE}\n"
    )
    return 0


def _parser(ignored: list[str], light: bool) -> "Parser":
    from jsonargparse import ActionConfigFile

    from vidtwin.cli.parser import command_parser

    usage = "GENERATED (--config FILE | --data NAME --data.OPTION VALUE ...) [options]"
    parser = command_parser("score", usage, _DESCRIPTION)
    parser.add_argument("generated", metavar="GENERATED", help="Folder written by `vidtwin generate`.")
    parser.add_argument("--config", action=ActionConfigFile, help="Config as for fit; only its `data` is used.")
    shown = "The data module of the real clips, by its short name or class path; arguments are --data.NAME VALUE."
    if light:  # help needs no Lightning
        parser.add_argument("--data", metavar="NAME", help=shown)
        parser.add_argument("--fvd.path", metavar="FILE", help="TorchScript file of I3D; without it, unavailable.")
        parser.add_argument("--fvd.sha256", metavar="HEX", help="SHA-256 of the file, which is a program.")
    else:
        from lightning.pytorch import LightningDataModule

        from vidtwin.benchmark.options import FVD

        parser.add_subclass_arguments(
            LightningDataModule, "data", as_group=False, fail_untyped=False, required=False, help=shown
        )
        parser.add_class_arguments(FVD, "fvd")
    parser.add_argument("--split", choices=_SPLITS, default="train", help="Split of the real clips.")
    parser.add_argument(
        "--convention",
        choices=["styleganv", "videogpt", "internal"],
        default="styleganv",
        help="How clips reach the network (docs/metrics.md).",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Clips per pass of the network.")
    parser.add_argument("--accelerator", type=str, default="auto", help="As in Lightning: auto, cpu, cuda, ….")
    parser.add_argument("--progress", type=bool, default=True, help="Show a progress bar.")
    for key in ignored:
        parser.add_argument(f"--{key}", type=Any, help=argparse.SUPPRESS)
    return parser
