"""Pictures of clips: rows of input, reconstruction and what each latent gives alone."""

import io
import math
from collections.abc import Sequence
from functools import cache

import numpy as np
import torch
from einops import rearrange
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

Frames = NDArray[np.uint8]  # (T, H, W, 3)

ERROR_GAIN = 4  # of error maps
LINE_HEIGHT = 16  # of a name, in pixels
LABEL_WIDTH = 120  # of the names at the left of a filmstrip
MARGIN = 2


def to_uint8(clip: Tensor) -> Frames:
    """(3, T, H, W) in [-1, 1] → (T, H, W, 3), rounded."""
    frames = rearrange(clip.detach().float().clamp(-1, 1), "c t h w -> t h w c")
    return ((frames + 1) * 127.5).round().to(torch.uint8).cpu().numpy()


@torch.no_grad()
def error_map(frames: Frames, target: Frames) -> Frames:
    """Absolute error of each number, `ERROR_GAIN` times, cut at 255."""
    error = np.abs(frames.astype(np.int16) - target) * ERROR_GAIN
    return error.clip(0, 255).astype(np.uint8)


def side_by_side(shown: dict[str, Frames]) -> Frames:
    """The views next to each other under their names: (T, H', W', 3) with even sides, as video codecs want them.

    A name may have several lines; a column grows as wide as its name.
    """
    return _even(_row(shown))


def grid(rows: Sequence[dict[str, Frames]], caption: str = "") -> Frames:
    """Rows of views of T frames, each under its name, and a caption below: (T, H', W', 3) with even sides."""
    parts = [_row(shown) for shown in rows]
    width = max(part.shape[2] for part in parts)
    if caption:
        line = _label(wrapped(caption, width - 2 * MARGIN), width=width)
        parts.append(np.repeat(line[None], len(parts[0]), axis=0))
        width = max(width, line.shape[1])
    return _even(np.concatenate([_widened(part, width) for part in parts], axis=1))


def filmstrip(shown: dict[str, Frames], num_frames: int = 6) -> Frames:
    """A still (H', W', 3): a row for each view, named at its left, with `num_frames` frames evenly over the clip."""
    width = max(LABEL_WIDTH, *(_label(name).shape[1] for name in shown))
    rows = []
    for name, frames in shown.items():
        chosen = evenly(len(frames), num_frames)
        strip = np.concatenate(list(_enlarged(frames[chosen])), axis=1)
        label = _label(name, width, strip.shape[0])
        rows.append(np.concatenate([label, _heightened(strip, label.shape[0])], axis=1))
    return np.concatenate(rows, axis=0)


def evenly(length: int, number: int) -> list[int]:
    """`number` of `length` places evenly from the first to the last; all of them where there are fewer."""
    return [round(place) for place in np.linspace(0, length - 1, min(number, length)).tolist()]


def shrunk(frames: Frames, side: int) -> Frames:
    """Frames (T, H, W, 3) whose longer side is at most `side`, for stills; smaller ones as they are."""
    height, width = frames.shape[1:3]
    if max(height, width) <= side:
        return frames
    size = (max(1, round(width * side / max(height, width))), max(1, round(height * side / max(height, width))))
    images = [Image.fromarray(frame).resize(size, Image.Resampling.LANCZOS) for frame in frames]
    return np.stack([np.asarray(image) for image in images])


class Moments:
    """Frames evenly over a video whose length is not known before its end, in constant memory.

    Of each view every `stride`-th frame is kept; when there are too many every second one goes. What `stills` gives is
    exact up to `room` frames and off by at most 1/`room` of the video beyond.

    Args:
        number: How many are shown.
        side: What the longer side of a kept frame is shrunk to.
    """

    def __init__(self, number: int = 6, side: int = 256) -> None:
        self.number, self.side = number, side
        self.room = max(64, 4 * number)
        self.stride = 1
        self.count = 0
        self.kept: list[tuple[int, dict[str, Frames]]] = []
        self.last: tuple[int, dict[str, Frames]] | None = None

    def add(self, shown: dict[str, Frames]) -> None:
        """The next frames (T, H, W, 3) of each view."""
        length = len(next(iter(shown.values())))
        for place in range(length):
            number = self.count + place
            wanted = number % self.stride == 0
            if not (wanted or place == length - 1):
                continue
            self.last = (number, {name: shrunk(frames[place, None], self.side)[0] for name, frames in shown.items()})
            if wanted:
                self.kept.append(self.last)
                if len(self.kept) > self.room:
                    self.kept = self.kept[::2]
                    self.stride *= 2
        self.count += length

    def stills(self) -> dict[str, Frames]:
        """The chosen frames (N, H, W, 3) of each view, the first and the last one among them."""
        if self.last is None:
            return {}
        held = dict([*self.kept, self.last])
        chosen = [min(held, key=lambda number: abs(number - place)) for place in evenly(self.count, self.number)]
        return {name: np.stack([held[number][name] for number in chosen]) for name in self.last[1]}


def png(image: Frames) -> bytes:
    """Encode (H, W, 3)."""
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def gif(frames: Frames, fps: float) -> bytes:
    """Encode (T, H, W, 3) as an animated GIF, which TensorBoard plays among its images."""
    buffer = io.BytesIO()
    images = [Image.fromarray(frame) for frame in frames]
    images[0].save(buffer, "gif", save_all=True, append_images=images[1:], duration=round(1000 / fps), loop=0)
    return buffer.getvalue()


def _enlarged(frames: Frames) -> Frames:
    """Frames of a small model repeated pixel by pixel to about 128 px, so that a person sees them."""
    times = max(1, 128 // frames.shape[2])
    return frames.repeat(times, axis=1).repeat(times, axis=2)


def _row(shown: dict[str, Frames]) -> Frames:
    """Views next to each other, each below its name, all names as high as the highest."""
    columns = [_enlarged(frames) for frames in shown.values()]
    height = max(_label(name).shape[0] for name in shown)
    return np.concatenate([_titled(*pair, height) for pair in zip(shown, columns, strict=True)], axis=2)


def _titled(name: str, frames: Frames, height: int) -> Frames:
    title = _label(name, frames.shape[2], height)
    return np.concatenate([np.repeat(title[None], len(frames), axis=0), _widened(frames, title.shape[1])], axis=1)


def _even(frames: Frames) -> Frames:
    return np.pad(frames, [(0, 0), (0, frames.shape[1] % 2), (0, frames.shape[2] % 2), (0, 0)])


def _widened(frames: Frames, width: int) -> Frames:
    return np.pad(frames, [(0, 0), (0, 0), (0, width - frames.shape[2]), (0, 0)], constant_values=255)


def _heightened(image: Frames, height: int) -> Frames:
    return np.pad(image, [(0, height - image.shape[0]), (0, 0), (0, 0)], constant_values=255)


@cache
def _font() -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(12)


def _length(text: str) -> int:
    return math.ceil(_font().getlength(text))


def wrapped(text: str, width: int) -> str:
    """A text in lines of at most `width` pixels, broken between words; a word that is wider has a line of its own."""
    lines: list[str] = []
    for line in text.split("\n"):
        words = line.split(" ")
        lines.append(words[0])
        for word in words[1:]:
            if _length(f"{lines[-1]} {word}") <= width:
                lines[-1] += f" {word}"
            else:
                lines.append(word)
    return "\n".join(lines)


def _label(text: str, width: int = 0, height: int = 0) -> Frames:
    """Lines of text, black on white, of at least this size: as large as the text wants."""
    lines = text.split("\n")
    size = (max(width, 2 * MARGIN + max(map(_length, lines))), max(height, LINE_HEIGHT * len(lines)))
    image = Image.new("RGB", size, "white")
    top = (size[1] - LINE_HEIGHT * len(lines)) / 2
    for number, line in enumerate(lines):
        ImageDraw.Draw(image).text((MARGIN, top + 1 + LINE_HEIGHT * number), line, fill="black", font=_font())
    return np.asarray(image)
