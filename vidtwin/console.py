"""Text for the user: messages on stderr, and a command's own output on stdout, both above progress bars."""

import functools
import logging
import sys

from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm


class _AboveBars(logging.Handler):
    """Write messages to the stderr of the moment, above progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        tqdm.write(self.format(record), file=sys.stderr)


_handler = _AboveBars()
_handler.setFormatter(logging.Formatter("vidtwin: %(message)s"))
_logger = logging.getLogger("vidtwin")
_logger.setLevel(logging.INFO)
_logger.propagate = False  # a root logger of the user's program would repeat each line
_logger.addHandler(_handler)


def log(message: str, rank_zero: bool = False) -> None:
    """Log `vidtwin: <message>` on stderr.

    Args:
        message: One line.
        rank_zero: Log it on the first rank of a training only.
    """
    if not rank_zero or _rank() == 0:
        _logger.info(message)


@functools.cache
def log_once(message: str, rank_zero: bool = False) -> None:
    """Log a message as `log` does, unless this process has logged it before."""
    log(message, rank_zero)


def write(text: str, rank_zero: bool = False) -> None:
    """Write a command's own output to stdout; with `rank_zero` on the first rank only."""
    if not rank_zero or _rank() == 0:
        try:
            tqdm.write(text, file=sys.stdout)
        except UnicodeEncodeError:  # the name of a file that is not UTF-8, or a terminal of few characters
            encoding = sys.stdout.encoding or "utf-8"
            tqdm.write(text.encode(encoding, "backslashreplace").decode(encoding), file=sys.stdout)
        sys.stdout.flush()


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)  # Lightning sets it
