"""VQGAN's layers against their rules written out."""

import math

import pytest
import torch
import torch.nn.functional as F

from vidtwin.errors import UserError
from vidtwin.layers.vqgan import Decoder, Downsample, Encoder, PixelAttention, ResidualBlock, Upsample


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


def maps(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def test_halving_pads_right_and_bottom_only():
    layer, x = Downsample(2).double(), maps(1, 2, 6, 8)
    out = layer(x)
    assert out.shape == (1, 2, 3, 4)
    weight, bias = layer.conv.weight, layer.conv.bias
    for row in range(3):
        for column in range(4):
            wanted = bias.clone()
            for i in range(3):
                for j in range(3):
                    y, x_ = 2 * row + i, 2 * column + j
                    if y < 6 and x_ < 8:  # what lies outside on the left and above is never read
                        wanted = wanted + weight[:, :, i, j] @ x[0, :, y, x_]
            torch.testing.assert_close(out[0, :, row, column], wanted)


def test_doubling_repeats_each_pixel_before_the_convolution():
    layer, x = Upsample(2).double(), maps(2, 2, 3, 4)
    repeated = x.repeat_interleave(2, 2).repeat_interleave(2, 3)
    torch.testing.assert_close(layer(x), F.conv2d(repeated, layer.conv.weight, layer.conv.bias, padding=1))


@pytest.mark.parametrize("width_out", [8, 4])
def test_a_residual_block_adds_its_raw_input_through_a_convolution_only_where_the_width_changes(width_out):
    block, x = ResidualBlock(8, width_out, 4).double(), maps(2, 8, 3, 3)

    def step(y, norm, conv):
        grouped = y.reshape(2, 4, -1)
        centred = grouped - grouped.mean(2, keepdim=True)
        y = (centred / (centred.square().mean(2, keepdim=True) + 1e-6).sqrt()).view_as(y)
        y = y * norm.weight[:, None, None] + norm.bias[:, None, None]
        return F.conv2d(y * y.sigmoid(), conv.weight, conv.bias, padding=1)

    wanted = step(step(x, block.norm1, block.conv1), block.norm2, block.conv2)
    if width_out == 8:
        assert block.conv_shortcut is None
        wanted = wanted + x
    else:
        wanted = wanted + F.conv2d(x, block.conv_shortcut.weight, block.conv_shortcut.bias)
    torch.testing.assert_close(block(x), wanted)


def test_attention_among_pixels_is_one_softmax_over_all_of_them():
    layer, x = PixelAttention(8, 4).double(), maps(2, 8, 2, 3)
    pixels = layer.group_norm(x).flatten(2).transpose(1, 2)
    q, k, v = layer.to_q(pixels), layer.to_k(pixels), layer.to_v(pixels)
    mixed = (q @ k.transpose(1, 2) / math.sqrt(8)).softmax(2) @ v
    wanted = x + layer.to_out(mixed).transpose(1, 2).reshape(x.shape)
    torch.testing.assert_close(layer(x), wanted)


@pytest.mark.parametrize("attention", [False, True])
def test_encoder_and_decoder_mirror_each_other(attention):
    channels = (4, 8, 12)
    encoder = Encoder(channels, 5, 1, 4, attention)
    decoder = Decoder(channels, 5, 2, 4, attention)
    z, down = encoder(torch.randn(2, 3, 16, 16))
    assert z.shape == (2, 5, 4, 4)
    assert [tuple(level.shape[1:]) for level in down] == [(4, 8, 8), (8, 4, 4), (12, 4, 4)]
    frames, up = decoder(z)
    assert frames.shape == (2, 3, 16, 16)
    assert [tuple(level.shape[1:]) for level in up] == [(12, 4, 4), (12, 8, 8), (8, 16, 16), (4, 16, 16)]
    assert len(encoder.mid_block.attentions) == len(decoder.mid_block.attentions) == int(attention)


def test_levels_recomputed_in_the_backward_pass_give_the_same_gradients():
    frames = torch.randn(1, 3, 8, 8)
    encoder, again = Encoder((4, 8), 3, 1, 4, True), Encoder((4, 8), 3, 1, 4, True, activation_checkpointing=True)
    decoder, back = Decoder((4, 8), 3, 1, 4, True), Decoder((4, 8), 3, 1, 4, True, activation_checkpointing=True)
    again.load_state_dict(encoder.state_dict())
    back.load_state_dict(decoder.state_dict())
    for first, second in ((encoder, decoder), (again, back)):
        second(first(frames)[0])[0].square().sum().backward()
    for plain, recomputed in ((encoder, again), (decoder, back)):
        for wanted, found in zip(plain.parameters(), recomputed.parameters(), strict=True):
            torch.testing.assert_close(found.grad, wanted.grad)


def test_groups_that_do_not_divide_a_width_are_refused():
    with pytest.raises(UserError, match="multiples of norm_groups, got 6 and 4"):
        Encoder((4, 6), 3, 1, 4, False)
