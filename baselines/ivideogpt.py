"""iVideoGPT's tokenizer (Wu et al., NeurIPS 2024, section 3.1): many codes for the first frames, few for later ones.

    context frames ── encoder ──> map ── codebook ──> context codes ── decoder ──> context frames
                         │ each level's                                   │ each level's
                         ∨ features                                       ∨ features
    future frames ─ cond. encoder ─> map ─ p x p patches ─ codebook ─> dynamics codes ─ cond. decoder ──> future frames

All four networks are VQGAN's (`vidtwin.layers.vqgan`) and see single frames. The conditional ones attend only to the
context, at the levels of low resolution: no future frame sees another. A future frame is thus coded relative to the
context, in p² times fewer codes.

The arithmetic and the names of the weights are those of the released model, so that its weights load
(`IVideoGPT.from_official`) and give its codes. Departures, all outside that arithmetic: position tables have the size
of the true grid (the released code always has 16x16); the keys of a clip's context are computed once (in the released
code once per future frame); clips of another resolution than the networks' are resized before encoding and after
decoding.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers.quantize import VectorQuantizer
from vidtwin.layers.vqgan import Decoder, DecoderLayers, Encoder, EncoderLayers
from vidtwin.posteriors import Encoding, Latents, Quantized

WEIGHTS, CONFIG = "diffusion_pytorch_model.safetensors", "config.json"
# Defaults of the released class for keys that config.json does not have.
RELEASED_DEFAULTS: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": [64],
    "down_block_types": ["DownEncoderBlock2D"],
    "up_block_types": ["UpDecoderBlock2D"],
    "layers_per_block": 1,
    "act_fn": "silu",
    "latent_channels": 3,
    "vq_embed_dim": None,
    "num_vq_embeddings": 256,
    "num_dyn_embeddings": 256,
    "norm_num_groups": 32,
    "norm_type": "group",
    "mid_block_add_attention": True,
    "context_length": 1,
    "max_att_resolution": 32,
    "resolution": 256,
    "patch_size": 4,
}


class ContextAttention(nn.Module):
    """Attention of the maps of a clip's future frames to those of its context frames.

    Keys and values are the pixels of all context frames, normalized together; the position tables are part of both.

    Args:
        width: C, a multiple of 32 (the norms' groups).
        size: Height and width of the maps.
        context_length: T0, number of context frames.
        dropout: Dropout of the attention weights and of the result in training.
    """

    def __init__(self, width: int, size: int, context_length: int, dropout: float) -> None:
        super().__init__()
        if width % 32:
            raise UserError(
                f"Expected channels that are multiples of 32 where the context is attended, got {width} at "
                f"{size}x{size}; change channels or attention_resolution."
            )
        self.context_length = context_length
        self.kv_pos_emb = nn.Parameter(torch.zeros(context_length * size**2, width))
        self.q_pos_emb = nn.Parameter(torch.zeros(size**2, width))
        self.att = nn.MultiheadAttention(width, 4, dropout, batch_first=True)
        self.kv_norm = nn.GroupNorm(32, width)
        self.q_norm = nn.GroupNorm(32, width)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """Attend to the context: (B·N, C, h, w), (B·T0, C, h, w) → (B·N, C, h, w)."""
        height = x.shape[2]
        context = rearrange(context, "(b t) c h w -> b c (t h) w", t=self.context_length)
        kv = rearrange(self.kv_norm(context), "b c h w -> b (h w) c") + self.kv_pos_emb
        q = rearrange(self.q_norm(x), "m c h w -> m (h w) c") + self.q_pos_emb
        # Queries only see the context, so those of all future frames of a clip can share one sequence.
        q = rearrange(q, "(b n) s c -> b (n s) c", b=context.shape[0])
        y = self.dropout(self.att(q, kv, kv, need_weights=False)[0])
        return F.silu(x + rearrange(y, "b (n h w) c -> (b n) c h w", h=height, w=x.shape[3]))


class ConditionalEncoder(EncoderLayers):
    """An encoder with attention to the context encoder's features after the levels of low resolution.

    Args:
        channels, out_channels, blocks, norm_groups, activation_checkpointing: As in `EncoderLayers`.
        attention_resolution: Levels whose output is at most this wide attend.
        resolution: Height and width of the frames.
        context_length: T0.
        dropout: As in `ContextAttention`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        out_channels: int,
        blocks: int,
        norm_groups: int,
        activation_checkpointing: bool,
        attention_resolution: int,
        resolution: int,
        context_length: int,
        dropout: float,
    ) -> None:
        super().__init__(channels, out_channels, blocks, norm_groups, True, activation_checkpointing)
        last = len(channels) - 1
        sizes = [resolution // 2 ** min(i + 1, last) for i in range(len(channels))]
        self.attended = [i for i, size in enumerate(sizes) if size <= attention_resolution]
        if not self.attended:
            raise UserError(
                f"Expected attention_resolution of at least {sizes[-1]}, the side of the smallest level, got "
                f"{attention_resolution}: the encoder of the future frames would not see the context."
            )
        self.cross_att_blocks = nn.ModuleList(
            ContextAttention(channels[i], sizes[i], context_length, dropout) for i in self.attended
        )

    def forward(self, frames: Tensor, context: list[Tensor]) -> Tensor:
        """Encode future frames (B·N, 3, H, W) given `Encoder`'s levels (B·T0, ...) → (B·N, out_channels, h, w)."""
        attention = dict(zip(self.attended, self.cross_att_blocks, strict=True))
        x = self.conv_in(frames)
        for i, level in enumerate(self.down_blocks):
            x = self.run(level, x)
            if i in attention:
                x = self.run(attention[i], x, context[i])
        return self.head(x)


class ConditionalDecoder(DecoderLayers):
    """A decoder with attention to the context decoder's features after the middle and the levels of low resolution.

    Args:
        channels, in_channels, blocks, norm_groups, activation_checkpointing: As in `DecoderLayers`.
        attention_resolution: Levels whose output is at most this wide attend; the middle always does.
        grid_size: Height and width of the input.
        context_length: T0.
        dropout: As in `ContextAttention`.
    """

    def __init__(
        self,
        channels: Sequence[int],
        in_channels: int,
        blocks: int,
        norm_groups: int,
        activation_checkpointing: bool,
        attention_resolution: int,
        grid_size: int,
        context_length: int,
        dropout: float,
    ) -> None:
        super().__init__(channels, in_channels, blocks, norm_groups, True, activation_checkpointing)
        last = len(channels) - 1
        widths = [channels[-1], *reversed(channels)]
        sizes = [grid_size, *(grid_size * 2 ** min(i + 1, last) for i in range(len(channels)))]
        self.attended = [i for i, size in enumerate(sizes) if i == 0 or size <= attention_resolution]
        self.cross_att_blocks = nn.ModuleList(
            ContextAttention(widths[i], sizes[i], context_length, dropout) for i in self.attended
        )

    def forward(self, z: Tensor, context: list[Tensor]) -> Tensor:
        """Decode (B·N, in_channels, h, w) given `Decoder`'s middle and levels (B·T0, ...) → (B·N, 3, H, W)."""
        attention = dict(zip(self.attended, self.cross_att_blocks, strict=True))
        x = self.run(attention[0], self.stem(z), context[0])
        for i, level in enumerate(self.up_blocks, start=1):
            x = self.run(level, x)
            if i in attention:
                x = self.run(attention[i], x, context[i])
        return self.head(x)


class IVideoGPT(VideoAutoencoder):
    """Compressive tokenizer: the first `context_length` frames on their own, each later frame given these.

    The defaults are the released 256-pixel model (310,472,774 parameters) on clips of 224 pixels: of 16 frames, 736
    codes of 13 bits, 47,104 numbers, 1.9558% of the clip (1.4974% of the resized one).

    Latents, as code vectors with channels first: `context` (D, T0, g, g) and `dynamics` (D, T - T0, g/p, g/p), with g
    the side of the grid and p = `dynamics_patch_size`. `decode` of one alone uses zeros as the other's code
    vectors. `context` alone does not determine how many frames follow: `num_frames` does, and without it none do.

    Args:
        resolution: H = W of the clips in pixels.
        inner_resolution: H = W of the networks, a multiple of 2^(levels - 1); None is `resolution`. Clips are resized
            by antialiased bicubic interpolation before encoding and after decoding: 224 → 256 → 224 alone gives 47 dB
            on clips of UCF-101 (bilinear: 38 dB).
        context_length: T0.
        dynamics_patch_size: p, side of the patches of a future frame's map that become one code each. It divides
            the grid.
        channels: Width of each level; the grid is `inner_resolution` halved between consecutive levels. Levels that
            attend to the context need multiples of 32.
        layers_per_block: Residual blocks per level of the encoders; the decoders have one more.
        latent_channels: Width of the maps that are quantized.
        code_size: D, size of a code vector; None is `latent_channels`.
        codebook_size: Codes of the context frames' codebook.
        dynamics_codebook_size: Codes of the future frames' codebook.
        norm_groups: Groups of the networks' group norms (those of the attention to the context always have 32).
        attention_resolution: Future frames attend to the context at levels of at most this height and width, and at
            the start of the decoder.
        context_mid_attention: Add self-attention to the middle of the context's two networks, as in the conditional
            ones.
        attention_dropout: Dropout of the attention to the context in training.
        activation_checkpointing: Recompute each level in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("context", "dynamics")
    partial_latents: ClassVar[bool] = True
    value_range: ClassVar[tuple[float, float]] = (0.0, 1.0)
    resolution: int

    def __init__(
        self,
        resolution: int = 224,
        inner_resolution: int | None = 256,
        context_length: int = 2,
        dynamics_patch_size: int = 4,
        channels: Sequence[int] = (128, 256, 256, 512, 768),
        layers_per_block: int = 2,
        latent_channels: int = 64,
        code_size: int | None = None,
        codebook_size: int = 8192,
        dynamics_codebook_size: int = 8192,
        norm_groups: int = 32,
        attention_resolution: int = 32,
        context_mid_attention: bool = False,
        attention_dropout: float = 0.1,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        if not channels:
            raise UserError("Expected channels of at least one level, got none.")
        for name, given in self.init_args.items():
            for count in given if name == "channels" else [given]:
                if type(count) is int and count < 1:
                    raise UserError(f"Expected {name} of at least 1, got {count}.")
        if not 0 <= attention_dropout < 1:
            raise UserError(f"Expected attention_dropout in [0, 1), got {attention_dropout}.")
        inner = resolution if inner_resolution is None else inner_resolution
        factor = 2 ** (len(channels) - 1)
        if inner % factor:
            raise UserError(
                f"Expected an inner resolution that {len(channels)} levels can halve {len(channels) - 1} times, a "
                f"multiple of {factor}, got {inner}; set inner_resolution={-(-inner // factor) * factor}."
            )
        grid, patch = inner // factor, dynamics_patch_size
        if grid % patch:
            fitting = [size for size in range(1, grid + 1) if grid % size == 0]
            raise UserError(
                f"Expected a dynamics_patch_size that divides the grid of {grid}x{grid}, got {patch}; these do: "
                f"{', '.join(map(str, fitting))}."
            )
        self.resolution, self.inner_resolution = resolution, inner
        self.temporal = TemporalSpec(minimum=context_length + 1)
        self.context_length, self.patch_size, self.grid_size = context_length, patch, grid
        self.code_size = code_size = code_size or latent_channels
        blocks, depth, recompute = layers_per_block, patch**2 * latent_channels, activation_checkpointing
        attention = (attention_resolution, inner, context_length, attention_dropout)

        self.encoder = Encoder(channels, latent_channels, blocks, norm_groups, context_mid_attention, recompute)
        self.cond_encoder = ConditionalEncoder(channels, latent_channels, blocks, norm_groups, recompute, *attention)
        self.quant_conv = nn.Conv2d(latent_channels, code_size, 1)
        self.quantize = VectorQuantizer(codebook_size, code_size)
        self.post_quant_conv = nn.Conv2d(code_size, latent_channels, 1)
        self.quant_linear = nn.Linear(depth, code_size)
        self.dynamics_quantize = VectorQuantizer(dynamics_codebook_size, code_size)
        self.post_quant_linear = nn.Linear(code_size, depth)
        self.decoder = Decoder(channels, latent_channels, blocks + 1, norm_groups, context_mid_attention, recompute)
        attention = (attention_resolution, grid, context_length, attention_dropout)
        self.cond_decoder = ConditionalDecoder(
            channels, latent_channels, blocks + 1, norm_groups, recompute, *attention
        )

    @classmethod
    def from_official(
        cls, path: str | Path, resolution: int | None = None, activation_checkpointing: bool = False
    ) -> Self:
        """Load a released tokenizer, in evaluation mode.

        Args:
            path: Its folder, with config.json and diffusion_pytorch_model.safetensors, or the parent folder of
                `tokenizer/`.
            resolution: H = W of the clips in pixels; None is the model's own (256 or 64).
            activation_checkpointing: As in the constructor.

        Raises:
            UserError: The files are missing or of another model; names what does not fit.
        """
        folder = Path(path)
        folder = folder if (folder / CONFIG).is_file() else folder / "tokenizer"
        config = _read_config(folder / CONFIG, Path(path))
        model = cls(
            resolution=config["resolution"] if resolution is None else resolution,
            inner_resolution=config["resolution"],
            context_length=config["context_length"],
            dynamics_patch_size=config["patch_size"],
            channels=config["block_out_channels"],
            layers_per_block=config["layers_per_block"],
            latent_channels=config["latent_channels"],
            code_size=config["vq_embed_dim"],
            codebook_size=config["num_vq_embeddings"],
            dynamics_codebook_size=config["num_dyn_embeddings"],
            norm_groups=config["norm_num_groups"],
            attention_resolution=config["max_att_resolution"],
            context_mid_attention=config["mid_block_add_attention"],
            activation_checkpointing=activation_checkpointing,
        )
        state = {_rename(name): tensor for name, tensor in weights.read(folder / WEIGHTS).items()}
        weights.check_fit(state, model.state_dict(), str(folder / WEIGHTS))
        model.load_state_dict(state)
        return model.eval()

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.cond_decoder.conv_out.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def decode(self, latents: Latents, num_frames: int | None = None) -> Tensor:
        """Decode as in the base class; `context` alone is followed by zero code vectors up to `num_frames` frames."""
        if set(latents) == {"context"} and num_frames is not None and num_frames > self.context_length:
            batch, side = latents["context"].shape[0], self.grid_size // self.patch_size
            shape = (batch, self.code_size, num_frames - self.context_length, side, side)
            latents = {**latents, "dynamics": latents["context"].new_zeros(shape)}
        return super().decode(latents, num_frames)

    def _encode(self, clip: Tensor) -> Encoding:
        batch, length = clip.shape[0], self.context_length
        clip = self._resize(clip, self.inner_resolution)
        context_map, levels = self.encoder(rearrange(clip[:, :, :length], "b c t h w -> (b t) c h w"))
        future_map = self.cond_encoder(rearrange(clip[:, :, length:], "b c n h w -> (b n) c h w"), levels)
        p = self.patch_size
        patches = rearrange(future_map, "m c (h p) (w q) -> m h w (p q c)", p=p, q=p)

        def posterior(vectors: Tensor, quantizer: VectorQuantizer) -> Quantized:
            value, codes, terms = quantizer(rearrange(vectors, "(b t) h w d -> b t h w d", b=batch))
            return Quantized(value.movedim(-1, 1), codes, quantizer.codebook_size, terms)

        return Encoding(
            context=posterior(self.quant_conv(context_map).movedim(1, -1), self.quantize),
            dynamics=posterior(self.quant_linear(patches), self.dynamics_quantize),
        )

    def _decode(self, latents: Latents) -> Tensor:
        shapes = self._shapes(frames="N")
        for name, latent in latents.items():
            _check_shape(f"latent {name}", latent, shapes[name])
        context = latents.get("context")
        if context is None:
            context = latents["dynamics"].new_zeros(latents["dynamics"].shape[0], *shapes["context"])
        context_map = self.post_quant_conv(rearrange(context, "b d t h w -> (b t) d h w"))
        frames, levels = self.decoder(context_map)
        frames = rearrange(frames, "(b t) c h w -> b c t h w", b=context.shape[0])
        if "dynamics" in latents:
            vectors = rearrange(latents["dynamics"], "b d n h w -> (b n) h w d")
            p = self.patch_size
            future_map = rearrange(self.post_quant_linear(vectors), "m h w (p q c) -> m c (h p) (w q)", p=p, q=p)
            future = self.cond_decoder(future_map, levels)
            frames = torch.cat([frames, rearrange(future, "(b n) c h w -> b c n h w", b=context.shape[0])], 2)
        return self._resize(frames, self.resolution)

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        return self._shapes(clip_shape[1] - self.context_length)

    def code_shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], int]]:
        sizes = {"context": self.quantize.codebook_size, "dynamics": self.dynamics_quantize.codebook_size}
        return {name: (shape[1:], sizes[name]) for name, shape in self.latent_shapes(clip_shape).items()}

    def dequantize(self, codes: Latents) -> Latents:
        """Look up the code vectors of integer codes by name, context (B, T0, g, g) and dynamics (B, N, g/p, g/p).

        Raises:
            UserError: Names, shapes or values of the codes are invalid.
        """
        if not codes or not set(codes) <= set(self.latent_names):
            raise UserError(f"Expected codes by the names {list(self.latent_names)}, got {sorted(codes)}.")
        quantizers = {"context": self.quantize, "dynamics": self.dynamics_quantize}
        for name, given in codes.items():
            size = quantizers[name].codebook_size
            _check_shape(f"codes {name}", given, self._shapes(frames="N")[name][1:])
            if given.is_floating_point() or not bool(((given >= 0) & (given < size)).all()):
                raise UserError(f"Expected {name} codes that are integers in 0..{size - 1}, got others.")
        return {name: quantizers[name].lookup(given).movedim(-1, 1) for name, given in codes.items()}

    def tokens(self, codes: Latents) -> Tensor:
        """Join the codes of both latents to the token stream (B, L) on which iVideoGPT's transformer is trained.

        With codebooks of sizes K and K': the codes of each context frame, separated by K + K'; then for each future
        frame K + K' + 1 and its codes plus K.
        """
        if set(codes) != set(self.latent_names) or len({len(given) for given in codes.values()}) != 1:
            got = {name: tuple(given.shape) for name, given in codes.items()}
            raise UserError(f"Expected codes {list(self.latent_names)} of one batch, got {got}.")
        self.dequantize(codes)  # raises for invalid codes
        size, dynamics_size = self.quantize.codebook_size, self.dynamics_quantize.codebook_size
        context = F.pad(codes["context"].flatten(2), (1, 0), value=size + dynamics_size)
        dynamics = F.pad(codes["dynamics"].flatten(2) + size, (1, 0), value=size + dynamics_size + 1)
        return torch.cat([context.flatten(1)[:, 1:], dynamics.flatten(1)], 1)

    def codes_from_tokens(self, tokens: Tensor) -> Latents:
        """Invert `tokens`; raise `UserError` if the stream is incomplete or invalid."""
        size, grid, side = self.quantize.codebook_size, self.grid_size, self.grid_size // self.patch_size
        length = self.context_length * (grid**2 + 1) - 1
        rest = tokens.shape[1] - length if tokens.ndim == 2 else -1
        if rest < 0 or rest % (side**2 + 1):
            raise UserError(
                f"Expected tokens (B, {length} + k·{side**2 + 1}), got {tuple(tokens.shape)}: the stream is cut off "
                "or of another model."
            )
        context, dynamics = F.pad(tokens[:, :length], (1, 0)), tokens[:, length:]
        codes = {
            "context": rearrange(context, "b (t s) -> b t s", s=grid**2 + 1)[..., 1:].unflatten(-1, (grid, grid)),
            "dynamics": rearrange(dynamics, "b (n s) -> b n s", s=side**2 + 1)[..., 1:].unflatten(-1, (side, side))
            - size,
        }
        if not torch.equal(self.tokens(codes), tokens):
            raise UserError("Expected the tokens that begin a frame in their places, got others there.")
        return codes

    def _shapes(self, frames: Any) -> dict[str, tuple[Any, ...]]:
        """Return the shapes of the latents without the batch, for this number of future frames."""
        side = self.grid_size // self.patch_size
        return {
            "context": (self.code_size, self.context_length, self.grid_size, self.grid_size),
            "dynamics": (self.code_size, frames, side, side),
        }

    @staticmethod
    def _resize(clip: Tensor, side: int) -> Tensor:
        """Resize (B, 3, T, H, W) to (B, 3, T, side, side), in fp32 or fp64."""
        if clip.shape[-1] == side:
            return clip
        frames = rearrange(clip, "b c t h w -> (b t) c h w")
        frames = frames if frames.dtype == torch.float64 else frames.float()
        frames = F.interpolate(frames, (side, side), mode="bicubic", align_corners=False, antialias=True)
        return rearrange(frames, "(b t) c h w -> b c t h w", b=clip.shape[0])


def _check_shape(name: str, given: Tensor, wanted: tuple[Any, ...]) -> None:
    """Raise `UserError` unless the shape is `wanted` behind the batch axis; "N" is any number."""
    fits = given.ndim == 1 + len(wanted)
    if not fits or any(a != b for a, b in zip(given.shape[1:], wanted, strict=True) if b != "N"):
        raise UserError(f"Expected {name} of shape (B, {', '.join(map(str, wanted))}), got {tuple(given.shape)}.")


def _read_config(path: Path, given: Path) -> dict[str, Any]:
    """Read config.json of a released tokenizer; missing keys get the defaults of the released class."""
    if not path.is_file():
        raise UserError(f"Expected a folder with {CONFIG} and {WEIGHTS}, or with tokenizer/ in it, got {given}.")
    try:
        config = {**RELEASED_DEFAULTS, **json.loads(path.read_text())}
    except (ValueError, TypeError) as error:
        raise UserError(f"Expected a config of a released tokenizer, got {path}: {error}.") from error
    levels = len(config["block_out_channels"])
    fixed = {
        "in_channels": 3,
        "out_channels": 3,
        "down_block_types": ["DownEncoderBlock2D"] * levels,
        "up_block_types": ["UpDecoderBlock2D"] * levels,
        "act_fn": "silu",
        "norm_type": "group",
    }
    for key, wanted in fixed.items():
        if config[key] != wanted:
            raise UserError(f"Expected {key} {wanted} of a released tokenizer, got {config[key]} in {path}.")
    return config


def _rename(name: str) -> str:
    """Convert diffusers' old names of the attention layers to the current ones."""
    for old, new in {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}.items():
        name = name.replace(f".attentions.0.{old}.", f".attentions.0.{new}.")
    return name
