"""Rank the trained rows by a metric; rows tie if their difference is within the noise of the source videos."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from vidtwin.benchmark import rows, statistics
from vidtwin.benchmark.rows import Results
from vidtwin.benchmark.statistics import Unit
from vidtwin.metrics.registry import Metric


def units_of(results: Results) -> dict[str, list[rows.Unit]]:
    """List by trained row the clips or videos over which its means are taken, with weights and numbers."""
    trained = [row["name"] for row in results.rows if row["kind"] == "trained"]
    return {name: rows.units_of(rows.chosen_clips(results, name), results.protocol) for name in trained}


def rank(
    results: Results, metric: Metric, means: Mapping[str, float], units_by_row: Mapping[str, Sequence[rows.Unit]]
) -> dict[str, int]:
    """Rank rows by their means; a row that is worse than a reference, codecs left out, has no rank."""
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

    Two rows tie if the interval of their difference contains 0: sources are drawn with replacement, the same ones for
    both (`statistics.draw_means`).

    Args:
        means: By row.
        units: By row the numbers that its mean is made of, of the same videos for all; without any, values alone count.
        higher: Whether more is better.

    Returns:
        By row; none for fewer than two rows (the best of one says nothing) or for units of a single source.
    """
    sources = statistics.list_sources([unit for row in units.values() for unit in row])
    if len(means) < 2 or (units and len(sources) < 2):
        return {}
    # A row with an infinite number has no interval: its mean alone counts.
    finite = [name for name, row in units.items() if all(math.isfinite(value) for _, _, value in row)]
    drawn = {}
    if finite:
        sums = np.stack([statistics.sum_by_source(units[name], sources) for name in finite])
        drawn = dict(zip(finite, statistics.draw_means(sums).T, strict=True))
    places: dict[str, int] = {}
    place, first = 0, ""
    for name in sorted(means, key=lambda name: -means[name] if higher else means[name]):
        alike = bool(place) and means[name] == means[first]
        if place and name in drawn and first in drawn:
            alike = alike or statistics.holds_zero(drawn[name] - drawn[first])
        if not alike:
            place, first = place + 1, name
        places[name] = place
    return places
