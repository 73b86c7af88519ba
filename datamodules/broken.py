"""Unusable videos of a data set: each reported once with its reason, and a budget of broken ones."""

from collections import Counter
from collections.abc import Callable
from typing import Any

from vidtwin.console import log
from vidtwin.data import SPLITS
from vidtwin.errors import UserError

from .index import Fault

_REPORTED = 1000  # unusable videos that are reported one by one
_ADVICE = "; for short ones lower data.num_frames, raise data.fps or set data.short_videos to loop."


class UnusableVideos:
    """Videos of each split that cannot be used, and the share of them that may be broken.

    Broken are files that are unreadable, truncated or corrupt. Short videos are skipped too but count for nothing.

    Args:
        max_broken: Share of a split's videos that may be broken. One may be, unless the share is 0.

    Attributes:
        reasons: Split → name → reason of all skipped videos.
        totals: Split → number of its videos, unusable ones included.
    """

    def __init__(self, max_broken: float) -> None:
        if not 0 <= max_broken <= 1:
            raise UserError(f"Expected data.max_broken, a share, between 0 and 1, got {max_broken}.")
        self.max_broken = max_broken
        self.reasons: dict[str, dict[str, str]] = {split: {} for split in SPLITS}
        self.totals: dict[str, int] = {}
        self._broken: dict[str, set[str]] = {split: set() for split in SPLITS}

    def restart(self, split: str, total: int, reasons: dict[str, str] | None = None) -> None:
        """Set the videos of a split that are known to be skipped, none of them broken."""
        self.totals[split] = total
        self.reasons[split] = dict(reasons or {})
        self._broken[split] = set()

    def sift(self, split: str, total: int, faults: dict[str, Fault], report: bool) -> None:
        """Register the faults found before the first epoch; `UserError` if they leave too little.

        Args:
            split: Name of the split.
            total: Number of its videos.
            faults: Fault of each unusable one, by name.
            report: Log them; one rank does.
        """
        slow = [(name, fault.reason) for name, fault in faults.items() if fault.kind == "slow"]
        if slow:
            raise UserError(
                f"{slow[0][0]}: {slow[0][1]}, or leave such videos out by data.exclude (split {split} has {len(slow)} "
                f"of them among {total})."
            )
        for name, fault in faults.items():
            if not fault.lasting:  # others may have read it, and would then have another epoch
                raise UserError(
                    f"Expected to read {name}, got an error of the system: {fault.reason}; try again or list it in "
                    "data.exclude."
                )
        self.restart(split, total, {name: fault.reason for name, fault in faults.items()})
        self._broken[split] = {name for name, fault in faults.items() if fault.broken}
        self.check(split)
        if len(faults) == total:
            name, fault = next(iter(faults.items()))
            reason = fault.reason + (_ADVICE if fault.kind == "short" else ".")
            raise UserError(f"Expected usable videos in split {split}, got none of {total}; {name}: {reason}")
        if faults and report:
            for name, fault in list(faults.items())[:_REPORTED]:
                log(f"skipped {name}: {fault.reason}")
            if len(faults) > _REPORTED:
                log(f"skipped {len(faults) - _REPORTED} more, which `vidtwin doctor` lists")
            counts = Counter(fault.kind for fault in faults.values())
            kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items())
            advice = _ADVICE if counts["short"] else ""
            log(f"{split}: {total - len(faults)} of {total} videos can be used; {kinds}{advice}")

    def add(self, split: str, name: str, reason: str, broken: bool = True) -> None:
        """Register and log a video that could not be read while training or evaluating; only once.

        Args:
            split: Name of the split.
            name: Name of the video.
            reason: Reason why it could not be read.
            broken: Count it against the budget; False if the video merely ends before the clip.
        """
        if name in (self._broken if broken else self.reasons)[split]:
            return
        self.reasons[split][name] = reason
        if broken:
            self._broken[split].add(name)
        log(f"skipped {name}: {reason} ({len(self.reasons[split])} of {self.totals[split]} videos of {split})")

    def share(self, gather: Callable[[Any], list[Any]]) -> None:
        """Merge those of all ranks, then check the budget on each. `gather`: a rank's value → those of all ranks."""
        for reasons, broken in gather((self.reasons, self._broken)):
            for split in SPLITS:
                self.reasons[split] |= reasons[split]
                self._broken[split] |= broken[split]
        for split in self.totals:
            self.check(split)

    def check(self, split: str) -> None:
        """Raise `UserError` if more videos of a split are broken than the budget allows."""
        broken, total = self._broken[split], self.totals[split]
        # In a small split a single one would be a large share.
        if len(broken) > (max(1, self.max_broken * total) if self.max_broken else 0):
            some = "; ".join(f"{name}: {self.reasons[split][name]}" for name in sorted(broken)[:3])
            more = f"; and {len(broken) - 3} more" if len(broken) > 3 else ""
            raise UserError(
                f"Expected at most a share of data.max_broken={self.max_broken:g} broken videos in split {split}, got "
                f"{len(broken)} of {total} ({some}{more}); raise data.max_broken, or find them all by `vidtwin doctor` "
                "and leave them out by data.exclude."
            )
