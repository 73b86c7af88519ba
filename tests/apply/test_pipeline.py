"""Reading, model and writing overlap without changing their order; errors stay with their job; no thread is left."""

import threading
from collections.abc import Iterator
from typing import Any

import pytest

from vidtwin.apply import pipeline

PATIENCE = 30  # seconds: of threads that meet at once or never


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    yield
    assert [thread.name for thread in threading.enumerate() if thread.name.startswith(pipeline.THREADS)] == []


class Log:
    """Jobs are numbers of items; an item is (job, place), a result ten times its place."""

    def __init__(self) -> None:
        self.written: dict[int, list[Any]] = {}
        self.computed: list[tuple[int, int]] = []

    def read(self, job: int) -> Iterator[tuple[int, int]]:
        yield from ((job, place) for place in range(job))

    def compute(self, item: tuple[int, int]) -> int:
        self.computed.append(item)
        return 10 * item[1]

    def write(self, job: int, results: Iterator[int]) -> bool | None:
        found = self.written.setdefault(job, [])
        try:
            found += results  # one by one, up to an error
        except ValueError as error:
            found.append(str(error))
        return None

    def run(self, jobs: Any, **steps: Any) -> None:
        pipeline.run(jobs, **{"read": self.read, "compute": self.compute, "write": self.write, **steps})


def test_jobs_and_their_results_keep_their_order():
    log = Log()
    log.run([3, 0, 1, 7, 2])
    assert log.computed == [(job, place) for job in (3, 0, 1, 7, 2) for place in range(job)]
    assert list(log.written.items()) == [(job, [10 * place for place in range(job)]) for job in (3, 0, 1, 7, 2)]


@pytest.mark.parametrize("jobs", [[6], [1] * 6])
def test_the_three_steps_run_at_once_within_a_job_and_across_jobs(jobs):
    """An item is read while the one before is computed and the one before that written: the three meet, or wait."""
    meet = threading.Barrier(3, timeout=PATIENCE)
    count = {"read": 0, "compute": 0, "write": 0}

    def step(name: str, first: int) -> None:
        number = count[name]
        count[name] += 1
        if first <= number < first + 4:
            meet.wait()

    def read(job):
        for place in range(job):
            step("read", 2)
            yield place

    def compute(item):
        step("compute", 1)
        return item

    def write(job, results):
        for _ in results:
            step("write", 0)

    pipeline.run(jobs, read, compute, write)
    assert count == {"read": 6, "compute": 6, "write": 6}


def test_what_waits_between_the_steps_is_bounded():
    read, computed, may_write = [], [], threading.Event()

    def take(jobs):
        for job in range(jobs):
            read.append(job)
            yield job

    def compute(item):
        computed.append(item)
        if len(computed) == 3:  # two wait to be written, and this one waits for room
            may_write.set()
        return item

    def write(job, results):
        assert may_write.wait(PATIENCE)
        assert len(computed) == 3
        assert len(read) <= 5
        list(results)

    pipeline.run([20], take, compute, write)
    assert len(read) == len(computed) == 20


@pytest.mark.parametrize("step", ["read", "compute"])
def test_an_error_reaches_the_writer_of_its_job_alone(step):
    log = Log()

    def fail(item):
        if item[:2] == (4, 2):
            raise ValueError("damaged")
        return item

    def read(job):
        yield from (fail(item) if step == "read" else item for item in log.read(job))

    def compute(item):
        return log.compute(fail(item) if step == "compute" else item)

    log.run([2, 4, 3], read=read, compute=compute)
    assert log.written == {2: [0, 10], 4: [0, 10, "damaged"], 3: [0, 10, 20]}
    assert (4, 3) not in log.computed


def test_a_writer_that_returns_early_ends_its_job_alone():
    log = Log()

    def write(job, results):
        if job == 50:
            log.written[job] = [next(results)]
            return None
        return log.write(job, results)

    log.run([2, 50, 3], write=write)
    assert log.written == {2: [0, 10], 50: [0], 3: [0, 10, 20]}
    assert len([item for item in log.computed if item[0] == 50]) < 50


@pytest.mark.parametrize("ends", [False, OSError("full")])
def test_a_writer_ends_the_run_and_nothing_is_begun_after_it(ends):
    log, begun = Log(), []

    def write(job, results):
        begun.append(job)
        log.write(job, results)
        if job == 1:
            if isinstance(ends, OSError):
                raise ends
            return False
        return None

    if isinstance(ends, OSError):
        with pytest.raises(OSError, match="full"):
            log.run([2, 1, 3, 4, 5], write=write)
    else:
        log.run([2, 1, 3, 4, 5], write=write)
    assert begun == [2, 1]


def test_an_interrupted_run_writes_whole_jobs_and_undoes_the_others():
    log, undone = Log(), []

    def compute(item):
        if item == (4, 3):
            raise KeyboardInterrupt
        return log.compute(item)

    def write(job, results):
        try:
            log.write(job, results)
        except BaseException:
            undone.append(job)
            raise

    with pytest.raises(KeyboardInterrupt):
        log.run([1, 2, 4, 3], compute=compute, write=write)
    assert (log.written[1], log.written[2]) == ([0], [0, 10])
    assert undone in ([], [4])  # it may not have been begun
    assert 3 not in log.written


def test_jobs_that_can_not_be_listed_end_the_run():
    def jobs():
        yield 2
        raise ValueError("no list")

    log = Log()
    with pytest.raises(ValueError, match="no list"):
        log.run(jobs())
    assert log.written == {2: [0, 10]}
