"""Statistics of latents, streamed in batches, against NumPy over all clips at once."""

import copy

import numpy as np
import pytest
import torch
from torch.distributions import Normal, kl_divergence

from vidtwin.errors import UserError
from vidtwin.metrics import LatentStatistics
from vidtwin.metrics.latents import codebook_use
from vidtwin.posteriors import Deterministic, DiagonalGaussian, Encoding, Quantized


def moments(clips=11, shape=(3, 4, 5)):
    """Means of which some vary by about 0.01 over the clips, far from 0; channel 0 is the same in all of them."""
    generator = torch.Generator().manual_seed(0)
    mean, logvar = torch.randn(2, clips, *shape, generator=generator)
    spread = torch.linspace(0.02, 0.3, mean[0].numel()).view(shape)
    mean = 5.0 + spread * mean
    mean[:, 0] = 7.0
    return mean, logvar


def streamed(posteriors):
    statistics = LatentStatistics()
    for posterior in posteriors:
        statistics.update(Encoding(latent=posterior))
    return statistics


def gaussians(sizes, mean, logvar):
    return [DiagonalGaussian(*part) for part in zip(mean.split(sizes), logvar.split(sizes), strict=True)]


@pytest.mark.parametrize("sizes", [[11], [4, 4, 3], [1] * 11])
@pytest.mark.parametrize("shape", [(3, 4, 5), (3,), (3, 2, 2, 2)])
def test_kl_and_active_units_do_not_depend_on_the_batches(sizes, shape):
    mean, logvar = moments(shape=shape)
    found = streamed(gaussians(sizes, mean, logvar)).compute()["latent"]
    kl = kl_divergence(Normal(mean.double(), (0.5 * logvar.double()).exp()), Normal(0.0, 1.0)).numpy()
    by_channel = kl.reshape(11, 3, -1).sum(2).mean(0)
    np.testing.assert_allclose(found["kl"].numpy(), by_channel, rtol=1e-5)
    active = (np.var(mean.double().numpy(), axis=0) > 0.01).reshape(3, -1)
    assert found["active_units"].tolist() == active.sum(1).tolist()
    assert found["units"] == active.shape[1]
    if len(shape) > 1:
        assert 0 < active[1:].sum() < active[1:].size


def test_a_channel_that_is_the_same_for_all_clips_has_no_active_unit():
    assert streamed(gaussians([4, 7], *moments())).compute()["latent"]["active_units"][0] == 0


def test_a_unit_is_active_above_a_variance_of_a_hundredth():
    values = torch.tensor([[0.0995, 0.1005]] * 3 + [[-0.0995, -0.1005]] * 3) + 100
    assert streamed([Deterministic(values)]).compute()["latent"]["active_units"].tolist() == [0, 1]


def test_without_noise_there_are_active_units_alone():
    mean, _ = moments()
    found = streamed([Deterministic(mean[:4]), Deterministic(mean[4:])]).compute()["latent"]
    assert set(found) == {"active_units", "units"}
    assert torch.equal(found["active_units"], streamed(gaussians([11], *moments())).compute()["latent"]["active_units"])


def test_a_latent_that_is_not_a_number_does_not_pass_for_an_inactive_one():
    mean, logvar = moments()
    mean[3, 1, 0, 0] = torch.nan
    found = streamed(gaussians([4, 7], mean, logvar)).compute()["latent"]
    assert found["kl"].isnan().tolist() == found["active_units"].isnan().tolist() == [False, True, False]


def test_statistics_of_half_precision_are_summed_in_double():
    mean, logvar = (moment.bfloat16() for moment in moments(clips=500))
    found = streamed(gaussians([7] * 71 + [3], mean, logvar)).compute()["latent"]
    active = (np.var(mean.double().numpy(), axis=0) > 0.01).reshape(3, -1).sum(1)
    assert found["active_units"].tolist() == active.tolist()


def quantized(codes, codebook_size):
    return Quantized(torch.zeros(len(codes), 2), codes, codebook_size)


def test_dead_codes_are_visible():
    codes = torch.randint(0, 5, (12, 3, 4), generator=torch.Generator().manual_seed(0)) * 3  # 0, 3, 6, 9, 12 of 16
    found = streamed([quantized(part, 16) for part in codes.split(5)]).compute()["latent"]
    values, counts = np.unique(codes.numpy(), return_counts=True)
    shares = counts / counts.sum()
    assert set(found) == {"codebook_usage", "dead_codes", "codebook_size", "perplexity"}
    assert (int(found["dead_codes"]), int(found["codebook_size"])) == (11, 16)
    assert found["codebook_usage"] == len(values) / 16 == 5 / 16
    assert float(found["perplexity"]) == pytest.approx(np.exp(-(shares * np.log(shares)).sum()))


@pytest.mark.parametrize("used", [1, 2, 8])
def test_the_perplexity_of_codes_that_are_equally_frequent_is_their_number(used):
    found = streamed([quantized(torch.arange(used).repeat(6, 1), 8)]).compute()["latent"]
    assert float(found["perplexity"]) == pytest.approx(used)
    assert float(found["codebook_usage"]) == used / 8


def test_two_ranks_merged_are_one_that_saw_all_clips():
    mean, logvar = moments()
    codes = torch.randint(0, 9, (11, 4))
    encodings = [
        Encoding(gaussian=gaussian, codes=quantized(code, 9))
        for gaussian, code in zip(gaussians([4, 4, 3], mean, logvar), codes.split([4, 4, 3]), strict=True)
    ]
    one, first, second, without = (LatentStatistics() for _ in range(4))
    for encoding in encodings:
        one.update(encoding)
    first.update(encodings[0])
    second.update(encodings[1])
    second.update(encodings[2])
    before = copy.deepcopy(second.sums)
    merged = LatentStatistics()
    for rank in (without, first, second):  # one of them has seen no clip
        merged.merge(rank)
    torch.testing.assert_close(merged.compute(), one.compute(), rtol=1e-12, atol=0)
    torch.testing.assert_close(second.sums, before, rtol=0, atol=0)
    assert without.compute() == {}


def test_latents_that_change_their_size_are_refused():
    mean, _ = moments()
    with pytest.raises(UserError, match=r"Expected latent to be of one kind and size in all clips, got .*\(3, 20\)"):
        streamed([Deterministic(mean), Deterministic(mean[:, :, :2])])


def test_the_use_of_one_batchs_codes_is_that_of_its_statistics():
    codes = torch.randint(12, (3, 4, 5), generator=torch.Generator().manual_seed(3))
    encoding = Encoding(quantized=Quantized(codes.float(), codes, 16), other=gaussians([2], *moments(2))[0])
    statistics = LatentStatistics()
    statistics.update(encoding)
    wanted = statistics.compute()["quantized"]
    found = codebook_use(encoding)
    assert set(found) == {"codebook_usage/quantized", "perplexity/quantized"}
    assert float(found["codebook_usage/quantized"]) == float(wanted["codebook_usage"])
    assert float(found["perplexity/quantized"]) == pytest.approx(float(wanted["perplexity"]), rel=1e-5)
