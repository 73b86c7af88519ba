"""Share, copy and restore running buffers: those that forward passes change, such as batch statistics and codebooks."""

from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn


def running_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers in a model's state dict, by name."""
    kept = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in kept}


@torch.no_grad()
def share_buffers(model: nn.Module) -> None:
    """Copy the running buffers of the first rank to all ranks. All ranks must call it together."""
    buffers = list(running_buffers(model).values())
    for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
        same = [buffer for buffer in buffers if buffer.dtype == dtype]
        flat = torch.cat([buffer.flatten() for buffer in same])
        dist.broadcast(flat, src=0)
        for buffer, values in zip(same, flat.split([buffer.numel() for buffer in same]), strict=True):
            buffer.copy_(values.view_as(buffer))


def copy_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Copy the running buffers, so that `restore_buffers` can undo a forward pass."""
    return {name: buffer.clone() for name, buffer in running_buffers(model).items()}


@torch.no_grad()
def restore_buffers(model: nn.Module, before: Mapping[str, Tensor]) -> None:
    """Restore copied values by name, since some modules replace a buffer's tensor in the forward pass."""
    for name, buffer in running_buffers(model).items():
        buffer.copy_(before[name])
