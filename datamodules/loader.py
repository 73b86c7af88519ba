"""Loaders of clips; their workers outlive a scheduler's SIGTERM and report unreadable videos."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from vidtwin.errors import UserError


class Clips(Protocol):
    """A dataset that reads several clips at once, as `ClipDataset` does."""

    def __getitems__(self, keys: Sequence[int]) -> list[dict[str, Any]]: ...


class WorkerLoader(DataLoader[Any]):
    """A `DataLoader` whose workers outlive a scheduler's SIGTERM.

    A job scheduler sends SIGTERM to all processes; the main one then needs its workers until it has ended its batch.
    So they start with the signal blocked, and only obey the one by which the main process ends them.
    """

    def __init__(self, dataset: Dataset[Any], **kwargs: Any) -> None:
        super().__init__(dataset, worker_init_fn=_init_worker, **kwargs)

    def __iter__(self) -> Any:
        context = self.multiprocessing_context or multiprocessing.get_context()
        with _sigterm_blocked(spawning=context.get_start_method() != "fork"):
            return super().__iter__()


class ClipLoader(WorkerLoader):
    """Loader that reports clips that its workers could not read, and leaves out batches without a readable clip.

    Args:
        dataset: The clips.
        on_skip: Called with each entry of "skipped": name, reason, and False if the video merely ends before the clip.
        **kwargs: Arguments of `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], on_skip: Callable[..., None], **kwargs: Any) -> None:
        super().__init__(dataset, collate_fn=collate, **kwargs)
        self.on_skip = on_skip

    def __iter__(self) -> Any:
        return self._report_skipped(super().__iter__())  # starts the workers at once, not at the first batch

    def _report_skipped(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        some, skipped = False, []
        for batch in batches:
            skipped = batch.pop("skipped", [])
            for entry in skipped:
                self.on_skip(*entry)
            if "clip" in batch:
                some = True
                yield batch
        if skipped and not some:  # other ranks, which exchange means, would wait for this one
            raise UserError(f"Expected readable clips on each rank, got none; {skipped[0][0]}: {skipped[0][1]}.")


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """Collate the items that have a clip; list the unreadable videos, if any, under "skipped"."""
    skipped = [entry for item in items for entry in item.get("skipped", [])]
    whole = [{key: value for key, value in item.items() if key != "skipped"} for item in items if "clip" in item]
    batch: dict[str, Any] = default_collate(whole) if whole else {}
    return {**batch, "skipped": skipped} if skipped else batch


class ChunkLoader(WorkerLoader):
    """Loader of given evaluation clips: one batch per list of indices, as `ClipDataModule.chunk_loader` describes it.

    Args:
        dataset: The clips.
        chunks: Indices of the clips of each batch.
        on_skip: As in `ClipLoader`.
        **kwargs: Arguments of `DataLoader`.
    """

    def __init__(
        self, dataset: Clips, chunks: Sequence[Sequence[int]], on_skip: Callable[..., None], **kwargs: Any
    ) -> None:
        super().__init__(
            _Numbered(dataset), batch_sampler=[list(chunk) for chunk in chunks], collate_fn=collate, **kwargs
        )
        self.on_skip = on_skip

    def __iter__(self) -> Any:
        return self._report_skipped(super().__iter__())

    def _report_skipped(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            skipped, indices = batch.pop("skipped", []), batch.pop("index", torch.empty(0)).tolist()
            for _, *entry in skipped:
                self.on_skip(*entry)
            yield {**batch, "indices": indices, "skipped": [entry[:3] for entry in skipped]}


class _Numbered(Dataset[dict[str, Any]]):
    """Clips with their indices, as "index" and before each entry of "skipped"."""

    def __init__(self, dataset: Clips) -> None:
        self.dataset = dataset

    def __getitems__(self, indices: list[int]) -> list[dict[str, Any]]:
        return [
            {**item, "index": index, "skipped": [(index, *entry) for entry in item.get("skipped", [])]}
            for index, item in zip(indices, self.dataset.__getitems__(indices), strict=True)
        ]


@contextmanager
def _sigterm_blocked(spawning: bool) -> Iterator[None]:
    """Block SIGTERM in this thread and the processes it starts; a signal to this one is delivered at the end.

    If only the workers blocked it, one that is still starting would be ended by it; with `spawning` that takes seconds.
    """
    if not hasattr(signal, "sigwaitinfo"):
        yield
        return
    if spawning:
        resource_tracker.ensure_running()  # its own start, which comes before that of a worker, unblocks SIGTERM
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _init_worker(worker: int) -> None:
    # Each worker has a core; more threads than that only wait for each other.
    torch.set_num_threads(1)
    # The signal can't just stay blocked: Python, which sends it at its exit, would wait for the workers forever.
    if hasattr(signal, "sigwaitinfo"):
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # a fork server may have been started without
        threading.Thread(target=_end_with_main, daemon=True).start()


def _end_with_main() -> None:
    main = multiprocessing.parent_process()  # not this process's parent if a fork server has started it
    assert main is not None
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != main.pid:
        pass
    os._exit(0)
