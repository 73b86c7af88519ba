"""`vidtwin cache` in process: configs as for fit, one line per mistake."""

from pathlib import Path

import pytest
import yaml

from vidtwin.cli.cache import cache_command
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.datamodules.shards.cached import CachedClips
from vidtwin.datamodules.shards.writer import write_cache
from vidtwin.datamodules.streaming import Streamed
from vidtwin.datamodules.synthetic import write_ucf_like
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.errors import UserError

SMALL = {"num_frames": 4, "resolution": 16, "batch_size": 2, "num_workers": 0}
OPTIONS = [f"--data.{key}={value}" for key, value in SMALL.items()]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ucf_like(tmp_path_factory.mktemp("ucf") / "data", 2, 4, 1, size=(48, 32), frames=50)


@pytest.fixture(autouse=True)
def _writes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ClipDataModule, "write_cache", write_cache, raising=False)


def test_it_takes_the_data_of_a_training_config(root, tmp_path, capsys):
    (tmp_path / "data").mkdir()
    part = {"class_path": "vidtwin.datamodules.ucf101.UCF101", "init_args": {"root": "elsewhere", **SMALL}}
    (tmp_path / "data/ucf.yaml").write_text(yaml.safe_dump(part))
    config = {"model": {"loss": "loss/absent.yaml"}, "trainer": {"max_steps": 3}, "data": "data/ucf.yaml"}
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    out = tmp_path / "out"
    arguments = [str(out), "--config", str(tmp_path / "run.yaml"), f"--data.root={root}", "--epochs", "3"]
    assert cache_command(arguments) == 0
    printed = capsys.readouterr().out
    assert "train: 12 clips of 3 epochs" in printed
    assert "test: 2 clips, " in printed
    assert printed.endswith(f"written; use it by --data.cache {out}\n")
    assert len(CachedClips(out / "train", UCF101(str(root), **SMALL).describe("train"))) == 4
    assert cache_command([*arguments, "--verify"]) == 0
    assert "\nverified; use it by" in capsys.readouterr().out


def test_short_names_splits_and_video_files(root, tmp_path, capsys):
    arguments = [str(tmp_path), "--data", "ucf101", f"--data.root={root}", *OPTIONS]
    assert cache_command([*arguments, "--splits", "val", "test", "--format", "videos"]) == 0
    assert capsys.readouterr().out.endswith(f"use it by --data streamed --data.url {tmp_path}\n")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["test", "val"]
    assert len(Streamed(str(tmp_path), **SMALL).dataset("val")) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "Expected data to cache; give --data"),
        (["--data", "ucf10"], "did you mean 'ucf101'?"),
        (["--data", "ucf101", "--data.root=/nowhere"], "Expected UCF-101's class folders in /nowhere"),
        (["--data", "ucf101", "--data.rot=x"], "did you mean 'root'?"),
        (["--data", "ucf101", "--data.root=x", "--data.fps=-1"], "Expected data.fps above 0"),
        (["--data", "synthetic", "--format", "clip"], "invalid choice: 'clip'"),
        (["--data", "synthetic", "--splits", "training"], "invalid choice: 'training'"),
        (["--data", "synthetic", "--format", "videos"], "Synthetic clips have no files"),
        (["--data", "synthetic", "--epochs", "0"], "Expected at least one epoch"),
        (["--data", "synthetic", "--epoch", "2"], "did you mean 'epochs'?"),
        (["--config", "absent.yaml"], "absent.yaml"),
    ],
)
def test_a_mistake_is_one_line(tmp_path, arguments, message):
    with pytest.raises(UserError) as error:
        cache_command([str(tmp_path / "out"), *arguments])
    assert message in str(error.value)
    assert not list(tmp_path.rglob("*.bin"))


def test_help_describes_the_command_and_its_defaults(capsys):
    with pytest.raises(SystemExit) as end:
        cache_command(["--help"])
    assert end.value.code == 0
    printed = capsys.readouterr().out
    for part in ("vidtwin cache OUT --config", "default: 1)", "default: ['train',", "default: clips)", "After a kill"):
        assert part in printed
