"""The use of latents over all clips of a validation: KL and active units, or codes.

Each number of a latent (B, C, ...) is a unit; the units with one index of axis 1 are a channel.
"""

from typing import Self

import torch
from torch import Tensor

from vidtwin.errors import UserError
from vidtwin.posteriors import DiagonalGaussian, Encoding, Posterior, Quantized

ACTIVE_VARIANCE = 0.01
"""A unit is active if its posterior's mean varies by more than this over the clips (Burda et al. 2016, 5.2)."""


class LatentStatistics:
    """Running sums over clips, in double precision on the CPU; those of several ranks can be merged.

    Sums know their sizes by the first clip alone, so this is not a torchmetrics `Metric`: its ranks could not agree
    on what to exchange when one of them has seen no clip.

        statistics.update(encoding)                     # for each batch
        statistics.merge(other)                         # other clips, of another rank
        statistics.compute()["structure"]["kl"]         # (C,)
    """

    def __init__(self) -> None:
        self.sums: dict[str, dict[str, Tensor]] = {}

    @torch.no_grad()
    def update(self, encoding: Encoding) -> None:
        """Add the clips of a batch."""
        for name, posterior in encoding.items():
            self._add(name, _sums(posterior))

    def merge(self, other: Self) -> None:
        """Add the clips that `other` has seen; it stays as it is."""
        for name, sums in other.sums.items():
            self._add(name, sums)

    def compute(self) -> dict[str, dict[str, Tensor]]:
        """Return by latent, for those that were given:

        - "active_units" (C,): how many units of the channel are active, of "units" () that it has: those whose
          posterior's mean (or value, where there is no noise) has a variance over the clips above 0.01.
        - "kl" (C,), of Gaussians: KL to N(0, 1) in nats, summed over the channel's units, mean over the clips.
        - "codebook_usage" (), of quantized latents in place of all these: the share of the codebook that occurs,
          "dead_codes" (): how many codes never do, "codebook_size" (), and
          "perplexity" (): exp of the entropy of how often each code occurs, 1 for a single code up to the codebook's
          size for all alike. Few clips hold few codes: neither can exceed the number of codes seen.
        """
        return {name: _of_codes(**sums) if "codes" in sums else _of_units(**sums) for name, sums in self.sums.items()}

    def _add(self, name: str, sums: dict[str, Tensor]) -> None:
        known = self.sums.get(name, {key: torch.zeros_like(value) for key, value in sums.items()})
        before, now = ({key: tuple(value.shape) for key, value in each.items()} for each in (known, sums))
        if before != now:
            raise UserError(f"Expected {name} to be of one kind and size in all clips, got {before} and then {now}.")
        self.sums[name] = {key: known[key] + value for key, value in sums.items()}


@torch.no_grad()
def codebook_use(encoding: Encoding) -> dict[str, Tensor]:
    """Compute `codebook_usage/<latent>` and `perplexity/<latent>` of one batch (see `compute`)."""
    values: dict[str, Tensor] = {}
    for name, posterior in encoding.items():
        if isinstance(posterior, Quantized):
            # A counter for each code: `unique` would make the training step wait for the device.
            codes = posterior.codes.flatten()
            counts = codes.new_zeros(posterior.codebook_size).scatter_add_(0, codes, torch.ones_like(codes))
            shares = counts.to(torch.float32) / codes.numel()
            values[f"codebook_usage/{name}"] = (counts > 0).to(torch.float32).mean()
            values[f"perplexity/{name}"] = torch.special.entr(shares).sum().exp()
    return values


def _sums(posterior: Posterior) -> dict[str, Tensor]:
    """Compute the sums over a batch's clips."""
    if isinstance(posterior, Quantized):
        return {"codes": torch.bincount(posterior.codes.flatten().cpu(), minlength=posterior.codebook_size)}
    mean = _by_channel(posterior.mode())
    sums = {"clips": torch.tensor(len(mean)), "mean": mean.sum(0), "square": mean.square().sum(0)}
    if isinstance(posterior, DiagonalGaussian):
        sums["kl"] = _by_channel(posterior.kl()).sum((0, 2))
    return sums


def _by_channel(latent: Tensor) -> Tensor:
    """Reshape (B, C, ...) → (B, C, units), double. On the CPU, as not every accelerator has doubles."""
    channels = latent.shape[1] if latent.ndim > 1 else 1
    return latent.cpu().double().reshape(len(latent), channels, -1)


def _of_units(clips: Tensor, mean: Tensor, square: Tensor, kl: Tensor | None = None) -> dict[str, Tensor]:
    variance = square / clips - (mean / clips).square()
    # 0 · variance is NaN where a number was not finite: a broken unit must not pass for a quiet one.
    active = (variance > ACTIVE_VARIANCE) + 0 * variance
    values = {"active_units": active.sum(1), "units": torch.tensor(mean.shape[1])}
    return values if kl is None else {**values, "kl": kl / clips}


def _of_codes(codes: Tensor) -> dict[str, Tensor]:
    shares = codes.double() / codes.sum()
    return {
        "codebook_usage": (codes > 0).double().mean(),
        "dead_codes": (codes == 0).sum(),
        "codebook_size": torch.tensor(len(codes)),
        "perplexity": torch.special.entr(shares).sum().exp(),
    }
