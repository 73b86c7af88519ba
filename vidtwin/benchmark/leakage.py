"""Predict one latent from another by ridge regression, judged on source videos that it has not seen."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

FOLDS = 5
MAX_CLIPS = 2000
"""Evenly spaced clips of more than these are used: the regression holds a matrix of clips by clips."""
PENALTIES = tuple(10.0**power for power in range(-4, 5))
"""Candidates of the penalty, times the mean diagonal of the kernel."""


def probe(inputs: Floats, targets: Floats, sources: Sequence[str]) -> dict[str, Any]:
    """Predict the units of one latent from those of another by ridge regression.

    Sources are dealt to `FOLDS` folds; each fold is predicted by a regression on the others. Its penalty is the one
    that predicts best, within these others, sources that are held out in turn. Units are standardized by the clips that
    a regression has seen; those that do not vary are left out.

    Args:
        inputs: (N, P), a clip each.
        targets: (N, Q).
        sources: Source video of each clip.

    Returns:
        "r2": 1 minus the squared error of the held-out clips over that of the mean of the seen ones, all target units
        together; 0 or less says that nothing was learned. None for fewer than `FOLDS` sources, or if nothing varies.
        "sources", "clips".
    """
    chosen = choose_clips(len(sources))
    targets, kept = targets[chosen].astype(np.float64), [sources[place] for place in chosen]
    error, total = 0.0, 0.0
    for held, predicted, mean, deviation in predict_folds(inputs[chosen], targets, kept):
        varies = deviation > 0
        error += float(np.square((targets[held] - predicted)[:, varies] / deviation[varies]).sum())
        total += float(np.square((targets[held] - mean)[:, varies] / deviation[varies]).sum())
    return {"r2": 1 - error / total if total else None, "sources": len(set(kept)), "clips": len(kept)}


def choose_clips(number: int) -> NDArray[np.int64]:
    """Choose the clips that a regression takes: all, or evenly spaced ones."""
    return np.unique(np.linspace(0, number - 1, min(number, MAX_CLIPS)).round().astype(np.int64))


def predict_folds(
    inputs: Floats, targets: Floats, sources: Sequence[str]
) -> Iterator[tuple[NDArray[np.bool_], Floats, Floats, Floats]]:
    """Predict the clips of each fold of sources by a regression on the others, as `probe` says.

    Yields:
        Which clips (N,) are held out, their predictions (M, Q), and mean and standard deviation (Q,) of the seen
        targets, 0 for those that do not vary. Nothing for fewer than `FOLDS` sources.
    """
    numbers, count = deal(sources)
    inputs = inputs.astype(np.float64)
    for fold in range(FOLDS if count >= FOLDS else 0):
        held = numbers % FOLDS == fold
        seen, held_inputs = _standardize(inputs[~held], inputs[held])
        mean, deviation = targets[~held].mean(0), _deviations(targets[~held])
        wanted = np.divide(targets[~held] - mean, deviation, out=np.zeros(targets[~held].shape), where=deviation > 0)
        # Sources within are dealt again, so that clips of one stay together.
        inner = np.unique(numbers[~held], return_inverse=True)[1] % FOLDS
        penalty = _choose_penalty(seen, wanted, inner)
        yield held, predict(seen, wanted, held_inputs, [penalty])[0] * deviation + mean, mean, deviation


def deal(sources: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """Number the sources in an order that their names do not decide → each clip's number, and how many there are."""
    names = sorted(set(sources))
    order = np.random.default_rng(0).permutation(len(names))
    numbers = dict(zip(names, order.tolist(), strict=True))
    return np.array([numbers[source] for source in sources]), len(names)


def _choose_penalty(inputs: Floats, targets: Floats, folds: NDArray[np.int64]) -> float:
    """Choose the penalty that predicts the clips of each fold best from the others."""
    missed = np.zeros(len(PENALTIES))
    for fold in np.unique(folds):
        held = folds == fold
        seen, held_inputs = _standardize(inputs[~held], inputs[held])
        mean = targets[~held].mean(0)
        for place, predicted in enumerate(predict(seen, targets[~held] - mean, held_inputs, PENALTIES)):
            missed[place] += np.square(targets[held] - mean - predicted).sum()
    return PENALTIES[int(missed.argmin())]


def _standardize(seen: Floats, held: Floats) -> tuple[Floats, Floats]:
    """Bring units to mean 0 and variance 1 over the seen clips; those that do not vary there are left out."""
    mean, deviation = seen.mean(0), _deviations(seen)
    varies = deviation > 0
    return (seen - mean)[:, varies] / deviation[varies], (held - mean)[:, varies] / deviation[varies]


def _deviations(values: Floats) -> Floats:
    """Return the standard deviation of each unit, 0 if it is rounding."""
    deviation = values.std(0)
    return np.where(deviation > 1e-12 * (1 + np.abs(values.mean(0))), deviation, 0.0)


def predict(inputs: Floats, targets: Floats, held: Floats, penalties: Sequence[float]) -> list[Floats]:
    """Predict by ridge regression in its kernel form, for each penalty: k(held) (K + λ m I)⁻¹ targets.

    K is the clips' matrix of inner products and m its mean diagonal, so that penalties hold for any number of units.

    Args:
        inputs: (N, P) of mean 0, since no constant is fitted.
        targets: (N, Q) of mean 0.
        held: (M, P).
        penalties: λ of each.

    Returns:
        (M, Q) for each penalty.
    """
    kernel = inputs @ inputs.T
    scale = float(np.trace(kernel)) / len(kernel)
    if scale == 0:
        return [np.zeros((len(held), targets.shape[1])) for _ in penalties]
    values, vectors = np.linalg.eigh(kernel)
    rotated, weights = held @ inputs.T @ vectors, vectors.T @ targets
    return [(rotated / (np.maximum(values, 0) + penalty * scale)) @ weights for penalty in penalties]
