"""Mochi 1's autoencoder (Genmo, 2024) by diffusers."""

import math
from typing import Any, ClassVar

from vidtwin.baselines.library.base import LibraryAutoencoder


class Mochi(LibraryAutoencoder):
    """Mochi's autoencoder: 459,748,611 parameters, 12 channels, 6 x 8 x 8 pixels a place."""

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_mochi.AutoencoderKLMochi"
    last_weight: ClassVar[str] = "decoder.proj_out.weight"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return math.prod(config.temporal_expansions), math.prod(config.spatial_expansions)
