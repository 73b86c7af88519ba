"""Full precision for metrics, whatever precision the model runs in."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: torch.device) -> Iterator[None]:
    """Disable autocast and TensorFloat-32, so that float32 convolutions and matrix products keep their 24 bits.

    By default PyTorch rounds convolutions on CUDA to TensorFloat-32 (10 bits of mantissa), and matrix products too
    after `torch.set_float32_matmul_precision`; a metric must depend on neither.
    """
    modules: list[Any] = [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]
    modules += [torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    before = [backend.fp32_precision for backend in modules]
    try:
        for backend in modules:
            backend.fp32_precision = "ieee"
        with torch.autocast(device.type, enabled=False):
            yield
    finally:
        for backend, precision in zip(modules, before, strict=True):
            backend.fp32_precision = precision
