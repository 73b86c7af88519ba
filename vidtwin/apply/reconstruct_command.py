"""`vidtwin reconstruct`: its arguments. Nothing heavy is imported at the top."""

_DESCRIPTION = """\
Reconstruct videos of any length, size and frame rate: as many frames, at the same times, with the sound.

  vidtwin reconstruct a.mp4 b.mp4 --ckpt_path runs/vidtwin/checkpoints/last.ckpt --side_by_side
  vidtwin reconstruct 'videos/**/*.mp4' --ckpt_path last.ckpt --out full_size --tile
  vidtwin reconstruct videos/ --ckpt_path last.ckpt --only structure --accelerator cuda --devices 4

IN are files, folders (all videos below them) or globs. A video goes through in windows of the model's length, one after
the other, in constant memory; the last one is filled up by repeating the last frame, and cut again. The picture is
cropped to a square and resized to the model's resolution, or goes through whole: where the model takes any size, or
by --tile. PSNR and SSIM are printed for each video, means over its frames of 8-bit pictures, against what the model was
given; they stand in OUT/reconstructions.csv too.

Exit code: 0 all done, 1 a video failed or is damaged (a line on stderr says which and why; what comes before the damage
is reconstructed), 2 nothing was made.
"""


def reconstruct_command(argv: list[str]) -> int:
    """Reconstruct videos: vidtwin reconstruct a.mp4 b.mp4 --ckpt_path last.ckpt"""
    from vidtwin.apply import command
    from vidtwin.apply.reconstruct import Reconstruct
    from vidtwin.apply.session import Session, SessionOptions

    parser = command.make_parser(
        "reconstruct", "IN [IN ...] --ckpt_path PATH [options]", _DESCRIPTION, SessionOptions, Reconstruct
    )
    config = parser.parse_args(argv)
    options = command.build(SessionOptions, config)
    options.check()
    what = command.build(Reconstruct, config)
    return what.run(Session(options))
