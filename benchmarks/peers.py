"""Measure how far steps that no preset repeats, or that a setting chooses, move PSNR: the figures in docs/benchmark.md.

    python benchmarks/peers.py ../shared/data/clips

Each video's first frames are read at 224 and 256 px by torchvision's filter after decord's colours, in floats, as the
code of VidTok and WF-VAE does; videos in subfolders are left out. The autoencoder is a mean over blocks of 2x2 or 4x4
pixels, repeated. Each line of the table is the range, over videos and blocks, of PSNR here minus PSNR by the peer's
step, and its mean:

    area        data.resize: area in the place of bilinear, both in 8 bits
    filter      the area filter alone: after the same colours, of videos whose pixels are square
    8 bits      pixels rounded to 8 bits after they are resized
    square      videos whose pixels are not square shown square, which the peers leave as they are
    truncation  both sides rounded to 8 bits before they are written by mp4v, which the peer truncates
    bf16        clip and reconstruction in single precision, which the peer has in bf16
    crop        clips cropped before the autoencoder; without --crop_size the peer crops whole reconstructions
"""

import argparse
import itertools
import sys
from collections.abc import Callable
from pathlib import Path

import av
import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import v2

from vidtwin.video import VIDEO_SUFFIXES, VideoError, read_clip
from vidtwin.video.writing import write_and_read

SIZES, BLOCKS = (224, 256), (2, 4)
STEPS = ("area", "filter", "8 bits", "square", "truncation", "bf16", "crop")


def pool(clip: Tensor, block: int) -> Tensor:
    """Replace blocks of (T, 3, H, W) by their means; what is left of a block at right and bottom is cut off."""
    height, width = (side // block * block for side in clip.shape[2:])
    means = torch.nn.functional.avg_pool2d(clip[..., :height, :width], block)
    return means.repeat_interleave(block, 2).repeat_interleave(block, 3)


def psnr(target: Tensor, found: Tensor) -> float:
    """Return the mean PSNR of frames (T, 3, H, W) in [0, 1]."""
    errors = (target.double() - found.double()).square().mean((1, 2, 3))
    return float(-10 * (errors + 1e-8).log10().mean())


def as_tensor(frames: np.ndarray) -> Tensor:
    """Make uint8 (T, H, W, 3) a tensor (T, 3, H, W) in [0, 1]."""
    return torch.from_numpy(frames).permute(0, 3, 1, 2).float() / 255


def write(clip: Tensor, to_integer: Callable[[Tensor], Tensor]) -> Tensor:
    """Write a clip in [0, 1] as mp4v and read it back."""
    frames = to_integer(clip * 255).clamp(0, 255).byte().permute(0, 2, 3, 1).contiguous().numpy()
    return as_tensor(write_and_read(frames, "mp4v", 24))


def measure(path: Path, count: int, size: int, block: int) -> dict[str, float]:
    """Measure the differences in dB of one video."""
    with av.open(str(path)) as container:
        decoded = itertools.islice(container.decode(video=0), count)
        aspect = container.streams.video[0].sample_aspect_ratio
        whole = as_tensor(np.stack([frame.to_ndarray(format="rgb24") for frame in decoded]))
    square = v2.CenterCrop(size)
    wide = v2.functional.resize(whole, [size], antialias=True).clamp(0, 1)
    clip = square(wide)
    peer = psnr(clip, pool(clip, block))
    ours = as_tensor(read_clip(path, 0, len(whole), size=size, resize="bilinear"))
    area = as_tensor(read_clip(path, 0, len(whole), size=size, resize="area"))
    # The colours of `area`, which shares no chroma among neighbours, under torchvision's filter.
    colours = as_tensor(read_clip(path, 0, len(whole)))
    same = (square(v2.functional.resize(colours, [size], antialias=True)) * 255).round().clamp(0, 255) / 255
    half = (2 * clip - 1).bfloat16()
    back = ((pool(half.float(), block).bfloat16().float() + 1) / 2, (half.float() + 1) / 2)
    cropped = square(wide[..., : wide.shape[2] // block * block, : wide.shape[3] // block * block])
    files = [psnr(write(clip, rule), write(pool(clip, block), rule)) for rule in (torch.floor, torch.round)]
    rounded = (clip * 255).round() / 255
    shown = (
        {"filter": psnr(area, pool(area, block)) - psnr(same, pool(same, block))}
        if aspect in (None, 1)
        else {"square": psnr(ours, pool(ours, block)) - psnr(rounded, pool(rounded, block))}
    )
    return shown | {
        "area": psnr(area, pool(area, block)) - psnr(ours, pool(ours, block)),
        "8 bits": psnr(rounded, pool(rounded, block)) - peer,
        "truncation": files[1] - files[0],
        "bf16": peer - psnr(*back),
        "crop": psnr(cropped, pool(cropped, block)) - psnr(cropped, square(pool(wide, block))),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", type=Path)
    parser.add_argument("--num_frames", type=int, default=4, help="frames a video (default: %(default)s)")
    args = parser.parse_args()
    found: list[dict[str, float]] = []
    used = set()
    for path in sorted(path for path in args.root.iterdir() if path.suffix.lower() in VIDEO_SUFFIXES):
        for size, block in itertools.product(SIZES, BLOCKS):
            try:
                found.append(measure(path, args.num_frames, size, block))
                used.add(path)
            except (VideoError, OSError, ValueError) as error:
                print(f"{path.name} is left out: {error}", file=sys.stderr)
                break
    print(f"{len(used)} videos, {args.num_frames} frames each, {SIZES} px, means over blocks of {BLOCKS} px:\n")
    print("| step | least (dB) | most (dB) | mean (dB) |\n|---|---:|---:|---:|")
    for step in STEPS:
        values = [each[step] for each in found if step in each]
        if not values:
            continue
        print(f"| {step} | {min(values):+.3f} | {max(values):+.3f} | {np.mean(values):+.3f} |")


if __name__ == "__main__":
    main()
