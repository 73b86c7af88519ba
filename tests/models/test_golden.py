"""VidTwin against tensors of the released implementation (small random weights)."""

import pytest
import torch
from safetensors.torch import load_file

from vidtwin.models import official
from vidtwin.models.vidtwin import VidTwin


def relative_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    actual, expected = actual.detach().double().flatten(), expected.double().flatten()
    return float((actual - expected).norm() / expected.norm())


@pytest.fixture(scope="module")
def golden(shared):
    return load_file(shared / "golden" / "golden_a.safetensors")


@pytest.fixture(scope="module")
def official_file(golden, tmp_path_factory):
    path = tmp_path_factory.mktemp("official") / "vidtwin.ckpt"
    state = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    torch.save({"state_dict": state, "epoch": 3}, path)
    return path


@pytest.fixture(scope="module")
def model(official_file):
    return VidTwin.from_official(official_file, num_heads=4)


def test_intermediate_results_latents_and_reconstructions_agree(golden, model):
    clip = golden["input"]
    with torch.no_grad():
        tokens = model.encoder.patch_embed(
            torch.nn.functional.unfold(clip[0].transpose(0, 1), 16, stride=16).transpose(1, 2)
        )
        features = model.features(clip)
        structure_mean, structure_logvar = model.structure.encode(features)
        dynamics_mean, dynamics_logvar = model.dynamics.encode(features)
        encoding = model.encode(clip)
        latents = encoding.mode()
    moments_x, moments_y = golden["out.moments_motion_x"], golden["out.moments_motion_y"]
    width = moments_x.shape[-1]
    expected = {
        "patch embedding": (tokens.flatten(0, 1)[None], golden["out.enc_patch_embed_BNC"]),
        "features": (features, golden["out.z"]),
        "structure moments": (
            torch.cat([structure_mean, structure_logvar], 1),
            golden["out.moments_content_B_C_F_H_W"],
        ),
        "dynamics x": (torch.cat([dynamics_mean, dynamics_logvar], 1)[..., :width], moments_x),
        "dynamics y": (torch.cat([dynamics_mean, dynamics_logvar], 1)[..., width:], moments_y),
        "structure latent": (latents["structure"].movedim(1, -1), golden["out.z_content"]),
        "dynamics latent": (
            latents["dynamics"],
            torch.cat([golden["out.z_motion_x"], golden["out.z_motion_y"]], dim=3),
        ),
        "KL": (encoding.regularization()["kl"], golden["out.kl_loss"]),
    }
    with torch.no_grad():
        for name, part in {"full": None, "structure": "structure", "dynamics": "dynamics"}.items():
            kept = latents if part is None else {part: latents[part]}
            expected[f"{name} reconstruction"] = (model.decode(kept), golden[f"out.rec_{name}"])
    errors = {name: relative_error(*pair) for name, pair in expected.items()}
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}


def test_every_golden_gradient_agrees(golden, model, tmp_path):
    gradients = {k.removeprefix("grad."): v for k, v in golden.items() if k.startswith("grad.")}
    clip = golden["input"]
    model.zero_grad()
    encoding = model.encode(clip)
    reconstruction = model.decode(encoding.mode())
    loss = (reconstruction - clip).abs().mean() + 1e-4 * encoding.regularization()["kl"]
    loss.backward()
    assert relative_error(loss, golden["out.grad_loss"]) < 1e-5

    # The gradients in our names: a checkpoint that holds them in the weights' places, and NaN where there are none.
    # Of a fused projection, some slices may be NaN.
    places = {k.removeprefix("state_dict."): v for k, v in golden.items() if k.startswith("state_dict.")}
    places = {k: v if "pos_embed" in k else gradients.get(k, torch.full_like(v, torch.nan)) for k, v in places.items()}
    torch.save({"state_dict": places}, tmp_path / "gradients.ckpt")
    expected = official.load(tmp_path / "gradients.ckpt")[1]
    errors, compared = {}, 0
    for name, parameter in model.named_parameters():
        there = ~expected[name].isnan()
        if there.any():
            compared += int(there.sum())
            errors[name] = relative_error(parameter.grad[there], expected[name][there])
    assert compared == sum(v.numel() for v in gradients.values())
    assert {name: error for name, error in errors.items() if not error <= 1e-5} == {}
