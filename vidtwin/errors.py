"""The error that a user can mend.

`vidtwin` on the command line prints it as one line and exits with 2; anything else is a bug and keeps its traceback.
"""


class UserError(ValueError):
    """Something the user gave is not usable: the message says what was expected, what came and what to do."""
