"""Rank correlations and PSNR by frame, against scipy and by hand; the ridge regression against its closed form."""

import numpy as np
import pytest
from scipy import stats

from vidtwin.benchmark import failures, leakage, statistics


def test_ranks_are_those_of_the_repeated_sample():
    random = np.random.default_rng(0)
    values = random.integers(0, 5, 20).astype(float)  # with ties
    weights = random.integers(0, 4, (6, 20)).astype(float)
    for drawn, found in zip(weights.astype(int), failures.rank_weighted(values, weights), strict=True):
        held = np.repeat(np.arange(20), drawn)
        assert found[held] == pytest.approx(stats.rankdata(values[held]))


def test_the_correlation_is_scipys_spearman_and_its_interval_is_that_of_drawn_sources():
    random = np.random.default_rng(1)
    sources = [f"v_A_g{place // 2:02d}" for place in range(40)]
    first = random.integers(0, 9, 40).astype(float)
    second = first + random.normal(0, 3, 40)
    found = failures.correlate_ranks(first, second, sources)
    assert found["rho"] == pytest.approx(stats.spearmanr(first, second).statistic)
    drawn = []
    for _ in range(400):
        held = np.concatenate([[2 * place, 2 * place + 1] for place in random.integers(20, size=20)])
        drawn.append(stats.spearmanr(first[held], second[held]).statistic)
    assert (found["low"], found["high"]) == pytest.approx(tuple(np.quantile(drawn, [0.025, 0.975])), abs=0.06)
    assert failures.correlate_ranks(first, -first, sources)["rho"] == pytest.approx(-1)


def test_numbers_that_are_all_alike_have_no_correlation():
    sources = ["a", "b", "c", "d"]
    nothing = {"rho": None, "low": None, "high": None}
    assert failures.correlate_ranks(np.zeros(4), np.arange(4.0), sources) == nothing
    assert failures.correlate_ranks(np.arange(2.0), np.arange(2.0), sources[:2]) == nothing
    one = failures.correlate_ranks(np.arange(4.0), np.arange(4.0), ["a"] * 4)
    assert one == {"rho": pytest.approx(1), "low": None, "high": None}


def test_frames_beside_a_seam_are_compared_with_the_others():
    psnr = [[30.0, 30.0, 28.0, 27.0, 30.0, 30.0], [20.0, 20.0, 18.0, 17.0, 20.0, 20.0]]
    clips = [{"name": f"{place}.avi", "frame_psnr": values} for place, values in enumerate(psnr)]
    found = failures.describe_frames({"clips": clips, "seams": [3]})
    assert found["mean"] == [25, 25, 23, 22, 25, 25]
    assert (found["low"][0], found["high"][0]) == (20, 30)  # of two sources
    assert found["seam"] == {"mean": -2.5, "low": -2.5, "high": -2.5}  # the same in both, however far they are apart
    assert failures.describe_frames({"clips": clips, "seams": []})["seam"] is None


# --- leakage ---


def test_ridge_is_that_of_sklearn_and_of_the_normal_equations():
    inputs = (np.arange(24).reshape(8, 3) * 7 % 11).astype(float)
    targets = (np.arange(16).reshape(8, 2) * 5 % 13).astype(float)
    seen, held = inputs[:6] - inputs[:6].mean(0), inputs[6:] - inputs[:6].mean(0)
    wanted = targets[:6] - targets[:6].mean(0)
    scale = np.trace(seen @ seen.T) / 6
    (found,) = leakage.predict(seen, wanted, held, [2.0 / scale])
    weights = np.linalg.solve(seen.T @ seen + 2.0 * np.eye(3), seen.T @ wanted)
    assert found == pytest.approx(held @ weights)
    # scikit-learn 1.9.1: Ridge(alpha=2.0).fit(inputs[:6], targets[:6]).predict(inputs[6:])
    of_sklearn = [[5.333234393900225, 6.937840503250642], [4.905828809247966, 8.578125448817994]]
    assert found + targets[:6].mean(0) == pytest.approx(np.array(of_sklearn))


def latents(clips: int = 120, each: int = 4) -> tuple[np.ndarray, list[str]]:
    values = np.random.default_rng(2).normal(size=(clips, 12))
    return values, [f"v_A_g{place // each:02d}" for place in range(clips)]


def test_what_is_copied_is_predicted_and_what_is_independent_is_not():
    values, sources = latents()
    noise = np.random.default_rng(3).normal(size=(120, 6))
    copied = values @ np.random.default_rng(4).normal(size=(12, 6)) * 50 + 7
    assert leakage.probe(values, copied, sources)["r2"] > 0.999
    assert abs(leakage.probe(values, noise, sources)["r2"]) < 0.1
    half = copied / copied.std(0) + noise / noise.std(0)
    assert leakage.probe(values, half, sources)["r2"] == pytest.approx(0.5, abs=0.12)
    assert leakage.probe(values, copied, sources) == leakage.probe(values, copied, sources)


def test_clips_of_one_source_do_not_answer_for_each_other():
    # Both latents name the source and nothing else: between clips it would be known, between sources it is not.
    random = np.random.default_rng(5)
    _, sources = latents()
    one, other = (random.normal(size=(30, 40)).repeat(4, 0) for _ in range(2))
    assert leakage.probe(one, other, sources)["r2"] < 0.05
    by_clips = leakage.probe(one, other, [f"{place}" for place in range(120)])["r2"]
    assert by_clips > 0.8


def test_five_sources_choose_a_penalty_that_holds_between_them():
    # Of noise the best prediction is none: the largest penalty, not the smallest.
    random = np.random.default_rng(6)
    sources = [f"{place // 20}" for place in range(100)]
    r2 = leakage.probe(random.normal(size=(100, 60)), random.normal(size=(100, 3)), sources)["r2"]
    assert -0.3 < r2 < 0.1


def test_few_sources_and_latents_that_do_not_vary_have_no_score():
    values, sources = latents()
    assert leakage.probe(values[:8], values[:8], sources[:8])["r2"] is None
    assert leakage.probe(values, np.ones((120, 3)), sources)["r2"] is None
    assert leakage.probe(np.ones((120, 3)), values, sources)["r2"] == pytest.approx(0, abs=0.05)


def test_more_clips_than_the_regression_takes_are_chosen_evenly(monkeypatch):
    values, sources = latents()
    monkeypatch.setattr(leakage, "MAX_CLIPS", 60)
    assert leakage.probe(values, values, sources) == {"r2": pytest.approx(1, abs=1e-3), "sources": 30, "clips": 60}
    assert statistics.FEW_SOURCES > leakage.FOLDS
