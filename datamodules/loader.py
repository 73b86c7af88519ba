"""Loaders of clips, whose workers outlive a scheduler's SIGTERM and report what they could not read."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from multiprocessing import resource_tracker
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from vidtwin.errors import UserError

if TYPE_CHECKING:
    from .clips import ClipDataset


class WorkerLoader(DataLoader[Any]):
    """A `DataLoader` whose workers outlive a scheduler's SIGTERM.

    A job scheduler sends SIGTERM to all processes; the main one then needs its workers until it has ended its batch.
    So they start with the signal blocked, and only heed the one by which the main process ends them.
    """

    def __init__(self, dataset: Dataset[Any], **kwargs: Any) -> None:
        super().__init__(dataset, worker_init_fn=_init_worker, **kwargs)

    def __iter__(self) -> Any:
        context = self.multiprocessing_context or multiprocessing.get_context()
        with _sigterm_blocked(spawning=context.get_start_method() != "fork"):
            return super().__iter__()


class ClipLoader(WorkerLoader):
    """Tells the main process which clips its workers could not read, and leaves out batches of which none is left.

    Args:
        dataset: The clips.
        on_skip: Called with each entry of "skipped": name, reason, and False if the video merely ends before the clip.
        **kwargs: Those of `DataLoader`.
    """

    def __init__(self, dataset: Dataset[Any], on_skip: Callable[..., None], **kwargs: Any) -> None:
        super().__init__(dataset, collate_fn=collate, **kwargs)
        self.on_skip = on_skip

    def __iter__(self) -> Any:
        return self._readable(super().__iter__())  # starts the workers at once, not at the first batch

    def _readable(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        some, skipped = False, []
        for batch in batches:
            skipped = batch.pop("skipped", [])
            for entry in skipped:
                self.on_skip(*entry)
            if "clip" in batch:
                some = True
                yield batch
        if skipped and not some:  # where a first pass or means are shared, other ranks would wait for this one
            raise UserError(f"Expected readable clips on each rank, got none; {skipped[0][0]}: {skipped[0][1]}.")


def collate(items: list[dict[str, Any]]) -> dict[str, Any]:
    """A batch of the items that have a clip, and under "skipped" what could not be read, if there is any."""
    skipped = [entry for item in items for entry in item.get("skipped", [])]
    whole = [{key: value for key, value in item.items() if key != "skipped"} for item in items if "clip" in item]
    batch: dict[str, Any] = default_collate(whole) if whole else {}
    return {**batch, "skipped": skipped} if skipped else batch


class ChunkLoader(WorkerLoader):
    """Batches of given evaluation clips, one for each list of indices, in the order of the lists.

    A batch has `"indices": list[int]`, the clips that it holds, in the list's order, and `"skipped": [(index, name,
    reason), …]` of those that could not be read. One of which none can be read has these two keys alone.

    Args:
        dataset: The clips.
        chunks: Indices of the clips of each batch.
        on_skip: As of `ClipLoader`.
        **kwargs: Those of `DataLoader`.
    """

    def __init__(
        self, dataset: "ClipDataset", chunks: Sequence[Sequence[int]], on_skip: Callable[..., None], **kwargs: Any
    ) -> None:
        super().__init__(
            _Numbered(dataset), batch_sampler=[list(chunk) for chunk in chunks], collate_fn=_collate_chunk, **kwargs
        )
        self.on_skip = on_skip

    def __iter__(self) -> Any:
        return self._chunks(super().__iter__())

    def _chunks(self, batches: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
        for batch in batches:
            for _, *entry in batch["skipped"]:
                self.on_skip(*entry)
            yield {**batch, "skipped": [(index, name, reason) for index, name, reason, *_ in batch["skipped"]]}


class _Numbered(Dataset[tuple[int, dict[str, Any]]]):
    def __init__(self, dataset: "ClipDataset") -> None:
        self.dataset = dataset

    def __getitem__(self, index: int) -> tuple[int, dict[str, Any]]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, dict[str, Any]]]:
        return list(zip(indices, self.dataset.__getitems__(indices), strict=True))


def _collate_chunk(items: list[tuple[int, dict[str, Any]]]) -> dict[str, Any]:
    batch = collate([{key: value for key, value in item.items() if key != "skipped"} for _, item in items])
    skipped = [(index, *entry) for index, item in items for entry in item.get("skipped", [])]
    return {**batch, "indices": [index for index, item in items if "clip" in item], "skipped": skipped}


@contextmanager
def _sigterm_blocked(spawning: bool) -> Iterator[None]:
    """Block SIGTERM in this thread, for the processes started meanwhile to inherit; one that arrives comes afterwards.

    Blocking it in the worker alone would leave a gap, of seconds with `spawning`, in which the signal ends the worker.
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
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != os.getppid():
        pass
    os._exit(0)
