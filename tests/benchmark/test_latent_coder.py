"""Coded latents: the same symbols back, errors below half a step, bytes near the entropy."""

import itertools
import math

import numpy as np
import pytest
import scipy.stats

from vidtwin.benchmark.latent_coder import Channels, ClipCoder, Codes, fit, mix

RNG = np.random.default_rng(0)
BITS = (1, 2, 3, 4, 6, 8)


def latents(count: int = 400) -> dict[str, np.ndarray]:
    """Two latents of channels with scales of their own, one channel constant."""
    wide = RNG.normal([[0.0], [5.0], [-1.0]], [[1.0], [0.1], [0.0]], (3, count))
    return {"0/structure": wide, "0/dynamics": RNG.laplace(0, 2, (2, count))}


def fitted() -> dict[str, Channels | Codes]:
    return fit({name: [clip[name] for clip in (latents(), latents(800))] for name in latents()}, {})


@pytest.mark.parametrize("tables", ["val", "clip"])
@pytest.mark.parametrize("bits", BITS)
def test_a_clip_decodes_from_its_bytes_to_the_same_symbols_and_to_values_near_by(tables, bits):
    known = fitted() if tables == "val" else {}
    clip = latents()
    coder = ClipCoder(known, bits)
    coded = coder.encode(clip)
    symbols, values = ClipCoder(known, bits).decode(coded.content, {name: x.shape for name, x in clip.items()})
    for name, latent in clip.items():
        assert (symbols[name] == coded.symbols[name]).all()
        assert symbols[name].min() >= 0
        assert symbols[name].max() < 2**bits * (2 if known else 1)  # of other clips: half as many beyond each end
        channels = known[name] if known else Channels.unpack(Channels.fit(latent, keep=False).pack())
        step = (channels.high - channels.low)[:, None] / (2**bits - 1)
        # A clip's own range is rounded to half precision.
        assert (np.abs(values[name] - latent) <= step / 2 + (1e-9 if known else 1e-2)).all()


def test_more_bits_mean_less_error_and_more_bytes():
    clip, known = latents(), fitted()
    sizes, errors = [], []
    for bits in BITS:
        coded = ClipCoder(known, bits).encode(clip)
        _, values = ClipCoder(known, bits).decode(coded.content, {name: x.shape for name, x in clip.items()})
        sizes.append(len(coded.content))
        errors.append(sum(((values[name] - x) ** 2).sum() for name, x in clip.items()))
    assert all(a < b for a, b in itertools.pairwise(sizes))
    assert all(a > b for a, b in itertools.pairwise(errors))


def test_the_bytes_are_close_to_the_entropy_by_scipy_and_the_head_is_counted():
    clip = latents(20_000)
    coded = ClipCoder(fit({name: [x] for name, x in clip.items()}, {}), 4).encode(clip)
    by_scipy = sum(
        len(row) * scipy.stats.entropy(np.unique(row, return_counts=True)[1], base=2)
        for symbols in coded.symbols.values()
        for row in symbols
    )
    assert coded.entropy == pytest.approx(by_scipy)
    assert by_scipy < 8 * len(coded.content) < 1.01 * by_scipy + 64
    sent = ClipCoder({}, 4).encode(clip)
    assert sent.content[: 6 * 3] == Channels.fit(clip["0/structure"], keep=False).pack()
    assert len(sent.content) > len(coded.content) + 6 * 5


def test_the_tables_of_a_sent_normal_distribution_are_its_probabilities():
    channels = Channels(*(np.array([x]) for x in (-2.0, 2.0, 0.5, 0.8)))
    levels = np.linspace(-2, 2, 8)
    edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
    assert channels.tables(3)[0] == pytest.approx(np.diff(scipy.stats.norm.cdf(edges, 0.5, 0.8)), abs=1e-12)


def test_a_histogram_is_mixed_with_what_it_has_not_seen_by_the_share_of_singletons():
    counts, prior = np.array([6, 1, 1, 0]), np.array([0.1, 0.2, 0.3, 0.4])
    expected = 0.75 * counts / 8 + 0.25 * prior
    assert mix(counts, prior) == pytest.approx(expected)
    assert mix(counts, prior).sum() == pytest.approx(1)
    assert mix(np.zeros(4, np.int64), prior) == pytest.approx(prior)


def test_codes_decode_and_frequent_ones_cost_less():
    codes = RNG.choice(16, 3000, p=np.array([0.55, *[0.03] * 15])).astype(np.int32)
    shapes = {"grid": codes.shape}
    coders = [ClipCoder(fit({}, {"grid": (16, [codes])}), 0), ClipCoder({"grid": Codes(16)}, 0)]
    sizes = []
    for coder in coders:
        coded = coder.encode({"grid": codes})
        symbols, values = coder.decode(coded.content, shapes)
        assert (symbols["grid"] == codes).all()
        assert (values["grid"] == codes).all()
        sizes.append(len(coded.content))
    assert sizes[1] == pytest.approx(3000 * math.log2(16) / 8, abs=4)
    assert sizes[0] == pytest.approx(ClipCoder({"grid": Codes(16)}, 0).encode({"grid": codes}).entropy / 8, rel=0.01)
