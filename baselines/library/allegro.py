"""Allegro's VAE (Zhou et al., arXiv 2410.15458) by diffusers."""

from typing import Any, ClassVar

from torch import Tensor

from vidtwin.baselines.library.base import LibraryAutoencoder


class Allegro(LibraryAutoencoder):
    """Allegro's autoencoder: 174,955,751 parameters, 4 channels, 4 x 8 x 8 pixels a place, clips of 4k frames.

    The library's `encode` and `decode` run by tiles of 24 x 320 x 320 pixels alone, one clip at a time, and give zeros
    for a smaller clip. Here the library's networks run on the whole clip: one tile of its size.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_allegro.AutoencoderKLAllegro"
    last_weight: ClassVar[str] = "decoder.conv_out.weight"
    causal = False
    pads_time: ClassVar[bool] = True

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return 2 ** sum(config.temporal_downsample_blocks), 2 ** (len(config.block_out_channels) - 1)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, logvar = _run_per_frame(self.model.quant_conv, self.model.encoder(clip)).chunk(2, dim=1)
        return mean, logvar

    def _run_decoder(self, latent: Tensor) -> Tensor:
        decoded: Tensor = self.model.decoder(_run_per_frame(self.model.post_quant_conv, latent))
        return decoded


def _run_per_frame(layer: Any, x: Tensor) -> Tensor:
    """Run a layer of pictures on each frame of (B, C, T, H, W)."""
    frames: Tensor = layer(x.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x.shape[0], -1)).transpose(1, 2)
