"""Run jobs in worker processes that may die or hang, without losing the other jobs.

Each worker has a pipe of its own, so that a process that is killed at any moment holds no lock that others wait for.
Pools with one shared queue can then stop (concurrent.futures, pebble) or lose a job (multiprocessing, pebble).
"""

import multiprocessing
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import FrameType
from typing import Any

from tqdm import tqdm

from vidtwin.errors import UserError


@dataclass(frozen=True)
class Failure:
    """A job without a result: its worker died, or was killed when the job's time was over."""

    reason: str
    timeout: bool


def run(
    function: Callable[..., Any], jobs: Sequence[tuple[Any, ...]], limits: Sequence[float], workers: int
) -> Generator[tuple[int, Any], None, None]:
    """Call `function(*job)` for every job in new processes; yield the job's index and its result or `Failure`.

    Results come in the order in which they are ready. Closing the generator, or an error in it, ends the workers. They
    ignore Ctrl-C, which a terminal sends to all processes.

    Args:
        function: Importable by its name, with results that can be pickled.
        jobs: Arguments of each call.
        limits: Seconds that each call may take.
        workers: Number of processes.

    Raises:
        UserError: A worker died before it had a job.
    """
    waiting = deque(range(len(jobs)))
    active: list[_Worker] = []
    interrupts: list[int] = []
    in_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGINT)

    def interrupt(number: int, frame: FrameType | None) -> None:
        # Python drops a KeyboardInterrupt that is raised while it frees an object; then the loop sees this.
        interrupts.append(number)
        if callable(before):
            before(number, frame)

    if in_main and callable(before):
        signal.signal(signal.SIGINT, interrupt)
    try:
        while waiting or any(worker.job is not None for worker in active):
            if interrupts:
                raise KeyboardInterrupt
            while len(active) < workers and len(waiting) > sum(not worker.ready for worker in active):
                with _blocking_interrupts():
                    active.append(_Worker(function))
            now = time.monotonic()
            due = min((worker.deadline for worker in active), default=now)
            answers = set(wait([worker.pipe for worker in active], timeout=min(max(0.0, due - now), 1.0)))
            for worker in list(active):
                failure: Failure | None = None
                if worker.pipe in answers:
                    try:
                        result = worker.pipe.recv()
                    except (EOFError, OSError):
                        failure = Failure(f"its worker process {_describe_end(worker.process)}", timeout=False)
                    else:
                        if worker.job is not None:
                            yield worker.job, result
                        worker.rest()
                elif time.monotonic() >= worker.deadline:
                    failure = Failure(f"not done after {worker.limit:.0f} s", timeout=True)
                if failure is not None:
                    active.remove(worker)
                    worker.end()
                    if worker.job is None:
                        raise UserError(f"Expected worker processes to start; {failure.reason}. Lower --workers.")
                    yield worker.job, failure
                elif worker.ready and worker.job is None:
                    if waiting:
                        index = waiting.popleft()
                        worker.start(index, jobs[index], limits[index])
                    else:
                        active.remove(worker)
                        worker.end()
    finally:
        if in_main and callable(before):
            signal.signal(signal.SIGINT, before)
        for worker in active:
            worker.end()


@contextmanager
def _blocking_interrupts() -> Iterator[None]:
    """Let Ctrl-C wait, also in processes that start meanwhile: they would end before they ignore it."""
    if not hasattr(signal, "pthread_sigmask"):
        yield
        return
    resource_tracker.ensure_running()  # its own start, which comes before that of a worker, unblocks SIGINT
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


class _Worker:
    """One process, the pipe to it, and its job."""

    START_LIMIT = 300.0  # seconds to import the function's modules: file systems of clusters can be slow

    def __init__(self, function: Callable[..., Any]) -> None:
        context = multiprocessing.get_context("spawn")  # a fork would inherit the others' pipes
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, function), daemon=True)
        self.process.start()
        theirs.close()  # otherwise the pipe would stay open when the process dies
        self.ready = False
        self.job: int | None = None
        self.limit = self.START_LIMIT
        self.deadline = time.monotonic() + self.limit

    def start(self, index: int, job: tuple[Any, ...], limit: float) -> None:
        self.job, self.limit, self.deadline = index, limit, time.monotonic() + limit
        try:
            self.pipe.send(job)
        except OSError:  # it has died, which the next wait reports
            self.deadline = float("inf")

    def rest(self) -> None:
        self.ready, self.job, self.deadline = True, None, float("inf")

    def end(self) -> None:
        self.pipe.close()
        self.process.kill()
        self.process.join()


def _serve(pipe: Connection, function: Callable[..., Any]) -> None:
    """Answer jobs until the other end of the pipe is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # A killed process leaves the semaphore of tqdm's own lock, of which Python warns; messages need none of processes.
    tqdm.set_lock(threading.RLock())
    try:
        pipe.send(None)
        while True:
            pipe.send(function(*pipe.recv()))
    except (EOFError, OSError):
        pass


def _describe_end(process: BaseProcess) -> str:
    process.join(timeout=10)
    code = process.exitcode
    if code is None:
        return "no longer answers"
    if code >= 0:
        return f"ended with exit code {code}"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
