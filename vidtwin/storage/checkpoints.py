"""Write checkpoints atomically and read them without running code.

Beside Lightning's entries a checkpoint holds `model_spec`: the autoencoder's class path and arguments, from which a
command without a config rebuilds it. A folder of `save_pretrained` and `hf://owner/name` (vidtwin/hub.py) are read as
checkpoints of the weights alone.
"""

import re
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import lightning
import torch
from lightning.fabric.plugins.io.checkpoint_io import CheckpointIO
from torch import Tensor

from vidtwin import console, hub, plugins, weights
from vidtwin.autoencoder import VideoAutoencoder, build, complete
from vidtwin.errors import UserError, few
from vidtwin.files import no_room, replacing
from vidtwin.models import official, resizing
from vidtwin.models.vidtwin import VidTwin

PREFIX = "autoencoder."
_FORMS = "a checkpoint, a folder of weights or hf://owner/name"
# Arguments that matter for initial values and memory alone.
_INITIAL_ONLY = ("initialization", "activation_checkpointing")
LEAST_SHARE = 0.25  # of a model's numbers, in weights to start from
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
    checkpoint = weights.read(path, lazily, _FORMS)
    if not isinstance(checkpoint, dict) or "state_dict" not in checkpoint:
        raise UserError(f"Expected a checkpoint written by `vidtwin fit`, got {path} without a state_dict.")
    return checkpoint


def model_spec(checkpoint: dict[str, Any], path: str | Path) -> dict[str, Any]:
    """Return the `model_spec` of a checkpoint, `{"class_path": str, "init_args": dict}`, if its class is trusted."""
    spec = checkpoint.get("model_spec")
    if spec is None and "diffusion" in checkpoint:
        raise UserError(
            f"Expected the checkpoint of an autoencoder, got that of a diffusion model at {path}; `vidtwin generate` "
            "samples from it."
        )
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
        "teacher": (config.get("training") or {}).get("teacher"),  # who trains a decoder alone trains no encoder
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


def load_weights(
    model: VideoAutoencoder, path: str | Path, ema: bool = False, checkpoint: dict[str, Any] | None = None
) -> None:
    """Load the autoencoder's weights from a checkpoint; raise `UserError` if its tensors differ in name or shape.

    Args:
        model: It takes them.
        path: Of the checkpoint.
        ema: Whether they are the averaged ones.
        checkpoint: Its content, if it has been read already.
    """
    _load(model, checkpoint or read(path), path, ema)


def load_part(model: VideoAutoencoder, path: str | Path) -> list[str]:
    """Load the weights that fit from another autoencoder, the averaged ones if there are any.

    Accepts a checkpoint of `vidtwin fit`, a file of an autoencoder's weights alone or of the released VidTwin, a folder
    of `save_pretrained`, and `hf://owner/name`. Discriminator, optimizers and steps are ignored. VidTwin's weights are
    fitted to other latents, clip lengths, resolutions and patches (`vidtwin.models.resizing`).

    Returns:
        Lines of a report: the tensors that were kept, those in another shape, those that have their initial values,
        and those of the file that were not used.

    Raises:
        UserError: Less than a quarter of the model's numbers would come from the file.
    """
    given, origin, arguments = _read_part(path, type(model))
    own = model.state_dict()
    resizes = isinstance(model, VidTwin)
    sources = resizing.align_levels(given, own) if resizes else {name: name for name in given}
    found = {name: given[sources[name]] for name in own if name in sources}
    kept = {name: value for name, value in found.items() if value.shape == own[name].shape}
    resized: dict[str, resizing.Resized] = {}
    fresh = {name: "not in the file" for name in own if name not in found}
    for name in [name for name in found if name not in kept]:
        there, here = tuple(found[name].shape), tuple(own[name].shape)
        change = resizing.resize(name, found[name], own[name]) if resizes else None
        if change is None:
            fresh[name] = f"{there} in the file, {here} here"
        else:
            resized[name] = change
    for bias in [f"{name.removesuffix('weight')}bias" for name in fresh if name.endswith(".weight")]:
        if kept.pop(bias, None) is not None or resized.pop(bias, None) is not None:
            fresh[bias] = "its layer is fresh"

    numbers = sum(value.numel() for value in kept.values()) + sum(change.numbers for change in resized.values())
    share = numbers / max(sum(value.numel() for value in own.values()), 1)
    if share < LEAST_SHARE:
        shapes = [f"{name} is {reason}" for name, reason in fresh.items() if reason.endswith(" here")]
        differing = f" ({'; '.join(shapes[:2])})" if shapes else ""
        taken = f"{share:.1%} of its numbers{differing}" if numbers else f"none that fits; it has {few([*given])}"
        raise UserError(
            f"Expected weights of {type(model).__name__} in {path}, got {taken}; set the model's class, widths and "
            "depth to those of the file."
        )
    model.load_state_dict(kept | {name: change.value for name, change in resized.items()}, strict=False)

    parts = Counter(name.partition(".")[0] for name in kept)
    lines = [f"{len(kept) + len(resized)} of {len(own)} tensors, {origin}"]
    differ = [
        f"{name} {arguments[name]} there, {value} here"
        for name, value in model.init_args.items()
        if name in arguments and name not in _INITIAL_ONLY and arguments[name] != value
    ]
    if differ:
        lines.append(f"other arguments: {'; '.join(differ)}")
    if parts:
        lines.append("kept " + ", ".join(f"{count} of {part}" for part, count in parts.items()))
    lines += [
        f"{'interpolated' if change.interpolated else 'kept in part'} {name} from {tuple(found[name].shape)} to "
        f"{tuple(change.value.shape)}"
        for name, change in resized.items()
    ]
    lines += [f"fresh {names}: {reason}" for names, reason in _fold(fresh, own)]
    unused = {original: "" for name, original in sources.items() if name not in own}
    return lines + [f"unused {names}" for names, _ in _fold(unused, given)]


def _read_part(path: str | Path, model: type) -> tuple[dict[str, Tensor], str, dict[str, Any]]:
    """Read an autoencoder's weights in any form → by name, their origin in words, and the arguments of the class
    `model` that are known of them.
    """
    held = read(path) if hub.is_pretrained(path) else weights.read(path, wanted=_FORMS)
    state = held.get("state_dict", held) if isinstance(held, dict) else held
    if not isinstance(state, dict) or not all(isinstance(name, str) for name in state):
        raise UserError(f"Expected weights by their names in {path}, got a {type(state).__name__}.")
    tensors = {name: value for name, value in state.items() if isinstance(value, Tensor)}
    if official.is_official(tensors):
        sizes, converted = official.convert(tensors, Path(path))
        return converted, "weights of the released VidTwin", sizes | official.ARITHMETIC
    if state is held or not any(name.startswith(PREFIX) for name in tensors):
        return tensors, "weights", {}
    averaged = "ema" in held
    spec = held.get("model_spec") or {}
    same = spec.get("class_path") == f"{model.__module__}.{model.__qualname__}"
    known = complete(spec) if same else {}
    return autoencoder_weights(held, averaged), "averaged weights" if averaged else "weights", known


def _fold(chosen: Mapping[str, str], names: Iterable[str]) -> list[tuple[str, str]]:
    """Join chosen tensors of one reason to modules of which none is left out → (names, reason)."""
    members: dict[str, list[str]] = {}
    for name in names:
        modules = name.split(".")
        for length in range(1, len(modules) + 1):
            members.setdefault(".".join(modules[:length]), []).append(name)
    folded: dict[str, tuple[str, str]] = {}
    for name, reason in chosen.items():
        modules = name.split(".")
        prefixes = (".".join(modules[:length]) for length in range(1, len(modules) + 1))
        whole = next(p for p in prefixes if all(chosen.get(member) == reason for member in members[p]))
        count = len(members[whole])
        folded[whole] = (whole if whole == name else f"{whole} ({count} tensors)", reason)
    return [*folded.values()]


def _load(model: VideoAutoencoder, checkpoint: dict[str, Any], path: str | Path, ema: bool) -> None:
    state = autoencoder_weights(checkpoint, ema)
    weights.check_fit(state, model.state_dict(), str(path))
    model.load_state_dict(state)
    if (checkpoint.get("teacher") or {}).get("only_decoder"):
        console.log(f"{path}: a decoder of its teacher's latents; its encoder was not trained", rank_zero=True)


def autoencoder_weights(checkpoint: dict[str, Any], ema: bool = False) -> dict[str, Tensor]:
    """Return the autoencoder's weights in a checkpoint, without the prefix; with `ema` the averaged ones."""
    return network_weights(checkpoint, PREFIX, ema)


def network_weights(checkpoint: dict[str, Any], prefix: str, ema: bool = False) -> dict[str, Tensor]:
    """Return the weights whose names begin with a prefix, without it; with `ema` the averaged ones."""
    state = checkpoint["state_dict"]
    own = {name.removeprefix(prefix): value for name, value in state.items() if name.startswith(prefix)}
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
