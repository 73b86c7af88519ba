"""A model, data and a trainer that take a moment, for tests that train."""

import math
import os
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from lightning.pytorch.callbacks import Callback
from torch.optim import AdamW

from vidtwin import plugins
from vidtwin.datamodules.clips import ClipDataset, Video
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.discriminator import PatchDiscriminator2d
from vidtwin.models.vidtwin import VidTwin
from vidtwin.schedules import WarmupCosine
from vidtwin.training.task import AutoencoderTask
from vidtwin.training.trainer import VideoTrainer


class SmoothClips(ClipDataset):
    """`count` smooth clips of 4 frames of 32 px; clip i of each epoch has another brightness."""

    def __init__(self, count: int) -> None:
        coarse = torch.rand(count, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
        self.clips = torch.nn.functional.interpolate(coarse, (4, 32, 32), mode="trilinear")

    def __len__(self) -> int:
        return len(self.clips)

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        frames = (self.clips[index] * (255 - 10 * (epoch % 5))).to(torch.uint8).permute(1, 2, 3, 0).numpy()
        name, start = self.identity(index)
        return {"clip": np.ascontiguousarray(frames), "label": index, "name": name, "start_frame": start}

    def identity(self, index: int) -> tuple[str, int]:
        return f"clip{index}.avi", 0


class Clips(ClipDataModule):
    """Six clips for training, validation and test, two a batch."""

    def __init__(
        self,
        count: int = 6,
        batch_size: int = 2,
        num_workers: int = 0,
        seed: int = 0,
        eval_batch_size: int | None = None,
    ) -> None:
        super().__init__(batch_size, eval_batch_size, num_workers, num_frames=4, resolution=32, fps=8.0, seed=seed)
        self.count = count

    def videos(self, split: str) -> list[Video]:
        return []

    def make_dataset(self, split: str) -> ClipDataset:
        return SmoothClips(self.count)

    def protocol(self) -> dict[str, Any]:
        return {"data": "SmoothClips", "num_clips": self.count}


class PoisonedClips(SmoothClips):
    """Clip 3 has no finite pixel."""

    def clip(self, epoch: int, index: int) -> dict[str, Any]:
        item = super().clip(epoch, index)
        frames = torch.from_numpy(item["clip"]).permute(3, 0, 1, 2).float() / 127.5 - 1
        return item | {"clip": (frames * math.nan if index == 3 else frames).numpy()}


class Poisoned(Clips):
    def make_dataset(self, split: str) -> SmoothClips:
        return PoisonedClips(self.count) if split == "train" else SmoothClips(self.count)


def tiny_model(**arguments: Any) -> VidTwin:
    sizes = {"num_frames": 4, "resolution": 32, "patch_size": 8, "hidden_size": 32, "depth": 1, "num_heads": 2}
    sizes |= {"num_queries": 2, "structure_width": 8, "query_size": 16, "qformer_depth": 1, "qformer_heads": 2}
    return VidTwin(**{**sizes, "qformer_intermediate_size": 16, **arguments})


def tiny_task(
    gan_start: int | None = None,
    warmup_steps: int = 2,
    model: dict[str, Any] | None = None,
    loss: dict[str, Any] | None = None,
    lr: float = 1e-3,
    **arguments: Any,
) -> AutoencoderTask:
    torch.manual_seed(0)
    gan = {} if gan_start is None else {"discriminator": PatchDiscriminator2d(channels=4, num_layers=1)}
    given = {"perceptual_weight": 0, "adversarial_start": gan_start or 0, **gan, **(loss or {})}
    defaults: dict[str, Any] = {
        "optimizer": lambda p: AdamW(p, lr=lr),
        "scheduler": lambda o: WarmupCosine(o, warmup_steps),
        "discriminator_optimizer": lambda p: AdamW(p, lr=lr),
        "discriminator_scheduler": lambda o: WarmupCosine(o, warmup_steps),
    }
    return AutoencoderTask(tiny_model(**(model or {})), AutoencoderLoss(**given), **(defaults | arguments))


# Arguments of the plug-in baselines on the same clips.
BASELINES: dict[str, dict[str, Any]] = {
    "magvit2": {"channels": 8, "multipliers": [1, 1, 2], "num_blocks": 1, "latent_channels": 6},
    "cmd": {"num_frames": 4, "resolution": 32, "patch_size": 8, "motion_channels": 4, "hidden_size": 16, "depth": 1}
    | {"num_heads": 2},
    "ivideogpt": {"resolution": 32, "inner_resolution": None, "attention_resolution": 16, "channels": [32, 32]}
    | {"layers_per_block": 1}
    | {"latent_channels": 8, "codebook_size": 16, "dynamics_codebook_size": 16, "norm_groups": 8},
    "wfvae": {"channels": 4, "encoder_flow_channels": 4, "decoder_flow_channels": 4, "num_blocks": 1},
    "odvae": {"release": "v1.1", "channels": 4, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "norm_groups": 1},
    "opensora": {"channels": [4, 4, 8], "num_blocks": 1, "frame_channels": [4] * 4, "frame_blocks": 1}
    | {"norm_groups": 1},
    "cvvae": {"channels": 4, "multipliers": [1, 1, 1, 1], "num_blocks": 1, "norm_groups": 1},
}


def baseline_task(name: str, model: dict[str, Any] | None = None, **arguments: Any) -> AutoencoderTask:
    """A baseline with the terms that it has."""
    torch.manual_seed(0)
    autoencoder = plugins.load(name, "vidtwin.autoencoders")(**BASELINES[name] | (model or {}))
    weights = {"commitment": 0.25, "codebook": 1.0, "entropy": 0.0}  # the entropy is one of a rank's own clips
    weights["wavelet"] = 0.1
    loss = AutoencoderLoss(perceptual_weight=0, regularization_weights=weights)
    defaults: dict[str, Any] = {
        "optimizer": lambda p: AdamW(p, lr=1e-3),
        "scheduler": lambda o: WarmupCosine(o, 2),
    }
    return AutoencoderTask(autoencoder, loss, **(defaults | arguments))


def trainer(folder: Path, max_steps: int = 7, **arguments: Any) -> VideoTrainer:
    quiet = {"enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return VideoTrainer(
        **{"accelerator": "cpu", "max_steps": max_steps, "default_root_dir": folder, **quiet, **arguments}
    )


class Terminate(Callback):
    """End a training by a signal as a scheduler does: at a step, or with `hook` at another moment."""

    def __init__(self, at: int = 0, hook: str = "on_train_batch_start", number: int = 15) -> None:
        self.at, self.number = at, number
        setattr(self, hook, self._end)

    def _end(self, trainer: Any, *rest: Any, **keywords: Any) -> None:
        if trainer.global_step == self.at:
            os.kill(os.getpid(), self.number)


def write_config(folder: Path, data: str = "tiny.Clips") -> Path:
    """A config of five steps for the command line, with runs in `folder/runs/tiny/version_*`."""
    content = {
        "model": {
            "autoencoder": {"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": tiny_model().init_args},
            "loss": {
                "class_path": "vidtwin.losses.autoencoder.AutoencoderLoss",
                "init_args": {"perceptual_weight": 0.0, "adversarial_weight": 0.0},
            },
            "scheduler": {"class_path": "vidtwin.schedules.WarmupCosine", "init_args": {"warmup_steps": 1}},
            "ema_decay": 0.9,
        },
        "data": {"class_path": data},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 5,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "logger": {
                "class_path": "lightning.pytorch.loggers.CSVLogger",
                "init_args": {"save_dir": str(folder / "runs"), "name": "tiny"},
            },
        },
        "latest_checkpoint": {"every_n_steps": 2},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return path
