"""Measure the content of input clips: motion, change from frame to frame, texture, cuts."""

from fractions import Fraction
from typing import Any

import numpy as np
from av.filter import Graph
from av.video.format import VideoFormat
from av.video.frame import VideoFrame
from numpy.typing import NDArray

CUT_RISE = 9.0
"""A frame begins a scene if it changes by so many percent of the range more than its neighbours (`vidtwin doctor`)."""
BLOCK, SEARCH = 8, 7
"""Side of the blocks, and how far each is looked for, both in pixels."""


def measure_content(frames: NDArray[np.uint8]) -> dict[str, float]:
    """Measure a clip.

    Args:
        frames: (T, H, W, 3).

    Returns:
        "motion": mean length of the motion vectors between neighbouring frames, in pixels, by FFmpeg's block matching
        (`mestimate`, EPZS, blocks of 8 px searched within 7 px of where they are expected);
        "change": mean absolute difference of neighbouring frames, in steps of 1/255, over pixels and colours;
        "texture": mean length of the gradient of luma (central differences), in steps of 1/255 a pixel;
        "cuts": number of frames that begin a scene.
        A clip of one frame has 0 of all but texture.
    """
    luma = frames.astype(np.float32) @ np.array([0.299, 0.587, 0.114], np.float32)  # BT.601
    tall, wide = np.gradient(luma, axis=(1, 2))
    differences = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(1, 2, 3), dtype=np.float64)
    return {
        "motion": _measure_motion(luma),
        "change": float(differences.mean()) if len(differences) else 0.0,
        "texture": float(np.hypot(tall, wide).mean(dtype=np.float64)),
        "cuts": float(_count_cuts(differences)),
    }


def _count_cuts(differences: NDArray[np.float64]) -> int:
    """Count the changes that exceed both neighbours' by `CUT_RISE`; without neighbours there is no comparison."""
    if len(differences) < 2:
        return 0
    padded = np.concatenate([[0.0], differences * 100 / 255, [0.0]])
    rise = padded[1:-1] - np.maximum(padded[:-2], padded[2:])
    return int((rise >= CUT_RISE).sum())


def _measure_motion(luma: NDArray[np.float32]) -> float:
    """Return the mean length of the vectors from each frame to the next one."""
    if len(luma) < 2:
        return 0.0
    pictures = luma.round().clip(0, 255).astype(np.uint8)
    # FFmpeg looks at whole blocks alone.
    height, width = (max(2 * BLOCK, -(-side // BLOCK) * BLOCK) for side in pictures.shape[1:])
    pad = ((0, 0), (0, height - pictures.shape[1]), (0, width - pictures.shape[2]))
    pictures = np.pad(pictures, pad, mode="edge")
    graph = Graph()
    base = Fraction(1, 25)
    source = graph.add_buffer(width=width, height=height, format=VideoFormat("yuv420p"), time_base=base)
    search = graph.add("mestimate", f"method=epzs:mb_size={BLOCK}:search_param={SEARCH}")
    sink = graph.add("buffersink")
    source.link_to(search)
    search.link_to(sink)
    graph.configure()
    for time, picture in enumerate(pictures):
        frame = VideoFrame.from_ndarray(picture, format="gray").reformat(format="yuv420p")
        frame.pts, frame.time_base = time, base
        graph.vpush(frame)
    graph.vpush(None)
    lengths = []
    for _ in range(len(pictures) - 1):  # the last frame has no next one
        found: Any = graph.vpull()
        vectors = found.side_data.get("MOTION_VECTORS").to_ndarray()
        vectors = vectors[vectors["source"] > 0]
        lengths.append(np.hypot(vectors["dst_x"] - vectors["src_x"], vectors["dst_y"] - vectors["src_y"]).mean())
    return float(np.mean(lengths, dtype=np.float64))
