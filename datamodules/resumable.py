"""Base of data modules that order their clips: the place of training in the order, workers, device."""

import warnings
from collections.abc import Callable, Sized
from typing import Any

import torch
from lightning import LightningDataModule

from vidtwin.errors import UserError

from .cores import count_cores
from .sampler import ClipSampler, Place


class ResumableDataModule(LightningDataModule):
    """A data module whose training resumes at the very next batch.

    Attributes:
        num_workers: Reading processes per device; None shares the cores among the devices, with at most 8 each.
    """

    def __init__(self, batch_size: int, num_workers: int | None) -> None:
        super().__init__()
        if batch_size < 1:
            raise UserError(f"Expected data.batch_size of at least 1, got {batch_size}.")
        if num_workers is not None and num_workers < 0:
            raise UserError(f"Expected data.num_workers of at least 0, or null for one a core, got {num_workers}.")
        self.batch_size, self.num_workers = batch_size, num_workers
        self._sampler: ClipSampler | None = None  # of the training clips, in `fit`
        self._start: tuple[Place, int] | None = None  # a place in the data, and Lightning's count of batches there

    def setup(self, stage: str) -> None:
        if stage == "fit":
            self._sampler = self._start = None  # of an earlier run, or of a checkpoint that was tested

    def state_dict(self) -> dict[str, int]:
        """Return the place of training: `epoch`, its `clips` consumed by all ranks, Lightning's count `batches`.

        Lightning saves it in each checkpoint, and a resumed run continues with the very next batch; with another batch
        size or number of ranks, with the next clips.
        """
        if self._sampler is None:
            return {}
        epoch, clips = self._place()
        return {"epoch": epoch, "clips": clips, "batches": self._trained_batches()}

    def load_state_dict(self, state_dict: dict[str, int]) -> None:
        self._start = (state_dict["epoch"], state_dict["clips"]), state_dict["batches"]
        # Lightning looks for the state in the loader, and says so.
        warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")

    def _go_on(self, sampler: ClipSampler) -> None:
        """Start the training clips at the place of training."""
        assert self.trainer is not None
        if self._start is None:  # a new run, or a checkpoint that only says which epoch it was
            epoch = getattr(self.trainer.fit_loop.epoch_progress.current, "processed", 0)
            self._start = (epoch, 0), self._trained_batches()
        self._sampler = sampler
        sampler.start = self._place

    def _place(self) -> Place:
        """Return the place of training in its data.

        Batches count once they have gone through the training step, not when workers have them ready. Lightning's
        epochs would not do: a run that `max_steps` ends counts its last epoch as a full one, and one that is resumed
        at the end of an epoch may begin with an epoch of no batch or of one.
        """
        assert self._sampler is not None
        assert self._start is not None
        place, batches = self._start
        # Lightning's count is restored after the first call here if configure_optimizers asks for the number of steps.
        return self._sampler.after(place, max(0, self._trained_batches() - batches))

    def _trained_batches(self) -> int:
        assert self.trainer is not None
        return getattr(self.trainer.fit_loop.epoch_loop.batch_progress.total, "processed", 0)

    def _ranks(self) -> tuple[int, int]:
        """Return this process's rank and the number of ranks."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def workers(self, processes: int | None = None) -> int:
        """Return the number of reading processes if `processes` share this machine's cores."""
        if self.num_workers is not None:
            return self.num_workers
        devices = processes or (self.trainer.num_devices if self.trainer else 1)
        return max(1, min(8, count_cores() // devices))

    def _device_type(self) -> str:
        if self.trainer:
            return self.trainer.strategy.root_device.type
        return "cuda" if torch.cuda.is_available() else "cpu"

    def _loader_options(
        self, split: str, clips: Sized, batch_size: int, seed: int, order: Callable[[int, int], Any] | None = None
    ) -> dict[str, Any]:
        """Return the arguments of a split's `DataLoader`: this rank's share of the clips, workers, memory."""
        training = split == "train"
        rank, world_size = self._ranks()
        if not training and len(clips) < world_size:
            # A rank without a clip would leave the others waiting when means are taken over all ranks.
            raise UserError(
                f"Expected at least one clip of the {split} split for each of {world_size} ranks, got {len(clips)}; "
                "use fewer devices or more clips."
            )
        sampler = ClipSampler(len(clips), training, seed, rank, world_size, batch_size, order)
        if training and self.trainer:
            self._go_on(sampler)
        workers = self.workers()
        return {
            "batch_size": batch_size,
            "sampler": sampler,
            "drop_last": training and len(sampler) >= batch_size,
            "num_workers": workers,
            "pin_memory": self._device_type() == "cuda",
            "persistent_workers": workers > 0 and split != "test",
            # Its own generator: each iterator draws a seed, which would shift the model's draws in a resumed run.
            "generator": torch.Generator().manual_seed(seed),
        }
