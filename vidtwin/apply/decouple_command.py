"""`vidtwin decouple`: its arguments. Nothing heavy is imported at the top."""

_DESCRIPTION = """\
Show what each latent of a model carries: the input, its reconstruction, and what is decoded of each latent alone.

  vidtwin decouple a.mp4 videos/ --out decoupled --ckpt_path runs/vidtwin/checkpoints/last.ckpt

IN are files, folders (all videos below them) or globs. For each video it writes DIR/NAME.mp4 (the views side by side,
at the input's times and with its sound) and DIR/NAME.png (frames evenly over the video, a row a view). Then it prints,
and writes to DIR/decouple.csv and DIR/decouple.json, for each view: PSNR and SSIM against the input, `change` (the mean
absolute difference of consecutive frames, in steps of 1/255) and the latent's share of the numbers. Means of frames.
docs/latents_apart.md says what they mean.

Exit code: 0 all done, 1 a video failed or is damaged (a line on stderr says which and why), 2 nothing was made.
"""


def decouple_command(argv: list[str]) -> int:
    """Show what each latent carries: vidtwin decouple a.mp4 --out DIR --ckpt_path last.ckpt"""
    from vidtwin.apply import command
    from vidtwin.apply.decouple import Decouple
    from vidtwin.apply.session import Session, SessionOptions

    usage = "IN [IN ...] --out DIR --ckpt_path PATH [options]"
    config = command.make_parser("decouple", usage, _DESCRIPTION, SessionOptions, Decouple).parse_args(argv)
    options = command.build(SessionOptions, config)
    options.check()
    what = command.build(Decouple, config)
    return what.run(Session(options))
