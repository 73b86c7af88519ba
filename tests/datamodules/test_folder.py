"""Any tree of videos, or what lists name; and the data sets that configs/data describes."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError
from vidtwin.video import write_video

CONFIGS = Path(__file__).resolve().parents[2] / "configs" / "data"


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
        "absent": "path\nd/0.mp4\nc/9.mp4\n",
        "short": "path,label\na/0.mp4\n",
        "split": "path,split\na/0.mp4,training\n",
    }
    for name, text in contents.items():
        (tmp_path / f"{name}.csv").write_text(text)
    for folder, csv, message in (
        (tmp_path / "absent", None, r"got no folder; set data\.root"),
        (tmp_path / "empty", None, r"found none; set data\.root"),
        (root, "no.csv", r"no\.csv, got no file; set data\.csv"),
        (root, "columns.csv", r"expected the column path .* got the columns \['file'\]"),
        (root, "rows.csv", "got no rows"),
        (root, "absent.csv", r"expected its 2 videos .* all are missing \(d/0\.mp4, c/9\.mp4\); set data\.root"),
        (root, "short.csv", "expected 2 columns in line 2, got 1"),
        (root, "split.csv", "expected train, val or test in the column split, got 'training'"),
    ):
        data = VideoFolder(str(folder), str(tmp_path / csv) if csv else None)
        with pytest.raises(UserError, match=message) as caught:
            data.videos("train")
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match=r"in split val, got none .* change data\.val_fraction"):
        VideoFolder(str(root), val_fraction=0).videos("val")
    with pytest.raises(UserError, match="together at most 1"):
        VideoFolder(str(root), val_fraction=0.8, test_fraction=0.3)


def listed(data: VideoFolder, split: str) -> list[tuple[str, int]]:
    return [(video.name, video.label) for video in data.videos(split)]


def write(root: Path, *names: str, text: str = "") -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def from_config(name: str, root: Path, **others: object) -> VideoFolder:
    """A data module as its config makes it, but for where the data lie."""
    config = yaml.safe_load((CONFIGS / name).read_text())
    assert config["class_path"] == f"{VideoFolder.__module__}.{VideoFolder.__qualname__}"
    return VideoFolder(**{**config["init_args"], "root": str(root), **others})


def test_mcl_jcv_is_for_testing_alone(tmp_path: Path) -> None:
    data = from_config("mcl_jcv.yaml", write(tmp_path, *(f"videoSRC{i:02d}_1920x1080_24.yuv" for i in range(1, 31))))
    assert [name for name, _ in listed(data, "test")] == [f"videoSRC{i:02d}_1920x1080_24.yuv" for i in range(1, 31)]
    for split in ("train", "val"):
        with pytest.raises(UserError, match=f"expected videos in split {split}, got none"):
            data.videos(split)


def test_davis_reads_its_lists_of_sequences(tmp_path: Path) -> None:
    names = [f"sequence-{i}" for i in range(60)]
    write(tmp_path, *(f"JPEGImages/480p/{name}/00000.jpg" for name in [*names, "bear"]))
    write(tmp_path, "ImageSets/2017/train.txt", text="\r\n".join(names) + "\r\n")
    write(tmp_path, "ImageSets/2017/val.txt", text="bear\n\n")
    data = from_config("davis.yaml", tmp_path)
    assert listed(data, "test") == [("JPEGImages/480p/bear", -1)]
    assert data.videos("test")[0].path == tmp_path / "JPEGImages" / "480p" / "bear"
    train, val = (listed(data, split) for split in ("train", "val"))
    assert 2 <= len(val) <= 12
    assert {name for name, _ in train} | {name for name, _ in val} == {f"JPEGImages/480p/{name}" for name in names}
    assert len(train) + len(val) == 60


def test_kinetics_has_a_folder_for_each_split_and_class(tmp_path: Path) -> None:
    write(tmp_path, "train/abseiling/a_000001_000011.mp4", "train/air drumming/b.mp4", "val/zumba/c.webm")
    write(tmp_path, "test/air drumming/d.mp4", "test/e.mp4", "test/air drumming/d.json", "replacement/f.mp4")
    data = from_config("kinetics.yaml", tmp_path)
    assert listed(data, "train") == [("train/abseiling/a_000001_000011.mp4", 0), ("train/air drumming/b.mp4", 1)]
    assert listed(data, "val") == [("val/zumba/c.webm", 2)]
    assert listed(data, "test") == [("test/air drumming/d.mp4", 1), ("test/e.mp4", -1)]


def test_webvid_makes_paths_of_columns_and_leaves_what_is_absent_to_the_reader(tmp_path: Path) -> None:
    header = "videoid,contentUrl,duration,page_dir,name\n"
    rows = "".join(f'{i},https://x/{i}.mp4,PT00H00M10S,000001_000050,"A cat, {i}"\n' for i in range(3))
    write(tmp_path, "results_2M_train.csv", text=header + rows)
    write(tmp_path, "results_2M_val.csv", text=header + "7,https://x/7.mp4,PT00H00M10S,000051_000100,dog\n")
    write(tmp_path, "videos/000001_000050/1.mp4", "videos/000051_000100/7.mp4")
    data = from_config("webvid.yaml", tmp_path)
    assert listed(data, "train") == [(f"videos/000001_000050/{i}.mp4", -1) for i in range(3)]
    assert listed(data, "test") == [("videos/000051_000100/7.mp4", -1)]
    half = from_config("webvid.yaml", tmp_path, val_fraction=0.5)
    assert sorted(listed(half, "train") + listed(half, "val")) == listed(data, "train")


def test_labels_of_lists_are_numbered_over_all_splits(tmp_path: Path) -> None:
    """Kinetics' own CSV files, whose times have to be filled up with zeros; its test file has no labels."""
    write(tmp_path, "all/x_000003_000013.mp4", "all/y_000120_000130.mp4", "all/z_000000_000010.mp4")
    write(tmp_path, "train.csv", text="label,youtube_id,time_start,time_end,split\nzumba,x,3,13,train\n")
    write(tmp_path, "val.csv", text="label,youtube_id,time_start,time_end,split\nabseiling,y,120,130,validate\n")
    write(tmp_path, "test.csv", text="youtube_id,time_start,time_end,split\nz,0,10,test\n")
    files = {split: f"{split}.csv" for split in ("train", "val", "test")}
    template = "all/{youtube_id}_{time_start:0>6}_{time_end:0>6}.mp4"
    data = VideoFolder(str(tmp_path), splits=files, path_template=template)
    assert listed(data, "train") == [("all/x_000003_000013.mp4", 1)]
    assert listed(data, "val") == [("all/y_000120_000130.mp4", 0)]
    assert listed(data, "test") == [("all/z_000000_000010.mp4", -1)]


def test_only_what_a_split_needs_has_to_be_there(tmp_path: Path) -> None:
    write(tmp_path, "train/walk/a.mp4")
    data = VideoFolder(str(tmp_path), splits={"train": "train", "val": "val", "test": "test.txt"})
    assert listed(data, "train") == [("train/walk/a.mp4", 0)]
    for split, message in (
        ("val", r"folder of videos at .*val, .* or data\.splits"),
        ("test", r"test\.txt, got no file"),
    ):
        with pytest.raises(UserError, match=message):
            data.videos(split)
    with pytest.raises(UserError, match=r"data\.splits to name the split test, got train alone; add test"):
        VideoFolder(str(tmp_path), splits={"train": "train"}).videos("test")
    with pytest.raises(UserError, match=r"in split val, got none .* change data\.val_fraction"):
        VideoFolder(str(tmp_path), splits={"train": "train"}, val_fraction=0).videos("val")


def test_folders_of_images_are_videos_if_asked_for(tmp_path: Path) -> None:
    write(tmp_path, "a/one/00000.jpg", "a/one/00001.jpg", "a/one/masks/00000.png", "b/im1.PNG", "b2/cover.jpg")
    write(tmp_path, "c/film.mp4", "c/thumbnail0.jpg", "0.jpg")
    assert listed(VideoFolder(str(tmp_path), None, 0, 1), "test") == [("c/film.mp4", 0)]
    data = VideoFolder(str(tmp_path), None, 0, 1, image_folders=True)
    assert [name for name, _ in listed(data, "test")] == ["a/one", "b", "c/film.mp4"]
    with pytest.raises(UserError, match=r"found none; set data\.root, or data\.image_folders"):
        VideoFolder(str(tmp_path / "a")).videos("train")


def test_options_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    for options, message in (
        ({"splits": {"training": "train"}}, "some of train, val and test, without data.csv, got training"),
        ({"splits": {"train": "train"}, "csv": "x.csv"}, "got data.csv too"),
        ({"path_template": "videos/x.mp4"}, "with columns in braces"),
        ({"path_template": "videos/{x.mp4"}, "with columns in braces"),
    ):
        with pytest.raises(UserError, match=message):
            VideoFolder(str(tmp_path), **options)  # type: ignore[arg-type]
    write(tmp_path, "list.txt", text="a.mp4\n")
    with pytest.raises(UserError, match=r"expected \{path\} alone in data\.path_template for a list of paths"):
        VideoFolder(str(tmp_path), splits={"train": "list.txt"}, path_template="{a}/{b}.mp4").videos("train")
    write(tmp_path, "list.csv", text="path,name\na.mp4,a\n")
    with pytest.raises(UserError, match=r"the columns page_dir, videoid .* got the columns \['path', 'name'\]"):
        VideoFolder(str(tmp_path), str(tmp_path / "list.csv"), path_template="{page_dir}/{videoid}.mp4").videos("train")


def test_a_list_that_names_a_video_twice_is_refused(tmp_path: Path) -> None:
    root = make_tree(tmp_path / "videos", 10)
    names = ["a/0.mp4", "b/1.mp4", "a/2.mp4", "b/3.mp4", "a/4.mp4"]
    again = ["./a/0.mp4", "a/../b/1.mp4", str(root.absolute() / "a/2.mp4"), "b//3.mp4", "b/3.mp4"]
    write(tmp_path, "list.txt", text="\n".join([*names, *again]))
    write(tmp_path, "list.csv", text="path,split\n" + "".join(f"{n},train\n" for n in names) + "a/2.mp4,test\n")
    for data, message in (
        (
            VideoFolder(str(root), splits={"train": "../list.txt"}),
            r"4 come twice or more \(a/0.mp4, a/2.mp4, b/1.mp4, …",
        ),
        (VideoFolder(str(root), csv=str(tmp_path / "list.csv")), r"1 come twice or more \(a/2.mp4\); leave one line"),
    ):
        with pytest.raises(UserError, match=message):
            data.videos("train")


def test_test_videos_are_not_trained_on(tmp_path: Path) -> None:
    write(tmp_path, *(f"{split}/{kind}/{i}.mp4" for split in ("train", "test") for kind in "ab" for i in range(3)))
    write(tmp_path, "train.txt", text="train/a/0.mp4\ntest/a/1.mp4\ntest/b/0.mp4")
    write(tmp_path, "other.csv", text="path\ntrain/b/0.mp4\n./train/a/0.mp4\ngone.mp4\n")
    write(tmp_path, "gone.csv", text="path\ngone.mp4\n")
    for train, others, shared in (
        ("train.txt", {"test": "test"}, r"2 are in test too \(test/a/1\.mp4, test/b/0\.mp4\); take them out of one"),
        ("train.txt", {"test": "other.csv"}, r"1 are in test too \(train/a/0\.mp4\)"),
        ("train.txt", {"test": "train.txt"}, "3 are in test too"),
        ("train", {"val": "other.csv"}, r"2 are in val too"),
        ("train", {"val": "train/a"}, r"3 are in val too \(train/a/0\.mp4, "),
        ("train/a", {"val": "train"}, r"3 are in val too \(train/a/0\.mp4, "),
        ("", {"test": "test"}, r"6 are in test too \(test/a/0\.mp4, "),
        ("train", {"test": ""}, r"6 are in test too"),
    ):
        with pytest.raises(UserError, match=shared):
            VideoFolder(str(tmp_path), splits={"train": train, **others}).videos("train")
    apart = VideoFolder(str(tmp_path), splits={"train": "train", "val": "gone.csv", "test": "test"})
    assert len(apart.videos("train")) == 6  # whether the others are there is not asked
    with pytest.raises(UserError, match=r"folders under data\.root"):
        VideoFolder(str(tmp_path / "train"), splits={"train": str(tmp_path / "test")}).videos("train")


def test_an_unclosed_quote_is_refused_with_its_line(shared: Path, tmp_path: Path) -> None:
    given = shared / "data" / "odd" / "unbalanced_quote.csv"
    write(tmp_path, "clips/a.avi", "clips/b.avi", "clips/c.avi")
    with pytest.raises(UserError, match=r"unbalanced_quote\.csv: .* unreadable row from line 2 on"):
        VideoFolder(str(tmp_path), str(given), 0, 1).videos("test")
    for text, message in (
        ('path,label\nclips/a.avi,"a\ndog"\nclips/b.avi,"a" cat\n', "unreadable row from line 4 on"),
        ("path,label\nclips/a.avi,a dog, asleep\n", "expected 2 columns in line 2, got 3"),
        ('path,label\nclips/a.avi,"a\ndog"\nclips/b.avi\n', "expected 2 columns in line 4, got 1"),
    ):
        write(tmp_path, "list.csv", text=text)
        with pytest.raises(UserError, match=message):
            VideoFolder(str(tmp_path), str(tmp_path / "list.csv"), 0, 1).videos("test")
    write(tmp_path, "list.csv", text='path,label\n\nclips/a.avi,"a\n""dog"""\nclips/b.avi,a cat,,\n')
    data = VideoFolder(str(tmp_path), str(tmp_path / "list.csv"), 0, 1)
    assert listed(data, "test") == [("clips/a.avi", 0), ("clips/b.avi", 1)]


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "latin-1"])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_a_list_may_have_any_usual_encoding(tmp_path: Path, encoding: str, end: str) -> None:
    names = ["café/größe.mp4", "b.mp4"]
    write(tmp_path, *names)
    (tmp_path / "list.csv").write_bytes(end.join(["path,label", *(f"{name},ü" for name in names)]).encode(encoding))
    (tmp_path / "list.txt").write_bytes((end.join(names) + end).encode(encoding))
    data = VideoFolder(str(tmp_path), splits={"train": "list.csv"}, val_fraction=0)
    assert listed(data, "train") == [(name, 0) for name in names]
    data = VideoFolder(str(tmp_path), splits={"test": "list.txt"})
    assert listed(data, "test") == [(name, -1) for name in names]


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_a_guessed_encoding_is_logged_once_with_its_line_and_damaged_utf_8_is_refused(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], name: str
) -> None:
    write(tmp_path, "a.mp4", "caf\u00e9.mp4")
    file = tmp_path / name
    file.write_bytes("path\na.mp4\ncaf\u00e9.mp4\n".encode("latin-1"))
    splits = {"test": name}
    for _ in range(2):
        VideoFolder(str(tmp_path), splits=splits).videos("test")
    assert capfd.readouterr().err == (
        f"vidtwin: {file}: line 3 is not UTF-8 ('caf\\xe9.mp4'): the file is read as Latin-1\n"
    )
    file.write_bytes("path\ngr\u00f6\u00dfe.mp4\ncaf\u00e9.mp4\n".encode().replace(b"\xc3\xa9", b"\xc3"))
    with pytest.raises(
        UserError, match=rf"{name}: expected one encoding, got a line 3 that is not UTF-8 .*; save it as UTF-8"
    ):
        VideoFolder(str(tmp_path), splits=splits).videos("test")


@pytest.mark.parametrize("name", ["list.csv", "list.txt"])
def test_names_that_no_file_can_have_are_missing_videos(tmp_path: Path, name: str) -> None:
    write_video(tmp_path / "a.mp4", np.zeros((20, 16, 16, 3), np.uint8), 25)
    odd = ["nul\0.mp4", "x" * 300 + ".mp4", "/".join(["y" * 200] * 30) + ".mp4"]
    write(tmp_path, name, text="\n".join([*(["path"] if name.endswith("csv") else []), "a.mp4", *odd]) + "\n")
    options = {"num_frames": 4, "resolution": 16, "num_workers": 0, "max_broken": 1.0}
    data = VideoFolder(str(tmp_path), splits={"test": name}, **options)
    assert len(data.dataset("test")) == 1
    assert sorted(data.skipped["test"]) == sorted(odd)
    assert data.protocol()["num_clips"] == 1
    assert data.describe("test")["videos"].startswith("4, ")


def test_damaged_utf_16_is_one_line(tmp_path: Path) -> None:
    write(tmp_path, "a.mp4")
    (tmp_path / "list.csv").write_bytes("path\na.mp4\n".encode("utf-16")[:-1])
    with pytest.raises(UserError, match=r"list\.csv: expected a text, got damaged UTF-16 .*; save it as UTF-8"):
        VideoFolder(str(tmp_path), str(tmp_path / "list.csv")).videos("train")
