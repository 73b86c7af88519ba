"""Cosmos' continuous video tokenizers (NVIDIA, arXiv 2501.03575) by diffusers."""

from typing import Any, ClassVar

import torch
from torch import Tensor

from vidtwin.baselines.library.base import LibraryAutoencoder
from vidtwin.errors import UserError


class Cosmos(LibraryAutoencoder):
    """Cosmos' CV8x8x8 (105,653,696 parameters) or CV4x8x8 (104,669,888), 16 channels, without noise.

    `latents_mean` and `latents_std` have a number per channel and step; steps beyond the last have its numbers. The
    library's defaults are those of CV8x8x8, so that CV4x8x8 needs its own, or null.
    """

    library_class: ClassVar[str] = "diffusers.models.autoencoders.autoencoder_kl_cosmos.AutoencoderKLCosmos"
    last_weight: ClassVar[str] = "decoder.conv_out.conv_t.weight"

    def _read_factors(self, config: Any) -> tuple[int, int]:
        return int(config.temporal_compression_ratio), int(config.spatial_compression_ratio)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        return self.model.encode(clip).latent_dist.mode(), None

    def _read_scaling(self, config: Any) -> tuple[Tensor, Tensor]:
        tensors = []
        for name, default in (("latents_mean", 0.0), ("latents_std", 1.0)):
            given = getattr(config, name)
            given = [default] * self.channels if given is None else list(given)
            if len(given) % self.channels:
                raise UserError(
                    f"Expected {name} with the same number of steps for each of {self.channels} channels, got "
                    f"{len(given)} numbers; give {name} in arguments."
                )
            tensors.append(torch.tensor(given, dtype=torch.float32).view(1, self.channels, -1, 1, 1))
        return tensors[0], tensors[1] / config.scaling_factor

    def _get_scaling(self, steps: int) -> tuple[Tensor, Tensor]:
        shift, scale = super()._get_scaling(steps)
        # Without an index tensor, so that the meta device and torch.export see plain shapes.
        extra = steps - shift.shape[2]
        if extra > 0:
            shift, scale = (torch.cat([x, x[:, :, -1:].expand(-1, -1, extra, -1, -1)], dim=2) for x in (shift, scale))
        return shift[:, :, :steps], scale[:, :, :steps]
