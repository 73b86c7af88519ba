"""Measure peak memory, and report a lack of memory.

On CUDA PyTorch's allocator counts. A CPU has no such counter, and the size of a process includes the interpreter and
memory that was freed before: there the tensors are counted.
"""

import re
import weakref
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vidtwin.errors import UserError

Result = TypeVar("Result")


class TensorMemory(TorchDispatchMode):
    """Count the bytes of the tensors that live on a device while it is on.

    A storage counts from the operation that hands it out until its last tensor is gone, views once. What a kernel takes
    for itself and frees before it returns is not seen: a CPU's 3-D convolution may need several times its input (the
    profiler sees 74 MB in the encoder of configs/baselines/magvit2_tiny.yaml, this 18 MB; with VidTwin the same), and
    a fused kernel, such as the one of `nn.TransformerEncoderLayer` in evaluation, all that is inside of it.

    Attributes:
        live: Bytes now.
        peak: The most there were.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.live = self.peak = 0
        self._sizes: dict[int, int] = {}
        self._references: dict[int, weakref.ref] = {}

    def track(self, values: Any) -> None:
        """Count the tensors of nested values, each once."""
        for tensor in tensors(values, self.device):
            storage = tensor.untyped_storage()
            key = id(storage)  # torch keeps one Python object for a storage as long as that lives
            if key not in self._sizes:
                self._references[key] = weakref.ref(storage, partial(self._forget, key))
            self.live += storage.nbytes() - self._sizes.get(key, 0)  # an operation may have resized it
            self._sizes[key] = storage.nbytes()
        self.peak = max(self.peak, self.live)

    def _forget(self, key: int, _: weakref.ref) -> None:
        del self._references[key]
        self.live -= self._sizes.pop(key)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func.namespace == "prim":  # a question about a tensor, by fake tensors
            return func(*args, **(kwargs or {}))
        # In inference mode composite operations arrive whole, and what they are made of would not be seen.
        with self:
            result = func.decompose(*args, **(kwargs or {}))
        if result is NotImplemented:
            result = func(*args, **(kwargs or {}))
        self.track(result)
        return result


def tensors(values: Any, device: torch.device) -> list[Tensor]:
    """Return the tensors on a device in nested values and their gradients. Sparse ones have no storage."""
    found = [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]
    found += [leaf.grad for leaf in found if leaf.is_leaf and leaf.grad is not None]
    return [tensor for tensor in found if tensor.device.type == device.type and tensor.layout == torch.strided]


def counter_name(device: torch.device) -> str:
    """Return the name of the counter: `memory_counter` of results.json."""
    return "CUDA allocator" if device.type == "cuda" else "tensors"


def peak_memory(run: Callable[[], object], device: torch.device, held: Iterable[Any]) -> int:
    """Measure the bytes on `device` at the peak of `run()`, including `held`: weights, inputs, an optimizer's state.

    On CUDA other tensors on the device, such as a metric's network, are subtracted. Run it once before: libraries keep
    workspaces from their first call on.
    """
    held = list(held)
    if device.type != "cuda":
        with TensorMemory(device) as memory:
            memory.track(held)
            run()
        return memory.peak
    torch.cuda.synchronize(device)
    storages = [tensor.untyped_storage() for tensor in tensors(held, device)]
    own = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    others = torch.cuda.memory_allocated(device) - own
    torch.cuda.reset_peak_memory_stats(device)
    run()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - others


def within_memory(run: Callable[[], Result], device: torch.device, tried: str) -> Result:
    """Call `run`; turn a lack of memory into a `UserError` that names `tried`, and keep the device usable."""
    try:
        return run()
    except (RuntimeError, MemoryError) as error:
        out_of_memory = isinstance(error, (torch.OutOfMemoryError, MemoryError))
        if not out_of_memory and "DefaultCPUAllocator" not in str(error):
            raise
        amount = re.search(r"tried to allocate ([\d.]+ \w+)", str(error), re.IGNORECASE)
        more = f" when it asked for {amount[1]} more" if amount else ""
    # Here, since the error keeps the tensors of all frames that it went through.
    if device.type == "cuda":
        torch.cuda.empty_cache()
    raise UserError(
        f"Expected enough memory on {device} for {tried}, got out of memory{more}; free some or take a larger device."
    )
