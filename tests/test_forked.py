"""Processes that hang end with all that they have started."""

import time

import forked

HANG = """
import os, pathlib, sys, time
if os.fork() == 0:
    pathlib.Path(sys.argv[1]).write_text(str(os.getpid()))
time.sleep(300)
"""


def test_processes_that_hang_are_ended_with_their_children_after_one_timeout(tmp_path):
    stderr = tmp_path / "stderr"
    assert forked.run_code("", [], stderr) == 0  # starts the server, whose imports take seconds
    started = time.monotonic()
    calls = [({}, forked._execute, (HANG, [str(tmp_path / name)])) for name in "ab"]
    assert forked._run(calls, stderr, timeout=2) == [None, None]
    assert time.monotonic() - started < 3.8
    children = [int((tmp_path / name).read_text()) for name in "ab"]
    until = time.monotonic() + 5  # when the system has collected them
    while any(map(is_running, children)):
        assert time.monotonic() < until


def is_running(process: int) -> bool:
    try:
        with open(f"/proc/{process}/stat") as status:
            return status.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
