"""The data module of docs/data_sets.md: it lists its videos, and a cache of it holds its own arguments."""

import re
import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from vidtwin.errors import UserError
from vidtwin.video import write_video

DOCS = Path(__file__).resolve().parents[2] / "docs" / "data_sets.md"


@pytest.fixture(scope="module")
def drives(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Return a maker of the class in the docs, over two drives of two cameras."""
    folder = tmp_path_factory.mktemp("drives")
    (block,) = re.findall(r"```python\n(.*?)```", DOCS.read_text(encoding="utf-8"), re.DOTALL)
    (folder / "my_drives.py").write_text(block, encoding="utf-8")
    (folder / "test.txt").write_text("monday\ntuesday\n")
    noise = np.random.default_rng(0).integers(0, 256, (4, 32, 32, 3), np.uint8)
    for place in ("monday/front", "monday/rear", "tuesday/front", "tuesday/rear"):
        write_video(folder / f"{place}.mp4", noise, 8)
    module = runpy.run_path(str(folder / "my_drives.py"))["Drives"]
    return lambda **given: module(
        **({"root": str(folder), "num_frames": 4, "resolution": 32, "fps": 8.0, "num_workers": 0} | given)
    )


def test_it_takes_the_videos_of_one_camera(drives: Any) -> None:
    rear = drives(camera="rear").dataset("test")
    assert [rear.identity(index) for index in range(len(rear))] == [("monday/rear.mp4", 0), ("tuesday/rear.mp4", 0)]
    with pytest.raises(UserError, match=r"Expected a list of drives at .*val\.txt"):
        drives().videos("val")


def test_a_cache_of_another_camera_is_refused_even_without_the_videos(drives: Any, tmp_path: Path) -> None:
    drives().write_cache(tmp_path / "cache", ["test"])
    away = {"root": str(tmp_path / "absent"), "cache": str(tmp_path / "cache")}
    assert len(drives(**away).dataset("test")) == 2
    with pytest.raises(UserError, match="camera"):
        drives(**away, camera="rear").dataset("test")
