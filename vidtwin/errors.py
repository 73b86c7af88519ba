"""The error that a user can mend.

`vidtwin` on the command line prints it as one line and exits with 2; anything else is a bug and keeps its traceback.
"""

import difflib
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

# "Temporary failure; the user is invited to retry" (sysexits.h): a scheduler that is told to requeue on it goes on.
REQUEUE_EXIT_CODE: int = getattr(os, "EX_TEMPFAIL", 75)


class UserError(ValueError):
    """Something the user gave is not usable: the message says what was expected, what came and what to do."""


class Preempted(BaseException):
    """Training was told to end by SIGTERM, and has saved where it stands, in `folder` (None: nothing was saved).

    Like KeyboardInterrupt no Exception: it comes from a signal's handler, and no library must take it for an error.
    """

    def __init__(self, step: int | None = None, folder: Path | None = None) -> None:
        if step is None:
            text = "before a step was trained"
        else:
            text = f"after step {step}, {f'saved in {folder}' if folder else 'not saved: there is no LatestCheckpoint'}"
        goes_on = "; the same command with --resume auto goes on" if step is None or folder else ""
        super().__init__(f"ended by SIGTERM {text}{goes_on}")


def few(names: Sequence[str]) -> str:
    """The first three of what may be many: `a, b, c, …`."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """The end of a message: `; did you mean 'x'?` for the nearest candidate, else a full stop."""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."
