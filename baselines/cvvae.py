"""CV-VAE: a Stable Diffusion VAE with half of its convolutions over time too (Zhao et al., NeurIPS 2024).

    encoder   clip ─ conv ─ [n × block, down] × 3 ─ n × block ─ block, attention, block ─ norm, SiLU, conv ─> z

    decoder   z ─ conv ─ block, attention, block ─ [(n + 1) × block, up] × 3 ─ (n + 1) × block ─┐
              clip <─ norm, SiLU, conv ─────────────────────────────────────────────────────────┘

(arXiv 2405.20279, "CV-VAE: A Compatible Video VAE for Latent Generative Video Models".) 4 x 8 x 8 pixels become one
position of z. All three steps down halve height and width, the first and the third time too; 1 + 4k frames become
1 + k steps. A block has a convolution of 3x3x3 and one of 3x3 in each frame. The encoder pads time with its first frame
alone, the decoder on both sides. The two releases are two networks:

    release   borders of frames   decoder's borders of time        attention                      epsilon   channels
    sd2.1     zeros               zeros; frames where it doubles   frame, then time (decoder)     1e-5             4
    sd3       pixels again        frames again                     frame                          1e-6            16

Videos are coded in windows of 17 frames that share one frame, and decoded in windows of 5 steps that share one step.
Up to 17 frames are one window; norms and the decoder's attention see no further.

Modules are named as in sd2.1, the layers of attention as in layers/vqgan.py; both releases load
(`CVVAE.from_official`). The repository states no licence for code and weights; ask the authors.

Departures: frames above 576 pixels are not coded in overlapping tiles. Layers keep the precision of their input; the
released ones run the encoder's convolutions in float32 and resample bfloat16 in float16, which overflows above 65,504.
Latents are not scaled: the released pipelines do that outside of the model.
"""

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers import vqgan
from vidtwin.layers.causal_vae import FrameConv2d, check_latent, fold, unfold
from vidtwin.layers.conv3d import Conv3d, channels_last
from vidtwin.layers.recompute import Recomputing
from vidtwin.posteriors import DiagonalGaussian, Encoding, Latents

Release = Literal["sd2.1", "sd3"]
FRAMES_PER_STEP = 4
LATENT_CHANNELS: dict[Release, int] = {"sd2.1": 4, "sd3": 16}
EPSILON: dict[Release, float] = {"sd2.1": 1e-5, "sd3": 1e-6}
# Keys of a released config.json whose other values are other models, with the value that both releases have.
FIXED = {"causal_encoder": True, "causal_decoder": False, "half_3d": True, "use_3d_conv": True, "attn_resolutions": []}


class PaddedConv3d(Conv3d):
    """3x3x3 convolution.

    Args:
        width_in: Channels of the input.
        width_out: Channels of the output.
        time: Frames around the clip: "first" is the first one twice in front, "ends" the first and the last once each,
            "zeros" a black one on both sides.
        space: Pixels around each frame: "zeros", its outermost "edges" again, or "none".
        stride: Of time, height and width.
    """

    def __init__(
        self,
        width_in: int,
        width_out: int,
        time: Literal["first", "ends", "zeros"],
        space: Literal["zeros", "edges", "none"],
        stride: tuple[int, int, int] = (1, 1, 1),
    ) -> None:
        side = int(space == "zeros")
        super().__init__(width_in, width_out, 3, stride, padding=(int(time == "zeros"), side, side))
        front, back = {"first": (2, 0), "ends": (1, 1), "zeros": (0, 0)}[time]
        self.repeats = (*(int(space == "edges"),) * 4, front, back)

    def forward(self, x: Tensor) -> Tensor:
        """Pad and convolve: (B, width_in, T, H, W) → (B, width_out, T', H', W')."""
        return super().forward(F.pad(x, self.repeats, mode="replicate") if any(self.repeats) else x)


def _make_conv(release: Release, width_in: int, width_out: int, decoder: bool) -> PaddedConv3d:
    """Build a convolution that keeps the size, with the borders of a release."""
    if release == "sd3":
        return PaddedConv3d(width_in, width_out, "ends" if decoder else "first", "edges")
    return PaddedConv3d(width_in, width_out, "zeros" if decoder else "first", "zeros")


class ResidualBlock(nn.Module):
    """norm ─ SiLU ─ conv 3³ ─ norm ─ SiLU ─ conv 3x3, plus the input (through a 1³ convolution if the width changes).

    Args:
        release: The release whose borders and epsilon it has.
        width_in: Channels of the input.
        width_out: Channels of the output.
        groups: Groups of the norms, whose statistics go over all frames.
        decoder: It is in the decoder.
    """

    def __init__(self, release: Release, width_in: int, width_out: int, groups: int, decoder: bool) -> None:
        super().__init__()
        self.norm1 = vqgan.group_norm(groups, width_in, EPSILON[release])
        self.conv1 = _make_conv(release, width_in, width_out, decoder)
        self.norm2 = vqgan.group_norm(groups, width_out, EPSILON[release])
        self.conv2 = FrameConv2d(width_out, width_out)
        self.nin_shortcut = nn.Conv3d(width_in, width_out, 1) if width_in != width_out else None

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width_in, T, H, W) → (B, width_out, T, H, W)."""
        y = self.conv1(F.silu(self.norm1(x)))
        y = self.conv2(F.silu(self.norm2(y)))
        return y + (x if self.nin_shortcut is None else self.nin_shortcut(x))  # in this order: see layers/conv3d.py


class FrameAttention(vqgan.PixelAttention):
    """Self-attention over the pixels of each frame, by itself with its norm."""

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels of (B, C, T, H, W); the shape stays."""
        return unfold(super().forward(fold(x)), len(x))


class FrameTimeAttention(vqgan.PixelAttention):
    """Self-attention over the pixels of each frame, then of its result over the frames at each pixel.

    The second one has no residual connection of its own and no mask: x + time(frame(x)).

    Args:
        width: C.
        groups: Groups of the norm of each frame.
        eps: Of both norms.
    """

    def __init__(self, width: int, groups: int, eps: float) -> None:
        super().__init__(width, groups, eps)
        self.norm_t = nn.LayerNorm(width, eps=eps)
        self.q_t, self.k_t, self.v_t, self.proj_out_t = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        """Attend over the pixels and the frames of (B, C, T, H, W); the shape stays."""
        height = x.shape[3]
        y = self.norm_t(rearrange(self.attend(fold(x)), "(b t) c h w -> (b h w) 1 t c", b=len(x)))
        y = self.proj_out_t(F.scaled_dot_product_attention(self.q_t(y), self.k_t(y), self.v_t(y)))
        return x + rearrange(y, "(b h w) 1 t c -> b c t h w", b=len(x), h=height)


class Downsample(nn.Module):
    """Halve the height, the width and, with `time`, the frames by a strided convolution.

    Args:
        release: "sd2.1" pads frames by zeros on the right and at the bottom, "sd3" by their edges on all sides.
        width: C.
        time: Halve the frames too.
    """

    def __init__(self, release: Release, width: int, time: bool) -> None:
        super().__init__()
        self.one_sided = release == "sd2.1"
        stride = (2 if time else 1, 2, 2)
        self.conv = PaddedConv3d(width, width, "first", "none" if self.one_sided else "edges", stride)

    def forward(self, x: Tensor) -> Tensor:
        """Downsample (B, C, T, H, W) → (B, C, 1 + (T − 1) // 2, H/2, W/2), or T frames."""
        return self.conv(F.pad(x, (0, 1, 0, 1)) if self.one_sided else x)


class Upsample(nn.Module):
    """Double the height and width (nearest neighbour), convolve, and with `time` make two frames of each.

    The first half of the convolution's channels is the first of the two frames; the first frame of all is dropped.

    Args:
        release: The release whose borders of frames it has. Time has its first and last frame again in both.
        width: C.
        time: Double the frames too.
    """

    def __init__(self, release: Release, width: int, time: bool) -> None:
        super().__init__()
        self.time = time
        space: Literal["edges", "zeros"] = "edges" if release == "sd3" else "zeros"
        self.conv = PaddedConv3d(width, 2 * width if time else width, "ends", space)

    def forward(self, x: Tensor) -> Tensor:
        """Upsample (B, C, T, H, W) → (B, C, 2T − 1, 2H, 2W), or T frames."""
        x = self.conv(F.interpolate(x, scale_factor=(1, 2, 2), mode="nearest"))
        return rearrange(x, "b (s c) t h w -> b c (t s) h w", s=2)[:, :, 1:] if self.time else x


class Level(nn.Module):
    """Residual blocks, then a change of resolution in all levels but one.

    Args:
        release: As in `ResidualBlock`.
        width_in: Channels of the input.
        width_out: Channels of the output.
        blocks: Number of blocks.
        groups: Groups of the norms.
        decoder: It is in the decoder.
        downsample, upsample: The layer after the blocks, under its name.
    """

    def __init__(
        self,
        release: Release,
        width_in: int,
        width_out: int,
        blocks: int,
        groups: int,
        decoder: bool,
        downsample: nn.Module | None = None,
        upsample: nn.Module | None = None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResidualBlock(release, width_in if i == 0 else width_out, width_out, groups, decoder) for i in range(blocks)
        )
        self.downsample, self.upsample = downsample, upsample

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, width_in, T, H, W) → (B, width_out, T', H', W')."""
        for layer in (*self.block, self.downsample, self.upsample):
            x = x if layer is None else layer(x)
        return x


class Middle(nn.Module):
    """Residual block ─ attention ─ residual block, at the lowest resolution."""

    def __init__(self, release: Release, width: int, groups: int, decoder: bool) -> None:
        super().__init__()
        attention = FrameTimeAttention if decoder and release == "sd2.1" else FrameAttention
        self.block_1 = ResidualBlock(release, width, width, groups, decoder)
        self.attn_1 = attention(width, groups, EPSILON[release])
        self.block_2 = ResidualBlock(release, width, width, groups, decoder)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, C, T, H, W); the shape stays."""
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(Recomputing):
    """Encoder of a window to the moments of the latent.

    Args:
        release: "sd2.1" or "sd3".
        widths: Channels at the pixels, then of the four levels.
        latent_channels: Half the channels of the output.
        blocks: Residual blocks per level.
        groups: Groups of the norms.
        activation_checkpointing: Recompute each level in the backward pass.
    """

    def __init__(
        self,
        release: Release,
        widths: Sequence[int],
        latent_channels: int,
        blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = _make_conv(release, 3, widths[0], decoder=False)
        down = [Downsample(release, width, time=level % 2 == 0) for level, width in enumerate(widths[1:-1])]
        self.down = nn.ModuleList(
            Level(release, before, width, blocks, groups, decoder=False, downsample=layer)
            for (before, width), layer in zip(pairwise(widths), [*down, None], strict=True)
        )
        self.mid = Middle(release, widths[-1], groups, decoder=False)
        self.norm_out = vqgan.group_norm(groups, widths[-1], EPSILON[release])
        self.conv_out = _make_conv(release, widths[-1], 2 * latent_channels, decoder=False)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) → (B, 2·Z, T', H/8, W/8)."""
        x = self.run_all([*self.down, self.mid], self.conv_in(channels_last(clip)))
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(Recomputing):
    """Decoder of a window of the latent, with the encoder's arguments."""

    def __init__(
        self,
        release: Release,
        widths: Sequence[int],
        latent_channels: int,
        blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = _make_conv(release, latent_channels, widths[-1], decoder=True)
        self.mid = Middle(release, widths[-1], groups, decoder=True)
        # Levels have the encoder's numbers, so that the last one runs first; each ends with its own width.
        levels = [*widths[1:], widths[-1]]
        up = [Upsample(release, width, time=level % 2 == 0) for level, width in enumerate(widths[2:])]
        self.up = nn.ModuleList(
            Level(release, before, width, blocks + 1, groups, decoder=True, upsample=layer)
            for (width, before), layer in zip(pairwise(levels), [None, *up], strict=True)
        )
        self.norm_out = vqgan.group_norm(groups, widths[1], EPSILON[release])
        self.conv_out = _make_conv(release, widths[1], 3, decoder=True)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, Z, T', h, w) → (B, 3, 4·T' − 3, 8h, 8w)."""
        x = self.run_all([self.mid, *reversed(self.up)], self.conv_in(channels_last(z)))
        return self.conv_out(F.silu(self.norm_out(x)))


class CVVAE(VideoAutoencoder):
    """CV-VAE.

    The defaults are the release for Stable Diffusion 2.1: 182,446,475 parameters. That for Stable Diffusion 3 has
    16 channels and 181,892,515 parameters.

    Args:
        release: "sd2.1" or "sd3" (see above).
        latent_channels: Z, channels of the latent; None is the release's.
        channels: Channels at the resolution of the pixels.
        multipliers: Channels of the four levels as multiples of `channels`.
        num_blocks: n, residual blocks per level of the encoder; the decoder has one more.
        norm_groups: Groups of the norms.
        chunk_frames: Frames by which windows follow one another, a multiple of 4; each has one more. None: one window.
        activation_checkpointing: Recompute each level in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("latent",)
    temporal = TemporalSpec(multiple=FRAMES_PER_STEP, offset=1, pad="last")
    spatial_multiple = 8

    def __init__(
        self,
        release: Release = "sd2.1",
        latent_channels: int | None = None,
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 4, 4),
        num_blocks: int = 2,
        norm_groups: int = 32,
        chunk_frames: int | None = 16,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if release not in LATENT_CHANNELS:
            raise UserError(f"Expected release {' or '.join(LATENT_CHANNELS)}, got {release!r}.")
        for name, given in self.init_args.items():
            if type(given) is int and given < 1:
                raise UserError(f"Expected {name} of at least 1, got {given}.")
        if len(multipliers) != 4 or min(multipliers) < 1:
            raise UserError(f"Expected four multipliers of at least 1, got {list(multipliers)}.")
        if chunk_frames is not None and chunk_frames % FRAMES_PER_STEP:
            raise UserError(f"Expected chunk_frames that is a multiple of {FRAMES_PER_STEP}, got {chunk_frames}.")
        self.chunk_frames = chunk_frames
        self.latent_channels = LATENT_CHANNELS[release] if latent_channels is None else latent_channels
        widths = [channels, *(channels * multiplier for multiplier in multipliers)]
        sizes = (release, widths, self.latent_channels, num_blocks, norm_groups, activation_checkpointing)
        self.encoder = Encoder(*sizes)
        self.decoder = Decoder(*sizes)

    @classmethod
    def from_official(cls, path: str | Path, norm_groups: int = 32, activation_checkpointing: bool = False) -> Self:
        """Load a release, in evaluation mode. The release and its sizes are those of its tensors.

        Args:
            path: Its folder, with config.json and diffusion_pytorch_model.safetensors, or one file of weights. Windows
                are those of config.json beside the weights, without one those of the releases, 16 frames.
            norm_groups: As in the constructor; the weights do not show it.
            activation_checkpointing: Likewise.

        Raises:
            UserError: The files are missing or of another model; names what does not fit.
        """
        state, config, file = weights.read_release(path)
        for key, wanted in FIXED.items():
            if config.get(key, wanted) != wanted:
                raise UserError(f"Expected {key} {wanted} of CV-VAE beside {file}, got {config[key]}.")
        release: Release = "sd3" if any(name.startswith("encoder.down_blocks.") for name in state) else "sd2.1"
        model = cls(
            release,
            **_read_sizes(state, release, str(file)),
            norm_groups=norm_groups,
            chunk_frames=config.get("en_de_n_frames_a_time", 16),
            activation_checkpointing=activation_checkpointing,
        )
        own = model.state_dict()
        names = {name: to_released_name(name, release) for name in own}
        wanted_state = {names[name]: view_as_released(name, tensor, release) for name, tensor in own.items()}
        weights.check_fit(state, wanted_state, str(file))
        model.load_state_dict({name: state[names[name]].view_as(tensor) for name, tensor in own.items()})
        return model.eval()

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _encode(self, clip: Tensor) -> Encoding:
        moments = _run_windows(self.encoder, clip, self.chunk_frames)
        return Encoding(latent=DiagonalGaussian(*moments.chunk(2, dim=1)))

    def _decode(self, latents: Latents) -> Tensor:
        check_latent(latents["latent"], self.latent_channels)
        steps = None if self.chunk_frames is None else self.chunk_frames // FRAMES_PER_STEP
        return _run_windows(self.decoder, latents["latent"], steps)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        _, frames, height, width = clip_shape
        return {"latent": (self.latent_channels, 1 + (frames - 1) // FRAMES_PER_STEP, height // 8, width // 8)}


def _run_windows(network: nn.Module, x: Tensor, stride: int | None) -> Tensor:
    """Run a network on windows that share a frame, and drop the first frame of all results but the first."""
    starts = range(0, max(1, x.shape[2] - 1), stride or x.shape[2])
    results = [network(x[:, :, start : start + stride + 1 if stride else None]) for start in starts]
    return torch.cat([results[0], *(result[:, :, 1:] for result in results[1:])], dim=2)


_ATTENTION = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
_SD3 = {
    r"encoder\.down\.(\d+)": r"encoder.down_blocks.\1",
    r"\.block\.(\d+)\.": r".resnets.\1.",
    r"\.(down|up)sample\.": r".\1samplers.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"\.norm_out\.": ".conv_norm_out.",
}


def to_released_name(name: str, release: Release) -> str:
    """Return the name of a tensor of this model in a release."""
    if release == "sd2.1":
        for own, released in _ATTENTION.items():
            name = name.replace(f".attn_1.{own}.", f".attn_1.{released}.")
        return name
    for pattern, replacement in _SD3.items():
        name = re.sub(pattern, replacement, name)
    # There the decoder's levels are counted from the latent.
    return re.sub(r"decoder\.up\.(\d+)", lambda found: f"decoder.up_blocks.{3 - int(found[1])}", name)


def view_as_released(name: str, tensor: Tensor, release: Release) -> Tensor:
    """View a tensor of this model in the shape that it has in a release: some layers are 1x1 convolutions."""
    if release == "sd2.1" and re.search(r"\.to_(q|k|v|out\.0)\.weight$", name):
        return tensor[:, :, None, None]
    return tensor[..., 0] if release == "sd3" and name.endswith("nin_shortcut.weight") else tensor


def _read_sizes(state: dict[str, Tensor], release: Release, source: str) -> dict[str, Any]:
    """Return the constructor's arguments that the tensors of a release show."""

    def shape(name: str) -> torch.Size:
        name = to_released_name(name, release)
        if name not in state:
            raise UserError(f"Expected weights of CV-VAE, got none named {name} in {source}.")
        return state[name].shape

    channels = shape("encoder.conv_in.weight")[0]
    prefix = to_released_name("encoder.down.0.block.0.", release).removesuffix("0.")
    blocks = {name.removeprefix(prefix).split(".")[0] for name in state if name.startswith(prefix)}
    return {
        "latent_channels": shape("decoder.conv_in.weight")[1],
        "channels": channels,
        "multipliers": [shape(f"encoder.down.{level}.block.0.conv2.weight")[0] // channels for level in range(4)],
        "num_blocks": len(blocks),
    }
