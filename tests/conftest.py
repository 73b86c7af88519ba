"""What several tests need."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and golden tensors: VIDTWIN_SHARED, by default `../shared` beside the project."""
    path = Path(os.environ.get("VIDTWIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared folder of golden tensors and clips, absent at {path} (set VIDTWIN_SHARED)")
    return path


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is found out about videos is remembered in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDTWIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
