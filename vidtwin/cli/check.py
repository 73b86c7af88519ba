"""`vidtwin check`: hold any autoencoder to the promises of the interface. Import nothing heavy at the top."""

import importlib
import sys
from typing import TYPE_CHECKING

from vidtwin import plugins
from vidtwin.cli import paths
from vidtwin.errors import UserError, name_choices

if TYPE_CHECKING:
    from vidtwin.autoencoder import VideoAutoencoder
    from vidtwin.cli.parser import Parser

_DESCRIPTION = """\
Hold an autoencoder to each promise of vidtwin.VideoAutoencoder, with random weights on a random clip.

  vidtwin check cmd --autoencoder.resolution 32 --autoencoder.hidden_size 32 --autoencoder.depth 1
  vidtwin check my_package.MyTokenizer --autoencoder.channels 4 --num_frames 8 --resolution 32
  vidtwin check --config configs/demo.yaml

Small arguments show the same mistakes in seconds; at full size a check is some dozen clips and a few training steps.
NAME is a short name (`vidtwin plugins` lists them) or a class path, also of a file in the current folder. The class's
own arguments are --autoencoder.ARGUMENT VALUE; --autoencoder.help lists them.

It prints one line per promise (ok, FAILED with advice, or skipped with the reason), then parameters, latents and rate.
Exit code: 0 all kept, 1 one broken, 2 invalid command. In tests: vidtwin.testing.check_autoencoder(model).
"""
_LARGE_FLOPS = 100_000_000_000  # per clip, both ways; a check needs about 45 of them: over a minute on a CPU
_LARGE_PARAMETERS = 200_000_000
_GROUP = "vidtwin.autoencoders"
_KEY = "model.autoencoder"
_OWN = ("num_frames", "resolution", "batch_size", "device")
_CONFIG = "Config as for fit; only its autoencoder is used."


def check_command(argv: list[str]) -> int:
    """Hold an autoencoder to the promises of the interface: vidtwin check NAME"""
    from vidtwin.cli.parser import config_paths, option_value, read_config, refuse_values, wants_help

    if wants_help(argv):
        parser = _parser()
        parser.add_argument("--config", metavar="FILE", help=_CONFIG)
        parser.parse_args(["--help"])
    refuse_values(config_paths(argv))
    read_config(config_paths(argv))  # refuses a missing file before torch is imported
    argv = [_expand_option(word) for word in argv]
    if argv and not argv[0].startswith("-"):
        name = _resolve_class(argv[0])
        # jsonargparse wants the name of the class after --autoencoder.help too.
        argv = [f"--{_KEY}={name}", *(f"{word}={name}" if word == f"--{_KEY}.help" else word for word in argv[1:])]
        if option_value(argv, "config"):
            raise UserError("Expected NAME or --config FILE, got both; a config names its autoencoder.")
    from vidtwin.cli import model_config

    parser = _parser()
    model_config.add_arguments(parser, config_paths(argv), own=_OWN, shown=_CONFIG)
    config = parser.parse_args(argv)
    given = (config.get("model") or {}).get("autoencoder")
    if not (given and given.get("class_path")):
        raise UserError("Expected an autoencoder to check; give its name, vidtwin check NAME, or a --config FILE.")
    paths.expand(given, paths.values(argv))
    model = model_config.build(parser, config)
    return _report(model, config.num_frames, config.resolution, config.batch_size, config.device)


def _expand_option(word: str) -> str:
    """Turn `--autoencoder.channels` into `--model.autoencoder.channels`, its place in a config."""
    return f"--model.{word[2:]}" if word.startswith("--autoencoder.") else word


def _resolve_class(name: str) -> str:
    """Return the path of an autoencoder class by its short name or class path. Raises `UserError` if it is not one."""
    from vidtwin.autoencoder import VideoAutoencoder
    from vidtwin.testing import describe

    path = plugins.resolve(name, _GROUP)
    module, _, _ = path.rpartition(".")
    if not module:
        choices = name_choices(name, plugins.available(_GROUP))
        raise UserError(f"Expected a short name or a class path (module.Class), got {name!r}{choices}")
    try:
        importlib.import_module(module)
    except Exception as error:
        raise UserError(f"{module} does not import: {describe(error)}.") from error
    cls = plugins.class_of(path, VideoAutoencoder)
    if missing := sorted(getattr(cls, "__abstractmethods__", ())):
        raise UserError(f"{path} lacks {', '.join(missing)}; docs/your_own_baseline.md shows each.")
    return path


def _parser() -> "Parser":
    from vidtwin.cli.parser import command_parser

    usage = "(NAME | --config FILE) [--autoencoder.ARGUMENT VALUE ...] [options]"
    parser = command_parser("check", usage, _DESCRIPTION)
    parser.add_argument("--num_frames", type=int, help="T of the clip. By default the model's own, or one near 16.")
    parser.add_argument(
        "--resolution",
        type=int | list[int],
        help="H = W of the clip, or [H, W]. By default the model's own, else about 64.",
    )
    parser.add_argument("--batch_size", type=int, default=2, help="B of the clip, at least 2.")
    parser.add_argument("--device", default="cpu", help="Such as cuda or cuda:1.")
    return parser


def _report(
    model: "VideoAutoencoder",
    num_frames: int | None,
    resolution: int | list[int] | None,
    batch_size: int,
    device: str,
) -> int:
    """Print the promises, then a summary of the model → exit code."""
    import torch

    from vidtwin.testing import check_promises

    temporal, step = model.temporal, model.spatial_multiple
    if isinstance(resolution, list) and resolution == resolution[:1] * 2:
        resolution = resolution[0]
    if resolution is not None and model.resolution not in (None, resolution):
        raise UserError(f"Expected clips of the model's own resolution {model.resolution}, got {resolution}.")
    frames = num_frames or temporal.usual_length
    if num_frames is not None and num_frames < 1:
        raise UserError(f"Expected num_frames of at least 1, got {num_frames}.")
    size = model.resolution or (64 + -64 % step if resolution is None else resolution)
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or min(sides) < 1:
        raise UserError(f"Expected resolution of at least 1, or as [height, width], got {resolution}.")
    height, width = sides
    try:
        model = model.to(torch.device(device))
    except (RuntimeError, AssertionError) as error:
        first = str(error).strip().partition("\n")[0]
        raise UserError(f"Expected a device that this machine has, got {device!r}: {first}") from error
    cls = f"{type(model).__module__}.{type(model).__qualname__}"
    _say(f"{cls} on a clip of {frames} frames of {width} x {height} pixels")
    if much := _cost(model, (3, frames, height, width)):
        _say(f"{much}: this takes minutes on a CPU, and several times the model's memory")
    promises = []
    for promise in check_promises(model, frames, (height, width), batch_size):
        word = {True: "ok", False: "FAILED", None: "skipped"}[promise.passed]
        _say(f"{word:<8} {promise.name}{f': {_one_line(promise.detail)}' if promise.detail else ''}")
        promises.append(promise)
    _say("")
    try:
        for label, text in _summarize(model, (3, frames, height, width)):
            _say(f"{label:<18} {text}")
    except Exception as error:  # a promise has reported it
        _say(f"no summary: {error!r}")
    broken = sum(promise.passed is False for promise in promises)
    kept = sum(promise.passed is True for promise in promises)
    skipped = len(promises) - broken - kept
    _say(f"{kept} promises kept, {broken} broken, {skipped} skipped")
    return 1 if broken else 0


def _cost(model: "VideoAutoencoder", shape: tuple[int, int, int, int]) -> str:
    """Return the cost of a model whose check takes long; empty for others."""
    from vidtwin.benchmark.cost import flops

    try:
        count, limit, unit = sum(flops(model, shape).values()), _LARGE_FLOPS, "operations a clip"
    except Exception:  # it does not run on the meta device, or not at all, which a promise reports
        count, limit, unit = sum(p.numel() for p in model.parameters()), _LARGE_PARAMETERS, "parameters"
    return f"{count:,} {unit}" if count > limit else ""


def _summarize(model: "VideoAutoencoder", shape: tuple[int, int, int, int]) -> list[tuple[str, str]]:
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    total = sum(p.numel() for p in model.parameters())
    frozen = f", {total - trainable:,} of them frozen" if total > trainable else ""
    lines = [("parameters", f"{total:,}{frozen}"), ("clips", str(model.temporal))]
    latents = [f"{name} {tuple(size)}" for name, size in model.latent_shapes(shape).items()]
    lines += [("latents", ", ".join(latents)), ("compression rate", f"{model.compression_rate(shape):.4%}")]
    if codes := model.code_shapes(shape):
        lines.append(("codebooks", ", ".join(f"{name} {size:,} entries" for name, (_, size) in codes.items())))
    if (bits := model.bits_per_pixel(shape)) is not None:
        lines.append(("bits per pixel", f"{bits:.4g}"))
    return lines


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
    sys.stdout.flush()
