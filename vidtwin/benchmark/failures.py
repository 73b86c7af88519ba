"""Relate quality to motion, texture and cuts of the clips, to frames, and to the seams of windows.

From the files of `analysis` and the rows' clips alone; intervals draw source videos, as those of `statistics`.
"""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from vidtwin.benchmark import rows, statistics
from vidtwin.benchmark.analysis_files import MEASURES
from vidtwin.benchmark.rows import Results
from vidtwin.listing import source_of

Floats = NDArray[np.float64]

DRAWS = 500  # of a correlation, each of which ranks all clips


def correlate_ranks(first: Floats, second: Floats, sources: Sequence[str]) -> dict[str, Any]:
    """Compute Spearman's rank correlation of two numbers of each clip; see `correlate_all`."""
    return correlate_all([first], [second], sources)[0][0]


def correlate_all(
    firsts: Sequence[Floats], seconds: Sequence[Floats], sources: Sequence[str]
) -> list[list[dict[str, Any]]]:
    """Compute Spearman's rank correlations of numbers of each clip, each of the first with each of the second.

    Args:
        firsts: (N,) each.
        seconds: (N,) each.
        sources: Source video of each clip.

    Returns:
        For each of the first and each of the second "rho", and "low" and "high", the ends of its interval. All are None
        for fewer than three clips or a number that is the same for all, the ends for one source.
    """
    names = sorted(set(sources))
    place_of = {name: place for place, name in enumerate(names)}
    places = np.array([place_of[source] for source in sources])

    def compute(counts: Floats) -> Floats:
        weights = counts[:, places]
        one, other = ([_center_ranks(values, weights) for values in each] for each in (firsts, seconds))
        return np.stack([np.stack([(x * y).sum(1) for y in other], 1) for x in one], 1)

    rho = compute(np.ones((1, len(names))))[0]
    drawn = statistics.draw(len(names), compute, DRAWS, len(places)) if len(names) > 1 else None
    found: list[list[dict[str, Any]]] = []
    for i, first in enumerate(firsts):
        found.append([{"rho": None, "low": None, "high": None} for _ in seconds])
        for j, second in enumerate(seconds):
            if len(places) < 3 or len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
                continue
            found[i][j]["rho"] = float(rho[i, j])
            # A draw whose clips have one number has no correlation.
            if drawn is not None and (finite := drawn[np.isfinite(drawn[:, i, j]), i, j]).size:
                found[i][j]["low"], found[i][j]["high"] = statistics.interval(finite)
    return found


def _center_ranks(values: Floats, weights: Floats) -> Floats:
    """Rank values (N,) in samples that hold each of them so many times (D, N); products of two sum to a correlation."""
    ranks = rank_weighted(values, weights)
    ranks -= (ranks * weights).sum(1, keepdims=True) / weights.sum(1, keepdims=True)
    ranks *= np.sqrt(weights)
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(ranks / np.sqrt(np.square(ranks).sum(1, keepdims=True)))


def rank_weighted(values: Floats, weights: Floats) -> Floats:
    """Rank values in samples that hold each of them so many times; equal ones share the mean of their ranks.

    Args:
        values: (N,).
        weights: (D, N), whole numbers of at least 0.

    Returns:
        (D, N); those of values that a sample lacks have no meaning.
    """
    order = np.argsort(values, kind="stable")
    starts = np.flatnonzero(np.diff(values[order], prepend=-np.inf))
    counts = np.add.reduceat(weights[:, order], starts, axis=1)
    ranks = np.cumsum(counts, 1) - (counts - 1) / 2
    group = np.empty(len(values), np.int64)
    group[order] = np.cumsum(np.isin(np.arange(len(values)), starts)) - 1
    return np.asarray(ranks[:, group])


def correlate_content(results: Results, content: Sequence[rows.Clip], alone: dict[str, Any]) -> list[dict[str, Any]]:
    """Correlate each model's quality with the content of the clips.

    Args:
        results: The rows and their clips.
        content: Of `analysis_files.read_content`.
        alone: Of `analysis_files.read_all`.

    Returns:
        For each row, quality and measure of the content: "row", "latent" (None: all together), "metric", "measure", and
        the correlation of `correlate_ranks`. Metrics are PSNR, and SSIM and LPIPS if the row has them.
    """
    known = {rows.key_of(clip): clip for clip in content}
    found = []
    for row in rows.order(results):
        if row["kind"] in ("failed", "reference"):
            continue
        lists: list[tuple[str | None, list[rows.Clip]]] = [(None, rows.chosen_clips(results, row["name"]))]
        clips = alone.get(row["name"], {}).get("clips", [])
        for latent in clips[0]["latents"] if clips else ():
            parts = [clip | clip["latents"][latent] for clip in clips if clip["latents"][latent]]
            lists += [(latent, parts)] if parts else []
        for latent, chosen in lists:
            both = [clip for clip in chosen if rows.key_of(clip) in known]
            sources = [source_of(clip["name"]) for clip in both]
            if not both:
                continue
            metrics = [
                key for key in ("psnr", "ssim", "lpips") if all(math.isfinite(x.get(key, math.nan)) for x in both)
            ]
            content_of = [np.array([known[rows.key_of(clip)][measure] for clip in both]) for measure in MEASURES]
            quality = [np.array([clip[metric] for clip in both]) for metric in metrics]
            correlations = correlate_all(quality, content_of, sources) if quality else []
            for metric, row_of in zip(metrics, correlations, strict=True):
                for measure, each in zip(MEASURES, row_of, strict=True):
                    named = {"row": row["name"], "latent": latent, "metric": metric, "measure": measure}
                    found.append(named | each)
    return found


def describe_frames(analysis: dict[str, Any]) -> dict[str, Any]:
    """Describe PSNR by the frame's place in the clip.

    Args:
        analysis: Of one row.

    Returns:
        "mean", "low" and "high" by frame (ends None for one source); "seams": places of frames that begin a window;
        "seam": mean PSNR of the two frames at each seam minus that of the other frames, with "low" and "high"; None
        without seams.
    """
    clips = analysis["clips"]
    values = np.array([clip["frame_psnr"] for clip in clips])
    named = [source_of(clip["name"]) for clip in clips]
    seams = analysis["seams"]
    mean, low, high = _bound(values, named)
    beside = sorted({place for seam in seams for place in (seam - 1, seam)})
    seam = None
    if beside and len(beside) < values.shape[1]:
        others = [place for place in range(values.shape[1]) if place not in beside]
        difference = values[:, beside].mean(1) - values[:, others].mean(1)
        (middle,), (least,), (most,) = _bound(difference[:, None], named)
        seam = {"mean": middle, "low": least, "high": most}
    return {"mean": mean, "low": low, "high": high, "seams": seams, "seam": seam}


def _bound(values: Floats, sources: Sequence[str]) -> tuple[list[float], list[float | None], list[float | None]]:
    """Average numbers of clips (N, K), with the ends of the intervals."""
    names = sorted(set(sources))
    sums = np.zeros((values.shape[1], 2, len(names)))
    for source, row in zip(sources, values, strict=True):
        sums[:, 0, names.index(source)] += row
        sums[:, 1, names.index(source)] += 1
    mean = [float(value) for value in values.mean(0)]
    if len(names) < 2:
        return mean, [None] * len(mean), [None] * len(mean)
    ends = [statistics.interval(each) for each in statistics.draw_means(sums).T]
    return mean, [low for low, _ in ends], [high for _, high in ends]
