"""Share, copy and restore running buffers: those that forward passes change, such as batch statistics and codebooks."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn


class RunningBuffers:
    """The buffers in a model's state dict, found once.

    They are read by name, since some modules replace a buffer's tensor in the forward pass.
    """

    def __init__(self, model: nn.Module) -> None:
        kept = model.state_dict(keep_vars=True)
        self._places = [
            (module, name)
            for prefix, module in model.named_modules()
            for name, _ in module.named_buffers(recurse=False)
            if (f"{prefix}.{name}" if prefix else name) in kept
        ]

    def tensors(self) -> list[Tensor]:
        """Return the present tensors."""
        return [getattr(module, name) for module, name in self._places]

    @torch.no_grad()
    def share(self) -> None:
        """Copy those of the first rank to all ranks. All ranks must call it together."""
        buffers = self.tensors()
        for dtype in sorted({buffer.dtype for buffer in buffers}, key=str):
            same = [buffer for buffer in buffers if buffer.dtype == dtype]
            flat = torch.cat([buffer.flatten() for buffer in same])
            dist.broadcast(flat, src=0)
            for buffer, values in zip(same, flat.split([buffer.numel() for buffer in same]), strict=True):
                buffer.copy_(values.view_as(buffer))

    def copy(self) -> list[Tensor]:
        """Copy the tensors, so that `restore` can undo a forward pass."""
        return [buffer.clone() for buffer in self.tensors()]

    @torch.no_grad()
    def restore(self, before: Sequence[Tensor]) -> None:
        """Restore copied values."""
        for buffer, values in zip(self.tensors(), before, strict=True):
            buffer.copy_(values)
