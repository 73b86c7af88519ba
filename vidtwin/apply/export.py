"""`vidtwin export`. exporter.py does the work and imports torch."""

from typing import TYPE_CHECKING

from vidtwin.apply.options import ExportOptions, add_class_options, build

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "--ckpt_path PATH --out DIR [options]"
DESCRIPTION = """\
Write encoder and decoder as programs that run without vidtwin: torch.export (.pt2) or ONNX.

  vidtwin export --ckpt_path runs/vidtwin/checkpoints/last.ckpt --out exported
  vidtwin export --ckpt_path my_vidtwin --out exported --format onnx --resolution 224

  encoder   clip (B, 3, T, H, W) in [-1, 1] -> the latents by name (the posterior's mode); for a codebook the integer
            codes too, as NAME.codes
  decoder   the latents by name -> clip

B is any number if the model can be traced so, else --batch_size; the manifest says which. Each program is read back
from its file and compared with the model on random clips. One that differs goes to OUT/failed/. OUT/manifest.json holds
names, shapes and types of inputs and outputs, the preprocessing of videos, the weights' SHA-256, versions, and the
differences between programs and model.

Exit code: 0 all written and equal, 1 a program differs, 2 nothing was written.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    add_class_options(parser, ExportOptions)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    export_options = build(ExportOptions, options)
    export_options.check()
    from vidtwin.apply.exporter import Exporter

    return Exporter(export_options).run()
