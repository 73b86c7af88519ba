"""WF-VAE: a video autoencoder whose trunk is passed by a flow of wavelet coefficients (Li et al., CVPR 2025).

    encoder   clip ─ W ─ conv ─ n × block, down ─┬─ conv ─ n × block, down ─┬─ block, attention, block ─ norm, conv ─> z
                     └─ low bands ─ W' ──── conv ┘                          │
                                    └─ low bands ─ W ───────────────── conv ┘

    decoder   z ─ conv ─ block, attention, block ┬─ n × block, up, block ┬─ n × block, up, block ─ 2 × block ─ conv ┐
                                                 └─ block, conv ─ W⁻¹ ┐  └─ block, conv ─ + ─ W'⁻¹ ───────┐         │
                                                                      └─────────────────── + ┘             └─ + ─────┘
                                                                                                 clip <─ W⁻¹ ─┘

    W   Haar wavelets in time, height and width      W'   in height and width (8 x 8 x 8: in time too)

(arXiv 2411.17459, "WF-VAE: Enhancing Video VAE by Wavelet-Driven Energy Flow".) The coefficients of a level are those
of the low bands of the level before, without learned layers in between, and enter the trunk at their resolution. In the
decoder the last channels of the trunk become the coefficients of each level; the level below is added to the low bands.

W and each layer that halves time give 1 + (T − 1) / 2 frames: clips have 1 + 4k frames (1 + 8k with `temporal_stride`
8) and the first latent step is the first frame alone. The encoder is strictly causal with layer norms; the decoder sees
one step ahead, as it interpolates over time. Blocks are those of layers/causal_vae.py; modules have the released names,
so that released weights load (`WFVAE.from_official`).

The training loss compares the coefficients of the decoder with those of the encoder: the term `wavelet`.

Departures: long clips are not coded in chunks with cached frames, which changes no number with layer norms. Latents are
not scaled: the released pipelines do that outside of the model.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import Reconstruction, TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers.causal_vae import (
    Downsample3d,
    FrameAttention,
    FrameConv2d,
    FrameDownsample,
    FrameUpsample,
    Norm,
    RepeatingConv3d,
    ResidualBlock,
    TimeInterpolation,
    Upsample3d,
    check_latent,
    make_norm,
)
from vidtwin.layers.conv3d import channels_last
from vidtwin.layers.recompute import Recomputing
from vidtwin.layers.wavelets import (
    HaarTransform2d,
    HaarTransform3d,
    InverseHaarTransform2d,
    InverseHaarTransform3d,
)
from vidtwin.posteriors import DiagonalGaussian, Encoding, Latents

# Keys of a released config.json whose other values are other models, with the value that all releases have.
FIXED = {
    "_class_name": "WFVAEModel",
    "attention_type": "AttnBlock3DFix",
    "use_attention": True,
    "connect_res_layer_num": 1,
}


class EnergyFlow(DiagonalGaussian):
    """The posterior of a latent, with the wavelet coefficients of the clip below the first transform.

    Args:
        moments: (B, 2·Z, T', h, w): mean and log-variance.
        coefficients: Of the two levels, the finer one first: (B, 12 or 24, ...) and (B, 24, ...).
    """

    def __init__(self, moments: Tensor, coefficients: tuple[Tensor, Tensor]) -> None:
        super().__init__(*moments.chunk(2, dim=1))
        self.coefficients = coefficients


class Encoder(Recomputing):
    """Encoder from a clip to the moments of the latent.

    Args:
        channels: C, width of the trunk at a quarter of the clip's pixels per frame.
        latent_channels: Z.
        flow_channels: Width of the coefficients that enter the trunk, per level.
        num_blocks: n.
        norm: Kind of the norms.
        deep: Halve time three times instead of twice.
        activation_checkpointing: Recompute each layer in the backward pass.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        flow_channels: int,
        num_blocks: int,
        norm: Norm,
        deep: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        wide = 2 * channels
        self.wavelet_transform_in = HaarTransform3d()
        self.wavelet_transform_l1 = HaarTransform3d() if deep else HaarTransform2d()
        self.wavelet_transform_l2 = HaarTransform3d()
        self.connect_l1 = FrameConv2d(24 if deep else 12, flow_channels)
        self.connect_l2 = FrameConv2d(24, flow_channels)
        self.down1 = nn.ModuleList(
            [
                FrameConv2d(24, channels),
                *(ResidualBlock(channels, channels, norm, per_frame=True) for _ in range(num_blocks)),
                Downsample3d(channels, time=True) if deep else FrameDownsample(channels),
            ]
        )
        self.down2 = nn.ModuleList(
            [
                FrameConv2d(channels + flow_channels, wide),
                *(ResidualBlock(wide, wide, norm) for _ in range(num_blocks)),
                Downsample3d(wide, time=True),
            ]
        )
        self.mid = nn.ModuleList(
            [
                ResidualBlock(wide + flow_channels, 2 * wide, norm),
                FrameAttention(2 * wide, norm),
                ResidualBlock(2 * wide, 2 * wide, norm),
            ]
        )
        self.norm_out = make_norm(norm, 2 * wide)
        self.conv_out = RepeatingConv3d(2 * wide, 2 * latent_channels)

    def forward(self, clip: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Encode (B, 3, T, H, W) → the moments (B, 2·Z, T', H/8, W/8) and the coefficients of the two inner levels."""
        bands = channels_last(self.wavelet_transform_in(clip))
        fine = self.wavelet_transform_l1(bands[:, :3])
        coarse = self.wavelet_transform_l2(fine[:, :3])
        x = self.run_all(self.down1, bands)
        x = self.run_all(self.down2, torch.cat([x, self.connect_l1(fine)], dim=1))
        x = self.run_all(self.mid, torch.cat([x, self.connect_l2(coarse)], dim=1))
        return self.conv_out(F.silu(self.norm_out(x))), (fine, coarse)


class Decoder(Recomputing):
    """Decoder from a latent to a clip, with the encoder's arguments.

    Args:
        channels, latent_channels, num_blocks, norm, deep, activation_checkpointing: As in `Encoder`.
        flow_channels: Width of what leaves the trunk and becomes coefficients, per level.
        interpolation: Interpolation of frames in the layers that double them.
    """

    def __init__(
        self,
        channels: int,
        latent_channels: int,
        flow_channels: int,
        num_blocks: int,
        norm: Norm,
        interpolation: TimeInterpolation,
        deep: bool,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.flow_channels = flow = flow_channels
        wide, widest = 2 * channels, 4 * channels
        self.conv_in = RepeatingConv3d(latent_channels, widest)
        self.mid = nn.ModuleList(
            [
                ResidualBlock(widest, widest, norm),
                FrameAttention(widest, norm),
                ResidualBlock(widest, widest + flow, norm),
            ]
        )
        self.up2 = nn.ModuleList(
            [
                *(ResidualBlock(widest, widest, norm) for _ in range(num_blocks)),
                Upsample3d(widest, time=True, interpolation=interpolation),
                ResidualBlock(widest, widest + flow, norm),
            ]
        )
        self.up1 = nn.ModuleList(
            [
                *(ResidualBlock(widest if i == 0 else wide, wide, norm) for i in range(num_blocks)),
                Upsample3d(wide, time=True, interpolation=interpolation) if deep else FrameUpsample(wide),
                ResidualBlock(wide, wide, norm),
            ]
        )
        self.layer = nn.ModuleList([ResidualBlock(wide, channels, norm), ResidualBlock(channels, channels, norm)])
        self.norm_out = make_norm(norm, channels)
        self.conv_out = FrameConv2d(channels, 24)
        self.connect_l1 = nn.ModuleList([ResidualBlock(flow, flow, norm), FrameConv2d(flow, 24 if deep else 12)])
        self.connect_l2 = nn.ModuleList([ResidualBlock(flow, flow, norm), FrameConv2d(flow, 24)])
        self.inverse_wavelet_transform_out = InverseHaarTransform3d()
        self.inverse_wavelet_transform_l1 = InverseHaarTransform3d() if deep else InverseHaarTransform2d()
        self.inverse_wavelet_transform_l2 = InverseHaarTransform3d()

    def forward(self, latent: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Decode (B, Z, T', h, w) → the clip (B, 3, T, 8h, 8w) and the coefficients of the two inner levels."""
        x, flow = self._split(self.run_all(self.mid, self.conv_in(channels_last(latent))))
        coarse = self.run_all(self.connect_l2, flow)
        x, flow = self._split(self.run_all(self.up2, x))
        fine = _add_to_low(self.run_all(self.connect_l1, flow), self.inverse_wavelet_transform_l2(coarse))
        x = self.run_all([*self.up1, *self.layer], x)
        bands = _add_to_low(self.conv_out(F.silu(self.norm_out(x))), self.inverse_wavelet_transform_l1(fine))
        return self.inverse_wavelet_transform_out(bands), (fine, coarse)

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Split off the flow, the last channels."""
        return x[:, : -self.flow_channels], x[:, -self.flow_channels :]


def _add_to_low(bands: Tensor, low: Tensor) -> Tensor:
    """Add (B, 3, ...) to the low bands, the first three channels."""
    return torch.cat([bands[:, :3] + low, bands[:, 3:]], dim=1)


class WFVAE(VideoAutoencoder):
    """WF-VAE.

    The defaults are WF-VAE-S with 4 channels: 146,496,836 parameters, of which 128 are frozen filters. Releases:

        model         channels   latent_channels   temporal_stride   parameters
        S, 4 ch            128                 4                 4   146,496,836
        L, 4 ch            192                 4                 4   316,334,852
        L, 16 ch           192                16                 4   317,081,372
        8 x 8 x 8          160                32                 8   227,035,816

    Args:
        latent_channels: Z, channels of the latent.
        channels: C, width of the trunk at a quarter of the clip's pixels per frame; it doubles at each level.
        encoder_flow_channels: Width of the coefficients that enter the encoder's trunk, per level.
        decoder_flow_channels: Width of the decoder's flow, per level.
        num_blocks: n, residual blocks per level.
        norm: "layer" or "group", of 32 groups over all frames: widths have to be multiples of 32.
        time_interpolation: Of frames in the decoder. The weights of both kinds have the same names and shapes.
        temporal_stride: Frames per step of the latent: 4 takes clips of 1 + 4k frames, 8 of 1 + 8k. Clips of other
            lengths are padded with their last frame.
        activation_checkpointing: Recompute each layer in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("latent",)

    def __init__(
        self,
        latent_channels: int = 4,
        channels: int = 128,
        encoder_flow_channels: int = 128,
        decoder_flow_channels: int = 128,
        num_blocks: int = 2,
        norm: Norm = "layer",
        time_interpolation: TimeInterpolation = "linear",
        temporal_stride: Literal[4, 8] = 4,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, given in self.init_args.items():
            if type(given) is int and given < 1:
                raise UserError(f"Expected {name} of at least 1, got {given}.")
        if norm not in ("layer", "group"):
            raise UserError(f'Expected norm "layer" or "group", got {norm!r}.')
        if time_interpolation not in ("linear", "nearest"):
            raise UserError(f'Expected time_interpolation "linear" or "nearest", got {time_interpolation!r}.')
        if temporal_stride not in (4, 8):
            raise UserError(f"Expected temporal_stride 4 or 8, got {temporal_stride}.")
        self.latent_channels, self.temporal_stride = latent_channels, temporal_stride
        self.spatial_multiple = 8
        self.temporal = TemporalSpec(multiple=temporal_stride, offset=1, pad="last")
        sizes = {"channels": channels, "latent_channels": latent_channels, "num_blocks": num_blocks}
        common: dict[str, Any] = {
            **sizes,
            "norm": norm,
            "deep": temporal_stride == 8,
            "activation_checkpointing": activation_checkpointing,
        }
        self.encoder = Encoder(flow_channels=encoder_flow_channels, **common)
        self.decoder = Decoder(flow_channels=decoder_flow_channels, interpolation=time_interpolation, **common)

    @classmethod
    def from_official(
        cls,
        path: str | Path,
        time_interpolation: TimeInterpolation | None = None,
        activation_checkpointing: bool = False,
    ) -> Self:
        """Load a release, in evaluation mode. Sizes are those of its tensors.

        Args:
            path: Its folder, with config.json and diffusion_pytorch_model.safetensors, or one file of weights (of a
                training too, whose averaged weights are taken).
            time_interpolation: As in the constructor; None is that of config.json beside the weights.
            activation_checkpointing: As in the constructor.

        Raises:
            UserError: The files are missing or of another model; names what does not fit.
        """
        state, config, file = weights.read_release(path)
        for key, wanted in FIXED.items():
            if config.get(key, wanted) != wanted:
                raise UserError(f"Expected {key} {wanted} of WF-VAE beside {file}, got {config[key]}.")
        if time_interpolation is None:
            if not config:
                raise UserError(
                    f"Expected config.json beside {file}, got none; its weights do not say how frames are "
                    'interpolated: give time_interpolation="linear" (4 and 16 channels, 8 x 8 x 8) or "nearest" '
                    "(Open-Sora-Plan 1.3)."
                )
            released = config.get("t_interpolation", "nearest")
            time_interpolation = "linear" if released == "trilinear" else released
        model = cls(
            **_read_sizes(state, str(file)),
            time_interpolation=time_interpolation,
            activation_checkpointing=activation_checkpointing,
        )
        weights.check_fit(state, model.state_dict(), str(file))
        model.load_state_dict(state)
        return model.eval()

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def forward(self, clip: Tensor) -> Reconstruction:
        """Encode and decode as in the base class, with the term `wavelet` beside the posterior's.

        It is the sum of |decoder's − encoder's coefficients| over both levels, averaged over the batch, in units of the
        3·H·W values of a frame, like the pixel error: the released weight is then 0.1.
        """
        encoding = self.encode(clip)
        latents = encoding.sample() if self.training else encoding.mode()
        decoded, made = self.decoder(latents["latent"])
        posterior = encoding["latent"]
        assert isinstance(posterior, EnergyFlow)
        errors = [
            (given.to(_at_least_float(given)) - got).abs().sum()
            for given, got in zip(posterior.coefficients, made, strict=True)
        ]
        batch, channels, frames, height, width = clip.shape
        terms = encoding.regularization() | {"wavelet": (errors[0] + errors[1]) / (batch * channels * height * width)}
        return Reconstruction(decoded[:, :, :frames], latents, terms, encoding)

    def _encode(self, clip: Tensor) -> Encoding:
        return Encoding(latent=EnergyFlow(*self.encoder(clip)))

    def _decode(self, latents: Latents) -> Tensor:
        check_latent(latents["latent"], self.latent_channels)
        clip: Tensor = self.decoder(latents["latent"])[0]
        return clip

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        _, frames, height, width = clip_shape
        return {"latent": (self.latent_channels, 1 + (frames - 1) // self.temporal_stride, height // 8, width // 8)}


def _at_least_float(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _read_sizes(state: dict[str, Tensor], source: str) -> dict[str, Any]:
    """Return the constructor's arguments that the tensors of a release show."""
    names = [
        "encoder.down1.0.weight",
        "encoder.connect_l1.weight",
        "decoder.connect_l2.1.weight",
        "decoder.conv_in.conv.weight",
    ]
    if missing := [name for name in names if name not in state]:
        raise UserError(f"Expected weights of WF-VAE, got none named {', '.join(missing)} in {source}.")
    trunk, encoder_flow, decoder_flow, latent = (state[name].shape for name in names)
    blocks = sum(f"encoder.down1.{i}.conv1.weight" in state for i in range(1, len(state)))
    return {
        "latent_channels": latent[1],
        "channels": trunk[0],
        "encoder_flow_channels": encoder_flow[0],
        "decoder_flow_channels": decoder_flow[1],
        "num_blocks": blocks,
        "norm": "layer" if "encoder.norm_out.norm.weight" in state else "group",
        "temporal_stride": 4 if "encoder.wavelet_transform_l1.aa" in state else 8,
    }
