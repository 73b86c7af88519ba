"""One video's latent with another's: re-enactment, and the way from one video's latents to the other's (paper, A.3).

Every picture here is decoded from a blend: for each latent, how much of B's there is in it (0: A's, 1: B's). A's own
reconstruction is (0, 0), B's is (1, 1), the crossings are (0, 1) and (1, 0).
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vidtwin.apply.decouple import aligned, check_counts, number, write, write_png
from vidtwin.apply.inputs import Input, check_folder, check_targets, find, target
from vidtwin.apply.options import SessionOptions, add_class_options, build, check_weights, exit_code
from vidtwin.apply.windows import BeforeDamage, Window, examine, windows
from vidtwin.errors import UserError, suggestion
from vidtwin.files import write_text
from vidtwin.video import Frames, VideoWriter

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from vidtwin.apply.session import Session
    from vidtwin.posteriors import Encoding, Latents

USAGE = "--LATENT VIDEO --LATENT VIDEO --out DIR --ckpt_path PATH [options]"
DESCRIPTION = """\
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

Blend = tuple[float, ...]  # one number for each of the model's latents

TAKES_UNKNOWN = True  # each latent of the model is an option
_NAME_LENGTH = 28  # of a video in pictures, in characters


@dataclass(frozen=True)
class Pair:
    """Two videos and which of them gives which latent.

    Attributes:
        videos: A, which gives the model's first latent, and B.
        latents: The model's, by name.
        asked: The blend that was asked for: 0 where A gives the latent, 1 where B does.
    """

    videos: tuple[Input, Input]
    latents: tuple[str, ...]
    asked: Blend

    @classmethod
    def of(cls, latents: tuple[str, ...], videos: Mapping[str, Input]) -> Self:
        """Of the videos by latent; `UserError` where a latent of the model has none."""
        if missing := [name for name in latents if name not in videos]:
            options = ", ".join(f"--{name}" for name in missing)
            raise UserError(f"Expected a video for each of the latents {', '.join(latents)}, got none for {options}.")
        first = videos[latents[0]]
        (second,) = {entry for entry in videos.values() if entry.path.resolve() != first.path.resolve()}
        return cls((first, second), latents, tuple(float(videos[name].name != first.name) for name in latents))

    def name(self, blend: Blend) -> str:
        """Of a crossing's file: `A_structure__B_dynamics`."""
        pairs = zip(self.latents, blend, strict=True)
        return "__".join(f"{self.videos[round(share)].name}_{latent}" for latent, share in pairs)


@dataclass
class Reenact:
    """Decode one video's latent with another's.

    Args:
        out: Folder for what is written.
        steps: Columns of the interpolation, both ends among them.
        size: Side of the square that the middle of the pictures is cropped and resized to, for a model of any size.
        num_frames: Frames of the videos in the still of the grid.
        max_windows: Windows that are taken of the videos; by default all of the shorter one.
        overwrite: Replace outputs that are there.
    """

    out: str
    steps: int = 5
    size: int | None = None
    num_frames: int = 6
    max_windows: int | None = None
    overwrite: bool = False

    def __post_init__(self) -> None:
        check_counts(num_frames=self.num_frames, max_windows=self.max_windows)
        if self.steps < 2:
            raise UserError(f"Expected --steps of at least 2, the two ends, got {self.steps}.")

    def find(self, given: Mapping[str, str]) -> dict[str, Input]:
        """Paths by the name of the latent that they give → videos likewise; `UserError` where they are not two."""
        if len(given) < 2:
            got = f"only --{next(iter(given))}" if given else "none"
            raise UserError(f"Expected a video for each latent, as in --structure A --dynamics B, got {got}.")
        check_folder(self.out)
        videos = {name: _one_video(name, path) for name, path in given.items()}
        paths = sorted({entry.path.resolve() for entry in videos.values()})
        if len(paths) != 2:
            raise UserError(f"Expected latents from two videos, got {len(paths)}: {', '.join(map(str, paths))}.")
        if len({entry.name for entry in videos.values()}) == 1:  # of different folders
            videos = {n: Input(e.path, f"{e.path.resolve().parent.name}_{e.name}") for n, e in videos.items()}
            if len({entry.name for entry in videos.values()}) == 1:
                raise UserError(f"Expected two videos of different names, got {' and '.join(map(str, paths))}.")
        return videos

    def run(self, session: "Session", videos: Mapping[str, Input]) -> int:
        """Write and measure → exit code. `videos` are as `find` gives them, all of the model's latents."""
        if session.world_size > 1:
            raise UserError(f"Expected one device for one pair of videos, got {session.world_size}; leave --devices.")
        pair = Pair.of(session.model.latent_names, videos)
        blends = [pair.asked, tuple(1.0 - share for share in pair.asked)]
        names = [pair.name(blend) for blend in blends]
        targets = [self._target(name, ".mp4") for name in (*names, "grid", "interpolation")]
        targets += [self._target(name, ".png") for name in ("grid", "interpolation")]
        check_targets([*targets, self._target("reenact", ".json")], pair.videos, self.overwrite)
        work = _Crossing(self, session, pair)
        lines = work.write()
        for line in lines:
            session.tell(line)
        session.say(f"{work.table()}\n")
        if work.quantized:
            session.say(
                f"The latents {' and '.join(work.quantized)} are entries of codebooks. Between two of them there is no "
                "code: the columns between the ends of the interpolation decode vectors that are none.\n"
            )
        write_text(self._target("reenact", ".json"), json.dumps(work.results(), indent=2) + "\n")
        session.say("\n".join(str(path) for path in [*targets, self._target("reenact", ".json")]))
        return exit_code(1, len(lines))

    def _target(self, name: str, suffix: str) -> Path:
        return target(self.out, name, suffix)


class _Crossing:
    """The work on one pair: pictures and measures."""

    def __init__(self, options: Reenact, session: "Session", pair: Pair) -> None:
        from vidtwin.apply.meters import Change, Likeness

        self.options, self.session, self.pair = options, session, pair
        self.names = names = pair.latents
        self.crossings = (pair.asked, tuple(1.0 - share for share in pair.asked))
        self.ends = ((0.0,) * len(names), (1.0,) * len(names))
        self.labels = {
            self.ends[0]: "reconstruction A",
            self.ends[1]: "reconstruction B",
            **{blend: "\n".join(self._sources(blend)) for blend in self.crossings},
        }
        steps = [step / (options.steps - 1) for step in range(options.steps)]
        alone = {name: [tuple(step * (name == n) for n in names) for step in steps] for name in names}
        self.rows = {"all": [(step,) * len(names) for step in steps], **alone}
        self.num_frames = 0
        self.quantized: list[str] = []
        self.inputs = (Change(), Change())
        self.meters = {blend: (Likeness(), Likeness(), Change()) for blend in self.labels}
        self.rates: list[Fraction] = []

    def write(self) -> list[str]:
        """Write all pictures → lines about what is missing."""
        from vidtwin.video import panels

        options, session = self.options, self.session
        size = session.size(options.size)
        paths = [video.path for video in self.pair.videos]
        found = [examine(path) for path in paths]
        self.rates = [info.fps for info, _ in found]
        streams = [BeforeDamage(windows(path, session.num_frames, size), options.max_windows) for path in paths]
        moments = panels.StillSampler(options.num_frames)
        middle: list[Frames] = []
        with ExitStack() as stack:
            writers = [stack.enter_context(self._writer(blend, self.pair.name(blend)))
                       for blend in self.crossings]  # fmt: skip
            grid, blends = (stack.enter_context(self._writer(self.crossings[0], name, sound=False))
                            for name in ("grid", "interpolation"))  # fmt: skip
            for pair in zip(*streams, strict=False):
                decoded, inputs = self._window(pair)
                self._measure(decoded, inputs)
                self.num_frames += len(inputs[0])
                times = [window.times[: len(inputs[0])] for window in pair]
                for blend, writer in zip(self.crossings, writers, strict=True):
                    write(writer, decoded[blend], times[self._mover(blend)])
                moving = times[self._mover(self.crossings[0])]
                write(grid, self._grid(decoded, inputs), moving)
                moments.add(self._shown(decoded, inputs))
                picture = self._interpolation(decoded)
                write(blends, picture, moving)
                if not middle:
                    middle = [picture[len(picture) // 2]]
        write_png(target(options.out, "grid", ".png"), panels.filmstrip(moments.stills(), options.num_frames))
        write_png(target(options.out, "interpolation", ".png"), middle[0])
        lines = [f"{writer.path}: {writer.lost_sound}" for writer in writers if writer.lost_sound]
        for stream, (_, wrong) in zip(streams, found, strict=True):
            if reason := stream.reason or wrong:
                lines.append(f"{reason} What comes before was used, {self.num_frames} frames of both videos.")
        return lines

    def _writer(self, blend: Blend, name: str, sound: bool = True) -> VideoWriter:
        mover = self._mover(blend)
        path, source = target(self.options.out, name, ".mp4"), self.pair.videos[mover].path
        return VideoWriter(path, self.rates[mover], timed=True, sound=source if sound else None)

    def _mover(self, blend: Blend) -> int:
        """Which video gives the last latent, and with it the times: 0 (A) or 1 (B)."""
        return round(blend[-1])

    def _window(self, pair: tuple[Window, ...]) -> tuple[dict[Blend, Frames], list[Frames]]:
        """All blends and both inputs, as many frames of them as both videos have in this window."""
        from vidtwin.posteriors import Quantized

        shapes = [window.frames.shape[1:3] for window in pair]
        if shapes[0] != shapes[1]:
            first, second = (f"{width}x{height}" for height, width in shapes)
            raise UserError(f"Expected two videos of one size, got {first} and {second}; give both one by --size.")
        encodings = [self.session.encode([window.frames]) for window in pair]
        self.quantized = [name for name in self.names if isinstance(encodings[0][name], Quantized)]
        length = min(window.num_frames for window in pair)
        wanted = dict.fromkeys([*self.labels, *(blend for row in self.rows.values() for blend in row)])
        decoded = {blend: self.session.decode(blended(encodings, blend), *shapes[0])[0][:length] for blend in wanted}
        return decoded, [window.frames[:length] for window in pair]

    def _measure(self, decoded: dict[Blend, Frames], inputs: list[Frames]) -> None:
        for change, frames in zip(self.inputs, inputs, strict=True):
            change.add(frames)
        for blend, (to_a, to_b, change) in self.meters.items():
            to_a.add(decoded[blend], inputs[0])
            to_b.add(decoded[blend], inputs[1])
            change.add(decoded[blend])

    def _sources(self, blend: Blend) -> list[str]:
        return [f"{name} of {'AB'[round(share)]}" for name, share in zip(self.names, blend, strict=True)]

    def _shown(self, decoded: dict[Blend, Frames], inputs: list[Frames]) -> dict[str, Frames]:
        """Rows of the still."""
        shown = {}
        for letter, video, frames, end in zip("AB", self.pair.videos, inputs, self.ends, strict=True):
            shown[f"input {letter}\n{_short(video.name)}"] = frames
            shown[self.labels[end]] = decoded[end]
        return shown | {self.labels[blend]: decoded[blend] for blend in self.crossings}

    def _grid(self, decoded: dict[Blend, Frames], inputs: list[Frames]) -> Frames:
        from vidtwin.video import panels

        rows = [dict(zip(("input A", "input B"), inputs, strict=True))]
        rows += [{self.labels[blend]: decoded[blend] for blend in pair} for pair in (self.ends, self.crossings)]
        return panels.grid(rows, self._caption())

    def _interpolation(self, decoded: dict[Blend, Frames]) -> Frames:
        from vidtwin.video import panels

        rows = []
        for name, blends in self.rows.items():
            titles = [f"{name}: {100 * max(blend):.4g}% B" for blend in blends]
            rows.append({title: decoded[blend] for title, blend in zip(titles, blends, strict=True)})
        return panels.grid(rows, f"{self._caption()}\nLatents that a row does not name are A's.")

    def _caption(self) -> str:
        first, second = (_short(video.name) for video in self.pair.videos)
        return f"A = {first}\nB = {second}"

    def table(self) -> str:
        rows = [("view", "PSNR to A", "SSIM to A", "PSNR to B", "SSIM to B", "change")]
        for name, values in self.results()["views"].items():
            cells = [number(values[f"{measure}_{letter}"], digits) for letter in "ab"
                     for measure, digits in (("psnr", 2), ("ssim", 4))]  # fmt: skip
            rows.append((name, *cells, number(values["change"], 2)))
        first, second = (video.path for video in self.pair.videos)
        return f"A = {first}, B = {second}, {self.num_frames} frames\n\n{aligned(rows, left=1)}"

    def results(self) -> dict[str, Any]:
        views: dict[str, dict[str, float | None]] = {}
        nothing = dict.fromkeys(("psnr_a", "ssim_a", "psnr_b", "ssim_b"))
        for letter, change in zip("AB", self.inputs, strict=True):
            views[f"input {letter}"] = {**nothing, "change": change.value}
        for blend, (to_a, to_b, change) in self.meters.items():
            views[self.labels[blend].replace("\n", ", ")] = {
                "psnr_a": to_a.psnr.value,
                "ssim_a": to_a.ssim.value,
                "psnr_b": to_b.psnr.value,
                "ssim_b": to_b.ssim.value,
                "change": change.value,
            }
        return {
            "schema_version": 1,
            "checkpoint": self.session.checkpoint,
            "weights_sha256": self.session.weights_sha256,
            "model": self.session.model.spec(),
            "window": self.session.num_frames,
            "size": self.session.size(self.options.size),
            "a": str(self.pair.videos[0].path),
            "b": str(self.pair.videos[1].path),
            "num_frames": self.num_frames,
            "between_codes": self.quantized,
            "views": views,
        }


def blended(encodings: "list[Encoding]", blend: Blend) -> "Latents":
    """For each latent (1 − share) · A's + share · B's, of the posteriors' modes (a Gaussian's mean)."""
    first, second = (encoding.mode() for encoding in encodings)
    latents = {}
    for (name, z), share in zip(first.items(), blend, strict=True):
        # The ends are the latents as they are, to the last bit.
        latents[name] = z if share == 0 else second[name] if share == 1 else z + share * (second[name] - z)
    return latents


def _one_video(name: str, path: str) -> Input:
    found = find([path])
    if len(found) != 1:
        raise UserError(f"Expected one video for --{name}, got {len(found)} in {path}.")
    return Input(found[0].path, Path(found[0].name).name)


def _short(name: str) -> str:
    if len(name) <= _NAME_LENGTH:
        return name
    half = _NAME_LENGTH // 2 - 1
    return f"{name[:half]}…{name[-half:]}"


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the session and of the command; those of the latents are known with the checkpoint."""
    add_class_options(parser, SessionOptions, Reenact)


def run(options: "Namespace", unknown: Sequence[tuple[str, str]] = ()) -> int:
    """Run the command → exit code. `unknown` options name latents, and their values the videos that give them."""
    videos: dict[str, str] = {}
    for name, video in unknown:
        if not video:
            raise UserError(f"Expected a video after --{name}, got none.")
        if name in videos:
            raise UserError(f"Expected --{name} once, got it twice.")
        videos[name] = video
    session_options = build(SessionOptions, options)
    session_options.check()
    work = build(Reenact, options)
    entries = work.find(videos)
    check_weights(session_options.ckpt_path)
    from vidtwin.apply.session import Session

    session = Session(session_options)
    names = session.model.latent_names
    if strangers := [name for name in videos if name not in names]:
        wanted = " ".join(f"--{name} VIDEO" for name in names)
        known = [*names, *(each.name for cls in (SessionOptions, Reenact) for each in fields(cls))]
        near = suggestion(strangers[0], known)
        raise UserError(f"Expected {wanted} for {type(session.model).__name__}, got --{strangers[0]}{near}")
    return work.run(session, entries)
