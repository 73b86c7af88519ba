"""The transformer and the model around it: what a class can reach, guidance, scale, noise."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from vidtwin.diffusion.model import LatentDiffusion, build, draw_noise
from vidtwin.diffusion.process import DDPM, RectifiedFlow
from vidtwin.diffusion.tokens import flatten, grid_positions, split
from vidtwin.diffusion.transformer import DiT, TransformerSizes
from vidtwin.errors import UserError

SHAPES = {"structure": (2, 3, 2, 2), "dynamics": (3, 5), "a name.with dots": (3,)}
NUMBERS = 24 + 15 + 3
TINY = TransformerSizes(depth=2, width=16, heads=2, class_width=8)


@pytest.fixture
def model() -> LatentDiffusion:
    """With random weights everywhere: a new one gives 0, whatever it sees."""
    torch.manual_seed(0)
    made = LatentDiffusion(SHAPES, 3, DDPM(), TINY)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made


def test_the_papers_transformer_has_18_layers_of_width_1152_and_a_class_vector_of_256():
    with torch.device("meta"):
        dit = DiT({"structure": (4, 16, 7, 7), "dynamics": (8, 16, 14)}, 101)
    assert len(dit.blocks) == 18
    assert dit.blocks[0].attention.qkv.in_features == 1152
    assert dit.classes.weight.shape == (102, 256)
    assert dit.positions.shape == (184, 1152)


def test_the_output_has_the_latents_shapes_and_each_number_depends_on_each(model):
    state = torch.randn(1, NUMBERS, requires_grad=True)
    found = model.transformer(split(state, SHAPES), torch.tensor([300.0]), torch.tensor([1]))
    assert {name: tuple(part.shape[1:]) for name, part in found.items()} == SHAPES
    for part in found.values():
        (gradient,) = torch.autograd.grad(part.square().sum(), state, retain_graph=True)
        assert (gradient != 0).all()


def test_larger_patches_are_fewer_tokens_and_their_numbers_reach_one_another():
    sizes = TransformerSizes(depth=1, width=16, heads=2, class_width=8, patch=4)
    dit = DiT(SHAPES, 3, sizes)
    assert list(dit.tokens.counts.values()) == [1, 2, 1]
    assert dit.positions.shape == (4, 16)
    for parameter in dit.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    state = torch.randn(1, NUMBERS, requires_grad=True)
    found = flatten(dit(split(state, SHAPES), torch.tensor([300.0]), torch.tensor([1])), SHAPES)
    (gradient,) = torch.autograd.grad(found.square().sum(), state)
    assert (gradient != 0).all()


def test_the_output_depends_on_time_and_class(model):
    state = torch.randn(2, NUMBERS)
    run = model._run
    times, labels = torch.tensor([100.0, 700.0]), torch.tensor([0, 2])
    first = run(state, times, labels)
    assert not torch.allclose(first, run(state, times.flip(0), labels), atol=1e-4)
    assert not torch.allclose(first, run(state, times, labels.flip(0)), atol=1e-4)


def test_flatten_and_split_are_inverse_and_positions_differ():
    latents = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    flat = flatten(latents, SHAPES)
    assert flat.shape == (2, NUMBERS)
    assert all(torch.equal(part, latents[name]) for name, part in split(flat, SHAPES).items())
    grid = grid_positions({"z": (1, 4, 6, 5)}, 32)
    assert grid.shape == (2 * 3 * 3, 32)
    assert len(grid.unique(dim=0)) == len(grid)


def test_activation_checkpointing_changes_no_gradient():
    gradients = []
    for recomputed in (False, True):
        torch.manual_seed(0)
        made = LatentDiffusion(SHAPES, 3, DDPM(), TransformerSizes(2, 16, 2, 8, activation_checkpointing=recomputed))
        for head in made.transformer.tokens.heads:
            torch.nn.init.ones_(head.weight)
        torch.manual_seed(1)
        made(torch.ones(2, NUMBERS), torch.tensor([0, 1])).mean().backward()
        gradients.append([p.grad for p in made.parameters()])
    for first, second in zip(*gradients, strict=True):
        torch.testing.assert_close(first, second)


def test_a_clip_whose_class_is_dropped_cannot_see_it(model):
    """Rows of the loss that do not change with the labels are those that were dropped: a fifth of them."""
    count = 3000
    state = torch.randn(count, NUMBERS)
    losses = []
    with torch.no_grad():
        for label in (0, 2):
            torch.manual_seed(4)
            losses.append(model(state, torch.full((count,), label), condition_dropout=0.2))
        torch.manual_seed(4)
        free = model(state, torch.full((count,), -1))
    same = losses[0] == losses[1]
    assert float(same.float().mean()) == pytest.approx(0.2, abs=0.03)
    assert torch.equal(losses[0][same], free[same])


def test_with_all_classes_dropped_the_classes_vectors_get_no_gradient(model):
    model(torch.randn(8, NUMBERS), torch.arange(8) % 3, condition_dropout=1.0).mean().backward()
    gradient = model.transformer.classes.weight.grad
    assert torch.equal(gradient[:3], torch.zeros_like(gradient[:3]))
    assert (gradient[3] != 0).any()


@pytest.mark.parametrize("process", [DDPM(), RectifiedFlow("v"), RectifiedFlow("x")], ids=["ddpm", "v", "x"])
def test_guidance_of_1_is_none_and_other_weights_follow_the_formula(model, process):
    model.process = process
    noise, labels = torch.randn(2, NUMBERS), torch.tensor([0, 2])
    nothing = torch.full_like(labels, 3)
    run, calls = model._run, []

    def counted(state, times, given):
        calls.append(len(state))
        return run(state, times, given)

    model._run = counted

    def plain(weight: float) -> torch.Tensor:
        def network(state, times):
            conditional, free = run(state, times, labels), run(state, times, nothing)
            return free + weight * (conditional - free)

        with torch.no_grad():
            return process.sample(network, noise, 4)

    unguided = model.process.sample(lambda state, times: run(state, times, labels).detach(), noise, 4)
    found = flatten(model.sample(labels, noise, guidance=1.0, steps=4), SHAPES)
    assert torch.equal(found, unguided)
    assert calls == [2] * 4  # the network without the class does not run
    for weight in (0.0, 1.5, 5.0):
        found = flatten(model.sample(labels, noise, guidance=weight, steps=4), SHAPES)
        torch.testing.assert_close(found, plain(weight), rtol=1e-3, atol=1e-4)


def test_a_model_without_classes_runs_once_a_step():
    model = LatentDiffusion(SHAPES, 0, RectifiedFlow(), TINY)
    assert model(torch.randn(2, NUMBERS), torch.tensor([0, 7])).isfinite().all()  # labels do not count
    found = model.sample(torch.tensor([-1]), torch.randn(1, NUMBERS), guidance=5.0, steps=2)
    assert {name: tuple(part.shape[1:]) for name, part in found.items()} == SHAPES


def test_each_channel_is_scaled_and_a_constant_one_is_only_shifted(model):
    scale = {
        "structure": (torch.tensor([1.0, 2.0]), torch.tensor([0.5, 0.0])),
        "dynamics": (torch.tensor([0.0, 1.0, 300.0]), torch.tensor([1.0, 1.0, 1e-4])),  # rounding errors
        "a name.with dots": (torch.zeros(3), torch.full((3,), 4.0)),
    }
    model.set_scale(scale)
    latents = {name: torch.randn(2, *shape) for name, shape in SHAPES.items()}
    state = model.normalize(latents)
    expected = (latents["structure"][:, 0] - 1) / 0.5
    torch.testing.assert_close(split(state, SHAPES)["structure"][:, 0], expected)
    torch.testing.assert_close(split(state, SHAPES)["structure"][:, 1], latents["structure"][:, 1] - 2)
    torch.testing.assert_close(split(state, SHAPES)["dynamics"][:, 2], latents["dynamics"][:, 2] - 300)
    for name, part in model.denormalize(state).items():
        torch.testing.assert_close(part, latents[name], atol=1e-4, rtol=1e-5)
    with pytest.raises(UserError, match="statistics of 3 channels of dynamics, got"):
        model.set_scale({**scale, "dynamics": (torch.zeros(2), torch.ones(2))})


def test_a_model_is_built_again_from_its_spec(model):
    other = build(model.spec())
    other.load_state_dict(model.state_dict())
    state, labels = torch.randn(1, NUMBERS), torch.tensor([1])
    ours, theirs = (each._run(state, torch.tensor([5.0]), labels) for each in (model, other))
    assert torch.equal(ours, theirs)
    assert other.spec() == model.spec()


def test_a_clips_noise_depends_on_its_seed_alone():
    first, second = draw_noise(5, [(1, 2), (1, 3)]), draw_noise(5, [(7, 7), (1, 3), (1, 2)])
    assert torch.equal(first[0], second[2])
    assert torch.equal(first[1], second[1])
    assert not torch.equal(first[0], first[1])
    many = draw_noise(20_000, [(0, 0)])
    assert float(many.mean()) == pytest.approx(0, abs=0.03)
    assert float(many.std()) == pytest.approx(1, abs=0.03)


@pytest.mark.parametrize("make", [DDPM, RectifiedFlow])
def test_the_loss_stays_on_a_gpu_and_waits_for_no_value(make):
    """Fake tensors of a GPU refuse operands on other devices, and shapes that depend on values."""
    process, given = make(), {"device": "cuda"}
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        with torch.device("cuda"):
            model = LatentDiffusion(SHAPES, 3, process, TINY)
        state, labels = torch.empty(2, NUMBERS, **given), torch.zeros(2, dtype=torch.int64, **given)
        assert model(state, labels, 0.2).device.type == "cuda"


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"depth": 0}, "depth above 0"),
        ({"mlp_ratio": math.inf}, "mlp_ratio above 0, got inf"),
        ({"width": 10, "heads": 4}, "divisible by heads, got 10 and 4"),
    ],
)
def test_wrong_sizes_are_refused(sizes, words):
    with pytest.raises(UserError, match=words):
        TransformerSizes(**sizes)
