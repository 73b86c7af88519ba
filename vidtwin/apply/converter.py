"""Convert checkpoints and released weights to a folder of `save_pretrained`. Imports torch and lightning."""

import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from jsonargparse import Namespace

from vidtwin import hub, plugins, weights
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError, name_choices
from vidtwin.storage import checkpoints

ReadConfig = Callable[[Path], dict[str, Any]]

_GROUP = "vidtwin.autoencoders"
_TRAINER = ("max_steps", "max_epochs", "precision", "devices", "num_nodes", "strategy", "accumulate_grad_batches")


def convert(options: Namespace, cls: type[VideoAutoencoder], arguments: dict[str, Any], given: list[str]) -> None:
    """Write the folder of weights, and print a summary.

    Args:
        options: Options of the command.
        cls: Class of released weights.
        arguments: Arguments of its `from_official`.
        given: Names of the arguments that the user gave.
    """
    source, out = map(Path, options.places)
    model = _load(cls, source, options, arguments, given)
    with _stage(out) as stage:
        model.save_pretrained(stage)
    for line in summarize(model):
        sys.stdout.write(f"{line}\n")
    sys.stdout.write(f"-> {out}\n")


def summarize(model: VideoAutoencoder) -> list[str]:
    """Return class, parameters, rate and SHA-256 of the weights, a line each."""
    side = model.resolution or -(-256 // model.spatial_multiple) * model.spatial_multiple
    shape = (3, model.temporal.usual_length, side, side)
    numbers = " + ".join(f"{name} {'x'.join(map(str, size))}" for name, size in model.latent_shapes(shape).items())
    return [
        f"{model.class_path}, {sum(p.numel() for p in model.parameters()):,} parameters",
        f"{numbers}: {model.compression_rate(shape):.4%} of a clip of {shape[1]} frames of {side}x{side}",
        f"SHA-256 of the weights: {weights.sha256(model.state_dict())}",
    ]


def record_training(
    checkpoint: dict[str, Any], path: Path, average: bool, read_config: ReadConfig, config: Path | None = None
) -> dict[str, Any]:
    """Make a record of a training from its checkpoint and its config, as plain values.

    Args:
        checkpoint: Content of the checkpoint.
        path: Its path.
        average: Whether the averaged weights are taken.
        read_config: Reads a config with its bases.
        config: The config; None takes config.yaml of the run's folder, if there is one.
    """
    found = {key: checkpoint[key] for key in ("epoch", "global_step") if isinstance(checkpoint.get(key), int)}
    counts = checkpoint.get("training")
    record = {"checkpoint": path.name, "weights": "average" if average else "last"} | found
    record |= counts if isinstance(counts, dict) else {}
    if isinstance(teacher := checkpoint.get("teacher"), dict):
        record["teacher"] = {key: value for key, value in teacher.items() if key != "path"}
    beside = path.resolve().parent.parent / "config.yaml"
    source = config or (beside if beside.is_file() else None)
    if source is None:
        return record
    return record | _select_settings(read_config(source), source, checkpoint, explicit=config is not None)


def released_class(name: str) -> type[VideoAutoencoder]:
    """Return the class of released weights by its short name or class path."""
    path = plugins.resolve(name, _GROUP)
    able = [short for short, cls in plugins.load_all(_GROUP).items() if callable(getattr(cls, "from_official", None))]
    if "." not in path:
        raise UserError(
            f"Expected the name or class path of a model with official weights for --model, got {name!r}"
            f"{name_choices(name, able)}"
        )
    cls = plugins.class_of(path, VideoAutoencoder)
    if not callable(getattr(cls, "from_official", None)):
        raise UserError(
            f"Expected a class with from_official ({', '.join(able)}), got {name}: it has no released weights."
        )
    return cls


def suggest_options(path: Path) -> str | None:
    """Return the options for a folder of a library's weights, such as "--model wan --subfolder vae", if it is one."""
    for config in (path / "config.json", *sorted(path.glob("*/config.json"))) if path.is_dir() else ():
        try:
            content = json.loads(config.read_text(encoding="utf-8"))
            name = (content.get("architectures") or [content["_class_name"]])[0]
        except (OSError, ValueError, LookupError, AttributeError, TypeError):
            continue
        for short, cls in plugins.load_all(_GROUP).items():
            if str(getattr(cls, "library_class", "")).endswith(f".{name}"):  # an adapter of that library
                return f"--model {short}" + (f" --subfolder {config.parent.name}" if config.parent != path else "")
    return None


def _load(
    cls: type[VideoAutoencoder], path: Path, config: Namespace, arguments: dict[str, Any], given: list[str]
) -> VideoAutoencoder:
    """Load the model of IN, with its `training_record`."""
    if path.is_dir() and (path / hub.CONFIG).is_file() and _is_ours(path / hub.CONFIG):
        raise UserError(f"Expected weights of another form, got {path}, which save_pretrained has written.")
    if not path.exists():
        weights.read(path)  # raises an error that lists similar files
    checkpoint = None if path.is_dir() or path.suffix == ".safetensors" else weights.read(path, lazily=True)
    if isinstance(checkpoint, dict) and "model_spec" in checkpoint:
        options = [*given, *(["model"] if config.model else [])]
        if options:
            raise UserError(
                f"Expected no --{options[0]} with {path}, a checkpoint of `vidtwin fit`, which holds its class and "
                "arguments."
            )
        model = checkpoints.load_autoencoder(path, config.use_ema)
        checkpoints.check(path)
        of_training = Path(config.config) if config.config else None
        model.training_record = record_training(checkpoint, path, config.use_ema, config.read_config, of_training)
        return model
    for name in ("use_ema", "config"):
        if config[name]:
            raise UserError(
                f"Expected --{name} with a checkpoint of `vidtwin fit` alone, got {path} without model_spec."
            )
    released: VideoAutoencoder = cls.from_official(path, **arguments)  # type: ignore[attr-defined]
    released.training_record = {"released_weights": path.name}
    return released


def _is_ours(config: Path) -> bool:
    try:
        hub.read_config(config.parent, config.parent)
    except UserError:
        return False
    return True


def _select_settings(content: dict[str, Any], path: Path, checkpoint: dict[str, Any], explicit: bool) -> dict[str, Any]:
    """Select the settings of data, loss, optimizer and trainer in the content of a config of `fit`."""
    model = content.get("model")
    if not isinstance(model, dict) or not isinstance(model.get("autoencoder"), dict):
        raise UserError(f"Expected model.autoencoder in {path}, got none; give the --config of the training.")
    ours, theirs = checkpoint["model_spec"]["class_path"], model["autoencoder"].get("class_path")
    if plugins.resolve(str(theirs), _GROUP) != ours:
        if explicit:
            raise UserError(f"Expected the --config that {ours} was trained by, got one of {theirs}.")
        return {}  # the config of another run
    data = content.get("data")
    trainer = content.get("trainer")
    settings = {name: value for name, value in model.items() if name != "autoencoder"}
    if isinstance(data, dict):
        settings["data"] = {"class_path": data.get("class_path"), **(data.get("init_args") or {})}
    if isinstance(trainer, dict):
        settings["trainer"] = {name: trainer[name] for name in _TRAINER if name in trainer}
    public: dict[str, Any] = _without_paths(settings)
    return public


def _without_paths(value: Any) -> Any:
    """Reduce paths to their last part, so that they do not disclose the layout of a disk."""
    if isinstance(value, dict):
        return {name: _without_paths(inner) for name, inner in value.items()}
    if isinstance(value, list):
        return [_without_paths(inner) for inner in value]
    if isinstance(value, str) and ("/" in value or "\\" in value) and "://" not in value:
        return value.replace("\\", "/").rstrip("/").rpartition("/")[2]
    return value


@contextmanager
def _stage(out: Path) -> Iterator[Path]:
    """Yield a folder beside `out` whose files are moved to `out` if the block ends without an error."""
    out = out.resolve()
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as stage:
        inner = Path(stage) / out.name  # with the permissions of a new folder
        inner.mkdir()
        yield inner
        if not out.exists():
            inner.rename(out)
            return
        (out / hub.CONFIG).unlink(missing_ok=True)  # until the last move `out` does not load
        for name in (hub.WEIGHTS, hub.CARD, hub.CONFIG):
            shutil.move(inner / name, out / name)
