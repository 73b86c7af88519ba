"""Videos that can't be used: named once with their reason, counted, never replaced under their name."""

import re
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_tree import BAD, pictures, write_tree
from tiny import tiny_task
from tiny import trainer as video_trainer

from vidtwin.data import ClipSettings
from vidtwin.datamodules import index
from vidtwin.datamodules.clips import Video, VideoClips
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError
from vidtwin.video import read_clip, write_video

SMALL: dict[str, Any] = {"num_frames": 4, "resolution": 32, "batch_size": 2, "num_workers": 0}


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return write_tree(tmp_path / "videos")


def names_in(lines: str) -> Counter[str]:
    return Counter(line.split()[2].rstrip(":") for line in lines.splitlines() if line.startswith("vidtwin: skipped "))


TRAIN_ALONE: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 0.0}


def folder(root: Path, **kwargs: Any) -> VideoFolder:
    return VideoFolder(str(root), **(SMALL | TRAIN_ALONE | kwargs))


def test_a_training_names_each_unusable_file_once_and_takes_others(tree, tmp_path, capfd):
    seen: list[str] = []
    task = tiny_task()
    inner = task.training_step
    task.training_step = lambda batch, batch_idx: (seen.extend(batch["name"]), inner(batch, batch_idx))[1]
    data = VideoFolder(str(tree), **(SMALL | {"max_broken": 0.7, "val_fraction": 0.3, "test_fraction": 0.0}))
    video_trainer(tmp_path, max_steps=30, num_sanity_val_steps=-1).fit(task, datamodule=data)
    err = capfd.readouterr().err
    told = names_in(err)
    assert set(told) == BAD
    assert set(told.values()) == {1}
    assert len(seen) == 60
    assert set(seen).isdisjoint(BAD)
    assert set(seen) == {video.name for video in data.videos("train")} - BAD


def test_each_reason_is_logged_and_counted(tree, capsys):
    data = folder(tree, max_broken=0.5)
    list(data.train_dataloader())
    lines = capsys.readouterr().err.splitlines()
    for name, reason in (
        ("empty.avi", "expected a readable video, FFmpeg says"),
        ("text.mp4", "expected a readable video, FFmpeg says"),
        ("half.avi", "truncated: its header promises 40 frames"),
        ("short.avi", "too short: a clip of 4 at 8 frames per second spans 10, it has 5"),
    ):
        (line,) = [line for line in lines if f"skipped {name}: " in line]
        assert re.search(reason, line)
    assert "vidtwin: train: 13 of 17 videos can be used; 2 unreadable, 1 truncated, 1 short; " in "\n".join(lines)
    assert "(5 of 17 videos of train)" in next(line for line in lines if "skipped damaged.mp4" in line)


def test_the_epoch_and_the_shares_count_usable_videos(tree):
    data = folder(tree, max_broken=0.5)
    loader = data.train_dataloader()
    assert len(data.dataset("train")) == 13  # the damaged one opens, and holds what its header promises
    batches = list(loader)
    assert len(batches) == len(loader) == 6
    assert all(len(batch["clip"]) == len(batch["name"]) == 2 for batch in batches)


def test_a_clip_in_the_place_of_a_damaged_one_is_anothers_under_its_own_name(tree):
    data = folder(tree, max_broken=0.5)
    clips = data.dataset("train")
    place = next(i for i, video in enumerate(clips.videos) if video.name == "damaged.mp4")
    stand_ins = [clips[epoch, place] for epoch in range(6)]
    for item in stand_ins:
        assert item["name"] != "damaged.mp4"
        assert [name for name, _ in item["skipped"]] == ["damaged.mp4"]
        assert "stops" in item["skipped"][0][1] or "damaged" in item["skipped"][0][1]
        level = 40 + 15 * int(item["name"].removeprefix("good").removesuffix(".avi"))
        assert abs(float(item["clip"][:, -3:].float().mean()) - level) < 6
    assert len({item["name"] for item in stand_ins}) > 1
    again = folder(tree, max_broken=0.5).dataset("train")
    assert all(torch.equal(again[epoch, place]["clip"], stand_ins[epoch]["clip"]) for epoch in range(6))


@pytest.mark.parametrize("workers", [1, 3])
def test_broken_videos_that_are_met_do_not_depend_on_the_workers(tree, workers):
    def epochs(num_workers: int) -> list[Any]:
        data = folder(tree, max_broken=0.5, num_workers=num_workers)
        loader = data.train_dataloader()
        seen = []
        for epoch in range(3):
            loader.sampler.set_epoch(epoch)
            seen += [(batch["name"], batch["start_frame"].tolist(), int(batch["clip"].sum())) for batch in loader]
        return seen

    assert epochs(workers) == epochs(0)


def test_evaluation_has_a_clip_less_and_no_other_in_its_place(tree, capsys):
    data = folder(tree, max_broken=0.5, test_fraction=1.0, eval_batch_size=1)
    names = [name for batch in data.test_dataloader() for name in batch["name"]]
    assert sorted(names) == sorted({path.name for path in tree.iterdir()} - BAD)
    assert set(data.skipped["test"]) == BAD
    assert set(names_in(capsys.readouterr().err).values()) == {1}
    list(data.test_dataloader())
    assert "skipped" not in capsys.readouterr().err


def test_too_many_broken_files_stop_the_run_by_name(tree):
    with pytest.raises(UserError, match=r"data\.max_broken=0\.05 .* train, got 3 of 17 \(empty\.avi: .*data\.exclude"):
        folder(tree).train_dataloader()
    for name in ("empty.avi", "half.avi", "text.mp4"):
        (tree / name).unlink()
    with pytest.raises(UserError, match=r"got 1 of 14 \(damaged\.mp4: "):
        list(folder(tree, max_broken=0.0).train_dataloader())  # found by decoding alone
    assert len(list(folder(tree).train_dataloader())) == 6  # one may be, however small the split


def test_short_videos_are_looped_by_option(tree, capsys):
    data = folder(tree, max_broken=0.5, short_videos="loop", test_fraction=1.0, num_frames=8, fps=12.5)
    assert "short.avi" not in data.dataset("test") and "short.avi" not in data.skipped["test"]  # noqa: PT018
    videos = data.dataset("test").videos
    place = next(i for i, video in enumerate(videos) if video.name == "short.avi")
    clip = data.dataset("test")[place]["clip"].numpy()
    # 5 frames at 25 per second; the clip takes every second one: 0 2 4 1 3 0 2 4.
    every = read_clip(tree / "short.avi", 0, 5, size=32)
    np.testing.assert_array_equal(clip, every[[0, 2, 4, 1, 3, 0, 2, 4]])
    assert data.protocol()["short_videos"] == "loop"


def test_an_exclusion_list_leaves_videos_out_without_counting_them(tree, tmp_path, capsys):
    listing = tmp_path / "exclude.txt"
    listing.write_text("# made by hand\n\n" + "".join(f"{name}\tbecause\n" for name in sorted(BAD)))
    data = folder(tree, exclude=str(listing))
    assert len(data.dataset("train")) == 12
    list(data.train_dataloader())
    assert capsys.readouterr().err == "vidtwin: train: data.exclude leaves out 5 of 17 videos\n"
    (tmp_path / "other.txt").write_text("videos/empty.avi\n")
    with pytest.raises(UserError, match="broken"):
        folder(tree, exclude=str(tmp_path / "other.txt")).dataset("train")
    assert "leaves out 0 of 17 videos; it names videos/empty.avi, but this split has" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"list of videos to exclude at .*no\.txt, got no file"):
        folder(tree, exclude=str(tmp_path / "no.txt")).dataset("train")
    listing.write_text("".join(f"{path.name}\n" for path in tree.iterdir()))
    with pytest.raises(UserError, match=r"got none of 17: data\.exclude="):
        folder(tree, exclude=str(listing)).dataset("train")


def test_rates_are_drawn_among_those_that_a_video_has(tmp_path):
    path = write_video(tmp_path / "a.avi", pictures(60), 12, "mpeg4")
    clips = VideoClips([Video(path, "a")], ClipSettings(4, 32, [2.0, 6.0, 12.0, 24.0], horizontal_flip=False), "train")
    drawn: Counter[float] = Counter()
    for epoch in range(60):
        random = np.random.default_rng((0, epoch, 0)).random(5)
        rate = [2.0, 6.0, 12.0][int(random[4] * 3)]  # never 24: the video has 12
        start = clips[epoch, 0]["start_frame"]
        wanted = read_clip(path, start / 12, 4, rate, 32, (random[1], random[2]))
        np.testing.assert_array_equal(clips[epoch, 0]["clip"].numpy(), wanted)
        drawn[rate] += 1
    assert len(drawn) == 3
    assert min(drawn.values()) > 8


def test_with_one_rate_or_several_the_other_draws_are_the_same(tmp_path):
    path = write_video(tmp_path / "a.avi", pictures(60), 12, "mpeg4")
    one = VideoClips([Video(path, "a")], ClipSettings(4, 32, 6.0, horizontal_flip=False), "train")
    several = VideoClips([Video(path, "a")], ClipSettings(4, 32, [6.0, 6.0], horizontal_flip=False), "train")
    assert all(torch.equal(one[epoch, 0]["clip"], several[epoch, 0]["clip"]) for epoch in range(4))


def test_survey_results_are_kept_until_the_file_changes(tree, monkeypatch):
    paths = sorted(tree.iterdir())
    first = index.survey_all(paths)
    asked: list[Path] = []
    monkeypatch.setattr(index, "_survey_one", lambda path: asked.append(path) or index.Fault("corrupt", "asked again"))
    assert index.survey_all(paths) == first
    assert asked == []
    shutil.copy(tree / "good0.avi", tree / "empty.avi")
    second = index.survey_all(paths)
    assert asked == [(tree / "empty.avi").absolute()]
    assert [a == b for a, b in zip(first, second, strict=True)].count(False) == 1
    (tree / "text.mp4").unlink()
    third = dict(zip(paths, index.survey_all(paths), strict=True))
    assert third[tree / "text.mp4"] == index.Fault("unreadable", "there is no such file")


def test_many_videos_are_surveyed_in_parallel_as_one_by_one(tree, monkeypatch):
    paths = sorted(tree.iterdir())
    one_by_one = [index._survey_one(path.absolute()) for path in paths]
    monkeypatch.setattr(index, "_FEW", 3)
    assert index.survey_all(paths, workers=2) == one_by_one


def test_read_errors_of_the_system_are_neither_skipped_nor_kept(tree, monkeypatch):
    with monkeypatch.context() as patch:
        failing = index.Fault("unreadable", "Input/output error", lasting=False)
        patch.setattr(index, "_survey_one", lambda path: failing)
        with pytest.raises(
            UserError, match=r"Expected to read .*got an error of the system: Input/output error; try again"
        ):
            folder(tree, max_broken=1.0).dataset("train")
    assert len(folder(tree, max_broken=0.5).dataset("train")) == 13


def test_a_survey_draws_nothing_from_the_global_generator(tree, monkeypatch):
    monkeypatch.setattr(index, "_FEW", 3)
    before = torch.get_rng_state()
    index.survey_all(sorted(tree.iterdir()), workers=1)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_list_of_rates_holds_no_null():
    with pytest.raises(UserError, match=r"data\.fps above 0, a list of such rates, or null"):
        VideoFolder("anywhere", fps=[None, 8.0])  # type: ignore[list-item]


def test_a_damaged_or_unwritable_index_raises_no_error(tree, tmp_path, monkeypatch):
    paths = sorted(tree.iterdir())
    expected = index.survey_all(paths)
    file = index._cache_file(paths)
    for content in ("", "0\n", "1\nx\ty\n", "\x00\xff"):
        file.write_text(content)
        assert index.survey_all(paths) == expected
    monkeypatch.setenv("VIDTWIN_CACHE", str(tmp_path / "file"))
    (tmp_path / "file").touch()
    assert index.survey_all(paths) == expected


def test_real_hard_files_go_through_a_training(shared, tmp_path, capfd):
    clips = shared / "data" / "clips"
    data = VideoFolder(
        str(clips), **(SMALL | {"num_frames": 16, "max_broken": 0.3, "val_fraction": 0.2, "test_fraction": 0.0})
    )
    video_trainer(tmp_path, max_steps=13, num_sanity_val_steps=0).fit(
        tiny_task(model={"num_frames": 16}), datamodule=data
    )
    told = names_in(capfd.readouterr().err)
    assert set(told.values()) == {1}
    broken = {"header_only_300B.avi", "text_renamed.avi", "truncated_half.avi", "truncated_half_moov_lost.mp4"}
    broken |= {"zero_byte.avi", "corrupted.mp4"}
    short = {"one_frame.avi", "eight_frames.avi", "h265_10fps.mp4", "short_19f_720p.mp4", "realshort.mp4"}
    short |= {"rotate_0.mov", "rotate_90.mov", "rotate_180.mov", "mma_part0.mp4", "mobile_cif_30f.mp4"}
    short |= {"fullrange_bt709.mp4", "h265_10bit.mp4", "h264_raw_error_I_P.264"}
    assert {Path(name).name for name in told} == broken | short
