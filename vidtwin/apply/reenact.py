"""`vidtwin reenact`: decode one video's latent with another's, and interpolate between their latents (paper, A.3).

Every picture is decoded from a blend: the share of B in each latent (0: A's latent, 1: B's). A's own reconstruction is
(0, 0), B's is (1, 1), the crossings are (0, 1) and (1, 0).
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from vidtwin import console
from vidtwin.apply.inputs import Input, check_folder, check_targets, find, target
from vidtwin.apply.options import SessionOptions, add_class_options, build, check_counts, check_weights, exit_code
from vidtwin.apply.outputs import align, format_measures, write_frames, write_png
from vidtwin.apply.windows import VideoWindows, Window, batched, count_frames
from vidtwin.console import Progress
from vidtwin.errors import UserError, suggestion
from vidtwin.files import write_text
from vidtwin.video import Frames, VideoWriter, panels

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace
    from torch import Tensor

    from vidtwin.apply.session import Download, Session
    from vidtwin.posteriors import Encoding, Latents

    _Read = tuple[list[tuple[Window, ...]], list[Tensor]]
    _Decoded = tuple[list[tuple[Window, ...]], dict[tuple[float, ...], Download]]

USAGE = "--LATENT VIDEO --LATENT VIDEO --out DIR --ckpt_path PATH [options]"
DESCRIPTION = """\
Decode one video's latent with another video's: re-enactment (VidTwin, appendix A.3).

  vidtwin reenact --structure a.mp4 --dynamics b.mp4 --out crossed --ckpt_path runs/vidtwin/checkpoints/last.ckpt
  vidtwin reenact --content a.mp4 --motion b.mp4 --out crossed --ckpt_path runs/cmd/checkpoints/last.ckpt

Each latent of the checkpoint's model is an option that names the video to take it from; two videos in all. They are
processed window by window, frame k beside frame k, up to the end of the shorter one. It writes to DIR

  A_structure__B_dynamics.mp4            both crossings, at the times and with the sound of the video that gives the
  B_structure__A_dynamics.mp4            model's last latent
  grid.mp4, grid.png                     both inputs, their reconstructions and the crossings
  interpolation.mp4, interpolation.png   from A's latents to B's in --steps columns: all latents, and each one alone
  reenact.json                           PSNR and SSIM of each against A and B, and its change, as printed

Exit code: 0 done, 1 a video is damaged (the frames before the damage were used), 2 nothing was written.
"""

Blend = tuple[float, ...]  # the share of B, per latent of the model

_NAME_LENGTH = 28  # of a video in pictures, in characters


@dataclass(frozen=True)
class Pair:
    """Two videos and the latents to take from each.

    Attributes:
        videos: A, which gives the model's first latent, and B.
        latents: Names of the model's latents.
        asked: The requested blend: 0 for a latent from A, 1 for one from B.
    """

    videos: tuple[Input, Input]
    latents: tuple[str, ...]
    asked: Blend

    @classmethod
    def of(cls, latents: tuple[str, ...], videos: Mapping[str, Input]) -> Self:
        """Make a pair of the videos by latent; raise `UserError` if a latent of the model has none."""
        if missing := [name for name in latents if name not in videos]:
            options = ", ".join(f"--{name}" for name in missing)
            raise UserError(f"Expected a video for each of the latents {', '.join(latents)}, got none for {options}.")
        first = videos[latents[0]]
        (second,) = {entry for entry in videos.values() if entry.path.resolve() != first.path.resolve()}
        return cls((first, second), latents, tuple(float(videos[name].name != first.name) for name in latents))

    @property
    def crossings(self) -> tuple[Blend, Blend]:
        """Return the requested blend and its opposite."""
        return self.asked, tuple(1.0 - share for share in self.asked)

    def name(self, blend: Blend) -> str:
        """Return the name of a crossing's file: `A_structure__B_dynamics`."""
        pairs = zip(self.latents, blend, strict=True)
        return "__".join(f"{self.videos[round(share)].name}_{latent}" for latent, share in pairs)


@dataclass
class Reenact:
    """Decode one video's latent with another's.

    Args:
        out: Folder for the results.
        steps: Columns of the interpolation, including both ends.
        size: Side of the square to which the centres of the pictures are cropped and resized, for a model of any size.
        num_frames: Frames of the videos in the still of the grid.
        max_windows: Maximum number of windows; by default all of the shorter video.
        batch_size: Windows of each video per forward pass.
        overwrite: Replace existing outputs.
        progress: Show a progress bar.
    """

    out: str
    steps: int = 5
    size: int | None = None
    num_frames: int = 6
    max_windows: int | None = None
    batch_size: int = 1
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(num_frames=self.num_frames, max_windows=self.max_windows, batch_size=self.batch_size)
        if self.steps < 2:
            raise UserError(f"Expected --steps of at least 2, the two ends, got {self.steps}.")

    def find(self, given: Mapping[str, str]) -> dict[str, Input]:
        """Find the videos of paths by the latent to take from each; raise `UserError` unless they are two."""
        if len(given) < 2:
            got = f"only --{next(iter(given))}" if given else "none"
            raise UserError(f"Expected a video for each latent, as in --structure A --dynamics B, got {got}.")
        check_folder(self.out)
        videos = {name: _find_one(name, path) for name, path in given.items()}
        paths = sorted({entry.path.resolve() for entry in videos.values()})
        if len(paths) != 2:
            raise UserError(f"Expected latents from two videos, got {len(paths)}: {', '.join(map(str, paths))}.")
        if len({entry.name for entry in videos.values()}) == 1:  # of different folders
            videos = {n: Input(e.path, f"{e.path.resolve().parent.name}_{e.name}") for n, e in videos.items()}
            if len({entry.name for entry in videos.values()}) == 1:
                raise UserError(f"Expected two videos of different names, got {' and '.join(map(str, paths))}.")
        return videos

    def run(self, session: "Session", videos: Mapping[str, Input]) -> int:
        """Write and measure → exit code. `videos` come from `find`, one for each of the model's latents."""
        if session.world_size > 1:
            raise UserError(f"Expected one device for one pair of videos, got {session.world_size}; leave --devices.")
        pair = Pair.of(session.model.latent_names, videos)
        names = [pair.name(blend) for blend in pair.crossings]
        targets = [self._target(name, ".mp4") for name in (*names, "grid", "interpolation")]
        targets += [self._target(name, ".png") for name in ("grid", "interpolation")]
        targets.append(self._target("reenact", ".json"))
        check_targets(targets, pair.videos, self.overwrite)
        work = _Crossing(self, session, pair)
        problems = work.write()
        for problem in problems:
            console.log(problem)
        console.write(f"{work.format_table()}\n")
        if work.quantized:
            console.write(
                f"The latents {' and '.join(work.quantized)} are entries of codebooks. Between two entries there is no "
                "code: the inner columns of the interpolation decode vectors outside the codebook.\n"
            )
        write_text(targets[-1], json.dumps(work.results(), indent=2) + "\n")
        console.write("\n".join(map(str, targets)))
        return exit_code(1, len(problems))

    def _target(self, name: str, suffix: str) -> Path:
        return target(self.out, name, suffix)


class _Crossing:
    """Pictures and measures of one pair."""

    def __init__(self, options: Reenact, session: "Session", pair: Pair) -> None:
        from vidtwin.apply.meters import FrameChange, Quality

        self.options, self.session, self.pair = options, session, pair
        self.names = names = pair.latents
        self.size = session.size(options.size)
        self.ends = ((0.0,) * len(names), (1.0,) * len(names))
        self.labels = {
            self.ends[0]: "reconstruction A",
            self.ends[1]: "reconstruction B",
            **{blend: "\n".join(self._name_sources(blend)) for blend in pair.crossings},
        }
        steps = [step / (options.steps - 1) for step in range(options.steps)]
        alone = {name: [tuple(step * (name == n) for n in names) for step in steps] for name in names}
        self.rows = {"all": [(step,) * len(names) for step in steps], **alone}
        self.num_frames = 0
        self.quantized: list[str] = []
        # By view: quality against A and B, which inputs have not, and change.
        views = ("input A", "input B", *self.labels.values())
        self.meters = {name: ((Quality(), Quality()), FrameChange()) for name in views}

    def write(self) -> list[str]:
        """Write all pictures → problems, a line each."""
        options, session = self.options, self.session
        longest = None if options.max_windows is None else options.max_windows * session.num_frames
        total = min(count_frames([video], longest) for video in self.pair.videos) if options.progress else 0
        problems: list[str] = []
        with Progress(total, "reenacting", "frames", options.progress) as bar:
            session.run(
                [[VideoWindows(video.path, session.num_frames, self.size, options.max_windows)
                  for video in self.pair.videos]],
                self._read,
                self._decode,
                lambda streams, results: problems.extend(self._write(streams, results, bar)),
            )  # fmt: skip
        return problems

    def _read(self, streams: list[VideoWindows]) -> "Iterator[_Read]":
        for pairs in batched(zip(*streams, strict=False), self.options.batch_size):
            yield pairs, [self.session.stack([window.frames for window in some]) for some in zip(*pairs, strict=True)]

    def _decode(self, read: "_Read") -> "_Decoded":
        """Decode all blends of pairs of windows."""
        from vidtwin.posteriors import Quantized

        pairs, stacked = read
        shapes = [tuple(each.shape[2:4]) for each in stacked]
        if shapes[0] != shapes[1]:
            first, second = (f"{width}x{height}" for height, width in shapes)
            raise UserError(f"Expected two videos of one size, got {first} and {second}; give both one by --size.")
        encodings = [self.session.encode(each) for each in stacked]
        self.quantized = [name for name in self.names if isinstance(encodings[0][name], Quantized)]
        wanted = dict.fromkeys([*self.labels, *(blend for row in self.rows.values() for blend in row)])
        latents = {blend: blend_latents(encodings, blend) for blend in wanted}
        return pairs, {blend: self.session.decode(z, *shapes[0]) for blend, z in latents.items()}

    def _write(self, streams: list[VideoWindows], results: "Iterator[_Decoded]", bar: Progress) -> list[str]:
        """Write and measure what is decoded → problems, a line each."""
        options = self.options
        sampler = panels.StillSampler(options.num_frames)
        middle: list[Frames] = []
        with ExitStack() as stack:

            def open_writer(name: str, mover: int, sound: bool = True) -> VideoWriter:
                path, source = target(options.out, name, ".mp4"), self.pair.videos[mover].path
                rate = streams[mover].info.fps
                return stack.enter_context(VideoWriter(path, rate, timed=True, sound=source if sound else None))

            # The video that gives the last latent gives the times too: 0 is A, 1 is B.
            movers = {blend: round(blend[-1]) for blend in self.pair.crossings}
            writers = {blend: open_writer(self.pair.name(blend), mover) for blend, mover in movers.items()}
            first = movers[self.pair.asked]
            grid, interpolation = (open_writer(name, first, sound=False) for name in ("grid", "interpolation"))
            for pair, clips in _iterate(results):
                length = min(window.num_frames for window in pair)
                self.num_frames += length
                times = [window.times[:length] for window in pair]
                decoded = {blend: clip[:length] for blend, clip in clips.items()}
                shown = {f"input {letter}": w.frames[:length] for letter, w in zip("AB", pair, strict=True)}
                shown |= {label: decoded[blend] for blend, label in self.labels.items()}
                self._measure(shown)
                sampler.add(shown)
                for blend, writer in writers.items():
                    write_frames(writer, decoded[blend], times[movers[blend]])
                rows = [dict(row) for row in batched(shown.items(), 2)]
                write_frames(grid, panels.grid(rows, self._caption()), times[first])
                picture = self._draw_interpolation(decoded)
                write_frames(interpolation, picture, times[first])
                if not middle:
                    middle = [picture[len(picture) // 2]]
                bar.update(length)
        still = panels.filmstrip(self._order(sampler.stills()), options.num_frames)
        write_png(target(options.out, "grid", ".png"), still)
        write_png(target(options.out, "interpolation", ".png"), middle[0])
        problems = [f"{writer.path}: {writer.lost_sound}" for writer in writers.values() if writer.lost_sound]
        return problems + [
            f"{stream.damage} The frames before were used, {self.num_frames} of both videos."
            for stream in streams
            if stream.damage
        ]

    def _measure(self, shown: dict[str, Frames]) -> None:
        for name, (qualities, change) in self.meters.items():
            change.add(shown[name])
            if not name.startswith("input"):
                for letter, quality in zip("AB", qualities, strict=True):
                    quality.add(shown[name], shown[f"input {letter}"])

    def _name_sources(self, blend: Blend) -> list[str]:
        return [f"{name} of {'AB'[round(share)]}" for name, share in zip(self.names, blend, strict=True)]

    def _order(self, stills: dict[str, Frames]) -> dict[str, Frames]:
        """Put each reconstruction below its input, with the video's name, and the crossings at the end."""
        rows = {}
        for letter, video in zip("AB", self.pair.videos, strict=True):
            rows[f"input {letter}\n{_shorten(video.name)}"] = stills.pop(f"input {letter}")
            rows[f"reconstruction {letter}"] = stills.pop(f"reconstruction {letter}")
        return rows | stills

    def _draw_interpolation(self, decoded: dict[Blend, Frames]) -> Frames:
        rows = []
        for name, blends in self.rows.items():
            titles = [f"{name}: {100 * max(blend):.4g}% B" for blend in blends]
            rows.append({title: decoded[blend] for title, blend in zip(titles, blends, strict=True)})
        return panels.grid(rows, f"{self._caption()}\nLatents that a row does not name are A's.")

    def _caption(self) -> str:
        first, second = (_shorten(video.name) for video in self.pair.videos)
        return f"A = {first}\nB = {second}"

    def format_table(self) -> str:
        """Format a line per view."""
        rows = [("view", "PSNR to A", "SSIM to A", "PSNR to B", "SSIM to B", "change")]
        for name, values in self.results()["views"].items():
            rows.append((name, *format_measures(values)))
        first, second = (video.path for video in self.pair.videos)
        return f"A = {first}, B = {second}, {self.num_frames} frames\n\n{align(rows, left=1)}"

    def results(self) -> dict[str, Any]:
        """Return the content of reenact.json."""
        views: dict[str, dict[str, float | None]] = {}
        for label, (qualities, change) in self.meters.items():
            values = {f"{name}_{letter}": value for letter, quality in zip("ab", qualities, strict=True)
                      for name, value in quality.values().items()}  # fmt: skip
            views[label.replace("\n", ", ")] = {**values, "change": change.value}
        return {
            "schema_version": 1,
            **self.session.describe(self.size),
            "a": str(self.pair.videos[0].path),
            "b": str(self.pair.videos[1].path),
            "num_frames": self.num_frames,
            "between_codes": self.quantized,
            "views": views,
        }


def _iterate(results: "Iterator[_Decoded]") -> "Iterator[tuple[tuple[Window, ...], dict[Blend, Frames]]]":
    """Yield pairs of windows, each with its decoded blends."""
    for pairs, blends in results:
        arrived = {blend: download.wait().numpy() for blend, download in blends.items()}
        for place, pair in enumerate(pairs):
            yield pair, {blend: clips[place] for blend, clips in arrived.items()}


def blend_latents(encodings: "list[Encoding]", blend: Blend) -> "Latents":
    """Compute (1 − share) · A's + share · B's of each latent, from the posteriors' modes (a Gaussian's mean)."""
    first, second = (encoding.mode() for encoding in encodings)
    latents = {}
    for (name, z), share in zip(first.items(), blend, strict=True):
        # The ends are the latents themselves, to the last bit.
        latents[name] = z if share == 0 else second[name] if share == 1 else z + share * (second[name] - z)
    return latents


def _find_one(name: str, path: str) -> Input:
    found = find([path])
    if len(found) != 1:
        raise UserError(f"Expected one video for --{name}, got {len(found)} in {path}.")
    return Input(found[0].path, Path(found[0].name).name)


def _shorten(name: str) -> str:
    if len(name) <= _NAME_LENGTH:
        return name
    half = _NAME_LENGTH // 2 - 1
    return f"{name[:half]}…{name[-half:]}"


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the session and of the command; only the checkpoint names those of the latents."""
    add_class_options(parser, SessionOptions, Reenact)


def run(options: "Namespace", unknown: Sequence[tuple[str, str]] = ()) -> int:
    """Run the command → exit code. `unknown` are pairs of a latent's name and a video."""
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
    if others := [name for name in videos if name not in names]:
        wanted = " ".join(f"--{name} VIDEO" for name in names)
        known = [*names, *(each.name for cls in (SessionOptions, Reenact) for each in fields(cls))]
        near = suggestion(others[0], known)
        raise UserError(f"Expected {wanted} for {type(session.model).__name__}, got --{others[0]}{near}")
    return work.run(session, entries)
