"""Tiles that overlap and are joined again."""

from itertools import pairwise

import numpy as np
import pytest

from vidtwin.apply.tiling import make_ramp, place_tiles, run_in_tiles
from vidtwin.errors import UserError


@pytest.mark.parametrize(("side", "tile", "overlap"), [(720, 224, 56), (224, 224, 56), (225, 224, 56), (100, 64, 0)])
def test_tiles_cover_the_side_and_overlap_enough(side, tile, overlap):
    places = place_tiles(side, tile, overlap)
    assert places[0] == 0
    assert places[-1] == side - tile
    for before, after in pairwise(places):
        assert before + tile - after >= overlap


def test_one_tile_covers_a_smaller_side():
    assert place_tiles(10, 64, 16) == [0]


@pytest.mark.parametrize("shape", [(2, 100, 150, 3), (1, 20, 150, 3), (3, 64, 64, 3), (1, 7, 9, 3)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_unchanged_tiles_are_joined_bit_for_bit(shape, batch_size):
    frames = np.random.default_rng(0).integers(0, 256, shape, np.uint8)
    sizes = []

    def same(clips):
        sizes.append(len(clips))
        assert all(clip.shape == (shape[0], 64, 64, 3) for clip in clips)
        return {"same": clips, "negative": [255 - clip for clip in clips]}

    made = run_in_tiles(frames, 64, 16, same, batch_size)
    assert np.array_equal(made["same"], frames)
    assert np.array_equal(made["negative"], 255 - frames)
    assert max(sizes) <= batch_size


def test_different_neighbours_are_blended_linearly_over_the_overlap():
    """The first tile is black and the second white: by the definition of the weights, pixel for pixel."""
    frames = np.zeros((1, 64, 112, 3), np.uint8)
    colours = iter([0, 255])
    made = run_in_tiles(frames, 64, 16, lambda clips: {"x": [np.full_like(clip, next(colours)) for clip in clips]})["x"]
    row = made[0, 30, :, 0].astype(int)
    first, second = np.zeros(112), np.zeros(112)
    for place in range(64):
        weight = min(place + 1, 64 - place, 17) / 17
        first[place] += weight
        second[48 + place] += weight
    assert np.array_equal(row, np.rint(255 * second / (first + second)))
    assert (np.diff(row) >= 0).all()
    assert np.diff(row).max() <= 255 / 16
    assert (made == made[:, :1]).all()


def test_weights_grow_from_both_ends():
    assert make_ramp(5, 1).tolist() == [0.5, 1, 1, 1, 0.5]
    assert make_ramp(3, 0).tolist() == [1, 1, 1]


def test_an_overlap_of_a_whole_tile_is_refused():
    with pytest.raises(UserError, match="below 8 pixels, got 8"):
        run_in_tiles(np.zeros((1, 9, 9, 3), np.uint8), 8, 8, lambda clips: {})
