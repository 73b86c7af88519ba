"""Read, run the model and write at the same time, so that the slowest of the three sets the pace.

    jobs ── read, in a thread ──> items ── compute, in the caller's thread ──> results ── write, in a thread ──> files

Jobs (a file to write each) and their items keep their order, and each step waits when it is a few items ahead of the
next one: outputs are those of the three steps one after the other, in constant memory. Imports no torch.
"""

import queue
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NoReturn, TypeVar

from vidtwin.errors import Terminated

Job = TypeVar("Job")
Item = TypeVar("Item")
Result = TypeVar("Result")

THREADS = "vidtwin"  # begins the names of the threads
_END = object()


class _Interrupted(BaseException):
    """The run ends before the job does. Not an `Exception`: it passes all handlers but those that remove files."""


def run(
    jobs: Iterable[Job],
    read: Callable[[Job], Iterable[Item]],
    compute: Callable[[Item], Result],
    write: Callable[[Job, Iterator[Result]], bool | None],
    ahead: int = 2,
    behind: int = 2,
    prepare: Callable[[], None] = lambda: None,
) -> None:
    """Take jobs through three overlapping steps.

    Args:
        jobs: The jobs, taken by the thread that reads.
        read: Yield the items of a job.
        compute: Turn an item into a result, in the caller's thread.
        write: Write the results of a job. An error of its `read` or `compute` is raised where it takes the next result;
            an error that it does not handle ends the run. If it returns before the last result, no more are made. False
            ends the run after this job.
        ahead: Items that are read before they are needed.
        behind: Results of a job that wait to be written, and jobs.
        prepare: Called first in both threads, such as to choose their device.

    Raises:
        Exception: That `write` or `jobs` raised. The jobs before it are written, those after it are not.
        KeyboardInterrupt: Jobs with all their results are written before it is raised.
    """
    refused = threading.Event()
    steps = _read(jobs, read, behind)
    coming: deque[Future[Any]] = deque()
    writing: deque[Future[None]] = deque()
    current: _Work | None = None
    with (
        ThreadPoolExecutor(1, f"{THREADS}-reader", prepare) as reader,
        ThreadPoolExecutor(1, f"{THREADS}-writer", prepare) as writer,
    ):
        try:
            coming.extend(reader.submit(next, steps, None) for _ in range(ahead))
            while (step := coming.popleft().result()) is not None and not refused.is_set():
                coming.append(reader.submit(next, steps, None))
                work, item, error = step
                if work.ended:  # since the model failed on an earlier item
                    continue
                if work is not current:
                    while len(writing) > behind:
                        writing.popleft().result()
                    current = work
                    writing.append(writer.submit(work.write, write, refused))
                if item is not _END:
                    try:
                        if not work.dropped:
                            work.put(compute(item))
                        continue
                    except Exception as failed:
                        error, work.dropped = failed, True
                work.end(error)
        finally:
            if current is not None and not current.ended:
                current.end(_Interrupted())
            for future in coming:
                future.cancel()
            reader.submit(steps.close)
    for future in writing:
        future.result()


@contextmanager
def ending_on_sigterm() -> Iterator[None]:
    """Let SIGTERM end the block like Ctrl-C, so that no half file is left. Other handlers and threads stay as they are.

    Not for one of several processes: it may wait for others in a call that no exception interrupts.
    """
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(*_: object) -> NoReturn:
        raise Terminated

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


class _Work:
    """A job on its way, with its results between the thread that computes and the one that writes."""

    def __init__(self, job: Any, behind: int) -> None:
        self.job = job
        self.dropped = False  # nothing more of it is read or computed
        self.ended = False  # for the thread that computes
        self._results: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._room = threading.Semaphore(behind)
        self._taken = False  # up to its end

    def put(self, result: Any) -> None:
        """Hand over a result; wait while others wait to be written."""
        self._room.acquire()
        self._results.put((result, None))

    def end(self, error: BaseException | None) -> None:
        """Hand over the end, without a wait, so that the writer's thread ends whatever happens here."""
        self.ended = True
        self._results.put((_END, error))

    def write(self, write: Callable[[Any, Iterator[Any]], bool | None], refused: threading.Event) -> None:
        """Write the results, in the writer's thread; with `refused` take them alone."""
        try:
            if not refused.is_set() and write(self.job, self._iterate()) is False:
                refused.set()
        except _Interrupted:
            pass
        except BaseException:
            refused.set()
            raise
        finally:
            self.dropped = True
            while not self._taken:
                self._take()

    def _iterate(self) -> Iterator[Any]:
        while not self._taken:
            result, error = self._take()
            if error is not None:
                raise error
            if result is not _END:
                yield result

    def _take(self) -> tuple[Any, BaseException | None]:
        result, error = self._results.get()
        if result is _END:
            self._taken = True
        else:
            self._room.release()
        return result, error


def _read(
    jobs: Iterable[Job], read: Callable[[Job], Iterable[Item]], behind: int
) -> Generator[tuple[_Work, Item | object, Exception | None], None, None]:
    """Yield each job's items and its end, with the error of reading it."""
    for job in jobs:
        work, error = _Work(job, behind), None
        try:
            for item in read(job):
                yield work, item, None
                if work.dropped:
                    break
        except Exception as failed:
            error = failed
        yield work, _END, error
