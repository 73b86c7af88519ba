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

import numpy as np
import torch
from torch import Tensor, nn

from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import ClipDataset, VideoClips
from vidtwin.datamodules.synthetic import Synthetic
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.models.vidtwin import VidTwin
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
    parser.add_argument("--structure-shortcut", type=int, default=0, help="its frame groups")
    parser.add_argument("--num-queries", type=int, default=4)
    parser.add_argument("--dynamics-channels", type=int, default=8)
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the Q-Former")
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--betas", type=float, nargs=2, default=(0.9, 0.99))
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


def build(variant: str, args: argparse.Namespace, seed: int) -> VidTwin:
    if variant not in VARIANTS:
        raise SystemExit(f"Expected a variant of {VARIANTS}, got {variant!r}.")

    def create(initialization: str) -> VidTwin:
        torch.manual_seed(seed)
        return VidTwin(
            num_frames=16,
            resolution=args.resolution,
            patch_size=8,
            hidden_size=128,
            depth=args.depth,
            num_heads=4,
            num_queries=args.num_queries,
            structure_channels=args.structure_channels,
            structure_downsamples=args.structure_downsamples,
            dynamics_channels=args.dynamics_channels,
            structure_width=64,
            qformer_depth=2,
            qformer_intermediate_size=256,
            qformer_dropout=args.dropout,
            initialization=initialization,  # type: ignore[arg-type]
            structure_shortcut=args.structure_shortcut,
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


def train(model: VidTwin, clips: Tensor, test: Tensor, args: argparse.Namespace, seed: int) -> dict[int, float]:
    """Train a model → PSNR (dB) of the held-out clips by step."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr, betas=tuple(args.betas), weight_decay=1e-4, eps=1e-15)

    def rate(step: int) -> float:
        cosine = 0.5 + 0.5 * math.cos(math.pi * max(0, step - args.warmup) / max(1, args.steps - args.warmup))
        return min(1, (step + 1) / args.warmup) * cosine

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    numbers = test[0, :, 0].numel()  # per frame: the released loss adds a KL per clip to errors summed over a frame
    curve = {}
    for step in range(1, args.steps + 1):
        clip = to_clip(clips[torch.randint(len(clips), (args.batch,), generator=generator)])
        output = model.train()(clip)
        loss = (output.clip - clip).abs().mean() + 1e-3 / numbers * output.regularization["kl"]
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step in (50, 100) or step % 200 == 0 or step == args.steps:
            curve[step] = evaluate(model, test)
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
