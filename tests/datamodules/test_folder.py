"""Any tree of videos, or what a CSV file names."""

from pathlib import Path

import pytest

from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError


def splits(data: VideoFolder) -> dict[str, set[str]]:
    return {split: {video.name for video in data.videos(split)} for split in ("train", "val", "test")}


def make_tree(root: Path, count: int = 60) -> Path:
    for index in range(count):
        path = root / "ab"[index % 2] / f"{index}.mp4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (root / "notes.txt").touch()
    return root


def test_names_alone_decide_the_split(tmp_path: Path) -> None:
    root = make_tree(tmp_path)
    before = splits(VideoFolder(str(root), val_fraction=0.2, test_fraction=0.2))
    assert sum(map(len, before.values())) == 60
    assert all(len(part) > 3 for part in before.values())
    make_tree(root, 80)
    after = splits(VideoFolder(str(root), val_fraction=0.2, test_fraction=0.2))
    assert all(before[split] <= after[split] for split in before)


def test_labels_follow_the_folders(tmp_path: Path) -> None:
    data = VideoFolder(str(make_tree(tmp_path)), test_fraction=1, val_fraction=0)
    assert {(video.name[0], video.label) for video in data.videos("test")} == {("a", 0), ("b", 1)}


def test_a_csv_names_videos_labels_and_splits(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "videos")
    csv = tmp_path / "list.csv"
    csv.write_text("path,label,split\r\na/0.mp4,walk,train\r\nb/1.mp4,jump,val\r\na/2.mp4,jump,test\r\n")
    data = VideoFolder(str(root), csv=str(csv))
    assert splits(data) == {"train": {"a/0.mp4"}, "val": {"b/1.mp4"}, "test": {"a/2.mp4"}}
    assert [data.videos(split)[0].label for split in ("train", "val", "test")] == [1, 0, 0]
    csv.write_text("path,label\na/0.mp4,7\nb/1.mp4,\n")
    assert [v.label for v in VideoFolder(str(root), str(csv), 0, 1).videos("test")] == [7, -1]


def test_real_files_of_all_kinds_give_clips(shared: Path, tmp_path: Path) -> None:
    csv = tmp_path / "list.csv"
    csv.write_text("path\nbikes.mp4\nflipping_a_pancake.mkv\nv_ApplyEyeMakeup_g01_c01.avi\n")
    data = VideoFolder(str(shared / "data" / "clips"), str(csv), 0, 1, num_frames=4, resolution=32, num_workers=0)
    (batch,) = data.test_dataloader()
    assert batch["clip"].shape == (3, 4, 32, 32, 3)
    assert all(clip.float().std() > 5 for clip in batch["clip"])


def test_bad_input_is_described_in_one_line(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "videos", 2)
    (tmp_path / "empty").mkdir()
    contents = {
        "columns": "file\nx.mp4\n",
        "rows": "path\n",
        "absent": "path\na/0.mp4\nc/9.mp4\n",
        "split": "path,split\na/0.mp4,training\n",
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.csv").write_text(text)
    for folder, csv, message in (
        (tmp_path / "absent", None, r"there is none; set data\.root"),
        (tmp_path / "empty", None, r"found none; set data\.root"),
        (root, "no.csv", r"no\.csv, there is none; set data\.csv"),
        (root, "columns.csv", r"expected the column path .* got the columns \['file'\]"),
        (root, "rows.csv", "got no rows"),
        (root, "absent.csv", r"expected its 2 videos .* 1 are absent \(c/9\.mp4\)"),
        (root, "split.csv", "expected train, val or test in the column split, got 'training'"),
    ):
        data = VideoFolder(str(folder), str(tmp_path / csv) if csv else None)
        with pytest.raises(UserError, match=message) as caught:
            data.setup("fit")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"in split val, got none .* change data\.val_fraction"):
        VideoFolder(str(root), val_fraction=0).videos("val")
    with pytest.raises(UserError, match="together at most 1"):
        VideoFolder(str(root), val_fraction=0.8, test_fraction=0.3)
