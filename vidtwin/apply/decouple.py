"""What each latent of a model carries: its view alone, beside the input, and measures of it (paper, figure 2).

window ── encode ──> latents ─┬─ all ────────────> reconstruction
                              ├─ {structure: z} ─> structure only
                              └─ {dynamics: z} ──> dynamics only
"""

import csv
import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vidtwin.apply.command import run_in_session
from vidtwin.apply.inputs import Input, check_folder, check_targets, find, target
from vidtwin.apply.options import SessionOptions, add_class_options, exit_code
from vidtwin.apply.windows import BeforeDamage, Window, examine, windows
from vidtwin.errors import UserError
from vidtwin.files import replacing, write_text
from vidtwin.video import Frames, VideoError, VideoWriter

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from vidtwin.apply.session import Session
    from vidtwin.video import panels

USAGE = "IN [IN ...] --out DIR --ckpt_path PATH [options]"
DESCRIPTION = """\
Show what each latent of a model carries: the input, its reconstruction, and what is decoded of each latent alone.

  vidtwin decouple a.mp4 videos/ --out decoupled --ckpt_path runs/vidtwin/checkpoints/last.ckpt

IN are files, folders (all videos below them) or globs. For each video it writes DIR/NAME.mp4 (the views side by side,
at the input's times and with its sound) and DIR/NAME.png (frames evenly over the video, a row a view). Then it prints,
and writes to DIR/decouple.csv and DIR/decouple.json, for each view: PSNR and SSIM against the input, `change` (the mean
absolute difference of consecutive frames, in steps of 1/255) and the latent's share of the numbers. Means of frames.
docs/latents_apart.md says what they mean.

Exit code: 0 all done, 1 a video failed or is damaged (a line on stderr says which and why), 2 nothing was made.
"""

INPUT, RECONSTRUCTION = "input", "reconstruction"
FILES = ("decouple.csv", "decouple.json")
_MEASURES = ("psnr", "ssim", "change")


@dataclass
class View:
    """What was measured of one view of a video.

    Attributes:
        psnr: Against the input, in dB, mean over frames; None for the input.
        ssim: Likewise; None where frames are too small for it too.
        change: Mean absolute difference of consecutive frames, in 8-bit steps; None of a single frame.
        numbers: Of the latents that it was decoded from, for one window; None for the input.
        share: Of the numbers of all latents.
        rate: Of the numbers of the window's pixels.
    """

    psnr: float | None = None
    ssim: float | None = None
    change: float | None = None
    numbers: int | None = None
    share: float | None = None
    rate: float | None = None


@dataclass
class Video:
    """A video's views by name; `note` says why it was not used, not to its end, or what was lost of it."""

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
        out: Folder for what is written.
        size: Side of the square that pictures are cropped and resized to, for models that take any size; by default
            those take the whole picture.
        num_frames: Frames of a video in its still.
        max_windows: Windows that are taken of each video; by default all.
        overwrite: Replace outputs that are there.
        progress: Show a progress bar.
    """

    inputs: list[str]
    out: str
    size: int | None = None
    num_frames: int = 6
    max_windows: int | None = None
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(num_frames=self.num_frames, max_windows=self.max_windows)
        check_folder(self.out)
        self.entries = find(self.inputs)
        targets = [target(self.out, entry.name, suffix) for entry in self.entries for suffix in (".mp4", ".png")]
        check_targets([*targets, *(Path(self.out) / name for name in FILES)], self.entries, self.overwrite)

    def run(self, session: "Session") -> int:
        """Show and measure this process's share → exit code, the same for all processes."""
        for latent in session.model.latent_names:
            session.check_partial(latent)
        size = session.size(self.size)
        mine = []
        with tqdm(unit="frame", disable=None if session.is_main and self.progress else True) as bar:
            for entry in self.entries[session.rank :: session.world_size]:
                mine.append(self._video(session, entry, size, bar))
        videos = [video for part in session.gather(mine) for video in part]
        order = {entry.name: place for place, entry in enumerate(self.entries)}
        videos.sort(key=lambda video: order[video.name])
        done = [video for video in videos if video.num_frames]
        if session.is_main and done:
            self._write(session, videos, size)
            session.say(f"\n{table(done)}\n")
            session.say("\n".join(str(Path(self.out) / name) for name in FILES))
        return exit_code(len(done), sum(bool(video.note) for video in videos))

    def _video(self, session: "Session", entry: Input, size: int | None, bar: "tqdm[None]") -> Video:
        """Write a video's pictures and measure its views."""
        from vidtwin.apply.meters import Change, Likeness
        from vidtwin.video import panels

        result = Video(entry.name, str(entry.path))
        meters: dict[str, tuple[Likeness, Change]] = {}
        moments = panels.StillSampler(self.num_frames)
        path = target(self.out, entry.name, ".mp4")
        try:
            info, wrong = examine(entry.path)
            parts = BeforeDamage(windows(entry.path, session.num_frames, size), self.max_windows)
            with VideoWriter(path, info.fps, timed=True, sound=entry.path) as writer:
                for window in parts:
                    shown = self._views(session, window, result)
                    for name, frames in shown.items():
                        likeness, change = meters.setdefault(name, (Likeness(), Change()))
                        change.add(frames)
                        if name != INPUT:
                            likeness.add(frames, shown[INPUT])
                    moments.add(shown)
                    write(writer, panels.side_by_side(shown), window.times)
                    result.num_frames += window.num_frames
                    bar.update(window.num_frames)
        except VideoError as error:
            session.tell(str(error))
            return Video(entry.name, str(entry.path), note=str(error))
        for name, (likeness, change) in meters.items():
            view = result.views[name]
            view.psnr, view.ssim, view.change = likeness.psnr.value, likeness.ssim.value, change.value
        write_png(target(self.out, entry.name, ".png"), _still(moments, result))
        damage = parts.reason or (str(wrong) if wrong else None)
        result.note = session.tell_lack(path, result.num_frames, damage, writer.lost_sound)
        session.report(f"{entry.path} -> {path}")
        return result

    def _views(self, session: "Session", window: Window, result: Video) -> dict[str, Frames]:
        """The real frames of each view of a window; what does not depend on the frames goes into `result`."""
        height, width = window.frames.shape[1:3]
        latents = session.encode([window.frames]).mode()
        parts = {RECONSTRUCTION: latents} | {f"{name} only": {name: z} for name, z in latents.items()}
        shown = {INPUT: window.frames}
        for name, part in parts.items():
            shown[name] = session.decode(part, height, width)[0]
        if not result.views:
            total = sum(z.numel() for z in latents.values())
            result.views[INPUT] = View()
            for name, part in parts.items():
                numbers = sum(z.numel() for z in part.values())
                view = View(numbers=numbers, share=numbers / total, rate=numbers / window.frames.size)
                result.views[name] = view
        return {name: frames[: window.num_frames] for name, frames in shown.items()}

    def _write(self, session: "Session", videos: list[Video], size: int | None) -> None:
        done = [video for video in videos if video.num_frames]
        rows = io.StringIO(newline="")
        writer = csv.writer(rows, lineterminator="\n")
        writer.writerow(["video", "num_frames", "view", *asdict(View())])
        for video in done:
            for name, view in video.views.items():
                writer.writerow([video.name, video.num_frames, name, *asdict(view).values()])
        write_text(Path(self.out) / "decouple.csv", rows.getvalue())
        content = {
            "schema_version": 1,
            "checkpoint": session.checkpoint,
            "weights_sha256": session.weights_sha256,
            "model": session.model.spec(),
            "window": session.num_frames,
            "size": size,
            "videos": [asdict(video) for video in videos],
            "mean": means(done),
        }
        write_text(Path(self.out) / "decouple.json", json.dumps(content, indent=2) + "\n")


def check_counts(**counts: int | None) -> None:
    """Raise `UserError` for an option that counts something and is below 1."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"Expected --{name} of at least 1, got {count}.")


def write(writer: VideoWriter, frames: Frames, times: list[Fraction]) -> None:
    """Add frames (T, H, W, 3) at their times."""
    for frame, time in zip(frames, times, strict=True):
        writer.write(frame, time)


def write_png(path: Path, image: Frames) -> None:
    from vidtwin.video import panels

    with replacing(path) as temporary:
        temporary.write_bytes(panels.png(image))


def number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def means(videos: list[Video]) -> dict[str, dict[str, float | None]]:
    """For each view the means over videos, each of which counts once."""
    found: dict[str, dict[str, float | None]] = {}
    for name in videos[0].views if videos else ():
        found[name] = {}
        for measure in _MEASURES:
            values = [v for video in videos if (v := getattr(video.views[name], measure)) is not None]
            found[name][measure] = sum(values) / len(values) if values else None
    return found


def table(videos: list[Video]) -> str:
    """A line a view, videos one after the other, and the means where there are several."""
    rows = [("video", "view", "frames", "PSNR", "SSIM", "change", "numbers")]
    named = [(video.name, str(video.num_frames), {name: asdict(view) for name, view in video.views.items()})
             for video in videos]  # fmt: skip
    if len(videos) > 1:
        named.append((f"mean of {len(videos)}", "", {name: dict(values) for name, values in means(videos).items()}))
    for title, frames, views in named:
        for name, view in views.items():
            share = view.get("share")
            cells = (number(view["psnr"], 2), number(view["ssim"], 4), number(view["change"], 2))
            rows.append((title, name, frames, *cells, "" if share is None else f"{share:.1%}"))
            title = frames = ""
    return aligned(rows, left=2)


def aligned(rows: Sequence[tuple[str, ...]], left: int) -> str:
    """Columns as wide as their widest cell; the first `left` of them begin at one line, the others end at one."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(size) if place < left else cell.rjust(size)
                 for place, (cell, size) in enumerate(zip(row, sizes, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


def _still(moments: "panels.StillSampler", video: Video) -> Frames:
    """A filmstrip with the measures below the names."""
    from vidtwin.video import panels

    labelled = {}
    for name, frames in moments.stills().items():
        view = video.views[name]
        lines = [name, f"PSNR {view.psnr:.2f} dB" if view.psnr is not None else ""]
        lines.append(f"change {view.change:.2f}" if view.change is not None else "")
        labelled["\n".join(filter(None, lines))] = frames
    return panels.filmstrip(labelled, moments.number)


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the session and of the command."""
    add_class_options(parser, SessionOptions, Decouple)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    return run_in_session(Decouple, options)
