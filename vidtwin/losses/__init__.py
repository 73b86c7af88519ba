"""Training losses of autoencoders and discriminators."""

from vidtwin.losses.autoencoder import Annealed, AutoencoderLoss
from vidtwin.losses.discriminator import (
    BlurPoolDiscriminator3d,
    PatchDiscriminator2d,
    PatchDiscriminator3d,
    SpectralDiscriminator2d,
)
from vidtwin.losses.efficientnet import EfficientNetDistance
from vidtwin.losses.perceptual import LPIPS
from vidtwin.losses.st_lpips import STLPIPS

__all__ = [
    "LPIPS",
    "STLPIPS",
    "Annealed",
    "AutoencoderLoss",
    "BlurPoolDiscriminator3d",
    "EfficientNetDistance",
    "PatchDiscriminator2d",
    "PatchDiscriminator3d",
    "SpectralDiscriminator2d",
]
