"""Count what models cost at the clips' size without running them: `vidtwin test --meta`.

    model on the meta device ── encode, decode ──> latents' shapes, FLOPs ──> rate, bits, tokens and FLOPs of a DiT

Tensors on the meta device have shapes and no values: models of any size are counted within seconds, without data,
weights or memory. The shapes are those that the encoder gives; a model that asks for values has those that its class
states, and no FLOPs.
"""

import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from torch import nn

import vidtwin
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark import cost, downstream
from vidtwin.benchmark.loaded_model import LoadedModel, compare_claim
from vidtwin.benchmark.options import Entry, ModelConfig
from vidtwin.benchmark.render import align, list_notes
from vidtwin.benchmark.summary import Cell, Line, Table
from vidtwin.errors import UserError
from vidtwin.files import write_text
from vidtwin.metrics.registry import Column

SCHEMA_VERSION = 1

Counted = dict[str, Any]


def count(entry: Entry, config: ModelConfig, clip_shape: Sequence[int]) -> Counted:
    """Count one model of a sweep for a clip (3, T, H, W).

    Returns:
        An item of "models" in meta.json: parameters, legal lengths of clips, shapes and rates of the latents (padding
        included, over the user's clip), FLOPs of encoding and decoding, and those of the DiT of `downstream`.

    Raises:
        UserError: The model can't be built or does not take the clip.
    """
    model = build(config)
    shape = (clip_shape[0], *clip_shape[1:])
    window = model.temporal.usual_length if entry.windows else None
    loaded = LoadedModel(entry.name, "untrained", model, claimed_rate=entry.claimed_rate, window=window)
    loaded.check(*shape[1:])
    windows = loaded.count_windows(shape[1])
    frames = shape[1] // windows
    flops: dict[str, int] | None = None
    error: str | None = None
    try:
        flops, latents, clip = cost.trace(model, shape, lambda copy: replace(loaded, model=copy))
    except UserError as refused:  # it asks for values
        error = str(refused)
        promised = model.latent_shapes((shape[0], frames, *shape[2:]))
        latents = {name: torch.empty(windows, *size, device="meta") for name, size in promised.items()}
    else:
        if tuple(clip.shape[1:]) != shape:
            raise UserError(f"Expected {entry.name} to decode a clip of {shape}, got {tuple(clip.shape[1:])}.")
    described = loaded.describe_latents(latents, shape)
    rate = sum(latent["rate"] for latent in described.values())
    bits = [latent["bits"] for latent in described.values()]
    return {
        "name": entry.name,
        "error": None,
        "model": config.spec,
        "parameters": sum(p.numel() for p in model.parameters()),
        "lengths": str(model.temporal),
        "windows": {"num_frames": frames, "windows": windows} if windows > 1 else None,
        "padded_frames": windows * (model.temporal.legal_length(frames) - frames),
        "latents": described,
        "compression_rate": rate,
        "bits_per_pixel": None if None in bits else sum(bits) / (shape[1] * shape[2] * shape[3]),
        "claimed": compare_claim(rate, entry.claimed_rate),
        "flops": flops,
        "flops_error": error,
        "downstream": downstream.counts(loaded.latent_shapes(shape)),
        "versions": dict(find_versions(model)),
    }


def build(config: ModelConfig) -> VideoAutoencoder:
    """Build a model on the meta device, in evaluation mode."""
    try:
        with torch.device("meta"):
            model = config.build()
    except Exception:  # a class that reads values while it is built (VidTok's quantizer) is built on the CPU first
        model = config.build()
    return model.to("meta").eval()


def find_versions(model: nn.Module) -> Iterator[tuple[str, str]]:
    """Yield name and version of each installed package, beside torch and vidtwin, whose layers the model has."""
    packages = {type(part).__module__.partition(".")[0] for part in model.modules()}
    for package in sorted(packages - {"torch", "vidtwin"}):
        try:
            yield package, metadata.version(package)
        except metadata.PackageNotFoundError:  # a module of the user's own
            continue


def write(folder: Path, clip_shape: Sequence[int], models: Sequence[Counted]) -> str:
    """Write `meta.json` and `meta.md`; return the table as Markdown."""
    versions = {"python": platform.python_version(), "vidtwin": vidtwin.__version__, "torch": torch.__version__}
    for model in models:
        versions |= model.get("versions", {})
    text = render(clip_shape, models, versions)
    folder.mkdir(parents=True, exist_ok=True)
    kept = [{key: value for key, value in model.items() if key != "versions"} for model in models]
    content = {"schema_version": SCHEMA_VERSION, "clip": list(clip_shape), "versions": versions, "models": kept}
    write_text(folder / "meta.json", json.dumps(content, indent=1) + "\n")
    write_text(folder / "meta.md", text)
    return text


def render(clip_shape: Sequence[int], models: Sequence[Counted], versions: dict[str, str]) -> str:
    """Render the table as Markdown, with notes: claims that differ, windows, failures, versions."""
    columns = {
        Column("parameters", "Parameters"): lambda model: f"{model['parameters']:,}",
        Column("lengths", "Clips", words=True): lambda model: model["lengths"],
        Column("latents", "Latents", words=True): _format_latents,
        Column("rate", "Rate", "%"): lambda model: _format_rate(model["compression_rate"]),
        Column("claimed", "Claimed", "%"): lambda model: _format_claim(model["claimed"]),
        Column("bits", "Bits/pixel"): lambda model: _format(model["bits_per_pixel"], ".4f"),
        Column("flops", "TFLOPs", "encode + decode"): lambda model: _format_flops(model["flops"]),
        Column("tokens", "Tokens", "DiT"): lambda model: f"{model['downstream']['tokens']:,}",
        Column("dit", "TFLOPs", "DiT step"): lambda model: f"{model['downstream']['flops_training_step'] / 1e12:.3g}",
    }
    counted = [model for model in models if model["error"] is None]
    shown = {column: fill for column, fill in columns.items() if any(map(fill, counted))}
    lines = []
    for model in models:
        texts = [""] * len(shown) if model["error"] else [fill(model) for fill in shown.values()]
        lines.append(Line(model["name"], "untrained", [Cell(text) for text in texts]))
    table = Table("meta", "", list(shown), lines)
    return "\n".join([*align(table), "", *list_notes(_note(clip_shape, models, versions))]) + "\n"


def _note(clip_shape: Sequence[int], models: Sequence[Counted], versions: dict[str, str]) -> Iterator[str]:
    _, frames, height, width = clip_shape
    yield (
        f"One clip of {frames} frames of {width} x {height}; counted on the meta device, without weights. Rates are "
        "numbers of the latents, padding included, over those of the clip; a multiply-add is two FLOPs."
    )
    for model in models:
        name = model["name"]
        if model["error"]:
            yield f"{name} failed: {model['error']}"
            continue
        if model["flops_error"]:
            yield f"{name}: latents as its class states them, FLOPs not counted: {model['flops_error']}"
        if windows := model["windows"]:
            yield f"{name} takes {windows['windows']} windows of {windows['num_frames']} frames."
        if (claimed := model["claimed"]) and not claimed["agrees"]:
            rates = _format_claim(claimed), _format_rate(model["compression_rate"])
            padded = model["padded_frames"]
            padding = f", {padded} frame{'s' if padded > 1 else ''} of padding included" if padded else ""
            yield f"A rate of {rates[0]} % is claimed for {name}; its latents have {rates[1]} %{padding}."
    padded = [(model["name"], model["padded_frames"]) for model in models if not model["error"]]
    if any(frames for _, frames in padded):
        listed = ", ".join(f"{name} by {frames}" for name, frames in padded if frames)
        yield f"Frames are padded to a legal number, which counts in the rate: {listed}."
    yield f"Versions: {', '.join(f'{package} {version}' for package, version in versions.items())}."


def _format_latents(model: Counted) -> str:
    several = len(model["latents"]) > 1
    parts = []
    for name, latent in model["latents"].items():
        size = " x ".join(map(str, latent["shape"]))
        parts.append(f"{name} {size}" if several else size)
    return ", ".join(parts)


def _format_rate(rate: float) -> str:
    return f"{100 * rate:.4f}"


def _format_claim(claimed: dict[str, Any] | None) -> str:
    return "" if claimed is None else f"{100 * claimed['rate']:.4g}"


def _format(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _format_flops(flops: dict[str, int] | None) -> str:
    return "" if flops is None else " + ".join(f"{flops[part] / 1e12:.3g}" for part in ("encode", "decode"))
