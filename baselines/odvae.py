"""OD-VAE, Open-Sora-Plan's first video autoencoder: a Stable Diffusion VAE made causal in time (Chen et al., 2024).

    encoder   clip ─ conv ─ [n × block, down] × 3 ─ n × block ─ block, attention, block ─ norm, SiLU, conv, conv 1³ ─> z

    decoder   z ─ conv 1³, conv ─ block, attention, block ─ [(n + 1) × block, up] × 3 ─ (n + 1) × block ─┐
              clip <─ norm, SiLU, conv ──────────────────────────────────────────────────────────────────┘

(arXiv 2409.01199, "OD-VAE: An Omni-dimensional Video Compressor".) 4 x 8 x 8 pixels become one position of z. All
three steps down halve height and width, two of them time; 1 + 4k frames become 1 + k steps. The releases differ in how:

    release   first two levels   down                                      up                               attention
    v1.0      3-D                space, then mean of 3 frames (levels 0, 1)  space, then interpolation      scrambled
    v1.1      single frames      frames, then mean + conv (levels 1, 2)      space, then interpolation + conv   frames
    v1.2      single frames      frames; one conv over all axes (1, 2)       one interpolation of all axes      frames

Blocks are those of layers/causal_vae.py, with group norms over all frames: padding in time is causal, statistics are
not. Modules have the released names, so that released weights load (`ODVAE.from_official`). v1.2 is the paper's OD-VAE.

Departures: clips are not coded in overlapping tiles and windows. Latents are not scaled: the released pipelines do that
outside of the model.
"""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers.causal_vae import (
    Downsample3d,
    FrameAttention,
    FrameConv2d,
    FrameDownsample,
    RepeatingConv3d,
    ResidualBlock,
    Upsample3d,
    check_latent,
    double_frames,
    make_norm,
    repeat_first,
)
from vidtwin.layers.conv3d import channels_last
from vidtwin.layers.recompute import Recomputing
from vidtwin.posteriors import DiagonalGaussian, Encoding, Latents

Release = Literal["v1.0", "v1.1", "v1.2"]

# The layers in each release's config.json.
_IN_SPACE = {
    "encoder_conv_in": "CausalConv3d",
    "encoder_resnet_blocks": ["ResnetBlock3D"] * 4,
    "encoder_spatial_downsample": ["SpatialDownsample2x"] * 3 + [""],
    "decoder_spatial_upsample": ["", *["SpatialUpsample2x"] * 3],
    "decoder_temporal_upsample": ["", "", "TimeUpsample2x", "TimeUpsample2x"],
    "encoder_attention": "AttnBlock3D",
    "decoder_attention": "AttnBlock3D",
}
_IN_FRAMES = {
    "encoder_conv_in": "Conv2d",
    "encoder_resnet_blocks": ["ResnetBlock2D"] * 2 + ["ResnetBlock3D"] * 2,
    "encoder_attention": "AttnBlock3DFix",
    "decoder_attention": "AttnBlock3DFix",
}
CONFIGS: dict[Release, dict[str, Any]] = {
    "v1.0": {**_IN_SPACE, "encoder_temporal_downsample": ["TimeDownsample2x", "TimeDownsample2x", "", ""]},
    "v1.1": {
        **_IN_FRAMES,
        "encoder_spatial_downsample": ["Downsample"] * 3 + [""],
        "encoder_temporal_downsample": ["", "TimeDownsampleRes2x", "TimeDownsampleRes2x", ""],
        "decoder_spatial_upsample": ["", *["SpatialUpsample2x"] * 3],
        "decoder_temporal_upsample": ["", "", "TimeUpsampleRes2x", "TimeUpsampleRes2x"],
    },
    "v1.2": {
        **_IN_FRAMES,
        "encoder_spatial_downsample": ["Downsample", *["Spatial2xTime2x3DDownsample"] * 2, ""],
        "encoder_temporal_downsample": [""] * 4,
        "decoder_spatial_upsample": ["", "SpatialUpsample2x", *["Spatial2xTime2x3DUpsample"] * 2],
        "decoder_temporal_upsample": [""] * 4,
    },
}
# Values of the released class for keys that config.json does not have: no release's, since time is halved elsewhere.
RELEASED_DEFAULTS = {**_IN_SPACE, "encoder_temporal_downsample": ["", "TimeDownsample2x", "TimeDownsample2x", ""]}


class ScrambledAttention(FrameAttention):
    """Attention of v1.0, which takes (B, C, T, H, W) in memory for (B, T, C, H, W) without exchanging C and T.

    Row c·T + t of a clip is channel (c·T + t) mod C of "frame" (c·T + t) div C: for T = 1 that is `FrameAttention`.
    """

    def _split(self, x: Tensor) -> Tensor:
        batch, channels, frames = x.shape[:3]
        return x.reshape(batch * frames, 1, channels, -1).transpose(2, 3)

    def _join(self, tokens: Tensor, like: Tensor) -> Tensor:
        return tokens.transpose(2, 3).reshape(like.shape)


class TimeDownsample(nn.Module):
    """Halve the frames: the mean of each second frame and the two before it."""

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (B, C, T, H, W) → (B, C, 1 + (T − 1) // 2, H, W)."""
        return F.avg_pool3d(repeat_first(x, 2), (3, 1, 1), stride=(2, 1, 1))


class TimeDownsampleResidual(nn.Module):
    """Halve the frames: a learned mixture of `TimeDownsample` and a strided 3x3x3 convolution.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = nn.Conv3d(width, width, 3, stride=(2, 1, 1), padding=(0, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (B, C, T, H, W) → (B, C, 1 + (T − 1) // 2, H, W)."""
        x = repeat_first(x, 2)
        share = self.mix_factor.sigmoid()
        return share * F.avg_pool3d(x, (3, 1, 1), stride=(2, 1, 1)) + (1 - share) * self.conv(x)


class TimeUpsample(nn.Module):
    """Double the frames by linear interpolation, the first one aside."""

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T, H, W) → (B, C, 2T − 1, H, W)."""
        return double_frames(x, "linear")


class TimeUpsampleResidual(nn.Module):
    """`TimeUpsample`, then a learned mixture of its output and a 3x3x3 convolution of that.

    Args:
        width: C.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mix_factor = nn.Parameter(torch.tensor([2.0]))
        self.conv = RepeatingConv3d(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T, H, W) → (B, C, 2T − 1, H, W)."""
        x = double_frames(x, "linear")
        share = self.mix_factor.sigmoid()
        return share * x + (1 - share) * self.conv(x)


def _make_resampler(name: str, width: int) -> nn.Module | None:
    """Build the layer that a released config names; None for ""."""
    if name in ("TimeDownsample2x", "TimeUpsample2x"):
        return {"TimeDownsample2x": TimeDownsample, "TimeUpsample2x": TimeUpsample}[name]()
    if name in ("TimeDownsampleRes2x", "TimeUpsampleRes2x"):
        return {"TimeDownsampleRes2x": TimeDownsampleResidual, "TimeUpsampleRes2x": TimeUpsampleResidual}[name](width)
    if name == "Downsample":
        return FrameDownsample(width)
    if name in ("SpatialDownsample2x", "Spatial2xTime2x3DDownsample"):
        return Downsample3d(width, time="Time" in name)
    if name in ("SpatialUpsample2x", "Spatial2xTime2x3DUpsample"):
        return Upsample3d(width, time="Time" in name)
    return None


class DownLevel(nn.Module):
    """Residual blocks, then downsampling of space and of time.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output.
        blocks: Number of blocks.
        per_frame: Blocks see single frames.
        groups: Groups of the norms.
        space, time: Names of the layers after the blocks, "" for none.
    """

    def __init__(
        self, width_in: int, width_out: int, blocks: int, per_frame: bool, groups: int, space: str, time: str
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width_in if i == 0 else width_out, width_out, "group", per_frame, groups)
            for i in range(blocks)
        )
        self.downsample = _make_resampler(space, width_out)
        self.time_downsample = _make_resampler(time, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width_in, T, H, W) → (B, width_out, T', H', W')."""
        return _run([*self.block, self.downsample, self.time_downsample], x)


class UpLevel(nn.Module):
    """Residual blocks, then upsampling of space and of time, with the arguments of `DownLevel`."""

    def __init__(self, width_in: int, width_out: int, blocks: int, groups: int, space: str, time: str) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(width_in if i == 0 else width_out, width_out, "group", False, groups) for i in range(blocks)
        )
        self.upsample = _make_resampler(space, width_out)
        self.time_upsample = _make_resampler(time, width_out)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width_in, T, H, W) → (B, width_out, T', H', W')."""
        return _run([*self.block, self.upsample, self.time_upsample], x)


def _run(layers: Sequence[nn.Module | None], x: Tensor) -> Tensor:
    for layer in layers:
        x = x if layer is None else layer(x)
    return x


class Middle(nn.Module):
    """Residual block ─ attention ─ residual block, at the lowest resolution."""

    def __init__(self, width: int, groups: int, scrambled: bool) -> None:
        super().__init__()
        self.block_1 = ResidualBlock(width, width, "group", False, groups)
        self.attn_1 = (ScrambledAttention if scrambled else FrameAttention)(width, "group", groups)
        self.block_2 = ResidualBlock(width, width, "group", False, groups)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, T, H, W); the shape stays."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(Recomputing):
    """Encoder from a clip to a feature map.

    Args:
        config: A release's layers, as in `CONFIGS`.
        widths: Channels of each level, from pixels to latent.
        latent_channels: Half the channels of the output.
        blocks: Residual blocks per level.
        groups: Groups of the norms.
        activation_checkpointing: Recompute each level in the backward pass.
    """

    def __init__(
        self,
        config: dict[str, Any],
        widths: Sequence[int],
        latent_channels: int,
        blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = (FrameConv2d if config["encoder_conv_in"] == "Conv2d" else RepeatingConv3d)(3, widths[0])
        kinds = zip(
            config["encoder_resnet_blocks"],
            config["encoder_spatial_downsample"],
            config["encoder_temporal_downsample"],
            strict=True,
        )
        self.down = nn.ModuleList(
            DownLevel(before, width, blocks, block == "ResnetBlock2D", groups, space, time)
            for (before, width), (block, space, time) in zip(pairwise(widths), kinds, strict=True)
        )
        self.mid = Middle(widths[-1], groups, config["encoder_attention"] == "AttnBlock3D")
        self.norm_out = make_norm("group", widths[-1], groups)
        self.conv_out = RepeatingConv3d(widths[-1], 2 * latent_channels)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) → (B, 2·Z, T', H/8, W/8)."""
        x = self.run_all([*self.down, self.mid], self.conv_in(channels_last(clip)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(Recomputing):
    """Decoder from a feature map to a clip, with the encoder's arguments."""

    def __init__(
        self,
        config: dict[str, Any],
        widths: Sequence[int],
        latent_channels: int,
        blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = RepeatingConv3d(latent_channels, widths[-1])
        self.mid = Middle(widths[-1], groups, config["decoder_attention"] == "AttnBlock3D")
        kinds = zip(config["decoder_spatial_upsample"], config["decoder_temporal_upsample"], strict=True)
        # Levels have the encoder's numbers, so that the last one runs first; each ends with its own width.
        levels = [*widths[1:], widths[-1]]
        self.up = nn.ModuleList(
            UpLevel(before, width, blocks + 1, groups, space, time)
            for (width, before), (space, time) in zip(pairwise(levels), kinds, strict=True)
        )
        self.norm_out = make_norm("group", widths[1], groups)
        self.conv_out = RepeatingConv3d(widths[1], 3)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, Z, T', h, w) → (B, 3, T, 8h, 8w)."""
        x = self.run_all([self.mid, *reversed(self.up)], self.conv_in(channels_last(z)))
        return self.conv_out(F.silu(self.norm_out(x)))


class ODVAE(VideoAutoencoder):
    """OD-VAE.

    The defaults are v1.2 (239,189,991 parameters); v1.1 has 246,859,499, v1.0 229,169,895.

    Args:
        release: "v1.0", "v1.1" or "v1.2" (see above).
        latent_channels: Z, channels of the latent.
        channels: Channels at the resolution of the pixels.
        multipliers: Channels of the four levels as multiples of `channels`.
        num_blocks: n, residual blocks per level of the encoder; the decoder has one more.
        norm_groups: Groups of the norms.
        activation_checkpointing: Recompute each level in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("latent",)
    temporal = TemporalSpec(multiple=4, offset=1, pad="last")
    spatial_multiple = 8

    def __init__(
        self,
        release: Release = "v1.2",
        latent_channels: int = 4,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        norm_groups: int = 32,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if release not in CONFIGS:
            raise UserError(f"Expected release {', '.join(CONFIGS)}, got {release!r}.")
        counts = {"latent_channels": latent_channels, "channels": channels, "num_blocks": num_blocks}
        for name, count in (counts | {"norm_groups": norm_groups}).items():
            if count < 1:
                raise UserError(f"Expected {name} of at least 1, got {count}.")
        if len(multipliers) != 4 or min(multipliers) < 1:
            raise UserError(f"Expected four multipliers of at least 1, got {list(multipliers)}.")
        self.latent_channels = z = latent_channels
        widths = [channels, *(channels * multiplier for multiplier in multipliers)]
        sizes = (CONFIGS[release], widths, z, num_blocks, norm_groups, activation_checkpointing)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)
        self.quant_conv = RepeatingConv3d(2 * z, 2 * z, kernel=(1, 1, 1), padding=0)
        self.post_quant_conv = RepeatingConv3d(z, z, kernel=(1, 1, 1), padding=0)

    @classmethod
    def from_official(
        cls, path: str | Path, release: Release | None = None, activation_checkpointing: bool = False
    ) -> Self:
        """Load a release, in evaluation mode. Sizes are those of its tensors.

        Args:
            path: Its folder, with config.json and diffusion_pytorch_model.safetensors, or one file of weights (of a
                training too, whose averaged weights are taken).
            release: As in the constructor; None is the one that config.json beside the weights describes.
            activation_checkpointing: As in the constructor.

        Raises:
            UserError: The files are missing or of another model; names what does not fit.
        """
        state, config, file = weights.read_release(path)
        if release is None:
            release = _find_release(config, file)
        model = cls(release, **_read_sizes(state, str(file)), activation_checkpointing=activation_checkpointing)
        weights.check_fit(state, model.state_dict(), str(file))
        model.load_state_dict(state)
        return model.eval()

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.decoder.conv_out.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _encode(self, clip: Tensor) -> Encoding:
        return Encoding(latent=DiagonalGaussian(*self.quant_conv(self.encoder(clip)).chunk(2, dim=1)))

    def _decode(self, latents: Latents) -> Tensor:
        check_latent(latents["latent"], self.latent_channels)
        clip: Tensor = self.decoder(self.post_quant_conv(latents["latent"]))
        return clip

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        _, frames, height, width = clip_shape
        return {"latent": (self.latent_channels, 1 + (frames - 1) // 4, height // 8, width // 8)}


def _find_release(config: dict[str, Any], file: Path) -> Release:
    """Return the release that a released config describes.

    The weights do not: layers that halve and double time, and both kinds of attention, have the same or none.
    """
    remedy = f"give release={' or '.join(repr(name) for name in get_args(Release))}"
    if not config:
        raise UserError(f"Expected config.json beside {file}, got none; its weights do not say the release: {remedy}.")
    found = {key: config.get(key, default) for key, default in RELEASED_DEFAULTS.items()}
    for name, wanted in CONFIGS.items():
        if found == wanted:
            return name
    nearest = max(CONFIGS, key=lambda name: sum(found[key] == value for key, value in CONFIGS[name].items()))
    key = next(key for key, value in CONFIGS[nearest].items() if found[key] != value)
    raise UserError(
        f"Expected a config of OD-VAE beside {file}, such as {key} {CONFIGS[nearest][key]} of {nearest}, got "
        f"{found[key]}; {remedy} if the weights are of one."
    )


def _read_sizes(state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Return the constructor's arguments that the tensors of a release show."""

    def width(name: str) -> int:
        for weight in (f"{name}.conv.weight", f"{name}.weight"):
            if weight in state:
                return state[weight].shape[0]
        raise UserError(f"Expected weights of OD-VAE, got none named {name}.weight or {name}.conv.weight in {source}.")

    channels = width("encoder.conv_in")
    blocks = {name.split(".")[4] for name in state if name.startswith("encoder.down.0.block.")}
    return {
        "latent_channels": width("post_quant_conv"),
        "channels": channels,
        "multipliers": [width(f"encoder.down.{level}.block.0.conv2") // channels for level in range(4)],
        "num_blocks": len(blocks),
    }
