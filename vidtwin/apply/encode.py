"""`vidtwin encode`: videos to latents on disk. Nothing heavy is imported at the top."""

from typing import TYPE_CHECKING

from vidtwin.apply.inputs import check_classes, check_folder, find
from vidtwin.apply.options import EncodeOptions, SessionOptions, add_class_options, build, check_weights

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "IN ... --out LATENTS --ckpt_path CHECKPOINT [options]"
DESCRIPTION = """\
Encode videos (files, folders, globs) to a folder of latents: a manifest and safetensors shards.

  vidtwin encode videos/ --out latents --ckpt_path runs/vidtwin/checkpoints/last.ckpt
  vidtwin encode UCF-101 --out latents --ckpt_path last.ckpt --posterior moments --labels folders --devices 4

A video is cut into windows of the model's length; the last frame pads the last one. A shard appears when it is
complete: after a kill the same command makes the missing ones, to the same bytes, on any number of devices.
`vidtwin decode LATENTS --out DIR` gives the videos back; LatentDataModule streams the latents to a training.

Exit code: 0 all done, 1 a video or a shard is missing or damaged (a line on stderr gives the reason), 2 nothing was
encoded.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command and of the session."""
    add_class_options(parser, EncodeOptions, SessionOptions)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    encode_options, session_options = build(EncodeOptions, options), build(SessionOptions, options)
    session_options.check()
    check_folder(encode_options.out)
    inputs = find(encode_options.inputs)
    if encode_options.labels == "folders":
        check_classes(inputs)
    check_weights(session_options.ckpt_path)
    from vidtwin.apply.latent_writer import LatentWriter

    return LatentWriter(encode_options, session_options, inputs).run()
