"""Entropy coding of whole numbers by the range coder of `constriction`, and its lower bound.

    coded = encode([(symbols, table([0.7, 0.2, 0.1])), …])                    # bytes
    decode(coded, [(len(symbols), table([0.7, 0.2, 0.1])), …])                # the same symbols
    entropy(symbols)                                                          # bits of all of them

The package (MIT, Apache 2.0 or BSL 1.0) is imported when something is coded.
"""

import importlib
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from vidtwin.errors import UserError

Symbols = NDArray[np.int32]
Model = Any  # a distribution of constriction


@cache
def load() -> Any:
    """Import `constriction.stream`; `UserError` says how to install it."""
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise UserError(
            f"Expected the package constriction to code latents, got an import error ({error}); pip install "
            "'vidtwin[rates]'."
        ) from error


def table(probabilities: ArrayLike) -> Model:
    """Make the distribution of the symbols 0, 1, … from their probabilities, which need not add up to 1.

    Every symbol can be coded, one of probability 0 in 24 bits.
    """
    return load().model.Categorical(np.asarray(probabilities, np.float32), perfect=False)


def uniform(size: int) -> Model:
    """Make the uniform distribution of the symbols 0 to `size` - 1."""
    return load().model.Uniform(size)


def laplace(limit: int, scale: float) -> Model:
    """Make a Laplace distribution around 0, rounded to whole numbers from -`limit` to `limit`."""
    return load().model.QuantizedLaplace(-limit, limit, 0.0, scale)


def encode(parts: Sequence[tuple[Symbols, Model]]) -> bytes:
    """Code groups of symbols, one after the other, into one stream.

    Args:
        parts: Symbols, int32 of any shape, and their distribution.
    """
    coder = load().queue.RangeEncoder()
    for symbols, model in parts:
        if symbols.size:
            coder.encode(np.ascontiguousarray(symbols, np.int32).ravel(), model)
    # Of the coder's 32-bit words the last one often ends in zeros, which the decoder can put back.
    coded: bytes = coder.get_compressed().astype(">u4").tobytes()
    kept = coded.rstrip(b"\0")
    return coded[: max(len(kept), len(coded) - 3)]


def decode(coded: bytes, parts: Sequence[tuple[int, Model]]) -> list[Symbols]:
    """Decode the groups of symbols of a stream, each (N,).

    Args:
        coded: Result of `encode`.
        parts: Number of symbols and distribution of each group, those of `encode`.
    """
    words = np.frombuffer(coded + b"\0" * (-len(coded) % 4), ">u4").astype(np.uint32)
    decoder = load().queue.RangeDecoder(words)
    return [decoder.decode(model, count) if count else np.empty(0, np.int32) for count, model in parts]


def entropy(symbols: ArrayLike) -> float:
    """Compute the empirical entropy of symbols in bits, N · H(shares): no code of a fixed table is shorter."""
    _, counts = np.unique(np.asarray(symbols), return_counts=True)
    total = counts.sum()
    return float((counts * np.log2(total / counts)).sum())
