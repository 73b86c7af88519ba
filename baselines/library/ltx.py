"""LTX-Video's (HaCohen et al., arXiv 2501.00103) and LTX-2's autoencoders by diffusers."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from vidtwin.baselines.library.base import LibraryAutoencoder


class LTXVideo(LibraryAutoencoder):
    """LTX-Video's autoencoder: 419,193,649 parameters, 128 channels, 8 x 32 x 32 pixels a place.

    Shift and scale of the latent are buffers of the library's model, which official weights bring. A decoder with
    `timestep_conditioning` (from 0.9.1 on) decodes at time 0, as the library's pipeline does by default. One with
    `decoder_inject_noise` (0.9.1) adds noise to its features; evaluation draws it from seed 0, so that a latent has one
    clip.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_ltx.AutoencoderKLLTXVideo"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        halvings = 2 ** sum(config.spatio_temporal_scaling)
        return config.patch_size_t * halvings, config.patch_size * halvings

    def _get_scaling(self, steps: int) -> tuple[Tensor, Tensor]:
        shift, scale = (each.view(1, -1, 1, 1, 1) for each in (self.model.latents_mean, self.model.latents_std))
        return shift, scale / self.model.config.scaling_factor

    def _run_decoder(self, latent: Tensor) -> Tensor:
        conditioned = self.model.config.timestep_conditioning
        moment = torch.zeros(latent.shape[0], device=latent.device, dtype=latent.dtype) if conditioned else None
        with self._fix_noise(latent.device):
            decoded: Tensor = self.model.decode(latent, moment).sample
        return decoded

    @contextmanager
    def _fix_noise(self, device: torch.device) -> Iterator[None]:
        """Draw what the block draws at random from seed 0 in evaluation, and restore the random state afterwards."""
        injected = self.model.config.decoder_inject_noise
        if self.training or not (injected if isinstance(injected, bool) else any(injected)):
            yield
            return
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.random.default_generator.manual_seed(0)
            for each in devices:
                with torch.cuda.device(each):
                    torch.cuda.manual_seed(0)
            yield


class LTX2Video(LTXVideo):
    """LTX-2's autoencoder with its convolutional decoder: 1,222,479,601 parameters, 128 channels, 8 x 32 x 32 pixels.

    The library's class says 16 frames and 64 pixels a place, from the number of its stages; two of the four halve only
    one of the two.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_ltx2.AutoencoderKLLTX2Video"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        kinds = config.downsample_type
        time = config.patch_size_t * 2 ** sum(kind in ("temporal", "spatiotemporal") for kind in kinds)
        return time, config.patch_size * 2 ** sum(kind in ("spatial", "spatiotemporal") for kind in kinds)
