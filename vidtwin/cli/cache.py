"""`vidtwin cache`: write clips or video files of a data module as shards. Import nothing heavy at the top."""

import sys
from typing import TYPE_CHECKING

from vidtwin.cli import data_command
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from vidtwin.cli.parser import Parser

_DESCRIPTION = """\
Write the clips of a data module as shards, so that trainings read them instead of decoding videos.

  vidtwin cache OUT --config configs/vidtwin_base.yaml --data.root PATH --epochs 10
  vidtwin cache OUT --data ucf101 --data.root PATH --splits val test
  vidtwin cache OUT --data ucf101 --data.root PATH --format videos

Shards are written atomically. After a kill the same command writes the missing ones, to the same bytes.
--format clips: decoded clips, uint8, for --data.cache OUT or, from object storage, --data streamed --data.url URL.
--format videos: the unchanged files, for --data streamed, which decodes them.
"""
_SPLITS = ["train", "val", "test"]
_OWN = ("splits", "epochs", "format", "verify")


def cache_command(argv: list[str]) -> int:
    """Write decoded clips, or video files, as shards: vidtwin cache OUT --config FILE"""
    config, built = data_command.instantiate(argv, _parser, _OWN, "out", "data to cache")
    data = built.data
    from vidtwin.data import ClipSource  # which imports torch

    if not isinstance(data, ClipSource):
        raise UserError(f"Expected a data module whose clips can be cached, got {type(data).__name__}.")
    for written in data.write_cache(config.out, config.splits, config.epochs, config.format, config.verify):
        sys.stdout.write(f"{written}\n")
    use = f"--data.cache {config.out}" if config.format == "clips" else f"--data streamed --data.url {config.out}"
    sys.stdout.write(f"{'verified' if config.verify else 'written'}; use it by {use}\n")
    return 0


def _parser(light: bool) -> "Parser":
    from vidtwin.cli.parser import command_parser

    usage = "OUT (--config FILE | --data NAME --data.OPTION VALUE ...) [options]"
    parser = command_parser("cache", usage, _DESCRIPTION)
    parser.add_argument("out", metavar="OUT", help="Folder; each split gets a folder in it.")
    shown = "The data module, by its short name or class path; its arguments are --data.NAME VALUE."
    data_command.add_data_options(parser, shown, light)
    parser.add_argument("--splits", nargs="+", choices=_SPLITS, default=_SPLITS, help="Some of train, val, test.")
    parser.add_argument(
        "--epochs",
        type=int,
        default=1,
        help="Epochs of training clips, each with other random clips; training reads them in turn.",
    )
    parser.add_argument("--format", choices=["clips", "videos"], default="clips", help="Decoded clips or video files.")
    parser.add_argument(
        "--verify",
        action="store_true",
        help="Compare the checksums of existing shards, not only their sizes.",
    )
    return parser
