"""What a model costs: its arithmetic, counted without running it; its speed and its memory, by running it."""

import copy
import platform
import re
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark.memory import counter_name, peak_memory, within_memory
from vidtwin.errors import UserError

Encode = Callable[[VideoAutoencoder, Tensor], Any]
Decode = Callable[[VideoAutoencoder, Any, int], Tensor]


def encode_whole(model: VideoAutoencoder, clip: Tensor) -> Any:
    """Clips (B, 3, T, H, W) → latents."""
    return model.encode(clip).mode()


def decode_whole(model: VideoAutoencoder, latents: Any, num_frames: int) -> Tensor:
    """Latents → clips (B, 3, num_frames, H, W)."""
    return model.decode(latents, num_frames)


def measure(
    model: VideoAutoencoder,
    clip_shape: Sequence[int],
    device: torch.device | str,
    precision: Callable[[], AbstractContextManager[Any]] = nullcontext,
    batch_size: int = 1,
    warmup: int = 2,
    repeats: int = 5,
    encode: Encode = encode_whole,
    decode: Decode = decode_whole,
) -> dict[str, Any]:
    """FLOPs, clips a second and peak memory of encoding and decoding: `cost` of results.json.

    The model stands on `device` and is left as it was. Memory has the weights and what goes in and comes out.

    Args:
        model: In any mode; it is measured in evaluation.
        clip_shape: (3, T, H, W) of a clip.
        device: Where to run.
        precision: Gives the context in which the model runs, such as `lambda: torch.autocast("cuda")`.
        batch_size: Clips at a time.
        warmup: Passes before those that are timed.
        repeats: Passes that are timed.
        encode: How clips (B, 3, T, H, W) become latents, of any nesting; another than the model's own for a model
            that takes a clip in windows. It is called with a copy of the model too, on the meta device.
        decode: How latents become clips; likewise.
    """
    device = torch.device(device)
    for name, value, least in (("batch_size", batch_size, 1), ("warmup", warmup, 0), ("repeats", repeats, 1)):
        if value < least:
            raise UserError(f"Expected {name} of at least {least}, got {value}.")
    if astray := {str(p.device) for p in model.parameters() if p.device.type != device.type}:
        raise UserError(f"Expected a model on {device}, got weights on {', '.join(sorted(astray))}; move it first.")
    tried = f"{batch_size} clips of {tuple(clip_shape)} at a time through {type(model).__name__}"

    @torch.inference_mode()
    def run() -> dict[str, Any]:
        clips = _clips(model, batch_size, clip_shape).to(device)
        weights = [*model.parameters(), *model.buffers()]

        def encoding() -> Any:
            with precision():
                return encode(model, clips)

        latents = encoding()

        def decoding() -> Tensor:
            with precision():
                return decode(model, latents, clip_shape[1])

        return {
            part: {
                "clips_per_second": spread([batch_size / s for s in seconds(step, device, warmup, repeats)]),
                "peak_memory_bytes": peak_memory(step, device, [weights, given]),
            }
            for part, step, given in (("encode", encoding, clips), ("decode", decoding, latents))
        }

    with _evaluating(model):
        counts = _flops_or_reason(model, clip_shape, encode, decode)
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


@torch.no_grad()
def flops(
    model: VideoAutoencoder, clip_shape: Sequence[int], encode: Encode = encode_whole, decode: Decode = decode_whole
) -> dict[str, int]:
    """Floating-point operations of `encode` and `decode` for one clip (3, T, H, W); a multiply–add is two.

    Matrix products, convolutions and attention are counted, by PyTorch's own counter; additions, norms and activations
    are not. On the meta device, where nothing is computed: it shows the counter every product, also those that a CPU
    hides in fused kernels.
    """
    model = _on_meta(model).eval()
    clip = _clips(model, 1, clip_shape)
    counts = {}
    with FlopCounterMode(display=False) as counter:
        latents = encode(model, clip)
    counts["encode"] = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        decode(model, latents, clip_shape[1])
    counts["decode"] = counter.get_total_flops()
    return counts


def seconds(run: Callable[[], object], device: torch.device, warmup: int, repeats: int) -> list[float]:
    """Wall time of each of `repeats` calls after `warmup` others, until the device has done its work."""
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
    """Median, least and most."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def device_name(device: torch.device | str) -> str:
    """The hardware by name: `cpu (Intel(R) Xeon(R) …)`, `NVIDIA H100 80GB HBM3`."""
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


def _clips(model: nn.Module, batch_size: int, clip_shape: Sequence[int]) -> Tensor:
    """Noise in [-1, 1] in the weights' type; no values for a model on the meta device."""
    first = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    if first.is_meta:
        return torch.empty(batch_size, *clip_shape, dtype=first.dtype, device="meta")
    noise = torch.rand(batch_size, *clip_shape, generator=torch.Generator().manual_seed(0))
    return (2 * noise - 1).to(first.dtype)


def _on_meta(model: VideoAutoencoder) -> VideoAutoencoder:
    """A copy without values, made without a second copy of the weights."""
    known: dict[int, Any] = {
        id(p): nn.Parameter(torch.empty_like(p, device="meta"), p.requires_grad) for p in model.parameters()
    }
    known |= {id(b): torch.empty_like(b, device="meta") for b in model.buffers()}
    return copy.deepcopy(model, known)


def _flops_or_reason(model: VideoAutoencoder, clip_shape: Sequence[int], encode: Encode, decode: Decode) -> Any:
    try:
        return flops(model, clip_shape, encode, decode)
    except UserError:
        raise
    except (RuntimeError, NotImplementedError) as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"Expected {type(model).__name__} to run on the meta device, where FLOPs are counted, got: {line}; keep "
            "its forward pass free of what asks for a tensor's values."
        ) from error


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In evaluation inside, each part as it was afterwards."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
