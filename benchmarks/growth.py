"""Count how FLOPs and memory of VidTwin grow with frames, resolution, batch and width (docs/performance.md).

    python benchmarks/growth.py                     counts of VidTwin-base; draws docs/images/growth.png
    python benchmarks/growth.py --time --depth 2    and measures seconds, of a model of two blocks a half

Each axis varies alone, from VidTwin-base with one clip of 16 frames of 224 x 224 in fp32. Encoding and a training step
(L1 and KL, AdamW) are counted on tensors without values, so the counts are the same on any machine. Memory is that of
all tensors at the peak; `kept` leaves out weights and the optimizer's state. An exponent is the slope of a straight
line through the points, fitted by least squares to the logarithms.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import torch
from experiments import as_markdown
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.optim import AdamW

from vidtwin.benchmark.cost import flops, seconds
from vidtwin.benchmark.memory import peak_memory
from vidtwin.benchmark.training_cost import count_step
from vidtwin.files import replacing, write_text
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.models.vidtwin import VidTwin
from vidtwin.training.task import AutoencoderTask

BASE = {"frames": 16, "resolution": 224, "batch": 1, "width": 768}
AXES: dict[str, tuple[int, ...]] = {
    "frames": (8, 16, 32),
    "resolution": (112, 224, 448),
    "batch": (1, 2, 4),
    "width": (384, 768, 1536),
}
CURVES = {
    "encode_flops": "encode",
    "step_flops": "step",
    "encode_bytes": "encode, peak",
    "step_bytes": "step, peak",
    "step_kept_bytes": "step, kept",
}
Point = dict[str, Any]


def build(point: Point, depth: int, device: str) -> VidTwin:
    """Build the model of a point; on the meta device it has no values."""
    with torch.device(device):
        return VidTwin(
            num_frames=point["frames"], resolution=point["resolution"], hidden_size=point["width"], depth=depth
        )


def make_task(model: VidTwin) -> AutoencoderTask:
    return AutoencoderTask(model, AutoencoderLoss(perceptual_weight=0.0), partial(AdamW, fused=True))


def clip_shape(point: Point) -> tuple[int, int, int, int]:
    return 3, point["frames"], point["resolution"], point["resolution"]


def count(point: Point, depth: int) -> dict[str, float]:
    """Count encoding and a step of a point."""
    model, shape, batch = build(point, depth, "meta"), clip_shape(point), point["batch"]
    cost = count_step(make_task(model), shape, batch)
    return {
        "encode_flops": flops(model, shape)["encode"] * batch,
        "encode_bytes": count_encoding(point, depth),
        "step_flops": sum(cost.flops.values()),
        "step_bytes": cost.peak_bytes,
        "step_kept_bytes": cost.activations_bytes,
    }


def count_encoding(point: Point, depth: int) -> int:
    """Count the bytes of all tensors at the peak of encoding."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.inference_mode():
        model = build(point, depth, "cpu").eval()
        clip = torch.empty(point["batch"], *clip_shape(point))
        held = [*model.parameters(), *model.buffers(), clip]
        return peak_memory(lambda: model.encode(clip), torch.device("cpu"), held)


def measure(point: Point, depth: int) -> dict[str, float]:
    """Measure seconds of encoding, and of a step without its optimizer: medians of three."""
    model = build(point, depth, "cpu").train()
    task, clip = make_task(model), torch.rand(point["batch"], *clip_shape(point)) * 2 - 1

    def step() -> None:
        for _, terms in task.losses(clip, 0):
            terms["total"].backward()
        model.zero_grad()

    found = {"step_seconds": statistics.median(seconds(step, torch.device("cpu"), 1, 3))}
    with torch.inference_mode():
        model.eval()
        encode = seconds(lambda: model.encode(clip), torch.device("cpu"), 1, 3)
    return found | {"encode_seconds": statistics.median(encode)}


def fit_exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """Fit costs = a · sizes^b by least squares of the logarithms → b."""
    x, y = [math.log(size) for size in sizes], [math.log(cost) for cost in costs]
    return statistics.linear_regression(x, y).slope


def draw(rows: dict[str, list[Point]], path: Path) -> None:
    """Draw FLOPs and memory against each axis, with the exponents in the legends."""
    figure, panels = plt.subplots(2, len(rows), figsize=(3.2 * len(rows), 6), squeeze=False, layout="constrained")
    for column, (axis, points) in enumerate(rows.items()):
        sizes = [point[axis] for point in points]
        for panel, (suffix, unit, label) in zip(
            panels[:, column], (("flops", 1e12, "TFLOPs"), ("bytes", 1e9, "GB")), strict=True
        ):
            for name in (name for name in CURVES if name.endswith(suffix)):
                values = [point[name] / unit for point in points]
                exponent = fit_exponent(sizes, values)
                panel.plot(sizes, values, marker="o", markersize=4, label=f"{CURVES[name]}: {exponent:.2f}")
            panel.set(xscale="log", yscale="log", xticks=sizes, xticklabels=[str(size) for size in sizes])
            panel.minorticks_off()
            panel.set_ylabel(label if column == 0 else "")
            panel.grid(alpha=0.3)
            panel.legend(fontsize=7, title="exponents", title_fontsize=7)
        panels[1, column].set_xlabel(axis)
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=110, format="png")
    plt.close(figure)


def format_points(rows: dict[str, list[Point]]) -> str:
    """Format a line per point."""
    names = list(CURVES) + [name for name in next(iter(rows.values()))[0] if name.endswith("_seconds")]
    header = ["", *(name.replace("_", " ").replace("bytes", "GB").replace("flops", "TFLOPs") for name in names)]
    scale = {"flops": 1e12, "bytes": 1e9, "seconds": 1.0}
    lines = [
        [f"{axis} {point[axis]}", *(f"{point[name] / scale[name.rpartition('_')[2]]:.3g}" for name in names)]
        for axis, points in rows.items()
        for point in points
    ]
    fits = [
        [
            f"exponent of {axis}",
            *(f"{fit_exponent([p[axis] for p in points], [p[n] for p in points]):.2f}" for n in names),
        ]
        for axis, points in rows.items()
    ]
    return as_markdown(header, lines + fits)


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--depth", type=int, default=16, help="blocks of encoder and of decoder")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--time", action="store_true", help="measure seconds too, which takes a quiet machine")
    parser.add_argument("--out", type=Path, default=Path("runs/growth.json"))
    parser.add_argument("--picture", type=Path, default=Path("docs/images/growth.png"))
    args = parser.parse_args(argv)
    counted: dict[tuple[int, ...], dict[str, float]] = {}
    rows: dict[str, list[Point]] = {}
    began = time.monotonic()
    for axis in args.axes:
        rows[axis] = []
        for size in AXES[axis]:
            point = {**BASE, axis: size}
            key = tuple(point.values())
            if key not in counted:
                counted[key] = count(point, args.depth) | (measure(point, args.depth) if args.time else {})
                sys.stderr.write(f"{axis} {size}: {time.monotonic() - began:.0f} s\n")
            rows[axis].append(point | counted[key])
        write_text(args.out, json.dumps({"depth": args.depth, "rows": rows}, indent=1) + "\n")
    draw(rows, args.picture)
    sys.stdout.write(format_points(rows) + f"\n-> {args.out}, {args.picture}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
