"""Where models fail: quality against motion, texture and cuts of the clips, by frame, and at the seams of windows.

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

Floats = NDArray[np.float64]


def correlate_ranks(first: Floats, second: Floats, sources: Sequence[str]) -> dict[str, Any]:
    """Compute Spearman's rank correlation of two numbers of each clip.

    Args:
        first: (N,).
        second: (N,).
        sources: Source video of each clip.

    Returns:
        "rho", and "low" and "high", the ends of its interval; None if there are fewer than three clips, if one of the
        numbers is the same for all, and the ends if there is one source.
    """
    names = sorted(set(sources))
    place_of = {name: place for place, name in enumerate(names)}
    places = np.array([place_of[source] for source in sources])
    if len(places) < 3 or len(np.unique(first)) < 2 or len(np.unique(second)) < 2:
        return {"rho": None, "low": None, "high": None}

    def compute(counts: Floats) -> Floats:
        return _correlate_weighted(first, second, counts[:, places])

    found = {"rho": float(compute(np.ones((1, len(names))))[0]), "low": None, "high": None}
    if len(names) > 1:
        drawn = statistics.draw(len(names), compute)
        drawn = drawn[np.isfinite(drawn)]  # all drawn clips had one number
        if len(drawn):
            found["low"], found["high"] = statistics.interval(drawn)
    return found


def _correlate_weighted(first: Floats, second: Floats, weights: Floats) -> Floats:
    """Correlate the ranks of samples that hold each clip so many times, weights (D, N) → (D,)."""
    one, other = rank_weighted(first, weights), rank_weighted(second, weights)
    total = weights.sum(1, keepdims=True)
    one = one - (one * weights).sum(1, keepdims=True) / total
    other = other - (other * weights).sum(1, keepdims=True) / total
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.asarray(
            (one * other * weights).sum(1) / np.sqrt((one * one * weights).sum(1) * (other * other * weights).sum(1))
        )


def rank_weighted(values: Floats, weights: Floats) -> Floats:
    """Rank values in samples that hold each of them so many times; equal ones share the mean of their ranks.

    Args:
        values: (N,).
        weights: (D, N), whole numbers of at least 0.

    Returns:
        (D, N); those of values that a sample lacks have no meaning.
    """
    _, group = np.unique(values, return_inverse=True)
    counts = np.zeros((len(weights), int(group.max()) + 1))
    np.add.at(counts.T, group, weights.T)
    return np.asarray((np.cumsum(counts, 1) - (counts - 1) / 2)[:, group])


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
            sources = [statistics.source_of(clip["name"]) for clip in both]
            for metric in ("psnr", "ssim", "lpips"):
                if not both or not all(math.isfinite(clip.get(metric, math.nan)) for clip in both):
                    continue
                values = np.array([clip[metric] for clip in both])
                for measure in MEASURES:
                    of_clips = np.array([known[rows.key_of(clip)][measure] for clip in both])
                    named = {"row": row["name"], "latent": latent, "metric": metric, "measure": measure}
                    found.append(named | correlate_ranks(of_clips, values, sources))
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
    named = [statistics.source_of(clip["name"]) for clip in clips]
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
