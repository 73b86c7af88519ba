"""PSNR, SSIM and MS-SSIM against scikit-image, torchmetrics and the released code."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.ndimage import gaussian_filter
from skimage.metrics import peak_signal_noise_ratio, structural_similarity
from torch import Tensor
from torchmetrics.functional.image import multiscale_structural_similarity_index_measure

from vidtwin.errors import UserError
from vidtwin.metrics import ms_ssim, mse, psnr, ssim
from vidtwin.metrics.frames import SSIMVariant, ms_ssim_unavailable


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


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_uniform_ssim_is_scikit_images_default(clips: tuple[Tensor, Tensor], dtype: torch.dtype) -> None:
    expected = [
        structural_similarity(y, x, data_range=1.0, channel_axis=2) for x, y in zip(*map(frames, clips), strict=True)
    ]
    given = (clip.to(dtype) for clip in clips)
    torch.testing.assert_close(
        ssim(*given, variant="uniform7").flatten().double(), torch.tensor(expected).double(), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("variant", ["gaussian", "uniform7"])
def test_ssim_of_8_bit_values_is_scikit_images_of_uint8(variant: SSIMVariant) -> None:
    rng = np.random.default_rng(0)
    target = rng.integers(0, 256, (2, 24, 32, 3), dtype=np.uint8)
    prediction = np.clip(target + rng.normal(0, 20, target.shape), 0, 255).astype(np.uint8)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False} if variant == "gaussian" else {}
    expected = [
        structural_similarity(y, x, channel_axis=-1, **settings) for x, y in zip(prediction, target, strict=True)
    ]
    x, y = (torch.from_numpy(z).permute(3, 0, 1, 2)[None] / 127.5 - 1 for z in (prediction, target))
    torch.testing.assert_close(
        ssim(x, y, variant)[0].double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
    )


def test_gaussian_ssim_pools_no_frames() -> None:
    torch.manual_seed(0)
    target = torch.linspace(-1, 1, 420, dtype=torch.float64).expand(1, 3, 1, 400, 420)
    prediction = target + 0.3 * torch.randn_like(target)
    (x,), (y,) = frames(prediction), frames(target)
    expected = structural_similarity(
        y, x, data_range=1.0, channel_axis=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False
    )
    assert ssim(prediction, target, "gaussian").item() == pytest.approx(expected, rel=1e-6)
    assert ssim(prediction, target).item() > 1.5 * expected  # pooling averages the noise away


def test_large_frames_are_taken_a_few_at_once(monkeypatch: pytest.MonkeyPatch, clips: tuple[Tensor, Tensor]) -> None:
    expected = ssim(*clips)
    monkeypatch.setattr("vidtwin.metrics.frames._NUMBERS_AT_ONCE", 2 * 3 * 24 * 32)
    torch.testing.assert_close(ssim(*clips), expected, rtol=1e-12, atol=0)


def test_psnr_of_a_clip_is_that_of_one_mse(clips: tuple[Tensor, Tensor]) -> None:
    prediction, target = (clip.numpy().clip(-1, 1) / 2 + 0.5 for clip in clips)
    expected = [peak_signal_noise_ratio(y, x, data_range=1.0) for x, y in zip(prediction, target, strict=True)]
    torch.testing.assert_close(psnr(*clips, over="clip", epsilon=0.0), torch.tensor(expected), rtol=1e-12, atol=0)
    assert (psnr(*clips, over="clip") <= psnr(*clips).mean(1)).all()
    torch.testing.assert_close(
        mse(*clips), torch.tensor([np.square(x - y).mean() for x, y in zip(prediction, target, strict=True)])
    )


def test_psnr_without_an_epsilon_ends_at_100_db(clips: tuple[Tensor, Tensor]) -> None:
    _, target = clips
    for over in ("frame", "clip"):
        assert (psnr(target, target, over=over, epsilon=0.0) == 100.0).all()
    prediction = target.clone()
    prediction[0, 0, 0, 0, 0] *= 1 - 1e-6
    assert (psnr(prediction, target, epsilon=0.0) <= 100.0).all()


def test_ms_ssim_is_torchmetrics() -> None:
    torch.manual_seed(0)
    target = torch.nn.functional.avg_pool3d(torch.rand(2, 3, 2, 190, 180), (1, 5, 5), 1) * 2 - 1
    prediction = target + torch.tensor([0.05, 1.0]).view(2, 1, 1, 1, 1) * torch.randn_like(target)
    x, y = ((z.clamp(-1, 1) / 2 + 0.5).transpose(1, 2).flatten(0, 1) for z in (prediction, target))
    theirs = multiscale_structural_similarity_index_measure(x, y, data_range=1.0, reduction="none")
    torch.testing.assert_close(ms_ssim(prediction, target).flatten(), theirs, rtol=0, atol=1e-5)
    torch.testing.assert_close(ms_ssim(target, target), torch.ones(2, 2))


def test_ms_ssim_is_the_product_of_scikit_images_parts() -> None:
    torch.manual_seed(0)
    target = torch.nn.functional.avg_pool3d(torch.rand(1, 3, 1, 180, 184), (1, 5, 5), 1).double() * 2 - 1
    prediction = target + 0.3 * torch.randn_like(target)
    settings = {"gaussian_weights": True, "sigma": 1.5, "use_sample_covariance": False, "full": True}
    (x,), (y,) = frames(prediction), frames(target)
    expected = 1.0
    for scale, weight in enumerate((0.0448, 0.2856, 0.3001, 0.2363, 0.1333)):
        similarity = structural_similarity(y, x, data_range=1.0, channel_axis=2, **settings)[1]
        if scale == 4:
            # Reflected about the pixel at the border, as torchmetrics does; scikit-image repeats that pixel.
            padded = [np.pad(z, ((5, 5), (5, 5), (0, 0)), mode="reflect") for z in (x, y)]
            similarity = structural_similarity(*padded, data_range=1.0, channel_axis=2, **settings)[1]
            part = similarity[5:-5, 5:-5].mean()
        else:
            mean_x, mean_y = (gaussian_filter(z, 1.5, truncate=3.5, axes=(0, 1)) for z in (x, y))
            luminance = (2 * mean_x * mean_y + 1e-4) / (mean_x**2 + mean_y**2 + 1e-4)
            part = (similarity / luminance)[5:-5, 5:-5].mean()
        expected *= part**weight
        x, y = (
            z[: len(z) // 2 * 2, : z.shape[1] // 2 * 2].reshape(len(z) // 2, 2, z.shape[1] // 2, 2, 3).mean((1, 3))
            for z in (x, y)
        )
    assert ms_ssim(prediction, target).item() == pytest.approx(expected, rel=1e-6)


def test_small_frames_have_no_ms_ssim_and_it_says_why() -> None:
    clip = torch.zeros(1, 3, 1, 200, 175)
    assert ms_ssim_unavailable(176, 176) is None
    assert "at least 176x176 pixels for MS-SSIM" in str(ms_ssim_unavailable(200, 175))
    with pytest.raises(UserError, match=r"176x176.*\(200, 175\)"):
        ms_ssim(clip, clip)


def test_wrong_variants_are_named() -> None:
    clip = torch.zeros(1, 3, 2, 16, 16)
    with pytest.raises(UserError, match=r"gaussian_pooled, gaussian, uniform7, got 'box'"):
        ssim(clip, clip, "box")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="frame, clip, got 'video'"):
        psnr(clip, clip, over="video")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="at least 0 for PSNR, got -1"):
        psnr(clip, clip, epsilon=-1)
    with pytest.raises(UserError, match="at least 7x7"):
        ssim(clip[..., :6], clip[..., :6], "uniform7")
