"""Read diffusion models from checkpoints of `vidtwin fit`.

A checkpoint of `DiffusionTask` has no `model_spec`, but `diffusion`: the model's spec, and where its latents come from.

    latent_shapes, num_classes, process, transformer    `LatentDiffusion.spec()`
    classes, num_frames, size, fps                      of the clips
    autoencoder                                         class_path, weights_sha256, checkpoint, use_ema, config
    guidance, steps                                     of sampling
"""

import math
from pathlib import Path
from typing import Any

from vidtwin import plugins, weights
from vidtwin.diffusion.model import LatentDiffusion, build
from vidtwin.errors import UserError
from vidtwin.storage import checkpoints

KEY = "diffusion"
PREFIX = "denoiser."


def load(path: str | Path, use_ema: bool | None = None) -> tuple[LatentDiffusion, dict[str, Any]]:
    """Rebuild the diffusion model of a checkpoint in evaluation mode → the model, and the checkpoint's `diffusion`.

    Args:
        path: A checkpoint of `vidtwin fit` with a `DiffusionTask`.
        use_ema: Take the averaged weights; None: if there are any.
    """
    checkpoint = checkpoints.read(path)
    held = describe(checkpoint, path)
    try:
        model = build(held)
        model.process.check_steps(held["steps"])
    except (KeyError, TypeError, ValueError, NotImplementedError) as error:
        if isinstance(error, UserError):
            raise
        raise _damaged(path, error) from error
    averaged = "ema" in checkpoint if use_ema is None else use_ema
    state = checkpoints.network_weights(checkpoint, PREFIX, averaged)
    weights.check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)
    return model.eval(), held | {"use_ema": averaged}


def describe(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return a checkpoint's `diffusion`; raise `UserError` for that of an autoencoder, or with a class not trusted."""
    held = checkpoint.get(KEY)
    if not isinstance(held, dict):
        what = "one of an autoencoder" if "model_spec" in checkpoint else "another file"
        raise UserError(
            f"Expected a checkpoint of a diffusion model, got {what} at {path}; train one by vidtwin fit --config "
            "configs/diffusion/vidtwin_ucf101.yaml."
        )
    plugins.check_trusted(held.get("process"), path)
    try:
        _check(held)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise _damaged(path, error) from None
    return held


def _check(held: dict[str, Any]) -> None:
    """Raise `KeyError`, `TypeError`, `ValueError` or `AttributeError` for entries that `vidtwin fit` does not write."""
    autoencoder, classes = held["autoencoder"], held["classes"]
    texts = [*classes, autoencoder["class_path"], autoencoder["weights_sha256"], held["process"]["class_path"]]
    counts = [held["num_frames"], *held["size"], held["steps"], *(n for s in held["latent_shapes"].values() for n in s)]
    if not all(isinstance(text, str) for text in texts):
        raise TypeError("expected texts")
    if not all(isinstance(count, int) and count > 0 for count in counts) or len(held["size"]) != 2:
        raise ValueError("expected counts")
    if not (math.isfinite(held["guidance"]) and held["fps"] > 0) or held["num_classes"] != len(classes):
        raise ValueError("expected a guidance, a rate and a number of classes")


def _damaged(path: str | Path, error: Exception) -> UserError:
    return UserError(f"Expected a diffusion model in {path}, got a damaged description of one ({error!r}).")
