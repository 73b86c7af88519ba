"""Intervals, paired comparisons and the spread over seeds, from the clips' numbers of a results folder alone.

Clips of one source video are alike, so a mean over many of them is less certain than their number says: whatever is
drawn here is drawn by source, with all of its clips. A source is a group of UCF-101 (`v_Class_g01_c01.avi` and
`_c02.avi` are cut from one recording), in other data sets a video.

units ── sums by source ── `DRAWS` draws of sources, the same for all rows and metrics ──> means ──> intervals
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidtwin.benchmark import rows
from vidtwin.benchmark.rows import Results
from vidtwin.listing import source_of
from vidtwin.metrics.registry import BY_KEY

DRAWS, SEED, CONFIDENCE = 2000, 0, 0.95
FEW_SOURCES = 20
"""With fewer sources intervals are too narrow: a bootstrap knows no values but those that were drawn."""
WORST = 3
"""So many worst clips are listed of each row."""

Unit = tuple[str, float, float]  # video, weight, value
Floats = NDArray[np.float64]

_NUMBERS_AT_ONCE = 2**22  # counts of one batch of draws


def sum_by_source(units: Sequence[Unit], sources: Sequence[str]) -> Floats:
    """Sum units by source → (2, S): weighted values and weights."""
    places = {source: place for place, source in enumerate(sources)}
    sums = np.zeros((2, len(sources)))
    for video, weight, value in units:
        sums[:, places[source_of(video)]] += weight * value, weight
    return sums


def list_sources(units: Sequence[Unit]) -> list[str]:
    """List the sources of units in order of their names."""
    return sorted({source_of(video) for video, _, _ in units})


def draw(number: int, compute: Callable[[Floats], Floats], draws: int | None = None, width: int = 1) -> Floats:
    """Draw `number` sources with replacement many times, and compute values of each batch of draws.

    Args:
        number: Number of sources, S.
        compute: From counts (D, S), how often each source was drawn, to (D, ...).
        draws: Number of draws; None: `DRAWS`.
        width: Numbers that `compute` holds for each draw, if more than S: batches are smaller then.

    Returns:
        (draws, ...).
    """
    random = np.random.default_rng(SEED)
    draws = DRAWS if draws is None else draws
    step = max(1, _NUMBERS_AT_ONCE // max(number, width))
    drawn = []
    for start in range(0, draws, step):
        batch = min(step, draws - start)
        picked = random.integers(number, size=(batch, number)) + number * np.arange(batch)[:, None]
        counts = np.bincount(picked.ravel(), minlength=batch * number).reshape(batch, number)
        drawn.append(compute(counts.astype(np.float64)))
    return np.concatenate(drawn)


def draw_means(sums: Floats) -> Floats:
    """Draw weighted means.

    Args:
        sums: (K, 2, S), of `sum_by_source` of K lists of units over the same sources.

    Returns:
        (DRAWS, K), by the same draws for all. A drawn source counts with all of its units.
    """

    def compute(counts: Floats) -> Floats:
        # By einsum's own loop: BLAS adds in another order on another number of threads.
        values, weights = np.einsum("ds,kps->pdk", counts, sums, optimize=False)
        return values / weights

    return draw(sums.shape[2], compute)


def interval(drawn: Floats) -> tuple[float, float]:
    """Return the central interval of probability `CONFIDENCE` of drawn values (percentile bootstrap)."""
    low, high = np.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def holds_zero(drawn: Floats) -> bool:
    """Return whether the interval of drawn differences contains 0."""
    low, high = interval(drawn)
    return low <= 0 <= high


def adjust_by_holm(p_values: Sequence[float]) -> list[float]:
    """Adjust p-values for their number (Holm 1979).

    The k-th smallest of m is multiplied by m − k + 1; none is below a smaller one's, or above 1.
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for place, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        adjusted[index] = largest
    return adjusted


def of(results: Results) -> dict[str, Any]:
    """Return the statistics of a results folder, computed once and kept in its comparison as "statistics"."""
    if "statistics" not in results.comparison:
        results.comparison["statistics"] = describe(results)
    return dict(results.comparison["statistics"])


def describe(results: Results) -> dict[str, Any]:
    """Compute all statistics of a results folder, for `comparison.json`.

    Returns:
        "draws", "seed", "confidence", "num_sources" (of the common clips), "source" ("groups of UCF-101" or "videos");
        "rows": by row and metric "low" and "high" of the mean's interval and "sources", of the row's clips in the
        comparison; "pairs", see `compare_pairs`; "seeds", see `describe_seeds`; "worst_clips": by row.
    """
    names = sorted({name for name, _ in rows.common_clips(results)})
    units = {name: units_of(results, name) for name in results.clips}
    return {
        "draws": DRAWS,
        "seed": SEED,
        "confidence": CONFIDENCE,
        "num_sources": len({source_of(name) for name in names}),
        "source": "groups of UCF-101" if names and all(source_of(name) != name for name in names) else "videos",
        "rows": bound_means(units),
        "pairs": compare_pairs(results, units),
        "seeds": describe_seeds(results),
        "worst_clips": {name: list_worst(rows.chosen_clips(results, name)) for name in results.clips},
    }


def units_of(results: Results, name: str) -> dict[str, list[Unit]]:
    """List by metric what a row's means are made of: video, weight and value."""
    found = rows.units_of(rows.chosen_clips(results, name), results.protocol)
    keys = found[0][2] if found else ()
    return {key: [(video, weight, values[key]) for video, weight, values in found] for key in keys}


def bound_means(units: Mapping[str, Mapping[str, Sequence[Unit]]]) -> dict[str, dict[str, Any]]:
    """Compute the interval of each mean.

    Args:
        units: By row and metric, see `units_of`.

    Returns:
        By row and metric "low", "high" and "sources"; no ends for fewer than two sources or values that are not finite.
    """
    found: dict[str, dict[str, Any]] = {name: {} for name in units}
    alike: dict[tuple[str, ...], list[tuple[str, str]]] = {}  # rows and metrics by their sources: drawn together
    for name, metrics in units.items():
        for key, values in metrics.items():
            sources = list_sources(values)
            found[name][key] = {"low": None, "high": None, "sources": len(sources)}
            if len(sources) > 1 and all(math.isfinite(value) for _, _, value in values):
                alike.setdefault(tuple(sources), []).append((name, key))
    for shared, members in alike.items():
        sums = np.stack([sum_by_source(units[name][key], shared) for name, key in members])
        for (name, key), drawn in zip(members, draw_means(sums).T, strict=True):
            found[name][key]["low"], found[name][key]["high"] = interval(drawn)
    return found


def compare_pairs(results: Results, units: Mapping[str, Mapping[str, Sequence[Unit]]]) -> list[dict[str, Any]]:
    """Compare any two trained rows by each metric, over the sources of the common clips.

    Args:
        results: The rows.
        units: By row and metric, see `units_of`.

    Returns:
        For each metric and pair "metric", "first" and "second" (the first has the better mean), "difference" (mean of
        the first minus that of the second) with "low" and "high", "better" and "worse" (sources on which the first is
        so), "sources", "p" (Wilcoxon's signed-rank test of the differences by source, two-sided) and "p_holm"
        (adjusted over the pairs of the metric). Pairs of fewer than two sources, of values that are not finite, and
        of two seeds of one model are left out.
    """
    from scipy import stats  # slow to import

    trained = [row["name"] for row in rows.order(results) if row["kind"] == "trained"]
    seeds = {row["name"]: row.get("seed_of") for row in results.rows}
    found: list[dict[str, Any]] = []
    for key in dict.fromkeys(key for name in trained for key in units[name]):
        named = [name for name in trained if key in units[name]]
        named = [name for name in named if all(math.isfinite(value) for _, _, value in units[name][key])]
        sources = list_sources(units[named[0]][key]) if named else []
        if len(named) < 2 or len(sources) < 2:
            continue
        sums = np.stack([sum_by_source(units[name][key], sources) for name in named])
        drawn, by_source = draw_means(sums), sums[:, 0] / sums[:, 1]
        means = sums[:, 0].sum(1) / sums[:, 1].sum(1)
        pairs = []
        for one, other in itertools.combinations(range(len(named)), 2):
            if (model := seeds.get(named[one])) and model == seeds.get(named[other]):
                continue  # two trainings of one model: see `describe_seeds`
            if (means[one] < means[other]) == BY_KEY[key].higher:
                one, other = other, one
            low, high = interval(drawn[:, one] - drawn[:, other])
            differences = by_source[one] - by_source[other]
            signs = np.sign(differences) * (1 if BY_KEY[key].higher else -1)
            pairs.append(
                {
                    "metric": key,
                    "first": named[one],
                    "second": named[other],
                    "difference": float(means[one] - means[other]),
                    "low": low,
                    "high": high,
                    "better": int((signs > 0).sum()),
                    "worse": int((signs < 0).sum()),
                    "sources": len(sources),
                    "p": float(stats.wilcoxon(differences).pvalue) if differences.any() else 1.0,
                }
            )
        adjusted = adjust_by_holm([pair["p"] for pair in pairs])
        found += [pair | {"p_holm": p} for pair, p in zip(pairs, adjusted, strict=True)]
    return found


def describe_seeds(results: Results) -> dict[str, Any]:
    """Describe the spread over seeds: of trained rows with one `seed_of`, if there are at least two.

    It is that of the trainings, over the same clips, and apart from the intervals, which are those of the clips.

    Returns:
        By the value of `seed_of`: "rows", and "metrics": by metric "mean" and "std" (sample, n − 1) of the rows' means.
    """
    groups: dict[str, list[str]] = {}
    for row in rows.order(results):
        if row["kind"] == "trained" and row.get("seed_of"):
            groups.setdefault(row["seed_of"], []).append(row["name"])
    found = {}
    for group, names in groups.items():
        if len(names) < 2:
            continue
        compared = [results.comparison["rows"][name] for name in names]
        metrics = {}
        for key in compared[0]:
            values = [_value(row.get(key)) for row in compared]
            numbers = [value for value in values if value is not None and math.isfinite(value)]
            if len(numbers) == len(names):
                metrics[key] = {"mean": float(np.mean(numbers)), "std": float(np.std(numbers, ddof=1))}
        found[group] = {"rows": names, "metrics": metrics}
    return found


def _value(found: Any) -> float | None:
    return found.get("mean", found.get("value")) if isinstance(found, dict) else None


def list_worst(clips: Sequence[rows.Clip], number: int = WORST) -> list[dict[str, Any]]:
    """List the clips of the lowest PSNR, the worst first: name, start frame and metrics of each."""
    ranked = sorted(clips, key=lambda clip: (clip["psnr"], rows.key_of(clip)))
    hidden = ("model", "num_frames", "mse")
    return [{key: value for key, value in clip.items() if key not in hidden} for clip in ranked[:number]]
