"""Print what the perceptual networks of packages say of four photos: the table in docs/weights.md.

    python benchmarks/perceptual_networks.py

The photos come with scikit-image: the central squares, resized bicubically to 224 px. A number behind blur and
noise is the standard deviation, in pixels and in values of [-1, 1]; noise is drawn with seed 0.
"""

import numpy as np
import skimage
import torch
from PIL import Image
from scipy.ndimage import gaussian_filter
from torch import Tensor

from vidtwin.losses import STLPIPS, EfficientNetDistance


def load_photos() -> Tensor:
    """Load four photos (4, 3, 224, 224) in [-1, 1]."""
    pictures = []
    for name in ("astronaut", "chelsea", "coffee", "rocket"):
        picture = Image.fromarray(getattr(skimage.data, name)())
        side = min(picture.size)
        left, top = ((length - side) // 2 for length in picture.size)
        square = picture.crop((left, top, left + side, top + side))
        pictures.append(np.asarray(square.resize((224, 224), Image.Resampling.BICUBIC)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def change(photos: Tensor) -> dict[str, Tensor]:
    """Make the changed photos by the table's words."""

    def blur(sigma: float) -> Tensor:
        return torch.from_numpy(gaussian_filter(photos.numpy(), (0, 0, sigma, sigma)))

    def add_noise(sigma: float) -> Tensor:
        return photos + sigma * torch.randn(photos.shape, generator=torch.Generator().manual_seed(0))

    return {
        **{f"blur {sigma:g}": blur(sigma) for sigma in (0.7, 1.5, 3.0)},
        **{f"noise {sigma:g}": add_noise(sigma) for sigma in (0.05, 0.1, 0.2)},
        "shift by 1 px": photos.roll(1, 3),
        "mean colour": photos.mean((2, 3), keepdim=True).expand_as(photos),
    }


@torch.inference_mode()
def main() -> None:
    distances = {
        "ST-LPIPS (vgg)": STLPIPS("vgg"),
        "ST-LPIPS (alex)": STLPIPS("alex"),
        "EfficientNet-Lite0": EfficientNetDistance(),
    }
    for distance in distances.values():
        distance.load(download=False)
    photos = load_photos()
    print(f"| | PSNR (dB) | {' | '.join(distances)} | Lite0 / ST-LPIPS (vgg) |")
    print(f"|{' --- |' * (len(distances) + 3)}")
    for title, frames in change(photos).items():
        errors = ((frames - photos) / 2).square().mean((1, 2, 3))
        vgg, alex, lite = (distance(frames, photos).mean().item() for distance in distances.values())
        decibels = -10 * errors.log10().mean().item()
        print(f"| {title} | {decibels:.1f} | {vgg:.3f} | {alex:.3f} | {lite:.2f} | {lite / vgg:.0f} |")


if __name__ == "__main__":
    main()
