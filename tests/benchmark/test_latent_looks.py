"""Spectra of made-up latents and the probe of a class that is, or is not, in them."""

import numpy as np
import pytest

from vidtwin.benchmark import latent_looks


def wave(frequency: float, size: int = 16) -> np.ndarray:
    """A cosine of the DCT's own kind along one axis, (1, 2, size, size)."""
    line = np.cos(np.pi * frequency * (np.arange(size) + 0.5) / size)
    return np.broadcast_to(line[None, None, None], (1, 2, size, size)).copy()


def test_a_slow_wave_is_low_and_a_fast_one_is_not():
    assert latent_looks.share_low_frequencies(wave(3)) == pytest.approx([1])
    assert latent_looks.share_low_frequencies(wave(4)) == pytest.approx([0])
    assert latent_looks.share_low_frequencies(wave(3) + wave(9) + 100) == pytest.approx([0.5])  # no constant
    assert np.isnan(latent_looks.share_low_frequencies(np.ones((2, 3)))).all()
    assert np.isnan(latent_looks.share_low_frequencies(np.ones((2, 3, 4)))).all()


@pytest.mark.parametrize("shape", [(3, 16, 14), (8, 5, 7, 7), (4, 9)])
def test_white_noise_has_the_share_that_is_stated(shape):
    noise = np.random.default_rng(0).normal(size=(400, *shape))
    expected = latent_looks.share_of_noise(shape)
    assert latent_looks.share_low_frequencies(noise).mean() == pytest.approx(expected, rel=0.1)
    assert latent_looks.share_of_noise((7,)) is None


def test_channels_are_described_by_the_eigenvalues_of_their_covariance():
    random = np.random.default_rng(1)
    latent = np.einsum("cd,bdxy->bcxy", random.normal(size=(5, 5)), random.normal(size=(30, 5, 4, 3))) + 9
    parts = [latent_looks.sum_channels(part) for part in np.split(latent, 3)]
    found = latent_looks.describe_channels(parts)
    values = np.linalg.eigvalsh(np.cov(np.moveaxis(latent, 1, 0).reshape(5, -1), bias=True))[::-1]
    assert found["eigenvalues"] == pytest.approx(values / values.sum())
    assert 1 < found["effective"] < 5


def test_effective_channels_count_directions():
    random = np.random.default_rng(2)
    one = random.normal(size=(500, 1, 6)) * np.array([1.0, -2.0, 3.0])[:, None]
    assert latent_looks.describe_channels([latent_looks.sum_channels(one)])["effective"] == pytest.approx(1, abs=1e-6)
    alike = random.normal(size=(5000, 4, 6))
    found = latent_looks.describe_channels([latent_looks.sum_channels(alike)])
    assert found["effective"] == pytest.approx(4, abs=0.01)
    still = latent_looks.describe_channels([latent_looks.sum_channels(np.zeros((4, 3, 2)))])
    assert still == {"eigenvalues": None, "effective": None}
    assert latent_looks.sum_channels(np.zeros((1, latent_looks.MAX_CHANNELS + 1, 1))) is None


def test_the_probe_names_a_class_that_is_in_the_latents_and_no_other():
    random = np.random.default_rng(3)
    labels = [place // 20 for place in range(80)]
    sources = [f"v_{labels[place]}_g{place // 4:02d}" for place in range(80)]
    noise = random.normal(size=(80, 30))
    found = latent_looks.probe_classes(
        noise + 3 * np.eye(4).repeat(20, 0) @ random.normal(size=(4, 30)), labels, sources
    )
    assert found["accuracy"] > 0.95
    assert (found["chance"], found["classes"], found["clips"]) == (0.25, 4, 80)
    assert latent_looks.probe_classes(noise, labels, sources)["accuracy"] < 0.5


def test_the_probe_does_not_know_a_class_by_its_source():
    # Latents name the source alone: a neighbour in the same source would give the class away.
    random = np.random.default_rng(4)
    labels = [place // 20 for place in range(80)]
    named = random.normal(size=(20, 30)).repeat(4, 0)
    by_source = latent_looks.probe_classes(named, labels, [f"{place // 4}" for place in range(80)])
    assert by_source["accuracy"] < 0.5
    assert latent_looks.probe_classes(named, labels, [f"{place}" for place in range(80)])["accuracy"] > 0.9


def test_classes_of_one_source_are_left_out():
    random = np.random.default_rng(6)
    labels = [place // 20 for place in range(80)] + [4] * 20
    sources = [f"{place // 4}" for place in range(80)] + ["alone"] * 20
    units = random.normal(size=(100, 30)) + 3 * random.normal(size=(5, 30)).repeat(20, 0)
    assert latent_looks.probe_classes(units, labels, sources) == latent_looks.probe_classes(
        units[:80], labels[:80], sources[:80]
    )
    nothing = {"accuracy": None, "chance": None, "classes": 0, "clips": 0}
    assert latent_looks.probe_classes(units, labels, [f"{label}" for label in labels]) == nothing
    assert latent_looks.probe_classes(units[:20], [2] * 20, sources[:20]) == nothing
    assert latent_looks.probe_classes(units[:8], [0, 1] * 4, ["a", "b"] * 4) == nothing
