"""How well one latent predicts another: ridge regression, judged on source videos that it has not seen."""

from collections.abc import Sequence
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
    chosen = np.unique(np.linspace(0, len(sources) - 1, min(len(sources), MAX_CLIPS)).round().astype(int))
    inputs, targets = inputs[chosen].astype(np.float64), targets[chosen].astype(np.float64)
    folds, number = deal([sources[place] for place in chosen])
    error, total = 0.0, 0.0
    for fold in range(FOLDS if number >= FOLDS else 0):
        held = folds % FOLDS == fold
        seen = np.flatnonzero(~held)
        # Folds within: the next remainder of the source's number, so that clips of a source stay together.
        inner = (folds[seen] // FOLDS) % FOLDS
        penalty = _choose_penalty(inputs[seen], targets[seen], inner)
        missed, spread = _judge(inputs[seen], targets[seen], inputs[held], targets[held], [penalty])
        error, total = error + missed[0], total + spread
    return {"r2": 1 - error / total if total else None, "sources": number, "clips": len(chosen)}


def deal(sources: Sequence[str]) -> tuple[NDArray[np.int64], int]:
    """Number the sources in an order that their names do not decide → each clip's number, and how many there are."""
    names = sorted(set(sources))
    order = np.random.default_rng(0).permutation(len(names))
    numbers = dict(zip(names, order.tolist(), strict=True))
    return np.array([numbers[source] for source in sources]), len(names)


def _choose_penalty(inputs: Floats, targets: Floats, folds: NDArray[np.int64]) -> float:
    missed = np.zeros(len(PENALTIES))
    for fold in np.unique(folds):
        held = folds == fold
        if held.all():
            continue
        missed += _judge(inputs[~held], targets[~held], inputs[held], targets[held], PENALTIES)[0]
    return PENALTIES[int(missed.argmin())]


def _judge(
    inputs: Floats, targets: Floats, held_inputs: Floats, held_targets: Floats, penalties: Sequence[float]
) -> tuple[Floats, float]:
    """Return the squared error of the held-out clips by each penalty, and that of the seen clips' mean."""
    inputs, held_inputs = _standardize(inputs, held_inputs)
    targets, held_targets = _standardize(targets, held_targets)
    errors = [
        float(np.square(held_targets - predicted).sum())
        for predicted in predict(inputs, targets, held_inputs, penalties)
    ]
    return np.array(errors), float(np.square(held_targets).sum())


def _standardize(seen: Floats, held: Floats) -> tuple[Floats, Floats]:
    mean, deviation = seen.mean(0), seen.std(0)
    varies = deviation > 1e-12 * (1 + np.abs(mean))
    return ((each - mean)[:, varies] / deviation[varies] for each in (seen, held))  # type: ignore[return-value]


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
