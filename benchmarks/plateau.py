"""Measure how fast VidTwin learns from scratch under different initializations (docs/training_from_scratch.md).

    python benchmarks/plateau.py path/to/UCF-101 --variants balanced released
    python benchmarks/plateau.py synthetic --variants balanced --steps 600

Trains with L1 and KL only, on clips in memory (UCF-101's layout, or "synthetic"), and prints one row per variant: PSNR
of the test clips by step, beside that of the clips' mean colour and temporal mean.
"""

import argparse
import math
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import ClipDataset, VideoClips
from vidtwin.datamodules.synthetic import Synthetic
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.models.vidtwin import VidTwin
from vidtwin.training.callbacks.ema import WeightAverage
from vidtwin.video.convert import to_clip

# "balanced" with one part at its released initialization: patterns of the tensors to replace.
ABLATIONS = {
    "Q-Former as released": r"structure\.qformer\..*",
    "frames mix queries at random": r"structure\.to_frames\..*",
    "dynamics branch as released": r"dynamics\.(?!head).*",
}


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("clips", help='folder in UCF-101\'s layout, or "synthetic"')
    parser.add_argument("--variants", nargs="+", default=["released", "balanced"], help=f"also: {', '.join(VARIANTS)}")
    parser.add_argument("--resolution", type=int, default=32)
    parser.add_argument("--structure-downsamples", type=int, default=0)
    parser.add_argument("--structure-channels", type=int, default=8)
    parser.add_argument("--num-queries", type=int, default=4)
    parser.add_argument("--dynamics-channels", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--width", type=int, default=128, help="of encoder and decoder; a head per 32 channels")
    parser.add_argument("--dropout", type=float, default=0.0, help="of the Q-Former")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.99))
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="muon: of the matrices")
    parser.add_argument("--schedule", choices=("cosine", "wsd"), default="cosine", help="wsd cools in the last 40%%")
    parser.add_argument("--ema", type=float, default=0.0, help="decay of the averaged weights that are measured")
    parser.add_argument("--pixel", choices=("l1", "l2"), default="l1")
    parser.add_argument("--kl", type=float, default=1e-3, help="weight of the KL, as the released loss counts it")
    parser.add_argument("--mask", type=float, default=0.0, help="share of clips with half of a latent at 0")
    parser.add_argument("--decoder-from", type=int, help="step from which the decoder alone is trained")
    parser.add_argument("--warmup", type=int, default=50)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs-in-memory", type=int, default=6, help="random crops and starts per training video")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args(argv)


def load(source: str, resolution: int, epochs: int, split: str = "test") -> tuple[Tensor, Tensor]:
    """Load training clips and those of a held-out split, "val" or "test", uint8 (N, T, H, W, 3).

    The validation clips of a folder are group 10 of its train list, which is training data if the test clips are held
    out.
    """
    training: ClipDataset
    if source == "synthetic":
        synthetic = Synthetic(num_train=100, resolution=resolution)
        training, held_out = synthetic.dataset("train"), synthetic.dataset(split)
    else:
        data = UCF101(source, val_groups=(10,), resolution=resolution)
        videos = data.videos("train") + (data.videos("val") if split == "test" else [])
        training = VideoClips(videos, ClipSettings(16, resolution, 8.0), "train")
        held_out = data.dataset(split)
    clips = [training.clip(epoch, index)["clip"] for epoch in range(epochs) for index in range(len(training))]
    evaluation = [held_out.clip(0, index)["clip"] for index in range(len(held_out))]
    return torch.from_numpy(np.stack(clips)), torch.from_numpy(np.stack(evaluation))


def psnr(clips: Tensor, targets: Tensor) -> float:
    """Compute the PSNR (dB) per frame on [0, 1] and average over the frames."""
    error = ((clips.clamp(-1, 1) - targets) / 2).square().mean((1, 3, 4))
    return float((-10 * torch.log10(error + 1e-8)).mean())


@torch.no_grad()
def spread_kernels(model: VidTwin) -> None:
    """Draw all nine taps of each kernel of the structure branch at random, with the variance of the local ones."""
    for module in model.structure.modules():
        if isinstance(module, nn.Conv2d):
            rows = module.weight.flatten(1).any(1)  # rows of the log-variance stay 0
            std = module.weight[rows].square().mean().sqrt()
            module.weight[rows] = torch.randn_like(module.weight[rows]) * std


@torch.no_grad()
def reset_log_variance(model: VidTwin) -> None:
    """Set the standard deviation of both latents' noise to 1."""
    for branch in (model.structure, model.dynamics):
        branch.head.bias[branch.head.out_channels // 2 :] = 0


VARIANTS = ["released", "balanced", "kernels spread", "log-variance 0", *ABLATIONS]


def build(variant: str, args: argparse.Namespace, seed: int, **arguments: Any) -> VidTwin:
    """Build a model with a variant of initial values; `arguments` of VidTwin replace those of the options."""
    if variant not in VARIANTS:
        raise SystemExit(f"Expected a variant of {VARIANTS}, got {variant!r}.")

    def create(initialization: str) -> VidTwin:
        torch.manual_seed(seed)
        return VidTwin(
            num_frames=16,
            resolution=args.resolution,
            patch_size=8,
            hidden_size=args.width,
            depth=args.depth,
            num_heads=args.width // 32,
            num_queries=args.num_queries,
            structure_channels=args.structure_channels,
            structure_downsamples=args.structure_downsamples,
            dynamics_channels=args.dynamics_channels,
            structure_width=64,
            qformer_depth=2,
            qformer_intermediate_size=256,
            qformer_dropout=args.dropout,
            **{"initialization": initialization, **arguments},  # type: ignore[arg-type]
        )

    built = create("released" if variant == "released" else "balanced")
    if variant in ABLATIONS:
        released = create("released").state_dict()
        part = {name: value for name, value in released.items() if re.fullmatch(ABLATIONS[variant], name)}
        built.load_state_dict(part, strict=False)
    if variant == "kernels spread":
        spread_kernels(built)
    if variant == "log-variance 0":
        reset_log_variance(built)
    return built


@torch.no_grad()
def evaluate(model: VidTwin, clips: Tensor) -> float:
    model.eval()
    value = psnr(torch.cat([model(part).clip for part in clips.split(8)]), clips)
    model.train()
    return value


def create_optimizers(model: VidTwin, args: argparse.Namespace) -> list[torch.optim.Optimizer]:
    """Create AdamW, or Muon for the matrices of blocks and branches and AdamW for the others."""
    matrices = []
    if args.optimizer == "muon":
        outer = (model.encoder.patch_embed.weight, model.decoder.linear.weight)
        matrices = [
            weight
            for name, weight in model.named_parameters()
            if weight.ndim == 2 and not name.endswith("modulation") and not any(weight is layer for layer in outer)
        ]
    chosen = set(matrices)
    others = [weight for weight in model.parameters() if weight not in chosen]
    adamw = torch.optim.AdamW(others, lr=args.lr, betas=tuple(args.betas), weight_decay=1e-4, eps=1e-15)
    if not matrices:
        return [adamw]
    return [adamw, torch.optim.Muon(matrices, lr=args.lr, weight_decay=1e-4, adjust_lr_fn="match_rms_adamw")]


def reconstruct(model: VidTwin, clip: Tensor, mask: float) -> tuple[Tensor, Tensor]:
    """Reconstruct clips from sampled latents → clips, KL.

    Args:
        model: The model.
        clip: (B, 3, T, H, W).
        mask: Share of each latent's clips in which half of its numbers are set to 0.
    """
    encoding = model.encode(clip)
    latents = encoding.sample()
    if mask:
        for name, latent in latents.items():
            ones = [1] * (latent.ndim - 1)
            masked = (torch.rand(len(latent), *ones) < mask) & (torch.rand_like(latent) < 0.5)
            latents[name] = latent.masked_fill(masked, 0.0)
    return model.decode(latents), encoding.regularization()["kl"]


def freeze_encoder(model: VidTwin) -> None:
    """Freeze what makes the latents, as configs/stages/decoder.yaml does."""
    for name in yaml.safe_load(Path("configs/stages/decoder.yaml").read_text())["model"]["freeze"]:
        model.get_submodule(name).requires_grad_(False)


def train(model: VidTwin, clips: Tensor, test: Tensor, args: argparse.Namespace, seed: int) -> dict[int, float]:
    """Train a model → PSNR (dB) of the held-out clips by step. The model ends with its averaged weights, if any."""
    generator = torch.Generator().manual_seed(seed)
    optimizers = create_optimizers(model, args)

    def rate(step: int) -> float:
        warm = min(1, (step + 1) / args.warmup)
        if args.schedule == "wsd":
            return warm * min(1, (args.steps - step) / (0.4 * args.steps))
        return warm * (0.5 + 0.5 * math.cos(math.pi * max(0, step - args.warmup) / max(1, args.steps - args.warmup)))

    schedules = [torch.optim.lr_scheduler.LambdaLR(optimizer, rate) for optimizer in optimizers]
    numbers = test[0, :, 0].numel()  # per frame: the released loss adds a KL per clip to errors summed over a frame
    average = WeightAverage(model, args.ema) if args.ema else None
    curve = {}
    for step in range(1, args.steps + 1):
        clip = to_clip(clips[torch.randint(len(clips), (args.batch,), generator=generator)])
        if step == args.decoder_from:
            freeze_encoder(model)
        output, kl = reconstruct(model.train(), clip, args.mask)
        error = output - clip
        pixel = error.abs().mean() if args.pixel == "l1" else error.square().mean()
        loss = pixel + args.kl / numbers * kl
        model.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for part in (*optimizers, *schedules):
            part.step()
        if average:
            average.update(model)
        if step in (10, 25, 50, 75) or step % 100 == 0 or step == args.steps:
            if average:
                average.exchange(model)
            curve[step] = evaluate(model, test)
            if average and step < args.steps:
                average.exchange(model)
    return curve


def main(argv: list[str]) -> None:
    args = parse(argv)
    clips, held_out = load(args.clips, args.resolution, args.epochs_in_memory)
    test = to_clip(held_out)
    mean_colour = psnr(test.mean((2, 3, 4), keepdim=True).expand_as(test), test)
    temporal_mean = psnr(test.mean(2, keepdim=True).expand_as(test), test)
    name = Path(args.clips).name
    write = sys.stdout.write
    write(f"{name}: {len(clips)} training, {len(test)} test clips at {args.resolution} px; ")
    write(f"mean colour {mean_colour:.2f} dB, temporal mean {temporal_mean:.2f} dB\n")
    for variant in args.variants:
        for seed in args.seeds:
            model = build(variant, args, seed)
            curve = train(model, clips, test, args, seed)
            steps = ", ".join(f"{value:.2f} at {step}" for step, value in curve.items())
            percent = 100 * model.compression_rate((3, 16, args.resolution, args.resolution))
            write(f"{variant}, seed {seed}, rate {percent:.2f}%: {steps}\n")
            sys.stdout.flush()


if __name__ == "__main__":
    main(sys.argv[1:])
