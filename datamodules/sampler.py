"""Order of the clips, and their division among the ranks."""

import hashlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from vidtwin.errors import UserError

Place = tuple[int, int]  # an epoch, and how many of its clips all ranks together have consumed


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Shuffle the numbers below `count`, depending on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


def hash_to_unit(name: str) -> float:
    """Map a name to a number from 0 to 1 by its SHA-256, to divide videos into splits by their names alone."""
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big") / 2**64


class ClipSampler(DistributedSampler[Any]):
    """Sampler of (epoch, index) pairs: this rank's share of the clips.

    Training takes them in the order given by `order(seed, epoch)`. A step takes the next clips of it, rank r the r-th
    of every `world_size`; clips left at the end of an epoch that fill no step are left out, others in each epoch. So
    ranks always have equally many batches, and a place in the order means the same for any batch size and number of
    ranks.

    Evaluation gives rank r the clips r, r + world_size, …, so none is repeated or lost.

    It is a `DistributedSampler` only so that Lightning calls `set_epoch` and does not wrap it into another one.

    Attributes:
        start: Returns the place where an iteration over the training clips begins; None begins with `set_epoch`'s
            epoch. An iteration has as many steps as an epoch, and may run from the middle of one into the next.
    """

    def __init__(
        self,
        num_clips: int,
        shuffle: bool,
        seed: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        order: Callable[[int, int], NDArray[np.int64]] | None = None,
    ) -> None:
        super().__init__(range(num_clips), world_size, rank, shuffle, seed)  # type: ignore[arg-type]
        if shuffle and num_clips < world_size:
            raise UserError(f"Expected at least one training clip for each of {world_size} ranks, got {num_clips}.")
        self.order = order or partial(shuffled, num_clips)
        self.num_clips = num_clips
        self.clips_per_step = world_size * min(batch_size, max(1, num_clips // world_size))  # of all ranks
        self.steps_per_epoch = num_clips // self.clips_per_step
        self.start: Callable[[], Place] | None = None

    def __len__(self) -> int:
        if self.shuffle:
            return self.steps_per_epoch * self.clips_per_step // self.num_replicas
        return len(range(self.rank, self.num_clips, self.num_replicas))

    def __iter__(self) -> Iterator[tuple[int, int]]:
        if not self.shuffle:
            yield from ((0, index) for index in range(self.rank, self.num_clips, self.num_replicas))
            return
        start = self.start() if self.start else (self.epoch, 0)
        drawn, order = -1, np.arange(0)
        for step in range(self.steps_per_epoch):
            epoch, first = self.after(start, step)
            if epoch != drawn:
                drawn, order = epoch, self.order(self.seed, epoch)
            for index in order[first + self.rank : first + self.clips_per_step : self.num_replicas]:
                yield epoch, int(index)

    def after(self, place: Place, steps: int) -> Place:
        """Return the place after a number of training steps; an epoch too short for another step is over."""
        epoch, clips = place
        left = max(0, self.num_clips - clips) // self.clips_per_step
        if steps < left:
            return epoch, clips + steps * self.clips_per_step
        epochs, steps = divmod(steps - left, self.steps_per_epoch)
        return epoch + 1 + epochs, steps * self.clips_per_step
