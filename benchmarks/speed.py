"""Measure encoding, decoding, training steps and reading (docs/performance.md).

    python benchmarks/speed.py                                    VidTwin-base, one clip, fp32 and bf16
    python benchmarks/speed.py --compile --parts encode decode    with compiled blocks
    python benchmarks/speed.py --data path/to/videos --resolution 64 --depth 2 --batch 4
    python benchmarks/speed.py --compare before.json after.json

Prints tables and writes JSON with device, versions and commit. Each line has the FLOPs that were counted, the median
time with its range, and the share of what this machine reaches in products of square matrices of the same type, which
are timed right before and after: only such shares and ratios within one run mean something on a machine that others use
too. The page says so if it was not idle: if other processes took more than a tenth of its cores while a line was
measured. A CPU without units for bf16 is measured in fp32 alone. Lines that --minutes leaves no time for, or that fail
for lack of memory or data, are named.

    encode, decode     of the model in evaluation, and the kinds of operations that its time goes to
    step               of the training: L1 and KL; forward, backward, AdamW, guard and logs, as `vidtwin fit` runs it
    step, perceptual   and ST-LPIPS by VGG-16, as large as LPIPS; its weights come with a package
    step, GAN          and the discriminator
    loader             clips per second of the loader alone in steady state, with --data: the batches that its workers
                       had ready are not counted
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
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from experiments import as_markdown
from lightning.pytorch import LightningDataModule
from lightning.pytorch.callbacks import Callback
from torch._dynamo.exc import BackendCompilerFailed
from torch._inductor.exc import CppCompileError, InductorError
from torch.optim import AdamW

import vidtwin
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.cost import device_name, flops, seconds
from vidtwin.benchmark.memory import peak_memory
from vidtwin.benchmark.training_cost import count_step
from vidtwin.cli import benchmark
from vidtwin.compilation import list_units
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError
from vidtwin.files import write_text
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.schedules import WarmupCosine
from vidtwin.training.compilation import Compilation
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer

IDLE = 0.1  # share of the cores that others use
LOADER_SECONDS = 20.0
# Kinds of operations by the beginning of their names; the first that fits.
KINDS = {
    "products": ("addmm", "mm", "bmm", "baddbmm", "linear", "mkldnn", "convolution", "_convolution", "thnn_conv"),
    "attention": ("_scaled_dot_product", "_flash_attention", "_efficient_attention", "_cudnn_attention"),
    "norms": ("native_layer_norm", "layer_norm", "native_group_norm"),
    "activations": ("gelu", "relu", "clamp_min", "threshold"),
    "copies and conversions": ("copy_", "clone", "cat", "_to_copy", "contiguous", "stack"),
    "sums and products by element": ("add", "mul", "sub", "div", "addcmul", "exp", "sum", "mean"),
}
PRECISIONS = {"fp32": "32-true", "bf16": "bf16-mixed"}
STEPS: dict[str, dict[str, bool]] = {
    "step": {},
    "step, perceptual": {"perceptual": True},
    "step, GAN": {"perceptual": True, "gan": True},
}
COMPILER_ERRORS = (InductorError, BackendCompilerFailed, CppCompileError)
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
    parser.add_argument("--compile", action="store_true", help="compile the networks, as configs/trainer/gpu.yaml does")
    parser.add_argument("--checkpointing", choices=("elementwise", "mlp", "true"), help="of VidTwin's activations")
    parser.add_argument("--data", help="folder of videos, for the loader")
    parser.add_argument("--workers", type=int, help="of the loader")
    parser.add_argument("--side", type=int, default=4096, help="of the matrices whose product is the measure of shares")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no line after this time")
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


def measure_coding(args: argparse.Namespace, model: VideoAutoencoder, part: str, name: str) -> Row:
    """Measure encoding or decoding of a batch in one precision."""
    device, bf16, shape = torch.device(args.device), name == "bf16", clip_shape(model)
    count = flops(model, shape)[part] * args.batch
    model = model.to(device).eval()
    clip = torch.rand(args.batch, *shape, device=device) * 2 - 1
    with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=bf16):
        latents = model.encode(clip).mode()
        run = partial(model.encode, clip) if part == "encode" else partial(model.decode, latents, shape[1])
        given = clip if part == "encode" else latents
        kinds, peak = profile(run, device), peak_memory(run, device, [*model.parameters(), *model.buffers(), given])
        with compiled(args, model):
            row = timed(args, part, name, count, partial(seconds, run, device))
    return row | {"kinds": kinds, "peak_bytes": peak, "compiled": args.compile}


@contextmanager
def compiled(args: argparse.Namespace, model: VideoAutoencoder) -> Iterator[None]:
    """With --compile, compile the blocks of a model while it is measured."""
    compilation = Compilation()
    if args.compile:
        compilation.compile({"autoencoder": list_units(model)[:-1] or [model]})
    try:
        yield
    finally:
        compilation.restore()


def profile(run: Callable[[], object], device: torch.device) -> dict[str, float]:
    """Profile one call → share of its operations' time by kind."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(torch.profiler.ProfilerActivity.CUDA)
    run()
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # else the profiler reports a missing GPU as an error
    with torch.profiler.profile(activities=activities) as profiler:
        run()
    times = dict.fromkeys([*KINDS, "rest"], 0.0)
    for event in profiler.key_averages():
        spent = event.self_device_time_total if device.type == "cuda" else event.self_cpu_time_total
        name = event.key.removeprefix("aten::")
        times[next((kind for kind, starts in KINDS.items() if name.startswith(starts)), "rest")] += spent
    total = sum(times.values()) or 1.0
    return {kind: spent / total for kind, spent in times.items()}


def busy_seconds() -> tuple[float, float] | None:
    """Return seconds of all cores that all processes, and this one, have used or waited for; None if not known."""
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _, _, irq, softirq, steal = map(float, path.read_text().split("\n", 1)[0].split()[1:9])
    own = os.times()
    used = (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
    return used, own.user + own.system + own.children_user + own.children_system


def timed(
    args: argparse.Namespace, part: str, precision: str, count: int, run: Callable[[int, int], list[float]]
) -> Row:
    """Time a part between two measurements of products; `run` takes warm-up and repetitions."""
    device = torch.device(args.device)
    before = measure_products(device, precision == "bf16", args.side)
    began, used = time.perf_counter(), busy_seconds()
    times = run(args.warmup, args.repeats)
    spent, used_after = time.perf_counter() - began, busy_seconds()
    others = None
    if used is not None and used_after is not None and not args.compile:  # whose compiler is a process of its own
        own = used_after[1] - used[1]
        others = max(0.0, used_after[0] - used[0] - own) / spent / (os.cpu_count() or 1)
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
        "others": others,
    }


def measure_step(args: argparse.Namespace, build: Callable[[], VideoAutoencoder], part: str, precision: str) -> Row:
    """Measure the training's steps with a batch in memory."""
    device = torch.device(args.device)
    task = make_task(build(), **STEPS[part])
    shape = clip_shape(task.autoencoder)
    cost = count_step(task, shape, args.batch, precision == "bf16")
    clip = torch.rand(args.batch, *shape) * 2 - 1

    def run(warmup: int, repeats: int) -> list[float]:
        return fit(args, task, Same(clip), precision, warmup, repeats).seconds

    row = timed(args, part, precision, sum(cost.flops.values()), run)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else cost.peak_bytes
    counts = {"counted_peak_bytes": cost.peak_bytes, "optimizer_bytes": cost.optimizer_bytes}
    return row | {"peak_bytes": peak, "flops_by_network": cost.flops, "compiled": args.compile} | counts


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
        enable_checkpointing=False,
        logger=False,
    )
    trainer.fit(task, datamodule=data)
    return timer


def measure_loader(args: argparse.Namespace, build: Callable[[], VideoAutoencoder], precision: str) -> Iterator[Row]:
    """Measure the loader alone, then a training that reads from it."""
    model = build()
    _, frames, side, _ = clip_shape(model)
    options = {"num_frames": frames, "resolution": side, "batch_size": args.batch, "num_workers": args.workers}
    data = VideoFolder(args.data, **options)
    data.setup("fit")
    speed = args.batch * time_batches(data.train_dataloader, LOADER_SECONDS)
    yield {"part": "loader", "precision": "", "clips_per_second": speed, "workers": data.num_workers}
    timer = fit(args, make_task(model), VideoFolder(args.data, **options), precision, args.warmup, args.repeats)
    total = sum(timer.seconds)
    yield {
        "part": "loader + step",
        "precision": precision,
        "clips_per_second": args.batch * len(timer.seconds) / total,
        "waiting": sum(timer.waits) / total,
    }


def time_batches(make_loader: Callable[[], Any], least: float) -> float:
    """Time batches of a loader in steady state, for at least so many seconds → batches per second.

    The workers fill their queues before the first batch is asked for, so that as many batches as they hold are not
    counted; those of the end of an epoch are, since no others are read meanwhile.
    """
    count, spent = 0, 0.0
    while spent < least:
        loader = make_loader()
        ready = max(1, loader.num_workers * (loader.prefetch_factor or 0))
        if len(loader) <= 2 * ready:
            raise UserError(f"Expected more than {2 * ready} batches in --data to time the loader, got {len(loader)}.")
        began = time.perf_counter()
        for index, _ in enumerate(loader):
            if index == ready - 1:
                began = time.perf_counter()
            # Up to the last one that was read while others were.
            elif index >= ready and (index == len(loader) - ready or spent + time.perf_counter() - began > least):
                count, spent = count + index - ready + 1, spent + time.perf_counter() - began
                break
    return count / spent


def clip_shape(model: VideoAutoencoder) -> tuple[int, int, int, int]:
    """Return the shape (3, T, H, W) of the model's clips."""
    side = model.resolution or 224
    return (3, model.temporal.usual_length, side, side)


def has_bf16(device: str) -> bool:
    """Return whether a device has units for products in bf16; those of a CPU are known on Linux."""
    path = Path("/proc/cpuinfo")
    return not device.startswith("cpu") or (path.exists() and "bf16" in path.read_text())


def describe(args: argparse.Namespace) -> dict[str, Any]:
    """Return device, versions and commit."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    return {
        "device": device_name(args.device),
        "threads": torch.get_num_threads(),
        "commit": commit.stdout.strip() or "unknown",
        "versions": {"vidtwin": vidtwin.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "arguments": {key: str(value) for key, value in vars(args).items() if key != "compare" and value is not None},
    }


def describe_load(rows: list[Row], before: float) -> dict[str, Any]:
    """Return the largest share of the cores that others used, or else the load before, and whether it was little."""
    found = [row["others"] for row in rows if row.get("others") is not None]
    load = max(found, default=before)
    return {"load_per_core": load, "idle": load < IDLE}


def format_table(rows: list[Row]) -> str:
    """Format a line per part."""

    def cell(row: Row, key: str, form: Callable[[Any], str]) -> str:
        return form(row[key]) if row.get(key) is not None else ""

    header = ["part", "precision", "TFLOPs", "seconds (range)", "clips/s", "share of products", "peak (GB)", "waiting"]
    header.append("others")
    lines = [
        [
            row["part"] + (", compiled" if row.get("compiled") else ""),
            row["precision"],
            cell(row, "flops", lambda value: f"{value / 1e12:.3g}"),
            cell(row, "seconds", lambda value: f"{value['median']:.3g} ({value['min']:.3g} to {value['max']:.3g})"),
            cell(row, "clips_per_second", lambda value: f"{value:.3g}"),
            cell(row, "share", lambda value: f"{value:.0%}"),
            cell(row, "peak_bytes", lambda value: f"{value / 1e9:.2f}"),
            cell(row, "waiting", lambda value: f"{value:.1%}"),
            cell(row, "others", lambda value: f"{value:.0%}"),
        ]
        for row in rows
    ]
    return as_markdown(header, lines)


def format_kinds(rows: list[Row]) -> str:
    """Format the kinds of operations that encoding and decoding spend their time on; empty if neither was measured."""
    found = [row for row in rows if "kinds" in row]
    if not found:
        return ""
    header = ["kind of operation", *(f"{row['part']}, {row['precision']}" for row in found)]
    lines = [[kind, *(f"{row['kinds'][kind]:.1%}" for row in found)] for kind in found[0]["kinds"]]
    return as_markdown(header, lines) + "\n\n"


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
        f"{path}: not idle, a load of {file['load_per_core']:.2f} per core by others"
        for path, file in zip((before, after), files, strict=True)
        if not file["idle"]
    ]
    if files[0]["device"] != files[1]["device"]:
        warnings.append(f"Devices differ: {files[0]['device']} and {files[1]['device']}; compare shares alone.")
    return "\n".join([table, *warnings])


def compiled_or_plain(args: argparse.Namespace, measure: Callable[[argparse.Namespace], Row]) -> Row:
    """Measure a part, without compilation if the compiler fails: it needs memory and a C++ compiler of its own."""
    try:
        return measure(args)
    except COMPILER_ERRORS as error:
        reason = " ".join(str(error).split())[:200]
    sys.stderr.write(f"The next line was measured without compilation, which failed: {reason}\n")
    return measure(argparse.Namespace(**{**vars(args), "compile": False}))


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Measure all parts → the content of --out."""
    unknown = set(args.parts) - {"encode", "decode", "loader", *STEPS}
    if unknown:
        raise SystemExit(f"Expected parts among encode, decode, loader, {', '.join(STEPS)}, got {', '.join(unknown)}.")
    rows: list[Row] = []
    content = describe(args) | {"rows": rows, "left_out": []}
    load = os.getloadavg()[0] / (os.cpu_count() or 1)
    build, began = read_autoencoder(args), time.monotonic()
    coder = cache(build)
    precisions = [name for name in args.precisions if name == "fp32" or has_bf16(args.device)]
    for name in set(args.precisions) - set(precisions):
        content["left_out"].append(f"{name}: no units for it on this CPU")
    for part in args.parts:
        if part not in ("encode", "decode"):
            coder.cache_clear()
        if part == "loader" and not args.data:
            content["left_out"].append("loader: no --data")
            continue
        for precision in precisions[-1:] if part == "loader" else precisions:
            if time.monotonic() - began > 60 * args.minutes:
                content["left_out"].append(f"{part}, {precision}: no time left")
                continue
            try:
                if part == "loader":
                    rows += measure_loader(args, build, precision)
                elif part in STEPS:
                    step = partial(measure_step, build=build, part=part, precision=precision)
                    rows.append(compiled_or_plain(args, step))
                else:
                    coding = partial(measure_coding, model=coder(), part=part, name=precision)
                    rows.append(compiled_or_plain(args, coding))
            except (UserError, torch.OutOfMemoryError, *COMPILER_ERRORS) as error:  # the other lines count
                reason = " ".join(str(error).split())[:200].removesuffix(".")
                content["left_out"].append(f"{part}, {precision}: {reason}")
    return content | describe_load(rows, load)


def main(argv: list[str]) -> None:
    args = parse(argv)
    if args.compare:
        sys.stdout.write(compare(*args.compare) + "\n")
        return
    content = run(args)
    write_text(args.out, json.dumps(content, indent=1) + "\n")
    sys.stdout.write(f"{content['device']}, {content['threads']} threads, commit {content['commit']}\n")
    if not content["idle"]:
        sys.stdout.write(f"The machine was not idle: a load of {content['load_per_core']:.2f} per core by others.\n")
    sys.stdout.write(f"\n{format_table(content['rows'])}\n\n{format_kinds(content['rows'])}")
    sys.stdout.write("".join(f"Left out: {line}.\n" for line in content["left_out"]) + f"-> {args.out}\n")


if __name__ == "__main__":
    main(sys.argv[1:])
