"""Adapters of LTX-Video and LTX-2: their ratios, noise, and decoders, of which one is a diffusion model."""

import pytest
import torch
from library_models import OWN, TINY, class_of, noise, official, tiny
from torch import nn

from vidtwin import VideoAutoencoder
from vidtwin.baselines.library.neighbourhood import NeighbourhoodProcessor, attend_to_neighbours
from vidtwin.cli import main
from vidtwin.errors import UserError


def test_ltx2s_own_ratios_are_not_believed():
    model = official("ltx2_video")
    assert (model.model.temporal_compression_ratio, model.model.spatial_compression_ratio) == (16, 64)
    assert (model.time, model.space) == (8, 32)
    with pytest.raises(UserError, match="at least 16 pixels in height and width for LTX2Video"):
        tiny("ltx2_video").encode(noise(1, 3, 3, 8, 16))  # places are mirrored at the border


@pytest.mark.parametrize("kernel", [(3, 5, 7), (1, 1, 3), (6, 9, 10)])
def test_neighbours_by_tiles_are_those_of_the_librarys_mask(kernel):
    """The grid has several tiles along each axis, of which the last is not full."""
    sizes, generator = (6, 9, 10), torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, *sizes, 2, 4, generator=generator).requires_grad_() for _ in range(3))
    places = torch.stack(torch.meshgrid(*map(torch.arange, sizes), indexing="ij"), -1).view(-1, 3)
    span, first = torch.tensor(kernel), places - torch.tensor(kernel) // 2
    first = first.clamp(min=0).minimum(torch.tensor(sizes) - span)[:, None]
    seen = ((places >= first) & (places < first + span)).all(-1)
    assert (seen.sum(1) == span.prod()).all()
    flat = (x.flatten(1, 3).transpose(1, 2) for x in (query, key, value))
    wanted = nn.functional.scaled_dot_product_attention(*flat, seen, scale=1.0).transpose(1, 2).view_as(query)
    got = attend_to_neighbours(query, key, value, kernel)
    torch.testing.assert_close(got, wanted)
    weights = torch.randn(got.shape, generator=generator)
    pairs = (torch.autograd.grad((x * weights).sum(), (query, key, value)) for x in (got, wanted))
    torch.testing.assert_close(*pairs)


def test_ltx2s_decoders_share_a_latent_and_a_latent_has_one_clip():
    model, clip = tiny("ltx2_video/diffusion"), noise(2, 3, 5, 16, 24)
    other = class_of("ltx2_video")(TINY["ltx2_video"][0]).eval()
    other.model.encoder.load_state_dict(model.model.encoder.state_dict())
    with torch.no_grad():
        latent = model.encode(clip).mode()["latent"]
        assert torch.equal(other.encode(clip).mode()["latent"], latent)
        decoded = model.decode({"latent": latent})
        assert torch.equal(model.decode({"latent": latent}), decoded)
        torch.testing.assert_close(model.decode({"latent": latent[1:]}), decoded[1:])
        model.seed = 1
        try:
            assert (model.decode({"latent": latent}) - decoded).abs().max() > 1e-3
        finally:
            model.seed = 0
    model.train()
    try:
        assert (model.decode({"latent": latent}) - model.decode({"latent": latent})).abs().max() > 1e-3
    finally:
        model.eval()


@pytest.mark.slow
def test_ltx2s_diffusion_decoder_is_the_librarys():
    """Replace the attention that the library compiles."""
    model, latent = tiny("ltx2_video/diffusion"), noise(2, 4, 3, 2, 3)
    with torch.no_grad():
        decoded = model.decode({"latent": latent})
        for attention in (m for m in model.diffusion.modules() if hasattr(m, "build_block_mask")):
            attention.set_processor(attention._default_processor_cls())
        try:
            same = [torch.Generator().manual_seed(0) for _ in range(2)]
            theirs = model.diffusion.decode(latent, generator=same).sample
            torch.testing.assert_close(decoded, theirs, rtol=1e-4, atol=1e-5)
        finally:
            model.diffusion.set_attn_processor(NeighbourhoodProcessor())


def test_ltx2s_diffusion_decoder_takes_what_holds_its_windows():
    assert str(official("ltx2_video_diffusion").temporal) == "8k+1 frames (at least 17)"
    model, own = tiny("ltx2_video/diffusion"), OWN["ltx2_video/diffusion"]
    assert (model.temporal.minimum, model.minimum_side) == (3, 16)
    with pytest.raises(
        UserError, match=r"at least 16 pixels in height and width for LTX2Video, got \(1, 3, 3, 8, 16\)"
    ):
        model.encode(noise(1, 3, 3, 8, 16))
    short = noise(1, 4, 1, 2, 2)
    with pytest.raises(ValueError, match="at least its kernel size"):
        model.diffusion.decode(short)
    with pytest.raises(UserError, match="latent of at least 2 x 2 x 2 places for the diffusion decoder, got 1 x 2 x 2"):
        model.decode({"latent": short})
    wrong = {"decoder_arguments": own["decoder_arguments"] | {"patch_size": 4}}
    for arguments, message in (
        (
            wrong | {"decoder": "diffusion"},
            "Expected a decoder of 4 channels and 2 x 8 x 8 pixels, got 4 and 2 x 16 x 16;",
        ),
        (wrong, "Expected decoder_arguments with decoder diffusion alone"),
        (own | {"sampling_steps": 0}, "Expected sampling_steps of at least 1, got 0"),
        ({"decoder": "gan"}, """Expected decoder "convolution" or "diffusion", got 'gan'"""),
    ):
        with pytest.raises(UserError, match=message):
            class_of("ltx2_video")(TINY["ltx2_video"][0], **arguments)


def test_ltx_takes_the_scale_of_its_weights():
    model = class_of("ltx_video")(TINY["ltx_video"][0]).eval()
    clip = noise(1, 3, 3, 8, 8)
    with torch.no_grad():
        before = model.encode(clip).mode()["latent"]
        model.model.latents_std.fill_(2.0)
        assert torch.allclose(model.encode(clip).mode()["latent"], before / 2)


def test_ltx_draws_the_noise_of_its_decoder_from_a_seed_in_evaluation():
    """LTX-Video 0.9.1 adds noise to the decoder's features."""
    arguments = {"decoder_inject_noise": [True, False, False], "timestep_conditioning": True}
    torch.manual_seed(0)
    model = class_of("ltx_video")(TINY["ltx_video"][0] | arguments).eval()
    for name, parameter in model.named_parameters():
        if "per_channel_scale" in name:  # 0 in new weights
            nn.init.ones_(parameter)
    latent = noise(2, 4, 2, 2, 2)
    with torch.no_grad():
        state = torch.get_rng_state()
        first, second = model.decode({"latent": latent}), model.decode({"latent": latent[:1]})
        assert torch.equal(torch.get_rng_state(), state)
        torch.testing.assert_close(first[:1], second)
        model.train()
        assert (model.decode({"latent": latent}) - model.decode({"latent": latent})).abs().max() > 1e-3


def test_ltx2s_official_decoders_convert(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, clip = tiny("ltx2_video/diffusion"), noise(1, 3, 3, 16, 16)
    whole = class_of("ltx2_video")(TINY["ltx2_video"][0])
    whole.model.encoder.load_state_dict(model.model.encoder.state_dict())
    whole.model.save_pretrained("repo/vae")
    model.diffusion.save_pretrained("repo/diffusion_decoder")
    options = ["convert", "repo", "ours", "--model", "ltx2_video", "--subfolder", "vae", "--decoder", "diffusion"]
    assert main([*options, "--seed", "3"]) == 0
    loaded = VideoAutoencoder.from_pretrained("ours")
    assert isinstance(loaded, class_of("ltx2_video"))
    assert loaded.seed == 3
    loaded.seed = 0
    with torch.no_grad():
        assert torch.equal(loaded(clip).clip, model(clip).clip)
    with pytest.raises(UserError, match="of LTX2VideoDiffusionDecoderModel in repo/vae, got those of Auto"):
        class_of("ltx2_video").from_official("repo", "vae", decoder="diffusion", decoder_subfolder="vae")
