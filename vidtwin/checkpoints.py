"""Checkpoints that are whole or not there, and that run no code when they are read.

A checkpoint of ours holds, beside what Lightning stores, `model_spec`: the autoencoder's class path and arguments, from
which a command without a config rebuilds it.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from vidtwin import weights
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.files import replacing

PREFIX = "autoencoder."


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target and moves over it; Lightning's own goes through memory and another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        with replacing(path) as temporary:
            torch.save(checkpoint, temporary)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return read(path)

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


def read(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises `UserError` for one that is absent, cut off or holds pickled objects."""
    checkpoint = weights.read(path, lazily)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"Expected a checkpoint written by `vidtwin fit`, got {path} without a state_dict.")
    return checkpoint


def model_spec(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """The `model_spec` of a checkpoint: `{"class_path": str, "init_args": dict}`."""
    spec = checkpoint.get("model_spec")
    if not isinstance(spec, dict) or "class_path" not in spec:
        raise UserError(
            f"Expected model_spec in {path}, which was not written by `vidtwin fit`; give its --config too."
        )
    return spec


def build(spec: dict[str, Any]) -> VideoAutoencoder:
    """Build the autoencoder of a spec. Only a subclass of `VideoAutoencoder` is called."""
    module, _, name = spec["class_path"].rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"Expected the class {spec['class_path']} to be installed: {error}.") from error
    if not (isinstance(cls, type) and issubclass(cls, VideoAutoencoder)):
        raise UserError(f"Expected a VideoAutoencoder, got {spec['class_path']}.")
    try:
        return cls(**spec.get("init_args", {}))
    except TypeError as error:
        raise UserError(f"Expected arguments of {spec['class_path']}, got others: {error}.") from error


def load_autoencoder(path: str | Path) -> VideoAutoencoder:
    """Rebuild the autoencoder that a checkpoint holds, with its weights, in evaluation mode."""
    checkpoint = read(path)
    model = build(model_spec(checkpoint, path))
    _load(model, checkpoint, path)
    return model.eval()


def load_weights(model: VideoAutoencoder, path: str | Path) -> None:
    """Load the autoencoder's weights from a checkpoint of the same size; `UserError` says how another one differs."""
    _load(model, read(path), path)


def _load(model: VideoAutoencoder, checkpoint: dict[str, Any], path: str | Path) -> None:
    state = autoencoder_weights(checkpoint["state_dict"])
    weights.check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)


def autoencoder_weights(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The autoencoder's part of a task's state dict, without the prefix."""
    return {name.removeprefix(PREFIX): value for name, value in state_dict.items() if name.startswith(PREFIX)}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Where two specs differ, a line each: `depth: 16 in the config, 2 in the checkpoint`."""
    if first["class_path"] != second["class_path"]:
        return [f"class_path: {first['class_path']} in the config, {second['class_path']} in the checkpoint"]
    ours, theirs = first.get("init_args", {}), second.get("init_args", {})
    return [
        f"{key}: {ours.get(key)} in the config, {theirs.get(key)} in the checkpoint"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
