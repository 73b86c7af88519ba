"""Compile the repeated blocks of networks by torch.compile, in trainings and in commands.

Blocks of one shape share a compiled graph, so that a model of 32 blocks starts as fast as one of 2, and whatever stands
around a block (checkpointing, hooks of DDP and FSDP2) stays outside of the graphs. Names of weights, checkpoints and
arithmetic stay; fused kernels round differently.
"""

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from vidtwin.errors import UserError
from vidtwin.posteriors import Encoding, Posterior

Mode = Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]

_GRAPHS = 64  # per function, before torch falls back to eager: training and validation, batches of several sizes


def check_backend(backend: str, option: str) -> None:
    """Raise `UserError` unless torch.compile has a backend of this name."""
    if backend not in (backends := torch.compiler.list_backends(exclude_tags=())):
        raise UserError(f"Expected {option} among {', '.join(backends)}, got {backend!r}.")


def list_units(model: nn.Module) -> list[nn.Module]:
    """List the units that are compiled, or gathered by FSDP2: the outermost elements of module lists, then the model.

    A model with an attribute `repeated_blocks` has those instead, then itself. Elements without a forward pass of their
    own are searched for inner ones. An element with the last layer is not a unit, since the adaptive GAN weight needs
    that layer's weight between the forward and the backward pass.
    """
    if (blocks := getattr(model, "repeated_blocks", None)) is not None:
        return [*blocks, model]
    found: dict[nn.Module, None] = {}

    def visit(module: nn.Module) -> None:
        for child in module.children():
            runs = type(child).forward is not nn.Module.forward
            parameters = set(child.parameters())
            if isinstance(module, nn.ModuleList) and runs and parameters and model.last_layer not in parameters:
                found[child] = None
            else:
                visit(child)

    visit(model)
    return [*found, model]


class CompiledUnits:
    """Modules with compiled forward passes, until `restore`.

    Args:
        units: The modules.
        mode: Mode of the backend "inductor". "reduce-overhead" and "max-autotune" replay CUDA graphs on a GPU; on a
            CPU there are none.
        backend: Backend of torch.compile.
    """

    def __init__(self, units: Iterable[nn.Module], mode: Mode = "default", backend: str = "inductor") -> None:
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        self._units = list(units)
        inductor_mode = mode if backend == "inductor" else None  # others have none
        self._graphs = torch.cuda.is_available() and inductor_mode in ("reduce-overhead", "max-autotune")
        for unit in self._units:
            # The function and not the module: hooks (DDP's, FSDP2's) run outside, and state dicts keep their names.
            compiled = torch.compile(unit.forward, mode=inductor_mode, backend=backend, dynamic=False)
            object.__setattr__(unit, "forward", compiled)

    def begin(self) -> None:
        """Begin a pass through the units, in which CUDA graphs may overwrite the outputs of earlier passes."""
        if self._graphs:
            torch.compiler.cudagraph_mark_step_begin()

    def restore(self) -> None:
        """Give the modules their own forward passes back."""
        for unit in self._units:
            object.__delattr__(unit, "forward")
        self._units = []


def copy_encoding(encoding: Encoding, count: int) -> Encoding:
    """Copy the first `count` clips of an encoding's posteriors, in place, so that no CUDA graph overwrites them."""
    for posterior in encoding.values():
        _copy(posterior, count, len(posterior.mode()))
    return encoding


def _copy(posterior: Posterior, count: int, size: int) -> None:
    """Copy the tensors of a posterior of `size` clips, and those of posteriors that it holds."""
    for name, value in vars(posterior).items():
        if isinstance(value, Posterior):
            _copy(value, count, size)
        elif isinstance(value, Tensor):
            setattr(posterior, name, (value[:count] if value.shape[:1] == (size,) else value).clone())
