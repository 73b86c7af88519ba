"""Process pictures larger than a model's resolution in overlapping tiles.

Tiles are joined by a weighted mean. A pixel's weight falls linearly over the overlap towards a tile's border.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vidtwin.apply.windows import batched
from vidtwin.errors import UserError
from vidtwin.video import Frames

Floats = NDArray[np.float32]


def place_tiles(side: int, tile: int, overlap: int) -> list[int]:
    """Return the starts of evenly spaced tiles that cover `side` pixels and overlap by at least `overlap`."""
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [round(place) for place in np.linspace(0, side - tile, count).tolist()]


def make_ramp(tile: int, overlap: int) -> Floats:
    """Return weights (tile,) that grow from 1/(overlap + 1) at both ends to 1."""
    place = np.arange(tile)
    distance = np.minimum(place, place[::-1]) + 1
    return (np.minimum(distance, overlap + 1) / (overlap + 1)).astype(np.float32)


def run_in_tiles(
    frames: Frames,
    tile: int,
    overlap: int,
    run: Callable[[list[Frames]], dict[str, list[Frames]]],
    batch_size: int = 1,
) -> dict[str, Frames]:
    """Run a function on overlapping tiles of a clip and join its results.

    Args:
        frames: uint8 (T, H, W, 3). A side that is shorter than a tile is padded with its border, and cropped again.
        tile: Side of the tiles in pixels.
        overlap: Minimum overlap of neighbours in pixels.
        run: Maps clips (T, tile, tile, 3) to as many of the same shape, by name.
        batch_size: Tiles per call of `run`.

    Returns:
        uint8 (T, H, W, 3) by name.
    """
    if not 0 <= overlap < tile:
        raise UserError(f"Expected an overlap of tiles of at least 0 and below {tile} pixels, got {overlap}.")
    length, height, width = frames.shape[:3]
    padding = [(0, 0), (0, max(0, tile - height)), (0, max(0, tile - width)), (0, 0)]
    whole = np.pad(frames, padding, mode="edge")
    weights = np.outer(make_ramp(tile, overlap), make_ramp(tile, overlap))[..., None]
    places = [(y, x) for y in place_tiles(height, tile, overlap) for x in place_tiles(width, tile, overlap)]
    total = np.zeros((*whole.shape[1:3], 1), np.float32)
    joined: dict[str, Floats] = {}
    for some in batched(places, batch_size):
        squares = [(slice(y, y + tile), slice(x, x + tile)) for y, x in some]
        made = run([np.ascontiguousarray(whole[:, rows, columns]) for rows, columns in squares])
        for name, tiles in made.items():
            target = joined.setdefault(name, np.zeros((length, *whole.shape[1:3], 3), np.float32))
            for (rows, columns), clip in zip(squares, tiles, strict=True):
                for number, frame in enumerate(clip):  # one at a time, to save memory
                    target[number, rows, columns] += frame * weights
        for rows, columns in squares:
            total[rows, columns] += weights
    return {name: _normalize(clip, total)[:, :height, :width] for name, clip in joined.items()}


def _normalize(clip: Floats, total: Floats) -> Frames:
    result = np.empty(clip.shape, np.uint8)
    for number, frame in enumerate(clip):
        result[number] = np.rint(frame / total)
    return result
