"""A small data set in UCF-101's layout, written once."""

from pathlib import Path

import pytest

from vidtwin.datamodules.synthetic import write_ucf_like


@pytest.fixture(scope="session")
def small_ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes, groups 1 (test), 9, 17 (train) and 25 (validation), two videos each of 50 frames."""
    return write_ucf_like(tmp_path_factory.mktemp("ucf") / "data", 2, 4, 2, size=(48, 32), frames=50)
