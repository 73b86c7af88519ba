"""PatchGAN discriminators."""

import pytest
import torch
from torch import nn

from vidtwin.losses import PatchDiscriminator2d, PatchDiscriminator3d
from vidtwin.losses.discriminator import Norm


def test_released_size() -> None:
    assert sum(p.numel() for p in PatchDiscriminator2d(norm="batch").parameters()) == 2_765_633


def test_released_initial_values() -> None:
    torch.manual_seed(0)
    main = PatchDiscriminator2d(norm="batch").main
    assert main[8].weight.std().item() == pytest.approx(0.02, rel=0.01)
    assert main[9].weight.mean().item() == pytest.approx(1.0, abs=0.01)
    assert main[9].weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert [main[i].bias is None for i in (0, 2, 5, 8, 11)] == [False, True, True, True, False]


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
def test_2d_judges_each_frame_alone(norm: Norm) -> None:
    discriminator = PatchDiscriminator2d(channels=8, norm=norm).eval()
    clip = torch.randn(2, 3, 3, 32, 32)
    logits = discriminator(clip)
    assert logits.shape == (6, 1, 2, 2)
    torch.testing.assert_close(logits[4:5], discriminator(clip[1:, :, 1:2]))


@pytest.mark.parametrize(("num_frames", "left"), [(1, 1), (5, 1), (16, 2), (17, 3)])
def test_3d_takes_clips_of_any_length(num_frames: int, left: int) -> None:
    logits = PatchDiscriminator3d(channels=4)(torch.randn(1, 3, num_frames, 32, 32))
    assert logits.shape == (1, 1, left, 2, 2)


def test_group_norm_keeps_the_clips_of_a_batch_apart_in_training() -> None:
    discriminator = PatchDiscriminator3d(channels=8)
    assert any(isinstance(m, nn.GroupNorm) for m in discriminator.modules())
    clip = torch.randn(2, 3, 4, 32, 32)
    torch.testing.assert_close(discriminator(clip)[:1], discriminator(clip[:1]), rtol=1e-4, atol=1e-5)
