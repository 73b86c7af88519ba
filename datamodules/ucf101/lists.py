"""UCF-101's official lists: where they lie, and how many videos they name."""

from pathlib import Path

# Videos in the train and the test list of each split.
OFFICIAL = {1: (9537, 3783), 2: (9586, 3734), 3: (9624, 3696)}
VALIDATION_GROUPS = (24, 25)  # of the train lists, held out by default


def class_root(folder: Path) -> Path:
    """The folder of the class folders: `folder` itself, or the `UCF-101` in it."""
    nested = folder / "UCF-101"
    return nested if nested.is_dir() else folder


def find_lists(root: Path) -> Path | None:
    """The folder `ucfTrainTestlist` beside `root`, the folder of the class folders, or in it."""
    places = (root.parent / "ucfTrainTestlist", root / "ucfTrainTestlist")
    return next((place for place in places if place.is_dir()), None)
