"""Rendered scenes: deterministic, textured, unlike each other; files in UCF-101's layout."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from vidtwin.datamodules.synthetic import MOTIONS, Synthetic, main, render, write_ucf_like
from vidtwin.errors import UserError
from vidtwin.video import probe


@pytest.mark.parametrize("motion", MOTIONS)
def test_scenes_are_deterministic_and_move(motion: str) -> None:
    times = np.arange(12) / 8
    first, again = (np.stack(list(render(np.random.default_rng(3), motion, times, (48, 32)))) for _ in range(2))
    np.testing.assert_array_equal(first, again)
    assert first.shape == (12, 32, 48, 3)
    assert first.dtype == np.uint8
    assert first.std(axis=(1, 2)).min() > 4  # textured
    assert np.abs(first[1:].astype(int) - first[:-1]).mean() > 1  # moving


def test_videos_differ_in_colour_and_light() -> None:
    means = [next(render(np.random.default_rng(seed), "Orbit", [0.0], (48, 32))).mean((0, 1)) for seed in range(40)]
    assert np.std([mean.mean() for mean in means]) > 30
    assert np.mean([np.ptp(mean) for mean in means]) > 25


def test_clips_differ_by_epoch_in_training_only() -> None:
    data = Synthetic(num_train=4, num_val=2, num_test=2, num_frames=3, resolution=16, batch_size=2, num_workers=0)
    train, test = data.dataset("train"), data.dataset("test")
    assert torch.equal(train[1, 2]["clip"], train[1, 2]["clip"])
    assert not torch.equal(train[0, 2]["clip"], train[1, 2]["clip"])
    assert not torch.equal(train[0, 1]["clip"], test[0, 1]["clip"])
    first, second = (torch.cat([batch["clip"] for batch in data.test_dataloader()]) for _ in range(2))
    assert torch.equal(first, second)
    assert first.shape == (2, 3, 16, 16, 3)
    protocol = data.protocol()
    assert (protocol["num_clips"], protocol["resolution"], protocol["fps"]) == (2, 16, 8.0)


@pytest.mark.parametrize("given", [{"eval_clips": "all"}, {"frame_steps": "whole"}, {"resize": "bilinear"}])
def test_settings_that_change_no_rendered_clip_are_refused(given: dict[str, str]) -> None:
    with pytest.raises(UserError, match=rf"Expected data\.{next(iter(given))}: .* for clips that are rendered"):
        Synthetic(**given)


def test_without_augment_each_epoch_has_the_same_scenes() -> None:
    small = {"num_train": 2, "num_frames": 3, "resolution": 16, "num_workers": 0}
    fixed, fresh = Synthetic(augment=False, **small).dataset("train"), Synthetic(**small).dataset("train")
    assert torch.equal(fixed[4, 1]["clip"], fixed[0, 1]["clip"])
    assert torch.equal(fixed[4, 1]["clip"], fresh[0, 1]["clip"])


def test_the_layout_is_that_of_ucf101(small_ucf: Path) -> None:
    lists = small_ucf / "ucfTrainTestlist"
    assert (lists / "classInd.txt").read_bytes() == b"1 Bounce\r\n2 Drift\r\n"
    train = (lists / "trainlist01.txt").read_bytes().decode()
    test = (lists / "testlist01.txt").read_bytes().decode()
    line = r"(Bounce/v_Bounce|Drift/v_Drift)_g(\d\d)_c0[12]\.avi"
    assert re.fullmatch(rf"({line} [12]\r\n){{12}}", train)
    assert re.fullmatch(rf"({line}\r\n){{4}}", test)
    names = {entry.split()[0] for entry in (train + test).splitlines()}
    assert names == {p.relative_to(small_ucf / "UCF-101").as_posix() for p in small_ucf.glob("UCF-101/*/*.avi")}
    info = probe(small_ucf / "UCF-101" / "Drift" / "v_Drift_g25_c02.avi")
    assert (info.num_frames, info.fps, info.width, info.height) == (50, 25, 48, 32)


def test_a_finished_data_set_is_left_alone_and_another_is_not_overwritten(tmp_path: Path) -> None:
    arguments = ["--classes", "1", "--groups", "3", "--clips", "1", "--size", "32", "16", "--frames", "2"]
    root = tmp_path / "data"
    assert main([str(root), *arguments]) == 0
    files = {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert main([str(root), *arguments]) == 0
    assert files == {path: path.stat().st_mtime_ns for path in root.rglob("*")}
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    with pytest.raises(UserError, match=r"expected data made with .*'frames': 60.* delete or rename it"):
        write_ucf_like(root)
    assert main([str(root), *arguments, "--seed", "1"]) == 2
    other = tmp_path / "other"
    other.mkdir()
    (other / "precious.txt").touch()
    with pytest.raises(UserError, match="got something else"):
        write_ucf_like(other)
    assert [path.name for path in other.iterdir()] == ["precious.txt"]


def test_impossible_arguments_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="1 to 6 classes of motion, got 7"):
        Synthetic(num_classes=7)
    with pytest.raises(UserError, match="3 to 25 groups, got 26"):
        write_ucf_like(tmp_path / "data", groups=26)
