"""`vidtwin decode`: latents on disk back to videos. Nothing heavy is imported at the top."""

from pathlib import Path
from typing import TYPE_CHECKING

from vidtwin.apply.inputs import check_folder
from vidtwin.apply.options import DecodeOptions, SessionOptions, add_class_options, build, check_weights
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "LATENTS --out DIR [--ckpt_path CHECKPOINT] [options]"
DESCRIPTION = """\
Decode a folder of latents, as `vidtwin encode` writes it: each video becomes OUT/NAME.mp4.

  vidtwin decode latents --out decoded
  vidtwin decode latents --out decoded --ckpt_path elsewhere/last.ckpt --devices 4

A video has the frames, times and picture size of the encoded one, and no sound. The weights must be those of the
encoding, or encode alike (a decoder that was trained further); without --ckpt_path they are read from the path in the
manifest.

Exit code: 0 all done, 1 a part is missing or damaged (a line on stderr gives the reason), 2 nothing was decoded.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command and of the session."""
    add_class_options(parser, DecodeOptions, SessionOptions)
    parser.add_argument("latents", metavar="LATENTS", help="Folder written by `vidtwin encode`.")


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    decode_options, session_options = build(DecodeOptions, options), build(SessionOptions, options)
    if not (manifest := Path(options.latents, "manifest.json")).exists():
        raise UserError(f"Expected a folder of latents with {manifest}, got none; write it by `vidtwin encode`.")
    check_folder(decode_options.out)
    check_weights(session_options.ckpt_path)
    from vidtwin.apply.latent_reader import LatentReader

    return LatentReader(options.latents, decode_options, session_options).run()
