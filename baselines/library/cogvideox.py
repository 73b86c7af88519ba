"""CogVideoX's 3-D causal VAE (Yang et al., arXiv 2408.06072) by diffusers."""

from typing import Any, ClassVar

from vidtwin.autoencoder import TemporalSpec
from vidtwin.baselines.library.base import LibraryAutoencoder


class _WholeChunks(TemporalSpec):
    """One frame, 8k frames or 8k + 1: the library takes 8 frames at a time, and a further one with the first 8."""

    def is_legal(self, num_frames: int) -> bool:
        return num_frames == 1 or (num_frames >= 8 and num_frames % 8 < 2)

    def __str__(self) -> str:
        return "1, 8k or 8k+1 frames"


class CogVideoX(LibraryAutoencoder):
    """CogVideoX's autoencoder: 215,583,907 parameters, 16 channels, 4 x 8 x 8 pixels a place.

    16 frames become 4 steps, 2.0833% of the clip's numbers; with 17 the first frame is a step by itself. The arithmetic
    is the library's, which takes 8 frames at a time (2 steps when decoding): its norms take their statistics from them.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_cogvideox.AutoencoderKLCogVideoX"

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__(arguments, activation_checkpointing)
        self.temporal = _WholeChunks(multiple=8, minimum=1, pad="last")

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return int(config.temporal_compression_ratio), 2 ** (len(config.block_out_channels) - 1)

    def _count_steps(self, frames: int) -> int:
        return frames // self.time + frames % 2

    def _count_frames(self, steps: int) -> int:
        return steps * self.time - (self.time - 1) * (steps % 2)
