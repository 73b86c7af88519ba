"""Quantizers: vectors to the entries of a codebook, learned (VQ-VAE) or fixed (lookup-free), and codes back to vectors.

Vectors are (..., D), the last axis being the one that is quantized; codes are (...), int64. Each quantizer returns the
quantized vectors with the straight-through gradient, the codes, and its unweighted losses by name.
"""

from contextlib import nullcontext
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.amp import is_autocast_available

from vidtwin.errors import UserError


class Quantization(NamedTuple):
    """Quantized vectors (..., D), codes (...) and unweighted scalar losses."""

    value: Tensor
    codes: Tensor
    terms: dict[str, Tensor]


class VectorQuantizer(nn.Module):
    """The nearest of K learned vectors (van den Oord et al. 2017), trained by gradients alone.

    Terms, means over all numbers: `commitment` (z − sg e)², which moves the encoder, and `codebook` (sg z − e)², which
    moves the chosen entries. No running averages, no restart of entries that are never chosen.

    Args:
        codebook_size: K.
        size: D.
    """

    def __init__(self, codebook_size: int, size: int) -> None:
        super().__init__()
        self.codebook_size = codebook_size
        self.embedding = nn.Embedding(codebook_size, size)
        nn.init.uniform_(self.embedding.weight, -1 / codebook_size, 1 / codebook_size)

    def forward(self, z: Tensor) -> Quantization:
        """(..., D) → the nearest entries by Euclidean distance."""
        z = _at_least_single(z)
        # Devices without autocast (meta) refuse to switch it off.
        exact = torch.autocast(z.device.type, enabled=False) if is_autocast_available(z.device.type) else nullcontext()
        with torch.no_grad(), exact:
            vectors, entries = z.reshape(-1, z.shape[-1]), self.embedding.weight.to(z.dtype)
            # Of |z|² − 2 z·e + |e|² the first is the same for all entries.
            scores = torch.addmm(entries.square().sum(1), vectors, entries.T, alpha=-2.0)
            codes = scores.argmin(1).view(z.shape[:-1])
        chosen = self.lookup(codes).to(z.dtype)
        terms = {
            "commitment": (z - chosen.detach()).square().mean(),
            "codebook": (chosen - z.detach()).square().mean(),
        }
        return Quantization(_straight_through(chosen, z), codes, terms)

    def lookup(self, codes: Tensor) -> Tensor:
        """(...) → (..., D)."""
        return F.embedding(codes, self.embedding.weight)


class LookupFreeQuantizer(nn.Module):
    """The signs of z, a codebook of 2^K corners without a table (MAGVIT-v2, Yu et al. 2023, section 3.1).

        q = sign(z) ∈ {−1, 1}^K        code = Σ_i 1[z_i > 0] · 2^i

    Terms, with p(c | z) the softmax over all corners of 2 z·c / temperature, in nats:

    - `commitment`: mean (z − sg q)².
    - `entropy`: E H(p(c | z)) − H(E p(c | z)), low where each vector is sure of its code and all codes are in use. The
      bits of one z are independent, so that the first part is exactly the sum of K entropies of one bit. The second
      is not a sum: it is computed within groups of at most `group_bits` bits and added up, which is an upper bound
      (exact for one group). E is over the vectors that are given: under DDP those of one rank.

    Args:
        bits: K.
        temperature: Of p.
        group_bits: Most bits whose joint distribution (2^group_bits numbers a vector) is built.
    """

    def __init__(self, bits: int, temperature: float = 0.01, group_bits: int = 9) -> None:
        super().__init__()
        if not 1 <= bits <= 22:  # use of the codebook is logged, for which each code has a counter
            raise UserError(f"Expected 1 to 22 bits of a lookup-free quantizer, got {bits}.")
        if not 1 <= group_bits <= 12:
            raise UserError(f"Expected groups of 1 to 12 bits, got {group_bits}.")
        if not temperature > 0:
            raise UserError(f"Expected a temperature above 0, got {temperature}.")
        self.bits = bits
        self.codebook_size = 2**bits
        self.temperature = temperature
        self.group_bits = group_bits

    def forward(self, z: Tensor) -> Quantization:
        """(..., K) → signs."""
        z = _at_least_single(z)
        positive = z > 0
        signs = torch.where(positive, 1.0, -1.0).to(z.dtype)
        powers = 2 ** torch.arange(self.bits, device=z.device)
        codes = (positive * powers).sum(-1)
        terms = {"commitment": (z - signs).square().mean(), "entropy": self._entropy(z)}
        return Quantization(_straight_through(signs, z), codes, terms)

    def lookup(self, codes: Tensor) -> Tensor:
        """(...) → (..., K) of -1 and 1."""
        powers = 2 ** torch.arange(self.bits, device=codes.device)
        return torch.where(codes[..., None] & powers > 0, 1.0, -1.0)

    def _entropy(self, z: Tensor) -> Tensor:
        # Corners that differ in bit i alone have logits 4 z_i / temperature apart.
        logits = (4 / self.temperature) * z.reshape(-1, self.bits)
        p, q = logits.sigmoid(), (-logits).sigmoid()
        each = -(p * F.logsigmoid(logits) + q * F.logsigmoid(-logits)).sum(1).mean()
        together = z.new_zeros(())
        for p_group, q_group in zip(p.split(self.group_bits, 1), q.split(self.group_bits, 1), strict=True):
            joint = p.new_ones(p.shape[0], 1)
            for index in range(p_group.shape[1]):
                bit = torch.stack([q_group[:, index], p_group[:, index]], 1)
                joint = (bit[:, :, None] * joint[:, None]).flatten(1)
            together = together + _entropy(joint.mean(0))
        return each - together


def _straight_through(value: Tensor, z: Tensor) -> Tensor:
    """`value` to the last bit, as a decoder gets it from the codes, with the gradient going to z."""
    return value.detach() + (z - z.detach())


def _entropy(p: Tensor) -> Tensor:
    """Of a distribution, in nats. The gradient of p log p has no limit at 0, where corners are that never come."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()


def _at_least_single(z: Tensor) -> Tensor:
    """Distances and entropies need more than bf16's three digits."""
    return z if z.dtype == torch.float64 else z.float()
