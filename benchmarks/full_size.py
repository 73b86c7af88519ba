"""Measure full-size models in one forward pass on a CPU (16 frames of 224 px), and estimate training costs.

    python benchmarks/full_size.py
    python benchmarks/full_size.py --clip ../shared/data/clips/bikes.mp4 LTX-Video WF-VAE-S
    python benchmarks/full_size.py --costs

Each model of the configs is built with random weights in its own process, where it encodes and decodes one clip in
fp32: noise, or the first frames of a video. Exits with 1 if one needs more than 20 GB. `--costs` runs nothing: it
estimates the costs of the baselines' trainings on H100s at 35% of their 989 TFLOP/s in bf16: 100,000 steps of 24 clips
for all models, and each config's own recipe. Sizes, rates and FLOPs alone need no run either: `vidtwin test --config
configs/benchmark/seed_systems.yaml --meta`.

    clip = 3 · autoencoder + 3 · LPIPS + 8 · discriminator        (forward passes, in FLOPs)

A backward pass costs two forward passes, or one if the network is frozen; recomputing activations costs the autoencoder
one more. LPIPS runs on the clip and its reconstruction, the latter with a gradient. After its start the discriminator
runs on the reconstruction for the generator's loss, then on both for its own. R1 is omitted.
"""

import argparse
import copy
import io
import json
import pkgutil
import resource
import subprocess
import sys
import time
import warnings
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import lpips
import torch
import yaml
from experiments import as_markdown
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from vidtwin import cli
from vidtwin.benchmark.cost import device_name, flops
from vidtwin.clips import load_clip
from vidtwin.storage import checkpoints

CONFIGS = Path("configs")
MODELS = {
    "VidTwin-base": "vidtwin_base.yaml",
    "MAGVIT-v2 (prepend)": "baselines/magvit2.yaml",
    "MAGVIT-v2, 5 channels (even)": "baselines/magvit2_continuous.yaml",
    "CMD, p=16, D=32": "baselines/cmd.yaml",
    "CMD, p=4, D=8": "baselines/cmd_patch4.yaml",
    "iVideoGPT (256 px inside)": "baselines/ivideogpt.yaml",
    "iVideoGPT, native": "baselines/ivideogpt_native.yaml",
    "CV-VAE": "baselines/cvvae.yaml",
    "OD-VAE": "baselines/odvae.yaml",
    "Open-Sora": "baselines/opensora.yaml",
    "WF-VAE-S": "baselines/wfvae.yaml",
    "CogVideoX": "library/cogvideox.yaml",
    "Wan 2.1": "library/wan21.yaml",
    "LTX-Video": "library/ltx_video.yaml",
}
# Clips per step in each baseline's recipe, from its comments: data.batch_size times devices.
RECIPE = {"VidTwin-base": 24, "MAGVIT-v2 (prepend)": 48, "MAGVIT-v2, 5 channels (even)": 48}
RECIPE |= {"CMD, p=16, D=32": 256, "CMD, p=4, D=8": 256, "iVideoGPT (256 px inside)": 32, "iVideoGPT, native": 32}
# CV-VAE states no batch; this is that of 8 devices.
RECIPE |= {"CV-VAE": 8, "OD-VAE": 8, "Open-Sora": 24, "WF-VAE-S": 8}
CLIP = (3, 16, 224, 224)
LIMIT = 20e9  # bytes
STEPS, BATCH = 100_000, 24
PEAK, UTILIZATION = 989e12, 0.35


def part(config: str, key: str) -> dict[str, Any]:
    """Return a section of a config or of its model, with every default."""
    with redirect_stdout(io.StringIO()) as text:
        cli.main(["fit", f"--config={CONFIGS / config}", "--print_config"])
    content = yaml.safe_load(text.getvalue())
    return content.get(key) or content["model"][key]


def spec(name: str) -> dict[str, Any]:
    section = part(MODELS[name], "autoencoder")
    return {"class_path": section["class_path"], "init_args": section.get("init_args", {})}


@torch.no_grad()
def measure_forward(name: str, video: Path | None) -> dict[str, Any]:
    """Run the model once in this process, on the first frames of a video or on noise, and return its costs."""
    torch.manual_seed(0)
    model = checkpoints.build(spec(name)).eval()
    clip = torch.rand(1, *CLIP) * 2 - 1 if video is None else load_clip(video, num_frames=CLIP[1], size=CLIP[2])
    began = time.perf_counter()
    latents = model.encode(clip).mode()
    encoded = time.perf_counter()
    decoded = model.decode(latents, CLIP[1])
    ended = time.perf_counter()
    if decoded.shape != clip.shape or not decoded.isfinite().all():
        raise SystemExit(f"{name}: expected finite pixels of shape {tuple(clip.shape)}, got {tuple(decoded.shape)}")
    bits = model.bits_per_pixel(CLIP)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "rate": sum(z.numel() for z in latents.values()) / clip.numel(),
        "bits": bits,
        "flops": flops(model, CLIP),
        "seconds": (encoded - began, ended - encoded),
        "peak": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def count(network: nn.Module, *inputs: torch.Tensor) -> int:
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        network(*inputs)
    return counter.get_total_flops()


def count_training(name: str, autoencoder: int) -> dict[str, float]:
    """Count the FLOPs of a training step per clip, by network."""
    loss = part(MODELS[name], "loss").get("init_args", {})
    clip = torch.empty(1, *CLIP, device="meta")
    passes = 4.0 if spec(name)["init_args"].get("activation_checkpointing") else 3.0
    costs = {"autoencoder": passes * autoencoder, "LPIPS": 0.0, "discriminator": 0.0}
    if loss.get("perceptual_weight", 0.05) > 0:
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")  # lpips uses deprecated arguments of torchvision
            vgg = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False).net
        frames = loss.get("perceptual_frames") or CLIP[1]
        costs["LPIPS"] = 3.0 * count(vgg, clip[0, :, :1].movedim(1, 0)) * frames
    if loss.get("discriminator"):
        arguments = copy.deepcopy(loss["discriminator"].get("init_args", {}))
        with torch.device("meta"):
            discriminator = pkgutil.resolve_name(loss["discriminator"]["class_path"])(**arguments)
        costs["discriminator"] = 8.0 * count(discriminator.eval(), clip)
    costs["generator"] = costs["autoencoder"] + costs["LPIPS"]
    return costs


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", metavar="MODEL", help=f"of {', '.join(MODELS)} (default: all)")
    parser.add_argument("--clip", type=Path, metavar="VIDEO", help="a video whose first frames are taken, not noise")
    parser.add_argument("--costs", action="store_true", help="estimate training costs, and run nothing")
    parser.add_argument("--one", action="store_true", help="measure the model in this process and print the result")
    arguments = parser.parse_args()
    if unknown := [name for name in arguments.models if name not in MODELS]:
        parser.error(f"expected models of {', '.join(MODELS)}, got {', '.join(unknown)}")
    if arguments.one:
        (name,) = arguments.models
        print(json.dumps(measure_forward(name, arguments.clip)))
        return 0
    names = arguments.models or list(MODELS)
    if arguments.costs:
        print_costs([name for name in names if name in RECIPE])
        return 0

    measured: dict[str, dict[str, Any]] = {}
    rows = []
    for name in names:
        command = [sys.executable, __file__, name, "--one"]
        if arguments.clip:
            command += ["--clip", str(arguments.clip)]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
        measured[name] = found = json.loads(done.stdout.splitlines()[-1])
        print(f"{name}: {found['peak'] / 1e9:.1f} GB", flush=True)
        rows.append(
            [
                name,
                f"{found['parameters']:,}",
                f"{100 * found['rate']:.4f}",
                "" if found["bits"] is None else f"{found['bits']:.5f}",
                " + ".join(f"{found['flops'][half] / 1e12:.2f}" for half in ("encode", "decode")),
                " + ".join(f"{seconds:.0f}" for seconds in found["seconds"]),
                f"{found['peak'] / 1e9:.1f}",
            ]
        )
    header = ["model", "parameters", "rate (%)", "bits/pixel", "TFLOPs (encode + decode)", "seconds", "peak (GB)"]
    print(as_markdown(header, rows))
    print(f"\n{device_name('cpu')}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if not arguments.models:
        print_costs(list(RECIPE))
    return int(any(found["peak"] > LIMIT for found in measured.values()))


def print_costs(names: list[str]) -> None:
    """Print the estimated costs of trainings."""
    rows = []
    for name in names:
        with torch.device("meta"):
            model = checkpoints.build(spec(name))
        costs = count_training(name, sum(flops(model, CLIP).values()))
        start = part(MODELS[name], "loss").get("init_args", {}).get("adversarial_start", 10_000)
        steps = part(MODELS[name], "trainer")["max_steps"]
        hours = [
            clips * number * (costs["generator"] + costs["discriminator"] * max(0.0, 1 - start / number))
            for number, clips in ((STEPS, BATCH), (steps, RECIPE[name]))
        ]
        hours = [f"{flop / (PEAK * UTILIZATION) / 3600:,.0f}" for flop in hours]
        terms = [f"{costs[network] / 1e12:.1f}" for network in ("autoencoder", "LPIPS", "discriminator")]
        rows.append([name, *terms, hours[0], f"{steps:,} x {RECIPE[name]}", hours[1]])
    print("\nEstimated TFLOPs per clip of a step, and H100 hours:")
    header = ["training", "autoencoder", "LPIPS", "discriminator", f"hours for {STEPS:,} x {BATCH}", "recipe", "hours"]
    print(as_markdown(header, rows))


if __name__ == "__main__":
    sys.exit(main())
