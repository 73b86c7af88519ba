"""Count the cores that this process may use. Imports nothing heavy, so that help answers at once."""

import os


def count_cores() -> int:
    """Return the number of cores that a scheduler or a container leaves to this process."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
