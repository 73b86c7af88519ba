"""MAGVIT-v2: exact sizes of the paper's layer table, strict causality, rates, codes."""

import math

import pytest
import torch
from torch.nn import functional as F

from vidtwin.baselines.magvit2 import MAGVIT2, AdaptiveGroupNorm
from vidtwin.errors import UserError
from vidtwin.layers.conv3d import CausalConv3d, DepthToSpace, ResidualBlock
from vidtwin.posteriors import Deterministic, DiagonalGaussian, Quantized

FULL = (3, 16, 224, 224)


def tiny(**arguments):
    torch.manual_seed(0)
    return MAGVIT2(**{"latent_channels": 6, "channels": 8, "multipliers": (1, 1, 2, 2), "num_blocks": 1} | arguments)


def noise(*shape, dtype=torch.float32):
    return torch.rand(shape, generator=torch.Generator().manual_seed(0), dtype=dtype) * 2 - 1


def full(**arguments):
    with torch.device("meta"):
        return MAGVIT2(**arguments)


def size(module):
    return sum(parameter.numel() for parameter in module.parameters())


def test_parameters_are_those_of_the_papers_layer_table():
    model = full()
    assert (size(model.encoder), size(model.decoder)) == (144_865_426, 225_682_051)
    assert size(model) == 370_547_477


def test_parameters_of_five_continuous_channels():
    model = full(latent_channels=5, quantizer="none")
    assert (size(model.encoder), size(model.decoder)) == (144_858_757, 225_462_403)
    # The Gaussian's last 1x1x1 convolution gives a log-variance for each mean: 512 weights and a bias each.
    assert size(full(latent_channels=5, quantizer="kl")) == 370_321_160 + 5 * (512 + 1)
    assert size(full(first_frame="prepend")) == 370_547_477


def rows(half):
    """(kind, channels in, channels out, strides or factors) of each layer, runs of equal blocks counted."""
    found = []
    for layer in half.layers:
        if isinstance(layer, ResidualBlock):
            row = ("res", layer.conv1.in_channels, layer.conv2.out_channels)
        elif isinstance(layer, AdaptiveGroupNorm):
            row = ("adagn", layer.norm.num_channels)
        elif isinstance(layer, DepthToSpace):
            row = ("up", layer.conv.in_channels, layer.conv.out_channels, layer.factors)
        else:
            row = ("down", layer.in_channels, layer.out_channels, layer.stride)
        if found and found[-1][1:] == row:
            found[-1] = (found[-1][0] + 1, *row)
        else:
            found.append((1, *row))
    return found


def test_layers_are_those_of_the_papers_figure_row_by_row():
    model = full()
    assert rows(model.encoder) == [
        (4, "res", 128, 128),
        (1, "down", 128, 128, (1, 2, 2)),
        (1, "res", 128, 256),
        (3, "res", 256, 256),
        (1, "down", 256, 256, (2, 2, 2)),
        (4, "res", 256, 256),
        (1, "down", 256, 256, (2, 2, 2)),
        (1, "res", 256, 512),
        (3 + 4, "res", 512, 512),
    ]
    assert rows(model.decoder) == [
        (4, "res", 512, 512),
        (1, "adagn", 512),
        (4, "res", 512, 512),
        (1, "up", 512, 4096, (2, 2, 2)),
        (1, "adagn", 512),
        (1, "res", 512, 256),
        (3, "res", 256, 256),
        (1, "up", 256, 2048, (2, 2, 2)),
        (1, "adagn", 256),
        (4, "res", 256, 256),
        (1, "up", 256, 1024, (1, 2, 2)),
        (1, "adagn", 256),
        (1, "res", 256, 128),
        (3, "res", 128, 128),
    ]
    convolutions = (model.encoder.conv_in, model.encoder.conv_out, model.decoder.conv_in, model.decoder.conv_out)
    assert [(conv.in_channels, conv.out_channels, conv.kernel_size[0]) for conv in convolutions] == [
        (3, 128, 3), (512, 18, 1), (18, 512, 3), (128, 3, 3),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("first_frame", "encoded", "decoded"),
    [("even", [16, 16, 8, 4, 4], [4, 8, 16, 16, 16]), ("prepend", [17, 17, 9, 5, 5], [5, 9, 17, 17, 17])],
)
def test_frames_between_the_layers_at_full_size(first_frame, encoded, decoded):
    """A forward pass at 224 px, on the meta device."""
    model, seen = full(first_frame=first_frame, num_blocks=1), {}
    for name, half in (("encoder", model.encoder), ("decoder", model.decoder)):
        places = [half.conv_in, *(x for x in half.layers if isinstance(x, CausalConv3d | DepthToSpace)), half.conv_out]
        for place in places:
            place.register_forward_hook(lambda _, __, out, name=name: seen.setdefault(name, []).append(out.shape[2:]))
    output = model(torch.zeros(1, *FULL, device="meta"))
    for name, lengths, sides in (
        ("encoder", encoded, [224, 112, 56, 28, 28]),
        ("decoder", decoded, [28, 56, 112, 224, 224]),
    ):
        assert seen[name] == [(frames, side, side) for frames, side in zip(lengths, sides, strict=True)]
    assert output.clip.shape == (1, *FULL)
    assert output.latents["latent"].shape[1:] == model.latent_shapes(FULL)["latent"]


@pytest.mark.parametrize(
    ("first_frame", "rate", "percent"), [("even", 5 / 768, 0.6510), ("prepend", 19_600 / 2_408_448, 0.8138)]
)
def test_five_channels_at_full_size_have_the_papers_rate(first_frame, rate, percent):
    model = full(latent_channels=5, quantizer="kl", first_frame=first_frame, num_blocks=1)
    latent = model.encode(torch.zeros(2, *FULL, device="meta")).mode()["latent"]
    assert latent[0].numel() / math.prod(FULL) == rate == model.compression_rate(FULL)
    assert round(100 * rate, 4) == percent
    assert model.bits_per_pixel(FULL) is None


def test_bits_are_eighteen_for_each_place():
    even, prepend = full(num_blocks=1), full(num_blocks=1, first_frame="prepend")
    assert even.code_shapes(FULL) == {"latent": ((4, 28, 28), 2**18)}
    assert prepend.code_shapes(FULL) == {"latent": ((5, 28, 28), 2**18)}
    assert even.bits_per_pixel(FULL) == 18 / 256
    assert prepend.bits_per_pixel((3, 17, 224, 224)) == 18 * 5 / (17 * 64)
    assert prepend.bits_per_pixel((3, 4001, 224, 224)) == pytest.approx(18 / 256, rel=1e-3)
    assert even.compression_rate(FULL) == 18 / 768


@pytest.mark.parametrize(("first_frame", "frames", "steps"), [("even", 16, 4), ("prepend", 16, 5), ("prepend", 1, 1)])
def test_rates_of_real_tensors(first_frame, frames, steps):
    model = tiny(first_frame=first_frame).eval()
    clip = noise(1, 3, frames, 16, 24)
    output = model(clip)
    assert output.latents["latent"].shape == (1, 6, steps, 2, 3)
    assert output.clip.shape == clip.shape
    assert model.compression_rate(clip.shape[1:]) == output.latents["latent"].numel() / clip.numel()


@pytest.mark.parametrize("quantizer", ["lfq", "none"])
@pytest.mark.parametrize(("first_frame", "frames"), [("even", 8), ("prepend", 9)])
def test_the_encoder_never_looks_ahead(quantizer, first_frame, frames):
    model = tiny(quantizer=quantizer, first_frame=first_frame).double().eval()
    clip = noise(1, 3, frames, 16, 16, dtype=torch.float64)
    latent = model.encoder(clip)
    for frame in range(frames):
        changed = clip.clone()
        changed[:, :, frame] += 0.5
        step = math.ceil(frame / 4) if first_frame == "prepend" else frame // 4
        assert torch.equal(model.encoder(changed)[:, :, :step], latent[:, :, :step])
        assert not torch.equal(model.encoder(changed)[:, :, step], latent[:, :, step])
        before, after = (model.encode(x).mode()["latent"][:, :, :step] for x in (clip, changed))
        assert torch.equal(before, after)


@pytest.mark.parametrize(("first_frame", "frames"), [("even", 12), ("prepend", 9)])
def test_the_decoder_never_looks_ahead(first_frame, frames):
    model = tiny(first_frame=first_frame).double().eval()
    latent = noise(1, 6, 3, 2, 2, dtype=torch.float64)
    clip = model.decode({"latent": latent})
    assert clip.shape[2] == frames
    for step in range(3):
        changed = latent.clone()
        changed[:, :, step] += 0.5
        after = model.decode({"latent": changed})
        first = max(0, 4 * step - 3) if first_frame == "prepend" else 4 * step
        assert torch.equal(after[:, :, :first], clip[:, :, :first])
        assert not torch.equal(after[:, :, first], clip[:, :, first])


def test_the_first_frame_of_the_papers_arithmetic_is_an_image_of_its_own():
    model = tiny(first_frame="prepend").double().eval()
    clip = noise(1, 3, 9, 16, 16, dtype=torch.float64)
    whole, image = model(clip), model(clip[:, :, :1])
    torch.testing.assert_close(image.latents["latent"], whole.latents["latent"][:, :, :1])
    torch.testing.assert_close(image.clip, whole.clip[:, :, :1])


def test_padding_repeats_the_first_frame_or_the_last():
    clip = noise(1, 3, 7, 16, 16)
    prepend, even = tiny(first_frame="prepend").eval(), tiny().eval()
    padded = torch.cat([clip[:, :, :1], clip[:, :, :1], clip], dim=2)
    torch.testing.assert_close(prepend(clip).clip, prepend(padded).clip[:, :, 2:])
    padded = torch.cat([clip, clip[:, :, -1:]], dim=2)
    torch.testing.assert_close(even(clip).clip, even(padded).clip[:, :, :7])


@pytest.mark.parametrize(("drop", "frames"), [(False, 8), (True, 5)])
def test_adaptive_norm_scales_each_place_by_the_latent_it_comes_from(drop, frames):
    norm = AdaptiveGroupNorm(8, 3, frames=4, drop=drop).double()
    x, latent = noise(2, 8, frames, 4, 6, dtype=torch.float64), noise(2, 3, 2, 2, 3, dtype=torch.float64)
    out = norm(x, latent)
    for t in range(frames):
        normal = F.group_norm(x[:, :, t], norm.norm.num_groups)
        step = math.ceil(t / 4) if drop else t // 4
        for h in range(4):
            for w in range(6):
                scale, shift = norm.scale_shift(latent[:, :, step, h // 2, w // 2]).chunk(2, dim=1)
                torch.testing.assert_close(out[:, :, t, h, w], normal[:, :, h, w] * (1 + scale) + shift)


def test_codes_alone_give_the_clip_back():
    model = tiny().eval()
    encoding = model.encode(noise(2, 3, 8, 16, 16))
    codes = encoding["latent"].codes
    assert codes.dtype == torch.int64
    latents = model.dequantize({"latent": codes})
    assert set(latents["latent"].unique().tolist()) == {-1.0, 1.0}
    torch.testing.assert_close(model.decode(latents), model.decode(encoding.mode()))


def test_each_quantizer_has_its_posterior_and_terms():
    clip = noise(1, 3, 4, 16, 16)
    for quantizer, posterior, terms in (
        ("lfq", Quantized, {"commitment", "entropy"}),
        ("kl", DiagonalGaussian, {"kl"}),
        ("none", Deterministic, set()),
    ):
        encoding = tiny(quantizer=quantizer).encode(clip)
        assert type(encoding["latent"]) is posterior
        assert set(encoding.regularization()) == terms


def test_temperature_and_groups_reach_the_quantizer():
    quantizer = tiny(temperature=0.5, entropy_group_bits=2).quantizer
    assert (quantizer.bits, quantizer.temperature, quantizer.group_bits) == (6, 0.5, 2)


def test_activation_checkpointing_changes_no_gradient():
    clip, gradients = noise(1, 3, 4, 16, 16), []
    for checkpointing in (False, True):
        model = tiny(activation_checkpointing=checkpointing)
        output = model(clip)
        (output.clip.square().mean() + sum(output.regularization.values())).backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert all(gradient is not None for gradient in gradients[0].values())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_autocast_to_bf16_trains():
    model = tiny()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output = model(noise(1, 3, 4, 16, 16))
    assert all(term.dtype == torch.float32 for term in output.regularization.values())
    (output.clip.float().square().mean() + sum(output.regularization.values())).backward()
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"latent_channels": 0}, "Expected latent_channels of at least 1, got 0"),
        ({"channels": 0}, "Expected channels of at least 1"),
        ({"num_blocks": 0}, "Expected num_blocks of at least 1"),
        ({"multipliers": [1]}, r"Expected at least two multipliers of at least 1, got \[1\]"),
        ({"multipliers": [1, 0]}, "Expected at least two multipliers"),
        ({"quantizer": "vq"}, 'Expected quantizer "lfq", "kl" or "none", got \'vq\''),
        ({"first_frame": "odd"}, 'Expected first_frame "even" or "prepend"'),
        ({"latent_channels": 23}, "Expected 1 to 22 bits"),
        ({"temperature": 0.0}, "Expected a temperature above 0"),
    ],
)
def test_invalid_arguments_are_refused(arguments, message):
    with pytest.raises(UserError, match=message):
        tiny(**arguments)


def test_invalid_clips_latents_and_codes_are_refused():
    model = tiny()
    with pytest.raises(UserError, match="multiples of 8"):
        model.encode(noise(1, 3, 4, 16, 20))
    with pytest.raises(UserError, match=r"Expected a latent of shape \(B, 6, T', h, w\), got \(1, 5, 1, 2, 2\)"):
        model.decode({"latent": noise(1, 5, 1, 2, 2)})
    with pytest.raises(UserError, match="Expected integer codes latent of shape"):
        model.dequantize({"latent": noise(1, 1, 2, 2)})
    with pytest.raises(UserError, match=r"Expected latent codes in 0\.\.63, got 64 to 64"):
        model.dequantize({"latent": torch.full((1, 1, 2, 2), 64)})
    with pytest.raises(UserError, match="no codebook"):
        tiny(quantizer="kl").dequantize({"latent": torch.zeros(1, 1, 2, 2, dtype=torch.int64)})
