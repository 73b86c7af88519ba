"""Precision of float32 products: all bits for metrics, TensorFloat-32 for trainings that ask for it."""

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
    backends: list[Any] = [torch.backends.mkldnn.conv, torch.backends.mkldnn.matmul]  # type: ignore[attr-defined]
    with _fp32_precision("ieee", _cuda() + backends), torch.autocast(device.type, enabled=False):
        yield


@contextmanager
def tensor_float_32() -> Iterator[None]:
    """Let float32 products and convolutions on CUDA use TensorFloat-32."""
    with _fp32_precision("tf32", _cuda()):
        yield


def _cuda() -> list[Any]:
    return [torch.backends.cudnn.conv, torch.backends.cuda.matmul]  # type: ignore[attr-defined]


@contextmanager
def _fp32_precision(precision: str, backends: list[Any]) -> Iterator[None]:
    before = [backend.fp32_precision for backend in backends]
    try:
        for backend in backends:
            backend.fp32_precision = precision
        yield
    finally:
        for backend, value in zip(backends, before, strict=True):
            backend.fp32_precision = value
