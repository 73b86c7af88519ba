"""`vidtwin export`: its arguments. Nothing heavy is imported at the top."""

_DESCRIPTION = """\
Write encoder and decoder as programs that run without vidtwin: torch.export (.pt2) or ONNX.

  vidtwin export --ckpt_path runs/vidtwin/checkpoints/last.ckpt --out exported
  vidtwin export --ckpt_path my_vidtwin --out exported --format onnx --resolution 224

  encoder   clip (B, 3, T, H, W) in [-1, 1] -> the latents by name (the posterior's mode); of one that is chosen from a
            codebook its integer codes too, as NAME.codes
  decoder   the latents by name -> clip

B is any number where the model can be traced so, else --batch_size; the manifest says which. Each program is read back
from its file and run on random clips beside the model. One that does not agree goes to OUT/failed/. OUT/manifest.json
holds names, shapes and types of inputs and outputs, how a video becomes a clip, the weights' SHA-256, versions, and how
far the programs are from the model.

Exit code: 0 all written and in agreement, 1 a program is not, 2 nothing was written.
"""


def export_command(argv: list[str]) -> int:
    """Write encoder and decoder as torch.export or ONNX programs: vidtwin export --ckpt_path PATH --out DIR"""
    from vidtwin.apply import command
    from vidtwin.apply.export import Export

    parser = command.make_parser("export", "--ckpt_path PATH --out DIR [options]", _DESCRIPTION, Export)
    return command.build(Export, parser.parse_args(argv)).run()
