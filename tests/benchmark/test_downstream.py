"""The DiT of the paper's appendix C.2 against arithmetic, einops and the shapes of the registered models."""

import itertools
import json
import math
from pathlib import Path

import einops
import pytest
import torch
from torch import nn

import vidtwin
from vidtwin.benchmark import downstream
from vidtwin.benchmark.downstream import LatentDiT
from vidtwin.benchmark.memory import peak_memory
from vidtwin.cli import model_config
from vidtwin.diffusion.tokens import count_tokens, fold, unfold
from vidtwin.errors import UserError

CONFIGS = Path(vidtwin.__file__).parent / "configs"
VECTOR = {"colour": (3,)}  # one token: a step takes a moment


def on_meta(shapes):
    with torch.device("meta"):
        return LatentDiT(shapes)


def test_the_six_layers_have_18914304_parameters_and_without_attention_the_papers_12610560():
    attention = (512 * 1536 + 1536) + (512 * 512 + 512)
    ffn = (512 * 2048 + 2048) + (2048 * 512 + 512)
    norms = 2 * (512 + 512)
    model = on_meta({"structure": (4, 16, 7, 7), "dynamics": (8, 16, 14)})
    assert model.num_parameters() == 6 * (attention + ffn + norms) == 18_914_304
    assert model.num_parameters("ffn_norm_only") == 6 * (ffn + norms) == 12_610_560


def test_a_counter_that_knows_only_linear_layers_and_norms_finds_the_papers_count():
    # How a profiler that goes by exact types sees the layers: attention's weights are of no type that it knows.
    known = [module for module in on_meta(VECTOR).layers.modules() if type(module) in (nn.Linear, nn.LayerNorm)]
    assert sum(p.numel() for module in known for p in module.parameters()) == 12_610_560


def test_all_other_parameters_are_those_of_the_embeddings():
    model = on_meta({"structure": (4, 16, 7, 7), "dynamics": (8, 16, 14)})
    patches = (4 * 2**3, 8 * 2**2)
    embeddings = sum((size * 512 + 512) + (512 * size + size) for size in patches)
    assert model.num_parameters("embeddings") == embeddings
    assert sum(p.numel() for p in model.parameters()) == 18_914_304 + embeddings


@pytest.mark.parametrize(
    ("config", "tokens"),
    [
        ("vidtwin_base.yaml", {"structure": 8 * 4 * 4, "dynamics": 8 * 7}),  # 184
        ("baselines/magvit2_continuous.yaml", {"latent": 2 * 14 * 14}),  # 392
        ("baselines/magvit2.yaml", {"latent": 3 * 14 * 14}),  # 588: the first frame is a step of its own
        ("baselines/cmd.yaml", {"content": 112 * 112, "motion": 8 * 14}),  # 12,656
        ("baselines/ivideogpt.yaml", {"context": 1 * 8 * 8, "dynamics": 7 * 2 * 2}),  # 92
    ],
)
def test_tokens_of_the_full_size_models(config, tokens):
    with torch.device("meta"):
        model = model_config.build(*model_config.parse([CONFIGS / config]))
    assert count_tokens(model.latent_shapes((3, 16, 224, 224))) == tokens


def test_a_vector_is_one_token_and_an_odd_axis_is_padded():
    assert count_tokens({"a": (3,), "b": (8, 1), "c": (8, 5), "d": (2, 3, 3, 3, 3)}) == {
        "a": 1,
        "b": 1,
        "c": 3,
        "d": 16,
    }


def test_patches_are_those_of_einops_with_zeros_at_the_end_of_odd_axes():
    latent = torch.randn(2, 5, 4, 7, 6)
    padded = torch.cat([latent, torch.zeros(2, 5, 4, 1, 6)], dim=3)
    expected = einops.rearrange(padded, "b c (t x) (h y) (w z) -> b (t h w) (c x y z)", x=2, y=2, z=2)
    assert torch.equal(fold(latent), expected)


@pytest.mark.parametrize("shape", [(3,), (3, 1), (3, 5), (2, 4, 7), (4, 3, 7, 6), (1, 3, 2, 5, 3)])
@pytest.mark.parametrize("patch", [2, 4])
def test_unfold_gives_back_what_fold_has_cut(shape, patch):
    latent = torch.randn(2, *shape)
    patches = fold(latent, patch)
    assert patches.shape == (2, count_tokens({"z": shape}, patch)["z"], shape[0] * patch ** len(shape[1:]))
    assert torch.equal(unfold(patches, shape, patch), latent)


def test_the_output_has_the_latents_shapes_and_each_number_depends_on_each():
    torch.manual_seed(0)
    shapes = {"structure": (2, 3, 2), "a name.with dots": (3,)}
    latents = {name: torch.randn(1, *shape, requires_grad=True) for name, shape in shapes.items()}
    found = LatentDiT(shapes)(latents)
    assert {name: tuple(part.shape[1:]) for name, part in found.items()} == shapes
    for part, latent in itertools.product(found.values(), latents.values()):
        (gradient,) = torch.autograd.grad(part.square().sum(), latent, retain_graph=True)
        assert (gradient != 0).all()


def test_equal_patches_at_two_places_are_distinguished():
    torch.manual_seed(0)
    found = LatentDiT({"z": (1, 4)})({"z": torch.ones(1, 1, 4)})["z"]
    assert not torch.allclose(found[..., :2], found[..., 2:])


@pytest.mark.parametrize("shapes", [{"structure": (4, 16, 7, 7), "dynamics": (8, 16, 14)}, {"z": (5, 4, 28, 28)}])
def test_flops_are_those_of_the_formula_with_attention_once_forward_and_twice_backward(shapes):
    tokens = count_tokens(shapes)
    patch = {name: shape[0] * 2 ** (len(shape) - 1) for name, shape in shapes.items()}
    n = sum(tokens.values())
    embedding = sum(2 * tokens[name] * patch[name] * 512 for name in shapes)
    products = 2 * n * (512 * 1536 + 512 * 512 + 2 * 512 * 2048)
    attention = 2 * 2 * n * n * 512
    forward = embedding + 6 * (products + attention) + embedding
    counts = downstream.flops(on_meta(shapes))
    # Backward twice that, without a gradient with respect to the latents themselves.
    assert counts == {"flops_forward": forward, "flops_training_step": 3 * forward - embedding}


def test_the_loss_is_the_mean_squared_error_over_all_numbers_of_all_latents():
    class Silent(nn.Module):
        def forward(self, latents):
            return {name: torch.zeros_like(latent) for name, latent in latents.items()}

    noise = {"a": torch.randn(1, 2, 3), "b": torch.randn(1, 5)}
    expected = torch.cat([part.flatten() for part in noise.values()]).square().mean()
    torch.testing.assert_close(downstream.compute_loss(Silent(), noise, noise), expected)


def test_a_measurement_has_the_keys_of_results_json_and_changes_no_random_number():
    state = torch.get_rng_state()
    with torch.inference_mode():  # as a sweep may call it
        found = downstream.measure(VECTOR, "cpu", repeats=1)
    assert torch.equal(torch.get_rng_state(), state)
    keys = "tokens tokens_by_latent parameters parameters_ffn_norm_only embedding_parameters flops_forward "
    keys += "flops_training_step seconds_per_step peak_memory_bytes memory_counter device"
    assert list(found) == keys.split()
    assert (found["tokens"], found["tokens_by_latent"]) == (1, {"colour": 1})
    assert (found["parameters"], found["parameters_ffn_norm_only"]) == (18_914_304, 12_610_560)
    spread = found["seconds_per_step"]
    assert list(spread) == ["median", "min", "max"]
    assert 0 < spread["min"] <= spread["median"] <= spread["max"]
    assert json.loads(json.dumps(found)) == found
    # Weights, gradients and both moments; beside them a few temporary tensors, the largest of 2048 x 512 numbers.
    bytes_of_four = 4 * 4 * (found["parameters"] + found["embedding_parameters"])
    assert bytes_of_four < found["peak_memory_bytes"] < bytes_of_four + 3 * 4 * 2048 * 512


def test_memory_has_the_activations_of_all_layers_but_no_scores_of_attention():
    tokens = 600
    model, latents = LatentDiT({"z": (1, 2 * tokens)}), {"z": torch.randn(1, 1, 2 * tokens)}
    held = [list(model.parameters()), list(model.buffers()), latents]
    peak = peak_memory(lambda: downstream.compute_loss(model, latents, latents), torch.device("cpu"), held)
    weights = 4 * sum(p.numel() for p in model.parameters())
    activations = 6 * tokens * 4 * (3 * 512 + 2048 + 2 * 512)  # at least queries, keys, values, FFN and norms
    scores = 6 * 8 * tokens**2 * 4
    assert weights + activations < peak < weights + 1.6 * activations
    assert 0.6 * activations < scores  # with them it would be more


@pytest.mark.parametrize(
    ("shapes", "arguments", "words"),
    [
        ({"z": (3, 224, 224)}, {"max_tokens": 12_543}, "at most 12,543 tokens for a DiT to be timed, got 12,544"),
        (VECTOR, {"warmup": 0}, "warmup of at least 1, got 0"),
        (VECTOR, {"repeats": 0}, "repeats of at least 1, got 0"),
        (VECTOR, {"max_tokens": 0}, "max_tokens of at least 1, got 0"),
        ({}, {}, "at least one latent, got none"),
        ({"z": ()}, {}, r"a latent of shape \(channels, ...\), got z of \(\)"),
        ({"z": (3, 0)}, {}, r"got z of \(3, 0\)"),
    ],
)
def test_wrong_arguments_are_refused(shapes, arguments, words):
    with pytest.raises(UserError, match=words):
        downstream.measure(shapes, "cpu", **arguments)


def test_an_unknown_count_is_refused():
    with pytest.raises(UserError, match="one of layers, ffn_norm_only, embeddings, got 'all'"):
        on_meta(VECTOR).num_parameters("all")


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_cuda_the_peak_holds_weights_gradients_and_moments():
    found = downstream.measure({"structure": (4, 16, 7, 7), "dynamics": (8, 16, 14)}, "cuda")
    assert found["memory_counter"] == "CUDA allocator"
    assert found["peak_memory_bytes"] > 4 * 4 * (found["parameters"] + found["embedding_parameters"])
    assert math.isfinite(found["seconds_per_step"]["median"])
