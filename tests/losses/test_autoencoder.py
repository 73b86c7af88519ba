"""What `AutoencoderLoss` promises whoever trains with it."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin.autoencoder import Reconstruction
from vidtwin.errors import UserError
from vidtwin.losses import AutoencoderLoss, PatchDiscriminator2d
from vidtwin.losses.adversarial import adaptive_weight
from vidtwin.losses.autoencoder import LOGVAR_RANGE


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
    assert set(loss.discriminator_loss(output.clip, clip, 3)) == {"total", "logits_real", "logits_fake"}
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
