"""Official lists and folders are read unchanged; missing files are one line."""

import shutil
from pathlib import Path

import pytest

from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.errors import UserError


def names(data: UCF101, split: str) -> set[str]:
    return {video.name for video in data.videos(split)}


@pytest.mark.parametrize("inside", ["", "UCF-101"])
def test_the_written_data_set_loads_with_the_defaults(small_ucf: Path, inside: str) -> None:
    data = UCF101(str(small_ucf / inside))
    train, val, test = (names(data, split) for split in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (8, 4, 4)
    assert not train & val
    assert not (train | val) & test
    assert all("_g25_" in name for name in val)
    assert all("_g01_" in name for name in test)
    assert {(video.name.split("/")[0], video.label) for video in data.videos("test")} == {("Bounce", 0), ("Drift", 1)}


def test_without_lists_groups_1_to_7_are_the_test_data(small_ucf: Path, tmp_path: Path) -> None:
    shutil.copytree(small_ucf / "UCF-101", tmp_path / "UCF-101")
    with_lists, without = UCF101(str(small_ucf)), UCF101(str(tmp_path))
    for split in ("train", "val", "test"):
        assert names(with_lists, split) == names(without, split)
        labels = [{video.name: video.label for video in data.videos(split)} for data in (with_lists, without)]
        assert labels[0] == labels[1]
    assert without.split_name("test") == "test by groups"
    assert with_lists.split_name("test") == "testlist01"


def test_training_does_not_read_the_test_list(small_ucf: Path, tmp_path: Path) -> None:
    lists = shutil.copytree(small_ucf / "ucfTrainTestlist", tmp_path / "lists")
    (lists / "testlist01.txt").unlink()
    data = UCF101(str(small_ucf), lists=str(lists))
    data.setup("fit")
    with pytest.raises(UserError, match=r"Expected UCF-101's list testlist01\.txt .* set data\.lists"):
        data.setup("test")


def test_the_official_lists_name_what_they_should(shared: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lists = shared / "data" / "ucfTrainTestlist"
    for split, train, test in ((1, 9537, 3783), (2, 9586, 3734), (3, 9624, 3696)):
        data = UCF101(".", split=split, lists=str(lists))
        listed = [
            line.split()[0]
            for kind in ("train", "test")
            for line in (lists / f"{kind}list0{split}.txt").read_text().splitlines()
        ]
        monkeypatch.setattr(data, "_files", set(listed))
        videos = data.videos("train") + data.videos("val")
        assert (len(videos), len(data.videos("test"))) == (train, test)
        assert {video.label for video in videos} == set(range(101))
        labels = {video.name: video.label for video in videos}
        for line in (lists / f"trainlist0{split}.txt").read_text().splitlines():
            name, label = line.split()
            assert labels[name] == int(label) - 1


def test_the_real_tree_loads(shared: Path) -> None:
    data = UCF101(str(shared / "data" / "ucf_like" / "UCF-101"), val_groups=[10], num_frames=4, resolution=32)
    assert len(names(data, "train")) + len(names(data, "val")) == 60
    assert len(names(data, "val")) == 10
    assert len(names(data, "test")) == 23
    assert any(name.startswith("HandstandPushups/v_HandStandPushups") for name in names(data, "train"))
    assert data.dataset("train")[0]["clip"].shape == (4, 32, 32, 3)
    with pytest.raises(UserError, match=r"in data\.val_groups=\[24, 25\], they are in groups \[8, 9, 10\]"):
        UCF101(str(shared / "data" / "ucf_like" / "UCF-101")).videos("train")


def test_no_group_is_held_out_for_a_training_without_validation(small_ucf: Path) -> None:
    data, usual = UCF101(str(small_ucf), val_groups=[]), UCF101(str(small_ucf), val_groups=[9])
    assert names(data, "train") == names(usual, "train") | names(usual, "val")
    with pytest.raises(UserError, match=r"some, but not all .* data\.val_groups=\[\]"):
        data.videos("val")


def test_bad_data_are_described_in_one_line(small_ucf: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    short = shutil.copytree(small_ucf, tmp_path / "short")
    for video in sorted((short / "UCF-101").glob("Drift/*_g17_*")):
        video.unlink()
    no_class = shutil.copytree(small_ucf, tmp_path / "no_class")
    (no_class / "ucfTrainTestlist" / "classInd.txt").write_text("1 Bounce\r\n")
    for data, message in (
        (UCF101(str(tmp_path / "absent")), r"no such folder; set data\.root"),
        (UCF101(str(empty)), r"found none; set data\.root"),
        (
            UCF101(str(short)),
            r"expected its 12 videos .* 2 are absent \(Drift/v_Drift_g17_c01\.avi, .*prepare ucf101 --partial",
        ),
        (UCF101(str(no_class)), r"classInd\.txt: .* got none for Drift"),
        (UCF101(str(small_ucf), val_groups=[9, 17, 25]), r"some, but not all .* groups \[9, 17, 25\]"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            data.setup("fit")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="1, 2 or 3, got 4"):
        UCF101(str(small_ucf), split=4)


@pytest.fixture
def lists(small_ucf: Path, tmp_path: Path) -> Path:
    """The lists of the small data set, to be changed."""
    return Path(shutil.copytree(small_ucf / "ucfTrainTestlist", tmp_path / "lists"))


def test_lists_that_contradict_themselves_are_refused(small_ucf: Path, lists: Path) -> None:
    train, test = ((lists / f"{kind}list01.txt").read_text() for kind in ("train", "test"))
    first = test.split()[0]
    for file, text, message in (
        ("trainlist01.txt", train + train.splitlines()[0], r"trainlist01\.txt: .* 1 come twice or more \("),
        ("trainlist01.txt", f"{train}{first} 1\n", rf"are in no other split, 1 are in test too \({first}\)"),
        ("trainlist01.txt", train.replace(" 1", " 2", 1), r"the numbers of classInd\.txt, got 1 others \(Bounce/"),
        ("classInd.txt", "1 Bounce\n1 Drift\n", r"classInd\.txt: expected each class once, 1 come twice"),
        ("classInd.txt", "1 Bounce\n2 Bounce\n", r"classInd\.txt: expected each class once, Bounce come twice"),
        ("classInd.txt", "1 Bounce\nDrift\n", r"classInd\.txt: .* a number and a class, got 'Drift'; correct"),
    ):
        before = (lists / file).read_text()
        (lists / file).write_text(text)
        with pytest.raises(UserError, match=message):
            UCF101(str(small_ucf), lists=str(lists)).videos("train")
        (lists / file).write_text(before)


def test_numbers_of_classes_may_begin_with_0_and_files_with_a_mark(small_ucf: Path, lists: Path) -> None:
    expected = [(video.name, video.label) for video in UCF101(str(small_ucf)).videos("train")]
    for file in ("classInd.txt", "trainlist01.txt"):
        lines = (lists / file).read_text().splitlines()
        for number in (1, 2):
            lines = [line.replace(f" {number}", f" {number - 1}").replace(f"{number} ", f"{number - 1} ")
                     for line in lines]  # fmt: skip
        (lists / file).write_text("\n".join(lines), encoding="utf-16" if file == "classInd.txt" else "utf-8-sig")
    assert [(video.name, video.label) for video in UCF101(str(small_ucf), lists=str(lists)).videos("train")] == expected


def test_names_of_classes_may_have_spaces(small_ucf: Path, lists: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(small_ucf / "UCF-101", tmp_path / "UCF-101"))
    (root / "Drift").rename(root / "Slow Drift")
    for file in lists.iterdir():
        file.write_text(file.read_text().replace("Drift/", "Slow Drift/").replace("2 Drift", "2 Slow Drift"))
    data = UCF101(str(root), lists=str(lists))
    assert {(video.name.split("/")[0], video.label) for video in data.videos("train")} == {
        ("Bounce", 0), ("Slow Drift", 1)}  # fmt: skip
