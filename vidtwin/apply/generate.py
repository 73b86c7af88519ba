"""`vidtwin generate`: new videos from a diffusion model. Nothing heavy is imported at the top."""

from pathlib import Path
from typing import TYPE_CHECKING

from vidtwin.apply.inputs import check_folder
from vidtwin.apply.options import GenerateOptions, add_class_options, build, check_weights

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "--ckpt_path CHECKPOINT --out DIR [--class_name NAME[,NAME...]] [options]"
DESCRIPTION = """\
Generate videos with a diffusion model that `vidtwin fit --config configs/diffusion/...` trained.

  vidtwin generate --ckpt_path last.ckpt --class_name Archery --num 16 --out generated
  vidtwin generate --ckpt_path last.ckpt --class_name Archery,PizzaTossing --guidance 3 --seed 7 --out generated
  vidtwin generate --ckpt_path last.ckpt --out generated --devices 4

Without --class_name all classes are generated, --num videos of each. Each is OUT/CLASS/NUMBER.mp4, beside grid.png with
the first ones and samples.json with the seed and the settings of all. A video's noise depends on --seed, its class and
its number alone: on one device, with one --batch_size, the same seed gives the same bytes, whatever else is generated.

The autoencoder that decodes is read from the path in the checkpoint; --autoencoder names another place for the same
weights.

Exit code: 0 done, 2 nothing was generated.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    add_class_options(parser, GenerateOptions)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    given = build(GenerateOptions, options)
    check_weights(given.ckpt_path)
    check_weights(given.autoencoder)
    check_folder(Path(str(given.out)))
    from vidtwin.apply.generator import Generator

    return Generator(given).run()
