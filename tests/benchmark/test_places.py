"""Places of rows: shared inside the noise of the test videos, none behind a reference, all over the same clips."""

import math

import numpy as np
import pytest

from vidtwin.benchmark import places


def units(*values: float, clips: int = 1) -> list[places.Unit]:
    """Numbers of videos, each of so many equal clips."""
    return [(f"{index}.avi", 1.0, value) for index, value in enumerate(values) for _ in range(clips)]


def assign(higher: bool = True, **rows: list[places.Unit]) -> dict[str, int]:
    means = {name: float(np.mean([value for _, _, value in row])) for name, row in rows.items()}
    return places.assign(means, rows, higher)


def test_a_constant_difference_is_significant_however_much_the_videos_differ():
    a, b = units(10.0, 30.0, 50.0), units(9.9, 29.9, 49.9)
    assert assign(a=a, b=b) == {"a": 1, "b": 2}
    assert assign(higher=False, a=a, b=b) == {"b": 1, "a": 2}


def test_rows_share_a_place_if_their_difference_may_be_chance():
    noise = np.random.default_rng(1).normal(0, 1, 50)
    base = np.zeros(50)
    rows = {"a": base + 5, "b": base + 5 - 0.02 + noise, "c": base + 3 + noise, "d": base + 3 + noise}
    assert assign(**{name: units(*row) for name, row in rows.items()}) == {"a": 1, "b": 1, "c": 2, "d": 2}


def test_clips_of_one_video_are_drawn_together():
    # By clips alone the difference of 0.25 would be five standard errors above 0.
    a, b = units(1.0, -0.5, clips=100), units(0.0, 0.0, clips=100)
    assert assign(a=a, b=b) == {"a": 1, "b": 1}


def test_videos_of_one_ucf_group_are_drawn_together():
    names = [f"v_Archery_g{group:02d}_c{clip:02d}.avi" for group in (1, 2) for clip in range(1, 26)]
    a = [(name, 1.0, 1.0 if "_g01_" in name else -0.5) for name in names]
    assert assign(a=a, b=[(name, 1.0, 0.0) for name in names]) == {"a": 1, "b": 1}
    # Named otherwise, each of the 50 videos is a source of its own.
    a, b = ([(f"{place}.avi", *unit[1:]) for place, unit in enumerate(row)] for row in (a, units(*[0.0] * 50)))
    assert assign(a=a, b=b) == {"a": 1, "b": 2}


def test_one_row_and_one_video_have_no_places():
    assert assign(a=units(1.0, 2.0)) == {}
    assert assign(a=units(2.0, clips=9), b=units(1.0, clips=9)) == {}
    assert places.assign({"a": 3.0, "b": 4.0}, {}, False) == {"a": 1, "b": 2}  # rFVD, which is of no clip


@pytest.mark.filterwarnings("error")
def test_an_infinite_mean_is_the_first():
    infinite = units(math.inf, 30.0)
    assert assign(a=units(20.0, 30.0), b=infinite, c=infinite) == {"b": 1, "c": 1, "a": 2}
