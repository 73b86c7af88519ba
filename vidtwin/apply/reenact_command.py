"""`vidtwin reenact`: its arguments. Nothing heavy is imported at the top."""

from typing import TYPE_CHECKING

from vidtwin.errors import UserError, suggestion

if TYPE_CHECKING:
    from vidtwin.cli.training import Parser

_DESCRIPTION = """\
Decode one video's latent with another video's: re-enactment (VidTwin, appendix A.3).

  vidtwin reenact --structure a.mp4 --dynamics b.mp4 --out crossed --ckpt_path runs/vidtwin/checkpoints/last.ckpt
  vidtwin reenact --content a.mp4 --motion b.mp4 --out crossed --ckpt_path runs/cmd/checkpoints/last.ckpt

Each latent of the checkpoint's model is an option that names the video it is taken from; two videos in all. They go
through window by window, frame k beside frame k, up to the end of the shorter one. It writes to DIR

  A_structure__B_dynamics.mp4            both crossings, at the times and with the sound of the video that gives the
  B_structure__A_dynamics.mp4            model's last latent
  grid.mp4, grid.png                     both inputs, their reconstructions and the crossings
  interpolation.mp4, interpolation.png   from A's latents to B's in --steps columns: all of them, and each one alone
  reenact.json                           PSNR and SSIM of each against A and B, and its change, as printed

Exit code: 0 done, 1 a video is damaged (what comes before the damage was used), 2 nothing was made.
"""


def reenact_command(argv: list[str]) -> int:
    """One video's latent with another's: vidtwin reenact --structure A --dynamics B --out DIR --ckpt_path last.ckpt"""
    from vidtwin.apply import command
    from vidtwin.apply.reenact import Reenact
    from vidtwin.apply.session import Session, SessionOptions

    usage = "--LATENT VIDEO --LATENT VIDEO --out DIR --ckpt_path PATH [options]"
    parser = command.make_parser("reenact", usage, _DESCRIPTION, SessionOptions, Reenact)
    rest, videos = _videos_by_latent(parser, argv)
    config = parser.parse_args(rest)
    options = command.build(SessionOptions, config)
    options.check()
    what = command.build(Reenact, config)
    entries = what.find(videos)
    session = Session(options)
    names = session.model.latent_names
    if unknown := [name for name in videos if name not in names]:
        wanted = " ".join(f"--{name} VIDEO" for name in names)
        near = suggestion(unknown[0], [*names, *(option.lstrip("-") for option in parser._option_string_actions)])
        raise UserError(f"Expected {wanted} for {type(session.model).__name__}, got --{unknown[0]}{near}")
    return what.run(session, entries)


def _videos_by_latent(parser: "Parser", argv: list[str]) -> tuple[list[str], dict[str, str]]:
    """Arguments → those of the parser, and the values of the options that it does not know.

    Which latents there are is known only when the checkpoint is read, and that may come from elsewhere.
    """
    rest: list[str] = []
    videos: dict[str, str] = {}
    words = iter(argv)
    for word in words:
        option, equals, value = word.partition("=")
        if not word.startswith("--") or option in parser._option_string_actions:
            rest.append(word)
            continue
        given = value if equals else next(words, "")
        if not given or given.startswith("--"):
            raise UserError(f"Expected a video after {option}, got {given or 'nothing'}.")
        if option[2:] in videos:
            raise UserError(f"Expected {option} once, got it twice.")
        videos[option[2:]] = given
    return rest, videos
