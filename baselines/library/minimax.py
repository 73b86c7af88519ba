"""MiniMax-H3's video autoencoder by diffusers."""

import math
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidtwin.autoencoder import TemporalSpec
from vidtwin.baselines.library.base import LibraryAutoencoder

# ImageNet's statistics of red, green and blue in [0, 1], in which the library's pixels are given.
PIXEL_MEAN, PIXEL_DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class MiniMaxH3(LibraryAutoencoder):
    """MiniMax-H3's autoencoder: 2,603,868,984 parameters, 24 channels, 4 x 16 x 16 pixels a place.

    The encoder, causal convolutions, takes 17 frames at a time; the decoder, a transformer, sees the latents of 22, of
    which 5 are blended with those of the next. So clips have 17k + 5 frames, and 5k + 2 steps. The released model works
    by blended tiles of 256 x 256 pixels, and its decoder counts places relative to a tile: larger frames go through
    tiles here too.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_minimax_h3.AutoencoderKLMiniMaxH3"
    last_weight: ClassVar[str] = "decoder.proj_out.weight"
    causal = False

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__(arguments, activation_checkpointing)
        self.model.use_tiling = True
        length, overlap = self.model.config.clip_length, self.model.frame_overlap
        self.temporal = TemporalSpec(multiple=length, offset=overlap, minimum=length + overlap, pad="last")
        if self.model.config.spatial_padding_mode == "reflect":
            self.minimum_side = 2 * self.space
        self.register_buffer("pixel_mean", torch.tensor(PIXEL_MEAN).view(1, 3, 1, 1, 1), persistent=False)
        self.register_buffer("pixel_deviation", torch.tensor(PIXEL_DEVIATION).view(1, 3, 1, 1, 1), persistent=False)

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return math.prod(config.temporal_downsample_factors), math.prod(config.spatial_downsample_factors)

    def _count_steps(self, frames: int) -> int:
        return int(frames // self.temporal.multiple * self.model.tokens_chunk_size + self.model.token_overlap)

    def _count_frames(self, steps: int) -> int:
        return steps // int(self.model.tokens_chunk_size) * self.temporal.multiple + self.temporal.offset

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, deviation = self.get_buffer("pixel_mean"), self.get_buffer("pixel_deviation")
        return super()._run_encoder(((clip + 1) / 2 - mean) / deviation)

    def _run_decoder(self, latent: Tensor) -> Tensor:
        mean, deviation = self.get_buffer("pixel_mean"), self.get_buffer("pixel_deviation")
        return (super()._run_decoder(latent) * deviation + mean) * 2 - 1
