"""Helpers of the experiments: run trainings by the command line and read their logs."""

import subprocess
import sys
from pathlib import Path

import matplotlib.pyplot as plt
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

# The real clips to overfit: a street, a face in a car, a kitchen, a pitcher.
CLIPS = ("bikes.mp4", "carphone_pristine.mp4", "flipping_a_pancake.mkv", "v_BaseballPitch_g01_c01.avi")
Curves = dict[str, list[tuple[int, float]]]


def link_clips(clips: Path) -> Path:
    """Link the four clips into a folder as both training and validation split → the folder."""
    folder = Path("runs/by_heart")
    for split in ("train", "val"):
        (folder / split).mkdir(parents=True, exist_ok=True)
        for name in CLIPS:
            link = folder / split / name
            link.unlink(missing_ok=True)
            link.symlink_to((clips / name).resolve())
    return folder


def data_options(folder: Path) -> list[str]:
    """Return options of `vidtwin fit` for a folder of `link_clips`."""
    return ["--data.root", str(folder), "--data.splits", "{train: train, val: val}"]


def fit(run: str, config: str, *options: str, env: dict[str, str] | None = None, quiet: bool = False) -> None:
    """Train in `runs/<run>`, or resume an interrupted training."""
    command = [sys.executable, "-m", "vidtwin", "fit", "--config", config, "--resume", "auto"]
    command += ["--trainer.logger.init_args.name", run, *options]
    quiet_options = ["--trainer.enable_progress_bar", "false", "--trainer.enable_model_summary", "false"]
    subprocess.run([*command, *(quiet_options if quiet else [])], check=True, env=env)


def read_curves(run: str) -> tuple[Curves, float]:
    """Read the logged values of a run by name and step, and its duration in minutes; empty if there is no run."""
    if not (Path("runs") / run).is_dir():
        return {}, 0.0
    events = EventAccumulator(str(Path("runs") / run), size_guidance={"scalars": 0})
    events.Reload()
    scalars = {tag: events.Scalars(tag) for tag in events.Tags()["scalars"]}
    times = [event.wall_time for points in scalars.values() for event in points]
    logged = {tag: [(event.step, event.value) for event in points] for tag, points in scalars.items()}
    return logged, (max(times) - min(times)) / 60 if times else 0.0


def plot(axes: plt.Axes, logged: Curves, tags: dict[str, str], ylabel: str) -> None:
    """Plot logged values by their labels in the legend."""
    for tag, label in tags.items():
        if tag in logged:
            axes.plot(*zip(*logged[tag], strict=True), label=label, linewidth=1)
    axes.set(xlabel="steps", ylabel=ylabel)
    axes.legend(fontsize=8)
    axes.grid(alpha=0.3)


def as_markdown(header: list[str], rows: list[list[str]]) -> str:
    """Format a table with aligned columns, of which the first is text."""
    widths = [max(len(line[i]) for line in [header, *rows]) for i in range(len(header))]

    def line(cells: list[str]) -> str:
        padded = [c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(cells, widths, strict=True))]
        return f"| {' | '.join(padded)} |"

    rule = "|" + "|".join("-" * (w + 1) + ("-" if i == 0 else ":") for i, w in enumerate(widths)) + "|"
    return "\n".join([line(header), rule, *map(line, rows)])
