"""Write videos, stills and tables of measures for the commands on videos. Imports no torch."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import chain, islice
from pathlib import Path

from vidtwin import console
from vidtwin.apply.inputs import Input
from vidtwin.apply.windows import VideoWindows, Window, batched
from vidtwin.console import Progress
from vidtwin.files import no_room, replacing
from vidtwin.video import Frames, VideoError, VideoWriter, panels


@dataclass
class Written:
    """Outcome of a rendering.

    Attributes:
        num_frames: Frames written; 0 if there is no file.
        note: Why frames or sound are missing; None if they are not.
        disk_full: Whether there was no room for the file.
    """

    num_frames: int
    note: str | None
    disk_full: bool = False


@dataclass
class Rendering:
    """A video that is read in one thread and rendered to a file in another.

    Attributes:
        entry: The video.
        path: The file.
        source: Its windows, from the first one that is read.
    """

    entry: Input
    path: Path
    source: VideoWindows | None = None

    def read(self, length: int, size: int | None, batch_size: int, limit: int | None = None) -> Iterator[list[Window]]:
        """Yield its windows in batches; `length`, `size` and `limit` are those of `VideoWindows`."""
        self.source = VideoWindows(self.entry.path, length, size, limit)
        yield from batched(self.source, batch_size)

    def write(self, views: Iterator[tuple[Window, Frames]], bar: Progress) -> Written:
        """Write the views, `num_frames` frames of each window, at its times and with its sound; log what is missing.

        `views` may raise the `VideoError` of `read`.
        """
        count = 0
        try:
            first = list(islice(views, 1))
            assert self.source is not None
            with VideoWriter(self.path, self.source.info.fps, timed=True, sound=self.entry.path) as writer:
                for window, frames in chain(first, views):
                    write_frames(writer, frames, window.times)
                    count += window.num_frames
                    bar.update(window.num_frames)
        except VideoError as error:
            console.log(str(error))
            return Written(0, str(error), no_room(error) is not None)
        damage = self.source.damage
        if damage:
            console.log(f"{damage} The {count} frames before are in {self.path}.")
        elif writer.lost_sound:
            console.log(f"{self.path}: {writer.lost_sound}")
        return Written(count, damage or writer.lost_sound)


def write_frames(writer: VideoWriter, frames: Frames, times: list[Fraction]) -> None:
    """Add frames (T, H, W, 3) at their times."""
    for frame, time in zip(frames, times, strict=True):
        writer.write(frame, time)


def write_png(path: Path, image: Frames) -> None:
    """Write a picture (H, W, 3)."""
    with replacing(path) as temporary:
        temporary.write_bytes(panels.png(image))


def format_measures(values: Mapping[str, float | None]) -> list[str]:
    """Format PSNR, SSIM and change by their names, such as "psnr" or "psnr_a"; None is empty."""
    digits = {"psnr": 2, "ssim": 4, "change": 2}
    return ["" if value is None else f"{value:.{digits[name.partition('_')[0]]}f}" for name, value in values.items()]


def align(rows: Sequence[tuple[str, ...]], left: int) -> str:
    """Pad cells to the widest of their column: the first `left` columns at the right, the others at the left."""
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(size) if place < left else cell.rjust(size)
                 for place, (cell, size) in enumerate(zip(row, sizes, strict=True))]  # fmt: skip
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)
