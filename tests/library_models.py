"""Tiny and official models of the adapters of diffusers and transformers, for their tests."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml

from vidtwin import VideoAutoencoder, plugins
from vidtwin.baselines.library.base import LibraryAutoencoder

ROOT = Path(__file__).resolve().parents[1]


CONFIGS = ROOT / "configs" / "library"


GROUP = "vidtwin.autoencoders"


# Arguments that make each adapter tiny, by its short name and variant, and frames and side of a clip.
_SMALL: dict[str, Any] = {"layers_per_block": 1, "norm_num_groups": 2, "latent_channels": 2}


_LTX2: tuple[dict[str, Any], int, int] = (
    {"block_out_channels": [8, 16], "decoder_block_out_channels": [8, 16], "layers_per_block": [1, 1, 1]}
    | {"down_block_types": ["LTX2VideoDownBlock3D"] * 2, "decoder_layers_per_block": [1, 1, 1]}
    | {"spatio_temporal_scaling": [True, True], "decoder_spatio_temporal_scaling": [True, True]}
    | {"decoder_inject_noise": [False] * 3, "downsample_type": ["spatial", "spatiotemporal"]}
    | {"upsample_type": ["spatiotemporal", "spatial"], "upsample_residual": [True] * 2}
    | {"upsample_factor": [1, 1], "patch_size": 2, "latent_channels": 4},
    3,
    16,
)
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
    "ltx2_video": _LTX2,
    "ltx2_video/diffusion": _LTX2,
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
