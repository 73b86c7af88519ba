"""Mean opinion scores of a study, with intervals and agreement."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidtwin.benchmark import statistics
from vidtwin.benchmark.study.answers import Answers
from vidtwin.benchmark.study.criteria import CRITERIA, DESTROYED, IDENTICAL, MODEL, SCALE
from vidtwin.listing import source_of


@dataclass(frozen=True)
class Opinion:
    """A model's mean opinion score by one criterion.

    Attributes:
        model: Its name.
        criterion: Key of the criterion.
        mean: Mean over all scores; None without any.
        interval: Bootstrap interval of it; None for one rater, one source or no score.
        scores: Number of scores.
        raters: Number of raters who gave them.
        sources: Number of sources that their videos are of (UCF-101: groups).
    """

    model: str
    criterion: str
    mean: float | None
    interval: tuple[float, float] | None
    scores: int
    raters: int
    sources: int


@dataclass(frozen=True)
class Study:
    """The result of a study.

    Attributes:
        opinions: Of each model, by each criterion.
        alpha: Agreement of the raters by criterion, None if it is undefined.
        raters: Names of the raters that count.
        left_out: By name of a rater who doesn't, the reason.
        partial: By name of a rater who counts, the rated items of all if they are not all.
    """

    opinions: list[Opinion]
    alpha: dict[str, float | None]
    raters: list[str]
    left_out: dict[str, str]
    partial: dict[str, tuple[int, int]]


def score(
    key: dict[str, Any],
    answers: Sequence[Answers],
    identical_at_least: int | None = None,
    destroyed_at_most: int = 2,
    seed: int = 0,
) -> Study:
    """Compute the result of a study.

    Args:
        key: Content of `key.json`.
        answers: Of each rater.
        identical_at_least: Least score of each criterion for the source itself; None is 5, or 4 if clips were shown
            without the source to compare.
        destroyed_at_most: Greatest one for a destroyed clip.
        seed: Of the bootstrap.
    """
    items = key["items"]
    if identical_at_least is None:
        identical_at_least = max(SCALE) - bool(key["alone"])
    left_out = {}
    for each in answers:
        if reason := _find_fault(items, each, identical_at_least, destroyed_at_most):
            left_out[each.name] = reason
    counted = [each for each in answers if each.name not in left_out]
    opinions = [
        _summarize(items, counted, model, criterion.key, seed) for model in key["models"] for criterion in CRITERIA
    ]
    judged = [id for id, item in items.items() if item["kind"] == MODEL]
    alpha = {
        criterion.key: krippendorff_alpha(
            [[each.scores.get(id, {}).get(criterion.key) for id in judged] for each in counted]
        )
        for criterion in CRITERIA
    }
    partial = {each.name: (len(each.scores), len(items)) for each in counted if len(each.scores) < len(items)}
    return Study(opinions, alpha, [each.name for each in counted], left_out, partial)


def krippendorff_alpha(ratings: Sequence[Sequence[int | None]]) -> float | None:
    """Compute Krippendorff's alpha for ordinal ratings ("Computing Krippendorff's alpha-reliability", 2011).

    1 is full agreement, 0 that of chance. Items with fewer than two ratings do not count. (The packages that compute it
    are GPL, which this project's code is not to depend on.)

    Args:
        ratings: Of each rater, of each item; None for those that are absent.

    Returns:
        Alpha; None if no two ratings of one item exist, or all ratings are equal.
    """
    values = np.array(list(SCALE))
    counts = np.array(
        [[sum(value == rating for rating in item) for value in values] for item in zip(*ratings, strict=True)],
        np.float64,
    ).reshape(-1, len(values))
    counts = counts[counts.sum(1) >= 2]
    if not len(counts):
        return None
    # Coincidences of two values within an item.
    pairs = np.sum([(np.outer(item, item) - np.diag(item)) / (item.sum() - 1) for item in counts], 0)
    totals = pairs.sum(1)
    middles = totals.cumsum() - totals / 2  # ranks: a difference of two is the ratings between them
    squares = np.subtract.outer(middles, middles) ** 2
    expected = (np.outer(totals, totals) * squares).sum() / (totals.sum() - 1)
    return None if expected == 0 else float(1 - (pairs * squares).sum() / expected)


def _find_fault(items: dict[str, Any], each: Answers, least: int, most: int) -> str | None:
    """Return why a rater's answers do not count, or None."""
    faults = []
    checks = 0
    for id, scores in each.scores.items():
        kind, low, high = items[id]["kind"], min(scores.values()), max(scores.values())
        checks += kind != MODEL
        if kind == IDENTICAL and low < least:
            faults.append(f"{low} for the source itself (at least {least})")
        elif kind == DESTROYED and high > most:
            faults.append(f"{high} for a destroyed clip (at most {most})")
    if faults:
        return f"failed {len(faults)} of {checks} attention checks: {'; '.join(faults)}"
    if not checks and any(item["kind"] != MODEL for item in items.values()):
        return "answered no attention check"
    return None


def _summarize(items: dict[str, Any], counted: Sequence[Answers], model: str, criterion: str, seed: int) -> Opinion:
    of_model = {
        id: source_of(item["video"]) for id, item in items.items() if item["model"] == model and item["kind"] == MODEL
    }
    given = [
        (rater, of_model[id], scores[criterion])
        for rater, each in enumerate(counted)
        for id, scores in each.scores.items()
        if id in of_model
    ]
    raters, sources = sorted({rater for rater, _, _ in given}), sorted({source for _, source, _ in given})
    mean = float(np.mean([value for _, _, value in given])) if given else None
    # Sums and numbers of scores by rater and source: a draw weights both.
    sums, numbers = np.zeros((2, len(raters), len(sources)))
    for rater, source, value in given:
        place = raters.index(rater), sources.index(source)
        sums[place] += value
        numbers[place] += 1
    interval = bootstrap(sums, numbers, seed) if min(len(raters), len(sources)) > 1 else None
    return Opinion(model, criterion, mean, interval, len(given), len(raters), len(sources))


def bootstrap(sums: NDArray[Any], numbers: NDArray[Any], seed: int) -> tuple[float, float] | None:
    """Compute the interval of a mean if raters and sources are drawn with replacement, each for itself.

    Args:
        sums: Sums of scores by rater and source.
        numbers: Their numbers.
        seed: Of the draws.
    """
    random = np.random.default_rng(seed)
    raters, sources = (
        random.multinomial(size, [1 / size] * size, statistics.DRAWS).astype(np.float64) for size in sums.shape
    )
    totals = ((raters @ numbers) * sources).sum(1)
    rated = totals > 0  # else none of the drawn raters has rated a drawn source
    if not rated.any():
        return None
    drawn = ((raters @ sums) * sources).sum(1)[rated] / totals[rated]
    return statistics.interval(drawn)
