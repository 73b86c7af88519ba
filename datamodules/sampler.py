"""In which order clips are taken, and by which rank."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import DistributedSampler

from vidtwin.errors import UserError

Place = tuple[int, int]  # an epoch, and how many of its clips all ranks together have consumed


def shuffled(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """The numbers below `count` in an order that depends on (seed, epoch) alone."""
    return np.random.default_rng((seed, epoch)).permutation(count)


class ClipSampler(DistributedSampler[Any]):
    """Hands out (epoch, index) pairs: this rank's share of the clips.

    Training takes them in the order that `order` makes of (seed, epoch). A step takes the next clips of it, rank r the
    r-th of every `world_size`; what is left at the end of an epoch and fills no step is left out, other clips in each
    epoch. So ranks always have equally many batches, and a place in the order means the same for any batch size and
    number of ranks.

    Evaluation gives rank r the clips r, r + world_size, …: none is repeated or lost.

    A `DistributedSampler` only so that Lightning, which calls `set_epoch`, does not wrap it into another one.

    Attributes:
        start: Tells the place where iterating over the training clips begins; None is the start of `set_epoch`'s epoch.
            It goes on for as many steps as an epoch has, from the middle of one into the next.
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
        """Where that many training steps lead; an epoch too short for another one is over."""
        epoch, clips = place
        left = max(0, self.num_clips - clips) // self.clips_per_step
        if steps < left:
            return epoch, clips + steps * self.clips_per_step
        epochs, steps = divmod(steps - left, self.steps_per_epoch)
        return epoch + 1 + epochs, steps * self.clips_per_step
