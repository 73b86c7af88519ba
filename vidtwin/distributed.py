"""Start processes that share work without training, by Lightning Fabric."""

import os
from contextlib import AbstractContextManager
from datetime import timedelta
from typing import Any, Literal, TypeVar

import torch.distributed
from lightning.fabric import Fabric
from lightning.fabric.strategies import DDPStrategy

from vidtwin.errors import UserError
from vidtwin.precision import full_precision

T = TypeVar("T")
Precision = Literal["32-true", "16-mixed", "bf16-mixed", "64-true"]

_WAIT = timedelta(hours=12)  # one process may work for long while the others wait for it


def launch(accelerator: str, devices: int | list[int] | str, num_nodes: int, precision: Precision) -> Fabric:
    """Start the processes; each returns from here. Raise `UserError` if the machine lacks a device."""
    several = num_nodes > 1 or (len(devices) > 1 if isinstance(devices, list) else devices not in (1, "1"))
    started = int(os.environ.get("WORLD_SIZE", 1))
    if not several and started > 1:
        raise UserError(
            f"Expected devices (and num_nodes) for the {started} processes that this one was started with, got one "
            f"device; give --devices {os.environ.get('LOCAL_WORLD_SIZE', started)}."
        )
    try:
        fabric = Fabric(
            accelerator=accelerator,
            devices=devices,
            num_nodes=num_nodes,
            strategy=DDPStrategy(timeout=_WAIT) if several else "auto",
            precision=precision,
        )
    except (ValueError, RuntimeError) as error:
        raise UserError(str(error)) from error
    fabric.launch()
    fabric.barrier()  # what one process found in the outputs' folder before is true until all have looked
    return fabric


def forward_context(fabric: Fabric, precision: Precision) -> AbstractContextManager[Any]:
    """Return the context of a forward pass: autocast, or products without TF32 if the precision is "true"."""
    return full_precision(fabric.device) if precision.endswith("-true") else fabric.autocast()


def gather_objects(value: T) -> list[T]:
    """Return the values of all processes, by rank. All processes must call it together."""
    if not torch.distributed.is_initialized():
        return [value]
    gathered: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, value)
    return gathered
