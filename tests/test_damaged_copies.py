"""Damaged copies of real clips are told or read, and leave nothing behind; reading clips needs no more memory."""

import gc
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from damaged_copies import KINDS, growth, run

from vidtwin.data import ClipSettings
from vidtwin.datamodules.clips import Video, VideoClips
from vidtwin.video import read_clip, write_video

STATM = Path("/proc/self/statm")


@pytest.mark.parametrize("copies", [90, pytest.param(500, marks=pytest.mark.slow)])
def test_damaged_copies_of_real_clips(shared: Path, copies: int) -> None:
    outcomes = run(shared / "data" / "clips", range(copies))  # no crash, no hang
    assert [(o.seed, o.clip, o.silent) for o in outcomes if o.silent] == []
    assert set(Counter(o.kind for o in outcomes)) == set(KINDS)
    assert growth(outcomes) < 40
    told = Counter(o.told for o in outcomes)
    assert told[None] < copies / 3
    assert {"unreadable", "truncated", "corrupt"} <= set(told)


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc/self/statm, where Linux tells a process's memory")
def test_the_decoders_pictures_are_freed_with_each_clip(shared: Path) -> None:
    path = shared / "data" / "clips" / "hard" / "av1.mkv"  # 640x360
    gc.collect()
    gc.disable()  # what only a collection frees would pile up
    try:
        megabytes = []
        for _ in range(60):
            read_clip(path, 1.2, 4, 8, 64)
            megabytes.append(int(STATM.read_text().split()[1]) * 4096 / 1e6)
    finally:
        gc.enable()
    assert max(megabytes[20:]) - megabytes[10] < 15


@pytest.mark.skipif(not STATM.exists(), reason="needs /proc/self/statm, where Linux tells a process's memory")
def test_four_hundred_clips_need_no_more_memory_than_a_hundred(tmp_path: Path) -> None:
    frames = list(np.random.default_rng(0).integers(0, 256, (24, 48, 64, 3), dtype=np.uint8))
    videos = [
        Video(write_video(tmp_path / name, frames, 25, codec), name)
        for name, codec in (("a.avi", "mpeg4"), ("b.mp4", "libx264"), ("c.mkv", "libx264"))
    ]
    clips = VideoClips(videos, ClipSettings(8, 64, 12.5), "train")
    megabytes = []
    for number in range(400):
        clips[number, number % 3]
        megabytes.append(int(STATM.read_text().split()[1]) * 4096 / 1e6)
    assert np.median(megabytes[350:]) - np.median(megabytes[50:100]) < 2  # 7 kB a clip
