"""The error that a user can mend.

`vidtwin` on the command line prints it as one line and exits with 2; anything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """Something the user gave is not usable: the message says what was expected, what came and what to do."""


def suggestion(word: str, candidates: Iterable[str]) -> str:
    """The end of a message: `; did you mean 'x'?` for the nearest candidate, else a full stop."""
    near = difflib.get_close_matches(word, list(candidates), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else "."
