"""`python -m vidtwin` is `vidtwin`, for launchers that start modules (`torchrun -m vidtwin fit ...`)."""

import os
import sys

if __name__ == "__main__":
    if sys.path[0] == os.getcwd():  # where Python looks first, but `vidtwin` does not
        del sys.path[0]
    from vidtwin.cli import entry_point

    entry_point()
