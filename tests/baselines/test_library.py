"""Adapters of diffusers and transformers: the interface's contract, official sizes, and each trap of the libraries."""

import ast
import json
import sys
import tomllib
from collections.abc import Sequence
from functools import cache, partial
from importlib import metadata
from pathlib import Path
from typing import Any

import forked
import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from sweeping import checkpoint
from torch import nn

from vidtwin import VideoAutoencoder, plugins
from vidtwin.baselines.library.base import VERSIONS, LibraryAutoencoder, StandardizedGaussian
from vidtwin.baselines.library.neighbourhood import NeighbourhoodProcessor, attend_to_neighbours
from vidtwin.cli import main
from vidtwin.clips import as_clip
from vidtwin.errors import UserError
from vidtwin.posteriors import Deterministic
from vidtwin.storage import checkpoints
from vidtwin.testing import check_autoencoder
from vidtwin.training.checks import freeze
from vidtwin.video import VideoWriter, iter_frames, write_video
from vidtwin.video.convert import to_uint8

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "configs" / "library"
GROUP = "vidtwin.autoencoders"
PREFIX = "vidtwin.baselines.library."

# Arguments that make each adapter tiny, by its short name and variant, and frames and side of a clip.
_SMALL: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}
TINY: dict[str, tuple[dict[str, Any], int, int]] = {
    "cogvideox": (
        _SMALL
        | {"block_out_channels": [4, 4, 8], "down_block_types": ["CogVideoXDownBlock3D"] * 3}
        | {"up_block_types": ["CogVideoXUpBlock3D"] * 3},
        8,
        8,
    ),
    "wan": (
        {"base_dim": 4, "z_dim": 2, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
        | {"latents_mean": [0.5, -0.5], "latents_std": [2.0, 1.5]},
        5,
        8,
    ),
    "wan/2.2": (
        {"base_dim": 4, "z_dim": 2, "dim_mult": [1, 1, 1], "num_res_blocks": 1, "temperal_downsample": [True, True]}
        | {"is_residual": True, "in_channels": 12, "out_channels": 12, "patch_size": 2}
        | {"latents_mean": None, "latents_std": None},
        5,
        16,
    ),
    "hunyuan_video": (
        _SMALL
        | {"block_out_channels": [4, 4, 8], "spatial_compression_ratio": 4, "scaling_factor": 0.5}
        | {"down_block_types": ["HunyuanVideoDownBlock3D"] * 3, "up_block_types": ["HunyuanVideoUpBlock3D"] * 3},
        5,
        8,
    ),
    "hunyuan_video15": (
        {"block_out_channels": [8, 16, 16], "layers_per_block": 1, "latent_channels": 4}
        | {"spatial_compression_ratio": 4},
        5,
        8,
    ),
    "ltx_video": (
        {"block_out_channels": [8, 8], "decoder_block_out_channels": [8, 8], "layers_per_block": [1, 1, 1]}
        | {"down_block_types": ["LTXVideoDownBlock3D"] * 2, "decoder_layers_per_block": [1, 1, 1]}
        | {"spatio_temporal_scaling": [True, False], "decoder_spatio_temporal_scaling": [True, False]}
        | {"decoder_inject_noise": [False] * 3, "downsample_type": ["conv"] * 2, "upsample_residual": [False] * 2}
        | {"upsample_factor": [1, 1], "patch_size": 2, "latent_channels": 4},
        3,
        8,
    ),
    "ltx2_video": (
        {"block_out_channels": [8, 16], "decoder_block_out_channels": [8, 16], "layers_per_block": [1, 1, 1]}
        | {"down_block_types": ["LTX2VideoDownBlock3D"] * 2, "decoder_layers_per_block": [1, 1, 1]}
        | {"spatio_temporal_scaling": [True, True], "decoder_spatio_temporal_scaling": [True, True]}
        | {"decoder_inject_noise": [False] * 3, "downsample_type": ["spatial", "spatiotemporal"]}
        | {"upsample_type": ["spatiotemporal", "spatial"], "upsample_residual": [True] * 2}
        | {"upsample_factor": [1, 1], "patch_size": 2, "latent_channels": 4},
        3,
        16,
    ),
    "ltx2_video/diffusion": (
        {"block_out_channels": [8, 16], "decoder_block_out_channels": [8, 16], "layers_per_block": [1, 1, 1]}
        | {"down_block_types": ["LTX2VideoDownBlock3D"] * 2, "decoder_layers_per_block": [1, 1, 1]}
        | {"spatio_temporal_scaling": [True, True], "decoder_spatio_temporal_scaling": [True, True]}
        | {"decoder_inject_noise": [False] * 3, "downsample_type": ["spatial", "spatiotemporal"]}
        | {"upsample_type": ["spatiotemporal", "spatial"], "upsample_residual": [True] * 2}
        | {"upsample_factor": [1, 1], "patch_size": 2, "latent_channels": 4},
        3,
        16,
    ),
    "minimax_h3": (
        {"block_out_channels": [8, 8], "layers_per_block": 1, "latent_channels": 2, "norm_num_groups": 2}
        | {"spatial_downsample_factors": [2, 2], "temporal_downsample_factors": [2, 1], "clip_length": 3}
        | {"token_drop": 1, "decoder_num_layers": 1, "decoder_num_attention_heads": 1, "decoder_attention_head_dim": 8}
        | {"latents_mean": [0.5, -0.5], "latents_std": [2.0, 1.5]},
        4,
        8,
    ),
    "flux2": (
        _SMALL
        | {"block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2}
        | {"up_block_types": ["UpDecoderBlock2D"] * 2},
        2,
        8,
    ),
    "cosmos": (
        {"encoder_block_out_channels": [8, 8, 8], "decode_block_out_channels": [8, 8, 8, 8], "latent_channels": 2}
        | {"num_layers": 1, "patch_size": 2, "spatial_compression_ratio": 4, "temporal_compression_ratio": 4}
        | {"attention_resolutions": [4], "resolution": 8}
        | {"latents_mean": [0.5, 0.25, -0.5, 0.0], "latents_std": [2.0, 1.5, 1.0, 0.5]},
        5,
        8,
    ),
    "mochi": (
        {"encoder_block_out_channels": [32, 32], "decoder_block_out_channels": [32, 32], "layers_per_block": [1, 1, 1]}
        | {"temporal_expansions": [2], "spatial_expansions": [2], "add_attention_block": [False, True, True]}
        | {"latent_channels": 2, "latents_mean": [0.5, -0.5], "latents_std": [2.0, 1.5]},
        3,
        4,
    ),
    "allegro": (
        _SMALL
        | {"block_out_channels": [4, 4, 8], "down_block_types": ["AllegroDownBlock3D"] * 3}
        | {"up_block_types": ["AllegroUpBlock3D"] * 3, "temporal_downsample_blocks": [True, True, False]}
        | {"temporal_upsample_blocks": [False, True, True]},
        4,
        8,
    ),
    "stable_diffusion": (
        _SMALL
        | {"block_out_channels": [4, 8], "down_block_types": ["DownEncoderBlock2D"] * 2}
        | {"up_block_types": ["UpDecoderBlock2D"] * 2},
        2,
        4,
    ),
    "stable_video_diffusion": (
        {"block_out_channels": [32, 32], "down_block_types": ["DownEncoderBlock2D"] * 2, "layers_per_block": 2}
        | {"latent_channels": 2},
        4,
        8,
    ),
    "kvae": ({"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 2}, 5, 8),
    "easyanimate": (
        _SMALL
        | {"block_out_channels": [4, 4, 8], "down_block_types": ["SpatialTemporalDownBlock3D"] * 3}
        | {"up_block_types": ["SpatialTemporalUpBlock3D"] * 3},
        5,
        8,
    ),
    "vidtok": ({"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 2}, 5, 8),
    "vidtok/fsq": (
        {"ch": 32, "ch_mult": [1, 1, 1], "num_res_blocks": 1, "z_channels": 2, "double_z": False}
        | {"regularizer": "fsq", "codebook_size": 64, "is_causal": False},
        16,
        8,
    ),
    "emu3": (
        {"codebook_size": 16, "embed_dim": 2, "latent_channels": 2, "base_channels": 32, "channel_multiplier": [1, 1]}
        | {"num_res_blocks": 1, "attn_resolutions": [1], "hidden_size": 32},
        4,
        4,
    ),
}
# Arguments of the adapter itself.
OWN: dict[str, dict[str, Any]] = {
    "ltx2_video/diffusion": {
        "decoder": "diffusion",
        "decoder_arguments": {"latent_channels": 4, "patch_size": 2, "decoder_head_dim": 8, "decoder_t_emb_dim": 8}
        | {"decoder_stage_channels": [16, 8, 8], "decoder_stage_depths": [1, 1, 1]}
        | {"decoder_stage_kernels": [[3, 1, 1], [3, 3, 3]], "decoder_stage5_kernel": [3, 5, 5]}
        | {"decoder_upsample_strides": [[1, 2, 2], [2, 2, 2]], "decoder_upsample_channel_reductions": [2, 1]}
        | {"spatial_compression_ratio": 8, "temporal_compression_ratio": 2},
    }
}
SLOW = {"kvae", "flux2", "stable_video_diffusion", "easyanimate", "vidtok", "wan/2.2", "mochi"}  # wide, or like another


def class_of(name: str) -> type[LibraryAutoencoder]:
    cls: type[LibraryAutoencoder] = plugins.load(name.partition("/")[0], GROUP)
    return cls


@cache
def tiny(name: str) -> LibraryAutoencoder:
    """Return the tiny model in evaluation mode, built once; tests leave it as it was."""
    torch.manual_seed(0)
    return class_of(name)(TINY[name][0], **OWN.get(name, {})).eval()


def noise(*shape: int) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def library_round_trip(model: LibraryAutoencoder, clip: torch.Tensor) -> torch.Tensor:
    """Encode and decode by the library's own methods, as its documentation says."""
    decoded: torch.Tensor = model.model.decode(model.model.encode(clip).latent_dist.mode()).sample
    return decoded


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TINY]
)
def test_every_adapter_keeps_the_contract(name):
    _, frames, side = TINY[name]
    check_autoencoder(tiny(name), frames, side)


def test_every_registered_adapter_has_tiny_arguments():
    registered = {name for name, entry in plugins.available(GROUP).items() if entry.value.startswith(PREFIX)}
    assert registered == {name.partition("/")[0] for name in TINY}, "after a change of pyproject.toml install again"


# Parameters and the latent of 16 frames of 224 px, of each config: specification table D, and padding to legal lengths.
OFFICIAL = {
    "cogvideox": (215_583_907, (16, 4, 28, 28)),
    "wan21": (126_892_531, (16, 5, 28, 28)),
    "wan22": (704_688_668, (48, 5, 14, 14)),
    "hunyuan_video": (246_478_803, (16, 5, 28, 28)),
    "hunyuan_video15": (1_260_634_115, (32, 5, 14, 14)),
    "ltx_video": (419_193_649, (128, 3, 7, 7)),
    "ltx2_video": (1_222_479_601, (128, 3, 7, 7)),
    "ltx2_video_diffusion": (1_111_232_497, (128, 3, 7, 7)),
    "minimax_h3": (2_603_868_984, (24, 7, 14, 14)),
    "flux2": (84_046_115, (128, 16, 14, 14)),
    "cosmos8": (105_653_696, (16, 3, 28, 28)),
    "cosmos4": (104_669_888, (16, 5, 28, 28)),
    "mochi": (459_748_611, (12, 4, 28, 28)),
    "allegro": (174_955_751, (4, 4, 28, 28)),
    "stable_diffusion": (83_653_863, (4, 16, 28, 28)),
    "stable_video_diffusion": (97_742_847, (4, 16, 28, 28)),
    "kvae": (617_982_115, (16, 5, 28, 28)),
    "easyanimate": (244_375_507, (16, 5, 28, 28)),
    "vidtok": (157_451_663, (4, 5, 28, 28)),
    "vidtok_noncausal": (157_451_663, (4, 4, 28, 28)),
    "vidtok_fsq": (157_451_661, (6, 5, 28, 28)),
    "emu3": (270_740_287, (4, 4, 28, 28)),
}
FULL = (3, 16, 224, 224)


@cache
def official(name: str) -> LibraryAutoencoder:
    """Build the model of a config on the meta device, once; tests leave it as it was."""
    section = yaml.safe_load((CONFIGS / f"{name}.yaml").read_text())["model"]["autoencoder"]
    if name == "ltx2_video_diffusion":  # its base is ltx2_video.yaml
        base = yaml.safe_load((CONFIGS / "ltx2_video.yaml").read_text())["model"]["autoencoder"]
        section["init_args"] = base["init_args"] | section["init_args"]
    if name == "vidtok_fsq":  # the library reads values of FSQ's codebook, which has no parameters
        section["init_args"]["arguments"]["regularizer"] = "kl"
    with torch.device("meta"):
        model: LibraryAutoencoder = plugins.build(section, VideoAutoencoder)
    return model.eval().to("meta")  # buffers that the library makes on the CPU too


@pytest.mark.parametrize("name", OFFICIAL)
def test_official_arguments_have_the_official_size_and_latent(name):
    model = official(name)
    parameters, shape = OFFICIAL[name]
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert model.latent_shapes(FULL) == {"latent": shape}


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(set(OFFICIAL) - {"vidtok_fsq"}))
def test_official_models_give_these_shapes(name):
    model, clip = official(name), torch.empty(1, *FULL, device="meta")
    with torch.no_grad():
        latents = model.encode(clip).mode()
        assert model.decode(latents, 16).shape == clip.shape
    assert tuple(latents["latent"].shape[1:]) == OFFICIAL[name][1]


def test_every_config_of_the_folder_is_an_official_model():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*OFFICIAL, "finetune", "wan21_decoder", "wan_tiny"}


def test_rates_are_measured_with_padding():
    rates = {name: official(name).compression_rate(FULL) for name in ("cogvideox", "wan21", "ltx2_video", "emu3")}
    assert rates == {"cogvideox": 1 / 48, "wan21": 5 / 192, "ltx2_video": 1 / 128, "emu3": 1 / 192}
    assert official("emu3").bits_per_pixel(FULL) == 15 / 256


# Traps.


@pytest.mark.parametrize(("name", "kept"), [("hunyuan_video", 5), ("wan", 5)])
def test_frames_that_the_library_drops_are_padded_and_come_back(name, kept):
    model, clip = tiny(name), noise(1, 3, 8, 8, 8)
    assert library_round_trip(model, clip).shape[2] == kept
    with torch.no_grad():
        assert model(clip).clip.shape == clip.shape
        padded = torch.cat([clip, clip[:, :, -1:]], dim=2)
        assert torch.equal(model.encode(clip).mode()["latent"], model.encode(padded).mode()["latent"])


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


@pytest.mark.parametrize(("name", "frames"), [("stable_video_diffusion", 2), ("allegro", 8)])
def test_two_frames_in_bfloat16_on_a_cpu_give_the_gradient_of_float32(name, frames):
    """There oneDNN leaves the weight gradient of a convolution unwritten that pads two frames and spans three."""
    model, clip = tiny(name), noise(1, 3, frames, 8, 8)
    gradients = []
    try:
        for enabled in (False, True):
            model.zero_grad(set_to_none=True)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                loss = model(clip).clip.float().square().mean()
            loss.backward()
            gradients.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    finally:
        model.zero_grad(set_to_none=True)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_a_constant_picture_is_refused():
    model = tiny("stable_diffusion")
    layer = model.model.decoder.conv_out
    before = [parameter.detach().clone() for parameter in layer.parameters()]
    try:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)
        with pytest.raises(UserError, match="AutoencoderKL to decode a picture, got 0 in every pixel"):
            model(noise(1, 3, 2, 4, 4))
    finally:
        for parameter, value in zip(layer.parameters(), before, strict=True):
            parameter.data.copy_(value)


def test_another_length_than_the_promised_is_refused(monkeypatch):
    model = tiny("hunyuan_video")
    monkeypatch.setattr(model, "_run_decoder", lambda latent: torch.zeros(1, 3, 4, 8, 8))
    with pytest.raises(UserError, match=r"to give \(1, 3, 5, 8, 8\), got \(1, 3, 4, 8, 8\)"):
        model.decode({"latent": noise(1, 2, 2, 2, 2)})


@pytest.mark.parametrize("name", ["easyanimate", "vidtok", "wan"])
def test_an_exception_spoils_no_later_clip(name):
    model, clip = tiny(name), noise(1, 3, 5, 8, 8)
    with torch.no_grad():
        expected = model(clip).clip

    def fail(*_: Any) -> None:
        raise RuntimeError("stop")

    for half in (model.model.encoder, model.model.decoder):
        layers = [module for module in half.modules() if isinstance(module, nn.Conv3d)]
        hook = layers[len(layers) // 2].register_forward_hook(fail)
        with torch.no_grad():
            with pytest.raises(RuntimeError, match="stop"):
                model(clip)
            hook.remove()
            assert torch.equal(model(clip).clip, expected)
    assert kept_frames(model) == []


def test_ltx2s_own_ratios_are_not_believed():
    model = official("ltx2_video")
    assert (model.model.temporal_compression_ratio, model.model.spatial_compression_ratio) == (16, 64)
    assert (model.time, model.space) == (8, 32)
    with pytest.raises(UserError, match="at least 16 pixels in height and width for LTX2Video"):
        tiny("ltx2_video").encode(noise(1, 3, 3, 8, 16))  # places are mirrored at the border


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


KEEPING = ("easyanimate", "kvae", "vidtok")  # frames, from one call of a layer to the next
SUPPORTING = [name for name in TINY if name not in ("wan", "wan/2.2", "emu3")]


@pytest.mark.parametrize(
    "name", [name if name in KEEPING else pytest.param(name, marks=pytest.mark.slow) for name in SUPPORTING]
)
def test_recomputation_changes_no_gradient_and_keeps_no_frames(name):
    """Layers that keep frames find those of the first run in the second."""
    arguments, frames, side = TINY[name]
    plain = tiny(name)
    model = class_of(name)(arguments, activation_checkpointing=True, **OWN.get(name, {}))
    model.load_state_dict(plain.state_dict())
    clip = noise(1, 3, plain.temporal.legal_length(frames + 1), side, side)
    gradients = []
    try:
        for each in (plain.train(), model.train()):
            torch.manual_seed(0)  # Allegro has dropout
            each.decode(each.encode(clip).sample()).square().mean().backward()
            gradients.append([p.grad for p in each.parameters()])
    finally:
        plain.zero_grad(set_to_none=True)
        plain.eval()
    torch.testing.assert_close(gradients[1], gradients[0], rtol=1e-4, atol=1e-7)
    assert kept_frames(model) == []


def kept_frames(model: LibraryAutoencoder) -> list[tuple[str, str]]:
    """List the tensors that layers hold beside their parameters and buffers."""
    return [
        (type(module).__name__, key)
        for module in model.model.modules()
        for key, value in vars(module).items()
        if isinstance(value, torch.Tensor) and key != "global_codebook_usage"
    ]


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


@pytest.mark.slow
def test_a_copy_of_a_recomputing_model_runs_its_own_blocks():
    name = "ltx2_video/diffusion"
    check_autoencoder(class_of(name)(TINY[name][0], activation_checkpointing=True, **OWN[name]), *TINY[name][1:])


def test_checkpointing_of_the_library_is_used_or_refused():
    model = class_of("ltx_video")(TINY["ltx_video"][0], activation_checkpointing=True)
    assert any(getattr(module, "gradient_checkpointing", False) for module in model.model.modules())
    with pytest.raises(UserError, match="activation_checkpointing false for Emu3VQVAE"):
        class_of("emu3")(TINY["emu3"][0], activation_checkpointing=True)


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


# As docs/library.md names them: what encodes, beside the encoder itself.
QUANT_CONV = {"wan", "wan/2.2", "hunyuan_video", "cosmos", "allegro", "easyanimate", "stable_diffusion"}
QUANT_CONV |= {"stable_video_diffusion", "minimax_h3", "flux2"}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in TINY]
)
def test_a_decoder_trains_over_a_frozen_encoder_without_a_graph_of_it(name):
    arguments, frames, side = TINY[name]
    model = class_of(name)(arguments, **OWN.get(name, {}))
    freeze(model, ["model.encoder", *(["model.quant_conv"] if name in QUANT_CONV else [])])
    model.train()
    latents = model.encode(noise(1, 3, frames, side, side)).sample()
    assert not latents["latent"].requires_grad
    model.decode(latents).square().mean().backward()
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, p in model.named_parameters() if p.grad is not None}
    assert trained


def library_emu3_length(model: LibraryAutoencoder, clip: torch.Tensor) -> int:
    codes = model.model.encode(clip.transpose(1, 2), torch.tensor([[4, 4]])).image_tokens[0]
    return int(model.model.decode(codes[None]).shape[1])


def test_latents_are_standardized_and_their_kl_is_the_librarys():
    model, clip = tiny("wan"), noise(2, 3, 5, 8, 8)
    with torch.no_grad():
        posterior, own = model.encode(clip)["latent"], model.model.encode(clip).latent_dist
        assert isinstance(posterior, StandardizedGaussian)
        mean, std = (torch.tensor(model.init_args["arguments"][f"latents_{key}"]) for key in ("mean", "std"))
        assert torch.allclose(posterior.mode(), (own.mean - mean.view(-1, 1, 1, 1)) / std.view(-1, 1, 1, 1), atol=1e-6)
        torch.manual_seed(3)
        sample = posterior.sample() * model.scale + model.shift
        torch.manual_seed(3)
        assert torch.allclose(sample, own.sample(), atol=1e-5)
        kl = 0.5 * (own.mean.square() + own.var - 1 - own.logvar).sum() / 2
        assert torch.allclose(posterior.regularization()["kl"], kl, rtol=1e-5)
        with pytest.raises(UserError, match="latents_mean of 3 numbers"):
            class_of("wan")(TINY["wan"][0] | {"z_dim": 3})


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


# Installation, arguments and weights.


def test_the_libraries_are_imported_by_no_module_itself():
    for path in (ROOT / "baselines" / "library").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.startswith(("diffusers", "transformers")) for name in names), (path.name, names)


@pytest.mark.parametrize(("name", "package"), [("wan", "diffusers"), ("emu3", "transformers")])
def test_a_missing_library_is_the_line_that_installs_it(name, package, monkeypatch):
    def absent(_: str) -> str:
        raise metadata.PackageNotFoundError

    cls = class_of(name)
    monkeypatch.setitem(sys.modules, cls.library_class.rpartition(".")[0], None)
    monkeypatch.setattr(metadata, "version", absent)
    with pytest.raises(UserError) as error:
        cls()
    assert str(error.value) == (
        f"Expected the package {package}, got none installed; run pip install 'vidtwin[library]'."
    )


@pytest.mark.parametrize(("name", "package"), [("minimax_h3", "diffusers"), ("emu3", "transformers")])
def test_a_class_that_a_library_lacks_is_one_line_with_the_version_that_has_it(name, package, monkeypatch):
    cls = class_of(name)
    module, _, library = cls.library_class.rpartition(".")
    monkeypatch.delattr(f"{module}.{library}")
    installed = metadata.version(package)
    with pytest.raises(UserError) as error:
        cls()
    beginning = f"Expected {package} with {library}, as {VERSIONS[package]} has it, got {installed} ("
    assert str(error.value).startswith(beginning)
    assert str(error.value).endswith("; run pip install 'vidtwin[library]'.")
    assert "\n" not in str(error.value)
    requirements = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["library"]
    assert any(line.startswith(f"{package}>={VERSIONS[package]},") for line in requirements)


def test_arguments_that_the_library_refuses_are_one_line():
    with pytest.raises(UserError, match=r"arguments of AutoencoderKLWan, got 'z_dmi'; did you mean 'z_dim'\?"):
        class_of("wan")({"z_dmi": 4})
    with pytest.raises(UserError, match="Expected arguments that AutoencoderKLMochi takes, got others: "):
        class_of("mochi")({"encoder_block_out_channels": [8, 8, 8, 8]})


def test_open_soras_image_half_is_the_librarys_own():
    """Written with layers of the project, it loads and computes what the library's class does."""
    library = class_of("stable_diffusion")._import_class()
    sizes: dict[str, Any] = {"down_block_types": ["DownEncoderBlock2D"] * 3, "up_block_types": ["UpDecoderBlock2D"] * 3}
    sizes |= {"block_out_channels": [4, 8, 8], "layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 3}
    theirs, frames = library(**sizes).double().eval(), noise(2, 3, 1, 8, 16)[:, :, 0].double()
    model = plugins.load("opensora", GROUP)(
        frame_channels=[4, 8, 8], frame_blocks=1, frame_latent_channels=3, channels=[4, 4, 4], norm_groups=2
    )
    ours = model.spatial_vae.double()
    ours.load_state_dict(theirs.state_dict())
    with torch.no_grad():
        given, wanted = ours.encode(frames), theirs.encode(frames).latent_dist
        torch.testing.assert_close(given.mean, wanted.mean, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(given.logvar, wanted.logvar, rtol=1e-12, atol=1e-12)
        decoded = theirs.decode(wanted.mean).sample
        torch.testing.assert_close(ours.decode(wanted.mean), decoded, rtol=1e-12, atol=1e-12)


def test_official_weights_convert_and_others_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    model, clip = tiny("wan"), noise(1, 3, 5, 8, 8)
    model.model.save_pretrained("repo/vae")
    assert main(["convert", "repo", "ours"]) == 2
    assert "got none; give --model wan --subfolder vae." in capsys.readouterr().err
    assert main(["convert", "repo", "ours", "--model", "wan"]) == 2
    assert "got none in repo; give --subfolder vae." in capsys.readouterr().err
    assert main(["convert", "repo", "ours", "--model", "wan", "--subfolder", "vae"]) == 0
    with torch.no_grad():
        assert torch.equal(VideoAutoencoder.from_pretrained("ours")(clip).clip, model(clip).clip)
    (file,) = Path("repo/vae").glob("*.safetensors")
    whole = load_file(file)
    save_file({name: value for name, value in whole.items() if name != "decoder.conv_out.bias"}, file)
    with pytest.raises(UserError, match=r"missing decoder\.conv_out\.bias"):
        class_of("wan").from_official("repo", "vae")
    file.rename(file.with_suffix(".bin"))
    with pytest.raises(UserError, match=r"Expected \.safetensors files in repo/vae, got none"):
        class_of("wan").from_official("repo", "vae")
    with pytest.raises(UserError, match="weights of AutoencoderKLMochi in repo/vae, got those of AutoencoderKLWan"):
        class_of("mochi").from_official("repo", "vae")
    with pytest.raises(UserError, match=r"with config\.json, got none in repo; give --subfolder"):
        class_of("wan").from_official("repo")


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


@pytest.mark.slow
@pytest.mark.usefixtures("without_pictures")
def test_cogvideox_passes_fit_test_and_reconstruct_on_real_clips(shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for split, clip in (("train", "bikes.mp4"), ("test", "carphone_pristine.mp4")):
        (tmp_path / "videos" / split).mkdir(parents=True)
        (tmp_path / "videos" / split / clip).symlink_to(shared / "data" / "clips" / clip)
    arguments = {
        f"--model.autoencoder.arguments.{key}={json.dumps(value)}" for key, value in TINY["cogvideox"][0].items()
    }
    data = ["--data=folder", "--data.root=videos", "--data.splits={train: train, val: test, test: test}"]
    data += ["--data.resolution=16", "--data.num_frames=12", "--data.batch_size=1", "--data.num_workers=0"]
    trainer = ["--trainer.max_steps=2", "--trainer.accelerator=cpu", "--trainer.devices=1"]
    trainer += ["--trainer.num_sanity_val_steps=0", "--trainer.enable_progress_bar=false"]
    options = ["--config", str(CONFIGS / "cogvideox.yaml"), *sorted(arguments), *data]
    loss = ["--model.loss.perceptual_weight=0", "--model.scheduler.init_args.warmup_steps=0"]
    assert main(["fit", *options, *trainer, *loss, "--trainer.enable_model_summary=false"]) == 0
    (last,) = tmp_path.rglob("last.ckpt")
    quick = ["--trainer.accelerator=cpu", "--name=row", "--downstream=false", "--players=0"]
    assert main(["test", "--ckpt_path", str(last), *data, *quick]) == 0
    row = json.loads(Path("results/rows/row/results.json").read_text())
    assert row["kind"] == "trained"
    assert row["latents"]["latent"]["shape"] == [2, 4, 4, 4]  # 12 frames are padded to 16
    assert row["compression_rate"] == pytest.approx(2 * 4 * 4 * 4 / (3 * 12 * 16 * 16))
    assert min(row["cost"]["flops"].values()) > 0
    video = str(shared / "data" / "clips" / "carphone_pristine.mp4")
    assert main(["reconstruct", video, "--ckpt_path", str(last), "--accelerator=cpu"]) == 0


# Commands on real clips: latents on disk, a kill and a resumption, two ranks.

COMMANDED = ("cogvideox", "emu3")  # with a Gaussian, with codes


@pytest.mark.parametrize("name", COMMANDED)
def test_latents_on_disk_give_the_models_clip(name, shared, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    video = tmp_path / "small.mp4"
    write_video(video, [frame[:32, :32] for frame in iter_frames(shared / "data" / "clips" / "mobile_cif_30f.mp4")], 30)
    model, length = tiny(name), tiny(name).temporal.usual_length
    ckpt = checkpoint(tmp_path / "model.ckpt", model=model)
    written: list[np.ndarray] = []

    class Recorder(VideoWriter):
        def write(self, picture: np.ndarray, time: Any = None) -> None:
            written.append(picture)
            super().write(picture, time)

    monkeypatch.setattr("vidtwin.apply.latent_reader.VideoWriter", Recorder)
    quiet = ["--accelerator", "cpu", "--progress", "false"]
    assert main(["encode", str(video), "--out", "latents", "--ckpt_path", ckpt, *quiet]) == 0
    assert main(["decode", "latents", "--out", "decoded", *quiet]) == 0
    frames = np.stack(list(iter_frames(video)))
    padded = np.concatenate([frames, np.repeat(frames[-1:], -len(frames) % length, 0)])
    with torch.no_grad():
        made = model(as_clip(list(padded.reshape(-1, length, *frames.shape[1:])), model.space)).clip
    wanted = np.concatenate([to_uint8(each) for each in made])[: len(frames), : frames.shape[1], : frames.shape[2]]
    apart = np.abs(np.stack(written).astype(int) - wanted)
    assert apart.max() <= (0 if name == "emu3" else 1)
    assert apart.mean() < 0.01


@pytest.fixture
def videos(shared, tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    train = ("bikes.mp4", "mma_demo.mp4", "foreman_cif_openh264.mp4", "mobile_cif_30f.mp4")
    for split, names in (("train", train), ("test", ("carphone_pristine.mp4", "v_BaseballPitch_g01_c01.avi"))):
        (tmp_path / "videos" / split).mkdir(parents=True)
        for name in names:
            (tmp_path / "videos" / split / name).symlink_to(shared / "data" / "clips" / name)
    saves = "vidtwin.training.callbacks.checkpoint.LatestCheckpoint"
    callback = {"class_path": saves, "init_args": {"every_n_steps": 1, "keep": 9}}
    (tmp_path / "saves.yaml").write_text(json.dumps({"trainer": {"callbacks": [callback]}}))
    return tmp_path


def fit_options(name: str, run: str, *words: str) -> list[str]:
    """Return the words of a fit of four steps, a checkpoint each."""
    arguments = [f"--model.autoencoder.arguments.{key}={json.dumps(value)}" for key, value in TINY[name][0].items()]
    data = ["--data=folder", "--data.root=videos", "--data.splits={train: train, val: test, test: test}"]
    data += ["--data.resolution=16", "--data.num_frames=8", "--data.batch_size=1", "--data.num_workers=0"]
    trainer = ["--trainer.max_steps=4", "--trainer.accelerator=cpu", "--trainer.num_sanity_val_steps=0"]
    trainer += ["--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"]
    model = ["--model.loss.perceptual_weight=0", "--model.scheduler.init_args.warmup_steps=0"]
    configs = ["--config", str(CONFIGS / f"{name}.yaml"), "--config", "saves.yaml"]
    return [
        "fit",
        *configs,
        *sorted(arguments),
        *data,
        *trainer,
        *model,
        f"--trainer.logger.init_args.name={run}",
        *words,
    ]


def read_run(run: str, step: int = 4) -> dict[str, torch.Tensor]:
    """Read the weights of a run after a step, and the averaged ones."""
    (path,) = Path("runs").glob(f"{run}/**/step-{step:08d}.ckpt")
    saved = checkpoints.read(path)
    return saved["state_dict"] | {f"ema.{name}": value for name, value in saved["ema"]["values"].items()}


def fit(options: Sequence[str]) -> None:
    assert main(options) == 0


KILLED = """
import os, signal, sys, threading, time
from pathlib import Path

def kill():
    while not list(Path("runs").glob("killed/**/step-00000002.ckpt")):
        time.sleep(0.01)
    os.kill(os.getpid(), signal.SIGKILL)

threading.Thread(target=kill, daemon=True).start()
from vidtwin.cli import main
main(sys.argv[1:])
"""


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDED)
def test_a_killed_training_resumes_bit_for_bit(name, videos):
    one = "--trainer.devices=1"
    fit(fit_options(name, "straight", one))
    assert forked.run_code(KILLED, fit_options(name, "killed", one), videos / "stderr", timeout=240) == -9
    fit(fit_options(name, "killed", one, "--resume=auto"))
    straight, resumed = read_run("straight"), read_run("killed")
    assert all(torch.equal(value, resumed[key]) for key, value in straight.items())


@pytest.mark.slow
def test_two_ranks_train_emu3_as_one_does_with_their_clips(videos):
    """No posterior is sampled, so that ranks draw nothing; by SGD the weights move by the gradient."""
    sgd = "--model.optimizer={class_path: torch.optim.SGD, init_args: {lr: 0.1}}"
    forked.run_ranks(fit, fit_options("emu3", "two", sgd, "--trainer.devices=2"), stderr=videos / "stderr")
    fit(fit_options("emu3", "one", sgd, "--trainer.devices=1", "--data.batch_size=2"))
    moves = []
    for run in ("two", "one"):
        first, last = read_run(run, 3), read_run(run)
        moves.append(torch.cat([(last[key] - first[key]).double().flatten() for key in sorted(last)]))
    assert moves[1].norm() > 0
    assert (moves[0] - moves[1]).norm() < 1e-3 * moves[1].norm()


@pytest.mark.slow
def test_two_ranks_train_cogvideox(videos):
    forked.run_ranks(fit, fit_options("cogvideox", "two", "--trainer.devices=2"), stderr=videos / "stderr")
    assert all(value.isfinite().all() for value in read_run("two").values())
