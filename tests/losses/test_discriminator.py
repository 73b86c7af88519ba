"""PatchGAN discriminators."""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from vidtwin.errors import UserError
from vidtwin.layers.conv3d import norm_groups
from vidtwin.losses import (
    BlurPoolDiscriminator3d,
    PatchDiscriminator2d,
    PatchDiscriminator3d,
    SpectralDiscriminator2d,
)
from vidtwin.losses.discriminator import BlurPool3d, Norm


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


def test_a_discriminator_has_the_groups_of_any_other_network() -> None:
    for channels in (2, 4, 6, 12, 24, 64):
        norms = [m for m in PatchDiscriminator2d(channels).modules() if isinstance(m, nn.GroupNorm)]
        assert [norm.num_groups for norm in norms] == [norm_groups(norm.num_channels) for norm in norms]


def test_blur_pooling_is_the_filter_at_every_second_place() -> None:
    x = torch.randn(2, 3, 5, 6, 7, dtype=torch.float64)
    found = BlurPool3d()(x)
    assert found.shape == (2, 3, 3, 3, 4)
    taps = {-1: 0.25, 0: 0.5, 1: 0.25}
    for place in itertools.product(range(3), range(3), range(4)):
        wanted = torch.zeros(2, 3, dtype=torch.float64)
        for offsets in itertools.product(taps, repeat=3):
            near = [min(max(2 * p + o, 0), n - 1) for p, o, n in zip(place, offsets, x.shape[2:], strict=True)]
            wanted += math.prod(taps[o] for o in offsets) * x[:, :, near[0], near[1], near[2]]
        torch.testing.assert_close(found[:, :, place[0], place[1], place[2]], wanted)


def blurred(x: torch.Tensor) -> torch.Tensor:
    taps = torch.tensor([0.25, 0.5, 0.25], dtype=x.dtype)
    for axis in (2, 3, 4):
        shape = [3 if each == axis else 1 for each in range(5)]
        padding = [0] * 6
        padding[2 * (4 - axis)] = padding[2 * (4 - axis) + 1] = 1
        kernel = taps.view(shape[2:]).expand(x.shape[1], 1, *shape[2:])
        stride = [2 if each == axis else 1 for each in (2, 3, 4)]
        x = F.conv3d(F.pad(x, padding, mode="replicate"), kernel, stride=stride, groups=x.shape[1])
    return x


def test_magvits_discriminator_is_the_formula() -> None:
    torch.manual_seed(0)
    discriminator = BlurPoolDiscriminator3d(num_frames=4, resolution=40, channels=4).double()
    clip = torch.randn(2, 3, 4, 40, 40, dtype=torch.float64)
    w = dict(discriminator.named_parameters())

    def conv(x: torch.Tensor, name: str) -> torch.Tensor:
        weight = w[f"{name}.weight"]
        return F.conv3d(x, weight, w.get(f"{name}.bias"), padding=weight.shape[-1] // 2)

    def leaky(x: torch.Tensor) -> torch.Tensor:
        return torch.where(x > 0, x, 0.2 * x)

    x = leaky(conv(clip, "conv_in"))
    for index in range(5):
        inner = blurred(leaky(conv(x, f"blocks.{index}.conv1")))
        inner = leaky(conv(inner, f"blocks.{index}.conv2"))
        x = (conv(blurred(x), f"blocks.{index}.shortcut") + inner) / 2**0.5
        torch.testing.assert_close(discriminator.blocks[: index + 1](leaky(conv(clip, "conv_in"))), x)
    x = leaky(conv(x, "conv_out")).flatten(1)
    x = leaky(x @ w["linear1.weight"].T + w["linear1.bias"])
    torch.testing.assert_close(discriminator(clip), x @ w["linear2.weight"].T + w["linear2.bias"])


@pytest.mark.parametrize(("frames", "side", "left"), [(16, 224, 7 * 7), (17, 128, 4 * 4), (4, 40, 2 * 2)])
def test_magvits_discriminator_halves_five_times_and_gives_one_logit_per_clip(
    frames: int, side: int, left: int
) -> None:
    with torch.device("meta"):
        discriminator = BlurPoolDiscriminator3d(frames, side)
        widths = [block.conv1.out_channels for block in discriminator.blocks]
        assert widths == [256, 512, 512, 512, 512]
        assert discriminator.linear1.in_features == 512 * left
        assert discriminator(torch.empty(2, 3, frames, side, side)).shape == (2, 1)
        with pytest.raises(UserError, match=r"discriminator\.num_frames and \.resolution"):
            discriminator(torch.empty(2, 3, frames, side + 1, side))


def test_ivideogpts_discriminator_has_its_published_size_and_judges_each_frame_alone() -> None:
    discriminator = SpectralDiscriminator2d()
    assert sum(p.numel() for p in discriminator.parameters()) == 1_551_489
    clip = torch.rand(2, 3, 3, 64, 64)
    discriminator(clip)  # a power iteration
    discriminator.eval()
    logits = discriminator(clip)
    assert logits.shape == (6, 1, 4, 4)
    torch.testing.assert_close(logits[4:5], discriminator(clip[1:, :, 1:2]), rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match="at least 17 px"):
        discriminator(clip[..., :16, :16])


def test_ivideogpts_discriminator_is_the_formula() -> None:
    torch.manual_seed(0)
    discriminator = SpectralDiscriminator2d(channels=4, num_layers=3).double().eval()
    clip = torch.randn(2, 3, 3, 32, 24, dtype=torch.float64)
    convolutions = [layer for layer in discriminator.main if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 4
    x = clip.transpose(1, 2).flatten(0, 1)
    for index, layer in enumerate(convolutions[:-1]):
        x = F.conv2d(x, layer.weight, layer.bias, stride=2, padding=1)
        if index > 0:
            mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), correction=0, keepdim=True)
            x = (x - mean) / (variance + 1e-5).sqrt()
        x = torch.where(x > 0, x, 0.2 * x)
    torch.testing.assert_close(discriminator(clip), F.conv2d(x, convolutions[-1].weight, convolutions[-1].bias))


def test_spectral_norm_keeps_every_layer_at_a_largest_singular_value_of_one() -> None:
    discriminator = SpectralDiscriminator2d(channels=4, num_layers=2)
    for _ in range(50):
        discriminator(torch.rand(1, 3, 1, 16, 16))
    layers = [m for m in discriminator.main if isinstance(m, nn.Conv2d)][:-1]
    norms = [float(torch.linalg.matrix_norm(layer.weight.detach().flatten(1), 2)) for layer in layers]
    assert norms == pytest.approx([1.0, 1.0], rel=1e-3)


def test_magvits_discriminator_distinguishes_clips_from_the_start() -> None:
    torch.manual_seed(0)
    discriminator = BlurPoolDiscriminator3d(16, 64, channels=16)
    logits = discriminator(torch.rand(6, 3, 16, 64, 64) * torch.linspace(-1, 1, 6).view(6, 1, 1, 1, 1))
    assert logits.std() > 1e-2
    assert all(
        layer.bias.abs().max() == 0 for layer in discriminator.modules() if getattr(layer, "bias", None) is not None
    )


@pytest.mark.parametrize("make", [lambda: PatchDiscriminator3d(16, 2), lambda: BlurPoolDiscriminator3d(8, 32, 16)])
def test_a_3d_discriminator_in_bfloat16_has_the_gradient_of_float32(make: Callable[[], nn.Module]) -> None:
    """Its last layers see two frames."""
    torch.manual_seed(0)
    discriminator, clip = make(), torch.rand(2, 3, 8, 32, 32) * 2 - 1
    weights = [p for p in discriminator.parameters() if p.ndim == 5]
    gradients = []
    for enabled in (False, True):
        torch.full((5000, 77), torch.nan)  # memory that a kernel may leave as it is
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            logits = discriminator(clip)
        gradients.append(torch.autograd.grad(logits.float().square().sum(), weights))
    for plain, ours in zip(*gradients, strict=True):
        assert (ours - plain).norm() < 0.1 * plain.norm()
