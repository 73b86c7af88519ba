"""EasyAnimate's MagViT VAE (Xu et al., arXiv 2405.18991) by diffusers."""

from typing import Any, ClassVar

from vidtwin.baselines.library.base import LibraryAutoencoder


class EasyAnimate(LibraryAutoencoder):
    """EasyAnimate's autoencoder: 244,375,507 parameters, 16 channels, 4 x 8 x 8 pixels a place.

    The library's convolutions keep the last frames of a clip as attributes. After an exception the next clip would
    begin with them, and fail or be another; here they are cleared. The library's own recomputation of blocks fails, as
    it finds other frames in them; here it finds those of the first run.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_magvit.AutoencoderKLMagvit"
    last_weight: ClassVar[str] = "decoder.conv_out.weight"
    cache_attribute: ClassVar[str | None] = "prev_features"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        kinds = config.down_block_types[: len(config.block_out_channels) - 1]  # the last block keeps the size
        return 2 ** sum("Temporal" in kind for kind in kinds), 2 ** len(kinds)
