"""Checks of lists of videos, the same for all data sets."""

from collections import Counter
from collections.abc import Collection, Iterable
from pathlib import Path

from vidtwin.errors import UserError, few


def find_repeated(names: Iterable[str]) -> list[str]:
    """Return the names that come twice or more, sorted."""
    return sorted(name for name, times in Counter(names).items() if times > 1)


def check_unique(place: Path, names: Iterable[str]) -> None:
    """Raise `UserError` if the list at `place` names a video twice."""
    if twice := find_repeated(names):
        raise UserError(
            f"{place}: expected each video once, {len(twice):,} come twice or more ({few(twice)}); leave one line of "
            "each."
        )


def check_apart(place: Path, names: Collection[str], split: str, advice: str) -> None:
    """Raise `UserError` if the training list at `place` has videos, `names`, that another split has too."""
    if names:
        raise UserError(
            f"{place}: expected training videos that are in no other split, {len(names):,} are in {split} too "
            f"({few(sorted(names))}); take them out of one{advice}."
        )
