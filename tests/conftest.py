"""What several tests need."""

import os
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and golden tensors: VIDTWIN_SHARED, by default `../shared` beside the project."""
    path = Path(os.environ.get("VIDTWIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared folder of golden tensors and clips, absent at {path} (set VIDTWIN_SHARED)")
    return path
