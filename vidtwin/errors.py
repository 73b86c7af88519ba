"""Errors caused by user input, such as wrong options and missing files.

The command line prints a `UserError` as one line and exits with 2; other exceptions are bugs and keep their traceback.
"""

import difflib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

# "Temporary failure; the user is invited to retry" (sysexits.h): schedulers that requeue on it resume the job.
REQUEUE_EXIT_CODE: int = getattr(os, "EX_TEMPFAIL", 75)


class UserError(ValueError):
    """Invalid user input; the message has the form "Expected X, got Y; do Z."."""


class Preempted(BaseException):
    """Training ended by SIGTERM.

    Args:
        step: The last trained step; None before training, after it, or before its first step.
        folder: Folder of the checkpoint of this step; None if it was not saved.

    Not an `Exception`, like KeyboardInterrupt: a signal handler raises it, and no library may swallow it as an error.
    """

    def __init__(self, step: int | None = None, folder: Path | None = None) -> None:
        if step is None:
            text = "with no new step to save"
        else:
            text = f"after step {step}, {f'saved in {folder}' if folder else 'not saved: there is no LatestCheckpoint'}"
        advice = "; run the same command again with --resume auto" if step is None or folder else ""
        super().__init__(f"ended by SIGTERM {text}{advice}")


class Terminated(KeyboardInterrupt):
    """A command was ended by SIGTERM, as Ctrl-C ends one."""


def causes(error: BaseException | None, contexts: bool = False) -> Iterator[BaseException]:
    """Yield an error, the one that it was raised from, and so on to the first.

    Args:
        error: None yields nothing.
        contexts: Go on with the error that was being handled if one was raised from no other, as a traceback does.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:  # `raise error from error` is legal
        seen.add(id(error))
        yield error
        context = None if error.__suppress_context__ or not contexts else error.__context__
        error = error.__cause__ or context


def few(names: Sequence[str]) -> str:
    """Join the first three names of a list that may be long: `a, b, c, …`."""
    return ", ".join(names[:3]) + (", …" if len(names) > 3 else "")


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """Return the end of a message: `; did you mean 'x'?` for the nearest candidate, else a full stop."""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."


def name_choices(word: str, names: Iterable[str]) -> str:
    """Return the end of a message about a name out of many: the nearest one first, then all of them."""
    known = sorted(names)
    return f"{suggestion(word, known)} Known: {', '.join(known)}."
