"""Measure encoding, decoding, training steps and reading (docs/performance.md).

    python benchmarks/speed.py                                    VidTwin-base, one clip, fp32 and bf16
    python benchmarks/speed.py --data path/to/UCF-101 --resolution 64 --depth 2 --batch 4
    python benchmarks/speed.py --compare before.json after.json

Prints a table and writes JSON with device, versions and commit. Each line has the FLOPs that were counted, the median
time with its range, and the share of what this machine reaches in products of square matrices of the same type, which
are timed right before and after: only such shares and ratios within one run mean something on a machine that others use
too. The page says so if it was not idle.

    encode, decode     of the model in evaluation
    step               of the training: L1 and KL; forward, backward, AdamW, guard and logs, as `vidtwin fit` runs it
    step, perceptual   and ST-LPIPS by VGG-16, as large as LPIPS; its weights come with a package
    step, GAN          and the discriminator
    loader             clips per second of the loader alone, with --data
    loader + step      clips per second of a training on these videos, and the share of the time that it waits for clips

Peak memory is the CUDA allocator's, on a CPU that of the step's tensors (`vidtwin plan` counts the same).
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from experiments import as_markdown
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch.optim import AdamW

import vidtwin
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.cost import device_name, flops, seconds
from vidtwin.benchmark.training_cost import count_step
from vidtwin.cli import benchmark
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.files import write_text
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.schedules import WarmupCosine
from vidtwin.training.compilation import Compilation
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer

IDLE = 0.25  # load per core
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
STEPS: dict[str, dict[str, bool]] = {
    "step": {},
    "step, perceptual": {"perceptual": True},
    "step, GAN": {"perceptual": True, "gan": True},
}
Row = dict[str, Any]


class Timer(Callback):
    """Keep the time of each step after the first ones, and the share of it before a batch is there."""

    def __init__(self, device: torch.device, warmup: int) -> None:
        self.device, self.warmup = device, warmup
        self.seconds: list[float] = []
        self.waits: list[float] = []
        self._end: float | None = None

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def on_train_batch_start(self, trainer: Any, task: Any, batch: Any, batch_idx: int) -> None:
        self._begin = self._now()
        if batch_idx == self.warmup and self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_batch_end(self, trainer: Any, task: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        now = self._now()
        if batch_idx >= self.warmup and self._end is not None:
            self.seconds.append(now - self._end)  # from end to end: loader and callbacks count
            self.waits.append(self._begin - self._end)
        self._end = now


class Same(LightningDataModule):
    """The same batch again and again, in memory."""

    def __init__(self, clip: torch.Tensor) -> None:
        super().__init__()
        self.clip = clip

    def train_dataloader(self) -> Any:
        names = [f"{index}.avi" for index in range(len(self.clip))]
        label, start = torch.zeros(len(names), dtype=torch.long), torch.zeros(len(names), dtype=torch.long)
        batch = {"clip": self.clip, "label": label, "name": names, "start_frame": start}
        return torch.utils.data.DataLoader([batch] * 10_000, batch_size=None)  # type: ignore[arg-type]


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", default="configs/vidtwin_base.yaml", help="config with the autoencoder")
    parser.add_argument("--resolution", type=int, help="instead of the config's")
    parser.add_argument("--frames", type=int, help="instead of the config's")
    parser.add_argument("--depth", type=int, help="instead of the config's")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--precisions", nargs="+", default=["fp32", "bf16"], choices=PRECISIONS)
    parser.add_argument("--parts", nargs="+", default=["encode", "decode", *STEPS, "loader"], metavar="PART")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--compile", action="store_true", help="compile networks in the steps")
    parser.add_argument("--checkpointing", choices=("mlp", "true"), help="activation checkpointing of VidTwin")
    parser.add_argument("--data", help="folder in UCF-101's layout")
    parser.add_argument("--workers", type=int, help="of the loader")
    parser.add_argument("--side", type=int, default=4096, help="of the matrices whose product is the measure of shares")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("runs/speed.json"))
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="two files of --out")
    return parser.parse_args(argv)


def read_autoencoder(args: argparse.Namespace) -> Callable[[], VideoAutoencoder]:
    """Return a function that builds the autoencoder of the config."""
    given = {"resolution": args.resolution, "num_frames": args.frames, "depth": args.depth}
    given["activation_checkpointing"] = {"true": True}.get(args.checkpointing, args.checkpointing)
    arguments = {name: value for name, value in given.items() if value is not None}
    return benchmark.read_model([args.config], arguments).build


def make_task(autoencoder: VideoAutoencoder, perceptual: bool = False, gan: bool = False) -> AutoencoderTask:
    """Build a training that has all its terms from the first step on."""
    loss = AutoencoderLoss(
        perceptual_network="st_lpips",
        perceptual_weight=0.05 if perceptual else 0.0,
        discriminator=PatchDiscriminator2d(norm="group") if gan else None,
        adversarial_weight=0.05,
        adversarial_start=0,
        kl_weight=1e-3,
    )
    optimizer = partial(AdamW, lr=1.6e-4, weight_decay=1e-4, eps=1e-15, fused=True)
    schedule = partial(WarmupCosine, warmup_steps=1)
    return AutoencoderTask(autoencoder, loss, optimizer, schedule, optimizer, schedule, gradient_clip_norm=1.0)


def measure_products(device: torch.device, bf16: bool, side: int) -> float:
    """Measure the FLOPs per second of one product of square matrices, the better of two."""
    dtype = torch.bfloat16 if bf16 else torch.float32
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    return 2 * side**3 / min(seconds(lambda: left @ right, device, warmup=1, repeats=2))


def measure_coding(
    args: argparse.Namespace, model: VideoAutoencoder, shape: tuple[int, ...], name: str
) -> Iterator[Row]:
    """Measure encoding and decoding of a batch in one precision."""
    device, bf16 = torch.device(args.device), name == "bf16"
    counts = flops(model, shape)
    model = model.to(device).eval()
    clip = torch.rand(args.batch, *shape, device=device) * 2 - 1
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        latents = model.encode(clip).mode()
        runs = {"encode": lambda: model.encode(clip), "decode": lambda: model.decode(latents, shape[1])}
        for part, run in runs.items():
            if part in args.parts:
                yield timed(args, part, name, counts[part] * args.batch, partial(seconds, run, device))


def timed(
    args: argparse.Namespace, part: str, precision: str, count: int, run: Callable[[int, int], list[float]]
) -> Row:
    """Time a part between two measurements of products; `run` takes warm-up and repetitions."""
    device = torch.device(args.device)
    before = measure_products(device, precision == "bf16", args.side)
    times = run(args.warmup, args.repeats)
    rate = statistics.mean((before, measure_products(device, precision == "bf16", args.side)))
    median = statistics.median(times)
    return {
        "part": part,
        "precision": precision,
        "flops": count,
        "seconds": {"median": median, "min": min(times), "max": max(times)},
        "clips_per_second": args.batch / median,
        "products_per_second": rate,
        "share": count / median / rate,
    }


def measure_step(args: argparse.Namespace, build: Callable[[], VideoAutoencoder], part: str, precision: str) -> Row:
    """Measure the training's steps with a batch in memory."""
    device = torch.device(args.device)
    task = make_task(build(), **STEPS[part])
    shape = clip_shape(task.autoencoder)
    cost = count_step(task, shape, args.batch, precision == "bf16")
    peak = 0

    def run(warmup: int, repeats: int) -> list[float]:
        nonlocal peak
        timer = fit(args, task, Same(torch.rand(args.batch, *shape) * 2 - 1), precision, warmup, repeats)
        peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else cost.peak_bytes
        return timer.seconds

    row = timed(args, part, precision, sum(cost.flops.values()), run)
    return row | {"peak_bytes": peak, "counted_peak_bytes": cost.peak_bytes, "flops_by_network": cost.flops}


def fit(
    args: argparse.Namespace,
    task: AutoencoderTask,
    data: LightningDataModule,
    precision: str,
    warmup: int,
    repeats: int,
) -> Timer:
    """Run a training of a few steps → its timer."""
    timer = Timer(torch.device(args.device), warmup)
    trainer = VideoTrainer(
        accelerator="gpu" if args.device.startswith("cuda") else "cpu",
        devices=1,
        precision=PRECISIONS[precision],
        compilation=Compilation() if args.compile else None,
        max_steps=warmup + repeats,
        limit_val_batches=0,
        callbacks=[timer],
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=True,
        logger=False,
    )
    trainer.fit(task, datamodule=data)
    return timer


def measure_loader(args: argparse.Namespace, build: Callable[[], VideoAutoencoder], precision: str) -> Iterator[Row]:
    """Measure the loader alone, then a training that reads from it."""
    model = build()
    _, frames, side, _ = clip_shape(model)
    options = {"num_frames": frames, "resolution": side, "batch_size": args.batch, "num_workers": args.workers}
    data = UCF101(args.data, val_groups=(), **options)
    data.setup("fit")
    clips, loader = 0, iter(data.train_dataloader())
    for _ in range(args.warmup):
        next(loader)
    began = time.perf_counter()
    for clips, _ in enumerate(loader, 1):
        if clips * args.batch >= 200 or time.perf_counter() - began > 30:
            break
    speed = clips * args.batch / (time.perf_counter() - began)
    yield {"part": "loader", "precision": "", "clips_per_second": speed, "workers": data.num_workers}
    timer = fit(
        args, make_task(model), UCF101(args.data, val_groups=(), **options), precision, args.warmup, args.repeats
    )
    total = sum(timer.seconds)
    yield {
        "part": "loader + step",
        "precision": precision,
        "clips_per_second": args.batch * len(timer.seconds) / total,
        "waiting": sum(timer.waits) / total,
    }


def clip_shape(model: VideoAutoencoder) -> tuple[int, int, int, int]:
    """Return the shape (3, T, H, W) of the model's clips."""
    side = model.resolution or 224
    return (3, model.temporal.usual_length, side, side)


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Return device, versions, commit and load."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    return {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "load_per_core": load,
        "idle": load < IDLE,
        "commit": commit.stdout.strip() or "unknown",
        "versions": {"vidtwin": vidtwin.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "compare" and value is not None},
    }


def format_table(rows: list[Row]) -> str:
    """Format a line per part."""

    def cell(row: Row, key: str, form: Callable[[Any], str]) -> str:
        return form(row[key]) if row.get(key) is not None else ""

    header = ["part", "precision", "TFLOPs", "seconds (range)", "clips/s", "share of products", "peak (GB)", "waiting"]
    lines = [
        [
            row["part"],
            row["precision"],
            cell(row, "flops", lambda value: f"{value / 1e12:.3g}"),
            cell(row, "seconds", lambda value: f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"),
            cell(row, "clips_per_second", lambda value: f"{value:.3g}"),
            cell(row, "share", lambda value: f"{value:.0%}"),
            cell(row, "peak_bytes", lambda value: f"{value / 1e9:.2f}"),
            cell(row, "waiting", lambda value: f"{value:.1%}"),
        ]
        for row in rows
    ]
    return as_markdown(header, lines)


def compare(before: Path, after: Path) -> str:
    """Compare two files: the ratio of speeds, and the shares, of the parts that both have."""
    files = [json.loads(path.read_text()) for path in (before, after)]
    held = [{(row["part"], row["precision"]): row for row in file["rows"]} for file in files]
    lines = []
    for key in (key for key in held[0] if key in held[1]):
        old, new = held[0][key], held[1][key]
        shares = [f"{row['share']:.0%}" if "share" in row else "" for row in (old, new)]
        lines.append([*key, *shares, f"{new['clips_per_second'] / old['clips_per_second']:.2f}x"])
    table = as_markdown(["part", "precision", "share before", "after", "clips/s"], lines)
    warnings = [
        f"{path}: not idle, {file['load_per_core']:.1f} per core"
        for path, file in zip((before, after), files, strict=True)
        if not file["idle"]
    ]
    if files[0]["device"] != files[1]["device"]:
        warnings.append(f"Devices differ: {files[0]['device']} and {files[1]['device']}; compare shares alone.")
    return "\n".join([table, *warnings])


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts → what --out holds."""
    content = describe(args) | {"rows": []}
    build = read_autoencoder(args)
    unknown = set(args.parts) - {"encode", "decode", "loader", *STEPS}
    if unknown:
        raise SystemExit(f"Expected parts among encode, decode, loader, {', '.join(STEPS)}, got {', '.join(unknown)}.")
    for precision in args.precisions:
        rows = content["rows"]
        if {"encode", "decode"} & set(args.parts):
            model = build()
            rows += measure_coding(args, model, clip_shape(model), precision)
        rows += [measure_step(args, build, part, precision) for part in STEPS if part in args.parts]
    if args.data and "loader" in args.parts:
        content["rows"] += measure_loader(args, build, args.precisions[-1])
    return content


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.compare:
        sys.stdout.write(compare(*args.compare) + "\n")
        return
    content = run(args)
    write_text(args.out, json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"{content['device']}, {content['threads']} threads, commit {content['commit']}\n")
    if not content["idle"]:
        sys.stdout.write(f"The machine was not idle: a load of {content['load_per_core']:.1f} per core.\n")
    sys.stdout.write(f"\n{format_table(content['rows'])}\n-> {args.out}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
