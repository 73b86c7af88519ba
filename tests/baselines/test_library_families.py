"""Adapters of diffusers and transformers, family by family: each trap of the libraries."""

from functools import partial

import pytest
import torch
import yaml
from library_models import CONFIGS, TINY, class_of, library_round_trip, noise, official, tiny
from torch import nn

from vidtwin.baselines.library.base import LibraryAutoencoder
from vidtwin.errors import UserError
from vidtwin.posteriors import Deterministic


def test_cogvideox_takes_whole_chunks_of_eight_and_one_more():
    model = tiny("cogvideox")
    lengths = {frames: model.temporal.legal_length(frames) for frames in (1, 2, 8, 9, 10, 16, 17, 18)}
    assert lengths == {1: 1, 2: 8, 8: 8, 9: 9, 10: 16, 16: 16, 17: 17, 18: 24}
    assert library_round_trip(model, noise(1, 3, 12, 8, 8)).shape[2] != 12
    for frames in (1, 8, 9, 17):
        clip = noise(1, 3, frames, 8, 8)
        with torch.no_grad():
            assert torch.allclose(model(clip).clip, library_round_trip(model, clip), atol=1e-5)


def test_hunyuan_video_is_not_blended_from_clips():
    """With tiling off, the library still decodes 17 frames and more by clips of 16, which it blends."""
    model, clip = tiny("hunyuan_video"), noise(1, 3, 17, 8, 8)
    with torch.no_grad():
        latent = model.encode(clip).mode()["latent"]
        whole = model.model.decoder(model.model.post_quant_conv(latent * model.scale + model.shift))
        assert torch.equal(model.decode({"latent": latent}), whole)
        model.model.use_framewise_decoding = True
        try:
            assert (model.model.decode(latent * model.scale).sample - whole).abs().max() > 1e-5  # rounding is 1e-7
        finally:
            model.model.use_framewise_decoding = False


def test_hunyuan_video15_takes_batches():
    model, clips = tiny("hunyuan_video15"), noise(2, 3, 5, 8, 8)
    with torch.no_grad():
        assert torch.allclose(model.encode(clips).mode()["latent"][1:], model.encode(clips[1:]).mode()["latent"])
        model.model.use_slicing = False
        try:
            with pytest.raises(RuntimeError):
                model.model.encode(clips)
        finally:
            model.model.use_slicing = True


def test_allegro_decodes_a_clip_that_the_librarys_tiles_make_zero():
    model, clip = tiny("allegro"), noise(1, 3, 4, 8, 8)
    with pytest.raises(NotImplementedError):
        model.model.encode(clip)
    with torch.no_grad():
        posterior = model.encode(clip)["latent"]
        ours = model.decode({"latent": posterior.mode()})
        model.model.enable_tiling()
        try:
            model.model.kernel, model.model.stride = (6, 12, 12), (4, 8, 8)  # as 24 x 320 x 320 for 16 x 224 x 224
            assert not model.model.decode(posterior.mode()).sample.any()
            model.model.kernel, model.model.stride = (4, 8, 8), (4, 8, 8)  # one tile of the clip's size
            theirs = model.model.encode(clip).latent_dist.mean
            decoded = model.model.decode(theirs).sample
        finally:
            model.model.disable_tiling()
    assert torch.allclose(posterior.mode() * model.scale + model.shift, theirs, atol=1e-6)
    assert decoded.shape[1] == 4  # (B, T, C, H, W) there
    assert torch.allclose(ours, decoded.transpose(1, 2), atol=1e-5)


def test_wan_equals_its_library_and_trains_beyond_the_clamp():
    model, clip = tiny("wan"), noise(2, 3, 9, 8, 8)
    latent = 50 * noise(2, 2, 3, 2, 2)
    with torch.no_grad():
        mean = model.model.encode(clip).latent_dist.mean
        assert torch.allclose(model.encode(clip).mode()["latent"] * model.scale + model.shift, mean, atol=1e-6)
        decoded = model.model.decode(latent * model.scale + model.shift).sample
        assert torch.equal(model.decode({"latent": latent}), decoded)
        layer = model.model.decoder.conv_out
        layer.weight.mul_(100)
        try:
            assert model.decode({"latent": latent}).abs().max() == 1
            assert model.train().decode({"latent": latent}).abs().max() > 1
        finally:
            layer.weight.div_(100)
            model.eval()


def keep(kept: list[torch.Tensor], tensor: torch.Tensor) -> torch.Tensor:
    kept.append(tensor)
    return tensor


def test_wan_recomputes_chunks_to_the_same_gradients():
    torch.manual_seed(0)
    clip, plain = noise(1, 3, 9, 8, 8), tiny("wan")
    model = class_of("wan")(TINY["wan"][0], activation_checkpointing=True)
    model.load_state_dict(plain.state_dict())
    numbers: list[int] = []  # kept for the backward pass
    for each in (plain, model):
        kept: list[torch.Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(partial(keep, kept), lambda x: x):
            loss = each.decode(each.encode(clip).mode()).square().mean()
        loss.backward()
        numbers.append(sum(tensor.numel() for tensor in kept))
    for (name, first), second in zip(plain.named_parameters(), model.parameters(), strict=True):
        assert torch.allclose(first.grad, second.grad, rtol=1e-4, atol=1e-8), name
    assert numbers[1] < numbers[0] / 2
    plain.zero_grad(set_to_none=True)


def test_minimax_gets_imagenets_pixels_and_gives_its_own_lengths():
    model, clip = tiny("minimax_h3"), noise(2, 3, 4, 8, 8)
    lengths = {frames: official("minimax_h3").temporal.legal_length(frames) for frames in (1, 16, 22, 23, 39)}
    assert lengths == {1: 22, 16: 22, 22: 22, 23: 39, 39: 39}
    mean, deviation = (
        torch.tensor(values).view(3, 1, 1, 1) for values in ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    )
    with torch.no_grad():
        theirs = model.model.encode((clip * 0.5 + 0.5 - mean) / deviation).latent_dist.mean
        torch.testing.assert_close(model.encode(clip).mode()["latent"] * model.scale + model.shift, theirs)
        pixels = model.model.decode(theirs).sample * deviation + mean
        torch.testing.assert_close(model(clip).clip, pixels * 2 - 1, rtol=1e-4, atol=1e-5)
        longer = noise(1, 3, 5, 8, 8)
        assert model(longer).clip.shape == longer.shape
        assert library_round_trip(model, longer).shape[2] == 4
        with pytest.raises((RuntimeError, ValueError)):
            library_round_trip(model, noise(1, 3, 3, 8, 8))
    with pytest.raises(UserError, match="at least 8 pixels in height and width for MiniMaxH3"):
        model.encode(noise(1, 3, 4, 4, 8))  # places are mirrored at the border


def test_minimax_goes_by_the_librarys_tiles():
    """Its decoder counts places relative to a tile, so that a whole frame is another picture."""
    model, clip = tiny("minimax_h3"), noise(1, 3, 4, 8, 16)
    with torch.no_grad():
        whole = model(clip).clip
        sizes = {"tile_sample_min_height": 8, "tile_sample_min_width": 8, "tile_sample_min_overlap_height": 4}
        before = {name: getattr(model.model, name) for name in (*sizes, "tile_sample_min_overlap_width")}
        model.model.enable_tiling(**sizes, tile_sample_min_overlap_width=4)
        try:
            assert (model(clip).clip - whole).abs().max() > 1e-3
        finally:
            model.model.enable_tiling(**before)


def test_flux2s_latent_is_the_generators():
    model, clip = class_of("flux2")(TINY["flux2"][0]).eval(), noise(2, 3, 2, 8, 8)
    norm = model.model.bn
    norm.running_mean.copy_(torch.linspace(-1, 1, 8))
    norm.running_var.copy_(torch.linspace(0.5, 2, 8))
    with torch.no_grad():
        posterior = model.encode(clip)["latent"]
        own = model.model.encode(clip.transpose(1, 2).flatten(0, 1)).latent_dist
        packed = nn.functional.pixel_unshuffle(own.mean, 2)
        wanted = (packed - norm.running_mean.view(-1, 1, 1)) / (norm.running_var + 1e-4).sqrt().view(-1, 1, 1)
        torch.testing.assert_close(posterior.mode().transpose(1, 2).flatten(0, 1), wanted)
        decoded = model.model.decode(own.mean).sample.unflatten(0, (2, 2)).transpose(1, 2)
        torch.testing.assert_close(model.decode({"latent": posterior.mode()}), decoded, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(posterior.regularization()["kl"], own.kl().sum() / 2)


def test_vidtok_repeats_the_first_frame_and_drops_its_copies():
    model, clip = tiny("vidtok"), noise(1, 3, 5, 8, 8)
    extended = torch.cat([clip[:, :, :1]] * 3 + [clip], dim=2)
    with torch.no_grad():
        assert torch.equal(model.encode(clip).mode()["latent"], model.model.encode(extended).latent_dist.mean)
        assert library_length(model, clip) != 5
        assert model(clip).clip.shape == clip.shape


def library_length(model: LibraryAutoencoder, clip: torch.Tensor) -> int:
    return int(model.model.decode(model.model.encode(clip).latent_dist.mean).shape[2])


def test_fsqs_codes_decode_to_the_same_clip():
    model, clip = tiny("vidtok/fsq"), noise(1, 3, 16, 16, 16)
    with torch.no_grad():
        posterior = model.encode(clip)["latent"]
        own, _ = model.model.encode(clip)
    assert torch.equal(model.dequantize({"latent": posterior.codes})["latent"], posterior.mode())
    assert torch.allclose(posterior.mode(), own, atol=1e-6)
    assert len(posterior.codes.unique()) > 4
    with pytest.raises(UserError, match=r"codes in 0\.\.63"):
        model.dequantize({"latent": posterior.codes + 64})


def test_emu3_equals_its_library_and_trains_its_decoder_alone():
    model, clip = tiny("emu3"), noise(2, 3, 8, 4, 4)
    with torch.no_grad():
        posterior = model.encode(clip)["latent"]
        theirs = model.model.encode(clip.transpose(1, 2), torch.tensor([[4, 4]] * 2))
        assert torch.equal(posterior.codes, torch.stack(theirs.image_tokens))
        decoded = model.model.decode(posterior.codes).transpose(1, 2)
        assert torch.allclose(model.decode(model.dequantize({"latent": posterior.codes})), decoded, atol=1e-6)
        assert library_emu3_length(model, noise(1, 3, 9, 4, 4)) == 8
        assert model(noise(1, 3, 9, 4, 4)).clip.shape[2] == 9
    trained = {name.split(".")[1] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"decoder", "post_quant_conv"}
    assert not model.train().model.training
    model.eval()


def test_emu3s_codes_in_bfloat16_are_the_nearest_entries():
    """Products in bfloat16 pick others."""
    torch.manual_seed(0)
    model = class_of("emu3")(TINY["emu3"][0] | {"codebook_size": 4096}).eval()
    model.model.quantize.embedding.weight.data.mul_(0.1)
    features: list[torch.Tensor] = []
    model.model.quant_conv.register_forward_hook(lambda *given: features.append(given[-1]))
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        codes = model.encode(noise(2, 3, 8, 16, 16))["latent"].codes
    entries, vectors = model.model.quantize.embedding.weight.double(), features[0].movedim(1, -1).double()
    assert torch.equal(codes, torch.cdist(vectors.flatten(0, 3), entries).argmin(1).view_as(codes))


def library_emu3_length(model: LibraryAutoencoder, clip: torch.Tensor) -> int:
    codes = model.model.encode(clip.transpose(1, 2), torch.tensor([[4, 4]])).image_tokens[0]
    return int(model.model.decode(codes[None]).shape[1])


def test_cosmos_has_a_scale_per_step_and_repeats_the_last():
    model = tiny("cosmos")
    shift, scale = model._get_scaling(3)
    assert shift[0, :, :, 0, 0].tolist() == [[0.5, 0.25, 0.25], [-0.5, 0.0, 0.0]]
    assert scale[0, :, :, 0, 0].tolist() == [[2.0, 1.5, 1.5], [1.0, 0.5, 0.5]]
    own = {
        name: yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["autoencoder"]["init_args"]["arguments"]
        for name in ("cosmos4", "cosmos8")
    }
    assert [arguments.get("latents_mean", "CV8x8x8's") for arguments in own.values()] == [None, "CV8x8x8's"]


def test_kvaes_invented_noise_is_left_out():
    model, clip = tiny("kvae"), noise(1, 3, 5, 8, 8)
    with torch.no_grad():
        posterior = model.encode(clip)["latent"]
        assert (model.model.encode(clip).latent_dist.std == 1).all()
    assert isinstance(posterior, Deterministic)
