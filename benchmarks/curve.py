"""Plot a run's PSNR on held-out clips beside two references: their mean colour and their temporal mean.

    python benchmarks/curve.py runs/ucf_like docs/images/ucf_like_psnr.png

Reads the run's TensorBoard file and config, and measures the references on the run's validation clips.
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from vidtwin import plugins
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.metrics.frames import psnr


def build_data(config: dict) -> ClipDataModule:
    """Build the data module of a run's config.yaml."""
    data = config["data"]
    name = data["class_path"].rpartition(".")[2].lower()
    return plugins.load(name, "vidtwin.datamodules")(**data["init_args"])


def measure_references(data: ClipDataModule) -> dict[str, float]:
    """Return the PSNR (dB) of the mean colour and the temporal mean over the validation clips."""
    data.setup("validate")
    sums: dict[str, list[torch.Tensor]] = {"mean_colour": [], "temporal_mean": []}
    for batch in data.val_dataloader():
        clip = data.on_after_batch_transfer(batch, 0)["clip"]
        for name, values in sums.items():
            model = plugins.load(name, "vidtwin.autoencoders")(clip.shape[2], clip.shape[3]).eval()
            values.append(psnr(model(clip).clip, clip).mean(1))
    return {name: float(torch.cat(values).mean()) for name, values in sums.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    events = EventAccumulator(str(arguments.run))
    events.Reload()
    points = [(event.step, event.value) for event in events.Scalars("val/psnr")]
    lines = measure_references(build_data(yaml.safe_load((arguments.run / "config.yaml").read_text())))

    figure, axes = plt.subplots(figsize=(6, 3.6), layout="constrained")
    axes.plot(*zip(*points, strict=True), marker="o", label="VidTwin")
    for (name, value), style in zip(lines.items(), ("--", ":"), strict=True):
        axes.axhline(value, color="gray", linestyle=style, label=f"{name.replace('_', ' ')}: {value:.2f} dB")
    axes.set(xlabel="steps", ylabel="PSNR of held-out clips (dB)")
    axes.legend()
    axes.grid(alpha=0.3)
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(arguments.out, dpi=110)
    print(points, lines)


if __name__ == "__main__":
    main()
