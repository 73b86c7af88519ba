"""Open-Sora 1.2's video autoencoder: an image VAE of each frame, and MAGVIT-v2 over time on its latents (HPC-AI, 2024).

    encoder   clip ─ image encoder ─ · 0.18215 ─┬ chunk of 17 frames ─ temporal encoder ┬─ (z − shift) / scale ─> latent
                                                └ … ────────────────────────────────────┘

    decoder   latent ─ z ─┬ 5 steps ─ temporal decoder ┬─ / 0.18215 ─ image decoder ─> clip
                          └ … ─────────────────────────┘

    temporal encoder   conv 3³ ─ [n × block, (halve time)] × 4 ─ n × block ─ norm, Swish, conv 1³ ─ conv 1³ ─> z
    temporal decoder   z ─ conv 1³ ─ conv 3³ ─ n × block ─ [n × block, (double time)] × 4 ─ norm, Swish, conv 3³

(https://github.com/hpcaitech/Open-Sora, docs/report_03.md.) The image VAE is Stable Diffusion's, with SDXL's weights,
whose own factor of 0.13025 is not used. The temporal network is MAGVIT-v2's without its steps in space: of four stages
the second and the third end by halving time. 4 x 8 x 8 pixels become one position. Any number of frames is legal: the
image latents of a chunk are padded by zeros *in front* to a multiple of 4, and the frames that the decoder makes of
this padding, again the first ones, are dropped. A chunk of 17 frames has 5 steps, and so has every 17 frames of a long
video: 0.6127%, not the printed 0.5208%.

The image half is built of layers/vqgan.py, which is diffusers' `AutoencoderKL` layer for layer (a test compares the
two): with that class itself this baseline would need the extra `library`, for code that the project has.
The temporal half has the blocks of layers/conv3d.py with norms over all frames of a chunk. Weights load by their
released names (`OpenSora.from_official`).

Departures: the released encoder draws a sample of the image posterior at every call; here only in training, and in
evaluation the mean is taken, so that a clip has one posterior. Frames are not processed four at a time, which changes
no number. Latents are always standardized; the released training (`cal_loss`) leaves that out. Since the KL is that of
z, training does not depend on it.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise, zip_longest
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers import vqgan
from vidtwin.layers.causal_vae import check_latent, fold, unfold
from vidtwin.layers.conv3d import CausalConv3d, DepthToSpace, ResidualBlock, channels_last
from vidtwin.layers.recompute import Recomputing
from vidtwin.posteriors import DiagonalGaussian, Encoding, Latents, StandardizedGaussian

FRAMES_PER_STEP = 4
FRAME_SCALE = 0.18215  # of the image latents
# The layers of diffusers' attention before 0.18, which the image VAE's weights may still have.
_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}


class FrameAutoencoder(nn.Module):
    """Stable Diffusion's VAE of single frames: VQGAN's networks with attention and a convolution of size 1 at z.

    Args:
        channels: Channels at each resolution, pixels first; each step in between halves height and width.
        latent_channels: Channels of the image latent.
        num_blocks: Residual blocks per resolution of the encoder; the decoder has one more.
        groups: Groups of the norms.
        activation_checkpointing: Recompute each level in the backward pass.
    """

    def __init__(
        self,
        channels: Sequence[int],
        latent_channels: int,
        num_blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        common = {"attention": True, "activation_checkpointing": activation_checkpointing}
        self.encoder = vqgan.Encoder(channels, 2 * latent_channels, num_blocks, groups, **common)
        self.decoder = vqgan.Decoder(channels, latent_channels, num_blocks + 1, groups, **common)
        self.quant_conv = nn.Conv2d(2 * latent_channels, 2 * latent_channels, 1)
        self.post_quant_conv = nn.Conv2d(latent_channels, latent_channels, 1)

    def encode(self, frames: Tensor) -> DiagonalGaussian:
        """Encode (M, 3, H, W) → the posterior of the image latents (M, C, h, w)."""
        return DiagonalGaussian(*self.quant_conv(self.encoder(frames)[0]).chunk(2, dim=1))

    def decode(self, latents: Tensor) -> Tensor:
        """Decode (M, C, h, w) → (M, 3, H, W)."""
        frames: Tensor = self.decoder(self.post_quant_conv(latents))[0]
        return frames


class TemporalEncoder(Recomputing):
    """Encoder of image latents over time.

    Args:
        width_in: Channels of the image latents.
        widths: Channels of each stage.
        width_out: Channels of the output.
        num_blocks: n, residual blocks per stage.
        groups: Groups of the norms.
        activation_checkpointing: Recompute each block in the backward pass.
    """

    def __init__(
        self,
        width_in: int,
        widths: Sequence[int],
        width_out: int,
        num_blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = CausalConv3d(width_in, widths[0], bias=False)
        self.block_res_blocks = nn.ModuleList(
            _stack_blocks(before, width, num_blocks, groups) for before, width in pairwise([widths[0], *widths])
        )
        # One frame of zeros in front of a stride of 2, as in MAGVIT-v2's variant for 4k frames.
        self.conv_blocks = nn.ModuleList(
            CausalConv3d(width, width, stride=(2, 1, 1), front=1) if halves else nn.Identity()
            for width, halves in zip(widths[:-1], _changes(widths), strict=True)
        )
        self.res_blocks = _stack_blocks(widths[-1], widths[-1], num_blocks, groups)
        self.norm1 = vqgan.group_norm(groups, widths[-1], eps=1e-5)
        self.conv2 = CausalConv3d(widths[-1], width_out, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Encode (B, width_in, 4·T', h, w) → (B, width_out, T', h, w)."""
        x = self.conv_in(channels_last(x))
        x = self.run_all(_interleave(self.block_res_blocks, self.conv_blocks), x)
        x = self.run_all(self.res_blocks, x)
        return self.conv2(F.silu(self.norm1(x)))


class TemporalDecoder(Recomputing):
    """Decoder over time, with the encoder's arguments: `widths` in the encoder's order."""

    def __init__(
        self,
        width_in: int,
        widths: Sequence[int],
        width_out: int,
        num_blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv1 = CausalConv3d(width_in, widths[-1])
        self.res_blocks = _stack_blocks(widths[-1], widths[-1], num_blocks, groups)
        # Stages have the encoder's numbers, so that the last one runs first; each ends with its own width.
        self.block_res_blocks = nn.ModuleList(
            _stack_blocks(before, width, num_blocks, groups) for width, before in pairwise([*widths, widths[-1]])
        )
        self.conv_blocks = nn.ModuleList(
            DepthToSpace(width, (2, 1, 1)) if doubles else nn.Identity()
            for width, doubles in zip(widths[1:], _changes(widths), strict=True)
        )
        self.norm1 = vqgan.group_norm(groups, widths[0], eps=1e-5)
        self.conv_out = CausalConv3d(widths[0], width_out)

    def forward(self, z: Tensor) -> Tensor:
        """Decode (B, width_in, T', h, w) → (B, width_out, 4·T', h, w), those of the padding first."""
        x = self.run_all(self.res_blocks, self.conv1(channels_last(z)))
        x = self.run_all(_interleave(reversed(self.block_res_blocks), reversed(self.conv_blocks)), x)
        return self.conv_out(F.silu(self.norm1(x)))


def _changes(widths: Sequence[int]) -> list[bool]:
    """Return after which stages but the last time is halved: the last two."""
    return [stage >= len(widths) - 3 for stage in range(len(widths) - 1)]


def _stack_blocks(width_in: int, width_out: int, count: int, groups: int) -> nn.ModuleList:
    return nn.ModuleList(ResidualBlock(width_in if i == 0 else width_out, width_out, groups) for i in range(count))


def _interleave(stages: Iterable[nn.Module], changes: Iterable[nn.Module]) -> Iterator[nn.Module]:
    """Yield the blocks of each stage, then the change of length after it."""
    for blocks, change in zip_longest(stages, changes):
        assert isinstance(blocks, nn.ModuleList)
        yield from blocks
        if change is not None:
            yield change


class TemporalAutoencoder(nn.Module):
    """The temporal half, for one chunk.

    Args:
        frame_channels: Channels of the image latents.
        widths: Channels of each stage.
        latent_channels: Z, channels of the latent.
        num_blocks: n, residual blocks per stage.
        groups: Groups of the norms.
        activation_checkpointing: Recompute each block in the backward pass.
    """

    def __init__(
        self,
        frame_channels: int,
        widths: Sequence[int],
        latent_channels: int,
        num_blocks: int,
        groups: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__()
        z = latent_channels
        common = (num_blocks, groups, activation_checkpointing)
        self.encoder = TemporalEncoder(frame_channels, widths, 2 * z, *common)
        self.decoder = TemporalDecoder(z, widths, frame_channels, *common)
        self.quant_conv = CausalConv3d(2 * z, 2 * z, kernel_size=1)
        self.post_quant_conv = CausalConv3d(z, z, kernel_size=1)

    def encode(self, frames: Tensor) -> Tensor:
        """Encode image latents (B, C, T, h, w) → mean and log-variance (B, 2·Z, ⌈T/4⌉, h, w)."""
        moments: Tensor = self.quant_conv(self.encoder(F.pad(frames, (0, 0, 0, 0, -frames.shape[2] % 4, 0))))
        return moments

    def decode(self, z: Tensor) -> Tensor:
        """Decode (B, Z, T', h, w) → image latents (B, C, 4·T', h, w), those of the padding first."""
        frames: Tensor = self.decoder(self.post_quant_conv(z))
        return frames


class OpenSora(VideoAutoencoder):
    """Open-Sora 1.2's video autoencoder.

    The defaults are the release: 393,341,007 parameters, 309,687,144 of them temporal and 83,653,863 of the image VAE.

    Args:
        latent_channels: Z, channels of the latent.
        channels: Channels of the temporal network's stages, at least three; time is halved between the last three.
        num_blocks: n, residual blocks per stage of the temporal network.
        frame_channels: Channels of the image VAE at each resolution, pixels first.
        frame_latent_channels: Channels of the image latent.
        frame_blocks: Residual blocks per resolution of the image encoder; its decoder has one more.
        norm_groups: Groups of all norms.
        chunk_frames: Frames that the temporal network sees at a time; None is the whole clip.
        shift: Mean of z, one number or Z of them; latents are (z − shift) / scale.
        scale: Standard deviation of z, likewise.
        activation_checkpointing: Recompute each block in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("latent",)
    temporal = TemporalSpec(pad="first")  # any length; its own padding is in front

    def __init__(
        self,
        latent_channels: int = 4,
        channels: Sequence[int] = (128, 256, 256, 512),
        num_blocks: int = 4,
        frame_channels: Sequence[int] = (128, 256, 512, 512),
        frame_latent_channels: int = 4,
        frame_blocks: int = 2,
        norm_groups: int = 32,
        chunk_frames: int | None = 17,
        shift: Sequence[float] = (-0.10, 0.34, 0.27, 0.98),
        scale: Sequence[float] = (3.85, 2.32, 2.33, 3.06),
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, given in self.init_args.items():
            if type(given) is int and given < 1:
                raise UserError(f"Expected {name} of at least 1, got {given}.")
        for name, widths, least in (("channels", channels, 3), ("frame_channels", frame_channels, 1)):
            if len(widths) < least or min(widths) < 1:
                raise UserError(f"Expected at least {least} {name} of at least 1, got {list(widths)}.")
        for name, values in (("shift", shift), ("scale", scale)):
            if len(values) not in (1, latent_channels):
                raise UserError(f"Expected {name} of 1 or {latent_channels} numbers, got {list(values)}.")
        if min(scale) <= 0:
            raise UserError(f"Expected scale of positive numbers, got {list(scale)}.")
        self.latent_channels, self.chunk_frames = latent_channels, chunk_frames
        self.spatial_multiple = 2 ** (len(frame_channels) - 1)
        self.spatial_vae = FrameAutoencoder(
            frame_channels, frame_latent_channels, frame_blocks, norm_groups, activation_checkpointing
        )
        self.temporal_vae = TemporalAutoencoder(
            frame_latent_channels, channels, latent_channels, num_blocks, norm_groups, activation_checkpointing
        )
        for name, values in (("shift", shift), ("scale", scale)):
            each = torch.tensor(list(values), dtype=torch.float32).expand(latent_channels)
            self.register_buffer(name, each.reshape(1, -1, 1, 1, 1).clone())

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        chunk_frames: int | None = 17,
        norm_groups: int = 32,
        activation_checkpointing: bool = False,
    ) -> Self:
        """Load the release, in evaluation mode. Sizes are those of its tensors.

        Args:
            path: Its folder, with model.safetensors, or a file of weights.
            chunk_frames: As in the constructor; the weights do not show it.
            norm_groups: Likewise.
            activation_checkpointing: Likewise.

        Raises:
            UserError: The file is missing or of another model; names what does not fit.
        """
        state, _, file = weights.read_release(path)
        state = {_rename_attention(name): tensor for name, tensor in state.items()}
        sizes = _read_sizes(state, str(file))
        model = cls(
            **sizes,
            chunk_frames=chunk_frames,
            norm_groups=norm_groups,
            activation_checkpointing=activation_checkpointing,
        )
        own = model.state_dict()
        for name in ("shift", "scale"):
            if name in state and state[name].numel() == 1:  # the released class's own default
                state[name] = state[name].reshape(1, 1, 1, 1, 1).expand_as(own[name])
        weights.check_fit(state, {to_released_name(name): tensor for name, tensor in own.items()}, str(file))
        model.load_state_dict({name: state[to_released_name(name)] for name in own})
        return model.eval()

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.spatial_vae.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def decode(self, latents: Latents, num_frames: int | None = None) -> Tensor:
        """Decode as in the base class; a chunk's padding lies in front of it, so the last chunk loses its first frames.

        Args:
            latents: {"latent": (B, Z, T', h, w)}.
            num_frames: Length of the user's clip; None keeps the last chunk's padding.

        Raises:
            UserError: The latent has another shape, or no clip of `num_frames` frames has a latent of this length.
        """
        clip = super().decode(latents)
        if num_frames is None:
            return clip
        frames, steps = clip.shape[2], latents["latent"].shape[2]
        if num_frames == frames:
            return clip
        if num_frames > frames or self._count_steps(num_frames) != steps:
            raise UserError(
                f"Expected a clip of {steps} steps, such as one of {frames} frames, got num_frames={num_frames}."
            )
        start = (num_frames - 1) // self.chunk_frames * self.chunk_frames if self.chunk_frames else 0
        last = num_frames - start
        return torch.cat([clip[:, :, :start], clip[:, :, -last:]], dim=2) if start else clip[:, :, -last:]

    def _encode(self, clip: Tensor) -> Encoding:
        posterior = self.spatial_vae.encode(fold(clip))
        frames = posterior.sample() if self.training else posterior.mode()
        chunks = unfold(FRAME_SCALE * frames, len(clip)).split(self.chunk_frames or clip.shape[2], dim=2)
        mean, logvar = torch.cat([self.temporal_vae.encode(chunk) for chunk in chunks], dim=2).chunk(2, dim=1)
        shift, scale = self._standard()
        return Encoding(latent=StandardizedGaussian(mean, logvar, shift, scale))

    def _decode(self, latents: Latents) -> Tensor:
        check_latent(latents["latent"], self.latent_channels)
        shift, scale = self._standard()
        z = latents["latent"] * scale + shift
        length = self.chunk_frames or FRAMES_PER_STEP * z.shape[2]
        # A chunk with as many steps as a full one may have has `chunk_frames` frames.
        chunks = z.split(-(-length // FRAMES_PER_STEP), dim=2)
        frames = torch.cat([self.temporal_vae.decode(chunk)[:, :, -length:] for chunk in chunks], dim=2)
        return unfold(self.spatial_vae.decode(fold(frames) / FRAME_SCALE), len(z))

    def _standard(self) -> tuple[Tensor, Tensor]:
        assert isinstance(self.shift, Tensor)
        assert isinstance(self.scale, Tensor)
        return self.shift, self.scale

    def _count_steps(self, frames: int) -> int:
        whole, rest = divmod(frames, self.chunk_frames) if self.chunk_frames else (0, frames)
        steps_of_one = -(-(self.chunk_frames or 0) // FRAMES_PER_STEP)
        return whole * steps_of_one + -(-rest // FRAMES_PER_STEP)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        _, frames, height, width = clip_shape
        side = self.spatial_multiple
        return {"latent": (self.latent_channels, self._count_steps(frames), height // side, width // side)}


def to_released_name(name: str) -> str:
    """Return the released name of a tensor of this model.

    There each causal convolution is inside of a module, and the third one of a block is the shortcut.
    """
    if name.startswith("spatial_vae."):
        return name.replace("spatial_vae.", "spatial_vae.module.", 1)
    name = name.replace(".shortcut.", ".conv3.")
    if ".norm" in name or ".conv." in name or not name.startswith("temporal_vae."):
        return name
    return re.sub(r"\.(weight|bias)$", r".conv.\1", name)


def _rename_attention(name: str) -> str:
    older = "|".join(_ATTENTION)
    return re.sub(rf"(attentions\.\d+)\.({older})\.", lambda found: f"{found[1]}.{_ATTENTION[found[2]]}.", name)


def _read_sizes(state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Return the constructor's arguments that the tensors of a release show."""
    temporal, spatial = "temporal_vae.encoder.block_res_blocks", "spatial_vae.module.encoder.down_blocks"

    def width(name: str) -> int:
        if name not in state:
            raise UserError(f"Expected weights of Open-Sora 1.2, got none named {name} in {source}.")
        return state[name].shape[0]

    def count(prefix: str) -> int:
        """Count the modules in a list."""
        return len({name.removeprefix(f"{prefix}.").split(".")[0] for name in state if name.startswith(f"{prefix}.")})

    return {
        "latent_channels": width("temporal_vae.post_quant_conv.conv.weight"),
        "channels": [width(f"{temporal}.{stage}.0.conv1.conv.weight") for stage in range(count(temporal) or 1)],
        "num_blocks": count(f"{temporal}.0"),
        "frame_channels": [width(f"{spatial}.{level}.resnets.0.conv1.weight") for level in range(count(spatial) or 1)],
        "frame_latent_channels": width("spatial_vae.module.post_quant_conv.weight"),
        "frame_blocks": count(f"{spatial}.0.resnets"),
        **{
            name: [float(f"{value:.7g}") for value in state[name].flatten().tolist()]
            for name in ("shift", "scale")
            if name in state
        },
    }
