"""Promises of `AutoencoderLoss` to a training."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import yaml
from torch import Tensor, nn

from vidtwin.autoencoder import Reconstruction
from vidtwin.errors import UserError
from vidtwin.losses import Annealed, AutoencoderLoss, PatchDiscriminator2d, PatchDiscriminator3d
from vidtwin.losses.adversarial import adaptive_weight
from vidtwin.losses.autoencoder import LOGVAR_RANGE
from vidtwin.models.vidtwin import VidTwin
from vidtwin.posteriors import DiagonalGaussian, Encoding

LATENTS = Path(__file__).parents[2] / "configs/latents"


def build(**arguments: Any) -> AutoencoderLoss:
    defaults: dict[str, Any] = {
        "perceptual_weight": 0.0,
        "discriminator": PatchDiscriminator2d(channels=4, num_layers=2),
        "adversarial_start": 3,
    }
    return AutoencoderLoss(**defaults | arguments)


@pytest.fixture
def clip() -> Tensor:
    return torch.rand(2, 3, 4, 16, 16, generator=torch.Generator().manual_seed(0)) * 2 - 1


def reconstruct(clip: Tensor, **regularization: Tensor) -> tuple[Reconstruction, nn.Parameter]:
    weight = nn.Parameter(torch.tensor(0.5).expand(3, 1, 1, 1).clone())
    return Reconstruction(clip * weight, {}, regularization), weight


def test_published_weights_at_the_released_size() -> None:
    clip = torch.zeros(1, 3, 2, 224, 224)
    output, weight = reconstruct(clip, kl=torch.tensor(1.0))
    assert build().generator_loss(output, clip, weight, 0)["total"].item() == pytest.approx(6.6433e-9, rel=1e-4)
    # a discriminator without a gradient sends the ratio to its limit
    loss = build(discriminator=nn.Flatten(), adversarial_start=0)
    clip = torch.rand(1, 3, 2, 224, 224)
    loss.discriminator.forward = lambda x: x.mean() * 1e-12
    output, weight = reconstruct(clip)
    terms = loss.generator_loss(output, clip, weight, 0)
    assert terms["adaptive_weight"].item() == pytest.approx(0.05 * 0.066433, rel=1e-4)


@pytest.mark.parametrize(
    ("latents", "per_number"),
    [("setting1", 3.2738e-5), ("setting2", 3.4439e-5), ("setting3", 2.7530e-5), ("released", 5.3571e-5)],
)
def test_published_kl_weight_per_latent_number(latents: str, per_number: float) -> None:
    """What 1 nat in each latent number adds to the loss, next to the mean pixel error of a 224-pixel clip."""
    arguments = yaml.safe_load((LATENTS / f"{latents}.yaml").read_text())["model"]["autoencoder"]["init_args"]
    tiny = {"hidden_size": 16, "depth": 1, "num_heads": 1, "query_size": 8, "qformer_depth": 1, "qformer_heads": 1}
    shapes = VidTwin(**arguments | tiny, structure_width=8).latent_shapes((3, 16, 224, 224))
    # ½ (mean² + exp(logvar) − 1 − logvar) = 1 nat
    one_nat = {name: torch.full((2, *shape), math.sqrt(2.0)) for name, shape in shapes.items()}
    encoding = Encoding({name: DiagonalGaussian(mean, torch.zeros_like(mean)) for name, mean in one_nat.items()})
    clip = torch.zeros(2, 3, 1, 224, 224)
    output, weight = reconstruct(clip, **encoding.regularization())
    assert build().generator_loss(output, clip, weight, 0)["total"].item() == pytest.approx(per_number, rel=2e-5)
    assert sum(math.prod(shape) for shape in shapes.values()) * 6.6433e-9 == pytest.approx(per_number, rel=2e-5)


def test_gan_starts_at_its_batch(clip: Tensor) -> None:
    loss, (output, weight) = build(), reconstruct(clip)
    calls: list[int] = []
    loss.discriminator.register_forward_hook(lambda *_: calls.append(1))
    for step in (0, 2):
        assert not loss.gan_is_on(step)
        assert set(loss.generator_loss(output, clip, weight, step)) == {"total", "pixel", "nll"}
        assert loss.discriminator_loss(output.clip, clip, step) == {}
    assert not calls
    assert loss.gan_is_on(3)
    assert set(loss.generator_loss(output, clip, weight, 3)) == {
        "total",
        "pixel",
        "nll",
        "adversarial",
        "adaptive_weight",
    }
    assert set(loss.discriminator_loss(output.clip, clip, 3)) == {
        "total",
        "logits_real",
        "logits_fake",
        "accuracy",
    }
    assert not build(discriminator=None).gan_is_on(3)
    assert not build(adversarial_weight=0.0).gan_is_on(3)


def test_each_player_trains_alone(clip: Tensor) -> None:
    loss, (output, weight) = build(), reconstruct(clip)
    loss.generator_loss(output, clip, weight, 3)["total"].backward()
    assert weight.grad is not None
    assert all(p.grad is None for p in loss.discriminator.parameters())
    weight.grad = None
    loss.discriminator_loss(reconstruct(clip)[0].clip, clip, 3)["total"].backward()
    assert weight.grad is None
    assert all(p.grad is not None for p in loss.discriminator.parameters())


def test_only_total_carries_a_graph(clip: Tensor) -> None:
    loss = build(learn_logvar=True)
    output, weight = reconstruct(clip, kl=torch.ones((), requires_grad=True))
    for terms in (loss.generator_loss(output, clip, weight, 3), loss.discriminator_loss(output.clip, clip, 3)):
        assert terms["total"].requires_grad
        assert not any(term.requires_grad for name, term in terms.items() if name != "total")


def test_l2_and_constant_gan_weight(clip: Tensor) -> None:
    loss = build(pixel="l2", pixel_weight=2.0, adaptive_weight=False, adversarial="non_saturating")
    output, _ = reconstruct(clip)
    terms = loss.generator_loss(output, clip, None, 3)
    adversarial = F.softplus(-loss.discriminator(output.clip).mean((1, 2, 3))).mean()
    torch.testing.assert_close(terms["total"], 2 * F.mse_loss(output.clip, clip) + 0.05 * adversarial)


def test_validation_has_every_term_but_the_adaptive_weight(clip: Tensor) -> None:
    loss, (output, weight) = build(), reconstruct(clip)
    with torch.no_grad():
        terms = loss.generator_loss(output, clip, weight, 3)
    assert "adversarial" in terms
    assert "adaptive_weight" not in terms
    torch.testing.assert_close(terms["total"], terms["nll"])


def test_a_term_without_a_weight_is_an_error_that_names_it(clip: Tensor) -> None:
    output, weight = reconstruct(clip, commitment=torch.tensor(2.0), entropy=torch.tensor(3.0))
    with pytest.raises(UserError, match=r"'entropy'.*--model\.loss\.regularization_weights\.entropy \(0 ignores"):
        build(regularization_weights={"commitment": 0.25}).generator_loss(output, clip, weight, 0)
    terms = build(regularization_weights={"commitment": 0.25, "entropy": 0.0}).generator_loss(output, clip, weight, 0)
    torch.testing.assert_close(terms["total"].detach(), terms["nll"] + 0.5)
    with pytest.raises(UserError, match="kl_weight"):
        build(regularization_weights={"kl": 1.0})


@pytest.mark.parametrize("trainable", [None, False])
def test_adaptive_weight_needs_a_trainable_last_layer(clip: Tensor, trainable: bool | None) -> None:
    output, weight = reconstruct(clip)
    last_layer = None if trainable is None else weight.detach()
    with pytest.raises(UserError, match="adaptive_weight false"):
        build().generator_loss(output, clip, last_layer, 3)
    with pytest.raises(UserError, match="depend on the last layer"):
        build().generator_loss(output, clip, nn.Parameter(torch.ones(1)), 3)


def test_adaptive_weight_is_the_ratio_of_gradient_norms() -> None:
    w = nn.Parameter(torch.tensor([3.0, 4.0]))
    weight = adaptive_weight(w.square().sum() / 2, 2 * w[0], w, maximum=1e4)
    assert weight.item() == pytest.approx(5.0 / 2.0001)
    assert not weight.requires_grad
    assert adaptive_weight(w.sum(), 0 * w.sum(), w, maximum=7.0).item() == 7.0


def test_adaptive_weight_of_two_ranks_is_that_of_the_whole_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def losses(part: Tensor) -> tuple[Tensor, Tensor, nn.Parameter]:
        w = nn.Parameter(torch.tensor([0.5, -1.0, 2.0]))
        return (part * w - 1).square().mean(), (part * w).sin().mean(), w

    whole = adaptive_weight(*losses(batch), maximum=1e4)
    here, there = batch.chunk(2)
    reference, adversarial, w = losses(there)
    others = torch.stack([torch.autograd.grad(loss, w)[0] for loss in (reference, adversarial)])
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(others))
    torch.testing.assert_close(adaptive_weight(*losses(here), maximum=1e4), whole)


def test_learned_logvar_stays_in_range_and_can_return(clip: Tensor) -> None:
    loss, (output, weight) = build(learn_logvar=True), reconstruct(clip)
    nn.init.constant_(loss.logvar, -50.0)
    terms = loss.generator_loss(output, clip, weight, 0)
    terms["total"].backward()
    assert terms["logvar"].item() == LOGVAR_RANGE[0]
    assert torch.isfinite(terms["total"])
    assert loss.logvar.grad < 0  # descent raises it again
    assert "logvar" not in dict(build().named_parameters())
    assert "logvar" not in build().state_dict()


def test_bfloat16_reconstructions_are_compared_in_float32(clip: Tensor) -> None:
    output, weight = reconstruct(clip)
    output.clip = output.clip.bfloat16()
    assert build().generator_loss(output, clip, weight, 3)["total"].dtype == torch.float32


class Linear(nn.Module):
    """One row of logits per frame (2-D) or clip (3-D), linear in its numbers: what it does can be worked out."""

    def __init__(self, dims: int, numbers: int, logits: int = 1) -> None:
        super().__init__()
        self.dims, self.head = dims, nn.Linear(numbers, logits)

    def forward(self, clip: Tensor) -> Tensor:
        return self.head(clip.transpose(1, 2).flatten(0, 1).flatten(1) if self.dims == 2 else clip.flatten(1))


def test_accuracy_is_the_share_of_logits_on_their_side_of_0(clip: Tensor) -> None:
    loss = build(discriminator=Linear(3, clip[0].numel()), adversarial_start=0)
    logits = {0.0: torch.tensor([2.0, 1.0, 0.1, 0.0]), 1.0: torch.tensor([-1.0, -2.0, 3.0, 0.0])}
    loss.discriminator.forward = lambda x: logits[x.mean().item()][:, None].requires_grad_()
    terms = loss.discriminator_loss(torch.ones_like(clip), torch.zeros_like(clip), 0)
    assert terms["accuracy"].item() == pytest.approx((3 / 4 + 2 / 4) / 2)


# LeCAM


def test_lecam_follows_the_logits_and_pulls_them_to_their_means(clip: Tensor) -> None:
    loss = build(lecam_weight=2.0, lecam_decay=0.75, adversarial_start=0)
    means = {"real": 0.0, "fake": 0.0}
    for step in range(3):
        batch, fake = clip * (step - 1), clip + step
        terms = loss.discriminator_loss(fake, batch, step)
        logits_real, logits_fake = loss.discriminator(batch), loss.discriminator(fake)
        means["real"] += 0.25 * (logits_real.mean().item() - means["real"])
        means["fake"] += 0.25 * (logits_fake.mean().item() - means["fake"])
        assert loss.lecam_means.tolist() == pytest.approx(list(means.values()), abs=1e-6)
        lecam = (logits_real - means["fake"]).clamp(min=0).square().mean()
        lecam = lecam + (means["real"] - logits_fake).clamp(min=0).square().mean()
        torch.testing.assert_close(terms["lecam"], lecam.detach())
        plain = build(discriminator=loss.discriminator, adversarial_start=0).discriminator_loss(fake, batch, step)
        torch.testing.assert_close(terms["total"], plain["total"] + 2 * lecam)
    before = loss.lecam_means.clone()
    expected = torch.autograd.grad(plain["total"] + 2 * lecam, loss.discriminator.main[0].weight)[0]
    terms["total"].backward()
    torch.testing.assert_close(loss.discriminator.main[0].weight.grad, expected)
    # evaluation has the term, and leaves the means as they are
    with torch.no_grad():
        torch.testing.assert_close(loss.discriminator_loss(fake, batch, 3)["lecam"], lecam.detach())
    loss.eval().discriminator_loss(fake, batch, 3)
    torch.testing.assert_close(loss.lecam_means, before, rtol=0, atol=0)


def test_lecam_resumes_from_the_state_dict_and_is_absent_from_it_without_a_weight(clip: Tensor) -> None:
    loss, resumed = (build(lecam_weight=0.1, adversarial_start=0) for _ in range(2))
    loss.discriminator_loss(clip + 1, clip, 0)
    resumed.load_state_dict(loss.state_dict())
    expected, terms = (each.discriminator_loss(clip + 2, clip, 1) for each in (loss, resumed))
    for name in expected:
        torch.testing.assert_close(terms[name], expected[name], rtol=0, atol=0)
    assert resumed.lecam_means.tolist() == loss.lecam_means.tolist()
    assert not [name for name in build().state_dict() if "lecam" in name]
    assert not dict(build().named_buffers())


def test_lecam_of_two_ranks_has_the_means_of_the_whole_batch(clip: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    discriminator = PatchDiscriminator2d(channels=4, num_layers=2)

    def means(real: Tensor) -> Tensor:
        loss = build(lecam_weight=1.0, lecam_decay=0.0, discriminator=discriminator, adversarial_start=0)
        loss.discriminator_loss(real + 1, real, 0)
        return loss.lecam_means

    whole = means(clip)
    there = torch.stack([discriminator(clip[1:]).mean(), discriminator(clip[1:] + 1).mean()]).detach()
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda tensor: tensor.add_(there))
    torch.testing.assert_close(means(clip[:1]), whole)


# R1


@pytest.mark.parametrize("dims", [2, 3])
def test_r1_of_a_linear_discriminator_is_its_squared_weight(dims: int, clip: Tensor) -> None:
    discriminator = Linear(dims, clip[0].numel() // (4 if dims == 2 else 1), logits=5)
    terms = build(discriminator=discriminator, adversarial_start=0, r1_weight=3.0).discriminator_loss(clip, clip, 0)
    plain = build(discriminator=discriminator, adversarial_start=0).discriminator_loss(clip, clip, 0)
    # the gradient of the sum of 5 logits is the sum of their weights, in every frame (2-D) or clip (3-D) the same
    r1 = discriminator.head.weight.sum(0).square().sum()
    torch.testing.assert_close(terms["r1"], r1.detach())
    torch.testing.assert_close(terms["total"], plain["total"] + 3 / 2 * r1)
    expected = torch.autograd.grad(plain["total"] + 3 / 2 * r1, discriminator.head.weight)[0]
    torch.testing.assert_close(torch.autograd.grad(terms["total"], discriminator.head.weight)[0], expected)


@pytest.mark.parametrize("make", [PatchDiscriminator2d, PatchDiscriminator3d])
def test_r1_and_its_gradient_are_those_of_finite_differences(make: Any, clip: Tensor) -> None:
    torch.manual_seed(0)
    discriminator = make(channels=8, num_layers=2, norm="group").double()
    parameters = list(discriminator.parameters())
    with torch.no_grad():
        for parameter in parameters:
            parameter.add_(0.1 * torch.randn_like(parameter))  # the initial ones are too small for differences
    clip = clip.double()
    loss = build(discriminator=discriminator, adversarial_start=0, r1_weight=2.0)
    plain = build(discriminator=discriminator, adversarial_start=0)

    def r1() -> Tensor:
        return loss.discriminator_loss(clip, clip, 0)["total"] - plain.discriminator_loss(clip, clip, 0)["total"]

    # each frame (2-D) or clip (3-D) alone, a step along its gradient
    samples = clip.transpose(1, 2).flatten(0, 1)[:, :, None] if make is PatchDiscriminator2d else clip
    norms = []
    for sample in samples.split(1):
        x = sample.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(discriminator(x).sum(), x)
        step = 1e-6 * gradient / gradient.norm()
        norms.append((discriminator(x + step).sum() - discriminator(x - step).sum()) / 2e-6)
    torch.testing.assert_close(torch.stack(norms).square().mean(), r1(), rtol=1e-6, atol=0)

    gradients = torch.autograd.grad(r1(), parameters)
    weights = [g for g, p in zip(gradients, parameters, strict=True) if p.ndim > 1]
    assert all(gradient.abs().max() > 0 for gradient in weights)
    directions = [torch.randn_like(parameter) for parameter in parameters]
    values = []
    for step in (1e-6, -2e-6):
        with torch.no_grad():
            for parameter, direction in zip(parameters, directions, strict=True):
                parameter.add_(step * direction)
        values.append(r1().detach())
    slope = sum((g * d).sum() for g, d in zip(gradients, directions, strict=True))
    torch.testing.assert_close(slope, (values[0] - values[1]) / 2e-6, rtol=1e-5, atol=0)


def test_lazy_r1_is_in_the_due_steps_alone_with_the_weight_of_all(clip: Tensor) -> None:
    loss = build(adversarial_start=2, r1_weight=0.5, r1_every=4)
    plain = build(discriminator=loss.discriminator, adversarial_start=2)
    for step in range(2, 10):
        terms, without = (each.discriminator_loss(-clip, clip, step) for each in (loss, plain))
        assert ("r1" in terms) == (step in (4, 8))
        extra = 0.5 / 2 * 4 * terms["r1"] if "r1" in terms else 0.0
        torch.testing.assert_close(terms["total"], without["total"] + extra)
    with torch.no_grad():
        assert "r1" not in loss.discriminator_loss(-clip, clip, 4)
    assert "r1" not in loss.eval().discriminator_loss(-clip, clip, 4)


def test_r1_leaves_the_clip_alone_and_is_computed_in_float32_under_autocast(clip: Tensor) -> None:
    loss = build(adversarial_start=0, r1_weight=1.0)
    exact = loss.discriminator_loss(-clip, clip, 0)["r1"]
    with torch.autocast("cpu", torch.bfloat16):
        terms = loss.discriminator_loss(-clip, clip, 0)
        terms["total"].backward()
    torch.testing.assert_close(terms["r1"], exact, rtol=1e-6, atol=0)
    assert not clip.requires_grad
    assert clip.grad is None


# Some of the frames


def numbered(batch_size: int, length: int) -> Tensor:
    """Clips whose pixels are 100 · clip + frame."""
    numbers = 100.0 * torch.arange(batch_size)[:, None] + torch.arange(length)
    return numbers[:, None, :, None, None].expand(-1, 3, -1, 2, 2)


def test_lpips_sees_distinct_frames_of_each_clip_and_is_unbiased() -> None:
    torch.manual_seed(0)
    clip = numbered(3, 5)
    output, weight = reconstruct(clip)
    loss = build(perceptual_weight=1.0, perceptual_frames=2)
    seen: list[Tensor] = []

    def distance(prediction: Tensor, target: Tensor) -> Tensor:
        torch.testing.assert_close(prediction, 0.5 * target)  # the same frames of both
        seen.append(target[:, 0, :, 0, 0])
        return target.transpose(1, 2).flatten(0, 1).mean((1, 2, 3))

    loss.perceptual = distance
    values = [loss.generator_loss(output, clip, weight, 0) for _ in range(1000)]
    frames = torch.stack(seen)  # (1000, 3, 2)
    torch.testing.assert_close(frames // 100, torch.arange(3.0)[:, None].expand_as(frames))
    assert (frames[..., 0] != frames[..., 1]).all()
    counts = torch.stack([(frames % 100 == k).float().mean((0, 2)) for k in range(5)])
    assert counts.sub(1 / 5).abs().max() < 0.04  # each frame of each clip alike, within five deviations
    assert (frames[:, 0] % 100 != frames[:, 1] % 100).any()  # clips draw apart
    mean = torch.stack([terms["perceptual"] for terms in values]).mean().item()
    assert mean == pytest.approx(clip.mean().item(), abs=0.1)
    assert len({terms["pixel"].item() for terms in values}) == 1  # of all frames
    assert values[0]["pixel"].item() == pytest.approx(0.5 * clip.mean().item())

    torch.manual_seed(7)
    again = [loss.generator_loss(output, clip, weight, 0)["perceptual"] for _ in range(5)]
    torch.manual_seed(7)
    assert again == [loss.generator_loss(output, clip, weight, 0)["perceptual"] for _ in range(5)]
    (gradient,) = torch.autograd.grad(loss.generator_loss(output, clip, weight, 0)["total"], weight, allow_unused=True)
    assert gradient.isfinite().all()


def test_both_players_see_a_run_of_frames_from_every_start() -> None:
    torch.manual_seed(0)
    clip, seen = numbered(2, 6), []
    loss = build(
        discriminator=PatchDiscriminator3d(channels=4, num_layers=1),
        adversarial_start=0,
        adversarial_frames=3,
        adaptive_weight=False,
    )

    def logits(x: Tensor) -> Tensor:
        seen.append(x[:, 0, :, 0, 0])
        return x.mean((1, 2, 3, 4))[:, None]

    loss.discriminator.forward = logits
    for _ in range(100):
        loss.generator_loss(reconstruct(clip)[0], clip, None, 0)
        loss.discriminator_loss(0.5 * clip, clip, 0)
    players = [torch.stack(seen[i::3]) * factor for i, factor in enumerate((2, 1, 2))]
    for runs in players:
        starts = runs[:, 0, 0]
        assert set(starts.tolist()) == {0.0, 1.0, 2.0, 3.0}
        torch.testing.assert_close(runs, starts[:, None, None] + numbered(2, 3)[:, 0, :, 0, 0])
    torch.testing.assert_close(players[1], players[2])  # the discriminator's two halves alike


@pytest.mark.parametrize("limit", [2, 4, 99])
def test_evaluation_and_short_clips_take_all_frames(limit: int, clip: Tensor) -> None:
    limited = build(perceptual_weight=1.0, perceptual_frames=limit, adversarial_frames=limit, adversarial_start=0)
    whole = build(perceptual_weight=1.0, adversarial_start=0, discriminator=limited.discriminator)
    limited.perceptual = whole.perceptual = lambda x, y: (x - y).square().mean((1, 3, 4)).flatten()
    (output, weight), state = reconstruct(clip), torch.get_rng_state()

    def check() -> None:
        for method, arguments in (("generator_loss", (output, clip, weight)), ("discriminator_loss", (-clip, clip))):
            mine, theirs = (getattr(loss, method)(*arguments, 0) for loss in (limited, whole))
            assert mine.keys() == theirs.keys()
            for name in mine:
                torch.testing.assert_close(mine[name], theirs[name], rtol=0, atol=0)

    if limit >= clip.shape[2]:
        check()
    with torch.no_grad():
        check()
    limited.eval()
    check()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize(
    "arguments",
    [
        {"perceptual_frames": 0},
        {"adversarial_frames": -1},
        {"r1_every": 0},
        {"lecam_decay": 1.0},
        {"lecam_weight": -0.1},
        {"r1_weight": float("nan")},
        {"kl_weight": -1.0},
    ],
)
def test_values_that_cannot_work_are_refused_by_name(arguments: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=rf"--model\.loss\.{next(iter(arguments))}"):
        build(**arguments)


def test_an_annealed_weight_goes_in_a_line_and_stays_and_validation_has_its_end(clip: Tensor) -> None:
    loss = build(regularization_weights={"entropy": Annealed(start=0.3, end=0.1, steps=4), "commitment": 0.5})
    output, weight = reconstruct(clip, entropy=torch.tensor(-2.0), commitment=torch.tensor(1.0))
    with torch.no_grad():
        each = [loss.generator_loss(output, clip, weight, step) for step in (0, 1, 2, 4, 100, -1)]
    added = [float(terms["total"] - terms["nll"]) for terms in each]
    assert added == pytest.approx([0.5 - 2 * weight for weight in (0.3, 0.25, 0.2, 0.1, 0.1, 0.1)], abs=1e-6)


@pytest.mark.parametrize(
    "weights",
    [{"entropy": -0.1}, {"entropy": math.inf}, {"entropy": Annealed(0.1, -1.0, 5)}, {"entropy": Annealed(1.0, 0.1, 0)}],
)
def test_a_weight_that_makes_no_sense_is_refused(weights: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="entropy"):
        build(regularization_weights=weights)


def test_leading_frames_count_as_much_as_all_others_in_pixels_and_lpips(clip: Tensor) -> None:
    loss = build(leading_frames=1, perceptual_weight=0.5, discriminator=None)
    loss.perceptual = lambda x, y: (x - y).square().mean((1, 3, 4)).flatten()  # one distance per frame
    output, weight = reconstruct(clip)
    terms = loss.generator_loss(output, clip, weight, 0)
    error = output.clip - clip
    pixel = error[:, :, :1].abs().mean() + error[:, :, 1:].abs().mean()
    perceptual = error[:, :, :1].square().mean() + error[:, :, 1:].square().mean()
    torch.testing.assert_close(terms["pixel"], pixel.detach())
    torch.testing.assert_close(terms["total"], pixel + 0.5 * perceptual)
    alone = build(leading_frames=9, discriminator=None).generator_loss(output, clip, weight, 0)
    torch.testing.assert_close(alone["pixel"], error.abs().mean().detach())  # no frames after the leading ones
    with pytest.raises(UserError, match="leading_frames or perceptual_frames, got both"):
        build(leading_frames=1, perceptual_frames=1)


def test_the_gan_may_be_measured_against_lpips_alone(clip: Tensor) -> None:
    loss = build(perceptual_weight=0.5, adaptive_reference="perceptual", adaptive_weight_maximum=1e9)
    loss.perceptual = lambda x, y: (x - y).square().mean((1, 3, 4)).flatten()
    output, weight = reconstruct(clip)
    terms = loss.generator_loss(output, clip, weight, 3)
    adversarial = -loss.discriminator(output.clip).mean()
    wanted = 0.05 * adaptive_weight(0.5 * (output.clip - clip).square().mean(), adversarial, weight, math.inf)
    torch.testing.assert_close(terms["adaptive_weight"], wanted)
    with pytest.raises(UserError, match="perceptual_weight above 0"):
        build(adaptive_reference="perceptual")
