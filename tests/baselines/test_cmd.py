"""CMD against loops over pixels, patches and frames, and against the exact figures of its released sizes."""

import copy
import itertools
from fractions import Fraction
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional as F

from vidtwin.baselines.cmd import CMD, Block
from vidtwin.errors import UserError
from vidtwin.layers.patches import patchify
from vidtwin.testing import check_autoencoder

CONFIGS = Path(__file__).resolve().parents[2] / "configs"
FRAMES, SIDE, PATCH, CHANNELS = 3, 8, 4, 2
SIZES = {
    "num_frames": FRAMES,
    "resolution": SIDE,
    "patch_size": PATCH,
    "motion_channels": CHANNELS,
    "hidden_size": 8,
    "depth": 1,
    "num_heads": 2,
}


def build(**changes):
    """In double precision, every weight large and random: none is so small that it hides a term."""
    torch.manual_seed(0)
    model = CMD(**{**SIZES, **changes}).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.2)
    return model


@pytest.fixture
def model():
    return build()


@pytest.fixture
def clip():
    return torch.rand(2, 3, FRAMES, SIDE, SIDE, generator=torch.Generator().manual_seed(1), dtype=torch.float64) * 2 - 1


@torch.no_grad()
def features(model, clip):
    """The encoder's output (B, T, h, w, C), for the loops."""
    tokens = model.encoder(model.patch_embed(patchify(clip, PATCH)))
    return tokens.unflatten(2, (SIDE // PATCH, SIDE // PATCH))


@torch.no_grad()
def pixels(conv, grid):
    """A transposed convolution of kernel = stride = patch, pixel by pixel: (B, T, h, w, C) → (B, 3, T, H, W)."""
    out = torch.empty(len(grid), 3, FRAMES, SIDE, SIDE, dtype=grid.dtype)
    for b, c, t, y, x in itertools.product(*map(range, out.shape)):
        vector = grid[b, t, y // PATCH, x // PATCH]
        out[b, c, t, y, x] = vector @ conv.weight[:, c, y % PATCH, x % PATCH] + conv.bias[c]
    return out


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"patch_size": 16, "motion_channels": 32}, 48_557_638),
        ({"patch_size": 8, "motion_channels": 8}, 47_635_990),
        ({"patch_size": 2, "motion_channels": 8, "resolution": 64}, 47_359_510),
    ],
)
def test_the_parameters_are_those_of_the_released_model_and_the_position_tables(arguments, count):
    with torch.device("meta"):
        model = CMD(**arguments)
    places = (model.resolution // arguments["patch_size"]) ** 2
    tables = 2 * (16 + places) * 384
    assert sum(p.numel() for p in model.parameters()) == count + tables


@pytest.mark.parametrize(
    ("arguments", "rate", "length"),
    [
        ({}, Fraction(23, 336), 28),
        ({"patch_size": 4, "motion_channels": 8}, Fraction(23, 336), 112),
        ({"patch_size": 8, "motion_channels": 8}, Fraction(11, 168), 56),
    ],
)
def test_the_rate_of_the_tensors_is_the_papers_at_full_size(arguments, rate, length):
    with torch.device("meta"):
        model, clip = CMD(**arguments).eval(), torch.empty(1, 3, 16, 224, 224)
        latents = model.encode(clip).mode()
        assert model.decode(latents).shape == clip.shape
    channels = arguments.get("motion_channels", 32)
    assert {name: tuple(latent.shape) for name, latent in latents.items()} == {
        "content": (1, 3, 224, 224),
        "motion": (1, channels, 16, length),
    }
    assert Fraction(sum(latent.numel() for latent in latents.values()), clip.numel()) == rate
    assert model.compression_rate(clip.shape[1:]) == pytest.approx(float(rate))


def test_the_tiny_configs_model_is_as_large_as_the_demos():
    arguments = yaml.safe_load((CONFIGS / "baselines/cmd_tiny.yaml").read_text())["model"]["autoencoder"]["init_args"]
    with torch.device("meta"):
        model = CMD(**arguments)
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(1_506_392, rel=0.04)


def test_the_content_frame_weighs_each_pixel_and_channel_over_time(model, clip):
    logits = pixels(model.to_logits.conv, features(model, clip))
    expected = torch.zeros(2, 3, SIDE, SIDE, dtype=torch.float64)
    for b, c, y, x in itertools.product(*map(range, expected.shape)):
        powers = [logits[b, c, t, y, x].exp() for t in range(FRAMES)]
        for t in range(FRAMES):
            expected[b, c, y, x] += powers[t] / sum(powers) * clip[b, c, t, y, x]
    content = model.encode(clip).mode()["content"]
    torch.testing.assert_close(content, expected)
    assert (content - clip.mean(2)).abs().max() > 0.1  # the weights of this model are far from equal


def test_the_content_frame_stays_between_the_darkest_and_the_brightest_value_of_its_pixel(clip):
    model = build()
    with torch.no_grad():
        model.to_logits.conv.weight.mul_(100)
    content = model.encode(clip).mode()["content"]
    assert (content >= clip.amin(2) - 1e-12).all()
    assert (content <= clip.amax(2) + 1e-12).all()


def test_the_motion_latent_is_the_bounded_projection_of_two_profiles_width_first(model, clip):
    grid = features(model, clip).permute(0, 4, 1, 2, 3)  # (B, C, T, h, w)
    halves = []
    for axis, linear in ((3, model.to_motion_width), (4, model.to_motion_height)):
        profile = sum(grid.unbind(axis)) / grid.shape[axis]
        halves.append(F.conv2d(profile, linear.weight[:, :, None, None], linear.bias))
    motion = model.encode(clip).mode()["motion"]
    torch.testing.assert_close(motion, torch.tanh(torch.cat(halves, 3)))


def test_the_motion_latent_stays_within_one_whatever_the_encoder_says(clip):
    model = build()
    with torch.no_grad():
        model.to_motion_width.weight.mul_(1000)
    motion = model.encode(clip).mode()["motion"]
    assert motion.abs().max() <= 1
    assert motion.abs().max() > 0.999


def test_nothing_is_random_and_nothing_is_regularized(model, clip):
    encoding = model.train().encode(clip)
    for name, sample in encoding.sample().items():
        assert torch.equal(sample, encoding.mode()[name])
    assert encoding.regularization() == {}


@torch.no_grad()
def test_the_decoder_sums_content_width_and_height_at_each_place(model, clip):
    latents = model.encode(clip).mode()
    seen = []
    model.decoder.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    model.decode(latents)
    content, motion, grid = latents["content"], latents["motion"], SIDE // PATCH
    summed = seen[0].unflatten(2, (grid, grid))
    for b, t, i, j in itertools.product(range(2), range(FRAMES), range(grid), range(grid)):
        patch = content[b, :, i * PATCH : (i + 1) * PATCH, j * PATCH : (j + 1) * PATCH]
        expected = model.from_content.weight @ patch.reshape(-1) + model.from_content.bias
        expected = expected + model.from_motion_width.weight @ motion[b, :, t, j] + model.from_motion_width.bias
        expected = expected + model.from_motion_height.weight @ motion[b, :, t, grid + i]
        expected = expected + model.from_motion_height.bias
        torch.testing.assert_close(summed[b, t, i, j], expected)


@torch.no_grad()
def test_pixels_are_twice_the_sigmoid_less_one_of_a_transposed_convolution(model, clip):
    seen = []
    model.decoder.register_forward_hook(lambda _, __, out: seen.append(out))
    decoded = model(clip).clip
    logits = pixels(model.to_pixels.conv, seen[0].unflatten(2, (SIDE // PATCH, SIDE // PATCH)))
    torch.testing.assert_close(decoded, 2 * torch.sigmoid(logits) - 1)
    assert model.last_layer is model.to_pixels.conv.weight


@torch.no_grad()
def test_a_block_attends_over_time_then_over_space_then_gates_each_behind_a_norm():
    torch.manual_seed(0)
    block, x = Block(12, 3).double(), torch.randn(2, 3, 4, 12, dtype=torch.float64)
    for parameter in block.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=0.3)

    def normed(norm, x):
        deviation = x - x.mean(-1, keepdim=True)
        return deviation / (deviation.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight + norm.bias

    def attended(attention, x):  # torch's own layer, with these weights
        reference = nn.MultiheadAttention(12, 3, batch_first=True).double()
        reference.in_proj_weight.copy_(attention.qkv.weight)
        reference.in_proj_bias.copy_(attention.qkv.bias)
        reference.out_proj.load_state_dict(attention.proj.state_dict())
        return reference(x, x, x, need_weights=False)[0]

    out = x.clone()
    over_time = normed(block.temporal_norm, out)
    for patch in range(4):
        out[:, :, patch] += attended(block.temporal_attention, over_time[:, :, patch])
    over_space = normed(block.spatial_norm, out)
    for frame in range(3):
        out[:, frame] += attended(block.spatial_attention, over_space[:, frame])
    expand, reduce = block.mlp.expand, block.mlp.reduce
    hidden = normed(block.mlp_norm, out) @ expand.weight.T + expand.bias
    gate = hidden[..., 48:]
    gate = gate * 0.5 * (1 + torch.erf(gate / 2**0.5))
    out = out + (hidden[..., :48] * gate) @ reduce.weight.T + reduce.bias
    torch.testing.assert_close(block(x), out)


@torch.no_grad()
def test_the_order_of_the_frames_matters_and_only_by_the_position_tables(model, clip):
    order = [2, 0, 1]

    def moved():
        latents, permuted = model.encode(clip).mode(), model.encode(clip[:, :, order]).mode()
        return (permuted["motion"] - latents["motion"][:, :, order]).abs().max()

    assert moved() > 1e-3
    model.encoder.time.zero_()
    assert moved() < 1e-12  # as in the released code


@torch.no_grad()
def test_a_latent_that_is_left_out_adds_nothing(model, clip):
    latents = model.encode(clip).mode()
    for name, silent in {
        "content": (model.from_motion_width, model.from_motion_height),
        "motion": (model.from_content,),
    }.items():
        alone = model.decode({name: latents[name]})
        kept = [copy.deepcopy(linear.state_dict()) for linear in silent]
        for parameter in itertools.chain(*(linear.parameters() for linear in silent)):
            parameter.zero_()
        torch.testing.assert_close(alone, model.decode(latents))
        for linear, state in zip(silent, kept, strict=True):
            linear.load_state_dict(state)
    assert alone.shape == clip.shape


def test_checkpointed_activations_give_the_same_gradients(clip):
    gradients = []
    for activation_checkpointing in (False, True):
        model = build(activation_checkpointing=activation_checkpointing, depth=2).train()
        (model(clip).clip - clip).abs().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(recomputed, plain)


def test_half_precision_comes_close(clip):
    model = build().float()
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        result = model(clip.float())
    expected = model.double()(clip)
    assert (result.clip - expected.clip).abs().max() < 0.1
    assert (result.latents["content"] - expected.latents["content"]).abs().max() < 0.1


def test_one_frame_of_one_patch_keeps_the_contract():
    check_autoencoder(CMD(**{**SIZES, "num_frames": 1, "patch_size": SIDE}), num_frames=1)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resolution": 10}, "Expected resolution divisible by patch_size, got 10 and 4"),
        ({"num_heads": 3}, "Expected a hidden size divisible by the number of heads, got 8 and 3"),
        ({"depth": 0}, "Expected depth of at least 1, got 0"),
        ({"motion_channels": -1}, "Expected motion_channels of at least 1, got -1"),
        ({"num_frames": 0}, "Expected num_frames of at least 1, got 0"),
    ],
)
def test_sizes_that_cannot_be_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        CMD(**{**SIZES, **changes})


def test_clips_and_latents_of_another_size_are_refused(model, clip):
    with pytest.raises(UserError, match=r"Expected a float clip of shape \(B, 3, 3, 8, 8\)"):
        model.encode(clip[:, :, :2])
    latents = model.encode(clip).mode()
    with pytest.raises(UserError, match=r"Expected latent motion of shape \(B, 2, 3, 4\), got \(2, 2, 3, 3\)"):
        model.decode({**latents, "motion": latents["motion"][..., :3]})
    with pytest.raises(UserError, match=r"Expected latent content of shape \(B, 3, 8, 8\)"):
        model.decode({"content": clip})
    for other in (latents["motion"][:1], latents["motion"].repeat(2, 1, 1, 1)):  # the first would be broadcast
        with pytest.raises(UserError, match=r"Expected latents of one batch, got .*content"):
            model.decode({**latents, "motion": other})
