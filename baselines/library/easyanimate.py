"""EasyAnimate's MagViT VAE (Xu et al., arXiv 2405.18991) by diffusers."""

from typing import Any, ClassVar

from vidtwin.baselines.library.base import LibraryAutoencoder


class EasyAnimate(LibraryAutoencoder):
    """EasyAnimate's autoencoder: 244,375,507 parameters, 16 channels, 4 x 8 x 8 pixels a place.

    The library's convolutions keep the last frames of a clip as attributes. After an exception the next clip would
    begin with them, and fail or be another; here they are cleared.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_magvit.AutoencoderKLMagvit"
    last_weight: ClassVar[str] = "decoder.conv_out.weight"

    def _factors(self, config: Any) -> tuple[int, int]:
        kinds = config.down_block_types[: len(config.block_out_channels) - 1]  # the last block keeps the size
        return 2 ** sum("Temporal" in kind for kind in kinds), 2 ** len(kinds)

    def _clear_caches(self) -> None:
        self.model._clear_conv_cache()
