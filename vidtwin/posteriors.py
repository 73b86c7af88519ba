"""Posterior distributions of latents, with a sample, a mode and regularization terms.

An autoencoder's `encode` returns an :class:`Encoding`, which maps each latent's name to its posterior. Training decodes
`encoding.sample()`, validation and the commands on videos decode `encoding.mode()`, `vidtwin test` what
`protocol.posterior` says (by default a sample).
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor

Latents = dict[str, Tensor]


class Posterior(ABC):
    """The distribution of one latent given the clip."""

    @abstractmethod
    def sample(self) -> Tensor:
        """Draw one latent of shape (B, ...)."""

    @abstractmethod
    def mode(self) -> Tensor:
        """Return the most likely latent of shape (B, ...), which is stored on disk."""

    @abstractmethod
    def regularization(self) -> dict[str, Tensor]:
        """Return unweighted scalar terms by name, `{}` if there are none. The loss weights them."""


class DiagonalGaussian(Posterior):
    """A factorized Gaussian N(mean, exp(logvar)) with the log-variance clamped to [-30, 20].

    Args:
        mean: (B, ...).
        logvar: Same shape as `mean`, before the clamp.
    """

    def __init__(self, mean: Tensor, logvar: Tensor) -> None:
        self.mean = mean
        self.logvar = logvar.clamp(-30.0, 20.0)

    def sample(self) -> Tensor:
        return self.mean + torch.exp(0.5 * self.logvar) * torch.randn_like(self.mean)

    def mode(self) -> Tensor:
        return self.mean

    def kl(self) -> Tensor:
        """Return the KL of each element to N(0, 1) in nats, shape (B, ...), in float32 (float64 if `mean` is)."""
        mean, logvar = self.mean, self.logvar
        if mean.dtype != torch.float64:
            mean, logvar = mean.float(), logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)

    def regularization(self) -> dict[str, Tensor]:
        """Return `kl` to N(0, 1) in nats, summed over the latent and averaged over the batch (per clip)."""
        return {"kl": self.kl().sum() / self.mean.shape[0]}


class StandardizedGaussian(DiagonalGaussian):
    """The Gaussian of a latent z, standardized: (z − shift) / scale. Its KL is that of z itself.

    Args:
        mean: (B, C, T', h, w), of z.
        logvar: Same shape as `mean`.
        shift: Broadcast to `mean`.
        scale: Broadcast to `mean`, positive.
    """

    def __init__(self, mean: Tensor, logvar: Tensor, shift: Tensor, scale: Tensor) -> None:
        self.own = DiagonalGaussian(mean, logvar)
        super().__init__((mean - shift) / scale, self.own.logvar - 2 * scale.log())

    def kl(self) -> Tensor:
        return self.own.kl()


class Deterministic(Posterior):
    """A latent without noise, such as CMD's.

    Args:
        value: (B, ...).
    """

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value

    def regularization(self) -> dict[str, Tensor]:
        return {}


class Quantized(Posterior):
    """A latent of codebook entries.

    Args:
        value: (B, ...) quantized vectors, with the straight-through gradient if the encoder trains.
        codes: (B, ...) integer codes, as a codec would store them.
        codebook_size: Number of codebook entries; one code takes log2(codebook_size) bits.
        terms: The quantizer's own unweighted losses by name (commitment, codebook, entropy).
    """

    def __init__(
        self, value: Tensor, codes: Tensor, codebook_size: int, terms: dict[str, Tensor] | None = None
    ) -> None:
        self.value = value
        self.codes = codes
        self.codebook_size = codebook_size
        self.terms = terms or {}

    @property
    def bits(self) -> float:
        """Number of bits in one clip's codes."""
        return self.codes[0].numel() * math.log2(self.codebook_size)

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value

    def regularization(self) -> dict[str, Tensor]:
        return dict(self.terms)


class Stream(Posterior):
    """A latent of a codec: the bytes of each clip, from which alone it is decoded.

    Args:
        value: (B, L) int16, a byte a place; -1 after the end of a clip that has fewer bytes than another.
        numbers: (B,) the numbers that the bytes of each clip stand for, by default the bytes themselves.
    """

    END = -1

    def __init__(self, value: Tensor, numbers: Tensor | None = None) -> None:
        self.value = value
        self.numbers = self.sizes if numbers is None else numbers

    @classmethod
    def pack(cls, coded: Sequence[bytes], numbers: Sequence[int] | None = None) -> Self:
        """Put the bytes of clips into one tensor."""
        value = torch.full((len(coded), max(map(len, coded))), cls.END, dtype=torch.int16)
        for row, content in zip(value, coded, strict=True):
            row[: len(content)] = torch.frombuffer(bytearray(content), dtype=torch.uint8)
        return cls(value, None if numbers is None else torch.tensor(numbers))

    @classmethod
    def unpack(cls, value: Tensor) -> list[bytes]:
        """Return the bytes of each clip from `value`."""
        return [row[row != cls.END].to(torch.uint8).numpy().tobytes() for row in value.cpu()]

    @property
    def sizes(self) -> Tensor:
        """Number of bytes of each clip, (B,)."""
        return (self.value != self.END).sum(1)

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value

    def regularization(self) -> dict[str, Tensor]:
        return {}


class Encoding(dict[str, Posterior]):
    """Mapping from the name of each latent to its posterior."""

    def sample(self) -> Latents:
        """Sample every latent, each (B, ...)."""
        return {name: posterior.sample() for name, posterior in self.items()}

    def mode(self) -> Latents:
        """Return the mode of every latent, each (B, ...)."""
        return {name: posterior.mode() for name, posterior in self.items()}

    def regularization(self) -> dict[str, Tensor]:
        """Sum the latents' terms by name (VidTwin: KL of structure + KL of dynamics)."""
        total: dict[str, Tensor] = {}
        for posterior in self.values():
            for name, term in posterior.regularization().items():
                total[name] = total[name] + term if name in total else term
        return total
