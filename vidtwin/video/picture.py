"""Conversion of decoded frames to uint8 RGB as shown on screen: upright, with square pixels, in their tagged colours.

One filter graph crops to a square, resizes and converts. Swscale's area filter averages when shrinking (so it is
antialiased) and is bilinear when enlarging; the bicubic filter takes a quarter more time for the whole clip. Matrix and
range are those of the frame; untagged frames count as BT.601, limited, as in FFmpeg and other loaders.
"""

from fractions import Fraction
from typing import Any, cast

import av
import av.filter
import numpy as np
from av.sidedata.sidedata import SideDataContainer
from av.video.frame import VideoFrame
from numpy.typing import NDArray

# Descriptions for evaluation protocols.
RESIZE_FILTER = "area (swscale): antialiased shrinking, bilinear enlarging"
COLOUR = "8-bit RGB by each stream's matrix and range; untagged: BT.601, limited (swscale)"

Frames = NDArray[np.uint8]

# The area filter alone makes limited ranges 2 of 255 too dark, and neighbours share their chroma. Output to planes
# takes two thirds of the time of packed RGB.
_FLAGS = "area+accurate_rnd+full_chroma_int"


class Converter:
    """Converter of one stream's frames to uint8 (H, W, 3): a square crop resized to `size`, or whole pictures.

    Args:
        size: Side of the square in pixels; None: the whole picture, with its width scaled by the sample aspect ratio.
        crop: Position of the largest square in the upright picture, as (x, y): 0 left or top, 0.5 centre, 1 right or
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
        self._whole: tuple[int, int] | None = None  # width and height of whole pictures

    def __call__(self, frame: VideoFrame) -> Frames:
        planes = self.planes(frame)
        picture = np.empty((*planes[0].shape, 3), np.uint8)
        return np.stack(planes, axis=-1, out=picture)

    def planes(self, frame: VideoFrame) -> list[Frames]:
        """Return red, green and blue, (H, W) each, as views of FFmpeg's buffers, to be copied once."""
        layout = (frame.width, frame.height, frame.format.name)
        if layout != self._layout:  # the first frame, or a stream that changes its size
            self._layout = layout
            self._orientation = orientation(frame)
            self._graph = self._build(frame)
        assert self._graph is not None
        self._graph.vpush(frame)
        converted = self._graph.vpull()
        return [self._rotate(converted.planes[index], converted) for index in (2, 0, 1)]  # stored as G, B, R

    def _rotate(self, plane: Any, frame: VideoFrame) -> Frames:
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
        graph.threads = 1  # FFmpeg would start a thread pool per graph
        source = f"video_size={frame.width}x{frame.height}:pix_fmt={frame.format.name}:time_base=1/25"
        # Use the first frame's colours: filters warn about later changes.
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
        """Return left, top, width and height, in stored pixels, of the largest square on the screen."""
        x, y = self._crop
        transpose, flip_rows, flip_columns = self._orientation
        x, y = (1 - x if flip_columns else x), (1 - y if flip_rows else y)
        if transpose:
            x, y = y, x
        side = min(frame.width * self._aspect, Fraction(frame.height))
        width, height = min(frame.width, round(side / self._aspect)), round(side)
        return round((frame.width - width) * x), round((frame.height - height) * y), width, height


def orientation(frame: VideoFrame) -> tuple[bool, bool, bool]:
    """Return whether to transpose a frame, then flip its rows, then its columns, to show it upright.

    Follows from the signs of the display matrix (ISO 14496-12, 6.2.2), which maps column x and row y to a·x + c·y and
    b·x + d·y.
    """
    # Not `frame.side_data`: its reference cycle would keep the decoder's pictures until garbage collection.
    matrix = cast(Any, SideDataContainer)(frame).get("DISPLAYMATRIX")
    if matrix is None:
        return False, False, False
    a, b, _, c, d = (int(value) for value in np.frombuffer(bytes(cast(Any, matrix)), np.int32)[:5])
    if abs(b) > abs(a):
        return True, b < 0, c < 0
    return False, d < 0, a < 0
