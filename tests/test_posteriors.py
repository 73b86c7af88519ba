"""Posteriors against torch.distributions: KL, clamp, bits, and how an encoding adds its terms."""

import math

import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vidtwin.compilation import copy_encoding
from vidtwin.posteriors import Deterministic, DiagonalGaussian, Encoding, Quantized, StandardizedGaussian


def gaussian(batch=3, scale=1.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, batch, 4, 5, 6, generator=generator, dtype=dtype)
    return DiagonalGaussian(mean * scale, logvar * scale)


def reference_kl(posterior):
    """Per clip: summed over the latent's numbers; then the mean over the batch."""
    mean, deviation = posterior.mean.double(), (0.5 * posterior.logvar.double()).exp()
    return kl_divergence(Normal(mean, deviation), Normal(0.0, 1.0)).flatten(1).sum(1).mean()


@pytest.mark.parametrize("batch", [1, 3])
def test_kl_is_summed_per_clip_and_averaged_over_the_batch(batch):
    posterior = gaussian(batch)
    torch.testing.assert_close(posterior.regularization()["kl"].double(), reference_kl(posterior), rtol=1e-5, atol=0)


def test_kl_keeps_double_precision():
    posterior = gaussian(dtype=torch.float64)
    torch.testing.assert_close(posterior.regularization()["kl"], reference_kl(posterior), rtol=1e-13, atol=0)


def test_a_standardized_latent_has_the_kl_and_the_samples_of_its_own():
    own, shift, scale = gaussian(dtype=torch.float64), torch.tensor(0.5), torch.tensor([2.0, 0.5, 1.0, 3.0])
    posterior = StandardizedGaussian(own.mean, own.logvar, shift, scale.view(1, -1, 1, 1))
    torch.testing.assert_close(posterior.regularization()["kl"], reference_kl(own), rtol=1e-13, atol=0)
    samples = []
    for each in (own, posterior):
        torch.manual_seed(0)
        samples.append(each.sample())
    torch.testing.assert_close(samples[1], (samples[0] - 0.5) / scale.view(1, -1, 1, 1).double())


def test_kl_of_half_precision_moments_is_summed_in_single_precision():
    posterior = gaussian(dtype=torch.bfloat16)
    kl = posterior.regularization()["kl"]
    assert kl.dtype == torch.float32
    torch.testing.assert_close(kl.double(), reference_kl(posterior), rtol=1e-5, atol=0)


@pytest.mark.parametrize(("dtype", "kept"), [(torch.bfloat16, torch.float32), (torch.float64, torch.float64)])
def test_kl_of_each_number_is_that_of_torch_distributions(dtype, kept):
    posterior = gaussian(dtype=dtype)
    prior = Normal(torch.zeros((), dtype=torch.float64), 1.0)
    reference = kl_divergence(Normal(posterior.mean.double(), (0.5 * posterior.logvar.double()).exp()), prior)
    assert posterior.kl().dtype == kept
    torch.testing.assert_close(posterior.kl().double(), reference, rtol=1e-5, atol=1e-6)


def test_kl_of_the_prior_itself_is_zero():
    zeros = torch.zeros(2, 7)
    assert DiagonalGaussian(zeros, zeros).regularization()["kl"] == 0


def test_log_variances_are_clamped_to_minus_30_and_20():
    posterior = DiagonalGaussian(torch.zeros(1, 4), torch.tensor([[-31.0, -30.0, 20.0, 1000.0]]))
    assert posterior.logvar.tolist() == [[-30.0, -30.0, 20.0, 20.0]]
    assert posterior.regularization()["kl"].isfinite()
    assert posterior.sample().isfinite().all()


def test_samples_have_the_posteriors_mean_and_deviation_and_the_mode_is_the_mean():
    torch.manual_seed(0)
    mean, deviation = torch.tensor([[-2.0, 0.5]]), torch.tensor([[0.1, 3.0]])
    posterior = DiagonalGaussian(mean.expand(20_000, 2), 2 * deviation.log().expand(20_000, 2))
    samples = posterior.sample()
    torch.testing.assert_close(samples.mean(0), mean[0], rtol=0, atol=0.1)
    torch.testing.assert_close(samples.std(0), deviation[0], rtol=0.03, atol=0)
    assert torch.equal(posterior.mode(), posterior.mean)


def test_gradients_reach_mean_and_log_variance_through_a_sample():
    mean, logvar = torch.zeros(2, 3, requires_grad=True), torch.zeros(2, 3, requires_grad=True)
    DiagonalGaussian(mean, logvar).sample().square().sum().backward()
    for moment in (mean, logvar):
        assert moment.grad is not None
        assert moment.grad.any()


def test_a_deterministic_latent_is_its_own_sample_and_has_no_terms():
    value = torch.randn(2, 3)
    posterior = Deterministic(value)
    assert posterior.sample() is value
    assert posterior.mode() is value
    assert posterior.regularization() == {}


@pytest.mark.parametrize(("codebook_size", "bits"), [(2, 24.0), (1024, 240.0), (3, 24 * math.log2(3))])
def test_bits_are_those_of_one_clips_codes(codebook_size, bits):
    codes = torch.zeros(5, 2, 3, 4, dtype=torch.int64)
    assert Quantized(torch.zeros(5, 8, 2, 3, 4), codes, codebook_size).bits == pytest.approx(bits)


def test_a_quantized_latent_hands_on_the_quantizers_terms():
    terms = {"commitment": torch.tensor(0.5), "entropy": torch.tensor(-1.0)}
    posterior = Quantized(torch.zeros(1, 2), torch.zeros(1, 2, dtype=torch.int64), 4, terms)
    assert posterior.regularization() == terms
    posterior.regularization().clear()
    assert posterior.regularization() == terms


def test_an_encoding_adds_the_terms_of_one_name_and_keeps_the_others():
    first, second = gaussian(), gaussian(scale=0.5)
    codes = Quantized(torch.zeros(3, 2), torch.zeros(3, 2, dtype=torch.int64), 4, {"commitment": torch.tensor(0.5)})
    encoding = Encoding(structure=first, dynamics=second, codes=codes)
    terms = encoding.regularization()
    assert set(terms) == {"kl", "commitment"}
    torch.testing.assert_close(terms["kl"].double(), reference_kl(first) + reference_kl(second), rtol=1e-5, atol=0)
    assert terms["commitment"] == 0.5
    assert list(encoding.mode()) == list(encoding.sample()) == ["structure", "dynamics", "codes"]
    assert encoding.mode()["structure"] is first.mean


def test_a_copy_of_the_first_clips_shares_no_memory_and_leaves_what_is_of_no_clip():
    mean, logvar = torch.randn(2, 3, 4, 5, 6, generator=torch.Generator().manual_seed(0))
    encoding = Encoding(z=StandardizedGaussian(mean, logvar, torch.tensor(0.5), torch.tensor(2.0)))
    encoding["z"].table = torch.arange(5.0)
    kl, mode = encoding["z"].kl()[:2], encoding["z"].mode()[:2].clone()
    copied = copy_encoding(encoding, 2)["z"]
    mean.fill_(torch.nan)
    assert torch.equal(copied.kl(), kl)
    assert torch.equal(copied.mode(), mode)
    assert torch.equal(copied.table, torch.arange(5.0))
