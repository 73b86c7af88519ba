"""Cheap looks at latents before any diffusion model: which classes they separate, their spectrum, their channels."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy import fft

from vidtwin.benchmark import leakage

Floats = NDArray[np.float64]

LOW = 4  # the lowest 1 / LOW of the frequencies of each axis are low
MAX_CHANNELS = 256
"""Maximum number of channels of which the covariance is kept."""


def share_low_frequencies(latent: Floats) -> Floats:
    """Compute the share of a latent's energy in low frequencies, by its DCT over all axes but the channels.

    The constant is left out. Low are frequencies in the lowest quarter on every axis.

    Args:
        latent: (B, C, ...), each clip or window.

    Returns:
        (B,); NaN for latents without axes beside the channels, or without other frequencies than the constant.
    """
    axes = tuple(range(2, latent.ndim))
    if not axes:
        return np.full(len(latent), np.nan)
    energy = np.square(fft.dctn(latent, axes=axes, norm="ortho")).sum(1)
    low, constant = energy, energy
    for axis in range(1, energy.ndim):
        low = low.take(range(_count_low(energy.shape[axis])), axis)
        constant = constant.take([0], axis)
    first, whole, least = (each.reshape(len(latent), -1).sum(1) for each in (low, energy, constant))
    with np.errstate(invalid="ignore"):
        return np.asarray((first - least) / (whole - least))


def share_of_noise(shape: Sequence[int]) -> float | None:
    """Return what `share_low_frequencies` of white noise is, for a latent (C, ...); None if it has none."""
    sizes = shape[1:]
    if math.prod(sizes) == 1:
        return None
    return (math.prod(map(_count_low, sizes)) - 1) / (math.prod(sizes) - 1)


def _count_low(size: int) -> int:
    return max(1, -(-size // LOW))


def sum_channels(latent: Floats) -> dict[str, Any] | None:
    """Sum a latent (B, C, ...) over all but its channels: "count", "sum" (C) and "square" (C, C); None for too many."""
    channels = latent.shape[1]
    if channels > MAX_CHANNELS:
        return None
    places = np.moveaxis(latent, 1, -1).reshape(-1, channels)
    return {"count": len(places), "sum": places.sum(0), "square": np.einsum("nc,nd->cd", places, places)}


def describe_channels(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe the eigenvalues of the channels' covariance over all clips and places.

    Args:
        parts: Of `sum_channels`.

    Returns:
        "eigenvalues": each as a share of their sum, falling; "effective": exp of their entropy, from 1 (one direction
        has all the variance) to the number of channels (all have the same).
    """
    count = sum(part["count"] for part in parts)
    mean = np.sum([part["sum"] for part in parts], 0) / count
    covariance = np.sum([part["square"] for part in parts], 0) / count - np.outer(mean, mean)
    values = np.maximum(np.linalg.eigvalsh(covariance)[::-1], 0)
    if not values.sum():
        return {"eigenvalues": None, "effective": None}
    shares = values / values.sum()
    entropy = -sum(share * math.log(share) for share in shares.tolist() if share > 0)
    return {"eigenvalues": shares.tolist(), "effective": math.exp(entropy)}


def probe_classes(units: Floats, labels: Sequence[int], sources: Sequence[str]) -> dict[str, Any]:
    """Name the classes of clips by a linear classifier on their latents, judged on sources that it has not seen.

    Ridge regression to one-hot labels, the largest output wins; folds and the choice of the penalty are those of
    `leakage.probe`. Classes of a single source can't be known from others: they are left out, and so are clips whose
    class has all of its sources in one fold.

    Args:
        units: (N, P), a clip each.
        labels: Class of each.
        sources: Source video of each.

    Returns:
        "accuracy" of the held-out clips, None for fewer than two classes or fewer than `leakage.FOLDS` sources;
        "chance", the share of the most frequent class among them; "classes" and "clips", their numbers.
    """
    sources_of: dict[int, set[str]] = {}
    for label, source in zip(labels, sources, strict=True):
        sources_of.setdefault(label, set()).add(source)
    several = np.array([place for place, label in enumerate(labels) if len(sources_of[label]) > 1], np.int64)
    nothing = {"accuracy": None, "chance": None, "classes": 0, "clips": 0}
    if not len(several):
        return nothing
    chosen = several[leakage.choose_clips(len(several))]
    kinds, known = np.unique(np.asarray(labels)[chosen], return_inverse=True)
    wanted, kept = np.eye(len(kinds))[known], [sources[place] for place in chosen]
    truth: list[int] = []
    found: list[int] = []
    for held, predicted, mean, _ in leakage.predict_folds(units[chosen], wanted, kept):
        seen = mean[known[held]] > 0
        truth += known[held][seen].tolist()
        found += predicted[seen].argmax(1).tolist()
    if len(set(truth)) < 2:
        return nothing
    return {
        "accuracy": sum(one == other for one, other in zip(truth, found, strict=True)) / len(truth),
        "chance": max(map(truth.count, set(truth))) / len(truth),
        "classes": len(set(truth)),
        "clips": len(truth),
    }
