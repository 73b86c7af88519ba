"""Compile the networks of a training by torch.compile, unit by unit.

A unit is what FSDP2 shards: a repeated block. Blocks of one shape share a compiled graph, so that a model of 32 blocks
starts as fast as one of 2, and activation checkpointing, DDP's and FSDP2's hooks stay outside of the graphs. The
LightningModule is never compiled. Names of weights, checkpoints and arithmetic stay; fused kernels round differently.
"""

from collections.abc import Mapping, Sequence
from typing import Literal

import torch
from torch import nn

from vidtwin.errors import UserError

Mode = Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]

_GRAPHS = 64  # per function, before torch falls back to eager: training and validation, batches of several sizes


class Compilation:
    """Choose what torch.compile compiles in `fit`. The first steps take longer, by seconds to minutes.

    Args:
        parts: Networks to compile; None compiles all. An autoencoder's training has "autoencoder", "perceptual" and
            "discriminator" (not with `loss.r1_weight`, whose gradient of a gradient torch.compile lacks); that of a
            diffusion model has "denoiser".
        mode: Mode of torch.compile. "reduce-overhead" and "max-autotune" use CUDA graphs on a GPU.
        backend: Backend of torch.compile; "inductor" writes kernels, "aot_eager" none (to look for faults).

    Raises:
        UserError: `backend` is unknown.
    """

    def __init__(self, parts: list[str] | None = None, mode: Mode = "default", backend: str = "inductor") -> None:
        if backend not in (backends := torch.compiler.list_backends(exclude_tags=())):
            raise UserError(f"Expected trainer.compilation.backend among {', '.join(backends)}, got {backend!r}.")
        self.parts, self.mode, self.backend = parts, mode, backend
        self._compiled: list[nn.Module] = []

    def compile(self, units: Mapping[str, Sequence[nn.Module]]) -> None:
        """Compile the forward passes of units by the names of their parts, until `restore`.

        Raises:
            UserError: A chosen part is not there.
        """
        self.restore()
        if self.parts is not None and (not self.parts or set(self.parts) - set(units)):
            raise UserError(f"Expected trainer.compilation.parts among {', '.join(units)}, got {self.parts}.")
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        for unit in (unit for part in dict.fromkeys(self.parts or units) for unit in units[part]):
            # The function and not the module: hooks (DDP's, FSDP2's) run outside, and state dicts keep their names.
            compiled = torch.compile(unit.forward, mode=self.mode, backend=self.backend, dynamic=False)
            object.__setattr__(unit, "forward", compiled)
            self._compiled.append(unit)

    def restore(self) -> None:
        """Undo `compile`."""
        for unit in self._compiled:
            object.__delattr__(unit, "forward")
        self._compiled = []
