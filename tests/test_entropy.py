"""Entropy coding: the bytes decode to the same symbols, and cost what the formulas say."""

import importlib
import math
from collections import Counter

import numpy as np
import pytest
import scipy.stats

from vidtwin import entropy
from vidtwin.errors import UserError

RNG = np.random.default_rng(0)
SHARES = np.array([0.6, 0.25, 0.1, 0.04, 0.01])


def draw(count: int) -> np.ndarray:
    return RNG.choice(len(SHARES), count, p=SHARES).astype(np.int32)


def test_the_entropy_is_the_formula():
    symbols = draw(999)
    counts = Counter(symbols.tolist())
    by_hand = -sum(n * math.log2(n / 999) for n in counts.values())
    assert entropy.entropy(symbols) == pytest.approx(by_hand, rel=1e-12)
    assert by_hand == pytest.approx(999 * scipy.stats.entropy(list(counts.values()), base=2))
    assert entropy.entropy([7, 7, 7]) == 0


def test_groups_decode_to_the_same_symbols_whatever_their_models():
    parts = [
        (draw(500), entropy.table(SHARES)),
        (np.empty(0, np.int32), entropy.table([1, 1])),
        (RNG.integers(0, 1000, (4, 5), np.int32), entropy.uniform(1000)),
        (np.round(RNG.laplace(0, 3, 300)).astype(np.int32), entropy.laplace(60, 3.0)),
        (np.full(40, 2, np.int32), entropy.table([0.5, 0.5, 0.0])),  # one that the table had ruled out
    ]
    coded = entropy.encode(parts)
    back = entropy.decode(coded, [(symbols.size, model) for symbols, model in parts])
    for (symbols, _), found in zip(parts, back, strict=True):
        assert found.tolist() == symbols.ravel().tolist()


@pytest.mark.parametrize("count", range(60))
def test_short_streams_decode_though_zeros_at_their_end_are_not_sent(count):
    symbols = draw(count)
    coded = entropy.encode([(symbols, entropy.table(SHARES))])
    assert entropy.decode(coded, [(count, entropy.table(SHARES))])[0].tolist() == symbols.tolist()


def test_the_bytes_cost_the_cross_entropy():
    symbols = draw(20_000)
    bits = -np.log2(SHARES[symbols]).sum()
    assert 8 * len(entropy.encode([(symbols, entropy.table(SHARES))])) == pytest.approx(bits, abs=64)
    assert entropy.entropy(symbols) <= bits


def test_without_the_package_one_line_says_how_to_install_it(monkeypatch):
    def missing(name: str) -> None:
        raise ImportError(f"no {name}")

    entropy.load.cache_clear()
    monkeypatch.setattr(importlib, "import_module", missing)
    with pytest.raises(UserError, match=r"pip install 'vidtwin\[rates\]'"):
        entropy.load()
