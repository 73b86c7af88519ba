"""KVAE's causal video VAE by diffusers."""

from typing import Any, ClassVar

from torch import Tensor

from vidtwin.baselines.library.base import LibraryAutoencoder


class KVAE(LibraryAutoencoder):
    """KVAE's video autoencoder: 617,982,115 parameters, 16 channels, 4 x 8 x 8 pixels a place.

    The library drops the encoder's log-variance and puts 0 in its place, so that a sample has noise of deviation 1;
    here the latent is the mean, without noise.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_kvae_video.AutoencoderKLKVAEVideo"

    def _factors(self, config: Any) -> tuple[int, int]:
        return int(config.temporal_compress_times), 2 ** (len(config.ch_mult) - 1)

    def _count_channels(self, config: Any) -> int:
        return int(config.z_channels)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode(clip).latent_dist.mean, None
