"""Fixtures of several tests, and the order of the files among workers."""

import gc
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Tests that fork processes (forked.py): all in one worker, which imports what they need once more.
FORKING = "training/test_distributed.py", "benchmark/test_sweep_on_two_ranks.py"
FORKING += "apply/test_encode.py", "training/test_sharding.py", "training/test_diffusion.py"
LIBRARIES = "baselines/test_library"  # the beginning of files that import diffusers: all in one worker too
# By their CPU time, heaviest first: short files at the end keep all workers busy.
HEAVY = *FORKING, "cli/test_configs.py", "benchmark/test_sweep.py", "training/test_resume.py"
HEAVY += "benchmark/test_benchmark_configs.py", "apply/test_export.py", "benchmark/test_report_in_chromium.py"
HEAVY += "test_hub.py", "cli/test_cli.py", "baselines/test_library.py", "datamodules/test_prepare.py"
HEAVY += "datamodules/test_resume.py", "benchmark/test_plots.py", "video/test_video.py", "benchmark/test_report.py"
HEAVY += "datamodules/test_doctor.py", "baselines/test_ivideogpt.py", "test_readme.py", "losses/test_perceptual.py"
HEAVY += "apply/test_reconstruct.py", "models/test_vidtwin.py", "apply/test_reenact.py", "datamodules/test_broken.py"
_PLACES = {f"tests/{file}": place for place, file in enumerate(HEAVY)}
assert all((Path(__file__).parent / file).is_file() for file in HEAVY), "a file that conftest.py names has moved"


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items.sort(key=lambda item: _PLACES.get(item.nodeid.partition("::")[0], len(_PLACES)))


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Iterator[object]:
    """Look for garbage neither while modules are imported nor among their 700,000 objects later, and less often."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.set_threshold(5_000, 10, 10)
        gc.enable()


def pytest_unconfigure() -> None:
    gc.unfreeze()  # else the objects of Triton are reported as leaks at the exit


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Give each worker whole files, heavy ones first; those that fork to one worker, those of libraries to one too."""
    if config.getvalue("dist") != "loadfile":
        return None
    from xdist.scheduler import LoadFileScheduling

    class HeavyFirst(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            name = file.removeprefix("tests/")
            if name in FORKING:
                return "forking"
            return "libraries" if name.startswith(LIBRARIES) else file

    config.option.loadscopereorder = False  # by the number of tests
    return HeavyFirst(config, log)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The folder of real clips and golden tensors: VIDTWIN_SHARED, by default `../shared` beside the project."""
    path = Path(os.environ.get("VIDTWIN_SHARED", Path(__file__).resolve().parents[2] / "shared"))
    if not path.is_dir():
        pytest.skip(f"needs the shared folder of golden tensors and clips, absent at {path} (set VIDTWIN_SHARED)")
    return path


@pytest.fixture
def without_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `vidtwin test` write neither plots nor the page nor clips, which take longer than tiny models."""
    monkeypatch.setattr("vidtwin.benchmark.plots.write", lambda folder: [])
    monkeypatch.setattr("vidtwin.benchmark.report.write", lambda folder: Path(folder) / "report.html")
    monkeypatch.setattr("vidtwin.benchmark.players.write_clips", lambda runner: [])


@pytest.fixture(autouse=True, scope="session")
def _unflushed() -> Iterator[None]:
    """Leave it to the system when files reach the disk: tests kill processes, never the machine, and would wait."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda handle: None)
        yield


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Keep the index of videos in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIDTWIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
