"""Describe the clips of a split, to check that a cache holds the requested ones."""

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vidtwin.data import ClipSettings
from vidtwin.listing import excluded_names, identity
from vidtwin.video import RESIZE_FILTERS

from .clips import Video


def describe_clips(settings: ClipSettings, split: str) -> dict[str, Any]:
    """Describe the settings on which the clips of a split depend."""
    drawn = settings.draws(split)
    described: dict[str, Any] = {
        "num_frames": settings.num_frames,
        "resolution": settings.resolution,
        "fps": settings.fps if drawn else settings.rates[0],
        "short_videos": settings.short_rule(split),
        "resize": RESIZE_FILTERS[settings.resize],
        "augment": settings.augment if drawn else False,
    }
    if drawn:
        described |= {"seed": settings.seed, "horizontal_flip": settings.horizontal_flip}
    if settings.takes_all(split):
        described |= {"eval_clips": "all", "tail": settings.tail}
    if settings.takes_first(split):
        described |= {"eval_clips": "first"}
    if settings.steps_whole(split):
        described |= {"frame_steps": "whole"}
    return described


def describe_videos(key: dict[str, Any], exclude: str | None, videos: Sequence[Video] | None) -> dict[str, Any]:
    """Describe the videos of a split, but not their location, so that a cache can be moved and used without them.

    Args:
        key: Arguments that choose them.
        exclude: File of the names to leave out.
        videos: The videos, if they are here: a checksum of names, labels and sizes is added.
    """
    described = dict(key)
    if exclude:
        checksum = _hash("\n".join(sorted(excluded_names(Path(exclude)))))
        described["exclude"] = f"names of sha256 {checksum}"
    if videos is not None:
        checksum = _hash("".join(f"{video.name}\t{video.label}\t{_size(video.path)}\n" for video in videos))
        described["videos"] = f"{len(videos)}, names, labels and sizes of sha256 {checksum}"
    return described


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _size(path: Path) -> int | None:
    """Return the size in bytes. The modification time is left out: a copy of a video is the same video."""
    try:
        return identity(path)[0]
    except (OSError, ValueError):  # a list may name a missing file, or one that no file system has
        return None
