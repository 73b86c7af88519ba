"""Read diffusion models from checkpoints of `vidtwin fit`.

A checkpoint of `DiffusionTask` has no `model_spec`, but `diffusion`: the model's spec, and where its latents come from.

    latent_shapes, num_classes, process, transformer    `LatentDiffusion.spec()`
    classes, num_frames, size, fps                      of the clips
    autoencoder                                         class_path, weights_sha256, checkpoint, use_ema, config
    guidance, steps                                     of sampling
"""

import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidtwin import plugins, weights
from vidtwin.diffusion.model import LatentDiffusion, build
from vidtwin.errors import UserError, few
from vidtwin.storage import checkpoints

KEY = "diffusion"
PREFIX = "denoiser."
_TABLES = ("kinds", "classes.weight")  # a row for each latent, and for each class


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


def load_part(model: LatentDiffusion, classes: Sequence[str], path: str | Path) -> list[str]:
    """Load the weights that fit from another diffusion model, the averaged ones if there are any.

    Layers of latents are matched by the latents' names, classes by theirs. The scale of the latents is not taken, since
    it is that of the data.

    Args:
        model: Changed in place.
        classes: Names of its classes.
        path: A checkpoint of `vidtwin fit` with a `DiffusionTask`.

    Returns:
        Lines of a report.

    Raises:
        UserError: Less than a quarter of the transformer's numbers would come from the file.
    """
    other, held = load(path)
    own, given = model.transformer.state_dict(), other.transformer.state_dict()
    found = {name: given[source] for name in own if (source := _source(name, model, other)) in given}
    kept = {name: value for name, value in found.items() if value.shape == own[name].shape and name not in _TABLES}
    rows: dict[str, tuple[list[Any], list[Any]]] = {
        "kinds": ([*model.latent_shapes], [*other.latent_shapes]),
        "classes.weight": ([*classes, None], [*held["classes"], None]),  # the last is that of no class
    }
    taken = {}
    for name, (ours, theirs) in rows.items():
        table = own[name].clone()
        same = [key for key in ours if key in theirs] if table.shape[1:] == given[name].shape[1:] else []
        for key in same:
            table[ours.index(key)] = given[name][theirs.index(key)]
        kept[name], taken[name] = table, len(same)
    width = sum(own[name][0].numel() * (len(own[name]) - taken[name]) for name in rows)
    share = (sum(value.numel() for value in kept.values()) - width) / sum(value.numel() for value in own.values())
    if share < checkpoints.LEAST_SHARE:
        raise UserError(
            f"Expected a diffusion model of like sizes in {path}, got {share:.1%} of the transformer's numbers; its "
            f"sizes are {held['transformer']}."
        )
    model.transformer.load_state_dict(kept, strict=False)
    lines = [
        f"{len(kept)} of {len(own)} tensors, {'averaged' if held['use_ema'] else 'not averaged'}",
        f"{max(taken['classes.weight'] - 1, 0)} of {len(classes)} classes",
    ]
    fresh = [name for name in own if name not in kept]
    if fresh:
        lines.append(f"fresh: {few(fresh)}")
    if other.process.spec() != model.process.spec():
        lines.append(f"another process: {other.process.spec()} there, {model.process.spec()} here")
    return lines


def _source(name: str, model: LatentDiffusion, other: LatentDiffusion) -> str:
    """Return the name in another model of a tensor of the transformer: layers of latents have the latent's number."""
    if not (match := re.fullmatch(r"(tokens\.(?:embeddings|heads)\.)(\d+)(\..*)", name)):
        return name
    latent, theirs = list(model.latent_shapes)[int(match[2])], list(other.latent_shapes)
    return f"{match[1]}{theirs.index(latent)}{match[3]}" if latent in theirs else ""


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
