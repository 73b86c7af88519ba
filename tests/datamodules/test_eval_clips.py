"""Evaluation over whole videos: which clips there are, what becomes of their ends, and chunks of them by number."""

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_tree import damage, pictures

from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import Video, VideoClips
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.datamodules.shards.cached import difference
from vidtwin.datamodules.shards.writer import write_cache
from vidtwin.datamodules.streaming import Streamed
from vidtwin.errors import UserError
from vidtwin.video import COLOUR, RESIZE_FILTER, VideoInfo, VideoWriter, iter_frames, read_clip, survey, write_video

SMALL: dict[str, Any] = {"num_frames": 4, "resolution": 16, "fps": None, "batch_size": 3, "num_workers": 0}
TEST: dict[str, Any] = {**SMALL, "val_fraction": 0.0, "test_fraction": 1.0, "eval_clips": "all"}
LENGTHS = {"a.avi": 11, "b.mp4": 8, "short.avi": 3, "c.avi": 5}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("videos")
    for level, (name, frames) in enumerate(LENGTHS.items()):
        write_video(folder / name, pictures(frames, level), 25, "mpeg4" if name.endswith("avi") else "libx264")
    return folder


def folder(root: Path, **kwargs: Any) -> VideoFolder:
    return VideoFolder(str(root), **(TEST | kwargs))


def identities(data: Any, split: str = "test") -> list[tuple[str, int]]:
    clips = data.dataset(split)
    return [clips.identity(index) for index in range(len(clips))]


def shown(frames: int, rate: Fraction, fps: Fraction) -> list[int]:
    """The frame that is on the screen at 0, 1 / fps, 2 / fps, … s, until the last one's end."""
    found, moment = [], Fraction(0)
    while moment < frames / rate:
        found.append(max(k for k in range(frames) if k / rate <= moment))
        moment += 1 / fps
    return found


@pytest.mark.parametrize(
    ("frames", "rate", "fps", "length"),
    [(50, 25, 8, 4), (100, 25, 8, 17), (49, 25, 8, 16), (50, 25, 25, 7), (47, 30, 12.5, 5), (61, 24, 23.976, 6)],
)
@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_clips_follow_each_other_by_time_without_overlap(frames, rate, fps, length, tail):
    info = VideoInfo(Path("a.avi"), frames, Fraction(rate), frames / rate, 48, 32)
    clips = VideoClips(
        [Video(Path("a.avi"), "a", info=info)], ClipSettings(length, 16, fps, eval_clips="all", tail=tail)
    )
    screen = shown(frames, Fraction(rate), Fraction(str(fps)))
    starts = screen[::length] if tail == "pad" else screen[: len(screen) // length * length : length]
    assert [clips.identity(index) for index in range(len(clips))] == [("a", start) for start in starts]
    assert len(set(starts)) == len(starts)


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [None, 8.0, 25.0])
def test_the_clips_of_a_video_joined_are_the_video_at_that_rate(tmp_path, suffix, fps):
    path = write_video(tmp_path / f"a{suffix}", pictures(53), 25, "mpeg4" if suffix == ".avi" else "libx264")
    every = np.stack(list(iter_frames(path, 16)))
    wanted = every[shown(53, Fraction(25), Fraction(fps or 25))]
    clips = VideoClips([Video(path, "a")], ClipSettings(5, 16, fps, eval_clips="all", tail="pad"))
    items = [clips[index] for index in range(len(clips))]
    padded = [item["padded"] for item in items]
    assert padded == [0] * (len(items) - 1) + [-len(wanted) % 5]
    joined = np.concatenate([item["clip"].numpy() for item in items])
    np.testing.assert_array_equal(joined[: len(wanted)], wanted)
    assert all(np.array_equal(frame, wanted[-1]) for frame in joined[len(wanted) :])
    dropped = VideoClips([Video(path, "a")], ClipSettings(5, 16, fps, eval_clips="all"))
    assert len(dropped) == len(wanted) // 5
    for index in range(len(dropped)):
        assert torch.equal(dropped[index]["clip"], items[index]["clip"])
        assert dropped.identity(index) == ("a", dropped[index]["start_frame"]) == ("a", items[index]["start_frame"])


@pytest.mark.parametrize("suffix", [".avi", ".mp4", ".mkv"])
@pytest.mark.parametrize("fps", [None, 8.0])
@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_neighbours_are_decoded_once_to_what_each_alone_would_be(tmp_path, monkeypatch, suffix, fps, tail):
    codec = "mpeg4" if suffix == ".avi" else "libx264"
    paths = [write_video(tmp_path / f"{level}{suffix}", pictures(53, level), 25, codec) for level in range(2)]
    clips = VideoClips(
        [Video(path, path.name) for path in paths], ClipSettings(5, 16, fps, eval_clips="all", tail=tail)
    )
    alone = [clips[index] for index in range(len(clips))]
    reads: list[int] = []

    def counted(source: Any, start: Any, num_frames: int, *rest: Any) -> Any:
        reads.append(num_frames)
        return read_clip(source, start, num_frames, *rest)

    monkeypatch.setattr("vidtwin.datamodules.clips.read_clip", counted)
    for keys in ([*range(len(clips))], [(0, index) for index in range(1, len(clips))], [1, 0, 1, 2]):
        reads.clear()
        for key, item in zip(keys, clips.__getitems__(keys), strict=True):
            other = dict(alone[key[1] if isinstance(key, tuple) else key])
            assert torch.equal(item.pop("clip"), other.pop("clip"))
            assert item == other
        assert len(reads) == 2


def test_neighbours_of_a_damaged_clip_are_read_one_by_one(tmp_path):
    path = write_video(tmp_path / "a.avi", pictures(40), 25, "mpeg4", g="1")
    damage(path, 0.5, 0.55)
    clips = VideoClips([Video(path, "a")], ClipSettings(4, 16, None, eval_clips="all"))
    items = clips.__getitems__(range(len(clips)))
    assert 0 < sum("clip" in item for item in items) < len(items)
    for index, item in enumerate(items):
        assert item["skipped"] == clips[index]["skipped"] if "skipped" in item else item["start_frame"] == 4 * index


def test_a_rate_a_little_above_the_videos_repeats_no_frame(tmp_path):
    path = write_video(tmp_path / "a.mp4", pictures(40), Fraction(30000, 1001))
    clips = VideoClips([Video(path, "a")], ClipSettings(1, 16, 30.0, eval_clips="all"))
    every = np.stack(list(iter_frames(path, 16)))
    assert [clips.identity(index)[1] for index in range(len(clips))] == list(range(40))
    np.testing.assert_array_equal(np.concatenate([clips[index]["clip"].numpy() for index in range(40)]), every)
    middle = VideoClips([Video(path, "a")], ClipSettings(8, 16, 30.0))[0]
    np.testing.assert_array_equal(middle["clip"].numpy(), every[middle["start_frame"] :][:8])


def test_frames_that_are_left_at_the_end_are_dropped_or_padded(root, capsys):
    dropped, padded = folder(root), folder(root, tail="pad")
    assert identities(dropped) == [("a.avi", 0), ("a.avi", 4), ("b.mp4", 0), ("b.mp4", 4), ("c.avi", 0)]
    assert set(dropped.skipped["test"]) == {"short.avi"}
    assert "short.avi: too short" in capsys.readouterr().err
    counts = {("a.avi", 8): 1, ("c.avi", 4): 3, ("short.avi", 0): 1}
    assert sorted(identities(padded)) == sorted([*identities(dropped), *counts])
    assert padded.skipped["test"] == {}
    batches = list(padded.test_dataloader())
    assert all(batch["padded"].dtype == torch.int64 for batch in batches)
    seen = [
        (name, start, frames)
        for batch in batches
        for name, start, frames in zip(
            batch["name"], *(batch[k].tolist() for k in ("start_frame", "padded")), strict=True
        )
    ]
    assert seen == [(name, start, counts.get((name, start), 0)) for name, start in identities(padded)]


def test_short_videos_are_looped_where_their_tail_is_not_padded(root):
    looped, padded = folder(root, short_videos="loop"), folder(root, short_videos="loop", tail="pad")
    every = np.stack(list(iter_frames(root / "short.avi", 16)))
    for data, order in ((looped, [0, 1, 2, 0]), (padded, [0, 1, 2, 2])):
        item = data.dataset("test")[identities(data).index(("short.avi", 0))]
        np.testing.assert_array_equal(item["clip"].numpy(), every[order])
        assert item["padded"] == (data is padded)
    assert ("a.avi", 8) not in identities(looped)
    assert padded.protocol() == folder(root, tail="pad").protocol()


def test_training_and_the_middle_clip_repeat_nothing(root):
    data = folder(root, eval_clips="middle")
    (batch, *_) = data.test_dataloader()
    assert batch["padded"].tolist() == [0, 0, 0]
    trained = folder(root, tail="pad", test_fraction=0.0, augment=False)
    assert len(trained.dataset("train")) == 3
    assert trained.dataset("train")[0]["padded"] == 0


@pytest.mark.parametrize("excess", [1, 3])
@pytest.mark.parametrize("suffix", [".avi", ".mp4"])
def test_a_container_that_promises_a_little_too_much_loses_only_what_is_not_there(tmp_path, suffix, excess):
    path = write_video(tmp_path / f"a{suffix}", pictures(10), 25, "mpeg4" if suffix == ".avi" else "libx264")
    every = np.stack(list(iter_frames(path, 16)))
    info = replace(survey(path), num_frames=10 + excess)
    video = Video(path, "a", info=info)
    padded = VideoClips([video], ClipSettings(4, 16, None, eval_clips="all", tail="pad"))
    last = padded[2]
    np.testing.assert_array_equal(last["clip"].numpy(), every[[8, 9, 9, 9]])
    assert last["padded"] == 2
    assert len(padded) == (3 if excess < 3 else 4)
    if excess == 3:  # a clip of which nothing is there
        ((name, reason, broken),) = padded[3]["skipped"]
        assert (name, broken) == ("a", False)
        assert reason.startswith("ends after 10 frames")
    dropped = VideoClips([video], ClipSettings(4, 16, None, eval_clips="all"))
    items = [dropped[index] for index in range(len(dropped))]
    assert ["clip" in item for item in items] == [True, True, False][: len(items)]
    assert len(items) == (10 + excess) // 4
    looped = VideoClips(
        [replace(video, info=replace(info, num_frames=12))],
        ClipSettings(12, 16, None, short_videos="loop", eval_clips="all"),
    )
    np.testing.assert_array_equal(looped[0]["clip"].numpy(), every[[*range(10), 0, 1]])


def test_a_video_that_merely_ends_early_is_logged_and_does_not_count_as_broken(root, capsys):
    data = folder(root, max_broken=0.0)
    clips = data.dataset("test")
    assert isinstance(clips, VideoClips)
    place = next(place for place, video in enumerate(clips.videos) if video.name == "a.avi")
    info = survey(root / "a.avi")
    clips.videos[place] = replace(clips.videos[place], info=replace(info, num_frames=12))  # one more than there are
    clips.leave_out([])
    assert len(clips) == 6
    names = [name for batch in data.test_dataloader() for name in batch["name"]]
    assert names.count("a.avi") == 2
    assert "a.avi: ends after 11 frames" in capsys.readouterr().err
    assert "a.avi" in data.skipped["test"]


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_damage_costs_the_clips_behind_it_and_counts_once(tmp_path, capsys, tail):
    for level in range(3):
        write_video(tmp_path / f"{level}.avi", pictures(40, level), 25, "mpeg4", g="1")
    damage(tmp_path / "1.avi", 0.5, 0.55)
    data = folder(tmp_path, tail=tail, eval_batch_size=1)
    seen = [(batch["name"][0], int(batch["start_frame"])) for batch in data.test_dataloader()]
    good = identities(data)
    assert [entry for entry in good if entry[0] != "1.avi"] == [entry for entry in seen if entry[0] != "1.avi"]
    kept = [start for name, start in seen if name == "1.avi"]
    assert kept == list(range(0, 4 * len(kept), 4))
    assert 0 < len(kept) < 10
    assert capsys.readouterr().err.count("vidtwin: skipped 1.avi") == 1
    with pytest.raises(UserError, match=r"max_broken=0 broken videos in split test, got 1 of 3"):
        list(folder(tmp_path, tail=tail, max_broken=0.0).test_dataloader())


def test_the_protocol_says_which_clips_and_what_becomes_of_the_tail(root):
    middle, dropped, padded = folder(root, eval_clips="middle"), folder(root), folder(root, tail="pad")
    keys = ("clip", "tail", "short_videos", "num_clips")
    told = [tuple(data.protocol()[key] for key in keys) for data in (middle, dropped, padded)]
    assert told == [
        ("one per video, from its middle", "none", "skip", 3),
        ("all clips of a video", "drop", "skip", 5),
        ("all clips of a video", "pad", "pad", 8),
    ]
    assert middle.protocol()["colour"] == COLOUR
    assert len({data.protocol()["clips_sha256"] for data in (middle, dropped, padded)}) == 3


@pytest.mark.parametrize(("rate", "fps", "step"), [(25, 30, 1), (60, 30, 2), (25, 14, 2), (30, 12, 2), (10, 25, 1)])
def test_whole_steps_take_every_nth_frame_and_refuse_no_video(tmp_path, rate, fps, step):
    """VidTok's `range(0, total, round(video's rate / fps))`, which is 2 for 30 / 12 = 2.5."""
    path = write_video(tmp_path / "a.mkv", pictures(23), rate)
    wanted = np.stack(list(iter_frames(path, 16)))[::step]
    settings = ClipSettings(4, 16, fps, eval_clips="all", tail="pad", frame_steps="whole")
    clips = VideoClips([Video(path, "a")], settings)
    items = [clips[index] for index in range(len(clips))]
    assert [clips.identity(index) for index in range(len(clips))] == [("a", start) for start in range(0, 23, 4 * step)]
    joined = np.concatenate([item["clip"].numpy() for item in items])
    np.testing.assert_array_equal(joined[: len(wanted)], wanted)
    assert [item["padded"] for item in items] == [0] * (len(items) - 1) + [-len(wanted) % 4]


def test_whole_steps_go_by_count_where_times_are_uneven(tmp_path):
    path = tmp_path / "a.mkv"
    with VideoWriter(path, 25, timed=True) as writer:
        for number, picture in enumerate(pictures(12)):
            writer.write(picture, Fraction(number if number < 6 else 2 * number - 5, 25))
    step = round(survey(path).fps / 8)
    clips = VideoClips([Video(path, "a")], ClipSettings(4, 16, 8, eval_clips="first", frame_steps="whole"))
    np.testing.assert_array_equal(clips[0]["clip"], np.stack(list(iter_frames(path, 16)))[::step][:4])


def test_the_first_clip_begins_with_the_first_frame_and_training_takes_others(root):
    data = folder(root, eval_clips="first", num_frames=4)
    assert sorted(identities(data)) == [("a.avi", 0), ("b.mp4", 0), ("c.avi", 0)]
    (every,) = [clips[0]["clip"] for clips in [data.dataset("test")] if clips.identity(0)[0] == "a.avi"]
    np.testing.assert_array_equal(every, read_clip(root / "a.avi", 0, 4, None, 16))
    assert data.protocol()["clip"] == "one per video, from its first frame"
    assert data.describe("test")["eval_clips"] == "first"
    assert "eval_clips" not in data.describe("train")
    middle = VideoClips(
        [Video(root / "a.avi", "a")], ClipSettings(4, 16, None, eval_clips="first", augment=False), "train"
    )
    assert middle.identity(0) == ("a", 3)


def test_the_protocol_and_a_cache_say_steps_and_filter_only_if_chosen(root):
    plain, other = folder(root, fps=25.0), folder(root, fps=25.0, frame_steps="whole", resize="bilinear")
    assert (plain.protocol()["fps"], plain.protocol()["resize"]) == (25.0, RESIZE_FILTER)
    assert other.protocol()["fps"] == "25 in whole steps of the source's frames"
    assert other.protocol()["resize"] == "bilinear, antialiased (torchvision)"
    assert plain.protocol().keys() == other.protocol().keys()
    assert "frame_steps" not in plain.describe("test")
    assert difference(plain.describe("test"), other.describe("test")) is not None
    assert folder(root, fps=None, frame_steps="whole").protocol()["fps"] is None


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"frame_steps": "some"}, r"data\.frame_steps to be timed or whole, got 'some'"),
        ({"resize": "bicubic"}, r"data\.resize to be area or bilinear, got 'bicubic'"),
        ({"eval_clips": "first", "tail": "pad"}, r"data\.eval_clips: all with data\.tail: pad, got first"),
        ({"eval_clips": "some"}, r"data\.eval_clips to be middle, first or all, got 'some'"),
        ({"tail": "repeat"}, r"data\.tail to be drop or pad, got 'repeat'"),
        ({"eval_clips": "middle", "tail": "pad"}, r"data\.eval_clips: all with data\.tail: pad, got middle"),
    ],
)
def test_wrong_arguments_are_named(root, arguments, message):
    with pytest.raises(UserError, match=message):
        folder(root, **arguments)


def test_a_video_of_a_lower_rate_than_asked_for_is_refused(root):
    with pytest.raises(UserError, match=r"at least data\.fps=30 frames per second, got 25"):
        folder(root, fps=30.0, tail="pad").dataset("test")


def assert_same_clips(one: Any, other: Any) -> None:
    assert identities(one) == identities(other)
    for index in range(len(one.dataset("test"))):
        a, b = dict(one.dataset("test")[index]), dict(other.dataset("test")[index])
        if "clip" in a:
            assert torch.equal(a.pop("clip"), b.pop("clip"))
        assert a == b
    assert one.protocol() == other.protocol()


@pytest.mark.parametrize("tail", ["drop", "pad"])
def test_cached_and_streamed_clips_of_whole_videos_are_the_online_ones(root, tmp_path, tail):
    online = folder(root, tail=tail)
    write_cache(online, tmp_path / "clips", ["test"], shard_bytes=2000)
    write_cache(online, tmp_path / "videos", ["test"], format="videos")
    cached = folder(root, tail=tail, cache=str(tmp_path / "clips"))
    assert_same_clips(cached, online)
    for what in ("clips", "videos"):
        streamed = Streamed(str(tmp_path / what), **SMALL, eval_clips="all", tail=tail)
        assert_same_clips(streamed, online)
    assert cached.unusable.totals == online.unusable.totals
    assert [batch["padded"].tolist() for batch in cached.test_dataloader()] == [
        batch["padded"].tolist() for batch in online.test_dataloader()
    ]


NATIVE: dict[str, Any] = {"num_frames": None, "resolution": None, "batch_size": 3}


@pytest.fixture(scope="module")
def sizes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos that differ in size and length."""
    folder = tmp_path_factory.mktemp("sizes")
    for name, frames, height, width in (("wide.mp4", 9, 20, 32), ("tall.avi", 5, 30, 18)):
        noise = np.random.default_rng(frames).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
        write_video(folder / name, noise, 25, "mpeg4" if name.endswith("avi") else "libx264")
    return folder


@pytest.mark.parametrize("others", [{}, {"tail": "pad"}, {"eval_clips": "middle", "short_videos": "loop"}])
def test_a_whole_video_at_its_own_size_is_one_clip(sizes, others):
    data = folder(sizes, **NATIVE, **others)
    clips = data.dataset("test")
    assert identities(data) == [("tall.avi", 0), ("wide.mp4", 0)]
    assert [clips.shape(index) for index in range(2)] == [(5, 30, 18), (9, 20, 32)]
    for index, name in enumerate(("tall.avi", "wide.mp4")):
        item = clips[index]
        np.testing.assert_array_equal(item["clip"].numpy(), np.stack(list(iter_frames(sizes / name))))
        assert (item["start_frame"], item["padded"]) == (0, 0)
    described = data.protocol()
    assert {key: described[key] for key in ("num_frames", "resolution", "crop", "resize", "tail", "short_videos")} == {
        "num_frames": "all of a video",
        "resolution": "native",
        **dict.fromkeys(("crop", "resize", "tail", "short_videos"), "none"),
    }
    assert described["clip"] == "all clips of a video"
    assert described == folder(sizes, **NATIVE).protocol()


def test_clips_that_differ_in_size_come_one_by_one(sizes):
    data = folder(sizes, **NATIVE)
    assert data.eval_batch_size == 1
    data.setup("test")
    assert [tuple(batch["clip"].shape) for batch in data.test_dataloader()] == [(1, 5, 30, 18, 3), (1, 9, 20, 32, 3)]
    with pytest.raises(UserError, match=r"^Expected data.eval_batch_size: 1 .*, got 2; leave it out.$"):
        folder(sizes, **NATIVE, eval_batch_size=2)


@pytest.mark.parametrize("key", ["num_frames", "resolution"])
def test_training_clips_have_one_size(sizes, key, tmp_path):
    data = folder(sizes, **{key: None})
    with pytest.raises(UserError, match=f"^Expected data.{key} of training clips, .*, got null; only evaluation"):
        data.dataset("train")
    with pytest.raises(UserError, match=f"^Expected data.{key} of training clips"):
        write_cache(data, tmp_path, ["train"])


@pytest.mark.parametrize("arguments", [NATIVE, {"num_frames": None}, {"resolution": None}, {"resolution": [10, 14]}])
def test_cached_and_streamed_clips_of_other_sizes_are_the_online_ones(sizes, tmp_path, arguments):
    online = folder(sizes, **arguments)
    write_cache(online, tmp_path / "clips", ["test"], shard_bytes=9000)
    write_cache(online, tmp_path / "videos", ["test"], format="videos")
    cached = folder(sizes, **arguments, cache=str(tmp_path / "clips"))
    streamed = [Streamed(str(tmp_path / what), **SMALL | arguments, eval_clips="all") for what in ("clips", "videos")]
    for other in (cached, *streamed):
        assert_same_clips(other, online)
        shapes = [[data.dataset("test").shape(index) for index in range(2)] for data in (other, online)]
        assert shapes[0] == shapes[1]
    with pytest.raises(UserError, match="expected the requested clips, got"):
        folder(sizes, cache=str(tmp_path / "clips")).dataset("test")


def test_a_rectangle_is_described_as_one_and_equal_sides_as_the_square_that_they_are(sizes):
    square = folder(sizes).protocol()
    assert (square["resolution"], square["crop"]) == (16, "largest centre square")
    assert folder(sizes, resolution=[16, 16]).protocol() == square
    assert folder(sizes, resolution=[16, 16]).describe("train") == folder(sizes).describe("train")
    rectangle = folder(sizes, resolution=[16, 12]).protocol()
    assert (rectangle["resolution"], rectangle["crop"]) == ([16, 12], "largest centre rectangle of that shape")
    clips = folder(sizes, resolution=[16, 12]).dataset("test")
    assert clips[0]["clip"].shape == (4, 16, 12, 3)
    assert clips.shape(0) == (4, 16, 12)


def test_training_clips_may_be_rectangles(sizes):
    data = folder(sizes, resolution=[16, 12], test_fraction=0.0)
    batch = next(iter(data.train_dataloader()))
    assert batch["clip"].shape == (2, 4, 16, 12, 3)


@pytest.mark.parametrize("resolution", [0, [16], [16, 0], [16, 16, 16], []])
def test_a_size_that_is_none_is_refused(resolution):
    with pytest.raises(UserError, match=r"^Expected data\.resolution to be a side of at least 1"):
        ClipSettings(resolution=resolution)


def test_the_frames_that_a_container_promised_too_many_are_no_part_of_a_whole_video(tmp_path):
    path = write_video(tmp_path / "a.avi", pictures(9), 25, "mpeg4")
    info = survey(path)
    clips = VideoClips([Video(path, "a", info=replace(info, num_frames=10))], ClipSettings(None, 16, None))
    assert clips.shape(0) == (10, 16, 16)
    assert clips[0]["clip"].shape == (9, 16, 16, 3)


def test_a_cached_clip_after_the_end_of_its_video_does_not_count_as_broken(root, tmp_path):
    data = folder(root)
    clips = data.make_dataset("test")
    assert isinstance(clips, VideoClips)
    clips.videos = [replace(v, info=replace(v.info, num_frames=12)) if v.name == "a.avi" else v for v in clips.videos]
    clips.leave_out([])
    data.make_dataset = lambda split: clips  # type: ignore[method-assign]
    write_cache(data, tmp_path / "cache", ["test"])
    cached = folder(root, cache=str(tmp_path / "cache"), max_broken=0.0)
    assert cached.dataset("test")[2] == clips[2]
    assert cached.dataset("test")[2]["skipped"][0][2] is False
    assert sum(len(batch["name"]) for batch in cached.test_dataloader()) == 5


def test_a_cache_of_other_clips_is_refused_and_an_old_one_still_loads(root, tmp_path):
    middle = folder(root, eval_clips="middle")
    write_cache(middle, tmp_path / "middle", ["test"])
    write_cache(folder(root), tmp_path / "all", ["test"])
    assert "eval_clips" not in middle.describe("test")
    path = tmp_path / "middle" / "test" / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["padded"]  # as written before there was such a thing
    path.write_text(json.dumps(manifest))
    assert_same_clips(folder(root, eval_clips="middle", cache=str(tmp_path / "middle")), middle)
    with pytest.raises(UserError, match='got eval_clips="middle", not eval_clips="all"'):
        folder(root, cache=str(tmp_path / "middle")).dataset("test")
    for tail, message in (("pad", 'short_videos="pad"'), (None, 'eval_clips="all", not eval_clips="middle"')):
        arguments = {"tail": tail} if tail else {"eval_clips": "middle"}
        with pytest.raises(UserError, match=message):
            folder(root, cache=str(tmp_path / "all"), **arguments).dataset("test")
        with pytest.raises(UserError, match=message):
            Streamed(str(tmp_path / "all"), **(SMALL | {"eval_clips": "all"} | arguments)).dataset("test")
