"""`vidtwin export`: options. exporter.py does the work and imports torch."""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from vidtwin.apply.export_files import FILES, ONNX
from vidtwin.apply.inputs import check_folder
from vidtwin.apply.options import add_class_options, build, check_counts, check_weights
from vidtwin.errors import UserError

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


@dataclass
class ExportOptions:
    """Choose the model and the programs to export.

    Args:
        ckpt_path: Trained weights: a checkpoint of `vidtwin fit`, a folder that `save_pretrained` or `vidtwin convert`
            wrote, or hf://OWNER/NAME.
        out: Folder for the programs.
        format: torch (.pt2), onnx, or both.
        use_ema: Take the averaged weights of a checkpoint.
        num_frames: T of the clips; by default the model's own, or one near 16.
        resolution: H = W of the clips, if the model fixes none; by default 256.
        batch_size: B of the random clips of the comparison, and of programs with a fixed B.
        tolerance: Maximum difference between a program and the model, relative to the largest number (at least 1).
        overwrite: Replace the programs in `out`.
    """

    ckpt_path: str | None = None
    out: str | None = None
    format: Literal["torch", "onnx", "both"] = "torch"
    use_ema: bool = False
    num_frames: int | None = None
    resolution: int | None = None
    batch_size: int = 2
    tolerance: float = 1e-3
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.ckpt_path:
            raise UserError("Expected trained weights, got none; give --ckpt_path PATH.")
        if not self.out:
            raise UserError("Expected a folder to write to, got none; give --out DIR.")
        check_counts(num_frames=self.num_frames, resolution=self.resolution, batch_size=self.batch_size)
        if not 0 < self.tolerance < 1:
            raise UserError(f"Expected --tolerance between 0 and 1, got {self.tolerance}.")

    @property
    def formats(self) -> list[Literal["torch", "onnx"]]:
        return ["torch", "onnx"] if self.format == "both" else [self.format]

    def check(self) -> None:
        """Raise `UserError` if libraries or weights are missing, or files of an export exist."""
        if "onnx" in self.formats and (missing := [name for name in ONNX if importlib.util.find_spec(name) is None]):
            raise UserError(f"Expected {', '.join(missing)} for --format onnx; pip install 'vidtwin[export]'.")
        folder = Path(str(self.out))
        check_folder(folder)
        there = [name for name in FILES if (folder / name).exists()]
        if there and not self.overwrite:
            raise UserError(f"Expected no {there[0]} in {folder}; give --overwrite to replace the files.")
        check_weights(self.ckpt_path)


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    add_class_options(parser, ExportOptions)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    export_options = build(ExportOptions, options)
    export_options.check()
    from vidtwin.apply.exporter import Exporter

    return Exporter(export_options).run()
