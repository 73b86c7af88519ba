"""Cost of a model: its arithmetic, counted without running it; its speed and its memory, by running it."""

import copy
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.memory import counter_name, peak_memory, within_memory
from vidtwin.errors import UserError
from vidtwin.posteriors import Latents

Wrap = Callable[[VideoAutoencoder], Any]


class Trace(NamedTuple):
    """A pass over one clip on the meta device.

    Attributes:
        flops: Of "encode" and "decode".
        latents: By name, each (1, ...), without values.
        clip: (1, 3, T, H, W), without values.
    """

    flops: dict[str, int]
    latents: Latents
    clip: Tensor


def measure(
    model: VideoAutoencoder,
    clip_shape: Sequence[int],
    device: torch.device | str,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch_size: int = 1,
    warmup: int = 2,
    repeats: int = 5,
    wrap: Wrap = lambda model: model,
) -> dict[str, Any]:
    """Measure FLOPs, clips per second and peak memory of encoding and decoding: `cost` of results.json.

    The model stands on `device` and is left as it was. Memory includes weights, inputs and outputs.

    Args:
        model: In any mode; it is measured in evaluation.
        clip_shape: Shape (3, T, H, W) of a clip.
        device: Device of the measurement.
        precision: Makes the context in which the model runs, such as `lambda: torch.autocast("cuda")`.
        batch_size: Clips per pass.
        warmup: Passes before the timed ones.
        repeats: Timed passes.
        wrap: Gives a model the `encode(clips)` and `decode(latents, num_frames)` to measure, if they are not its own,
            such as for clips in windows. It is called with a copy of the model on the meta device too.
    """
    device = torch.device(device)
    for name, value, least in (("batch_size", batch_size, 1), ("warmup", warmup, 0), ("repeats", repeats, 1)):
        if value < least:
            raise UserError(f"Expected {name} of at least {least}, got {value}.")
    if astray := {str(p.device) for p in model.parameters() if p.device.type != device.type}:
        raise UserError(f"Expected a model on {device}, got weights on {', '.join(sorted(astray))}; move it first.")
    tried = f"{batch_size} clips of {tuple(clip_shape)} at a time through {type(model).__name__}"
    coder = wrap(model)

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        clips = _make_clips(model, batch_size, clip_shape).to(device)
        weights = [*model.parameters(), *model.buffers()]

        def encode() -> Any:
            with precision():
                return coder.encode(clips).mode()

        latents = encode()

        def decode() -> Any:
            with precision():
                return coder.decode(latents, clip_shape[1])

        return {
            part: {
                "clips_per_second": spread([batch_size / s for s in seconds(step, device, warmup, repeats)]),
                "peak_memory_bytes": peak_memory(step, device, [weights, given]),
            }
            for part, step, given in (("encode", encode, clips), ("decode", decode, latents))
        }

    with _evaluating(model):
        counts = flops(model, clip_shape, wrap)
        measured = within_memory(run, device, tried)
    return {
        "flops": counts,
        **measured,
        "batch_size": batch_size,
        "warmup": warmup,
        "repeats": repeats,
        "memory_counter": counter_name(device),
        "device": device_name(device),
    }


def flops(model: VideoAutoencoder, clip_shape: Sequence[int], wrap: Wrap = lambda model: model) -> dict[str, int]:
    """Count floating-point operations of `encode` and `decode` for one clip (3, T, H, W); see `trace`."""
    return trace(model, clip_shape, wrap).flops


@torch.no_grad()
def trace(model: VideoAutoencoder, clip_shape: Sequence[int], wrap: Wrap = lambda model: model) -> Trace:
    """Encode and decode one clip (3, T, H, W) on the meta device, and count the operations; a multiply–add is two.

    PyTorch's counter counts matrix products, convolutions and attention, not additions, norms and activations. On the
    meta device nothing is computed, and the counter sees products that a CPU hides in fused kernels.

    Raises:
        UserError: The model asks for a tensor's values.
    """
    name, model, counts = type(model).__name__, _copy_to_meta(model).eval(), {}
    clip, coder = _make_clips(model, 1, clip_shape), wrap(model)
    try:
        with FlopCounterMode(display=False) as counter:
            latents = coder.encode(clip).mode()
        counts["encode"] = counter.get_total_flops()
        with FlopCounterMode(display=False) as counter:
            decoded = coder.decode(latents, clip_shape[1])
        counts["decode"] = counter.get_total_flops()
    except (RuntimeError, NotImplementedError) as error:
        raise UserError(
            f"Expected {name} to run on the meta device, where FLOPs are counted, got: {' '.join(str(error).split())}; "
            "keep its forward pass free of what asks for a tensor's values."
        ) from error
    return Trace(counts, latents, decoded)


def seconds(run: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> list[float]:
    """Measure the wall time of `repeats` calls after `warmup` others, each until the device has done its work."""
    times = []
    for index in range(warmup + repeats):
        _synchronize(device)
        began = time.perf_counter()
        run()
        _synchronize(device)
        if index >= warmup:
            times.append(time.perf_counter() - began)
    return times


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return median, minimum and maximum."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def device_name(device: torch.device | str) -> str:
    """Return the name of the hardware: `cpu (Intel(R) Xeon(R) …)`, `NVIDIA H100 80GB HBM3`."""
    device = torch.device(device)
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return str(device)
    information = Path("/proc/cpuinfo")  # platform.processor() is empty on many Linux systems
    text = information.read_text(encoding="utf-8") if information.exists() else ""
    found = re.search(r"^model name\s*: (.+)$", text, re.MULTILINE)
    return f"cpu ({found[1].strip() if found else platform.processor() or platform.machine()})"


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _make_clips(model: nn.Module, batch_size: int, clip_shape: Sequence[int]) -> Tensor:
    """Make noise in [-1, 1] in the weights' type; without values for a model on the meta device."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if first.is_meta:
        return torch.empty(batch_size, *clip_shape, dtype=first.dtype, device="meta")
    noise = torch.rand(batch_size, *clip_shape, generator=torch.Generator().manual_seed(0))
    return (2 * noise - 1).to(first.dtype)


def _copy_to_meta(model: VideoAutoencoder) -> VideoAutoencoder:
    """Copy a model without values, and without a second copy of the weights in between."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    known |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, known)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model in evaluation mode, and each of its parts back into its own mode afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
