"""Measure how cheap each tiny autoencoder makes generation: one diffusion model on its latents, equal steps.

    python benchmarks/generation_cost.py                    clips of 16 frames of 64 px
    python benchmarks/generation_cost.py --device cuda --batch 64
    python benchmarks/generation_cost.py --generated VidTwin=generated CMD=generated_cmd

The transformer has four layers of width 128 and the paper's patches of 2, for all, and runs on the latents of untrained
autoencoders, whose cost does not depend on their weights. FLOPs count a multiply-add as two: a training step is a
forward and a backward pass on one clip, a sample is all steps of sampling with guidance (two passes each) without the
decoder. Seconds are CPU time of this process on a CPU, which other processes change little, and wall time on a GPU:
medians of some passes. The quality is of chains that were trained: gFVD by `vidtwin score`, the distance by
benchmarks/generated.py, both read from the folder of the generated videos; "-" without one.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from experiments import as_markdown
from generated import COMPARISON
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.benchmark.generation import SCORE
from vidtwin.cli import model_config
from vidtwin.diffusion.model import LatentDiffusion, draw_noise
from vidtwin.diffusion.process import RectifiedFlow
from vidtwin.diffusion.transformer import TransformerSizes

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
MODELS = {
    "VidTwin": "demo",
    "MAGVIT-v2": "baselines/magvit2_tiny",
    "CMD": "baselines/cmd_tiny",
    "iVideoGPT": "baselines/ivideogpt_tiny",
}
HEADER = [
    "Autoencoder",
    "Numbers",
    "Tokens",
    "Training step",
    "Seconds",
    "Sample",
    "Denoised/s",
    "Decoded/s",
    "Generated/s",
    "gFVD",
    "Distance",
]
CLIP = (3, 16, 64, 64)
SIZES = TransformerSizes(depth=4, width=128, heads=4, class_width=64)
SAMPLING_STEPS = 50


def seconds(step: Callable[[], object], device: torch.device, repeats: int) -> float:
    """Return the median time of a step after one that is not counted."""
    clock = time.process_time if device.type == "cpu" else time.perf_counter
    times = []
    for _ in range(repeats + 1):
        if device.type == "cuda":
            torch.cuda.synchronize()
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return statistics.median(times[1:])


def flops(model: LatentDiffusion) -> tuple[int, int]:
    """Count the operations of a forward pass, and of a training step, on one clip."""
    state, label = torch.zeros(1, model.numbers), torch.tensor([0])
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(state, label).mean()
        forward = counter.get_total_flops()
        loss.backward()
    return forward, counter.get_total_flops()


def measure(name: str, arguments: argparse.Namespace) -> list[str]:
    device = torch.device(arguments.device)
    torch.manual_seed(0)
    autoencoder = model_config.read(str(CONFIGS / f"{MODELS[name]}.yaml"))[1]().eval().requires_grad_(False)
    shapes = autoencoder.latent_shapes(CLIP)
    model = LatentDiffusion(shapes, 101, RectifiedFlow(), SIZES)
    forward, training = flops(model)
    autoencoder.to(device)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters())
    state = torch.randn(arguments.batch, model.numbers, device=device)
    labels = torch.zeros(arguments.batch, dtype=torch.int64, device=device)

    def train() -> None:
        optimizer.zero_grad()
        model(state, labels, 0.2).mean().backward()
        optimizer.step()

    noise = draw_noise(model.numbers, [(0, place) for place in range(arguments.batch)]).to(device)

    def sample() -> dict[str, torch.Tensor]:
        return model.sample(labels, noise, 2.0, arguments.steps)

    step = seconds(train, device, arguments.repeats)
    sampling = seconds(sample, device, 1 if device.type == "cpu" else arguments.repeats)
    latents = sample()
    with torch.no_grad():
        decoding = seconds(lambda: autoencoder.decode(latents, CLIP[1]), device, arguments.repeats)
    passes = 2 * SAMPLING_STEPS
    whole = sampling * SAMPLING_STEPS / arguments.steps  # each step costs the same
    print(f"{name}: {step:.3g} s a training step", flush=True)
    return [
        name,
        f"{model.numbers:,}",
        f"{model.transformer.tokens.total:,}",
        f"{training / 1e9:.2f} GFLOP",
        f"{step:.3g}",
        f"{passes * forward / 1e9:,.0f} GFLOP",
        f"{arguments.batch / whole:.3g}",
        f"{arguments.batch / decoding:.3g}",
        f"{arguments.batch / (whole + decoding):.3g}",
        *quality(arguments.generated.get(name)),
    ]


def quality(folder: Path | None) -> list[str]:
    """Read gFVD and the distance by EfficientNet-Lite0 of a folder of generated videos."""
    if folder is None:
        return ["-", "-"]
    gfvd: Any = "-"
    if (path := folder / SCORE).exists():
        gfvd = json.loads(path.read_text())["gfvd"]
        gfvd = gfvd if isinstance(gfvd, str) else f"{gfvd['value']:.1f}"
    path = folder / COMPARISON
    return [gfvd, f"{json.loads(path.read_text())['frechet_distance']:.2f}" if path.exists() else "-"]


def read_folders(texts: list[str]) -> dict[str, Path]:
    """Split NAME=FOLDER of each generated folder."""
    found = {}
    for text in texts:
        name, given, folder = text.partition("=")
        if not given or name not in MODELS or not Path(folder).is_dir():
            raise SystemExit(f"Expected NAME=FOLDER with a name of {', '.join(MODELS)}, got {text}.")
        found[name] = Path(folder)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--batch", type=int, default=8, help="clips per step")
    parser.add_argument("--repeats", type=int, default=3, help="timed passes")
    parser.add_argument(
        "--steps", type=int, default=5, help="timed steps of sampling, of which the whole is a multiple"
    )
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--generated", nargs="+", default=[], metavar="NAME=FOLDER", help="folders of generated videos")
    arguments = parser.parse_args()
    arguments.generated = read_folders(arguments.generated)
    rows = [measure(name, arguments) for name in arguments.models]
    print(as_markdown(HEADER, rows))
    print(f"\n{arguments.batch} clips a step, {torch.get_num_threads()} threads.")


if __name__ == "__main__":
    main()
