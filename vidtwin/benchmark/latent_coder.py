"""Latents as bytes: uniform quantizers by channel, a range coder, and back to exactly the same numbers.

    coder = ClipCoder(fit({"structure": [...], …}, {}), bits=4)     # ranges and probabilities of other clips
    coded = coder.encode({"structure": …})                          # bytes of one clip
    coder.decode(coded.content, {"structure": (4, 784)})            # its symbols, and the values that they stand for

Of latents that were not fitted, each clip's ranges and the normal distributions of its channels are sent with it, 6
bytes a channel.
"""

import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
import torch
from numpy.typing import NDArray

from vidtwin import entropy
from vidtwin.entropy import Symbols

_LARGEST = float(np.finfo(np.float16).max)
Values = NDArray[np.float64]
Array = NDArray[Any]


@dataclass
class Channels:
    """Ranges and probabilities of the channels of one continuous latent.

    A channel's range has 2^bits levels, its ends among them. A range that was fitted on other clips has half as many
    beyond each end, since a clip may leave it: they cost bits only if they occur. Values beyond them are rounded to the
    last one.

    Attributes:
        low: Least value of each channel, (C,).
        high: Largest one.
        mean: Mean.
        std: Standard deviation.
        values: (C, N) of the fit, whose histograms are mixed with the normal distributions; None: these alone.
    """

    low: Values
    high: Values
    mean: Values
    std: Values
    values: Values | None = None
    _tables: dict[int, Values] = field(default_factory=dict, repr=False)

    HEAD = struct.Struct("<2e2B")

    @classmethod
    def fit(cls, values: Values, keep: bool = True) -> Self:
        """Fit the channels of values (C, N)."""
        found = values.min(1), values.max(1), values.mean(1), values.std(1)
        return cls(*found, values if keep else None)

    @classmethod
    def unpack(cls, head: bytes) -> Self:
        """Read what `pack` has written."""
        fields = np.array(list(cls.HEAD.iter_unpack(head)), np.float64).reshape(-1, 4)
        low, high = fields[:, 0], fields[:, 1]
        span = (high - low) / 255
        return cls(low, high, low + fields[:, 2] * span, fields[:, 3] * span)

    def pack(self) -> bytes:
        """Write the ranges in half precision, mean and deviation as 255ths of the range: 6 bytes a channel."""
        low, high = (
            np.clip(x, -_LARGEST, _LARGEST).astype(np.float16).astype(np.float64) for x in (self.low, self.high)
        )
        span = np.where(high > low, high - low, 1)
        mean = np.clip(np.round(255 * (self.mean - low) / span), 0, 255).astype(int)
        std = np.clip(np.round(255 * self.std / span), 1, 255).astype(int)
        return b"".join(self.HEAD.pack(*each) for each in zip(low, high, mean, std, strict=True))

    def quantize(self, values: Values, bits: int) -> Symbols:
        """Round values (C, N) to the nearest levels, numbered from 0."""
        step, beyond = self._step(bits)[:, None], self._beyond(bits)
        symbols = np.round((values - self.low[:, None]) / np.where(step > 0, step, 1))
        symbols = np.where(step > 0, symbols, 0)
        return (np.clip(symbols, -beyond, 2**bits - 1 + beyond) + beyond).astype(np.int32)

    def dequantize(self, symbols: Symbols, bits: int) -> Values:
        """Return the values of levels (C, N)."""
        return self.low[:, None] + (symbols - self._beyond(bits)) * self._step(bits)[:, None]

    def tables(self, bits: int) -> Values:
        """Return the probabilities of each channel's levels, (C, levels)."""
        if bits not in self._tables:
            self._tables[bits] = self._compute_tables(bits)
        return self._tables[bits]

    def _step(self, bits: int) -> Values:
        return (self.high - self.low) / (2**bits - 1)

    def _beyond(self, bits: int) -> int:
        return 0 if self.values is None else 2 ** (bits - 1)

    def _compute_tables(self, bits: int) -> Values:
        """Compute the normal distributions over the levels, mixed with the histograms of the fit."""
        step, beyond = self._step(bits)[:, None], self._beyond(bits)
        count = 2**bits + 2 * beyond
        edges = self.low[:, None] + (np.arange(count + 1) - beyond - 0.5) * step
        edges[:, 0], edges[:, -1] = -np.inf, np.inf
        scaled = (edges - self.mean[:, None]) / np.maximum(self.std, 1e-12)[:, None]
        normal = np.diff(torch.special.ndtr(torch.from_numpy(scaled)).numpy(), axis=1)
        if self.values is None:
            return normal
        symbols = self.quantize(self.values, bits)
        return np.stack([mix(np.bincount(s, minlength=count), p) for s, p in zip(symbols, normal, strict=True)])


@dataclass
class Codes:
    """Probabilities of the codes of a codebook.

    Attributes:
        size: Number of entries.
        counts: How often each one occurs in the clips of the fit; None: all alike.
    """

    size: int
    counts: NDArray[np.int64] | None = None

    def model(self) -> entropy.Model:
        """Make the distribution."""
        if self.counts is None:
            return entropy.uniform(self.size)
        return entropy.table(mix(self.counts, np.full(self.size, 1 / self.size)))


Fitted = dict[str, Channels | Codes]


def mix(counts: NDArray[np.int64], prior: Values) -> Values:
    """Mix the shares of counts with a prior that has the probability of what was not seen.

    By Good and Turing it is the share of what was seen once; at least that of one.
    """
    total = int(counts.sum())
    unseen = min(max(int((counts == 1).sum()), 1) / max(total, 1), 1.0)
    mixed: Values = (1 - unseen) * counts / max(total, 1) + unseen * prior
    return mixed


@dataclass
class Coded:
    """A clip's coded latents.

    Attributes:
        content: The bytes, with the head if there is one.
        symbols: What was coded, by latent.
    """

    content: bytes
    symbols: dict[str, Symbols]

    @property
    def entropy(self) -> float:
        """Empirical entropy of the symbols in bits, channel by channel; of codes all together."""
        channels = [row for each in self.symbols.values() for row in (each if each.ndim == 2 else [each])]
        return sum(map(entropy.entropy, channels))


@dataclass
class ClipCoder:
    """Coder of the latents of clips at one number of bits.

    Args:
        fitted: By latent. Ranges of continuous ones that it lacks are sent with each clip.
        bits: Bits a number of continuous latents.
    """

    fitted: Fitted
    bits: int

    def encode(self, latents: dict[str, Array]) -> Coded:
        """Encode a clip: continuous latents (C, N), and codes (N,)."""
        head, parts, symbols = b"", [], {}
        for name, latent in latents.items():
            known = self.fitted.get(name)
            if isinstance(known, Codes):
                symbols[name] = latent.astype(np.int32)
                parts.append((symbols[name], known.model()))
                continue
            if known is None:
                sent = Channels.fit(latent, keep=False).pack()
                head, known = head + sent, Channels.unpack(sent)
            symbols[name] = known.quantize(latent, self.bits)
            parts += list(zip(symbols[name], map(entropy.table, known.tables(self.bits)), strict=True))
        return Coded(head + entropy.encode(parts), symbols)

    def decode(self, content: bytes, shapes: dict[str, tuple[int, ...]]) -> tuple[dict[str, Symbols], dict[str, Array]]:
        """Decode a clip from its bytes alone.

        Args:
            content: Those of `encode`.
            shapes: Shapes of the latents, which follow from the clip's.

        Returns:
            The symbols of each latent, and its values: dequantized (C, N), or codes (N,).
        """
        known: Fitted = {}
        start, parts = 0, []
        for name, shape in shapes.items():
            found = self.fitted.get(name)
            if found is None:
                end = start + shape[0] * Channels.HEAD.size
                found, start = Channels.unpack(content[start:end]), end
            known[name] = found
            if isinstance(found, Codes):
                parts.append((shape[0], found.model()))
            else:
                parts += [(shape[1], entropy.table(row)) for row in found.tables(self.bits)]
        groups = iter(entropy.decode(content[start:], parts))
        symbols: dict[str, Symbols] = {}
        values: dict[str, Array] = {}
        for name, shape in shapes.items():
            found = known[name]
            if isinstance(found, Codes):
                symbols[name] = values[name] = next(groups)
            else:
                symbols[name] = np.stack([next(groups) for _ in range(shape[0])])
                values[name] = found.dequantize(symbols[name], self.bits)
        return symbols, values


def fit(latents: Mapping[str, Sequence[Values]], codes: Mapping[str, tuple[int, Sequence[Symbols]]]) -> Fitted:
    """Fit the channels of continuous latents, (C, N) of each clip, and the codes of codebooks with their sizes."""
    fitted: Fitted = {name: Channels.fit(np.concatenate(list(clips), 1)) for name, clips in latents.items()}
    for name, (size, clips) in codes.items():
        counts = np.bincount(np.concatenate([clip.ravel() for clip in clips]), minlength=size)
        fitted[name] = Codes(size, counts)
    return fitted
