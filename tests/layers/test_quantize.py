"""Quantizers against brute force over every entry of small codebooks."""

import itertools
import math

import pytest
import torch

from vidtwin.errors import UserError
from vidtwin.layers.quantize import LookupFreeQuantizer, VectorQuantizer


@pytest.fixture
def vectors():
    return torch.randn(3, 4, 5, 6, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def corners(bits):
    """Every code's corner, by the code: bit i is number i."""
    rows = [[1.0 if code >> i & 1 else -1.0 for i in range(bits)] for code in range(2**bits)]
    return torch.tensor(rows, dtype=torch.float64)


def probabilities(z, temperature):
    """p(c | z) over all corners, by the softmax as it is defined: (N, 2^K)."""
    return torch.softmax(2 * z @ corners(z.shape[1]).T / temperature, 1)


def entropy(p):
    return -torch.special.xlogy(p, p).sum(-1)


def test_each_vector_gets_the_nearest_entry(vectors):
    quantizer = VectorQuantizer(7, 6).double()
    torch.nn.init.normal_(quantizer.embedding.weight)
    value, codes, terms = quantizer(vectors)
    for index in itertools.product(*map(range, codes.shape)):
        distances = [math.dist(vectors[index].tolist(), entry) for entry in quantizer.embedding.weight.tolist()]
        assert codes[index] == distances.index(min(distances))
    torch.testing.assert_close(value, quantizer.embedding.weight[codes])
    squared = (vectors - value).square().mean()
    torch.testing.assert_close([terms["commitment"], terms["codebook"]], [squared, squared])
    torch.testing.assert_close(quantizer.lookup(codes), value)


def test_distances_are_exact_in_bf16_autocast():
    quantizer = VectorQuantizer(16, 1)
    quantizer.embedding.weight.data = 1 + torch.arange(16.0)[:, None] / 512  # four to a number of bf16
    with torch.autocast("cpu", torch.bfloat16):
        assert quantizer(quantizer.embedding.weight.detach()).codes.tolist() == list(range(16))


def test_commitment_moves_the_vectors_codebook_the_entries_and_the_value_passes_straight_through(vectors):
    quantizer = VectorQuantizer(7, 6).double()
    z = vectors.requires_grad_()
    weight = quantizer.embedding.weight
    value, codes, terms = quantizer(z)
    grad = lambda y: torch.autograd.grad(y, [z, weight], retain_graph=True, allow_unused=True)  # noqa: E731
    moved, entries = grad(terms["commitment"])
    torch.testing.assert_close(moved, 2 * (z - weight[codes]).detach() / z.numel())
    assert entries is None
    moved, entries = grad(terms["codebook"])
    assert moved is None
    wanted = torch.zeros_like(weight).index_add_(0, codes.flatten(), (weight[codes] - z).detach().flatten(0, -2))
    torch.testing.assert_close(entries, 2 * wanted / z.numel())
    moved, entries = grad((value * torch.arange(6)).sum())
    torch.testing.assert_close(moved, torch.arange(6.0, dtype=torch.float64).expand_as(z))
    assert entries is None


def test_entries_start_within_one_over_the_codebooks_size():
    weight = VectorQuantizer(50, 64).embedding.weight.detach()
    assert weight.abs().max() <= 1 / 50
    assert weight.std() == pytest.approx(1 / 50 / math.sqrt(3), rel=0.05)


def test_codes_are_the_signs_as_a_number_and_give_them_back():
    quantizer = LookupFreeQuantizer(3)
    value, codes, _ = quantizer(torch.tensor([[0.2, -3.0, 1.0], [-1.0, 0.0, -0.1]]))
    assert codes.tolist() == [5, 0]
    assert value.tolist() == [[1, -1, 1], [-1, -1, -1]]  # 0 counts as negative
    every = torch.arange(8)
    assert torch.equal(quantizer.lookup(every).double(), corners(3))
    assert torch.equal(quantizer(quantizer.lookup(every)).codes, every)


@pytest.mark.parametrize("temperature", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("bits", [1, 4, 7])
def test_the_entropies_of_one_group_equal_brute_force_over_every_code(bits, temperature):
    z = 0.5 * torch.randn(40, bits, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    p = probabilities(z, temperature)
    wanted = entropy(p).mean() - entropy(p.mean(0))
    found = LookupFreeQuantizer(bits, temperature)(z.view(2, 20, bits)).terms["entropy"]
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)


def test_in_groups_the_batch_entropy_is_an_upper_bound_and_the_entropy_of_each_vector_stays_exact():
    z = torch.randn(30, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z[:, 3:] = z[:, :3]  # the groups tell the same, so that the bound is far from tight
    p = probabilities(z, 1.0)
    halves = [entropy(probabilities(part, 1.0).mean(0)) for part in z.split(3, 1)]
    found = LookupFreeQuantizer(6, 1.0, group_bits=3)(z).terms["entropy"]
    torch.testing.assert_close(found, entropy(p).mean() - sum(halves), rtol=1e-9, atol=1e-12)
    assert sum(halves) > entropy(p.mean(0)) + 0.1


def test_eighteen_bits_far_from_zero_have_finite_gradients():
    z = torch.tensor([[-30.0] * 18, [30.0] * 18, [0.0] * 18], requires_grad=True)
    _, codes, terms = LookupFreeQuantizer(18)(z)
    sum(terms.values()).backward()
    assert codes.tolist() == [0, 2**18 - 1, 0]
    assert z.grad.isfinite().all()


def test_commitment_and_straight_through_of_signs(vectors):
    z = vectors.requires_grad_()
    value, _, terms = LookupFreeQuantizer(6)(z)
    torch.testing.assert_close(terms["commitment"], (z - z.sign()).square().mean())
    (gradient,) = torch.autograd.grad((value * torch.arange(6)).sum(), z)
    torch.testing.assert_close(gradient, torch.arange(6.0, dtype=torch.float64).expand_as(z))


def test_values_are_those_that_the_codes_give_to_the_last_bit():
    z = 1e3 * torch.randn(50, 6, generator=torch.Generator().manual_seed(4), requires_grad=True)
    for quantizer in (LookupFreeQuantizer(6), VectorQuantizer(8, 6)):
        value, codes, _ = quantizer(z)
        assert torch.equal(value, quantizer.lookup(codes))


def test_nothing_has_to_be_computed_to_count_what_a_quantizer_costs():
    with torch.device("meta"):
        for quantizer in (LookupFreeQuantizer(4), VectorQuantizer(8, 4)):
            assert quantizer(torch.empty(2, 3, 4)).codes.shape == (2, 3)


def test_bf16_vectors_are_quantized_in_single_precision():
    z = torch.randn(5, 4, dtype=torch.bfloat16)
    for quantizer in (LookupFreeQuantizer(4), VectorQuantizer(8, 4)):
        value, codes, _ = quantizer(z)
        assert value.dtype == torch.float32
        assert torch.equal(codes, quantizer(z.float()).codes)


@pytest.mark.parametrize("arguments", [{"bits": 0}, {"bits": 23}, {"bits": 4, "temperature": 0.0}])
def test_invalid_quantizers_are_refused(arguments):
    with pytest.raises(UserError, match="Expected"):
        LookupFreeQuantizer(**arguments)
