"""A decoded frame → uint8 RGB as a viewer sees it: upright, with square pixels, in the colours that it was tagged with.

One filter graph crops to a square, resizes and converts. Swscale's area filter averages what it shrinks (so it is
antialiased) and is bilinear where it enlarges; the bicubic filter takes a quarter more time for the whole clip. Matrix
and range are those of the frame; untagged ones are BT.601, limited, as FFmpeg and other loaders take them.
"""

from fractions import Fraction
from typing import Any, cast

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray

# As a protocol tells them.
RESIZE_FILTER = "area (swscale): antialiased shrinking, bilinear enlarging"
COLOUR = "8-bit RGB by each stream's matrix and range; untagged: BT.601, limited (swscale)"

Frames = NDArray[np.uint8]

# With the area filter alone limited ranges come out 2 of 255 too dark, and neighbours share their chroma. Into planes
# that takes two thirds of the time that packed RGB takes.
_FLAGS = "area+accurate_rnd+full_chroma_int"


class Converter:
    """Frames of one stream → uint8 (H, W, 3): a square crop resized to `size`, or the whole picture if `size` is None.

    Args:
        size: Side of the square in pixels; None: the whole picture, its width stretched by the sample aspect ratio.
        crop: Where the largest square lies in the upright picture, as (x, y): 0 left or top, 0.5 centre, 1 right or
            bottom.
        aspect: Width of a stored pixel divided by its height (sample aspect ratio); None: 1.
    """

    def __init__(self, size: int | None, crop: tuple[float, float], aspect: Fraction | None) -> None:
        self._size = size
        self._crop = crop
        self._aspect = aspect if aspect and Fraction(1, 8) < aspect < 8 else Fraction(1)
        self._layout: tuple[int, int, str] | None = None
        self._graph: av.filter.Graph | None = None
        self._orientation = (False, False, False)
        self._whole: tuple[int, int] | None = None  # width and height that frames of the whole picture have

    def __call__(self, frame: VideoFrame) -> Frames:
        planes = self.planes(frame)
        picture = np.empty((*planes[0].shape, 3), np.uint8)
        for channel, plane in enumerate(planes):
            picture[..., channel] = plane
        return picture

    def planes(self, frame: VideoFrame) -> list[Frames]:
        """Red, green and blue, (H, W) each: views of FFmpeg's buffers, to be copied once to where they are wanted."""
        layout = (frame.width, frame.height, frame.format.name)
        if layout != self._layout:  # the first frame, or a stream that changes its size
            self._layout = layout
            self._orientation = orientation(frame)
            self._graph = self._build(frame)
        assert self._graph is not None
        self._graph.vpush(frame)
        converted = self._graph.vpull()
        return [self._upright(converted.planes[index], converted) for index in (2, 0, 1)]  # stored as G, B, R

    def _upright(self, plane: Any, frame: VideoFrame) -> Frames:
        transpose, flip_rows, flip_columns = self._orientation
        lines = np.frombuffer(plane, np.uint8).reshape(-1, plane.line_size)
        picture = lines[: frame.height, : frame.width]
        if transpose:
            picture = picture.T
        if flip_rows:
            picture = picture[::-1]
        return picture[:, ::-1] if flip_columns else picture

    def _build(self, frame: VideoFrame) -> av.filter.Graph:
        graph = av.filter.Graph()
        graph.threads = 1  # FFmpeg would start a pool of threads for each graph
        source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/25"
        # The colours are those of the first frame: later ones would be a change that filters warn about.
        source += f":colorspace={int(frame.colorspace)}:range={int(frame.color_range)}"
        nodes: list[Any] = [graph.add("buffer", source)]
        if self._size is not None:
            left, top, width, height = self._square(frame)
            nodes.append(graph.add("crop", f"{width}:{height}:{left}:{top}"))
            shape = (self._size, self._size)
        else:
            self._whole = self._whole or (max(1, round(frame.width * self._aspect)), frame.height)
            shape = self._whole
        nodes.append(graph.add("scale", f"{shape[0]}:{shape[1]}:flags={_FLAGS}"))
        nodes += [graph.add("format", "gbrp"), graph.add("buffersink")]
        graph.link_nodes(*nodes).configure()
        return graph

    def _square(self, frame: VideoFrame) -> tuple[int, int, int, int]:
        """Left, top, width and height, in stored pixels, of what is the largest square on the screen."""
        x, y = self._crop
        transpose, flip_rows, flip_columns = self._orientation
        x, y = (1 - x if flip_columns else x), (1 - y if flip_rows else y)
        if transpose:
            x, y = y, x
        side = min(frame.width * self._aspect, Fraction(frame.height))
        width, height = min(frame.width, round(side / self._aspect)), round(side)
        return round((frame.width - width) * x), round((frame.height - height) * y), width, height


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """How to show a frame upright: transpose it, then flip its rows, then its columns.

    By the signs of the display matrix (ISO 14496-12, 6.2.2), which sends column x and row y to a·x + c·y and b·x + d·y.
    """
    # Not `frame.side_data`: its circle of references would keep the decoder's pictures until garbage is collected.
    matrix = cast(Any, SideDataContainer)(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(cast(Any, matrix)), np.int32)[:5])
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
