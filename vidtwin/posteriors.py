"""What an encoder says of a latent: a distribution that can be sampled, has a mode and a regularization term.

An autoencoder's `encode` returns an :class:`Encoding`, one posterior by the name of each latent. Training decodes
`encoding.sample()`, evaluation decodes `encoding.mode()`.
"""

import math
from abc import ABC, abstractmethod

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
        """The most likely latent of shape (B, ...): what is stored, decoded and measured in evaluation."""

    @abstractmethod
    def regularization(self) -> dict[str, Tensor]:
        """Unweighted scalar terms by name; `{}` where there are none. Weights belong to the loss."""


class DiagonalGaussian(Posterior):
    """N(mean, exp(logvar)), independent in every number, with the log-variance clamped to [-30, 20].

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
        """KL of each number to N(0, 1) in nats, (B, ...) as `mean`: in single precision, double where `mean` is."""
        mean, logvar = self.mean, self.logvar
        if mean.dtype != torch.float64:
            mean, logvar = mean.float(), logvar.float()
        return 0.5 * (mean.square() + logvar.exp() - 1.0 - logvar)

    def regularization(self) -> dict[str, Tensor]:
        """`kl` to N(0, 1) in nats, summed over the latent and averaged over the batch (per clip)."""
        return {"kl": self.kl().sum() / self.mean.shape[0]}


class Deterministic(Posterior):
    """A latent without noise (CMD's, for one). `value`: (B, ...)."""

    def __init__(self, value: Tensor) -> None:
        self.value = value

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value

    def regularization(self) -> dict[str, Tensor]:
        return {}


class Quantized(Posterior):
    """A latent that is a choice among the entries of a codebook.

    Args:
        value: (B, ...) quantized vectors; where training needs it, with the straight-through gradient.
        codes: (B, ...) integer codes, what a codec would store.
        codebook_size: Number of codes there are, so that one code is log2(codebook_size) bits.
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
        """Bits of one clip's codes."""
        return self.codes[0].numel() * math.log2(self.codebook_size)

    def sample(self) -> Tensor:
        return self.value

    def mode(self) -> Tensor:
        return self.value

    def regularization(self) -> dict[str, Tensor]:
        return dict(self.terms)


class Encoding(dict[str, Posterior]):
    """One posterior by the name of each latent."""

    def sample(self) -> Latents:
        return {name: posterior.sample() for name, posterior in self.items()}

    def mode(self) -> Latents:
        return {name: posterior.mode() for name, posterior in self.items()}

    def regularization(self) -> dict[str, Tensor]:
        """The latents' terms, those of one name added (VidTwin: KL of structure + KL of dynamics)."""
        total: dict[str, Tensor] = {}
        for posterior in self.values():
            for name, term in posterior.regularization().items():
                total[name] = total[name] + term if name in total else term
        return total
