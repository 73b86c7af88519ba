"""`vidtwin score`: generation FVD of generated videos. Import nothing heavy at the top."""

import sys
from typing import TYPE_CHECKING

from vidtwin.cli import data_command
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from vidtwin.cli.parser import Parser

_DESCRIPTION = """\
Measure the generation FVD of videos that `vidtwin generate` made, against real clips of the same classes.

  vidtwin score generated --data ucf101 --data.root data/UCF-101 --data.fps null --fvd.path i3d.pt --fvd.sha256 HEX
  vidtwin score generated --data ucf101 --data.root data/UCF-101 --data.fps null --data.resolution 64 --split test

Without a network it is "unavailable". Number of samples, classes, split and clips are in the protocol, whose hash
stands beside the value: only values of one hash are comparable. GENERATED/score.json has all.
"""
_SPLITS = ["train", "val", "test"]
_OWN = ("split", "fvd", "convention", "batch_size", "accelerator", "progress")


def score_command(argv: list[str]) -> int:
    """Measure the generation FVD of generated videos: vidtwin score GENERATED --data NAME"""
    config, built = data_command.instantiate(argv, _parser, _OWN, "generated", "real clips to compare with")
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


def _parser(light: bool) -> "Parser":
    from vidtwin.cli.parser import command_parser

    usage = "GENERATED (--config FILE | --data NAME --data.OPTION VALUE ...) [options]"
    parser = command_parser("score", usage, _DESCRIPTION)
    parser.add_argument("generated", metavar="GENERATED", help="Folder written by `vidtwin generate`.")
    shown = "The data module of the real clips, by its short name or class path; arguments are --data.NAME VALUE."
    data_command.add_data_options(parser, shown, light)
    if light:
        parser.add_argument("--fvd.path", metavar="FILE", help="TorchScript file of I3D; without it, unavailable.")
        parser.add_argument("--fvd.sha256", metavar="HEX", help="SHA-256 of the file, which is a program.")
    else:
        from vidtwin.benchmark.options import FVD

        parser.add_class_arguments(FVD, "fvd")
    parser.add_argument("--split", choices=_SPLITS, default="train", help="Split of the real clips.")
    parser.add_argument(
        "--convention",
        choices=["styleganv", "videogpt", "internal"],
        default="styleganv",
        help="How clips reach the network (docs/benchmark.md).",
    )
    parser.add_argument("--batch_size", type=int, default=8, help="Clips per pass of the network.")
    parser.add_argument("--accelerator", type=str, default="auto", help="As in Lightning: auto, cpu, cuda, ….")
    parser.add_argument("--progress", type=bool, default=True, help="Show a progress bar.")
    return parser
