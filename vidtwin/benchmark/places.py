"""Rank the trained rows by a metric; rows tie if their difference is within the noise of the test videos."""

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

from vidtwin.benchmark import rows
from vidtwin.benchmark.rows import Results
from vidtwin.metrics.registry import Metric

DRAWS, SEED, CONFIDENCE = 1000, 0, 0.95

Unit = tuple[str, float, float]  # video, weight, value


def units_of(results: Results) -> dict[str, list[rows.Unit]]:
    """List by trained row the clips or videos over which its means are taken, with weights and numbers."""
    trained = [row["name"] for row in results.rows if row["kind"] == "trained"]
    return {name: rows.units_of(rows.chosen_clips(results, name), results.protocol) for name in trained}


def rank(
    results: Results, metric: Metric, means: Mapping[str, float], units_by_row: Mapping[str, Sequence[rows.Unit]]
) -> dict[str, int]:
    """Rank rows by their means; a row that is worse than a reference has no rank."""
    units: dict[str, list[Unit]] = {}
    for name in means if metric.per_clip else ():
        units[name] = [(video, weight, values[metric.key]) for video, weight, values in units_by_row[name]]
    references = [row["name"] for row in results.rows if row["kind"] == "reference" and not row.get("coding")]
    places = assign(means, units, bool(metric.higher))
    return {n: place for n, place in places.items() if not any(_is_worse(results, metric, n, r) for r in references)}


def _is_worse(results: Results, metric: Metric, name: str, reference: str) -> bool:
    """Return whether a row is worse than a reference over their common clips; False if they can't be compared."""
    compared = results.comparison["rows"]
    found = [compared[each].get(metric.key) for each in (name, reference)]
    if metric.per_clip and results.comparison["counts"][reference] < results.comparison["num_clips"]:
        clips = [rows.chosen_clips(results, each) for each in (name, reference)]
        both = {rows.key_of(clip) for clip in clips[1]}
        shared = [[clip for clip in each if rows.key_of(clip) in both] for each in clips]
        found = [rows.means(each, results.protocol).get(metric.key) for each in shared]
    if not all(isinstance(each, dict) for each in found):
        return False
    if not metric.per_clip and found[0]["num_clips"] != found[1]["num_clips"]:
        return False
    ours, theirs = (each["mean" if metric.per_clip else "value"] for each in found)
    return bool(ours < theirs if metric.higher else ours > theirs)


def assign(means: Mapping[str, float], units: Mapping[str, Sequence[Unit]], higher: bool) -> dict[str, int]:
    """Assign ranks from 1 on; a row ties with the best row of a rank unless they differ significantly.

    Bootstrap: videos are drawn with replacement, the same ones for all rows. Two rows tie if the central interval of
    probability `CONFIDENCE` of the drawn differences contains 0.

    Args:
        means: By row.
        units: By row the numbers that its mean is made of, of the same videos for all; without any, values alone count.
        higher: Whether more is better.

    Returns:
        By row; none for fewer than two rows (the best of one says nothing) or for units of a single video.
    """
    if len(means) < 2 or (units and len({video for row in units.values() for video, _, _ in row}) < 2):
        return {}
    drawn = _draw_means(units) if units else {}
    places: dict[str, int] = {}
    place, first = 0, ""
    for name in sorted(means, key=lambda name: -means[name] if higher else means[name]):
        alike = bool(place) and (means[name] == means[first] or (units and _overlap(drawn[name], drawn[first])))
        if not alike:
            place, first = place + 1, name
        places[name] = place
    return places


def _draw_means(units: Mapping[str, Sequence[Unit]]) -> dict[str, NDArray[np.float64]]:
    """Compute each row's means over drawn videos."""
    videos = sorted({video for row in units.values() for video, _, _ in row})
    place_of = {video: place for place, video in enumerate(videos)}
    sums = np.zeros((2 * len(units), len(videos)))  # of each row: of weighted values and of weights
    for index, row in enumerate(units.values()):
        for video, weight, value in row:
            sums[2 * index : 2 * index + 2, place_of[video]] += weight * value, weight
    random = np.random.default_rng(SEED)
    drawn = np.empty((DRAWS, len(sums)))
    with np.errstate(invalid="ignore"):  # an infinite PSNR that was not drawn
        for each in drawn:
            counts = np.bincount(random.integers(len(videos), size=len(videos)), minlength=len(videos))
            each[:] = sums @ counts.astype(np.float64)
        return {name: drawn[:, 2 * index] / drawn[:, 2 * index + 1] for index, name in enumerate(units)}


def _overlap(one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
    """Return whether the interval of the difference of two rows' drawn means contains 0."""
    return bool(min((one >= other).mean(), (one <= other).mean()) > (1 - CONFIDENCE) / 2)
