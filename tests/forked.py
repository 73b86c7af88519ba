"""Run functions in processes that are forked from one in which torch and Lightning are imported already.

A process that imports them itself takes ten seconds of CPU time for it. The processes are ranks as a cluster starts
them, or the first rank alone, which has Lightning start the second.
"""

import contextlib
import multiprocessing
import os
import runpy
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from multiprocessing import forkserver
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from lightning_utilities.core.rank_zero import rank_zero_only

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["sweeping", "tiny"])


def run_ranks(work: Callable[..., Any], *arguments: Any, stderr: Path, timeout: float = 480) -> None:
    """Call `work` on two ranks, with stderr of both in a file; a rank that fails or hangs is a failure."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    cluster = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": "2", "NODE_RANK": "0"}
    codes = _run([({**cluster, "LOCAL_RANK": str(rank)}, work, arguments) for rank in (0, 1)], stderr, timeout)
    assert codes == [0, 0], stderr.read_text()[-3000:]


def run_code(code: str, argv: Sequence[str], stderr: Path, timeout: float = 120) -> int | None:
    """Execute `code` with `argv` as sys.argv[1:] → exit code; of one that a signal ended the negative number."""
    (result,) = _run([({}, _execute, (code, list(argv)))], stderr, timeout)
    return result


def run_script(path: Path, argv: Sequence[str], stderr: Path, timeout: float = 480) -> None:
    """Run a script whose second rank Lightning starts, with stderr of both in a file; a failure or a hang is one.

    The script has to end with a barrier: the second rank may write until then.
    """
    (code,) = _run([({}, _launch, (path, list(argv)))], stderr, timeout)
    assert code == 0, stderr.read_text()[-3000:]


def _start_server() -> None:
    """Start the process that the others are forked from; if it runs, do nothing.

    Python 3.11 and 3.12 pass it sys.path but do not use it (gh-117378): it would import nothing, and say nothing.
    """
    tests = Path(__file__).parent
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = f"{tests}{os.pathsep}{tests.parent}"
    try:
        forkserver.ensure_running()
    finally:
        del os.environ["PYTHONPATH"]
        os.environ |= {"PYTHONPATH": before} if before is not None else {}


def _run(calls: Sequence[tuple[Any, ...]], stderr: Path, timeout: float) -> list[int | None]:
    processes: list[Any] = [_CONTEXT.Process(target=_enter, args=(stderr, Path.cwd(), *call)) for call in calls]
    _start_server()
    until = time.monotonic() + timeout
    for process in processes:
        process.start()
    try:
        waiting = {process.sentinel: process for process in processes}
        while waiting and (left := until - time.monotonic()) > 0:
            for sentinel in wait([*waiting], left):
                process = waiting.pop(sentinel)
                process.join()
                if process.exitcode != 0:  # the others may wait for it
                    until = min(until, time.monotonic() + 5)
        return [process.exitcode for process in processes]  # None: it hangs
    finally:
        for process in processes:
            if process.exitcode != 0:  # what it has started may hang too
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.kill()
            process.join()


def _enter(stderr: Path, folder: Path, environment: dict[str, str], work: Callable[..., Any], arguments: Any) -> None:
    os.setsid()  # a group of its own, which `_run` ends as a whole
    os.dup2(os.open(stderr, os.O_WRONLY | os.O_CREAT | os.O_APPEND), 2)
    os.chdir(folder)
    os.environ.update(environment)
    os.fsync = lambda handle: None  # as in the tests' own process
    rank_zero_only.rank = int(environment.get("LOCAL_RANK", 0))  # that of a process is read on import
    torch.set_num_threads(1)
    work(*arguments)


def _execute(code: str, argv: list[str]) -> None:
    sys.argv[1:] = argv
    exec(code, {"__name__": "__main__"})


def _launch(path: Path, argv: list[str]) -> None:
    tests = Path(__file__).parent
    os.environ |= {"PYTHONPATH": f"{tests}:{tests.parent}", "OMP_NUM_THREADS": "1"}  # for the second rank
    sys.argv = [str(path), *argv]
    runpy.run_path(str(path), run_name="__main__")
