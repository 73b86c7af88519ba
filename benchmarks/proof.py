"""Overfit four real clips, then continue with a GAN for 2,000 steps: numbers, curves and a picture.

    python benchmarks/proof.py FOLDER_OF_CLIPS docs

Runs `vidtwin fit` twice with configs/proof.yaml (about half an hour on two cores), prints a table, and writes
`images/proof_{psnr,gan}.png` and `images/proof_clips.png` under the second folder. Exits with 1 if the PSNR stays below
27 dB or a logged value is not finite.
"""

import argparse
import math
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml
from experiments import data_options, fit, link_clips, plot, read_curves

from vidtwin.datamodules.folder import VideoFolder
from vidtwin.storage import checkpoints
from vidtwin.video import convert, panels

WANTED = 27.0  # dB
GAN = ["--model.loss.adversarial_weight", "0.05", "--model.loss.adversarial_start", "0"]
GAN += ["--model.loss.discriminator", "vidtwin.losses.PatchDiscriminator2d"]
GAN += ["--model.loss.discriminator.channels", "16", "--model.loss.discriminator.num_layers", "2"]
GAN += ["--model.loss.adversarial_frames", "8"]
GAN += ["--model.optimizer.init_args.lr", "5e-4", "--model.discriminator_optimizer", "torch.optim.AdamW"]
GAN += ["--model.discriminator_optimizer.lr", "2e-4", "--model.discriminator_optimizer.betas", "[0.5,0.9]"]
GAN += ["--model.discriminator_scheduler.warmup_steps", "50", "--trainer.max_steps", "2000"]


def draw_clips(out: Path, clips: Path) -> None:
    """Draw three rows per clip: input, after the first run, after the GAN."""
    config = yaml.safe_load(Path("configs/proof.yaml").read_text())["data"]["init_args"]
    data = VideoFolder(**config | {"root": str(clips), "num_workers": 0})
    data.setup("validate")
    clip = data.on_after_batch_transfer(next(iter(data.val_dataloader())), 0)["clip"]
    models = {
        run: checkpoints.load_autoencoder(Path("runs") / run / "checkpoints/last.ckpt")
        for run in ("proof", "proof_gan")
    }
    with torch.no_grad():
        rows = {"input": clip, "L1 and KL": models["proof"](clip).clip, "with GAN": models["proof_gan"](clip).clip}
    stills = [
        panels.filmstrip({name: convert.to_uint8(clips[index]) for name, clips in rows.items()}, num_frames=4)
        for index in range(len(clip))
    ]
    out.write_bytes(panels.png(torch.cat([torch.from_numpy(still) for still in stills]).numpy()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", type=Path)
    parser.add_argument("docs", type=Path)
    arguments = parser.parse_args()
    images = arguments.docs / "images"
    images.mkdir(parents=True, exist_ok=True)
    clips = link_clips(arguments.clips)
    data = data_options(clips)
    fit("proof", "configs/proof.yaml", *data)
    last = Path("runs/proof/checkpoints/last.ckpt")
    fit("proof_gan", "configs/proof.yaml", *data, "--init_from", str(last), *GAN)
    (plain, minutes), (gan, gan_minutes) = read_curves("proof"), read_curves("proof_gan")
    values = [value for logged in (plain, gan) for points in logged.values() for _, value in points]
    skipped = max(value for logged in (plain, gan) for _, value in logged["train/skipped"])
    finite = all(math.isfinite(value) for value in values) and skipped == 0
    reached = plain["val/psnr"][-1][1]
    passed = next((step for step, value in plain["val/psnr"] if value >= WANTED), None)

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    plot(
        axes,
        plain,
        {"val/psnr": "full", "val/psnr/structure_only": "structure only", "val/psnr/dynamics_only": "dynamics only"},
        "PSNR (dB)",
    )
    axes.axhline(WANTED, color="gray", linestyle=":")
    figure.savefig(images / "proof_psnr.png", dpi=110)
    figure, grid = plt.subplots(2, 3, figsize=(12, 6), layout="constrained")
    logits = {"discriminator/logits_real": "real", "discriminator/logits_fake": "reconstructed"}
    plot(grid[0, 0], gan, logits, "mean logit")
    shares = {"discriminator/accuracy": "discriminator's accuracy", "train/skipped": "steps skipped"}
    plot(grid[0, 1], gan, shares, "share")
    plot(grid[0, 2], gan, {"train/adversarial": "generator", "discriminator/loss": "discriminator"}, "adversarial loss")
    plot(grid[1, 0], gan, {"train/adaptive_weight": "adaptive weight"}, "")
    plot(
        grid[1, 1], gan, {"train/gradient_norm": "autoencoder", "discriminator/gradient_norm": "discriminator"}, "norm"
    )
    for axes in grid[1, :2]:
        axes.set_yscale("log")
    plot(grid[1, 2], gan, {"val/psnr": "validation"}, "PSNR (dB)")
    figure.savefig(images / "proof_gan.png", dpi=110)
    draw_clips(images / "proof_clips.png", clips)

    def summarize(tag: str) -> str:
        points = [value for _, value in gan[tag]]
        return f"{points[0]:.4g} first, {min(points):.4g} to {max(points):.4g}, {points[-1]:.4g} last"

    steps, more = plain["val/psnr"][-1][0], gan["val/psnr"][-1][0]
    print(f"without GAN: {reached:.2f} dB after {steps} steps, {minutes:.1f} minutes; 27 dB by step {passed}")
    print(f"with GAN:    {gan['val/psnr'][-1][1]:.2f} dB after {more} more steps, {gan_minutes:.1f} minutes")
    print(f"all {len(values)} logged numbers finite and no step skipped: {finite}")
    for tag in (
        "discriminator/logits_real",
        "discriminator/logits_fake",
        "discriminator/accuracy",
        "train/adversarial",
        "train/adaptive_weight",
        "discriminator/gradient_norm",
        "train/skipped",
    ):
        print(f"  {tag}: {summarize(tag)}")
    return 0 if reached >= WANTED and finite else 1


if __name__ == "__main__":
    sys.exit(main())
