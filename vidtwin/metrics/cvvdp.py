"""ColorVideoVDP, by the `cvvdp` package (MIT; all its constants come with it)."""

import importlib
import importlib.metadata
import json
import sys
from functools import cache
from importlib import resources
from typing import Any

import torch
from torch import Tensor

from vidtwin.errors import UserError, suggestion
from vidtwin.metrics.frames import unit_range

_SMALLEST = 8  # pixels: on smaller frames its pyramid of spatial frequencies is no longer one


def cvvdp(prediction: Tensor, target: Tensor, fps: float, display: str = "standard_4k") -> Tensor:
    """Compute ColorVideoVDP (Mantiuk et al. 2024): a clip's quality in just-objectionable differences, 10 if equal.

    It models what a viewer sees of each pixel at one display's luminance, density and distance, over time too, so that
    flicker counts. 1 JOD less is what three of four viewers would see as worse.

    Args:
        prediction: (B, 3, T, H, W) in [-1, 1], clamped here, display-encoded (sRGB).
        target: Same shape.
        fps: Frames per second at which the clips are shown.
        display: Name of a display in the package's list.

    Returns:
        (B,).

    Raises:
        UserError: The package is missing, has no such display, or the clips differ in shape or are too small.
    """
    if reason := cvvdp_unavailable(display, prediction.shape[-2], prediction.shape[-1]):
        raise UserError(reason)
    there, here = unit_range(prediction, target)
    metric = _metric(display, there.device)
    pairs = zip(there.float().split(1), here.float().split(1), strict=True)
    found = [metric.predict(*pair, dim_order="BCFHW", frames_per_second=fps)[0] for pair in pairs]
    return torch.stack([value.reshape(()) for value in found])


def cvvdp_unavailable(display: str, height: int = _SMALLEST, width: int = _SMALLEST) -> str | None:
    """Return the reason why ColorVideoVDP is unavailable for a display or for frames of this size, or None."""
    try:
        displays = _displays()
    except ImportError as error:
        return f"pip install 'vidtwin[cvvdp]' ({error})"
    if display not in displays:
        return f"Expected a display of ColorVideoVDP for cvvdp, got {display!r}{suggestion(display, displays)}"
    if min(height, width) < _SMALLEST:
        size = f"{_SMALLEST}x{_SMALLEST}"
        return f"Expected frames of at least {size} pixels for ColorVideoVDP, got {(height, width)}."
    return None


def describe_display(display: str, fps: float) -> dict[str, Any]:
    """Describe for the protocol how clips are seen: display, pixels per degree, frames a second, package's version.

    Raises:
        UserError: As of `cvvdp`.
    """
    if reason := cvvdp_unavailable(display):
        raise UserError(reason)
    geometry = _package().vvdp_display_geometry.load(display)
    return {
        "display": display,
        "description": _displays()[display]["name"],
        "pixels_per_degree": round(float(geometry.get_ppd()), 3),
        "frames_per_second": fps,
        "version": importlib.metadata.version("cvvdp"),
    }


@cache
def _package() -> Any:
    # The package has no types, and puts its folder, with modules of such names as `utils`, on the path of all modules.
    path = list(sys.path)
    try:
        return importlib.import_module("pycvvdp")
    finally:
        sys.path[:] = path


@cache
def _displays() -> dict[str, dict[str, Any]]:
    """Read the standard-range displays, since clips are sRGB, by name."""
    _package()
    text = (resources.files("pycvvdp") / "vvdp_data" / "display_models.json").read_text(encoding="utf-8")
    displays: dict[str, dict[str, Any]] = json.loads(text)
    return {name: each for name, each in displays.items() if each.get("colorspace", "sRGB") == "sRGB"}


@cache
def _metric(display: str, device: torch.device) -> Any:
    return _package().cvvdp(display_name=display, device=device, quiet=True)
