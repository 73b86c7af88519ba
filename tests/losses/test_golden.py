"""The released loss, term by term, from tensors of the released code (specs/vidtwin.md section 4)."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

from vidtwin.autoencoder import Reconstruction
from vidtwin.losses import AutoencoderLoss, PatchDiscriminator2d
from vidtwin.losses import adversarial as gan
from vidtwin.posteriors import DiagonalGaussian, Encoding

NUMBERS_PER_FRAME = 3 * 64 * 64
START = 10_000


@pytest.fixture(scope="module")
def tensors(shared: Path) -> dict[str, Tensor]:
    return {k: v.double() for k, v in load_file(shared / "golden/golden_loss.safetensors").items()}


@pytest.fixture(scope="module")
def values(shared: Path) -> dict[str, Any]:
    return json.loads((shared / "golden/golden_loss.json").read_text())["values"]


def frame_mse(prediction: Tensor, target: Tensor) -> Tensor:
    """Stand-in for LPIPS in the golden file."""
    return (prediction - target).square().mean(dim=(1, 3, 4)).flatten()


def golden_discriminator(tensors: dict[str, Tensor], train: bool) -> PatchDiscriminator2d:
    prefix = "state_dict.loss.discriminator."
    discriminator = PatchDiscriminator2d(norm="batch").double()
    discriminator.load_state_dict({k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)})
    return discriminator.train(train)


def golden_loss(tensors: dict[str, Tensor], perceptual_weight: float, train: bool, **arguments: Any) -> AutoencoderLoss:
    loss = AutoencoderLoss(
        **{"reduction": "released", "learn_logvar": True} | arguments,
        perceptual_weight=perceptual_weight,
        discriminator=golden_discriminator(tensors, train),
    ).double()
    loss.perceptual = frame_mse
    if loss.logvar is not None:
        nn.init.constant_(loss.logvar, tensors["state_dict.loss.logvar"].item())
    return loss


def encoding(tensors: dict[str, Tensor]) -> Encoding:
    return Encoding(
        {name: DiagonalGaussian(*tensors[f"moments_{name}"].chunk(2, dim=1)) for name in ("content", "x", "y")}
    )


def reconstruction(tensors: dict[str, Tensor]) -> tuple[Reconstruction, nn.Parameter]:
    weight = nn.Parameter(tensors["last_layer_weight"].clone())
    tokens = F.linear(tensors["feat"], weight, tensors["last_layer_bias"])
    clip = rearrange(tokens, "b (t h w) (p q c) -> b c t (h p) (w q)", t=4, h=4, p=16, q=16)
    return Reconstruction(clip, {}, encoding(tensors).regularization()), weight


def close(actual: Tensor | float, expected: Tensor | float, rel: float = 1e-5) -> None:
    actual, expected = torch.as_tensor(actual).double(), torch.as_tensor(expected).double()
    assert (actual - expected).norm() <= rel * expected.norm(), (actual, expected)


@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("pw", ["pw0", "pw05"])
def test_every_term_is_the_released_one(
    pw: str, when: str, mode: str, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    golden, on = values[f"{pw}_{when}_{mode}"], when == "after"
    loss = golden_loss(tensors, 0.05 if pw == "pw05" else 0.0, mode == "train")
    output, weight = reconstruction(tensors)
    close(output.clip.detach(), tensors["rec"], 1e-6)
    step = START if on else START - 1

    terms = loss.generator_loss(output, tensors["input"], weight, step)
    terms["total"].backward()
    close(terms["total"], golden["total"])
    close(terms["nll"], golden["nll_loss"])
    close(terms["kl"], golden["kl_loss"])
    close(terms["logvar"], golden["logvar"])
    close(terms["pixel"] + 0.05 * terms.get("perceptual", torch.zeros(())), golden["rec_loss"])
    assert ("perceptual" in terms) == (pw == "pw05")
    if pw == "pw05":
        close(terms["perceptual"], golden["p_loss"])
    assert ("adversarial" in terms) == ("adaptive_weight" in terms) == on
    if on:
        close(terms["adversarial"], golden["g_loss"])
        close(terms["adaptive_weight"], golden["d_weight"])  # 0.05 included, disc_factor not
    close(loss.logvar.grad, golden["grad_logvar"])
    if mode == "train":
        close(weight.grad, tensors[f"grad_W.{pw}_{when}_train"])
    assert all(p.grad is None and p.requires_grad for p in loss.discriminator.parameters())

    terms = loss.discriminator_loss(output.clip.detach(), tensors["input"], step)
    assert bool(terms) == on
    if on:
        close(terms["total"], golden["D_disc_loss"])
        close(terms["logits_real"], golden["D_logits_real"])
        close(terms["logits_fake"], golden["D_logits_fake"])
        assert set(terms) == {"total", "logits_real", "logits_fake", "accuracy"}
        close(loss.discriminator.main[3].running_mean, tensors[f"disc_running_mean_after_G_and_D.{mode}"])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_logits_and_adversarial_losses_are_the_released_ones(
    mode: str, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    discriminator = golden_discriminator(tensors, mode == "train")
    with torch.no_grad():
        real, fake = discriminator(tensors["input"]), discriminator(tensors["rec"])
    close(real, tensors[f"logits_real.{mode}"])
    close(fake, tensors[f"logits_fake.{mode}"])
    close(gan.hinge_discriminator_loss(real, fake), values[f"hinge_d.{mode}"])
    close(gan.non_saturating_discriminator_loss(real, fake), values[f"vanilla_d.{mode}"])
    close(gan.hinge_generator_loss(fake), values[f"g_hinge.{mode}"])
    close(gan.non_saturating_generator_loss(fake), values[f"g_nonsat.{mode}"])


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lecam_is_the_released_one(mode: str, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    loss = golden_loss(tensors, 0.0, mode == "train", lecam_weight=0.7)
    terms = loss.discriminator_loss(tensors["rec"], tensors["input"], START)
    close(loss.lecam_means, values[f"lecam_ema.{mode}"])  # after one update from 0
    close(terms["lecam"], values[f"lecam_after_one_update.{mode}"])
    close(terms["total"], values[f"hinge_d.{mode}"] + 0.7 * values[f"lecam_after_one_update.{mode}"])
    close(terms["logits_real"], tensors[f"logits_real.{mode}"].mean())
    close(terms["logits_fake"], tensors[f"logits_fake.{mode}"].mean())
    # the penalty does see the means: with some that matter, from the golden logits alone
    real, fake = tensors[f"logits_real.{mode}"], tensors[f"logits_fake.{mode}"]
    expected = (real + 0.3).clamp(min=0).square().mean() + (0.2 - fake).clamp(min=0).square().mean()
    close(gan.lecam_penalty(real, fake, torch.tensor(0.2).double(), torch.tensor(-0.3).double()), expected)


def test_kl_is_the_released_one_with_its_clamp(tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    for name in ("content", "x", "y", "clamp"):
        posterior = DiagonalGaussian(*tensors[f"moments_{name}"].chunk(2, dim=1))
        close(posterior.regularization()["kl"], values[f"kl_{name}"])


@pytest.mark.parametrize("maximum", [1e4, 100.0])
@pytest.mark.parametrize("step", [START - 1, START])
def test_mean_is_released_divided_by_the_numbers_in_a_frame(
    step: int, maximum: float, tensors: dict[str, Tensor]
) -> None:
    results = []
    for reduction in ("mean", "released"):
        loss = golden_loss(tensors, 0.05, True, reduction=reduction, adaptive_weight_maximum=maximum)
        output, weight = reconstruction(tensors)
        terms = loss.generator_loss(output, tensors["input"], weight, step)
        terms["total"].backward()
        results.append((terms, weight.grad, loss.logvar.grad))
    (mean, *mean_gradients), (released, *released_gradients) = results
    for name in {"total", "nll", "adaptive_weight"} & set(mean):
        close(NUMBERS_PER_FRAME * mean[name], released[name], 1e-10)
    for name in set(mean) - {"total", "nll", "adaptive_weight"}:
        close(mean[name], released[name], 1e-10)
    for mine, theirs in zip(mean_gradients, released_gradients, strict=True):
        close(NUMBERS_PER_FRAME * mine, theirs, 1e-10)
    if step >= START and maximum == 100.0:  # below the ratio of norms, so that the clamp decides
        close(released["adaptive_weight"], 0.05 * maximum, 1e-10)


@pytest.mark.parametrize("step", [START - 1, START])
def test_adamw_takes_the_same_step_in_either_reduction_and_sgd_does_not(step: int, tensors: dict[str, Tensor]) -> None:
    def after_one_step(reduction: str, make: Any) -> Tensor:
        loss = golden_loss(tensors, 0.05, True, reduction=reduction)
        output, weight = reconstruction(tensors)
        loss.generator_loss(output, tensors["input"], weight, step)["total"].backward()
        make([weight]).step()
        return weight.detach() - tensors["last_layer_weight"]

    def adamw(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=1e-3, weight_decay=0.1, eps=1e-15)

    def sgd(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
        return torch.optim.SGD(parameters, lr=1e-3)

    close(after_one_step("mean", adamw), after_one_step("released", adamw))
    close(NUMBERS_PER_FRAME * after_one_step("mean", sgd), after_one_step("released", sgd))
