"""Compile the networks of a training by torch.compile, unit by unit.

A unit is what FSDP2 shards: a repeated block (`sharding.list_units`). Blocks of one shape share one compiled graph, so
that a model of 32 blocks starts as fast as one of 2, and activation checkpointing, DDP's and FSDP2's hooks stay outside
of the graphs. The LightningModule is never compiled. Names of weights, checkpoints and arithmetic stay; fused kernels
round differently.
"""

from collections.abc import Iterator
from typing import Literal, cast

import torch
from torch import nn

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.losses.frame_distance import FrameDistance
from vidtwin.training.sharding import list_units

Part = Literal["autoencoder", "perceptual", "discriminator"]
Mode = Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"]

_PARTS: tuple[Part, ...] = ("autoencoder", "perceptual", "discriminator")
_GRAPHS = 64  # per function, before torch falls back to eager: training and validation, batches of several sizes


class Compilation:
    """Choose what torch.compile compiles in `fit`. The first steps take longer, by seconds to minutes.

    Args:
        parts: Networks to compile: the blocks of the autoencoder, the perceptual network, the discriminator; None
            compiles all of them, but no discriminator whose gradient R1 differentiates again.
        mode: Mode of torch.compile. "reduce-overhead" and "max-autotune" use CUDA graphs on a GPU.
        backend: Backend of torch.compile; "inductor" writes kernels, "aot_eager" none (to look for faults).

    Raises:
        UserError: `parts` is empty or has unknown names.
    """

    def __init__(
        self,
        parts: list[Part] | None = None,
        mode: Mode = "default",
        backend: str = "inductor",
    ) -> None:
        if parts is not None and (not parts or set(parts) - set(_PARTS)):
            raise UserError(f"Expected model.compilation.parts among {', '.join(_PARTS)}, got {parts}.")
        if backend not in (backends := torch.compiler.list_backends(exclude_tags=())):
            raise UserError(f"Expected model.compilation.backend among {', '.join(backends)}, got {backend!r}.")
        self.parts, self.mode, self.backend = parts, mode, backend
        self._compiled: list[nn.Module] = []

    def check(self, loss: AutoencoderLoss) -> None:
        """Raise `UserError` if a loss needs what a compiled network does not give."""
        if "discriminator" in (self.parts or ()) and loss.discriminator is not None and loss.r1_weight > 0:
            raise UserError(
                "Expected model.loss.r1_weight 0 for a compiled discriminator, whose gradient torch.compile does not "
                "differentiate again, got one above; set --model.compilation.parts [autoencoder,perceptual]."
            )

    def compile(self, autoencoder: VideoAutoencoder, loss: AutoencoderLoss) -> None:
        """Compile the forward passes of the chosen networks, until `restore`."""
        self.restore()
        config = torch._dynamo.config
        config.recompile_limit = max(config.recompile_limit, _GRAPHS)
        for unit in self._units(autoencoder, loss):
            # The function and not the module: hooks (DDP's, FSDP2's) run outside, and state dicts keep their names.
            compiled = torch.compile(unit.forward, mode=self.mode, backend=self.backend, dynamic=False)
            object.__setattr__(unit, "forward", compiled)
            self._compiled.append(unit)

    def restore(self) -> None:
        """Undo `compile`."""
        for unit in self._compiled:
            object.__delattr__(unit, "forward")
        self._compiled = []

    def _units(self, autoencoder: VideoAutoencoder, loss: AutoencoderLoss) -> Iterator[nn.Module]:
        parts = self.parts or [part for part in _PARTS if part != "discriminator" or not loss.r1_weight]
        if "autoencoder" in parts:
            yield from list_units(autoencoder)[:-1]  # the last one is the model
        if "perceptual" in parts and isinstance(loss.perceptual, FrameDistance) and loss.perceptual_weight > 0:
            yield cast(nn.Module, loss.perceptual.network)
        if "discriminator" in parts and loss.discriminator is not None:
            yield loss.discriminator
