"""A diffusion model of an autoencoder's latents: transformer, process, and the scale of the latents."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from vidtwin import plugins
from vidtwin.data import is_varying
from vidtwin.diffusion.process import Process
from vidtwin.diffusion.tokens import LatentShapes, count_numbers, flatten, split
from vidtwin.diffusion.transformer import DiT, TransformerSizes
from vidtwin.errors import UserError
from vidtwin.posteriors import Latents


class LatentDiffusion(nn.Module):
    """Learn and sample the latents of clips, by class.

    Args:
        latent_shapes: Shapes by name, without batch axis.
        num_classes: Number of classes; 0 without.
        process: How noise is added and removed.
        sizes: Sizes of the transformer.

    Attributes:
        mean: Mean of each number of a state before normalization, (numbers,): that of its channel.
        std: Its standard deviation.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self, latent_shapes: LatentShapes, num_classes: int, process: Process, sizes: TransformerSizes | None = None
    ) -> None:
        super().__init__()
        self.latent_shapes = {name: tuple(shape) for name, shape in latent_shapes.items()}
        self.sizes = sizes or TransformerSizes()
        self.process = process
        self.transformer = DiT(latent_shapes, num_classes, self.sizes)
        self.register_buffer("mean", torch.zeros(self.numbers))
        self.register_buffer("std", torch.ones(self.numbers))

    @property
    def numbers(self) -> int:
        """Numbers in the latents of a clip."""
        return count_numbers(self.latent_shapes)

    @property
    def num_classes(self) -> int:
        return self.transformer.num_classes

    @property
    def repeated_blocks(self) -> list[nn.Module]:
        """Blocks of the transformer, which are sharded and compiled one by one."""
        return list(self.transformer.blocks)

    def set_scale(self, statistics: Mapping[str, tuple[Tensor, Tensor]]) -> None:
        """Set mean and standard deviation (C,) of each channel, by latent; a constant channel is only shifted."""
        for buffer, index in ((self.mean, 0), (self.std, 1)):
            parts = []
            for name, shape in self.latent_shapes.items():
                values = statistics[name][index].to(buffer)
                if values.shape != (shape[0],):
                    raise UserError(f"Expected statistics of {shape[0]} channels of {name}, got {tuple(values.shape)}.")
                parts.append(values.reshape(-1, *[1] * len(shape[1:])).expand(shape).flatten())
            buffer.copy_(torch.cat(parts))
        variance = self.std.square()
        self.std.copy_(torch.where(is_varying(variance, variance + self.mean.square()), self.std, 1.0))

    def normalize(self, latents: Mapping[str, Tensor]) -> Tensor:
        """Turn latents by name, each (B, C, ...), into normalized states (B, numbers)."""
        return (flatten(latents, self.latent_shapes) - self.mean) / self.std

    def denormalize(self, state: Tensor) -> Latents:
        """Turn states (B, numbers) into the latents that the autoencoder decodes."""
        return split(state * self.std + self.mean, self.latent_shapes)

    def forward(self, state: Tensor, labels: Tensor, condition_dropout: float = 0.0) -> Tensor:
        """Compute the loss of each clip (B,) at a random time.

        Args:
            state: Normalized latents (B, numbers).
            labels: int64 (B,); -1 for no class.
            condition_dropout: Probability with which a clip's class is hidden from the network.
        """
        times = self.process.draw_times(state)
        noise = torch.randn_like(state)
        labels = self.condition(labels)
        dropped = torch.rand(len(state), device=state.device) < condition_dropout
        labels = torch.where(dropped, self.num_classes, labels)
        output = self._run(self.process.add_noise(state, noise, times), times, labels)
        return self.process.loss(output, state, noise, times)

    def condition(self, labels: Tensor) -> Tensor:
        """Replace labels that are -1, and all labels for a model without classes, by that of no condition."""
        unknown = labels < 0 if self.num_classes else torch.ones_like(labels, dtype=torch.bool)
        return torch.where(unknown, self.num_classes, labels)

    @torch.no_grad()
    def sample(
        self,
        labels: Tensor,
        noise: Tensor,
        guidance: float,
        steps: int,
        report: Callable[[], object] = lambda: None,
    ) -> Latents:
        """Sample latents of given classes, by classifier-free guidance (Ho and Salimans 2022).

        The network's output is u + guidance · (c − u), of its outputs c with and u without the class. With guidance 1
        it is c, and u is not computed.

        Args:
            labels: int64 (B,); -1 for no class.
            noise: Standard normal (B, numbers).
            guidance: Weight of the class.
            steps: Steps of the process.
            report: Called after each step.
        """
        labels = self.condition(labels)
        nothing = torch.full_like(labels, self.num_classes)

        def network(state: Tensor, times: Tensor) -> Tensor:
            if guidance == 1 or not self.num_classes:
                output = self._run(state, times, labels)
            else:
                both = self._run(state.repeat(2, 1), times.repeat(2), torch.cat([labels, nothing]))
                conditional, free = both.chunk(2)
                output = free + guidance * (conditional - free)
            report()
            return output

        return self.denormalize(self.process.sample(network, noise, steps))

    def _run(self, state: Tensor, times: Tensor, labels: Tensor) -> Tensor:
        output = self.transformer(split(state, self.latent_shapes), times, labels)
        return flatten(output, self.latent_shapes).float()

    def spec(self) -> dict[str, Any]:
        """Return the entries from which `build` makes it again, without its weights."""
        return {
            "latent_shapes": {name: list(shape) for name, shape in self.latent_shapes.items()},
            "num_classes": self.num_classes,
            "process": self.process.spec(),
            "transformer": asdict(self.sizes),
        }


def build(spec: Mapping[str, Any]) -> LatentDiffusion:
    """Build a model from its `spec()`, with new weights."""
    process: Process = plugins.build(spec["process"], Process)
    sizes = TransformerSizes(**spec["transformer"])
    return LatentDiffusion(spec["latent_shapes"], spec["num_classes"], process, sizes)


def draw_noise(numbers: int, seeds: Sequence[Sequence[int]]) -> Tensor:
    """Draw standard normal noise (B, numbers), that of each clip by its own seed: words of any size.

    It is drawn on the CPU, so that it does not depend on the device, nor on the other clips of a batch.
    """
    rows = []
    for words in seeds:
        seed = int(np.random.SeedSequence(list(words)).generate_state(1, np.uint64)[0] >> np.uint64(1))
        rows.append(torch.randn(numbers, generator=torch.Generator().manual_seed(seed)))
    return torch.stack(rows)
