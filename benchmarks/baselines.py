"""Compare the tiny models: same clips and steps, similar sizes, learning rates from one grid, three seeds.

    python benchmarks/baselines.py docs -- --data.root PATH/TO/UCF-101 --data.val_groups '[10]'

Trains each model once with every rate of the grid, selects the rate with the highest PSNR in the last validation,
trains two more seeds with it, and evaluates all three on the test clips. All runs see the same clips in the same order:
the seed of the data is fixed; `--seed_everything` changes initial weights and noise. Arguments after `--` are passed
to every command. Writes `images/baselines_psnr.png` under the folder and prints the table and every run. An interrupted
comparison resumes (`runs/baselines_<steps>`). Training steps are timed at the end, when nothing else runs.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from experiments import as_markdown, fit, read_curves

from vidtwin.benchmark.cost import flops
from vidtwin.storage import checkpoints

MODELS = {
    "VidTwin": "configs/demo.yaml",
    "MAGVIT-v2": "configs/baselines/magvit2_tiny.yaml",
    "CMD": "configs/baselines/cmd_tiny.yaml",
    "iVideoGPT": "configs/baselines/ivideogpt_tiny.yaml",
}
CLIP = (3, 16, 64, 64)
BATCH = 4
FOLDER = Path("runs/baselines")


def run_name(model: str, rate: float, seed: int) -> str:
    """Return the name of a run, its path below `runs`."""
    return f"{FOLDER.name}/{model}-{rate:g}-{seed}"


def checkpoint(model: str, rate: float, seed: int) -> Path:
    """Return the path of a run's last checkpoint."""
    return Path("runs") / run_name(model, rate, seed) / "checkpoints/last.ckpt"


def divergence_file(model: str, rate: float, seed: int) -> Path:
    """Return the path of the file that marks a run as diverged."""
    return Path("runs") / run_name(model, rate, seed) / "diverged"


def read_validation(model: str, rate: float, seed: int) -> list[tuple[int, float]]:
    """Read the validation PSNR (dB) of a run by step."""
    return read_curves(run_name(model, rate, seed))[0].get("val/psnr", [])


def train(wanted: list[tuple[str, float, int]], arguments: argparse.Namespace) -> None:
    """Train the unfinished runs, some at a time, with the cores divided among them."""
    cores = max(1, (os.cpu_count() or 1) // arguments.jobs)
    env = os.environ | {"OMP_NUM_THREADS": str(cores)}
    interval = arguments.steps // 6

    def one(run: tuple[str, float, int]) -> None:
        points = read_validation(*run)
        if divergence_file(*run).exists() or (points and points[-1][0] + interval > arguments.steps):
            return
        model, rate, seed = run
        options = [f"--trainer.max_steps={arguments.steps}", f"--trainer.val_check_interval={interval}"]
        options += [f"--model.optimizer.init_args.lr={rate}", f"--seed_everything={seed}", *arguments.options]
        try:
            fit(run_name(*run), MODELS[model], *options, env=env, quiet=True)
        except subprocess.CalledProcessError:
            if not any((divergence_file(*run).parent / "nonfinite").glob("*")):
                raise
            divergence_file(*run).touch()  # the step guard stopped the training and logged why
            return
        print(f"{run_name(*run)}: {read_validation(*run)[-1][1]:.2f} dB on the validation clips", flush=True)

    with ThreadPoolExecutor(arguments.jobs) as pool:
        list(pool.map(one, wanted))


def evaluate(model: str, rate: float, seed: int, options: list[str]) -> dict:
    """Evaluate a run on the test clips → its results row."""
    name = f"{model}-{rate:g}-{seed}"
    path = FOLDER / "results/rows" / name / "results.json"
    if not path.exists():
        command = [sys.executable, "-m", "vidtwin", "test", "--config", MODELS[model], "--name", name]
        command += ["--ckpt_path", str(checkpoint(model, rate, seed)), "--results_dir", str(FOLDER / "results")]
        command += ["--protocol.posterior", "mode", "--protocol.weights", "last"]
        command += ["--cost", "false", "--downstream", "false", "--players", "0", "--progress", "false", *options]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return json.loads(path.read_text())


def step_seconds(path: Path, repeats: int = 10) -> list[float]:
    """Time training steps (forward, backward, AdamW) in seconds on a batch of noise, after two warm-up steps."""
    model = checkpoints.load_autoencoder(path).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    clip = torch.rand(BATCH, *CLIP) * 2 - 1
    seconds = []
    for _ in range(repeats + 2):
        began = time.perf_counter()
        result = model(clip)
        loss = (result.clip - clip).abs().mean() + sum(result.regularization.values())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - began)
    return seconds[2:]


def format_spread(values: list[float], digits: int) -> str:
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def plot_validation(out: Path, chosen: dict[str, float], seeds: list[int]) -> None:
    figure, axes = plt.subplots(figsize=(6.4, 4), layout="constrained")
    for model, rate in chosen.items():
        lines = [read_validation(model, rate, seed) for seed in seeds]
        steps = [step for step, _ in lines[0]]
        values = [[value for _, value in line] for line in lines]
        (mean,) = axes.plot(steps, [statistics.mean(at) for at in zip(*values, strict=True)], label=model)
        lowest, highest = [min(at) for at in zip(*values, strict=True)], [max(at) for at in zip(*values, strict=True)]
        axes.fill_between(steps, lowest, highest, color=mean.get_color(), alpha=0.2, linewidth=0)
    axes.set(xlabel="steps", ylabel="PSNR of validation clips (dB)")
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(out, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("docs", type=Path)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="parallel trainings")
    parser.add_argument("options", nargs="*")
    arguments = parser.parse_args()

    global FOLDER
    FOLDER = Path(f"runs/baselines_{arguments.steps}")
    first = arguments.seeds[0]
    train([(model, rate, first) for model in MODELS for rate in arguments.rates], arguments)
    scores = {
        model: {
            r: read_validation(model, r, first)[-1][1]
            for r in arguments.rates
            if not divergence_file(model, r, first).exists()
        }
        for model in MODELS
    }
    chosen = {model: max(rates, key=rates.__getitem__) for model, rates in scores.items()}
    train([(model, chosen[model], seed) for model in MODELS for seed in arguments.seeds], arguments)

    rows = []
    for model, rate in chosen.items():
        found = [evaluate(model, rate, seed, arguments.options) for seed in arguments.seeds]
        path = checkpoint(model, rate, first)
        counted, seconds = flops(checkpoints.load_autoencoder(path), CLIP), step_seconds(path)
        metrics = {key: [row["metrics"][key]["mean"] for row in found] for key in ("psnr", "ssim")}
        bits = found[0]["bits_per_pixel"]
        rows.append(
            [
                model,
                f"{found[0]['parameters']:,}",
                f"{100 * found[0]['compression_rate']:.3f}",
                "" if bits is None else f"{bits:.4f}",
                f"{rate:g}",
                format_spread(metrics["psnr"], 2),
                format_spread(metrics["ssim"], 3),
                f"{counted['encode'] / 1e9:.2f} + {counted['decode'] / 1e9:.2f}",
                f"{statistics.median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})",
            ]
        )
    references = [json.loads(path.read_text()) for path in sorted((FOLDER / "results/rows").glob("*_*/results.json"))]
    for row in references:
        metrics = [f"{row['metrics']['psnr']['mean']:.2f}", f"{row['metrics']['ssim']['mean']:.3f}"]
        rows.append([row["name"], "0", f"{100 * row['compression_rate']:.3f}", "", "", *metrics, "", ""])
    header = ["model", "parameters", "rate (%)", "bits/pixel", "learning rate", "PSNR (dB)", "SSIM"]
    print(as_markdown([*header, "GFLOPs (encode + decode)", "s/step"], rows))
    print(
        f"\n{found[0]['num_clips']} test clips; {arguments.steps} steps of {BATCH} clips; every rate, last validation:"
    )
    grid = [
        [model, *(f"{rates[rate]:.2f}" if rate in rates else "diverged" for rate in arguments.rates)]
        for model, rates in scores.items()
    ]
    print(as_markdown(["PSNR (dB)", *(f"{rate:g}" for rate in arguments.rates)], grid))
    plot_validation(arguments.docs / "images/baselines_psnr.png", chosen, arguments.seeds)


if __name__ == "__main__":
    main()
