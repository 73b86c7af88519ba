"""Pictures larger than a model's: tiles that overlap, joined by weights that fade out towards a tile's border.

The weight of a pixel grows in a straight line over the overlap, from both sides, and the sum is divided by the sum of
weights: where all tiles agree, the joined picture is theirs.
"""

import math
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from vidtwin.apply.windows import batched
from vidtwin.errors import UserError
from vidtwin.video import Frames

Floats = NDArray[np.float32]


def starts(side: int, tile: int, overlap: int) -> list[int]:
    """Where tiles begin so that they cover `side` pixels, evenly spaced, `overlap` or more of each shared."""
    if side <= tile:
        return [0]
    count = math.ceil((side - overlap) / (tile - overlap))
    return [round(place) for place in np.linspace(0, side - tile, count).tolist()]


def ramp(tile: int, overlap: int) -> Floats:
    """Weights (tile,): from 1/(overlap + 1) at both ends to 1."""
    place = np.arange(tile)
    distance = np.minimum(place, place[::-1]) + 1
    return (np.minimum(distance, overlap + 1) / (overlap + 1)).astype(np.float32)


def in_tiles(
    frames: Frames,
    tile: int,
    overlap: int,
    run: Callable[[list[Frames]], dict[str, list[Frames]]],
    batch_size: int = 1,
) -> dict[str, Frames]:
    """What `run` makes of a clip that is larger than it takes.

    Args:
        frames: uint8 (T, H, W, 3). A side that is shorter than a tile is extended by its border, and cut again.
        tile: Side of the squares that `run` is given, in pixels.
        overlap: Pixels that neighbours share at least.
        run: Clips (T, tile, tile, 3) → by name as many of the same shape.
        batch_size: Tiles that `run` is given at once.

    Returns:
        By name uint8 (T, H, W, 3).
    """
    if not 0 <= overlap < tile:
        raise UserError(f"Expected an overlap of tiles of at least 0 and below {tile} pixels, got {overlap}.")
    length, height, width = frames.shape[:3]
    padding = [(0, 0), (0, max(0, tile - height)), (0, max(0, tile - width)), (0, 0)]
    whole = np.pad(frames, padding, mode="edge")
    weights = np.outer(ramp(tile, overlap), ramp(tile, overlap))[..., None]
    places = [(y, x) for y in starts(height, tile, overlap) for x in starts(width, tile, overlap)]
    total = np.zeros((*whole.shape[1:3], 1), np.float32)
    joined: dict[str, Floats] = {}
    for some in batched(places, batch_size):
        squares = [(slice(y, y + tile), slice(x, x + tile)) for y, x in some]
        made = run([np.ascontiguousarray(whole[:, rows, columns]) for rows, columns in squares])
        for name, tiles in made.items():
            target = joined.setdefault(name, np.zeros((length, *whole.shape[1:3], 3), np.float32))
            for (rows, columns), clip in zip(squares, tiles, strict=True):
                for number, frame in enumerate(clip):  # one at a time: a product of all would be as large again
                    target[number, rows, columns] += frame * weights
        for rows, columns in squares:
            total[rows, columns] += weights
    return {name: _rounded(clip, total)[:, :height, :width] for name, clip in joined.items()}


def _rounded(clip: Floats, total: Floats) -> Frames:
    result = np.empty(clip.shape, np.uint8)
    for number, frame in enumerate(clip):
        result[number] = np.rint(frame / total)
    return result
