"""What VidTwin's initial values promise: the latents carry the clip, the decoder sees them, positions stay apart."""

import pytest
import torch

from vidtwin.errors import UserError
from vidtwin.models.vidtwin import VidTwin

SMALL = {"resolution": 32, "patch_size": 8, "hidden_size": 64, "depth": 1, "num_heads": 4}
SIZES = {
    "small": {**SMALL, "structure_downsamples": 0, "num_queries": 4, "qformer_depth": 2},
    "released latents": {**SMALL, "structure_channels": 8},
    "odd grid, two levels": {**SMALL, "resolution": 56, "structure_downsamples": 2, "dynamics_downsamples": 2},
    "base width": {**SMALL, "hidden_size": 768, "num_heads": 12, "structure_channels": 8},
    "shortcut at base width": {**SMALL, "hidden_size": 768, "num_heads": 12, "structure_shortcut": 1},
}


def build(size, **kwargs):
    torch.manual_seed(0)
    return VidTwin(num_frames=4, **SIZES[size], **kwargs).eval()


def clips_like(model):
    """Eight clips of coloured 8-pixel squares, (8, 3, 4, H, W) in [-1, 1]."""
    squares = torch.rand(8, 3, 1, model.grid_size, model.grid_size) * 2 - 1
    side = model.resolution // model.grid_size
    frames = squares.repeat_interleave(side, 3).repeat_interleave(side, 4)
    return frames.expand(-1, -1, 4, -1, -1).contiguous()


def spread_over_clips(values):
    """How much of a tensor (B, ...) differs from clip to clip (root mean square)."""
    return float((values - values.mean(0)).square().mean().sqrt())


@torch.no_grad()
def signal_to_noise(model):
    return {
        name: spread_over_clips(posterior.mean) / float((0.5 * posterior.logvar).exp().mean())
        for name, posterior in model.encode(clips_like(model)).items()
    }


@pytest.mark.parametrize("size", SIZES)
def test_latents_stand_above_their_noise(size):
    ratios = signal_to_noise(build(size))
    assert all(2 < ratio < 50 for ratio in ratios.values()), ratios


@pytest.mark.parametrize("size", SIZES)
def test_clips_differ_in_the_decoders_input_by_a_tenth_of_the_position_embedding_or_more(size):
    model = build(size)
    position = float(model.decoder.transformer.position.square().mean().sqrt())
    with torch.no_grad():
        latents = model.encode(clips_like(model)).mode()
        spreads = {name: spread_over_clips(getattr(model, name).decode(latents[name])) for name in latents}
    assert all(0.1 < spread / position < 2 for spread in spreads.values()), spreads


@pytest.mark.parametrize(("downsamples", "border"), [(0, 0), (1, 1)])
def test_a_patch_is_decoded_from_its_own_place_of_the_structure_latent(downsamples, border):
    torch.manual_seed(0)
    model = VidTwin(num_frames=4, **{**SMALL, "resolution": 64}, structure_downsamples=downsamples)
    latent = torch.randn(1, *model.latent_shapes((3, 4, 64, 64))["structure"])
    changed = latent.clone()
    changed[..., 1, 1] += 1
    with torch.no_grad():
        difference = (model.structure.decode(changed) - model.structure.decode(latent)).abs().amax((0, 1, 2))
    reached = torch.zeros(8, 8, dtype=torch.bool)
    side = 2**downsamples
    reached[side - border : 2 * side + border, side - border : 2 * side + border] = True
    assert torch.equal(difference > 0, reached)


@torch.no_grad()
def test_places_below_one_place_of_the_structure_latent_differ():
    model = build("released latents")
    features = model.structure.decode(model.encode(clips_like(model)).mode()["structure"])
    first, second = features[..., 0, 0], features[..., 0, 1]
    assert float((first - second).square().mean().sqrt()) > 0.1 * spread_over_clips(first)


def test_a_structure_latent_alone_starts_as_a_still():
    model = build("small")
    with torch.no_grad():
        features = model.structure.decode(model.encode(clips_like(model)).mode()["structure"])
    torch.testing.assert_close(features, features[:, :, :1].expand_as(features))


@torch.no_grad()
def test_released_values_are_those_of_the_released_code():
    model = build("base width", initialization="released")
    structure, qformer = model.structure, model.structure.qformer
    for block in (*model.encoder.transformer.blocks, *model.decoder.transformer.blocks):
        bound = (6 / (768 + 3 * 768)) ** 0.5  # Xavier of the fused (3C, C) matrix
        weight = block.spatial_attention.qkv.weight
        assert 0.99 * bound < weight.abs().max() <= bound
        assert not block.temporal_attention.proj.weight.any()
        assert not block.temporal_attention.proj.bias.any()
        assert float(block.modulation.std()) == pytest.approx(768**-0.5, rel=0.1)
    bound = (6 / (768 + 3 * 64)) ** 0.5
    assert 0.99 * bound < model.encoder.patch_embed.weight.abs().max() <= bound
    assert 0.99 * 768**-0.5 < model.decoder.linear.weight.abs().max() <= 768**-0.5
    for layer in qformer.layers:
        assert float(layer.mlp[0].weight.std()) == pytest.approx(0.02, rel=0.05)
        if layer.cross_attention is not None:
            assert float(layer.cross_attention.kv.weight.std()) == pytest.approx(0.02, rel=0.05)
    for layer in (structure.conv_in, structure.head, structure.conv_out, model.dynamics.head, structure.to_frames):
        bound = layer.weight[0].numel() ** -0.5  # torch's own
        assert 0.9 * bound < layer.weight.abs().max() <= bound
        assert layer.bias.any()
    ratios = signal_to_noise(model)
    assert max(ratios.values()) < 0.5, ratios  # why "balanced" is the default


def test_unknown_name_is_refused():
    with pytest.raises(UserError, match='Expected initialization "balanced", "linear" or "released"'):
        build("small", initialization="xavier")
