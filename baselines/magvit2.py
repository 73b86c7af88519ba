"""MAGVIT-v2's video tokenizer (ICLR 2024): a causal 3-D CNN around a quantizer without a table of codes.

    encoder   clip ─ conv 3³ ─ [n × block, downsample] × D ─ 2n × block ─ norm, Swish, conv 1³ ─ quantizer ─> z

    decoder   z ─ conv 3³ ─ n × block ─ [AdaGN(z), n × block, upsample] × D ─ AdaGN(z), n × block ─┐
              clip <─ norm, Swish, conv 3³ ────────────────────────────────────────────────────────┘

    downsample   causal conv 3³ with a stride      upsample   causal conv 3³ ─ depth to space
    AdaGN(z)     norm(x) · (1 + γ(z)) + β(z), at each place with the γ and β of the part of z that it comes from

Yu et al., "Language Model Beats Diffusion: Tokenizer is Key to Visual Generation" (arXiv 2310.05737), the figure of the
architecture in its appendix. D = 3 times half the height and width, the last two times half the frames too: 4 x 8 x 8
pixels become one place of z. Blocks, convolutions and norms are those of layers/conv3d.py, strictly causal. n = 4.

The 16 frames of VidTwin's comparison do not fit the causal arithmetic, which takes 1 + 4k. So there are two variants:

    first_frame="prepend"   the paper's. Strided convolutions pad k − 1 = 2 frames in front, upsampling drops the first
                            frame: 17 → 9 → 5 → 9 → 17. z_0 is the first frame alone, z_k frames 4k − 3 to 4k. Clips of
                            other lengths are padded with their first frame: 16 frames take 5 steps of z.
    first_frame="even"      One frame in front, none dropped: 16 → 8 → 4 → 8 → 16. z_k is frames 4k to 4k + 3,
                            without a special first frame. VidTwin's appendix C.1 (rate 5/768) counts it this way.

Written from the description; no weights were released. The authors initialize from an image tokenizer with inflated
kernels; here training starts from scratch.
"""

from collections.abc import Sequence
from itertools import pairwise
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers.conv3d import CausalConv3d, DepthToSpace, FrameGroupNorm, ResidualBlock, channels_last
from vidtwin.layers.quantize import LookupFreeQuantizer
from vidtwin.layers.recompute import Recomputing
from vidtwin.posteriors import Deterministic, DiagonalGaussian, Encoding, Latents, Posterior, Quantized


class AdaptiveGroupNorm(nn.Module):
    """Norm of x whose scale and shift at each position are linear in the latent there.

    The latent is resized to x by repetition ("nearest"), over time like the upsampling before this layer: each step
    becomes `frames` frames, and the first `frames − 1` are dropped if `drop`.

    Args:
        width: C, channels of x.
        latent_channels: Z, channels of the latent.
        frames: Frames of x per step of the latent.
        drop: Drop frames at the start, as upsampling does.
    """

    def __init__(self, width: int, latent_channels: int, frames: int, drop: bool) -> None:
        super().__init__()
        self.frames = frames
        self.dropped = frames - 1 if drop else 0
        self.norm = FrameGroupNorm(width, affine=False)
        self.scale_shift = nn.Linear(latent_channels, 2 * width)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Normalize (B, C, T, H, W) with scale and shift from the latent (B, Z, T', h, w)."""
        # Apply the small linear layer before resizing; height and width are repeated by broadcasting, without a copy.
        scale_shift = self.scale_shift(latent.movedim(1, -1)).repeat_interleave(self.frames, dim=1)[:, self.dropped :]
        scale, shift = scale_shift.movedim(-1, 1)[:, :, :, :, None, :, None].chunk(2, dim=1)  # (B, C, T, h, 1, w, 1)
        height, width = latent.shape[3:]
        normal = self.norm(x).unflatten(4, (width, -1)).unflatten(3, (height, -1))
        return torch.addcmul(shift, normal, 1 + scale).flatten(5, 6).flatten(3, 4)


class Encoder(Recomputing):
    """Encoder from a clip to the quantizer's input.

    Args:
        widths: Channels at each resolution, from pixels to latent.
        strides: Strides of time, height and width between consecutive resolutions.
        num_blocks: n.
        width_out: Channels of the output.
        prepend: Causal arithmetic of 1 + k·s frames (k − 1 frames in front of each stride) instead of k·s.
        activation_checkpointing: Recompute each layer in the backward pass.
    """

    def __init__(
        self,
        widths: list[int],
        strides: list[tuple[int, int, int]],
        num_blocks: int,
        width_out: int,
        prepend: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.conv_in = CausalConv3d(3, widths[0])
        layers: list[nn.Module] = _stack_blocks(widths[0], widths[0], num_blocks)
        for (width, next_width), stride in zip(pairwise(widths), strides, strict=True):
            layers.append(CausalConv3d(width, width, stride=stride, front=2 if prepend else 3 - stride[0]))
            layers.extend(_stack_blocks(width, next_width, num_blocks))
        layers.extend(_stack_blocks(widths[-1], widths[-1], num_blocks))
        self.layers = nn.ModuleList(layers)
        self.norm_out = FrameGroupNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], width_out, kernel_size=1)

    def forward(self, clip: Tensor) -> Tensor:
        """Encode (B, 3, T, H, W) → (B, width_out, T', h, w)."""
        x = self.conv_in(channels_last(clip))
        for layer in self.layers:
            x = self.run(layer, x)
        return self.conv_out(F.silu(self.norm_out(x)))


class Decoder(Recomputing):
    """Decoder from a latent to a clip, with the encoder's arguments; `widths` and `strides` in the encoder's order."""

    def __init__(
        self,
        widths: list[int],
        strides: list[tuple[int, int, int]],
        num_blocks: int,
        latent_channels: int,
        prepend: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        widths, strides = widths[::-1], strides[::-1]
        self.conv_in = CausalConv3d(latent_channels, widths[0])
        layers: list[nn.Module] = _stack_blocks(widths[0], widths[0], num_blocks)
        layers.append(AdaptiveGroupNorm(widths[0], latent_channels, 1, prepend))
        layers.extend(_stack_blocks(widths[0], widths[0], num_blocks))
        frames = 1
        # The width changes after the norm that follows an upsampling, not before the upsampling.
        for (width, next_width), stride in zip(pairwise(widths), strides, strict=True):
            frames *= stride[0]
            layers.append(DepthToSpace(width, stride, drop=stride[0] - 1 if prepend else 0))
            layers.append(AdaptiveGroupNorm(width, latent_channels, frames, prepend))
            layers.extend(_stack_blocks(width, next_width, num_blocks))
        self.layers = nn.ModuleList(layers)
        self.norm_out = FrameGroupNorm(widths[-1])
        self.conv_out = CausalConv3d(widths[-1], 3)

    def forward(self, latent: Tensor) -> Tensor:
        """Decode (B, Z, T', h, w) → (B, 3, T, H, W)."""
        x = self.conv_in(channels_last(latent))
        for layer in self.layers:
            x = self.run(layer, x, latent) if isinstance(layer, AdaptiveGroupNorm) else self.run(layer, x)
        return self.conv_out(F.silu(self.norm_out(x)))


def _stack_blocks(width_in: int, width_out: int, count: int) -> list[nn.Module]:
    return [ResidualBlock(width_in if index == 0 else width_out, width_out) for index in range(count)]


class MAGVIT2(VideoAutoencoder):
    """MAGVIT-v2's autoencoder.

    The defaults are the paper's tokenizer, 18 bits per position, on clips of 4k frames: 370,547,477 parameters, 2.34%
    of the clip's numbers, 0.0703 bits per pixel. VidTwin's table compares with "latent dimension 5", 0.651%:
    `latent_channels=5` with `quantizer="kl"` (370,323,725 parameters) or "none" (370,321,160). With "lfq" it would be a
    codebook of 32 entries, which the paper does not use.

    Args:
        latent_channels: Z, channels of the latent.
        quantizer: "lfq", the signs of z (a code has Z bits); "kl", a Gaussian, as in a VAE; "none", z itself.
        first_frame: "even" takes clips of 4k frames, "prepend" of 1 + 4k (see above).
        channels: Channels at the resolution of the pixels.
        multipliers: Channels at each resolution as multiples of `channels`; each step in between halves height and
            width, and the last two also halve the frames.
        num_blocks: n, residual blocks at each resolution.
        temperature: Temperature of the entropy term of "lfq".
        entropy_group_bits: Maximum number of bits whose joint entropy is computed (see `LookupFreeQuantizer`).
        activation_checkpointing: Recompute each layer in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("latent",)

    def __init__(
        self,
        latent_channels: int = 18,
        quantizer: Literal["lfq", "kl", "none"] = "lfq",
        first_frame: Literal["even", "prepend"] = "even",
        channels: int = 128,
        multipliers: Sequence[int] = (1, 2, 2, 4),
        num_blocks: int = 4,
        temperature: float = 0.01,
        entropy_group_bits: int = 9,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        counts = {"latent_channels": latent_channels, "channels": channels, "num_blocks": num_blocks}
        for name, count in counts.items():
            if count < 1:
                raise UserError(f"Expected {name} of at least 1, got {count}.")
        if len(multipliers) < 2 or min(multipliers) < 1:
            raise UserError(f"Expected at least two multipliers of at least 1, got {list(multipliers)}.")
        if quantizer not in ("lfq", "kl", "none"):
            raise UserError(f'Expected quantizer "lfq", "kl" or "none", got {quantizer!r}.')
        if first_frame not in ("even", "prepend"):
            raise UserError(f'Expected first_frame "even" or "prepend", got {first_frame!r}.')
        downsamples = len(multipliers) - 1
        widths = [channels * multiplier for multiplier in multipliers]
        strides = [(2 if index >= downsamples - 2 else 1, 2, 2) for index in range(downsamples)]
        prepend = first_frame == "prepend"

        self.latent_channels = latent_channels
        self.quantizer_name = quantizer
        self.prepend = prepend
        self.frames_per_step = frames = 2 ** min(2, downsamples)
        self.spatial_multiple = 2**downsamples
        self.temporal = (
            TemporalSpec(multiple=frames, offset=1, pad="first")
            if prepend
            else TemporalSpec(multiple=frames, minimum=frames, pad="last")
        )
        width_out = 2 * latent_channels if quantizer == "kl" else latent_channels
        self.encoder = Encoder(widths, strides, num_blocks, width_out, prepend, activation_checkpointing)
        self.quantizer = (
            LookupFreeQuantizer(latent_channels, temperature, entropy_group_bits) if quantizer == "lfq" else None
        )
        self.decoder = Decoder(widths, strides, num_blocks, latent_channels, prepend, activation_checkpointing)

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def _encode(self, clip: Tensor) -> Encoding:
        z = self.encoder(clip)
        posterior: Posterior
        if self.quantizer is not None:
            value, codes, terms = self.quantizer(z.movedim(1, -1))
            posterior = Quantized(value.movedim(-1, 1), codes, self.quantizer.codebook_size, terms)
        elif self.quantizer_name == "kl":
            posterior = DiagonalGaussian(*z.chunk(2, dim=1))
        else:
            posterior = Deterministic(z)
        return Encoding(latent=posterior)

    def _decode(self, latents: Latents) -> Tensor:
        latent = latents["latent"]
        if latent.ndim != 5 or latent.shape[1] != self.latent_channels:
            raise UserError(
                f"Expected a latent of shape (B, {self.latent_channels}, T', h, w), got {tuple(latent.shape)}."
            )
        return self.decoder(latent)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        _, frames, height, width = clip_shape
        steps = 1 + (frames - 1) // self.frames_per_step if self.prepend else frames // self.frames_per_step
        side = self.spatial_multiple
        return {"latent": (self.latent_channels, steps, height // side, width // side)}

    def code_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], int]]:
        if self.quantizer is None:
            return {}
        return {"latent": (self.latent_shapes(clip_shape)["latent"][1:], self.quantizer.codebook_size)}

    def dequantize(self, codes: Latents) -> Latents:
        """Convert integer codes (B, T', h, w) by name to the latent (B, Z, T', h, w) of -1 and 1.

        Raises:
            UserError: Names, shapes or values of the codes are invalid, or the model has no codes.
        """
        if self.quantizer is None:
            return super().dequantize(codes)
        if set(codes) != {"latent"} or codes["latent"].ndim != 4 or codes["latent"].is_floating_point():
            got = {name: (tuple(code.shape), code.dtype) for name, code in codes.items()}
            raise UserError(f"Expected integer codes latent of shape (B, T', h, w), got {got}.")
        if ((codes["latent"] < 0) | (codes["latent"] >= self.quantizer.codebook_size)).any():
            least, most = codes["latent"].aminmax()
            raise UserError(
                f"Expected latent codes in 0..{self.quantizer.codebook_size - 1}, got {int(least)} to {int(most)}."
            )
        return {"latent": self.quantizer.lookup(codes["latent"]).movedim(-1, 1).to(self.last_layer.dtype)}
