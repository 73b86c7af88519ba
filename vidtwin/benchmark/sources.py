"""The sources of videos: clips of one recording are alike, so intervals draw them together."""

import re

FEW = 20
"""With fewer sources intervals are too narrow: a bootstrap knows no values but those that were drawn."""

_GROUP = re.compile(r"(v_\w+_g\d+)_c\d+(\.\w+)?$")


def source_of(video: str) -> str:
    """Name the source of a video: its group if it is named as in UCF-101 (`v_Class_g01_c02.avi`), else itself."""
    found = _GROUP.search(video)
    return found[1] if found else video
