"""Autoencoders of pictures frame by frame: Stable Diffusion's VAE, and Stable Video Diffusion's temporal decoder."""

from typing import Any, ClassVar

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
        return _as_clip(posterior.mean, len(clip)), _as_clip(posterior.logvar, len(clip))

    def _run_decoder(self, latent: Tensor) -> Tensor:
        return _as_clip(self.model.decode(latent.transpose(1, 2).flatten(0, 1)).sample, len(latent))


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
        return _as_clip(self.model.decode(frames, num_frames=latent.shape[2]).sample, len(latent))


def _as_clip(frames: Tensor, batch: int) -> Tensor:
    """Rearrange (B·T, C, H, W) to (B, C, T, H, W)."""
    return frames.unflatten(0, (batch, -1)).transpose(1, 2)
