"""Draw pictures of clips: views side by side, filmstrips, stills and labels. Does not import torch."""

import io
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from .picture import Frames

ERROR_GAIN = 4  # factor of error maps
LINE_HEIGHT = 16  # pixels per line of a label
LABEL_WIDTH = 120  # least width in pixels of the labels at the left of a filmstrip
MARGIN = 2


def error_map(frames: Frames, target: Frames) -> Frames:
    """Compute the absolute error of each value times `ERROR_GAIN`, clipped at 255."""
    error = np.abs(frames.astype(np.int16) - target) * ERROR_GAIN
    return error.clip(0, 255).astype(np.uint8)


def side_by_side(shown: dict[str, Frames]) -> Frames:
    """Place views next to each other under their names: (T, H', W', 3) with even sides, as video codecs need them.

    A name may have several lines; a column is at least as wide as its name.
    """
    return _pad_even(_join_views(shown))


def grid(rows: Sequence[dict[str, Frames]], caption: str = "") -> Frames:
    """Stack rows of views of T frames, each under its name, above a caption: (T, H', W', 3) with even sides."""
    parts = [_join_views(shown) for shown in rows]
    width = max(part.shape[2] for part in parts)
    if caption:
        line = _draw_label(wrap(caption, width - 2 * MARGIN), width=width)
        parts.append(np.repeat(line[None], len(parts[0]), axis=0))
        width = max(width, line.shape[1])
    return _pad_even(np.concatenate([_pad_width(part, width) for part in parts], axis=1))


def filmstrip(shown: dict[str, Frames], num_frames: int = 6) -> Frames:
    """Build a still (H', W', 3): a row per view, named at its left, of `num_frames` evenly spaced frames."""
    width = max(LABEL_WIDTH, *(_draw_label(name).shape[1] for name in shown))
    rows = []
    for name, frames in shown.items():
        chosen = space_evenly(len(frames), num_frames)
        strip = np.concatenate(list(_enlarge(frames[chosen])), axis=1)
        label = _draw_label(name, width, strip.shape[0])
        rows.append(np.concatenate([label, _pad_height(strip, label.shape[0])], axis=1))
    return np.concatenate(rows, axis=0)


def space_evenly(length: int, number: int) -> list[int]:
    """Return `number` of `length` indices, evenly spaced from the first to the last; all if there are fewer."""
    return [round(place) for place in np.linspace(0, length - 1, min(number, length)).tolist()]


def shrink(frames: Frames, side: int) -> Frames:
    """Shrink frames (T, H, W, 3) so that the longer side is at most `side` pixels; return smaller ones unchanged."""
    height, width = frames.shape[1:3]
    if max(height, width) <= side:
        return frames
    size = (max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width))))
    images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    return np.stack([np.asarray(image) for image in images])


class StillSampler:
    """Evenly spaced frames of a video of unknown length, sampled in constant memory.

    Every `stride`-th frame of each view is kept; when more than `room` are kept, every second one is dropped. `stills`
    is exact up to `room` frames, and off by at most 1/`room` of a longer video.

    Args:
        number: Number of stills.
        side: Maximum of the longer side of a kept frame, in pixels.
    """

    def __init__(self, number: int = 6, side: int = 256) -> None:
        self.number, self.side = number, side
        self.room = max(64, 4 * number)
        self.stride = 1
        self.count = 0
        self.kept: list[tuple[int, dict[str, Frames]]] = []
        self.last: tuple[int, dict[str, Frames]] | None = None

    def add(self, shown: dict[str, Frames]) -> None:
        """Add the next frames (T, H, W, 3) of each view."""
        length = len(next(iter(shown.values())))
        for place in range(length):
            number = self.count + place
            wanted = number % self.stride == 0
            if not (wanted or place == length - 1):
                continue
            self.last = (number, {name: shrink(frames[place, None], self.side)[0] for name, frames in shown.items()})
            if wanted:
                self.kept.append(self.last)
                if len(self.kept) > self.room:
                    self.kept = self.kept[::2]
                    self.stride *= 2
        self.count += length

    def stills(self) -> dict[str, Frames]:
        """Return the stills (N, H, W, 3) of each view, including the first and the last frame."""
        if self.last is None:
            return {}
        held = dict([*self.kept, self.last])
        chosen = [min(held, key=lambda number: abs(number - place)) for place in space_evenly(self.count, self.number)]
        return {name: np.stack([held[number][name] for number in chosen]) for name in self.last[1]}


def png(image: Frames) -> bytes:
    """Encode (H, W, 3) as PNG."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def gif(frames: Frames, fps: float) -> bytes:
    """Encode (T, H, W, 3) as an animated GIF, which TensorBoard plays among its images."""
    buffer = io.BytesIO()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _enlarge(frames: Frames) -> Frames:
    """Repeat the pixels of small frames up to about 128 px, so that they are visible."""
    times = max(1, 128 // frames.shape[2])
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def _join_views(shown: dict[str, Frames]) -> Frames:
    """Place views next to each other, each below its name; all names get the height of the highest."""
    columns = [_enlarge(frames) for frames in shown.values()]
    height = max(_draw_label(name).shape[0] for name in shown)
    return np.concatenate([_add_title(*pair, height) for pair in zip(shown, columns, strict=True)], axis=2)


def _add_title(name: str, frames: Frames, height: int) -> Frames:
    title = _draw_label(name, frames.shape[2], height)
    return np.concatenate([np.repeat(title[None], len(frames), axis=0), _pad_width(frames, title.shape[1])], axis=1)


def _pad_even(frames: Frames) -> Frames:
    return np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)])


def _pad_width(frames: Frames, width: int) -> Frames:
    return np.pad(frames, [(0, 0), (0, 0), (0, width - frames.shape[2]), (0, 0)], constant_values=255)


def _pad_height(image: Frames, height: int) -> Frames:
    return np.pad(image, [(0, height - image.shape[0]), (0, 0), (0, 0)], constant_values=255)


@cache
def _load_font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _measure(text: str) -> int:
    return math.ceil(_load_font().getlength(text))


def wrap(text: str, width: int) -> str:
    """Break a text between words into lines of at most `width` pixels; a wider word gets its own line."""
    lines: list[str] = []
    for line in text.split("\n"):
        words = line.split(" ")
        lines.append(words[0])
        for word in words[1:]:
            if _measure(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return "\n".join(lines)


def _draw_label(text: str, width: int = 0, height: int = 0) -> Frames:
    """Draw lines of text, black on white, of at least this size in pixels; grow if the text needs it."""
    lines = text.split("\n")
    size = (max(width, 2 * MARGIN + max(map(_measure, lines))), max(height, LINE_HEIGHT * len(lines)))
    image = Image.new("RGB", size, "white")
    top = (size[1] - LINE_HEIGHT * len(lines)) / 2
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((MARGIN, top + 1 + LINE_HEIGHT * number), line, fill="black", font=_load_font())
    return np.asarray(image)
