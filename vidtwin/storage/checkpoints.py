"""Write checkpoints atomically and read them without running code.

Beside Lightning's entries a checkpoint holds `model_spec`: the autoencoder's class path and arguments, from which a
command without a config rebuilds it. A folder of `save_pretrained` and `hf://owner/name` (vidtwin/hub.py) are read as
checkpoints of the weights alone.
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
from vidtwin.autoencoder import VideoAutoencoder, build, complete
from vidtwin.errors import UserError
from vidtwin.files import no_room, replacing

PREFIX = "autoencoder."
_STEP_FILE = re.compile(r"step-(\d{8,})\.ckpt")


class AtomicCheckpointIO(CheckpointIO):
    """Write to a temporary file beside the target and rename it; Lightning's plugin goes through memory."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None) -> None:
        # If torch opens the file itself, its errors hide the reason.
        with explain_full_disk(path), replacing(path) as temporary, temporary.open("wb") as file:
            torch.save(checkpoint, file)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        checkpoint = read(path)
        check(path)  # torch does not verify checksums
        return checkpoint

    def remove_checkpoint(self, path: str | Path) -> None:
        Path(path).unlink(missing_ok=True)


@contextmanager
def explain_full_disk(path: str | Path) -> Iterator[None]:
    """Turn the error of a full disk into a `UserError` that names the checkpoint to resume from."""
    try:
        yield
    except (OSError, RuntimeError) as error:
        reason = no_room(error)
        if reason is None:
            raise
        before = newest(Path(path).parent, report=lambda _: None)
        intact = f"; {before} is intact" if before else ""
        raise UserError(
            f"Expected room to write {path}, got {reason!r}{intact}. Free space and continue with --resume auto."
        ) from error


def step_path(folder: str | Path, step: int) -> Path:
    """Return the path of a step's checkpoint: `step-00001000.ckpt`."""
    return Path(folder) / f"step-{step:08d}.ckpt"


def step_files(folder: str | Path) -> dict[int, Path]:
    """Return the `step-*.ckpt` files of a folder by step, newest first."""
    folder = Path(folder)
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    found = {int(match[1]): folder / match[0] for name in names if (match := _STEP_FILE.fullmatch(name))}
    return dict(sorted(found.items(), reverse=True))


def step_of(path: Path) -> int:
    """Return the step in the name of a `step-*.ckpt`."""
    match = _STEP_FILE.fullmatch(path.name)
    assert match is not None
    return int(match[1])


def is_checkpoint_name(name: str) -> bool:
    """Return whether a file name is one of a training's checkpoints."""
    return name in ("last.ckpt", "best.ckpt") or _STEP_FILE.fullmatch(name) is not None


def candidates(folder: str | Path) -> list[Path]:
    """List the existing ones of `last.ckpt`, `step-*.ckpt` (newest first) and `best.ckpt`, intact or not."""
    named = [Path(folder) / "last.ckpt", *step_files(folder).values(), Path(folder) / "best.ckpt"]
    return [path for path in named if path.exists() or path.is_symlink()]


def newest(folder: str | Path, report: Callable[[str], object] = warnings.warn) -> Path | None:
    """Return the intact checkpoint of the most steps in a folder, if there is one; `report` the damaged ones.

    Intact means that all checksums match. Of equal steps the target of `last.ckpt` is taken. `best.ckpt` comes last,
    since it may be from before a rollback.
    """
    # Links are resolved: a target keeps its content, while last.ckpt is moved to the next checkpoint.
    files = {path.resolve(): path for path in candidates(folder)}
    return next(_select_intact(files.values(), report), None)


def history(folder: str | Path, report: Callable[[str], object] = warnings.warn) -> list[Path]:
    """List the intact `step-*.ckpt` of a folder, newest first; `report` the damaged ones."""
    return list(_select_intact(step_files(folder).values(), report))


def _select_intact(paths: Iterable[Path], report: Callable[[str], object]) -> Iterator[Path]:
    """Yield the intact checkpoints, that of the most steps first, best.ckpt last; each is verified when it is due."""
    steps = {}
    for path in paths:
        try:
            steps[path] = _read_step(path)
        except UserError as error:
            report(f"skipped: {error}")
    for path in sorted(steps, key=lambda path: (path.name == "best.ckpt", -steps[path])):
        try:
            check(path)
        except UserError as error:
            report(f"skipped: {error}")
        else:
            yield path


def _read_step(path: Path) -> int:
    step = read(path, lazily=True).get("global_step")
    if not isinstance(step, int):
        raise UserError(f"Expected a checkpoint written by `vidtwin fit`, got {path} without its global_step.")
    return step


def check(path: str | Path) -> None:
    """Raise `UserError` unless all checksums match; torch does not verify them."""
    if hub.is_pretrained(path):
        _read_pretrained(path, check=True)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
    except Exception as error:  # damaged headers raise many kinds
        raise UserError(f"Expected an intact checkpoint, got {path}: it is damaged or cut off ({error}).") from error
    if damaged is not None:
        raise UserError(f"Expected an intact checkpoint, got {path}: it is damaged (checksum of {damaged}).")


def read(path: str | Path, lazily: bool = False) -> dict[str, Any]:
    """Read a checkpoint onto the CPU, or the autoencoder's entries of one from weights in another form.

    Args:
        path: A checkpoint, a folder of `save_pretrained`, or `hf://owner/name[@revision]`.
        lazily: Map the tensors into memory instead of reading them.

    Raises:
        UserError: It is missing or cut off, or it holds pickled objects.
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
        "pytorch-lightning_version": lightning.__version__,  # required by Lightning
    }


def load_autoencoder(path: str | Path, ema: bool = False, trust_modules: Sequence[str] = ()) -> VideoAutoencoder:
    """Rebuild the autoencoder of a checkpoint in evaluation mode; with `ema` take the averaged weights.

    Its class is one of vidtwin, of an installed plug-in, or of a module that is imported already or in `trust_modules`.
    """
    checkpoint = read(path)
    with plugins.trusting(trust_modules):
        model = build(model_spec(checkpoint, path))
    _load(model, checkpoint, path, ema)
    return model.eval()


def load_weights(model: VideoAutoencoder, path: str | Path, ema: bool = False) -> None:
    """Load the autoencoder's weights from a checkpoint; raise `UserError` if its tensors differ in name or shape."""
    _load(model, read(path), path, ema)


def load_part(model: VideoAutoencoder, path: str | Path) -> list[str]:
    """Load the weights that fit from another training's autoencoder, the averaged ones if there are any.

    Accepts a checkpoint of `vidtwin fit`, a file of an autoencoder's weights alone, a folder of `save_pretrained` or
    `hf://owner/name`. Discriminator, optimizers and steps are ignored.

    Returns:
        A line per tensor of the model that keeps its initial values, and per tensor of the file that was not used.
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
        f"skipped {name} of another shape: {tuple(held[name].shape)} there, {tuple(own[name].shape)} here"
        for name in own
        if name in held and name not in fitting
    ]


def _load(model: VideoAutoencoder, checkpoint: dict[str, Any], path: str | Path, ema: bool) -> None:
    state = autoencoder_weights(checkpoint, ema)
    weights.check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)


def autoencoder_weights(checkpoint: dict[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """Return the autoencoder's weights in a checkpoint, without the prefix; with `ema` the averaged ones."""
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
    """Replace all weights of a checkpoint except its autoencoder's by those of `own`.

    Args:
        checkpoint: Changed in place.
        own: State of the task that will load it.
        ema: Take the averaged weights.

    Raises:
        UserError: Its autoencoder is another one.
    """
    wanted = {name.removeprefix(PREFIX): value for name, value in own.items() if name.startswith(PREFIX)}
    weights.check_fit(autoencoder_weights(checkpoint), wanted, "The checkpoint")
    kept = autoencoder_weights(checkpoint, ema)
    checkpoint["state_dict"] = own | {f"{PREFIX}{name}": value for name, value in kept.items()}


def check_resumable(checkpoint: dict[str, Any], own: dict[str, Tensor], trained: int) -> None:
    """Raise `UserError` unless a training with the state `own` and `trained` trained tensors can resume from it."""
    if "optimizer_states" not in checkpoint:
        raise UserError(
            "Expected a checkpoint of a training to resume, got weights alone; --init_from starts a new training."
        )
    try:
        weights.check_fit(checkpoint["state_dict"], own, "The checkpoint")
    except UserError as error:
        raise UserError(f"{error} --init_from starts a new training with the weights that fit.") from error
    held = sum(len(group["params"]) for group in checkpoint["optimizer_states"][0]["param_groups"])
    if held != trained:
        raise UserError(
            f"Expected a checkpoint that trained the same {trained} tensors, got one of {held}: another model.freeze; "
            "--init_from starts a new training from it."
        )


def differences(first: dict[str, Any], second: dict[str, Any]) -> list[str]:
    """List the differences of two specs, a line each: `depth: 16 in the config, 2 in the checkpoint`."""
    if first["class_path"] != second["class_path"]:
        return [f"class_path: {first['class_path']} in the config, {second['class_path']} in the checkpoint"]
    # A stored spec has lists instead of the tuples that a parser makes.
    ours, theirs = (
        {key: list(value) if isinstance(value, tuple) else value for key, value in complete(spec).items()}
        for spec in (first, second)
    )
    return [
        f"{key}: {ours.get(key)} in the config, {theirs.get(key)} in the checkpoint"
        for key in sorted({*ours, *theirs})
        if ours.get(key) != theirs.get(key)
    ]
