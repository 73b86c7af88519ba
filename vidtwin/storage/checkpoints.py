"""Checkpoints that are whole or not there, and that run no code when they are read.

A checkpoint of ours holds, beside what Lightning stores, `model_spec`: the autoencoder's class path and arguments, from
which a command without a config rebuilds it. A folder of `save_pretrained` and `hf://owner/name` (vidtwin/hub.py) are
read as checkpoints of the weights alone.
"""

import re
import warnings
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from vidtwin import hub, plugins, weights
from vidtwin.autoencoder import VideoAutoencoder, build
from vidtwin.errors import UserError
from vidtwin.files import no_room, replacing

PREFIX = "autoencoder."
_STEP_FILE = re.compile(r"step-(\d{8,})\.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Writes beside the target and moves over it; Lightning's own goes through memory and another file system."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # torch hides why a write failed when it opens the file itself.
        with explaining_a_full_disk(path), replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = read(path)
        check(path)  # torch takes in flipped bytes without a word
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


@contextmanager
def explaining_a_full_disk(path: str | Path) -> Iterator[None]:
    """Turn a write of `path` that fails for want of room into a `UserError` that names the checkpoint to go on from."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = no_room(error)
        if reason is None:
            raise
        before = newest(Path(path).parent, report=lambda _: None)
        whole = f"; {before} is whole" if before else ""
        raise UserError(
            f"Expected room to write {path}, got {reason!r}{whole}. Free space and go on with --resume auto."
        ) from error


def step_path(folder: str | Path, step: int) -> Path:
    """`step-00001000.ckpt`."""
    return Path(folder) / f"step-{step:08d}.ckpt"


def step_files(folder: str | Path) -> dict[int, Path]:
    """The files of a folder that are named after a step, newest first. What else lies there is not ours."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {int(match[1]): folder / match[0] for name in names if (match := _STEP_FILE.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


def step_of(path: Path) -> int:
    """The step in the name of a `step-*.ckpt`."""
    match = _STEP_FILE.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def is_checkpoint_name(name: str) -> bool:
    """Whether training names its checkpoints so."""
    return name in ("last.ckpt", "best.ckpt") or _STEP_FILE.fullmatch(name) is not None


def candidates(folder: str | Path) -> list[Path]:
    """`last.ckpt`, `step-*.ckpt` (newest first) and `best.ckpt`, as far as they are there, whole or not."""
    named = [Path(folder) / "last.ckpt", *step_files(folder).values(), Path(folder) / "best.ckpt"]
    return [path for path in named if path.exists() or path.is_symlink()]


def newest(folder: str | Path, report: Callable[[str], object] = warnings.warn) -> Path | None:
    """The whole checkpoint of the most steps in a folder, or None; damaged ones are named to `report`.

    Whole means that the checksum of every byte is right. Of equal steps it is the one that `last.ckpt` points at.
    `best.ckpt` comes last: it may be from before a rollback.
    """
    # One entry a file: in the place of last.ckpt, but under the name of what it points at, which does not move on.
    files = {path.resolve(): path for path in candidates(folder)}
    return next(_whole(files.values(), report), None)


def history(folder: str | Path, report: Callable[[str], object] = warnings.warn) -> list[Path]:
    """All whole `step-*.ckpt` of a folder, newest first; damaged ones are named to `report`."""
    return list(_whole(step_files(folder).values(), report))


def _whole(paths: Iterable[Path], report: Callable[[str], object]) -> Iterator[Path]:
    """Those that are whole, the one of the most steps first, the best last. Reads no more than is asked."""
    steps = {}
    for path in paths:
        try:
            steps[path] = _global_step(path)
        except UserError as error:
            report(f"passed over: {error}")
    for path in sorted(steps, key=lambda path: (path.name == "best.ckpt", -steps[path])):
        try:
            check(path)
        except UserError as error:
            report(f"passed over: {error}")
        else:
            yield path


def _global_step(path: Path) -> int:
    step = read(path, lazily=True).get("global_step")
    if not isinstance(step, int):
        raise UserError(f"Expected a checkpoint written by `vidtwin fit`, got {path} without its global_step.")
    return step


def check(path: str | Path) -> None:
    """Raise `UserError` unless all bytes have the checksum that was written with them; torch does not look at it."""
    if hub.is_pretrained(path):
        _read_pretrained(path, check=True)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # zipfile has many for headers that are damaged
        raise UserError(f"Expected a whole checkpoint, got {path}: it is damaged or cut off ({error}).") from error
    if damaged is not None:
        raise UserError(f"Expected a whole checkpoint, got {path}: it is damaged (checksum of {damaged}).")


def read(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU; raises `UserError` for one that is absent, cut off or holds pickled objects.

    Of a folder of `save_pretrained`, or of `hf://owner/name[@revision]`, it makes what a checkpoint holds of the
    autoencoder.
    """
    if hub.is_pretrained(path):
        return _read_pretrained(path, check=not lazily)
    checkpoint = weights.read(path, lazily)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"Expected a checkpoint written by `vidtwin fit`, got {path} without a state_dict.")
    return checkpoint


def model_spec(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the `model_spec` of a checkpoint, `{"class_path": str, "init_args": dict}`, if its class is trusted."""
    spec = checkpoint.get("model_spec")
    if not isinstance(spec, dict) or "class_path" not in spec:
        raise UserError(
            f"Expected model_spec in {path}, which was not written by `vidtwin fit`; give its --config too."
        )
    plugins.check_trusted(spec, path)
    return spec


def _read_pretrained(path: str | Path, check: bool) -> dict[str, Any]:
    folder = hub.fetch(path)
    config = hub.read_config(folder, path)
    state = hub.read_state(folder, config, check)
    return {
        "state_dict": {f"{PREFIX}{name}": value for name, value in state.items()},
        "model_spec": {key: config[key] for key in ("class_path", "init_args")},
        "pytorch-lightning_version": lightning.__version__,  # by which Lightning tells what it has to adapt
    }


def load_autoencoder(path: str | Path, ema: bool = False, trust_modules: Sequence[str] = ()) -> VideoAutoencoder:
    """Rebuild the autoencoder that a checkpoint holds, with its (or its averaged) weights, in evaluation mode.

    It is of a class of vidtwin, of an installed plug-in, or of a module that is imported already or in `trust_modules`.
    """
    checkpoint = read(path)
    with plugins.trusting(trust_modules):
        model = build(model_spec(checkpoint, path))
    _load(model, checkpoint, path, ema)
    return model.eval()


def load_weights(model: VideoAutoencoder, path: str | Path, ema: bool = False) -> None:
    """Load the autoencoder's weights from a checkpoint of the same size; `UserError` says how another one differs."""
    _load(model, read(path), path, ema)


def load_part(model: VideoAutoencoder, path: str | Path) -> list[str]:
    """Start from what fits of another training's autoencoder: its averaged weights where it has them.

    Takes a checkpoint of `vidtwin fit`, a file of an autoencoder's weights alone, a folder of `save_pretrained` or
    `hf://owner/name`. Discriminator, optimizers and steps stay behind.

    Returns:
        A line for each tensor of the model that keeps its initial values, and for each of the file that has no place.
    """
    held = read(path) if hub.is_pretrained(path) else weights.read(path)
    if not isinstance(held, dict):
        raise UserError(f"Expected weights by their names in {path}, got a {type(held).__name__}.")
    if "state_dict" in held:
        held = autoencoder_weights(held, ema="ema" in held)
    own = model.state_dict()
    fitting = {name: value for name, value in held.items() if name in own and value.shape == own[name].shape}
    if not fitting:
        raise UserError(
            f"Expected weights of {type(model).__name__} in {path}, got none that fits; it has "
            f"{', '.join([*map(str, held)][:3])}."
        )
    model.load_state_dict(fitting, strict=False)
    lines = [f"missing {name}" for name in own if name not in held]
    lines += [f"unexpected {name}" for name in held if name not in own]
    return lines + [
        f"left out, reshaped {name}: {tuple(held[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in held and name not in fitting
    ]


def _load(model: VideoAutoencoder, checkpoint: dict[str, Any], path: str | Path, ema: bool) -> None:
    state = autoencoder_weights(checkpoint, ema)
    weights.check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)


def autoencoder_weights(checkpoint: dict[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """The autoencoder's part of a checkpoint, without the prefix; with `ema` the averaged weights where there are."""
    state = checkpoint["state_dict"]
    own = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not ema:
        return own
    if "ema" not in checkpoint:
        raise UserError(
            "Expected a checkpoint with averaged weights (model.use_ema), got one without; it was trained without "
            "model.ema_decay."
        )
    return own | checkpoint["ema"]["values"]


def keep_autoencoder(checkpoint: dict[str, Any], own: dict[str, Tensor], ema: bool = False) -> None:
    """Reduce the weights of a checkpoint to its autoencoder's (or averaged ones); the rest become those of `own`.

    Args:
        checkpoint: Changed in place; `UserError` if its autoencoder is another one.
        own: State of the task that is to load it.
        ema: Take the averaged weights.
    """
    wanted = {name.removeprefix(PREFIX): value for name, value in own.items() if name.startswith(PREFIX)}
    weights.check_fit(autoencoder_weights(checkpoint), wanted, "The checkpoint")
    kept = autoencoder_weights(checkpoint, ema)
    checkpoint["state_dict"] = own | {f"{PREFIX}{name}": value for name, value in kept.items()}


def check_resumable(checkpoint: dict[str, Any], own: dict[str, Tensor], trained: int) -> None:
    """Raise `UserError` unless a training with the state `own` and `trained` trained tensors can resume from it."""
    if "optimizer_states" not in checkpoint:
        raise UserError(
            "Expected a checkpoint of a training to go on from, got weights alone; --init_from begins a new training."
        )
    try:
        weights.check_fit(checkpoint["state_dict"], own, "The checkpoint")
    except UserError as error:
        raise UserError(f"{error} --init_from begins a new training with what fits.") from error
    held = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    if held != trained:
        raise UserError(
            f"Expected a checkpoint that trained the same {trained} tensors, got one of {held}: another model.freeze; "
            "--init_from begins a new training from it."
        )


def _as_stored(arguments: dict[str, Any]) -> dict[str, Any]:
    """Tuples, which a parser makes by the signature, as the lists that a spec holds."""
    return {key: list(value) if isinstance(value, tuple) else value for key, value in arguments.items()}


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """Where two specs differ, a line each: `depth: 16 in the config, 2 in the checkpoint`."""
    if first["class_path"] != second["class_path"]:
        return [f"class_path: {first['class_path']} in the config, {second['class_path']} in the checkpoint"]
    ours, theirs = (_as_stored(spec.get("init_args", {})) for spec in (first, second))
    return [
        f"{key}: {ours.get(key)} in the config, {theirs.get(key)} in the checkpoint"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
