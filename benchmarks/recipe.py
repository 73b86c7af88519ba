"""Measure the shortcut over VidTwin's structure branch: quality, and what each latent carries.

    python benchmarks/shortcut.py path/to/UCF-101 --steps 150 --seeds 0 1
    python benchmarks/shortcut.py synthetic --resolution 64 --variants none "1 frame group" --steps 300

Trains the model of benchmarks/plateau.py with each variant and seed on the training clips of the folder, and measures
it on validation clips from the same list (UCF-101's layout, or "synthetic"); the test clips are not read. It prints a
table for docs/training_from_scratch.md:

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
import json
import math
import statistics
import sys
from pathlib import Path

import torch
from einops import rearrange
from experiments import as_markdown
from plateau import build, load, parse, psnr, train
from torch import Tensor

from vidtwin.apply.meters import FrameChange, Quality
from vidtwin.files import write_text
from vidtwin.models.vidtwin import VidTwin
from vidtwin.posteriors import Latents
from vidtwin.video import Frames
from vidtwin.video.convert import to_clip, to_uint8

PATCH = 8  # of the model of benchmarks/plateau.py
# Frame groups of the shortcut by variant; -1: as many as there are maps of structure.
VARIANTS = {
    "none": 0,
    "1 frame group": 1,
    "1 frame group, first map alone": 1,
    "1 frame group, equal signs": 1,
    "2 frame groups": 2,
    "a frame group per map": -1,
    "a frame group per map, equal signs": -1,
}
Results = dict[str, dict[str, float]]


def create(variant: str, args: argparse.Namespace, seed: int) -> VidTwin:
    """Build a model with a variant of the shortcut."""
    groups = VARIANTS[variant]
    args.structure_shortcut = args.num_queries if groups < 0 else groups
    model = build(args.initialization, args, seed)
    shortcut = model.structure.shortcut
    if shortcut is not None and variant.endswith("equal signs"):
        shortcut.channel_weights.abs_()
    if shortcut is not None and variant.endswith("first map alone"):
        _use_first_map(model)
    return model


def _use_first_map(model: VidTwin) -> None:
    """Average onto the first map of structure only, with as many channel groups as it has numbers for."""
    shortcut, arguments = model.structure.shortcut, model.init_args
    assert shortcut is not None
    single = VidTwin(**{**arguments, "num_queries": 1}).structure.shortcut
    assert single is not None
    maps = arguments["num_queries"]

    def average(features: Tensor) -> Tensor:
        first = single.average(features)
        return torch.cat([first, first.new_zeros(1).expand(*first.shape[:2], maps - 1, *first.shape[3:])], dim=2)

    shortcut.average = average  # type: ignore[method-assign]
    shortcut.repeat = lambda latent: single.repeat(latent[:, :, :1])  # type: ignore[method-assign]


def bound_linear(variant: str, training: Tensor, held_out: Tensor, args: argparse.Namespace) -> float:
    """Compute the PSNR (dB) of the principal components that fit into the numbers of the shortcut; nan for none."""
    maps = args.num_queries
    groups = maps if VARIANTS[variant] < 0 else VARIANTS[variant]
    if not groups:
        return math.nan
    numbers = (1 if variant.endswith("first map alone") else maps // groups) * args.structure_channels
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
    steps = [key for key in next(iter(results.values())) if key.isdigit()]
    columns = {f"PSNR at {step}": (step,) for step in steps}
    columns["structure alone"] = ("structure psnr", "structure change")
    columns["dynamics alone"] = ("dynamics psnr", "dynamics change")
    columns["change"] = ("reconstruction change",)
    columns |= {f"motion: {name}": (f"{name} motion",) for name in ("reconstruction", "structure", "dynamics")}
    by_variant: dict[str, list[dict[str, float]]] = {}
    for key, values in results.items():
        by_variant.setdefault(json.loads(key)["variant"], []).append(values)
    rows = []
    for variant, runs in by_variant.items():
        cells = [" / ".join(_mean(runs, key) for key in keys) for keys in columns.values()]
        bound = "" if math.isnan(bounds[variant]) else f"{bounds[variant]:.2f}"
        rows.append([variant, str(len(runs)), bound, *cells])
    return as_markdown(["shortcut", "seeds", "linear", *columns], rows)


def _mean(runs: list[dict[str, float]], key: str) -> str:
    values = [run[key] for run in runs]
    spread = f" ± {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Other options are those of benchmarks/plateau.py.",
    )
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=VARIANTS, metavar="VARIANT")
    parser.add_argument("--initialization", choices=("balanced", "released"), default="balanced")
    parser.add_argument("--out", type=Path, default=Path("runs/shortcut.json"), help="file of the finished runs")
    parser.add_argument("--linear-only", action="store_true", help="train nothing and print the linear codes alone")
    own, rest = parser.parse_known_args(argv)
    args = parse(rest)
    args.initialization = own.initialization
    settings = {k: v for k, v in vars(args).items() if k not in ("clips", "seeds", "variants", "structure_shortcut")}
    settings["clips"] = Path(args.clips).name
    finished: Results = json.loads(own.out.read_text()) if own.out.is_file() else {}
    clips, held_out = load(args.clips, args.resolution, args.epochs_in_memory, "val")
    validation = to_clip(held_out)
    results: Results = {}
    runs = [] if own.linear_only else [(variant, seed) for variant in own.variants for seed in args.seeds]
    for number, (variant, seed) in enumerate(runs, 1):
        key = json.dumps({"variant": variant, "seed": seed, **settings}, sort_keys=True)
        if key not in finished:
            sys.stderr.write(f"{number} of {len(runs)}: {variant}, seed {seed}\n")
            model = create(variant, args, seed)
            curve = train(model, clips, validation, args, seed)
            finished[key] = {str(step): value for step, value in curve.items()} | measure(model, validation)
            own.out.parent.mkdir(parents=True, exist_ok=True)
            write_text(own.out, json.dumps(finished, indent=1) + "\n")
        results[key] = finished[key]
    changes = FrameChange()
    for frames in held_out.numpy():
        changes.add(frames)
    mean_colour, temporal_mean = (
        psnr(validation.mean(axes, keepdim=True).expand_as(validation), validation) for axes in ((2, 3, 4), (2,))
    )
    print(f"{settings['clips']}: {len(clips)} training, {len(validation)} validation clips at {args.resolution} px; ")
    print(f"mean colour {mean_colour:.2f} dB, temporal mean {temporal_mean:.2f} dB, change {changes.value:.2f}\n")
    bounds = {name: bound_linear(name, clips, validation, args) for name in own.variants}
    if own.linear_only:
        print(as_markdown(["shortcut", "linear"], [[name, f"{value:.2f}"] for name, value in bounds.items()]))
    else:
        print(format_table(results, bounds))


if __name__ == "__main__":
    main(sys.argv[1:])
