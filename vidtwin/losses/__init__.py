"""What autoencoders and discriminators are trained on."""

from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.discriminator import PatchDiscriminator2d, PatchDiscriminator3d
from vidtwin.losses.perceptual import LPIPS

__all__ = ["LPIPS", "AutoencoderLoss", "PatchDiscriminator2d", "PatchDiscriminator3d"]
