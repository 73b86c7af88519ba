"""Write videos, stills and tables of measures for the commands on videos. Imports no torch."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING

from vidtwin import console
from vidtwin.apply.inputs import Input
from vidtwin.apply.windows import VideoWindows, Window
from vidtwin.files import no_room, replacing
from vidtwin.video import Frames, VideoError, VideoWriter, panels

if TYPE_CHECKING:
    from tqdm import tqdm


@dataclass
class Written:
    """Outcome of `write_views`.

    Attributes:
        num_frames: Frames written; 0 if there is no file.
        note: Why frames or sound are missing; None if they are not.
        disk_full: Whether there was no room for the file.
    """

    num_frames: int
    note: str | None
    disk_full: bool = False


def write_views(
    entry: Input,
    path: Path,
    length: int,
    size: int | None,
    render: Callable[[Iterable[Window]], Iterator[tuple[Window, Frames]]],
    bar: "tqdm[None]",
    limit: int | None = None,
) -> Written:
    """Render the windows of a video to the file `path`, at its times and with its sound; log why any are missing.

    `length`, `size` and `limit` are those of `VideoWindows`; `render` yields `num_frames` frames per window.
    """
    count = 0
    try:
        parts = VideoWindows(entry.path, length, size, limit)
        with VideoWriter(path, parts.info.fps, timed=True, sound=entry.path) as writer:
            for window, frames in render(parts):
                write_frames(writer, frames, window.times)
                count += window.num_frames
                bar.update(window.num_frames)
    except VideoError as error:
        console.log(str(error))
        return Written(0, str(error), no_room(error) is not None)
    if parts.damage:
        console.log(f"{parts.damage} The {count} frames before are in {path}.")
    elif writer.lost_sound:
        console.log(f"{path}: {writer.lost_sound}")
    return Written(count, parts.damage or writer.lost_sound)


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
