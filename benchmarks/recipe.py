"""Measure how fast VidTwin learns from scratch, and what each of its latents carries (docs/training_from_scratch.md).

    python benchmarks/recipe.py path/to/UCF-101 --resolution 64 --structure-channels 4 --batch 4 --steps 300 \\
        --variants released balanced fast --seeds 0 1 2
    python benchmarks/recipe.py synthetic --variants "structure shortcut, F = 1" fast --steps 100

Trains the model of benchmarks/plateau.py with each variant and seed on the training clips of the folder, and measures
it on validation clips from the same list (UCF-101's layout, or "synthetic"), unless `--split test`. It prints a table,
and with --plot draws PSNR by step:

    linear   PSNR of the best linear code of the training clips with as many numbers per frame group and position of the
             latent as the shortcut has: what it can carry at most before encoder and decoder learn
    PSNR     of the reconstruction, by step
    alone    PSNR and `change` of each latent decoded alone, as `vidtwin decouple` measures them
    motion   1 - |error|² / |motion|², motion being the difference of each frame to the mean of all: of the
             reconstruction; with the dynamics of a still, so that only the structure can move; with the structure of a
             still, so that only the dynamics can. The still repeats the mean of the frames.

Columns with two numbers hold PSNR / change. Each run is written to --out when it ends, and not repeated by the next
call.
"""

import argparse
import hashlib
import json
import math
import statistics
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from einops import rearrange
from experiments import as_markdown
from plateau import build, load, parse, psnr, train
from torch import Tensor

import vidtwin.models
from vidtwin.apply.meters import FrameChange, Quality
from vidtwin.files import write_text
from vidtwin.models.transformer import SpatialTemporalBlock
from vidtwin.models.vidtwin import VidTwin
from vidtwin.posteriors import Latents
from vidtwin.video import Frames
from vidtwin.video.convert import to_clip, to_uint8

PATCH = 8  # of the model of benchmarks/plateau.py


@dataclass(frozen=True)
class Variant:
    """Changes of the model's arguments, and of the options of the training."""

    model: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    each_map: bool = False  # a frame group of the shortcut per map of structure
    change: Callable[[VidTwin], None] = lambda model: None  # of the model, where VidTwin has no argument


def see_all_frames(model: VidTwin) -> None:
    """Let the temporal attention see later frames too."""
    for module in model.modules():
        if isinstance(module, SpatialTemporalBlock):
            module.temporal_attention.causal = False


def move_a_block(model: VidTwin) -> None:
    """Move a block from the encoder to the decoder: as many parameters and FLOPs."""
    encoder, decoder = model.encoder.transformer.blocks, model.decoder.transformer.blocks
    decoder.append(encoder[-1])
    del encoder[-1]


FAST = {"structure_shortcut": 1, "dynamics_shortcut": True, "initialization": "linear"}
VARIANTS = {
    "released": Variant({"initialization": "released"}),
    "balanced": Variant(),
    "structure shortcut, F = 1": Variant({"structure_shortcut": 1}),
    "structure shortcut, F = 2": Variant({"structure_shortcut": 2}),
    "structure shortcut, F = n_q": Variant(each_map=True),
    "dynamics shortcut alone": Variant({"dynamics_shortcut": True}),
    "both shortcuts, F = 1": Variant({"structure_shortcut": 1, "dynamics_shortcut": True}),
    "both shortcuts, F = n_q": Variant({"dynamics_shortcut": True}, each_map=True),
    "structure shortcut, F = 1, linear start": Variant({"structure_shortcut": 1, "initialization": "linear"}),
    "fast": Variant(FAST),
    "fast, F = n_q": Variant({"dynamics_shortcut": True, "initialization": "linear"}, each_map=True),
    "fast, L2": Variant(FAST, {"pixel": "l2"}),
    "fast, lr / 2": Variant(FAST, {"lr": 1.5e-3}),
    "fast, lr * 2": Variant(FAST, {"lr": 6e-3}),
    "fast, betas (0.9, 0.95)": Variant(FAST, {"betas": (0.9, 0.95)}),
    "fast, betas (0, 0.9)": Variant(FAST, {"betas": (0.0, 0.9)}),
    "fast, frames see all": Variant(FAST, change=see_all_frames),
    "fast, decoder 3 blocks, encoder 1": Variant(FAST, change=move_a_block),
    "fast, Muon": Variant(FAST, {"optimizer": "muon"}),
    "fast, WSD": Variant(FAST, {"schedule": "wsd"}),
    "fast, EMA 0.99": Variant(FAST, {"ema": 0.99}),
    "fast, WSD, EMA 0.99": Variant(FAST, {"schedule": "wsd", "ema": 0.99}),
    "fast, Muon, lr / 3": Variant(FAST, {"optimizer": "muon", "lr": 1e-3}),
    "fast, KL * 100": Variant(FAST, {"kl": 0.1}),
    "fast, 30% with half of the latents": Variant(FAST, {"mask": 0.3}),
    "fast, decoder alone from step 150": Variant(FAST, {"decoder_from": 150}),
}
Results = dict[str, dict[str, float]]


def create(variant: Variant, args: argparse.Namespace, seed: int) -> VidTwin:
    """Build the model of a variant."""
    groups = {"structure_shortcut": args.num_queries} if variant.each_map else {}
    model = build("balanced", args, seed, **variant.model, **groups)
    variant.change(model)
    return model


def digest_model() -> str:
    """Return a digest of the code of the model, so that runs of other code are not taken for finished ones."""
    files = sorted(Path(vidtwin.models.__file__).parent.glob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:16]


def bound_linear(variant: Variant, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> float:
    """Compute the PSNR (dB) of the principal components that fit into the numbers of the structure shortcut."""
    groups = args.num_queries if variant.each_map else variant.model.get("structure_shortcut", 0)
    if not groups:
        return math.nan
    numbers = args.num_queries // groups * args.structure_channels
    side = PATCH * 2**args.structure_downsamples

    def blocks(clips: Tensor) -> Tensor:
        means = clips.unflatten(2, (groups, -1)).mean(3)
        return rearrange(means, "b c f (h y) (w x) -> b f h w (c y x)", y=side, x=side)

    values = torch.cat([blocks(to_clip(part)).flatten(0, 3) for part in training.split(64)]).double()
    mean = values.mean(0)
    components = torch.linalg.eigh((values - mean).T @ (values - mean))[1][:, -numbers:]  # of ascending eigenvalues
    decoded = (blocks(held_out).double() - mean) @ components @ components.T + mean
    decoded = rearrange(decoded, "b f h w (c y x) -> b c f (h y) (w x)", y=side, x=side)
    return psnr(decoded.float().repeat_interleave(held_out.shape[2] // groups, 2), held_out)


@torch.no_grad()
def measure(model: VidTwin, clips: Tensor) -> dict[str, float]:
    """Measure each latent of a model on clips (N, 3, T, H, W) in [-1, 1]."""
    model.eval()
    names = ("reconstruction", "structure", "dynamics")
    meters = {name: (Quality(), FrameChange()) for name in names}
    errors = dict.fromkeys(names, 0.0)
    total = 0.0
    for clip in clips.split(8):
        latents, still = (model.encode(given).mode() for given in (clip, clip.mean(2, keepdim=True).expand_as(clip)))
        inputs = _frames(clip)
        for name, part in _views(latents).items():
            quality, change = meters[name]
            for view, wanted in zip(_frames(model.decode(part)), inputs, strict=True):
                quality.add(view, wanted)
                change.add(view)
        motion = clip - clip.mean(2, keepdim=True)
        total += float(motion.square().sum())
        moving = {"reconstruction": latents}
        moving["structure"] = {"structure": latents["structure"], "dynamics": still["dynamics"]}
        moving["dynamics"] = {"structure": still["structure"], "dynamics": latents["dynamics"]}
        for name, mixed in moving.items():
            view = model.decode(mixed).clamp(-1, 1)
            errors[name] += float((view - view.mean(2, keepdim=True) - motion).square().sum())
    measured = {}
    for name, (quality, change) in meters.items():
        values = {"psnr": quality.psnr.value, "ssim": quality.ssim.value, "change": change.value}
        measured |= {f"{name} {key}": value for key, value in values.items() if value is not None}
        measured[f"{name} motion"] = 1 - errors[name] / total
    return measured


def _views(latents: Latents) -> dict[str, Latents]:
    return {"reconstruction": latents} | {name: {name: latent} for name, latent in latents.items()}


def _frames(clips: Tensor) -> list[Frames]:
    """Convert clips (N, 3, T, H, W) in [-1, 1] to 8-bit pictures (T, H, W, 3) as files would have them."""
    return [to_uint8(clip) for clip in clips]


def format_table(results: Results, bounds: dict[str, float]) -> str:
    """Format a row per variant: means over the seeds ± their standard deviation."""
    steps = sorted({int(key) for values in results.values() for key in values if key.isdigit()})
    columns = {f"PSNR at {step}": (str(step),) for step in steps}
    columns["SSIM"] = ("reconstruction ssim",)
    columns["structure alone"] = ("structure psnr", "structure change")
    columns["dynamics alone"] = ("dynamics psnr", "dynamics change")
    columns["change"] = ("reconstruction change",)
    columns |= {f"motion: {name}": (f"{name} motion",) for name in ("reconstruction", "structure", "dynamics")}
    rows = []
    for variant, runs in _group(results).items():
        cells = [" / ".join(_mean(runs, key) for key in keys) for keys in columns.values()]
        bound = "" if math.isnan(bounds[variant]) else f"{bounds[variant]:.2f}"
        rows.append([variant, str(len(runs)), bound, *cells])
    return as_markdown(["variant", "seeds", "linear", *columns], rows)


def _group(results: Results) -> dict[str, list[dict[str, float]]]:
    """Group the runs by variant."""
    by_variant: dict[str, list[dict[str, float]]] = {}
    for key, values in results.items():
        by_variant.setdefault(json.loads(key)["variant"], []).append(values)
    return by_variant


def _mean(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs if key in run]
    if not values:
        return ""
    digits = 3 if key.endswith("ssim") else 2
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"


def plot(results: Results, references: dict[str, float], path: Path) -> None:
    """Draw PSNR by step: the mean over the seeds, and the range of all seeds as a band."""
    figure, axes = plt.subplots(figsize=(9, 4))
    for variant, runs in _group(results).items():
        steps = sorted(int(key) for key in runs[0] if key.isdigit())
        values = [[run[str(step)] for run in runs] for step in steps]
        (line,) = axes.plot(steps, [statistics.mean(of_step) for of_step in values], marker=".", label=variant)
        lowest, highest = zip(*((min(of_step), max(of_step)) for of_step in values), strict=True)
        axes.fill_between(steps, lowest, highest, color=line.get_color(), alpha=0.2, linewidth=0)
    for style, (name, value) in zip(("--", ":"), references.items(), strict=True):
        axes.axhline(value, color="grey", linestyle=style, linewidth=1, label=name)
    axes.set(xlabel="steps", ylabel="PSNR of held-out clips (dB)", xscale="log")
    axes.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.grid(alpha=0.3)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=100)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of benchmarks/plateau.py.",
    )
    parser.add_argument(
        "--variants",
        nargs="+",
        default=["balanced", "fast"],
        choices=VARIANTS,
        metavar="VARIANT",
        help="; ".join(VARIANTS),
    )
    parser.add_argument("--split", choices=("val", "test"), default="val", help="split of the held-out clips")
    parser.add_argument("--out", type=Path, default=Path("runs/recipe.json"), help="file of the finished runs")
    parser.add_argument("--plot", type=Path, help="picture of the curves")
    parser.add_argument("--linear-only", action="store_true", help="train nothing and print the linear codes alone")
    own, rest = parser.parse_known_args(argv)
    base = parse(rest)
    clips, held_out = load(base.clips, base.resolution, base.epochs_in_memory, own.split)
    targets = to_clip(held_out)
    finished: Results = json.loads(own.out.read_text()) if own.out.is_file() else {}
    results: Results = {}
    runs = [] if own.linear_only else [(name, seed) for name in own.variants for seed in base.seeds]
    for number, (name, seed) in enumerate(runs, 1):
        variant = VARIANTS[name]
        args = argparse.Namespace(**{**vars(base), **variant.training})
        settings = {k: v for k, v in vars(args).items() if k not in ("clips", "seeds", "variants")}
        settings |= {"clips": Path(args.clips).name, "split": own.split, "model": digest_model()}
        settings |= {"arguments": variant.model, "each_map": variant.each_map}
        key = json.dumps({"variant": name, "seed": seed, **settings}, sort_keys=True)
        if key not in finished:
            sys.stderr.write(f"{number} of {len(runs)}: {name}, seed {seed}\n")
            model = create(variant, args, seed)
            curve = train(model, clips, targets, args, seed)
            values = {str(step): value for step, value in curve.items()} | measure(model, targets)
            own.out.parent.mkdir(parents=True, exist_ok=True)
            finished = (json.loads(own.out.read_text()) if own.out.is_file() else {}) | {key: values}
            write_text(own.out, json.dumps(finished, indent=1) + "\n")
        results[key] = finished[key]
    changes = FrameChange()
    for frames in held_out.numpy():
        changes.add(frames)
    references = {
        name: psnr(targets.mean(axes, keepdim=True).expand_as(targets), targets)
        for name, axes in {"mean colour": (2, 3, 4), "temporal mean": (2,)}.items()
    }
    print(f"{Path(base.clips).name}: {len(clips)} training, {len(targets)} held-out clips at {base.resolution} px;")
    print(", ".join(f"{name} {value:.2f} dB" for name, value in references.items()) + f", change {changes.value:.2f}\n")
    bounds = {name: bound_linear(VARIANTS[name], clips, targets, base) for name in own.variants}
    if own.linear_only:
        print(as_markdown(["variant", "linear"], [[name, f"{value:.2f}"] for name, value in bounds.items()]))
        return
    print(format_table(results, bounds))
    if own.plot:
        plot(results, references, own.plot)


if __name__ == "__main__":
    main(sys.argv[1:])
