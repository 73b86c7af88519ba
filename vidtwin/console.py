"""Text for the user: messages on stderr, and a command's own output on stdout, both above progress bars."""

import functools
import io
import logging
import sys
from typing import Any

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


class Progress(tqdm):
    """A bar on stderr with the rate and the time left; if stderr is not a terminal, a line like that every minute.

    Args:
        total: Number of items.
        title: Its first words, such as "encoding".
        unit: Name of the items, such as "clips".
        shown: Whether there is anything to see.
    """

    nrows: int | None
    _SECONDS = 60.0  # between lines

    def __init__(self, total: float, title: str, unit: str, shown: bool = True) -> None:
        self._lines = not sys.stderr.isatty()
        options: dict[str, Any] = {"file": sys.stderr, "dynamic_ncols": True}
        if self._lines:
            # `display` logs; what tqdm itself writes to keep a bar in its place goes nowhere.
            interval = self._SECONDS
            options = {"file": io.StringIO(), "delay": interval, "mininterval": interval, "maxinterval": interval}
        super().__init__(
            total=total,
            desc=title,
            unit=f" {unit}",
            disable=not shown,
            bar_format="{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt}, {rate_noinv_fmt}, {remaining} left",
            **options,
        )

    @property
    def format_dict(self) -> dict[str, Any]:
        state: dict[str, Any] = super().format_dict
        if (state["ncols"] or 0) < 1:
            state["ncols"] = None
        return state

    def display(self, msg: str | None = None, pos: int | None = None) -> None:
        """Draw the bar, or log its line."""
        if not self._lines:
            if (self.nrows or 0) < 1:  # a terminal that does not say how large it is
                self.nrows = None
            super().display(msg, pos)
        elif msg is None:
            state = self.format_dict
            done, rate = state["n"] - state["initial"], state["rate"]
            rate = rate or (done / state["elapsed"] if state["elapsed"] else 0)
            left = self.format_interval(max(state["total"] - state["n"], 0) / rate) if rate else "?"
            log(
                f"{state['prefix']}: {state['n']:,.0f} of {state['total']:,.0f}{state['unit']}, "
                f"{rate:.3g}{state['unit']}/s, {left} left"
            )


def _rank() -> int:
    return getattr(rank_zero_only, "rank", 0)  # Lightning sets it
