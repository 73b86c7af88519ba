"""Causal convolutions, norms of single frames and depth to space against loops."""

import itertools

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from vidtwin.errors import UserError
from vidtwin.layers.conv3d import (
    CausalConv3d,
    Conv3d,
    DepthToSpace,
    FrameGroupNorm,
    ResidualBlock,
    channels_last,
    depth_to_space,
    norm_groups,
)


def noise(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def naive_convolution(x, conv, stride, front):
    """One number of the output at a time, over a volume that is zero outside of x."""
    (_, _, frames, height, width), side = x.shape, conv.kernel_size[1] // 2
    size = conv.kernel_size[0]
    shape = (
        (frames + front - size) // stride[0] + 1,
        (height + 2 * side - size) // stride[1] + 1,
        (width + 2 * side - size) // stride[2] + 1,
    )
    out = x.new_zeros(x.shape[0], conv.out_channels, *shape)
    for place in itertools.product(*map(range, shape)):
        total = torch.zeros_like(out[:, :, 0, 0, 0]) + (0 if conv.bias is None else conv.bias)
        for tap in itertools.product(range(size), repeat=3):
            t, h, w = (p * s + k - b for p, s, k, b in zip(place, stride, tap, (front, side, side), strict=True))
            if 0 <= t < frames and 0 <= h < height and 0 <= w < width:
                total = total + x[:, :, t, h, w] @ conv.weight[(..., *tap)].T
        out[(..., *place)] = total
    return out


@pytest.mark.parametrize(
    ("size", "stride", "front"),
    [(3, (1, 1, 1), None), (3, (2, 2, 2), None), (3, (2, 2, 2), 1), (3, (1, 2, 2), None), (1, (1, 1, 1), None)],
)
def test_a_causal_convolution_is_the_sum_over_what_came_before(size, stride, front):
    conv = CausalConv3d(2, 3, size, stride, bias=front is None, front=front).double()
    x = noise(2, 2, 4, 3, 4)
    torch.testing.assert_close(conv(x), naive_convolution(x, conv, stride, size - 1 if front is None else front))


@pytest.mark.parametrize(
    ("front", "frames", "steps"), [(None, 17, 9), (None, 9, 5), (None, 1, 1), (1, 16, 8), (1, 8, 4)]
)
def test_a_stride_of_two_halves_frames_with_or_without_one_of_its_own_for_the_first(front, frames, steps):
    conv = CausalConv3d(1, 1, stride=(2, 2, 2), front=front)
    assert conv(torch.zeros(1, 1, frames, 4, 4)).shape == (1, 1, steps, 2, 2)


@pytest.mark.parametrize(("front", "frames"), [(None, 7), (1, 6)])
def test_a_strided_convolution_does_not_see_beyond_its_group(front, frames):
    conv = CausalConv3d(2, 2, stride=(2, 2, 2), front=front).double()
    x = noise(1, 2, frames, 4, 4)
    for frame in range(frames):
        changed = x.clone()
        changed[:, :, frame] += 1
        same = (conv(changed) == conv(x)).all(dim=(0, 1, 3, 4))
        first = (frame + 1) // 2 if front is None else frame // 2
        assert same[:first].all()
        assert not same[first : first + 1].all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"kernel_size": 2}, "Expected an odd kernel_size of a causal convolution, got 2"),
        ({"front": 1}, "Expected 2 to 2 frames in front of a causal convolution of kernel 3 and stride 1, got 1"),
        ({"stride": (2, 1, 1), "front": 0}, "Expected 1 to 2 frames in front"),
        ({"front": 3}, "Expected 2 to 2 frames in front"),
    ],
)
def test_a_convolution_that_would_not_be_causal_is_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        CausalConv3d(2, 2, **arguments)


@pytest.mark.parametrize("affine", [True, False])
def test_each_frame_is_normalized_as_if_it_were_alone(affine):
    x = noise(2, 32, 5, 3, 4)
    norm = FrameGroupNorm(32, affine).double()
    reference = nn.GroupNorm(norm_groups(32), 32, affine=affine).double()
    if affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
        reference.load_state_dict(norm.state_dict())
    each = torch.stack([reference(x[:, :, frame]) for frame in range(5)], dim=2)
    torch.testing.assert_close(norm(x), each)
    torch.testing.assert_close(norm(channels_last(x)), each)


def test_there_are_32_groups_at_the_usual_widths_and_fewer_of_at_least_four_channels_below():
    assert {width: norm_groups(width) for width in (128, 256, 320, 512, 64, 48, 18, 12, 8, 3)} == {
        128: 32, 256: 32, 320: 32, 512: 32, 64: 16, 48: 8, 18: 2, 12: 2, 8: 2, 3: 1,
    }  # fmt: skip


@pytest.mark.parametrize("factors", [(2, 2, 2), (1, 2, 2), (3, 1, 2)])
def test_depth_to_space_moves_each_number_where_the_loop_does(factors):
    q, p, r = factors
    x = noise(2, 3 * q * p * r, 2, 3, 4)
    out = depth_to_space(x, factors)
    assert out.shape == (2, 3, 2 * q, 3 * p, 4 * r)
    for c, t, h, w in itertools.product(*map(range, out.shape[1:])):
        channel = ((c * q + t % q) * p + h % p) * r + w % r
        assert torch.equal(out[:, c, t, h, w], x[:, channel, t // q, h // p, w // r])


def test_depth_to_space_without_time_is_pixel_shuffle():
    x = noise(2, 12, 3, 4, 5)
    frames = torch.stack([F.pixel_shuffle(x[:, :, frame], 2) for frame in range(3)], dim=2)
    torch.testing.assert_close(depth_to_space(x, (1, 2, 2)), frames)


def test_depth_to_space_refuses_channels_that_do_not_divide():
    with pytest.raises(UserError, match=r"channels that 2·2·2 divides, got 12"):
        depth_to_space(noise(1, 12, 1, 1, 1), (2, 2, 2))


def test_upsampling_gives_one_frame_for_the_first_and_two_for_each_other_or_two_for_all():
    for drop, frames in ((1, 9), (0, 10)):
        up = DepthToSpace(2, (2, 2, 2), drop).double()
        x = noise(1, 2, 5, 2, 2)
        assert up(x).shape == (1, 2, frames, 4, 4)
        torch.testing.assert_close(
            up(x), depth_to_space(naive_convolution(x, up.conv, (1, 1, 1), 2), (2, 2, 2))[:, :, drop:]
        )
    with pytest.raises(UserError, match="Expected 0 to 0 dropped frames"):
        DepthToSpace(2, (1, 2, 2), drop=1)


@pytest.mark.parametrize("width_out", [8, 12])
def test_the_residual_block_is_its_formula_and_strictly_causal(width_out):
    block = ResidualBlock(8, width_out).double()
    x = noise(1, 8, 4, 3, 3)

    def swish_norm(y, norm):
        frames = [F.group_norm(y[:, :, t], norm.num_groups, norm.weight, norm.bias) for t in range(y.shape[2])]
        y = torch.stack(frames, dim=2)
        return y * torch.sigmoid(y)

    y = naive_convolution(swish_norm(x, block.norm1), block.conv1, (1, 1, 1), 2)
    y = naive_convolution(swish_norm(y, block.norm2), block.conv2, (1, 1, 1), 2)
    skip = x if width_out == 8 else torch.einsum("oi,bithw->bothw", block.shortcut.weight[..., 0, 0, 0], x)
    torch.testing.assert_close(block(x), skip + y)
    assert block.conv1.bias is None
    assert block.conv2.bias is None
    for frame in range(4):
        changed = x.clone()
        changed[:, :, frame] *= 3
        assert torch.equal(block(changed)[:, :, :frame], block(x)[:, :, :frame])
        assert not torch.equal(block(changed)[:, :, frame], block(x)[:, :, frame])


def test_the_order_in_memory_changes_no_number():
    block = nn.Sequential(ResidualBlock(8, 8), DepthToSpace(8, (2, 2, 2)), ResidualBlock(8, 12), CausalConv3d(12, 12))
    x = noise(1, 8, 2, 4, 4)
    torch.testing.assert_close(block.double()(channels_last(x)), block(x))


def test_norm_and_upsampling_keep_channels_last():
    x = channels_last(noise(2, 32, 5, 3, 4))
    for y in (FrameGroupNorm(32).double()(x), depth_to_space(x, (2, 2, 2))):
        assert y.is_contiguous(memory_format=torch.channels_last_3d)


@pytest.mark.parametrize("kernel", [(3, 3, 3), (3, 4, 4), (5, 3, 3)])
def test_few_frames_in_bfloat16_give_the_gradient_of_float32(kernel: tuple[int, int, int]) -> None:
    torch.manual_seed(0)
    layer = Conv3d(16, 16, kernel, padding=(kernel[0] // 2, 1, 1))
    gradients = []
    for enabled in (False, True):
        torch.full((5000, 77), torch.nan)  # memory that a kernel may leave as it is
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            y = layer(torch.linspace(-1, 1, 2 * 16 * 2 * 64).sin().reshape(2, 16, 2, 8, 8))
        (gradient,) = torch.autograd.grad(y.float().square().sum(), layer.weight)
        gradients.append(gradient)
    assert (gradients[1] - gradients[0]).norm() < 0.02 * gradients[0].norm()
