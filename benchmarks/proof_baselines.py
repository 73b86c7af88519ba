"""Overfit four real clips with each tiny baseline: PSNR by step, beside that of the temporal mean.

    python benchmarks/proof_baselines.py FOLDER_OF_CLIPS docs

Runs `vidtwin fit` with each configs/baselines/*_tiny.yaml on the clips, resumes interrupted trainings (`runs/proof_*`),
prints the last values and writes `images/proof_baselines.png` (curves) and `images/proof_baselines_clips.png` (input
and reconstructions) under the second folder. Exits with 1 if a model does not beat the temporal mean of the same clips.
"""

import argparse
import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from experiments import data_options, fit, link_clips, read_curves

from vidtwin import plugins
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.metrics.frames import psnr
from vidtwin.storage import checkpoints
from vidtwin.video import convert, panels

MODELS = {"MAGVIT-v2": "magvit2", "CMD": "cmd", "iVideoGPT": "ivideogpt"}


def train(name: str, options: list[str], arguments: argparse.Namespace) -> None:
    cores = max(1, (os.cpu_count() or 1) // arguments.jobs)
    # The class of the data must precede its options.
    options = ["--data", "vidtwin.datamodules.folder.VideoFolder", *options, "--data.augment", "false"]
    options += ["--data.resolution", "64", "--data.batch_size", "4", "--data.num_workers", "0"]
    options += ["--trainer.max_steps", str(arguments.steps), "--trainer.val_check_interval", str(arguments.steps // 10)]
    env = os.environ | {"OMP_NUM_THREADS": str(cores)}
    fit(f"proof_{name}", f"configs/baselines/{name}_tiny.yaml", *options, env=env, quiet=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("docs", type=Path)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--jobs", type=int, default=2, help="parallel trainings, which share the cores")
    arguments = parser.parse_args()
    folder = link_clips(arguments.clips)
    options = data_options(folder)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(lambda name: train(name, options, arguments), MODELS.values()))

    splits = {"train": "train", "val": "val"}
    data = VideoFolder(str(folder), splits=splits, resolution=64, batch_size=4, num_workers=0, augment=False)
    data.setup("validate")
    clip = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)["clip"]
    means = {}
    for short in ("temporal_mean", "mean_colour"):
        reference = plugins.load(short, "vidtwin.references")(clip.shape[2], clip.shape[3]).eval()
        means[short] = float(psnr(reference(clip).clip, clip).mean())

    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    views, beaten = {"input": clip}, True
    for label, name in MODELS.items():
        logged, minutes = read_curves(f"proof_{name}")
        points = logged["val/psnr"]
        axes.plot(*zip(*points, strict=True), marker=".", label=label)
        model = checkpoints.load_autoencoder(Path("runs") / f"proof_{name}" / "checkpoints/last.ckpt")
        with torch.no_grad():
            views[label] = model(clip).clip
        rate, bits = model.compression_rate(clip.shape[1:]), model.bits_per_pixel(clip.shape[1:])
        more = "" if bits is None else f", {bits:.4f} bits/pixel"
        print(f"{label}: {points[-1][1]:.2f} dB after {points[-1][0]} steps, {minutes:.1f} minutes, {rate:.2%}{more}")
        beaten = beaten and points[-1][1] > means["temporal_mean"]
    for (short, value), style in zip(means.items(), ("--", ":"), strict=True):
        axes.axhline(value, color="gray", linestyle=style, label=f"{short.replace('_', ' ')}: {value:.2f} dB")
        print(f"{short}: {value:.2f} dB")
    axes.set(xlabel="steps", ylabel="PSNR of the four clips (dB)")
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)
    images = arguments.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    figure.savefig(images / "proof_baselines.png", dpi=110)
    stills = [
        panels.filmstrip({name: convert.to_uint8(clips[index]) for name, clips in views.items()}, num_frames=4)
        for index in range(len(clip))
    ]
    (images / "proof_baselines_clips.png").write_bytes(panels.png(torch.cat([*map(torch.from_numpy, stills)]).numpy()))
    return 0 if beaten else 1


if __name__ == "__main__":
    sys.exit(main())
