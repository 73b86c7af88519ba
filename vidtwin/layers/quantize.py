"""Quantizers with a learned (VQ-VAE) or fixed (lookup-free) codebook: vectors to codes, and codes back to vectors.

Vectors are (..., D), quantized along the last axis; codes are (...), int64. Each quantizer returns the quantized
vectors with the straight-through gradient, the codes, and its unweighted losses by name.
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
    """Quantizer to the nearest of K learned vectors (van den Oord et al. 2017), trained only by gradients.

    Terms, means over all numbers: `commitment` (z − sg e)², which moves the encoder, and `codebook` (sg z − e)², which
    moves the chosen entries. There are no running averages, and unused entries are not restarted.

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
        """Quantize (..., D) to the nearest entries by Euclidean distance."""
        z = _as_float(z)
        # torch.autocast raises on devices without autocast (meta).
        exact = torch.autocast(z.device.type, enabled=False) if is_autocast_available(z.device.type) else nullcontext()
        with torch.no_grad(), exact:
            vectors, entries = z.reshape(-1, z.shape[-1]), self.embedding.weight.to(z.dtype)
            # |z|² of |z|² − 2 z·e + |e|² is the same for all entries, so it is left out.
            scores = torch.addmm(entries.square().sum(1), vectors, entries.T, alpha=-2.0)
            codes = scores.argmin(1).view(z.shape[:-1])
        chosen = self.lookup(codes).to(z.dtype)
        terms = {
            "commitment": (z - chosen.detach()).square().mean(),
            "codebook": (chosen - z.detach()).square().mean(),
        }
        return Quantization(_straight_through(chosen, z), codes, terms)

    def lookup(self, codes: Tensor) -> Tensor:
        """Look up the entries of codes (...) → (..., D)."""
        return F.embedding(codes, self.embedding.weight)


class LookupFreeQuantizer(nn.Module):
    """Quantizer to the signs of z: 2^K corners without a table (MAGVIT-v2, Yu et al. 2023, section 3.1).

        q = sign(z) ∈ {−1, 1}^K        code = Σ_i 1[z_i > 0] · 2^i

    Terms, with p(c | z) the softmax over all corners of 2 z·c / temperature, in nats:

    - `commitment`: mean (z − sg q)².
    - `entropy`: E H(p(c | z)) − H(E p(c | z)), low if each vector is sure of its code and all codes are used.
      The bits of one z are independent, so the first part is exactly the sum of K one-bit entropies. The second is
      computed per group of at most `group_bits` bits and summed, which is an upper bound (exact for one group). E is
      the mean over the given vectors, which under DDP are those of one rank.

    Args:
        bits: K.
        temperature: Temperature of p.
        group_bits: Maximum number of bits in a joint distribution (2^group_bits numbers per vector).
    """

    def __init__(self, bits: int, temperature: float = 0.01, group_bits: int = 9) -> None:
        super().__init__()
        if not 1 <= bits <= 22:  # logging of codebook usage keeps a counter per code
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
        """Quantize (..., K) to signs."""
        z = _as_float(z)
        positive = z > 0
        signs = torch.where(positive, 1.0, -1.0).to(z.dtype)
        powers = 2 ** torch.arange(self.bits, device=z.device)
        codes = (positive * powers).sum(-1)
        terms = {"commitment": (z - signs).square().mean(), "entropy": self._entropy(z)}
        return Quantization(_straight_through(signs, z), codes, terms)

    def lookup(self, codes: Tensor) -> Tensor:
        """Return the corners of codes (...): (..., K) of -1 and 1."""
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
    """Return exactly `value`, as a decoder gets it from the codes, but pass its gradient to z."""
    return value.detach() + (z - z.detach())


def _entropy(p: Tensor) -> Tensor:
    """Compute the entropy of p in nats; the clamp keeps the gradient of p log p finite at p = 0 (unused corners)."""
    return -(p * p.clamp_min(torch.finfo(p.dtype).tiny).log()).sum()


def _as_float(z: Tensor) -> Tensor:
    """Convert to fp32, except fp64: distances and entropies need more than bf16's three digits."""
    return z if z.dtype == torch.float64 else z.float()
