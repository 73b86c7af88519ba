"""LPIPS from a backbone's file; the weights are random, the file is laid out as torchvision's."""

import copy
from pathlib import Path

import lpips
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from vidtwin.errors import UserError
from vidtwin.losses import LPIPS, AutoencoderLoss, perceptual


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    features = {f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}
    return features | {"classifier.0.weight": torch.zeros(1), "classifier.0.bias": torch.zeros(1)}


@pytest.fixture(scope="module")
def backbone(weights: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("backbone") / "vgg16.pth"
    torch.save(weights, path)
    return path


@pytest.fixture(scope="module")
def alexnet_features() -> dict[str, Tensor]:
    torch.manual_seed(0)
    return {f"features.{k}": v * 1.5 for k, v in alexnet().features.state_dict().items()}


@pytest.fixture(scope="module")
def alexnet_file(alexnet_features: dict[str, Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("alexnet") / "alexnet.pth"
    torch.save(alexnet_features | {"classifier.1.weight": torch.zeros(1)}, path)
    return path


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setenv("VIDTWIN_OFFLINE", "1")
    return tmp_path / "checkpoints" / "vgg16-397923af.pth"


def clips() -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    return torch.rand(2, 3, 2, 32, 32) * 2 - 1, torch.rand(2, 3, 2, 32, 32) * 2 - 1


def lpips_by_hand(weights: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
    """Zhang et al. 2018, eq. 1, with the bundled linear heads; frames (N, 3, H, W)."""
    heads = torch.load(Path(lpips.__file__).parent / "weights/v0.1/vgg.pth", map_location="cpu", weights_only=True)
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    features = make_layers(cfgs["D"])
    features.load_state_dict({k.removeprefix("features."): v for k, v in weights.items() if k.startswith("features.")})
    a, b = ((z - shift[:, None, None]) / scale[:, None, None] for z in (x, y))
    distance = torch.zeros(len(x))
    for i, layer in enumerate(features):
        a, b = layer(a), layer(b)
        if i in (3, 8, 15, 22, 29):  # relu1_2, 2_2, 3_3, 4_3, 5_3
            head = heads[f"lin{(3, 8, 15, 22, 29).index(i)}.model.1.weight"]
            unit_a, unit_b = (z / (z.square().sum(1, keepdim=True).sqrt() + 1e-10) for z in (a, b))
            distance = distance + ((unit_a - unit_b).square() * head).sum(1).mean((1, 2))
    return distance


@pytest.mark.parametrize("suffix", [".pth", ".safetensors"])
def test_equals_the_formula_with_the_files_weights(
    suffix: str, weights: dict[str, Tensor], backbone: Path, tmp_path: Path
) -> None:
    path = backbone
    if suffix == ".safetensors":
        path = tmp_path / "vgg16.safetensors"
        save_file(weights, path)
    x, y = clips()
    distance = LPIPS(path)
    frames = [z.transpose(1, 2).flatten(0, 1) for z in (x, y)]
    with torch.no_grad():
        expected = lpips_by_hand(weights, *frames)
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-4, atol=1e-7)
        torch.testing.assert_close(distance(*frames), distance(x, y))
        assert distance(x, x).abs().max() == 0


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torchvision")
def test_equals_the_lpips_package_with_the_same_weights(weights: dict[str, Tensor], backbone: Path) -> None:
    distance = LPIPS(backbone)
    distance.load()
    theirs = lpips.LPIPS(net="vgg", pnet_rand=True, verbose=False)
    features = {k: v for k, v in weights.items() if k.startswith("features.")}
    for name in ("slice1", "slice2", "slice3", "slice4", "slice5"):
        part = getattr(theirs.net, name)
        part.load_state_dict({k: features[f"features.{k}"] for k in part.state_dict()})
    x, y = (z.transpose(1, 2).flatten(0, 1) for z in clips())
    expected = theirs(x, y).flatten()
    torch.testing.assert_close(distance(x, y), expected, rtol=0, atol=0)
    with torch.no_grad():
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-5, atol=0)


def test_a_measurement_and_a_training_step_take_few_frames_at_once(alexnet_file: Path) -> None:
    distance = LPIPS(alexnet_file, net="alex")  # the quicker network on frames that are large enough to be split
    distance.load()
    assert distance.network is not None
    seen: list[int] = []
    distance.network.register_forward_pre_hook(lambda module, inputs: seen.append(len(inputs[0])))
    torch.manual_seed(0)
    x, y = torch.rand(1, 3, 3, 256, 300), torch.rand(1, 3, 3, 256, 300)
    with torch.inference_mode():
        parts = distance(x, y)
    leaf = x[:, :, :2].clone().requires_grad_()
    trained = distance(leaf, y[:, :, :2])
    torch.testing.assert_close(trained, parts[:2], rtol=1e-5, atol=0)
    assert seen == [1, 1, 1, 1, 1]
    frames = [z[:, :, :2].transpose(1, 2).flatten(0, 1) for z in (x, y)]
    plain = frames[0].requires_grad_()
    (expected,) = torch.autograd.grad(distance.network(plain, frames[1]).sum(), plain)
    (gradient,) = torch.autograd.grad(trained.sum(), leaf)
    torch.testing.assert_close(gradient.transpose(1, 2).flatten(0, 1), expected, rtol=1e-4, atol=1e-7)


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torchvision")
@pytest.mark.parametrize("spatial", [False, True])
def test_alexnets_distance_is_the_lpips_packages(
    spatial: bool, alexnet_features: dict[str, Tensor], alexnet_file: Path
) -> None:
    theirs = lpips.LPIPS(net="alex", spatial=spatial, pnet_rand=True, verbose=False)
    for name, value in theirs.net.state_dict().items():
        value.copy_(alexnet_features[f"features.{name.split('.', 1)[1]}"])
    distance = LPIPS(alexnet_file, net="alex", spatial=spatial)
    x, y = clips()
    frames = [z.transpose(1, 2).flatten(0, 1) for z in (x, y)]
    with torch.no_grad():
        expected = theirs(*frames).flatten(1).mean(1)
        torch.testing.assert_close(distance(x, y), expected, rtol=1e-5, atol=0)
    assert expected.min() > 1e-4
    with pytest.raises(UserError, match=r"at least 31x31 pixels for LPIPS with AlexNet, got \(30, 32\)"):
        distance(x[..., :30, :], y[..., :30, :])


def test_each_network_has_its_own_file(no_backbone: Path, backbone: Path) -> None:
    with pytest.raises(UserError, match=r"AlexNet backbone of LPIPS at .*alexnet-owt-7be5be79\.pth, got no such file"):
        LPIPS(net="alex").load(download=False)
    with pytest.raises(UserError, match="Expected torchvision's AlexNet, but"):
        LPIPS(backbone, net="alex").load()
    with pytest.raises(UserError, match="one of vgg, alex, got 'squeeze'"):
        LPIPS(net="squeeze")  # type: ignore[arg-type]


@pytest.mark.parametrize("dead", [False, True])
@pytest.mark.parametrize("colour", [-1.0, 0.0, 0.3])
def test_a_constant_clip_has_a_finite_gradient(
    colour: float, dead: bool, weights: dict[str, Tensor], tmp_path: Path
) -> None:
    # Where every feature of a position is 0 the norm's square root has the gradient 0/0, which the ReLU behind it has
    # to stop: a backbone with a layer of zeros brings that about at will.
    weights = weights | {"features.21.bias": torch.full((512,), -100.0)} if dead else weights
    torch.save(weights, tmp_path / "vgg16.pth")
    distance = LPIPS(tmp_path / "vgg16.pth")
    prediction = torch.full((1, 3, 1, 32, 32), colour, requires_grad=True)
    same = distance(prediction, prediction.detach().clone()).sum()
    other = distance(prediction, clips()[0][:1, :, :1]).sum()
    for value in (same, other):
        (gradient,) = torch.autograd.grad(value, prediction)
        assert gradient.isfinite().all()
    assert same == 0
    assert gradient.abs().sum() > 0


def test_network_is_frozen_and_invisible_to_checkpoints_and_optimizers(backbone: Path) -> None:
    loss = AutoencoderLoss(perceptual_backbone=str(backbone))
    loss.setup()
    loss.train()
    assert isinstance(loss.perceptual, LPIPS)
    network = loss.perceptual.network
    assert network is not None
    assert not list(loss.parameters())
    assert not loss.state_dict()
    assert not any(module.training for module in network.modules())
    assert not any(p.requires_grad for p in network.parameters())
    x, y = clips()
    x.requires_grad_(True)
    loss.perceptual(x, y).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().sum() > 0
    copy.deepcopy(loss)


def test_first_used_in_inference_mode_it_can_still_be_trained_through(backbone: Path) -> None:
    distance, (x, y) = LPIPS(backbone), clips()
    with torch.inference_mode():
        distance(x, y)
    distance(x.requires_grad_(True), y).sum().backward()
    assert x.grad is not None


def test_missing_backbone_is_one_line_that_says_what_to_do(no_backbone: Path) -> None:
    loss = AutoencoderLoss()  # without LPIPS' weights an evaluation can still build the task
    with pytest.raises(UserError) as error:
        loss.setup()
    message = str(error.value)
    assert "\n" not in message
    for part in (str(no_backbone), "--model.loss.perceptual_backbone PATH", "--model.loss.perceptual_weight 0"):
        assert part in message
    AutoencoderLoss(perceptual_weight=0.0).setup()
    with pytest.raises(UserError, match="vgg16-397923af"):
        LPIPS()(*clips())
    with pytest.raises(UserError, match=r"elsewhere\.pth"):
        AutoencoderLoss(perceptual_backbone="elsewhere.pth").setup()


def test_failed_download_is_one_line_and_the_timeout_is_restored(
    no_backbone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VIDTWIN_OFFLINE")

    def fail(url: str, path: str, hash_prefix: str) -> None:
        assert perceptual.socket.getdefaulttimeout() == 10.0
        assert hash_prefix == "397923af"
        raise OSError("no route\nto host")

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    with pytest.raises(UserError, match=r"could not fetch it \(no route to host\)"):
        LPIPS().load()
    assert perceptual.socket.getdefaulttimeout() is None
    with pytest.raises(UserError, match=r"no such file; download it from https"):
        LPIPS().load(download=False)


def test_a_file_without_vgg16_is_refused_by_name(weights: dict[str, Tensor], tmp_path: Path) -> None:
    path = tmp_path / "other.pth"
    wrong = dict(weights)
    wrong["features.2.weight"] = torch.zeros(1, 2)
    wrong["features.99.bias"] = wrong.pop("features.28.bias")
    torch.save(wrong, path)
    with pytest.raises(UserError, match=r"missing features\.28\.bias") as error:
        LPIPS(path).load()
    assert "unexpected features.99.bias" in str(error.value)
    assert "features.2.weight is (1, 2), expected (64, 64, 3, 3)" in str(error.value)
    path.write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="damaged or cut off"):
        LPIPS(path).load()
    torch.save([1, 2], path)
    with pytest.raises(UserError, match="state dict"):
        LPIPS(path).load()


class _Code:
    def __reduce__(self) -> tuple:
        return (Path.touch, (Path("executed"),))


def test_code_in_the_file_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"features.0.weight": _Code()}, "evil.pth")
    with pytest.raises(UserError, match="never run"):
        LPIPS("evil.pth").load()
    assert not Path("executed").exists()
