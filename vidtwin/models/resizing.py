"""Fit VidTwin's weights to other latent sizes, clip lengths, resolutions and patch sizes.

An axis of positions (frames, the patch grid, the pixels of a patch) is resampled linearly. With R(a → b) (b, a) the
matrix that resamples a function at a equally spaced points to b of them, a layer W (b, a) becomes

    R(b → b') · W · R(a' → a)        it resamples its input, applies the old layer, and resamples its output.

The rows of R sum to 1, so what is constant over positions is decoded as before. With fewer points R averages.

The channels of latents and the queries have no order: those that both sizes have are copied. Further outputs keep their
initial values, further inputs get the weight 0, so that a decoder begins as the source's.

All other axes are widths: a tensor of another width is not taken.
"""

import math
import re
from collections.abc import Collection
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class _Layout:
    """Axes of a tensor, a letter each, and those whose sizes may differ.

    Attributes:
        axes: A word per axis of the tensor. "kpq" and "pqk" are colours, rows and columns of a patch in one axis, "md"
            mean and log-variance of d channels.
        outputs: Positions of the layer's output.
        inputs: Positions of its input.
        more_outputs: Queries or channels of its output.
        more_inputs: Queries or channels of its input.
    """

    axes: tuple[str, ...]
    outputs: str = ""
    inputs: str = ""
    more_outputs: str = ""
    more_inputs: str = ""

    def unfold(self, tensor: Tensor) -> Tensor | None:
        """Return the tensor with an axis per letter; None if its shape is not of this layout."""
        if tensor.ndim != len(self.axes):
            return None
        shape: list[int] = []
        for size, letters in zip(tensor.shape, self.axes, strict=True):
            side = math.isqrt(size // 3)
            known = {"kpq": (3, side, side), "pqk": (side, side, 3), "md": (2, size // 2)}
            sizes = known.get(letters, (size,))
            if math.prod(sizes) != size:
                return None
            shape += sizes
        return tensor.reshape(shape)


_LAYOUTS = {
    r"encoder\.patch_embed\.weight": _Layout(("c", "kpq"), inputs="pq"),
    r"structure\.qformer\.queries": _Layout(("n", "c"), more_outputs="n"),
    r"(structure|dynamics)\.head\.weight": _Layout(("md", "c", "y", "x"), more_outputs="d"),
    r"(structure|dynamics)\.head\.bias": _Layout(("md",), more_outputs="d"),
    r"structure\.embed\.0\.weight": _Layout(("c", "d", "y", "x"), more_inputs="d"),
    r"structure\.to_frames\.weight": _Layout(("t", "n"), outputs="t", more_inputs="n"),
    r"structure\.to_frames\.bias": _Layout(("t",), outputs="t"),
    r"dynamics\.embed\.0\.weight": _Layout(("c", "d"), more_inputs="d"),
    r"dynamics\.upsample\.[02]\.weight": _Layout(("h", "w"), outputs="h", inputs="w"),
    r"dynamics\.upsample\.[02]\.bias": _Layout(("h",), outputs="h"),
    r"decoder\.linear\.weight": _Layout(("pqk", "c"), outputs="pq"),
    r"decoder\.linear\.bias": _Layout(("pqk",), outputs="pq"),
}
_UPSAMPLE = re.compile(r"structure\.upsample\.(\d+)\.(weight|bias)")
_LEVEL = 3  # modules of a level of `structure.upsample`: convolution, ReLU, up-sampling


def resampling(source: int, target: int) -> Tensor:
    """Return R(source → target) (target, source) in float64: linear interpolation, averages if there are fewer points.

    Points are the centres of equal intervals; beyond the outer ones the function is constant.
    """
    points = torch.eye(source, dtype=torch.float64)[None, None]
    return F.interpolate(points, size=(target, source), mode="bilinear", align_corners=False, antialias=True)[0, 0]


def align_levels(names: Collection[str], own: Collection[str]) -> dict[str, str]:
    """Rename the levels of `structure.upsample` for another number of them: they are counted from the features.

    Args:
        names: Names of the tensors of the source.
        own: Names of the tensors of the model.

    Returns:
        The source's names by the model's.
    """

    def count(names: Collection[str]) -> int:
        return sum(_UPSAMPLE.fullmatch(name) is not None for name in names) // 2

    shift = _LEVEL * (count(own) - count(names))

    def rename(name: str) -> str:
        match = _UPSAMPLE.fullmatch(name)
        return name if match is None else f"structure.upsample.{int(match[1]) + shift}.{match[2]}"

    return {rename(name): name for name in names}


@dataclass(frozen=True)
class Resized:
    """A tensor in another shape.

    Attributes:
        value: The tensor.
        numbers: Number of its values that come from the source.
        interpolated: Whether positions were resampled; else channels or queries were added or left out.
    """

    value: Tensor
    numbers: int
    interpolated: bool


def resize(name: str, source: Tensor, own: Tensor) -> Resized | None:
    """Fit a tensor of another VidTwin to the shape of `own`.

    Args:
        name: Its name in VidTwin's state dict.
        source: Trained values.
        own: Initial values, kept by outputs that the source lacks.

    Returns:
        The tensor in its new shape; None if the two differ in a width.
    """
    layout = next((layout for pattern, layout in _LAYOUTS.items() if re.fullmatch(pattern, name)), None)
    if layout is None:
        return None
    values, initial = layout.unfold(source), layout.unfold(own)
    if values is None or initial is None:
        return None
    values, result = values.double(), initial.double().clone()
    interpolated = False
    for axis, letter in enumerate("".join(layout.axes)):
        before, after = values.shape[axis], result.shape[axis]
        if before == after:
            continue
        interpolated |= letter in layout.outputs + layout.inputs
        if letter in layout.outputs:
            values = torch.tensordot(values, resampling(before, after), ([axis], [1])).movedim(-1, axis)
        elif letter in layout.inputs:
            values = torch.tensordot(values, resampling(after, before), ([axis], [0])).movedim(-1, axis)
        elif letter in layout.more_inputs:
            result.narrow(axis, min(before, after), max(after - before, 0)).zero_()
        elif letter not in layout.more_outputs:
            return None
    common = tuple(slice(min(sizes)) for sizes in zip(values.shape, result.shape, strict=True))
    result[common] = values[common]
    return Resized(result.reshape(own.shape).to(own), result[common].numel(), interpolated)
