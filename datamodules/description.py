"""What the clips of a split depend on: by it a cache is known to be of the clips that are asked for."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin.errors import UserError
from vidtwin.listing import excluded_names, identity
from vidtwin.video import RESIZE_FILTER

if TYPE_CHECKING:  # it describes itself by this
    from .data_module import ClipDataModule


def describe(data: "ClipDataModule", split: str) -> dict[str, Any]:
    """All arguments on which the clips of a split depend, as JSON.

    Where the data lie is none of them, so that a cache can be moved and used without the videos. `videos` (a checksum
    of names, labels and sizes) is there only where the videos are.
    """
    drawn = data._is_drawn(split)
    description: dict[str, Any] = {
        "data": type(data).__name__,
        "num_frames": data.num_frames,
        "resolution": data.resolution,
        "fps": data.fps if drawn else data.eval_fps,
        "short_videos": data.short_rule(split),
        "resize": RESIZE_FILTER,
        "augment": drawn,
    }
    if drawn:
        description |= {"seed": data.seed, "horizontal_flip": data.horizontal_flip}
    if data.takes_all(split):
        description |= {"eval_clips": "all", "tail": data.tail}
    return _as_json(description | _source(data, split))


def describe_videos(data: "ClipDataModule", split: str) -> dict[str, Any]:
    """The same for video files, which depend on less."""
    return _as_json({"data": type(data).__name__, **_source(data, split)})


def _source(data: "ClipDataModule", split: str) -> dict[str, Any]:
    """Which videos, or what takes their place."""
    described = data.cache_key(split)
    if data.exclude:
        names = "\n".join(sorted(excluded_names(Path(data.exclude))))
        described["exclude"] = f"names of sha256 {hashlib.sha256(names.encode()).hexdigest()[:16]}"
    try:
        videos = data.videos(split)
    except UserError:
        return described
    lines = "".join(f"{video.name}\t{video.label}\t{_size(video.path)}\n" for video in videos)
    checksum = hashlib.sha256(lines.encode()).hexdigest()[:16]
    return {**described, "videos": f"{len(videos)}, names, labels and sizes of sha256 {checksum}"}


def _size(path: Path) -> int | None:
    """In bytes. The time of its last change is left out: a copy of a video is the same video."""
    try:
        return identity(path)[0]
    except OSError:  # a list may name what is not there
        return None


def _as_json(description: dict[str, Any]) -> dict[str, Any]:
    return dict(json.loads(json.dumps(description)))
