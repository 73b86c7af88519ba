"""`vidtwin encode`: videos to latents on disk. Nothing heavy is imported at the top."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from vidtwin.apply.inputs import check_folder, find
from vidtwin.apply.options import SessionOptions, add_class_options, build, check_weights
from vidtwin.errors import UserError

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


@dataclass
class EncodeOptions:
    """Options of the encoding.

    Args:
        inputs: Video files, folders, globs.
        out: Folder of the latents.
        size: Side of the square that pictures are cropped and resized to; by default the model's own, or the whole
            picture for models of any size.
        posterior: Part of Gaussian latents to store: the mean, or moments, which are mean and log-variance.
        dtype: Type of continuous latents; codes have the smallest type that holds them.
        clips_per_shard: Windows per shard, held in memory until it is written.
        batch_size: Windows per forward pass.
        labels: Take the folder of a video as its class.
        overwrite: Begin anew if the folder holds latents, these or others.
        progress: Show a progress bar.
    """

    inputs: list[str]
    out: str
    size: int | None = None
    posterior: Literal["mean", "moments"] = "mean"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    clips_per_shard: int = 256
    batch_size: int = 8
    labels: Literal["folders", "none"] = "none"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("clips_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected --{name} of at least 1, got {getattr(self, name)}.")


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command and of the session."""
    add_class_options(parser, EncodeOptions, SessionOptions)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    encode_options, session_options = build(EncodeOptions, options), build(SessionOptions, options)
    session_options.check()
    check_folder(encode_options.out)
    inputs = find(encode_options.inputs)
    check_weights(session_options.ckpt_path)
    from vidtwin.apply.latent_writer import LatentWriter

    return LatentWriter(encode_options, session_options, inputs).run()
