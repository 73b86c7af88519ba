"""VidTwin (CVPR 2025): a clip as a structure latent (slow content) and a dynamics latent (what moves, frame by frame).

                              ┌─ structure branch ─> structure (B, d_S, n_q, h, w) ─ structure branch ┐
    clip ─ encoder ─ features ┤                                                                       + ─ decoder ─ clip
                              └─ dynamics branch ──> dynamics (B, d_D, T, w + h) ──── dynamics branch ┘

The arithmetic is that of the released model, so that its weights load (`VidTwin.from_official`) and give its numbers.
Departures, all outside that arithmetic: decoding needs only the latents; evaluation uses the posterior's mode (the
released code samples); parameters that the released model never uses are absent.
"""

from pathlib import Path
from typing import Any, ClassVar, Literal, Self

import torch
from einops import rearrange
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.models import linear, official
from vidtwin.models.branches import DynamicsBranch, StructureBranch, downsample_size
from vidtwin.models.qformer import QFormer
from vidtwin.models.shortcut import DynamicsShortcut, StructureShortcut
from vidtwin.models.transformer import Decoder, Encoder, SpatialTemporalBlock, SpatialTemporalTransformer
from vidtwin.posteriors import DiagonalGaussian, Encoding, Latents


class VidTwin(VideoAutoencoder):
    """Video autoencoder with decoupled structure and dynamics.

    The defaults are VidTwin-base (Table 1) with latent setting 1 (Table 5): 4,928 numbers, 0.2046% of the clip.

    Args:
        num_frames: T, frames of a clip.
        resolution: H = W in pixels, a multiple of `patch_size`.
        patch_size: Side of a patch in pixels.
        hidden_size: C, width of encoder and decoder.
        depth: Blocks of the encoder, and of the decoder.
        num_heads: Attention heads of encoder and decoder.
        num_queries: n_q, maps of the structure latent.
        structure_channels: d_S.
        structure_downsamples: Halvings of the patch grid for the structure latent (14 → 7 → 4 → 2).
        dynamics_channels: d_D.
        dynamics_downsamples: Halvings of the patch grid for the dynamics latent.
        structure_width: Channels of the structure branch's first convolution.
        query_size: Width of the Q-Former.
        qformer_depth: Layers of the Q-Former.
        qformer_heads: Attention heads of the Q-Former.
        qformer_intermediate_size: Width of the Q-Former's MLPs.
        qformer_cross_every: Insert cross-attention every this many Q-Former layers.
        qformer_dropout: Dropout of the Q-Former in training.
        activation_checkpointing: Recompute each block in the backward pass: less memory, about a third more time; "mlp"
            recomputes the MLPs alone: a third less memory than without, 8% more FLOPs instead of 32%; "elementwise"
            keeps the results of products and attentions and recomputes the rest: as little memory as "mlp", and no more
            FLOPs than without.
        initialization: Initial values (docs/training_from_scratch.md): "balanced"; "linear", which starts as a linear
            code of each patch through the shortcuts, and needs `structure_shortcut`; or "released", those of the
            released code.
        structure_shortcut: Number of frame groups of a residual without parameters around the structure branch; divides
            `num_queries`, at most `num_frames`. 0, as in the paper: none. 1 keeps structure static; `num_queries`
            gives the best PSNR, but structure absorbs motion (docs/training_from_scratch.md; formulas in
            `vidtwin.models.shortcut`).
        dynamics_shortcut: Put a residual without parameters around the dynamics branch too: the differences of the
            frames from their mean, averaged over segments of the height and of the width.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("structure", "dynamics")
    partial_latents: ClassVar[bool] = True
    resolution: int

    def __init__(
        self,
        num_frames: int = 16,
        resolution: int = 224,
        patch_size: int = 16,
        hidden_size: int = 768,
        depth: int = 16,
        num_heads: int = 12,
        num_queries: int = 16,
        structure_channels: int = 4,
        structure_downsamples: int = 1,
        dynamics_channels: int = 8,
        dynamics_downsamples: int = 1,
        structure_width: int = 128,
        query_size: int = 64,
        qformer_depth: int = 6,
        qformer_heads: int = 8,
        qformer_intermediate_size: int = 768,
        qformer_cross_every: int = 2,
        qformer_dropout: float = 0.1,
        activation_checkpointing: bool | Literal["mlp", "elementwise"] = False,
        initialization: Literal["balanced", "linear", "released"] = "balanced",
        structure_shortcut: int = 0,
        dynamics_shortcut: bool = False,
    ) -> None:
        super().__init__()
        counts = {k: v for k, v in self.init_args.items() if type(v) is int and k != "qformer_dropout"}
        for name, count in counts.items():
            least = 0 if name.endswith(("downsamples", "shortcut")) else 1
            if count < least:
                raise UserError(f"Expected {name} of at least {least}, got {count}.")
        if activation_checkpointing not in (True, False, "mlp", "elementwise"):
            raise UserError(
                'Expected activation_checkpointing true, false, "mlp" or "elementwise", got '
                f"{activation_checkpointing!r}."
            )
        if resolution % patch_size:
            raise UserError(f"Expected resolution divisible by patch_size, got {resolution} and {patch_size}.")
        self.temporal = TemporalSpec.exactly(num_frames)
        self.resolution = resolution
        self.num_frames = num_frames
        self.grid_size = grid_size = resolution // patch_size

        def transformer() -> SpatialTemporalTransformer:
            return SpatialTemporalTransformer(
                hidden_size, depth, num_heads, num_frames, grid_size, activation_checkpointing
            )

        sizes = (hidden_size, num_frames, grid_size)
        structure = (num_queries, structure_channels, structure_downsamples)
        dynamics = (dynamics_channels, dynamics_downsamples)
        static = StructureShortcut(*sizes, *structure, structure_shortcut) if structure_shortcut else None
        channel_groups = static.channel_weights.shape[0] if static else 1
        moving = None
        if dynamics_shortcut:
            moving = DynamicsShortcut(*sizes, *dynamics, structure_shortcut or 1, channel_groups)
        self.encoder = Encoder(patch_size, transformer(), hidden_size)
        self.structure = StructureBranch(
            hidden_size,
            num_frames,
            grid_size,
            QFormer(
                num_queries,
                query_size,
                hidden_size,
                qformer_depth,
                qformer_heads,
                qformer_intermediate_size,
                qformer_cross_every,
                qformer_dropout,
            ),
            structure_channels,
            structure_downsamples,
            structure_width,
            static,
        )
        self.dynamics = DynamicsBranch(hidden_size, grid_size, *dynamics, moving)
        self.decoder = Decoder(patch_size, transformer(), hidden_size, grid_size)
        if initialization not in ("balanced", "linear", "released"):
            raise UserError(f'Expected initialization "balanced", "linear" or "released", got {initialization!r}.')
        if initialization == "linear" and static is None:
            raise UserError('Expected structure_shortcut of at least 1 with initialization "linear", got 0; set 1.')
        self._initialize_as_released()
        if initialization != "released":
            self.structure.initialize()
            self.dynamics.initialize()
        if initialization == "linear":
            assert static is not None
            linear.initialize(self.encoder, self.decoder, self.structure, self.dynamics, static.channel_weights)

        structure_size = downsample_size(grid_size, structure_downsamples)
        self._shapes = {
            "structure": (structure_channels, num_queries, structure_size, structure_size),
            "dynamics": (dynamics_channels, num_frames, 2 * self.dynamics.size),
        }

    @classmethod
    def from_official(cls, path: str | Path, num_heads: int = 12, qformer_heads: int = 8) -> Self:
        """Load a checkpoint of the released implementation (.ckpt or .safetensors), in evaluation mode.

        Sizes are inferred from tensor shapes, which do not show the numbers of heads.

        Args:
            path: Checkpoint file.
            num_heads: Attention heads of encoder and decoder.
            qformer_heads: Attention heads of the Q-Former.

        Raises:
            UserError: The file is not such a checkpoint; names missing, unexpected or misshapen tensors.
        """
        sizes, state = official.load(Path(path))
        arguments: dict[str, Any] = {**sizes, "num_heads": num_heads, "qformer_heads": qformer_heads}
        model = cls(**arguments)
        weights.check_fit(state, model.state_dict(), str(path))
        model.load_state_dict(state)
        return model.eval()

    @property
    def last_layer(self) -> nn.Parameter:
        weight = self.decoder.linear.weight
        assert isinstance(weight, nn.Parameter)
        return weight

    def features(self, clip: Tensor) -> Tensor:
        """Encode a clip (B, 3, T, H, W) as features (B, C, T, H/p, W/p), before the branches."""
        return rearrange(self.encoder(clip), "b t (h w) c -> b c t h w", h=self.grid_size)

    def _encode(self, clip: Tensor) -> Encoding:
        features = self.features(clip)
        return Encoding(
            structure=DiagonalGaussian(*self.structure.encode(features)),
            dynamics=DiagonalGaussian(*self.dynamics.encode(features)),
        )

    def _decode(self, latents: Latents) -> Tensor:
        """Decode the sum of the given latents; one alone shows only its part (the paper's figure 2)."""
        for name, latent in latents.items():
            if latent.shape[1:] != self._shapes[name]:
                wanted = ", ".join(map(str, self._shapes[name]))
                raise UserError(f"Expected latent {name} of shape (B, {wanted}), got {tuple(latent.shape)}.")
        branches: dict[str, StructureBranch | DynamicsBranch]
        branches = {"structure": self.structure, "dynamics": self.dynamics}
        parts = [branches[name].decode(latents[name]) for name in self.latent_names if name in latents]
        features = parts[0] if len(parts) == 1 else parts[0] + parts[1]
        return self.decoder(rearrange(features, "b c t h w -> b t (h w) c"))

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        return dict(self._shapes)

    @torch.no_grad()
    def _initialize_as_released(self) -> None:
        """Set the released initial values that differ from torch's defaults."""
        for transformer in (self.encoder.transformer, self.decoder.transformer):
            for module in transformer.modules():
                if isinstance(module, nn.Linear):
                    nn.init.xavier_uniform_(module.weight)
                    nn.init.zeros_(module.bias)
            for block in transformer.modules():
                if isinstance(block, SpatialTemporalBlock):
                    nn.init.zeros_(block.temporal_attention.proj.weight)
        nn.init.xavier_uniform_(self.encoder.patch_embed.weight)
        for module in self.structure.qformer.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
