"""Autoencoders of pictures frame by frame: Stable Diffusion's and FLUX.2's, and SVD's with its temporal decoder."""

import math
from typing import Any, ClassVar

from einops import rearrange
from torch import Tensor

from vidtwin.baselines.library.base import LibraryAutoencoder


class StableDiffusion(LibraryAutoencoder):
    """Stable Diffusion's autoencoder of each frame (Rombach et al., CVPR 2022), by diffusers.

    The library's defaults are a single block; `configs/library/stable_diffusion.yaml` has the official arguments:
    83,653,863 parameters, 4 channels, 8 x 8 pixels a place.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl.AutoencoderKL"
    last_weight: ClassVar[str] = "decoder.conv_out.weight"
    causal = False

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return 1, 2 ** (len(config.block_out_channels) - 1)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        posterior = self.model.encode(clip.transpose(1, 2).flatten(0, 1)).latent_dist
        return _join_frames(posterior.mean, len(clip)), _join_frames(posterior.logvar, len(clip))

    def _run_decoder(self, latent: Tensor) -> Tensor:
        return _join_frames(self.model.decode(latent.transpose(1, 2).flatten(0, 1)).sample, len(latent))


class StableVideoDiffusion(StableDiffusion):
    """Stable Diffusion's encoder with the temporal decoder of SVD (Blattmann et al., arXiv 2311.15127), by diffusers.

    `configs/library/stable_video_diffusion.yaml` has the official arguments: 97,742,847 parameters. The decoder sees
    the other frames, so that a clip is decoded whole.
    """

    library_class: ClassVar[str] = (
        "diffusers.models.autoencoders.autoencoder_kl_temporal_decoder.AutoencoderKLTemporalDecoder"
    )
    last_weight: ClassVar[str] = "decoder.time_conv_out.weight"
    pads_time: ClassVar[bool] = True

    def _run_decoder(self, latent: Tensor) -> Tensor:
        frames = latent.transpose(1, 2).flatten(0, 1)
        return _join_frames(self.model.decode(frames, num_frames=latent.shape[2]).sample, len(latent))


class Flux2(StableDiffusion):
    """FLUX.2's autoencoder of each frame (Black Forest Labs, 2025), by diffusers.

    The library's defaults are the official arguments: 84,046,115 parameters, 32 channels, 8 x 8 pixels a place. The
    latent here is the one that the generator takes, 2 x 2 places as channels: 128 of them, 16 x 16 pixels a place. Its
    shift and scale are the statistics of a batch norm, which official weights bring.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_flux2.AutoencoderKLFlux2"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        _, pixels = super()._read_factors(config)
        return 1, pixels * config.patch_size[0]

    def _count_channels(self, config: Any) -> int:
        return int(config.latent_channels * math.prod(config.patch_size))

    def _get_scaling(self, steps: int) -> tuple[Tensor, Tensor]:
        norm = self.model.bn
        shift, scale = norm.running_mean, (norm.running_var + norm.eps).sqrt()
        return shift.view(1, -1, 1, 1, 1), scale.view(1, -1, 1, 1, 1)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        mean, logvar = super()._run_encoder(clip)
        assert logvar is not None
        return self._pack(mean), self._pack(logvar)

    def _run_decoder(self, latent: Tensor) -> Tensor:
        height, width = self.model.config.patch_size
        places = rearrange(latent, "b (c p q) t h w -> b c t (h p) (w q)", p=height, q=width)
        return super()._run_decoder(places)

    def _pack(self, x: Tensor) -> Tensor:
        """Move places to channels: (B, C, T, H, W) → (B, C·p·q, T, H/p, W/q)."""
        height, width = self.model.config.patch_size
        return rearrange(x, "b c t (h p) (w q) -> b (c p q) t h w", p=height, q=width)


def _join_frames(frames: Tensor, batch: int) -> Tensor:
    """Rearrange (B·T, C, H, W) to (B, C, T, H, W)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
