"""CMD's autoencoder (ICLR 2024): a clip as one content frame and a low-dimensional motion latent.

    encode   clip ─ encoder ┬─ logits ─ softmax over T ─ Σ_t w_t · clip_t ─> content (B, 3, H, W)
                            ├─ mean over h ─ linear ┐
                            └─ mean over w ─ linear ┴─ tanh ───────────────> motion (B, D, T, w + h)

    decode   content ─ patches ─ linear ─┐
             motion ┬─ width ── linear ──┼─ + ─ decoder ─ clip
                    └─ height ─ linear ──┘

    encoder  patches ─ linear ─ + position ─ depth × block
    decoder                     + position ─ depth × block ─ transposed convolution ─ 2 sigmoid − 1
    block    x += attention over T (norm(x));  x += attention over S (norm(x));  x += GEGLU MLP (norm(x))

Yu et al., "Efficient Video Diffusion Models via Content-Frame Motion-Latent Decomposition" (arXiv 2403.14148): its
autoencoder, on pixels. T frames, p pixels a patch, h = H/p, w = W/p, S = h·w patches, C = hidden_size, D =
motion_channels. Both latents are deterministic: no noise, no KL, no codes.

Written from the description, with one departure: learned position embeddings, one table for space and one for time, in
encoder and decoder. The released code creates some but never adds them, so that it cannot distinguish the order of
frames.
"""

from typing import ClassVar

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn import functional as F

from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.layers.attention import SelfAttention
from vidtwin.layers.patches import patchify
from vidtwin.layers.recompute import Recomputing
from vidtwin.posteriors import Deterministic, Encoding, Latents


class GEGLU(nn.Module):
    """C → 2 · 4C, one half times the GELU of the other → C (Shazeer 2020)."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.expand = nn.Linear(hidden_size, 8 * hidden_size)
        self.reduce = nn.Linear(4 * hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (..., C); the shape stays."""
        value, gate = self.expand(x).chunk(2, dim=-1)
        return self.reduce(value * F.gelu(gate))


class Block(nn.Module):
    """Attention over time at each patch, attention within each frame, MLP; each after its own norm."""

    def __init__(self, hidden_size: int, num_heads: int) -> None:
        super().__init__()
        self.temporal_norm = nn.LayerNorm(hidden_size)
        self.temporal_attention = SelfAttention(hidden_size, num_heads)
        self.spatial_norm = nn.LayerNorm(hidden_size)
        self.spatial_attention = SelfAttention(hidden_size, num_heads)
        self.mlp_norm = nn.LayerNorm(hidden_size)
        self.mlp = GEGLU(hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T, S, C); the shape stays."""
        x = x + self.temporal_attention(self.temporal_norm(x).transpose(1, 2)).transpose(1, 2)
        x = x + self.spatial_attention(self.spatial_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(Recomputing):
    """Position embeddings and `depth` blocks over T frames of S patches; without a norm after the last block."""

    def __init__(
        self,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_frames: int,
        num_patches: int,
        activation_checkpointing: bool,
    ) -> None:
        super().__init__(activation_checkpointing)
        self.space = nn.Parameter(torch.empty(num_patches, hidden_size))
        self.time = nn.Parameter(torch.empty(num_frames, 1, hidden_size))
        self.blocks = nn.ModuleList(Block(hidden_size, num_heads) for _ in range(depth))
        for table in (self.space, self.time):
            nn.init.normal_(table, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Transform (B, T or 1, S, C) → (B, T, S, C)."""
        x = x + (self.space + self.time)
        for block in self.blocks:
            x = self.run(block, x)
        return x


class ToPixels(nn.Module):
    """Projection to three numbers per pixel: a transposed convolution whose kernel and stride are one patch."""

    def __init__(self, hidden_size: int, patch_size: int, grid_size: int) -> None:
        super().__init__()
        self.grid_size = grid_size
        self.conv = nn.ConvTranspose2d(hidden_size, 3, patch_size, stride=patch_size)

    def forward(self, features: Tensor) -> Tensor:
        """Project features (B, T, S, C) → (B, 3, T, H, W)."""
        frames = rearrange(features, "b t (h w) c -> (b t) c h w", h=self.grid_size)
        return rearrange(self.conv(frames), "(b t) c h w -> b c t h w", t=features.shape[1])


class CMD(VideoAutoencoder):
    """Video autoencoder with a content frame and a motion latent.

    The defaults give 6.8452% of the clip's numbers, 1/16 of it the content frame; so do patch_size=4 with
    motion_channels=8, at 16 times as many tokens. VidTwin's appendix C.1 gives 6.9% for CMD, which fits both.

    Args:
        num_frames: T, frames of a clip.
        resolution: H = W in pixels, a multiple of `patch_size`.
        patch_size: p, side of a patch in pixels.
        motion_channels: D.
        hidden_size: C, width of encoder and decoder.
        depth: Blocks of the encoder, and of the decoder.
        num_heads: Attention heads.
        activation_checkpointing: Recompute each block in the backward pass: less memory, about a third more time.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("content", "motion")
    partial_latents: ClassVar[bool] = True
    resolution: int

    def __init__(
        self,
        num_frames: int = 16,
        resolution: int = 224,
        patch_size: int = 16,
        motion_channels: int = 32,
        hidden_size: int = 384,
        depth: int = 8,
        num_heads: int = 8,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        for name, count in self.init_args.items():
            if type(count) is int and count < 1:
                raise UserError(f"Expected {name} of at least 1, got {count}.")
        if resolution % patch_size:
            raise UserError(f"Expected resolution divisible by patch_size, got {resolution} and {patch_size}.")
        self.temporal = TemporalSpec.exactly(num_frames)
        self.resolution = resolution
        self.patch_size = patch_size
        self.grid_size = grid_size = resolution // patch_size

        def transformer() -> Transformer:
            return Transformer(hidden_size, depth, num_heads, num_frames, grid_size**2, activation_checkpointing)

        self.patch_embed = nn.Linear(3 * patch_size**2, hidden_size)
        self.encoder = transformer()
        self.to_logits = ToPixels(hidden_size, patch_size, grid_size)
        self.to_motion_width = nn.Linear(hidden_size, motion_channels)
        self.to_motion_height = nn.Linear(hidden_size, motion_channels)

        self.from_content = nn.Linear(3 * patch_size**2, hidden_size)
        self.from_motion_width = nn.Linear(motion_channels, hidden_size)
        self.from_motion_height = nn.Linear(motion_channels, hidden_size)
        self.decoder = transformer()
        self.to_pixels = ToPixels(hidden_size, patch_size, grid_size)

        self._shapes = {
            "content": (3, resolution, resolution),
            "motion": (motion_channels, num_frames, 2 * grid_size),
        }

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.to_pixels.conv.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def content_weights(self, features: Tensor) -> Tensor:
        """Compute each frame's weight in the content frame: (B, T, S, C) → (B, 3, T, H, W), which sums to 1 over T."""
        return self.to_logits(features).softmax(dim=2)

    def _encode(self, clip: Tensor) -> Encoding:
        features = self.encoder(self.patch_embed(patchify(clip, self.patch_size)))
        content = (self.content_weights(features) * clip).sum(dim=2)
        return Encoding(content=Deterministic(content), motion=Deterministic(self._motion(features)))

    def _motion(self, features: Tensor) -> Tensor:
        """Compute the motion latent (B, T, S, C) → (B, D, T, w + h): the width profile, then the height profile."""
        grid = rearrange(features, "b t (h w) c -> b t h w c", h=self.grid_size)
        width, height = self.to_motion_width(grid.mean(dim=2)), self.to_motion_height(grid.mean(dim=3))
        return torch.cat([width, height], dim=2).tanh().permute(0, 3, 1, 2)

    def _decode(self, latents: Latents) -> Tensor:
        """Decode the sum of the given latents."""
        for name, latent in latents.items():
            if latent.shape[1:] != self._shapes[name]:
                wanted = ", ".join(map(str, self._shapes[name]))
                raise UserError(f"Expected latent {name} of shape (B, {wanted}), got {tuple(latent.shape)}.")
        parts = []
        if "content" in latents:
            parts.append(self.from_content(patchify(latents["content"][:, :, None], self.patch_size)))
        if "motion" in latents:
            width, height = latents["motion"].permute(0, 2, 3, 1).chunk(2, dim=2)
            grid = self.from_motion_width(width)[:, :, None] + self.from_motion_height(height)[:, :, :, None]
            parts.append(grid.flatten(2, 3))
        logits = self.to_pixels(self.decoder(sum(parts[1:], start=parts[0])))
        return (logits / 2).tanh()  # 2 sigmoid(x) − 1, which in bf16 would round mid-grey to half an 8-bit step

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)
