"""`vidtwin decouple`: decode each latent of a model alone, beside the input, and measure it (paper, figure 2).

window ── encode ──> latents ─┬─ all ────────────> reconstruction
                              ├─ {structure: z} ─> structure only
                              └─ {dynamics: z} ──> dynamics only
"""

import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin import console
from vidtwin.apply.command import run_in_session
from vidtwin.apply.inputs import check_folder, check_targets, find, target
from vidtwin.apply.options import SessionOptions, add_class_options, check_counts, exit_code
from vidtwin.apply.outputs import Rendering, align, format_measures, write_png
from vidtwin.apply.windows import Window, count_frames
from vidtwin.console import Progress
from vidtwin.files import write_text
from vidtwin.tables import write_table
from vidtwin.video import Frames, panels

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from vidtwin.apply.session import Download, Session

    _Decoded = tuple[list[Window], dict[str, Download]]  # windows and their views

USAGE = "IN [IN ...] --out DIR --ckpt_path PATH [options]"
DESCRIPTION = """\
Show what each latent of a model carries: the input, its reconstruction, and each latent decoded alone.

  vidtwin decouple a.mp4 videos/ --out decoupled --ckpt_path runs/vidtwin/checkpoints/last.ckpt

IN are files, folders (all videos below them) or globs. For each video it writes DIR/NAME.mp4 (the views side by side,
at the input's times and with its sound) and DIR/NAME.png (evenly spaced frames, a row per view). Then it prints, and
writes to DIR/decouple.csv and DIR/decouple.json, the measures of each view: PSNR and SSIM against the input, `change`
(mean absolute difference of consecutive frames, in steps of 1/255), all means over frames, and the latent's share of
the numbers. docs/latents_apart.md explains them.

Exit code: 0 all done, 1 a video failed or is damaged (a line on stderr says which and why), 2 nothing was written.
"""

INPUT = "input"
FILES = ("decouple.csv", "decouple.json")
_MEASURES = ("psnr", "ssim", "change")


@dataclass
class View:
    """Measures of one view of a video.

    Attributes:
        psnr: PSNR against the input in dB, mean over frames; None for the input.
        ssim: SSIM likewise; None for frames that are too small, too.
        change: Mean absolute difference of consecutive frames, in 8-bit steps; None for a single frame.
        numbers: Count of the numbers, per window, in the latents from which it was decoded; None for the input.
        share: The same as a share of the numbers in all latents.
        rate: The same as a share of the values in the window's pixels.
    """

    psnr: float | None = None
    ssim: float | None = None
    change: float | None = None
    numbers: int | None = None
    share: float | None = None
    rate: float | None = None


@dataclass
class Video:
    """A video's views by name; `note` says why it, its end or its sound is missing."""

    name: str
    source: str
    num_frames: int = 0
    note: str | None = None
    views: dict[str, View] = field(default_factory=dict)


@dataclass
class Decouple:
    """Show what each latent of a model carries.

    Args:
        inputs: Video files, folders of them, globs.
        out: Folder for the results.
        size: Side of the square to which pictures are cropped and resized, for models that take any size; by default
            the whole picture.
        num_frames: Frames of a video in its still.
        max_windows: Maximum number of windows per video; by default all.
        batch_size: Windows per forward pass.
        overwrite: Replace existing outputs.
        progress: Show a progress bar.
    """

    inputs: list[str]
    out: str
    size: int | None = None
    num_frames: int = 6
    max_windows: int | None = None
    batch_size: int = 1
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(num_frames=self.num_frames, max_windows=self.max_windows, batch_size=self.batch_size)
        check_folder(self.out)
        self.entries = find(self.inputs)
        targets = [target(self.out, entry.name, suffix) for entry in self.entries for suffix in (".mp4", ".png")]
        check_targets([*targets, *(Path(self.out) / name for name in FILES)], self.entries, self.overwrite)

    def run(self, session: "Session") -> int:
        """Show and measure this process's share of the videos → exit code, the same for all processes."""
        for latent in session.model.latent_names:
            session.check_partial(latent)
        size = session.size(self.size)
        entries = self.entries[session.rank :: session.world_size]
        longest = None if self.max_windows is None else self.max_windows * session.num_frames
        shown = self.progress and session.is_main
        mine: list[Video] = []
        with Progress(count_frames(entries, longest) if shown else 0, "decoupling", "frames", shown) as bar:

            def read(rendering: Rendering) -> Iterator[tuple[list[Window], Any]]:
                for some in rendering.read(session.num_frames, size, self.batch_size, self.max_windows):
                    yield some, session.stack([window.frames for window in some])

            def compute(batch: tuple[list[Window], Any]) -> "_Decoded":
                return batch[0], session.views(batch[1])

            session.run(
                (Rendering(entry, target(self.out, entry.name, ".mp4")) for entry in entries),
                read,
                compute,
                lambda rendering, results: mine.append(self._write_video(session, rendering, results, bar)),
            )
        videos = [video for part in session.gather(mine) for video in part]
        order = {entry.name: place for place, entry in enumerate(self.entries)}
        videos.sort(key=lambda video: order[video.name])
        done = [video for video in videos if video.num_frames]
        if session.is_main and done:
            self._write(session, videos, size)
            session.say(f"\n{format_table(done)}\n")
            session.say("\n".join(str(Path(self.out) / name) for name in FILES))
        return exit_code(len(done), sum(bool(video.note) for video in videos))

    def _write_video(
        self, session: "Session", rendering: Rendering, results: "Iterator[_Decoded]", bar: Progress
    ) -> Video:
        """Write a video's pictures and measure its views."""
        from vidtwin.apply.meters import FrameChange, Quality

        entry, path = rendering.entry, rendering.path
        meters: dict[str, tuple[Quality, FrameChange]] = {}
        sampler = panels.StillSampler(self.num_frames)
        shape: tuple[int, ...] = ()

        def draw() -> Iterator[tuple[Window, Frames]]:
            nonlocal shape
            for some, views in results:
                arrived = {name: view.wait().numpy() for name, view in views.items()}
                for place, window in enumerate(some):
                    shape = window.frames.shape
                    clips = {INPUT: window.frames} | {name: made[place] for name, made in arrived.items()}
                    shown = {name: clip[: window.num_frames] for name, clip in clips.items()}
                    for name, frames in shown.items():
                        quality, change = meters.setdefault(name, (Quality(), FrameChange()))
                        change.add(frames)
                        if name != INPUT:
                            quality.add(frames, shown[INPUT])
                    sampler.add(shown)
                    yield window, panels.side_by_side(shown)

        written = rendering.write(draw(), bar)
        result = Video(entry.name, str(entry.path), written.num_frames, written.note)
        if written.num_frames:
            numbers = session.count_numbers(shape)
            for (name, (quality, change)), count in zip(meters.items(), (None, *numbers), strict=True):
                view = View(**quality.values(), change=change.value, numbers=count)
                if count is not None:
                    view.share, view.rate = count / numbers[0], count / math.prod(shape)
                result.views[name] = view
            write_png(target(self.out, entry.name, ".png"), _draw_still(sampler, result))
            console.write(f"{entry.path} -> {path}")
        return result

    def _write(self, session: "Session", videos: list[Video], size: int | None) -> None:
        done = [video for video in videos if video.num_frames]
        columns = ["video", "num_frames", "view", *asdict(View())]
        rows = (
            [video.name, video.num_frames, name, *asdict(view).values()]
            for video in done
            for name, view in video.views.items()
        )
        write_table(Path(self.out) / "decouple.csv", columns, rows)
        content = {
            "schema_version": 1,
            **session.describe(size),
            "videos": [asdict(video) for video in videos],
            "mean": average(done),
        }
        write_text(Path(self.out) / "decouple.json", json.dumps(content, indent=2) + "\n")


def average(videos: list[Video]) -> dict[str, dict[str, float | None]]:
    """Average the measures of each view over videos; each video counts once."""
    found: dict[str, dict[str, float | None]] = {}
    for name in videos[0].views if videos else ():
        found[name] = {}
        for measure in _MEASURES:
            values = [v for video in videos if (v := getattr(video.views[name], measure)) is not None]
            found[name][measure] = sum(values) / len(values) if values else None
    return found


def format_table(videos: list[Video]) -> str:
    """Format a line per view, videos one after the other, and the means if there are several."""
    rows: list[tuple[str, ...]] = [("video", "view", "frames", "PSNR", "SSIM", "change", "numbers")]
    tables = [(video.name, str(video.num_frames), {name: vars(view) for name, view in video.views.items()})
              for video in videos]  # fmt: skip
    if len(videos) > 1:
        tables.append((f"mean of {len(videos)}", "", average(videos)))
    for title, frames, views in tables:
        for name, view in views.items():
            share = view.get("share")
            cells = format_measures({measure: view[measure] for measure in _MEASURES})
            rows.append((title, name, frames, *cells, "" if share is None else f"{share:.1%}"))
            title = frames = ""
    return align(rows, left=2)


def _draw_still(sampler: panels.StillSampler, video: Video) -> Frames:
    """Draw a filmstrip with the measures below the names."""
    labelled = {}
    for name, frames in sampler.stills().items():
        view = video.views[name]
        lines = [name, f"PSNR {view.psnr:.2f} dB" if view.psnr is not None else ""]
        lines.append(f"change {view.change:.2f}" if view.change is not None else "")
        labelled["\n".join(filter(None, lines))] = frames
    return panels.filmstrip(labelled, sampler.number)


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the session and of the command."""
    add_class_options(parser, SessionOptions, Decouple)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    return run_in_session(Decouple, options)
