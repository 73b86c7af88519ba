"""HunyuanVideo's causal 3-D VAEs, 1.0 (Kong et al., arXiv 2412.03603) and 1.5, by diffusers."""

from typing import Any, ClassVar

from vidtwin.baselines.library.base import LibraryAutoencoder


class HunyuanVideo(LibraryAutoencoder):
    """HunyuanVideo's autoencoder: 246,478,803 parameters, 16 channels, 4 x 8 x 8 pixels a place.

    From 17 frames on the library blends clips of 16, with tiling off too; here a clip is encoded and decoded whole.
    """

    library_class: ClassVar[str] = (
        "diffusers.models.autoencoders.autoencoder_kl_hunyuan_video.AutoencoderKLHunyuanVideo"
    )

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return int(config.temporal_compression_ratio), int(config.spatial_compression_ratio)


class HunyuanVideo15(HunyuanVideo):
    """HunyuanVideo 1.5's autoencoder: 1,260,634,115 parameters, 32 channels, 4 x 16 x 16 pixels a place.

    The library's attention fails with more than one clip, since its mask lacks the axis of the heads; so clips go
    through one by one, by the library's own slicing.
    """

    library_class: ClassVar[str] = (
        "diffusers.models.autoencoders.autoencoder_kl_hunyuanvideo15.AutoencoderKLHunyuanVideo15"
    )

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__(arguments, activation_checkpointing)
        self.model.use_slicing = True
