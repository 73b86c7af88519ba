"""Metrics of validation: `ClipMetrics`."""

from pathlib import Path

import pytest
import torch
from torch import Tensor
from torchvision.models.vgg import cfgs, make_layers

from vidtwin.losses import LPIPS
from vidtwin.metrics import ClipMetrics, psnr, ssim


@pytest.fixture
def no_backbone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a measurement must not download")

    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)


def clips(batch: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    target = torch.rand(batch, 3, 2, 32, 32) * 2 - 1
    return target + torch.rand(batch, 1, 1, 1, 1) * torch.randn_like(target), target


@pytest.mark.usefixtures("no_backbone")
def test_without_a_backbone_lpips_is_unavailable_and_says_why() -> None:
    metrics = ClipMetrics()
    values = metrics(*clips(3))
    metrics.update(values)
    assert metrics.names == tuple(values) == tuple(metrics.compute()) == ("psnr", "ssim")
    assert "vgg16-397923af.pth" in metrics.unavailable["lpips"]
    torch.testing.assert_close(values["psnr"], psnr(*clips(3)).mean(1))
    torch.testing.assert_close(values["ssim"], ssim(*clips(3)).mean(1))
    assert not metrics.state_dict()


def test_lpips_of_clamped_clips_in_full_precision(tmp_path: Path) -> None:
    torch.manual_seed(0)
    path = tmp_path / "vgg16.pth"
    torch.save({f"features.{k}": v for k, v in make_layers(cfgs["D"]).state_dict().items()}, path)
    metrics = ClipMetrics(str(path))
    prediction, target = clips(2)
    with torch.autocast("cpu", torch.bfloat16):
        values = metrics(prediction, target)
    assert metrics.names == ("psnr", "ssim", "lpips")
    assert not metrics.unavailable
    expected = LPIPS(path)(prediction.clamp(-1, 1), target).view(2, 2).mean(1)
    torch.testing.assert_close(values["lpips"], expected)
    assert not metrics.state_dict()
    assert not list(metrics.parameters())


@pytest.mark.usefixtures("no_backbone")
def test_running_mean_counts_each_clip_once_until_reset() -> None:
    metrics = ClipMetrics()
    parts = [metrics(*clips(batch, seed)) for seed, batch in enumerate((3, 1))]
    for values in parts:
        metrics.update(values)
    torch.testing.assert_close(metrics.compute()["psnr"], torch.cat([values["psnr"] for values in parts]).mean())
    metrics.reset()
    metrics.update(parts[1])
    torch.testing.assert_close(metrics.compute()["psnr"], parts[1]["psnr"][0])


@pytest.mark.usefixtures("no_backbone")
def test_a_nan_is_not_left_out_of_the_mean() -> None:
    metrics = ClipMetrics()
    metrics.update({"psnr": torch.tensor([20.0, torch.nan]), "ssim": torch.tensor([0.5, 0.7])})
    assert metrics.compute()["psnr"].isnan()
    assert metrics.compute()["ssim"].item() == pytest.approx(0.6)
