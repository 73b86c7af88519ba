"""PSNR and SSIM against scikit-image and the released code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.metrics import psnr, ssim


@pytest.fixture
def clips() -> tuple[Tensor, Tensor]:
    torch.manual_seed(0)
    target = torch.rand(2, 3, 3, 24, 32, dtype=torch.float64) * 2 - 1
    return target + 0.4 * torch.randn_like(target), target


def frames(clip: Tensor) -> list[np.ndarray]:
    """(B, 3, T, H, W) in [-1, 1] → (H, W, 3) in [0, 1], batch by batch."""
    return [frame.numpy() for frame in (clip.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 4, 1).flatten(0, 1)]


def test_golden(shared: Path) -> None:
    tensors = load_file(shared / "golden/golden_loss.safetensors")
    values = json.loads((shared / "golden/golden_loss.json").read_text())["values"]
    assert psnr(tensors["rec"], tensors["input"]).mean().item() == pytest.approx(values["psnr"], rel=1e-6)
    assert ssim(tensors["rec"].double(), tensors["input"].double()).mean().item() == pytest.approx(
        values["ssim"], rel=1e-5
    )


def test_psnr_is_scikit_images(clips: tuple[Tensor, Tensor]) -> None:
    expected = [peak_signal_noise_ratio(y, x, data_range=1.0) for x, y in zip(*map(frames, clips), strict=True)]
    torch.testing.assert_close(psnr(*clips).flatten(), torch.tensor(expected), rtol=1e-5, atol=0)


def test_ssim_is_scikit_images(clips: tuple[Tensor, Tensor]) -> None:
    expected = [
        structural_similarity(
            y, x, data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
        )
        for x, y in zip(*map(frames, clips), strict=True)
    ]
    torch.testing.assert_close(ssim(*clips).flatten(), torch.tensor(expected), rtol=1e-6, atol=0)


def test_equal_clips_have_80_db_and_similarity_1(clips: tuple[Tensor, Tensor]) -> None:
    _, target = clips
    torch.testing.assert_close(psnr(target, target), torch.full((2, 3), 80.0, dtype=torch.float64))
    torch.testing.assert_close(ssim(target, target), torch.ones(2, 3, dtype=torch.float64))


def test_large_frames_are_pooled_before_ssim() -> None:
    target = torch.rand(1, 3, 1, 400, 420) * 2 - 1
    prediction = (target + 0.3 * torch.randn_like(target)).clamp(-1, 1)
    halves = [torch.nn.functional.avg_pool3d(clip, (1, 2, 2)) for clip in (prediction, target)]
    torch.testing.assert_close(ssim(prediction, target), ssim(*halves))


def test_wrong_shapes_are_named() -> None:
    clip = torch.zeros(1, 3, 2, 16, 16)
    with pytest.raises(UserError, match=r"one shape, got \(1, 3, 2, 16, 16\) and \(1, 3, 1, 16, 16\)"):
        psnr(clip, clip[:, :, :1])
    with pytest.raises(UserError, match="at least 11x11"):
        ssim(clip[..., :8], clip[..., :8])
