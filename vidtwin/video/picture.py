"""Conversion of decoded frames to uint8 RGB as shown on screen: upright, with square pixels, in their tagged colours.

One filter graph crops, resizes and converts. Swscale's area filter averages when shrinking (so it is
antialiased) and is bilinear when enlarging; the bicubic filter takes a quarter more time for the whole clip. Matrix and
range are those of the frame; untagged frames count as BT.601, limited, as in FFmpeg and other loaders. Colours that
FFmpeg can't convert are converted by the nearest tags that it can, which is logged once per video.

With `resize="bilinear"` the whole picture is converted as decord does it, by swscale's defaults, which do not
interpolate chroma; then resized in single precision by Pillow, whose filter is torchvision's; rounded; and cropped.
Whole pictures are converted so too, and only resized if their pixels are not square.
"""

from collections.abc import Iterator
from fractions import Fraction
from typing import Any, Literal, cast

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer, Type
from av.video.frame import VideoFrame
from numpy.typing import NDArray
from PIL import Image

from vidtwin.console import log_once

Resize = Literal["area", "bilinear"]
# Descriptions for evaluation protocols.
RESIZE_FILTERS: dict[Resize, str] = {
    "area": "area (swscale): antialiased shrinking, bilinear enlarging",
    "bilinear": "bilinear, antialiased (torchvision)",
}
RESIZE_FILTER = RESIZE_FILTERS["area"]
COLOUR = "8-bit RGB by each stream's matrix and range; untagged: BT.601, limited (swscale)"
COLOURS: dict[Resize, str] = {"area": COLOUR, "bilinear": COLOUR.replace("swscale", "swscale's defaults")}

Frames = NDArray[np.uint8]
Size = int | tuple[int, int]  # side of a square, or height and width, in pixels
Node = tuple[str, str | None]  # name and arguments of a filter
Turn = tuple[bool, bool, bool]  # whether to transpose a picture, then flip its rows, then its columns

UPRIGHT: Turn = (False, False, False)

# The area filter alone makes limited ranges 2 of 255 too dark, and neighbours share their chroma. Output to planes
# takes two thirds of the time of packed RGB.
_FLAGS = "area+accurate_rnd+full_chroma_int"
# Matrices that FFmpeg can't convert and that count as BT.2020, by their number in ITU-T H.273: constant luminance, and
# ICtCp. All others count as untagged.
_LIKE_BT2020 = frozenset({10, 14})


def _make_unknown_type(_: type[Type], value: int) -> Type:
    member = object.__new__(Type)
    member._name_ = f"UNKNOWN_{value}"
    return member


# PyAV raises an error for any side data that its enumeration lacks, such as EXIF, and would hide the display matrix.
Type._missing_ = classmethod(_make_unknown_type)  # type: ignore[assignment, method-assign]


class FilterChain:
    """A chain of FFmpeg's filters, one frame in and one out, built anew when frames change their size or format.

    Args:
        name: Name of the video, for messages.
        nodes: Filters between source and sink.
    """

    def __init__(self, name: str, *nodes: Node) -> None:
        self._name = name
        self._nodes = nodes
        self._layout: tuple[int, int, str] | None = None
        self._graph: av.filter.Graph | None = None
        self._tags: Node | None = None

    def __call__(self, frame: VideoFrame) -> VideoFrame:
        layout = (frame.width, frame.height, frame.format.name)
        if layout != self._layout:
            self._layout, self._graph = layout, None
        try:
            return self._run(frame)
        except av.error.FFmpegError:
            for self._tags, described in _replace_tags(frame):
                self._graph = None
                try:
                    converted = self._run(frame)
                except av.error.FFmpegError:
                    continue
                log_once(f"{self._name}: {described}")
                return converted
            raise

    def _run(self, frame: VideoFrame) -> VideoFrame:
        self._graph = self._graph or self._build(frame)
        self._graph.vpush(frame)
        filtered = self._graph.vpull()
        assert isinstance(filtered, VideoFrame)
        return filtered

    def _build(self, frame: VideoFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1  # FFmpeg would start a thread pool per graph
        source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/25"
        # Use the first frame's colours: filters warn about later changes.
        source += f":colorspace={2 if self._tags else int(frame.colorspace)}:range={int(frame.color_range)}"
        nodes: tuple[Node, ...] = (("buffer", source), *([self._tags] if self._tags else []), *self._nodes)
        graph.link_nodes(*(graph.add(*node) for node in (*nodes, ("buffersink", None)))).configure()
        return graph


def _replace_tags(frame: VideoFrame) -> Iterator[tuple[Node, str]]:
    """Yield filters that replace a frame's tags of colours by ones nearby, each with a description."""
    matrix, transfer, primaries = int(frame.colorspace), int(frame.color_trc), int(frame.color_primaries)
    nearest = ("bt2020nc", "BT.2020") if matrix in _LIKE_BT2020 else ("unknown", "BT.601")
    for tag, name in ((str(matrix), "its matrix"), nearest):
        described = (
            f"FFmpeg can't convert its colours (matrix {matrix}, transfer {transfer}, primaries {primaries} of ITU-T "
            f"H.273); converted by {name}, as if the rest was untagged."
        )
        yield ("setparams", f"colorspace={tag}:color_trc=unknown:color_primaries=unknown"), described


class Converter:
    """Converter of one stream's frames to uint8 (H, W, 3): a crop resized to `size`, or whole pictures.

    Args:
        size: Side of a square, or height and width, in pixels; None: the whole picture, with its width scaled by the
            sample aspect ratio. If pictures change their size or turn, all have that of the first one.
        crop: Position of the largest rectangle of that shape in the upright picture, as (x, y): 0 left or top, 0.5
            centre, 1 right or bottom.
        aspect: Width of a stored pixel divided by its height (sample aspect ratio); None: 1.
        name: Name of the video, for messages.
        resize: Filter for `size`: "area" resizes the crop; "bilinear" resizes the picture until it covers `size` and
            then crops, for squares as torchvision's `Resize(size, antialias=True)` and `CenterCrop(size)`.
    """

    def __init__(
        self,
        size: Size | None,
        crop: tuple[float, float],
        aspect: Fraction | None,
        name: str,
        resize: Resize = "area",
    ) -> None:
        self._late = resize == "bilinear"  # pictures are resized after their conversion
        self._cropped = size is not None
        # Height and width as shown; None until the first picture gives them.
        self._shape: tuple[int, int] | None = (size, size) if isinstance(size, int) else size
        self._crop = crop
        self._aspect = aspect if aspect and Fraction(1, 8) < aspect < 8 else Fraction(1)
        self._name = name
        self._layout: tuple[int, int, Turn] | None = None
        self._turn = UPRIGHT
        self._chain: FilterChain | None = None

    def __call__(self, frame: VideoFrame) -> Frames:
        planes = self.planes(frame)
        picture = np.empty((*planes[0].shape, 3), np.uint8)
        return np.stack(planes, axis=-1, out=picture)

    def planes(self, frame: VideoFrame) -> list[Frames]:
        """Return red, green and blue, (H, W) each, as views of FFmpeg's buffers, to be copied once."""
        self._turn = orientation(frame) or self._turn
        layout = (frame.width, frame.height, self._turn)
        if layout != self._layout:  # the first frame, or a stream that changes its size
            self._layout = layout
            self._chain = FilterChain(self._name, *self._choose_filters(frame))
        assert self._chain is not None
        converted = self._chain(frame)
        height, width = converted.height, converted.width
        if self._late:
            picture = _lines(converted.planes[0])[:height, : 3 * width].reshape(height, width, 3)
            return [self._resize(turn(picture[..., colour], self._turn)) for colour in range(3)]
        planes = [converted.planes[index] for index in (2, 0, 1)]  # stored as G, B, R
        return [turn(_lines(plane)[:height, :width], self._turn) for plane in planes]

    def _resize(self, plane: Frames) -> Frames:
        """Resize an upright plane until it covers the wanted size, then crop it."""
        height, width = plane.shape
        shown = (height * self._aspect, width) if self._turn[0] else (height, width * self._aspect)
        if self._shape is None:
            self._shape = max(1, round(shown[0])), max(1, round(shown[1]))
        if plane.shape == self._shape and self._aspect == 1:
            return plane
        # The side that fits exactly; the other one is then at least as large as wanted, but for its rounding.
        wanted, side = max(zip(self._shape, shown, strict=True), key=lambda pair: Fraction(pair[0]) / pair[1])
        sizes = [max(least, int(wanted * own / side)) for least, own in zip(self._shape, shown, strict=True)]
        picture = Image.fromarray(plane.astype(np.float32))  # 8-bit ones would be rounded after each axis
        resized = np.asarray(picture.resize((sizes[1], sizes[0]), Image.Resampling.BILINEAR))
        height, width = self._shape
        left, top = round((sizes[1] - width) * self._crop[0]), round((sizes[0] - height) * self._crop[1])
        return np.rint(resized[top : top + height, left : left + width]).astype(np.uint8)

    def _choose_filters(self, frame: VideoFrame) -> list[Node]:
        """Choose crop, size and format for frames like this one."""
        if self._late:
            return [("scale", f"{frame.width}:{frame.height}:flags=bicubic"), ("format", "rgb24")]
        nodes: list[Node] = []
        if self._cropped:
            left, top, width, height = self._find_crop(frame)
            nodes.append(("crop", f"{width}:{height}:{left}:{top}"))
        if self._shape is None:
            shape = (frame.height, max(1, round(frame.width * self._aspect)))
            self._shape = shape[::-1] if self._turn[0] else shape
        height, width = self._shape[::-1] if self._turn[0] else self._shape
        return [*nodes, ("scale", f"{width}:{height}:flags={_FLAGS}"), ("format", "gbrp")]

    def _find_crop(self, frame: VideoFrame) -> tuple[int, int, int, int]:
        """Return left, top, width and height, in stored pixels, of the largest rectangle of the wanted shape."""
        assert self._shape is not None
        x, y = self._crop
        transpose, flip_rows, flip_columns = self._turn
        x, y = (1 - x if flip_columns else x), (1 - y if flip_rows else y)
        if transpose:
            x, y = y, x
        tall, wide = self._shape[::-1] if transpose else self._shape
        unit = min(frame.width * self._aspect / wide, Fraction(frame.height, tall))
        width = min(frame.width, max(1, round(wide * unit / self._aspect)))
        height = min(frame.height, max(1, round(tall * unit)))
        return round((frame.width - width) * x), round((frame.height - height) * y), width, height


def _lines(plane: Any) -> Frames:
    return np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)


def turn(plane: Frames, how: Turn) -> Frames:
    """Turn a stored plane (H, W) upright."""
    transpose, flip_rows, flip_columns = how
    plane = plane.T if transpose else plane
    plane = plane[::-1] if flip_rows else plane
    return plane[:, ::-1] if flip_columns else plane


def orientation(frame: VideoFrame) -> Turn | None:
    """Return how to turn a frame to show it upright, or None if the frame does not say.

    Follows from the signs of the display matrix (ISO 14496-12, 6.2.2), which maps column x and row y to a·x + c·y and
    b·x + d·y. FFmpeg makes one of EXIF's orientation, too.
    """
    # Not `frame.side_data`: its reference cycle would keep the decoder's pictures until garbage collection.
    matrix = cast(Any, SideDataContainer)(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return None
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(cast(Any, matrix)), np.int32)[:5])
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
