"""Checkpoints of diffusion models that others may have written."""

import copy
from typing import Any

import pytest
import torch

from vidtwin.diffusion.model import LatentDiffusion
from vidtwin.diffusion.process import DDPM
from vidtwin.diffusion.transformer import TransformerSizes
from vidtwin.errors import UserError
from vidtwin.storage.diffusion import load


@pytest.fixture(scope="module")
def content() -> dict[str, Any]:
    """A checkpoint as `vidtwin fit` writes it, as far as it is read."""
    torch.manual_seed(0)
    model = LatentDiffusion({"z": (2, 3)}, 2, DDPM(), TransformerSizes(1, 8, 2, 4))
    autoencoder = {"class_path": "some.Model", "weights_sha256": "ab", "checkpoint": "x", "use_ema": False}
    clips = {"classes": ["a", "b"], "num_frames": 4, "size": [32, 32], "fps": 8.0}
    return {
        "state_dict": {f"denoiser.{name}": value for name, value in model.state_dict().items()},
        "diffusion": model.spec() | clips | {"autoencoder": autoencoder, "guidance": 5.0, "steps": 50},
        "pytorch-lightning_version": "2.0",
    }


def test_a_checkpoint_is_read(content, tmp_path):
    torch.save(content, tmp_path / "whole.ckpt")
    model, held = load(tmp_path / "whole.ckpt")
    assert (model.num_classes, held["guidance"], held["use_ema"]) == (2, 5.0, False)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("classes", None),
        ("classes", ["a"]),
        ("num_classes", "2"),
        ("latent_shapes", [1]),
        ("latent_shapes", {"z": "ab"}),
        ("transformer", {"depth": "1"}),
        ("transformer", 5),
        ("process", "DDPM"),
        ("process", {"class_path": "vidtwin.diffusion.process.DDPM", "init_args": {"beta_schedule": "no"}}),
        ("size", [32]),
        ("num_frames", 0),
        ("fps", None),
        ("guidance", float("nan")),
        ("steps", 1.5),
        ("autoencoder", {"class_path": "some.Model"}),
    ],
)
def test_a_damaged_description_is_one_line(content, tmp_path, key, value):
    changed = copy.deepcopy(content)
    changed["diffusion"][key] = value
    torch.save(changed, tmp_path / "damaged.ckpt")
    with pytest.raises(UserError, match=r"damaged\.ckpt, got a damaged description of one"):
        load(tmp_path / "damaged.ckpt")
    del changed["diffusion"][key]
    torch.save(changed, tmp_path / "missing.ckpt")
    with pytest.raises(UserError, match=r"missing\.ckpt, got a damaged description of one"):
        load(tmp_path / "missing.ckpt")
