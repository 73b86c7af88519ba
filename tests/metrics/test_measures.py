"""A protocol's metrics, against scikit-image and the lpips package for every preset."""

from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import lpips
import numpy as np
import pytest
import torch
from skimage.metrics import structural_similarity
from torch import Tensor
from torchvision.models import alexnet
from torchvision.models.vgg import cfgs, make_layers

from vidtwin.benchmark.protocol import PRESETS
from vidtwin.errors import UserError
from vidtwin.losses import STLPIPS
from vidtwin.metrics import Measures
from vidtwin.video.writing import write_and_read

FPS = 8.0
METRICS = ("compared", "psnr", "psnr_epsilon", "ssim", "lpips")


@pytest.fixture(scope="module")
def backbones(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Files laid out as torchvision's; seeded weights, larger than AlexNet's own, so that no layer dies out."""
    folder = tmp_path_factory.mktemp("backbones")
    torch.manual_seed(0)
    layers = {"vgg": make_layers(cfgs["D"]), "alex": alexnet().features}
    for name, features in layers.items():
        torch.save({f"features.{k}": v * 1.5 for k, v in features.state_dict().items()}, folder / f"{name}.pth")
    return {name: folder / f"{name}.pth" for name in layers}


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a measurement must not download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def clips(batch: int = 2, frames: int = 2, size: int = 32) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    target = torch.nn.functional.avg_pool3d(torch.rand(batch, 3, frames, size + 4, size + 4), (1, 5, 5), 1) * 4 - 2
    return target + torch.rand(batch, 1, 1, 1, 1) * 0.4 * torch.randn_like(target), target


def settings(preset: str) -> dict[str, Any]:
    return {name: PRESETS[preset][name] for name in METRICS}


def eight_bit(clip: Tensor) -> np.ndarray:
    """(3, T, H, W) in [-1, 1] → uint8 (T, H, W, 3)."""
    return ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).numpy()


@pytest.fixture(scope="module")
def packages(backbones: dict[str, Path]) -> dict[str, lpips.LPIPS]:
    """The lpips package's networks with the files' weights."""
    networks = {}
    for name, (net, spatial) in {
        "vgg": ("vgg", False),
        "alex": ("alex", False),
        "alex_spatial": ("alex", True),
    }.items():
        network = lpips.LPIPS(net=net, spatial=spatial, pnet_rand=True, verbose=False)
        weights = torch.load(backbones[net])
        for key, value in network.net.state_dict().items():
            value.copy_(weights[f"features.{key.split('.', 1)[1]}"])
        networks[name] = network
    return networks


def packages_distance(network: lpips.LPIPS, prediction: np.ndarray, target: np.ndarray) -> float:
    """Mean over frames (T, H, W, 3) in [0, 1]."""
    x, y = (torch.from_numpy(z * 2 - 1).float().permute(0, 3, 1, 2) for z in (prediction, target))
    with torch.no_grad():
        return float(network(x, y).mean())


def of_floats(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """VidTok: PSNR and SSIM per frame, 1e-8 added to each MSE. Small frames are not pooled."""
    frames = list(zip(target, prediction, strict=True))
    psnr = np.mean([10 * np.log10(1 / (np.square(y - x).mean() + 1e-8)) for y, x in frames])
    gaussian = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False}
    ssim = np.mean([structural_similarity(y, x, data_range=1.0, channel_axis=-1, **gaussian) for y, x in frames])
    return float(psnr), float(ssim)


def of_tokenbench(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """TokenBench: values up to 255, one MSE, an epsilon on its root; scikit-image's SSIM by default."""
    x, y = prediction * 255.0, target * 255.0
    psnr = 20 * np.log10(255.0 / (np.sqrt(np.square(y - x).mean()) + np.finfo(np.float32).eps))
    pairs = zip(np.rint(y).astype(np.uint8), np.rint(x).astype(np.uint8), strict=True)
    return float(psnr), float(
        np.mean([structural_similarity(b, a, data_range=255.0, channel_axis=-1) for b, a in pairs])
    )


def of_wfvae(prediction: np.ndarray, target: np.ndarray) -> tuple[float, float]:
    """Open-Sora-Plan: PSNR per frame without an epsilon; Gaussian SSIM of each channel."""
    psnr = np.mean(
        [20 * np.log10(1 / np.sqrt(np.square(y - x).mean())) for y, x in zip(target, prediction, strict=True)]
    )
    return float(psnr), of_floats(prediction, target)[1]


PEERS = {"vidtwin": of_floats, "vidtok": of_floats, "tokenbench": of_tokenbench, "wfvae": of_wfvae}


def test_every_preset_has_a_peer_to_agree_with() -> None:
    assert PEERS.keys() == PRESETS.keys()


@pytest.mark.filterwarnings("ignore:.*:UserWarning:torchvision")
@pytest.mark.parametrize("preset", PEERS)
def test_psnr_ssim_and_lpips_agree_with_independent_ones(
    preset: str, backbones: dict[str, Path], packages: dict[str, lpips.LPIPS]
) -> None:
    measures = Measures(**settings(preset), fps=FPS, backbones=backbones)
    measures.setup(num_frames=2, height=32, width=32)
    values = measures(*clips())
    compared = PRESETS[preset]["compared"]
    for index, (x, y) in enumerate(zip(*clips(), strict=True)):
        if compared == "floats":
            pair = [clip.clamp(-1, 1).double().permute(1, 2, 3, 0).numpy() / 2 + 0.5 for clip in (x, y)]
        else:  # TokenBench has the file that was read on one side
            files = [write_and_read(eight_bit(clip), compared, FPS) for clip in (x, y)]
            pair = [files[0] / 255.0, (eight_bit(y) if preset == "tokenbench" else files[1]) / 255.0]
        psnr, ssim = PEERS[preset](*pair)
        assert values["psnr"][index].item() == pytest.approx(psnr, abs=1e-4)
        assert values["ssim"][index].item() == pytest.approx(ssim, abs=1e-6)
        assert values["mse"][index].item() == pytest.approx(np.square(pair[0] - pair[1]).mean(), rel=1e-5)
        columns = {"lpips": PRESETS[preset]["lpips"], "lpips_alex": "alex", "lpips_vgg": "vgg"}
        for name in columns.keys() & values.keys():
            expected = packages_distance(packages[columns[name]], *pair)
            assert values[name][index].item() == pytest.approx(expected, rel=1e-4)
            assert expected > 1e-5


@pytest.mark.parametrize(
    ("lpips", "names"),
    [
        ("vgg", ("lpips", "lpips_alex")),
        ("alex", ("lpips", "lpips_vgg")),
        ("alex_spatial", ("lpips", "lpips_alex", "lpips_vgg")),
    ],
)
def test_the_nets_that_the_protocols_is_not_are_extra_columns(
    lpips: Any, names: tuple[str, ...], backbones: dict[str, Path]
) -> None:
    measures = Measures(lpips=lpips, backbones=backbones)
    measures.setup(16, 64, 64)
    assert measures.names == ("mse", "psnr", "ssim", *names, "flicker")
    assert measures.unavailable.keys() == {"ms_ssim"}


@pytest.mark.usefixtures("no_backbone")
def test_an_unavailable_metric_is_left_out_and_says_why() -> None:
    measures = Measures(vmaf=True)
    measures.setup(num_frames=1, height=10, width=10)
    assert measures.names == tuple(measures(*clips(1, 1, 10))) == ("mse", "psnr")
    assert measures.unavailable.keys() == {"ssim", "ms_ssim", "lpips", "lpips_alex", "flicker", "vmaf"}
    for name, words in {
        "lpips": "VGG-16 backbone of LPIPS at",
        "lpips_alex": "alexnet-owt-7be5be79.pth",
        "ms_ssim": "176x176",
        "ssim": "11x11",
        "flicker": "at least 2 frames",
    }.items():
        assert words in measures.unavailable[name]
        assert "\n" not in measures.unavailable[name]


def test_frames_that_a_backbone_pools_away_have_no_distance(backbones: dict[str, Path]) -> None:
    measures = Measures(backbones=backbones)
    measures.setup(2, 30, 30)
    assert "at least 31x31 pixels for LPIPS with AlexNet" in measures.unavailable["lpips_alex"]
    assert "lpips" in measures(*clips(1, 2, 30))


@pytest.mark.skipif(not find_spec("stlpips_pytorch"), reason="needs pip install 'vidtwin[offline]'")
@pytest.mark.usefixtures("no_backbone")
def test_st_lpips_is_measured_on_request_under_its_own_names() -> None:
    names = {"vgg": ("st_lpips",), "alex": ("st_lpips_alex",), "both": ("st_lpips", "st_lpips_alex"), None: ()}
    found = {}
    for chosen, expected in names.items():
        measures = Measures(st_lpips=chosen)
        measures.setup(2, 32, 32)
        assert measures.names == ("mse", "psnr", "ssim", *expected, "flicker")
        assert measures.unavailable.keys() == {"ms_ssim", "lpips", "lpips_alex"}
        found |= measures(*clips())
    for net, name in (("vgg", "st_lpips"), ("alex", "st_lpips_alex")):
        distances = STLPIPS(net)(*(clip.clamp(-1, 1) for clip in clips()))
        torch.testing.assert_close(found[name], distances.view(2, 2).mean(1))
    measures = Measures(st_lpips="both")
    measures.setup(2, 20, 20)
    assert "at least 21x21 pixels for ST-LPIPS with AlexNet" in measures.unavailable["st_lpips_alex"]
    assert "st_lpips" in measures.names


@pytest.mark.usefixtures("no_backbone")
def test_st_lpips_without_its_package_is_unavailable(monkeypatch: pytest.MonkeyPatch) -> None:
    def find(package: str) -> None:
        raise metadata.PackageNotFoundError(package)

    monkeypatch.setattr(metadata, "distribution", find)
    measures = Measures(st_lpips="vgg")
    measures.setup(2, 32, 32)
    assert "st_lpips" not in measures(*clips())
    assert measures.unavailable["st_lpips"].endswith("got none installed; run pip install 'vidtwin[offline]'.")


@pytest.mark.usefixtures("no_backbone")
def test_a_clip_has_the_same_bits_beside_any_other_clips() -> None:
    measures = Measures()
    measures.setup(2, 200, 180)
    prediction, target = clips(3, 2, 200)
    together = measures(prediction, target)
    assert {"ssim", "ms_ssim", "flicker"} <= together.keys()
    for index in range(3):
        alone = measures(prediction[index : index + 1], target[index : index + 1])
        for name, value in alone.items():
            assert value.shape == (1,)
            assert torch.equal(value[0], together[name][index]), name


@pytest.mark.usefixtures("no_backbone")
def test_the_models_precision_changes_nothing_and_is_left_as_it_was() -> None:
    measures = Measures()
    measures.setup(2, 32, 32)
    expected = measures(*clips())
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            values = measures(*clips())
            assert torch.get_float32_matmul_precision() == "medium"
            assert torch.is_autocast_enabled("cpu")
    finally:
        torch.set_float32_matmul_precision(before)
    for name, value in values.items():
        assert value.dtype == torch.float32
        assert torch.equal(value, expected[name]), name


@pytest.mark.usefixtures("no_backbone")
def test_one_mse_a_video_is_made_of_its_clips_mses() -> None:
    measures = Measures(psnr="video", psnr_epsilon=0.0)
    measures.setup(2, 32, 32)
    values = measures(*clips())
    torch.testing.assert_close(values["psnr"], -10 * values["mse"].log10())
    per_frame = Measures(psnr="frame", psnr_epsilon=0.0)
    per_frame.setup(2, 32, 32)
    assert (per_frame(*clips())["psnr"] >= values["psnr"]).all()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"compared": "png"}, "compared to be one of floats, 8-bit, mp4v, h264, got 'png'"),
        ({"psnr": "batch"}, "psnr to be one of frame, clip, video, got 'batch'"),
        ({"psnr_epsilon": -1.0}, "epsilon of at least 0"),
        ({"ssim": "box"}, "ssim to be one of gaussian_pooled, gaussian, uniform7, got 'box'"),
        ({"lpips": "squeeze"}, "lpips to be one of vgg, alex, alex_spatial, got 'squeeze'"),
        ({"st_lpips": "squeeze"}, "st_lpips to be one of vgg, alex, both, got 'squeeze'"),
        ({"fps": 0.0}, "fps above 0, got 0"),
        ({"backbones": {"vgg16": "a.pth"}}, "backbones of vgg and alex, got vgg16"),
    ],
)
def test_wrong_settings_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Measures(**wrong)


@pytest.mark.usefixtures("no_backbone")
def test_clips_that_do_not_fit_are_named() -> None:
    measures = Measures(compared="mp4v")
    with pytest.raises(UserError, match="Expected setup"):
        measures(*clips())
    with pytest.raises(UserError, match=r"even height and width for mp4v, got \(33, 32\)"):
        measures.setup(2, 33, 32)
    measures.setup(2, 32, 32)
    prediction, target = clips()
    with pytest.raises(UserError, match="clips of one shape"):
        measures(prediction[:1], target)
