"""Videos of two classes, their latents by an untrained VidTwin, and a diffusion model that trains in a moment."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny import tiny_model
from torch.optim import Adam

from vidtwin.cli import main
from vidtwin.datamodules.latents import LatentDataModule
from vidtwin.diffusion.transformer import TransformerSizes
from vidtwin.schedules import WarmupCosine
from vidtwin.training.diffusion import DiffusionTask
from vidtwin.video import write_video

CLASSES = ("Falling", "Rising")
SIZES = {"depth": 1, "width": 16, "heads": 2, "class_width": 8}
QUIET = ("--accelerator", "cpu", "--progress", "false")


def write_videos(folder: Path, each: int = 3, length: int = 8, names: Sequence[str] = CLASSES) -> Path:
    """Write `each` videos of `length` frames in each of two class folders."""
    random = np.random.default_rng(0)
    for label, name in enumerate(names):
        for number in range(each):
            base = 60 + 100 * label + random.integers(0, 20)
            frames = np.full((length, 32, 32, 3), base, np.uint8)
            frames[:, 8 * label : 8 * label + 16] += np.arange(length, dtype=np.uint8)[:, None, None, None] * 3
            write_video(folder / name / f"v{number}.mp4", frames, 8)
    return folder


def write_latents(
    folder: Path,
    seed: int = 0,
    model: Any = None,
    length: int = 8,
    names: Sequence[str] = CLASSES,
    **arguments: str,
) -> Path:
    """Write `folder/model`, an untrained VidTwin, and `folder/latents` of the videos by it."""
    torch.manual_seed(seed)
    (model or tiny_model()).save_pretrained(folder / "model")
    write_videos(folder / "videos", length=length, names=names)
    words = [word for name, value in arguments.items() for word in (f"--{name}", value)]
    given = ["encode", str(folder / "videos"), "--ckpt_path", str(folder / "model"), "--labels", "folders"]
    assert main([*given, "--out", str(folder / "latents"), *QUIET, *words]) == 0
    return folder / "latents"


def tiny_diffusion(steps: int = 2, **arguments: Any) -> DiffusionTask:
    torch.manual_seed(0)
    defaults: dict[str, Any] = {
        "transformer": TransformerSizes(**SIZES),
        "sampling_steps": steps,
        "optimizer": lambda p: Adam(p, lr=1e-3),
        "scheduler": lambda o: WarmupCosine(o, 0),
    }
    return DiffusionTask(**(defaults | arguments))


def latent_data(folder: Path, **arguments: Any) -> LatentDataModule:
    return LatentDataModule(str(folder), **{"num_workers": 0, "batch_size": 2, **arguments})
