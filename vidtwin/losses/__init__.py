"""Training losses of autoencoders and discriminators."""

from vidtwin.losses.autoencoder import Annealed, AutoencoderLoss
from vidtwin.losses.discriminator import (
    BlurPoolDiscriminator3d,
    PatchDiscriminator2d,
    PatchDiscriminator3d,
    SpectralDiscriminator2d,
)
from vidtwin.losses.perceptual import LPIPS

__all__ = [
    "LPIPS",
    "Annealed",
    "AutoencoderLoss",
    "BlurPoolDiscriminator3d",
    "PatchDiscriminator2d",
    "PatchDiscriminator3d",
    "SpectralDiscriminator2d",
]
