"""Chunks of evaluation clips by number, for a sweep that has no trainer."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from broken_tree import damage, pictures
from PIL import Image

from vidtwin.datamodules.folder import VideoFolder
from vidtwin.datamodules.shards.writer import write_cache
from vidtwin.datamodules.streaming import Streamed
from vidtwin.datamodules.synthetic import Synthetic
from vidtwin.errors import UserError
from vidtwin.video import VideoError, write_video

SMALL: dict[str, Any] = {"num_frames": 4, "resolution": 16, "fps": None, "batch_size": 3, "num_workers": 0}
WHOLE: dict[str, Any] = {**SMALL, "eval_clips": "all", "tail": "pad"}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight clips of four videos, three of them padded."""
    folder = tmp_path_factory.mktemp("videos")
    for level, (name, frames) in enumerate({"a.avi": 11, "b.avi": 8, "c.avi": 3, "d.avi": 5}.items()):
        write_video(folder / name, pictures(frames, level), 25, "mpeg4")
    return folder


def folder(root: Path, **kwargs: Any) -> VideoFolder:
    return VideoFolder(str(root), **(WHOLE | {"val_fraction": 0.0, "test_fraction": 1.0} | kwargs))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("image", ["2.png", "6.png"])  # in the middle of a clip, and near the end of the video
def test_a_disk_that_fails_leaves_no_gap_in_the_results(tmp_path, monkeypatch, workers, image):
    for number, picture in enumerate(pictures(7, 0)):
        (tmp_path / "a").mkdir(exist_ok=True)
        Image.fromarray(picture).save(tmp_path / "a" / f"{number}.png")
    data = folder(tmp_path, image_folders=True, fps=None, num_workers=workers)
    assert len(data.dataset("test")) == 2
    real = Path.read_bytes

    def read(path):
        if path.name == image:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(path))
        return real(path)

    monkeypatch.setattr(Path, "read_bytes", read)
    with pytest.raises(VideoError, match=rf"the image {image} can't be read: {os.strerror(errno.EIO)}"):
        list(data.chunk_loader("test", [[0, 1]]))


@pytest.mark.parametrize("workers", [0, 2])
def test_chunks_come_in_order_with_their_clips_and_with_what_could_not_be_read(tmp_path, capsys, workers):
    for level in range(4):
        write_video(tmp_path / f"{level}.avi", pictures(12, level), 25, "mpeg4", g="1")
    damage(tmp_path / "1.avi", 0.4, 0.5)
    data = folder(tmp_path, tail="drop", num_workers=workers)
    clips = data.dataset("test")
    bad = [index for index in range(len(clips)) if "clip" not in clips[index]]
    assert bad == [3, 4]
    chunks = [[10, 0], [3], [2, 4, 6, 5], [], [4, 3]]
    loader = data.chunk_loader("test", chunks)
    batches = list(loader)
    assert len(loader) == len(batches) == len(chunks)
    assert [batch["indices"] for batch in batches] == [[10, 0], [], [2, 6, 5], [], []]
    for chunk, batch in zip(chunks, batches, strict=True):
        assert [index for index, _, _ in batch["skipped"]] == [index for index in chunk if index in bad]
        assert all(name == "1.avi" and "decoding stops" in reason for _, name, reason in batch["skipped"])
        assert ("clip" in batch) == bool(batch["indices"])
        for place, index in enumerate(batch["indices"]):
            assert torch.equal(batch["clip"][place], clips[index]["clip"])
            assert (batch["name"][place], int(batch["start_frame"][place])) == clips.identity(index)
    floats = data.on_after_batch_transfer(batches[0], 0)
    assert floats["clip"].shape == (2, 3, 4, 16, 16)
    assert floats["indices"] == [10, 0]
    assert capsys.readouterr().err.count("vidtwin: skipped 1.avi") == 1
    assert set(data.skipped["test"]) == {"1.avi"}


def test_too_many_unreadable_clips_stop_the_chunks(tmp_path):
    for level in range(3):
        write_video(tmp_path / f"{level}.avi", pictures(12, level), 25, "mpeg4", g="1")
        damage(tmp_path / f"{level}.avi", 0.4, 0.5)
    data = folder(tmp_path)
    with pytest.raises(UserError, match=r"broken videos in split test, got 2 of 3"):
        list(data.chunk_loader("test", [[index] for index in range(len(data.dataset("test")))]))


def test_chunks_of_cached_streamed_and_rendered_clips_are_the_same_batches(root, tmp_path):
    online = folder(root)
    write_cache(online, tmp_path / "clips", ["test"])
    write_cache(online, tmp_path / "videos", ["test"], format="videos")
    chunks = [[6, 1], [0, 7]]
    for data in (
        folder(root, cache=str(tmp_path / "clips")),
        Streamed(str(tmp_path / "clips"), **WHOLE),
        Streamed(str(tmp_path / "videos"), **WHOLE),
    ):
        for a, b in zip(online.chunk_loader("test", chunks), data.chunk_loader("test", chunks), strict=True):
            assert torch.equal(a.pop("clip"), b.pop("clip"))
            assert {k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in a.items()} == {
                k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in b.items()
            }
    rendered = Synthetic(num_frames=2, resolution=16, num_test=3, num_workers=0)
    assert [batch["indices"] for batch in rendered.chunk_loader("test", [[2], [0, 1]])] == [[2], [0, 1]]


def test_a_chunk_loader_wants_fixed_clips_that_there_are(root):
    data = folder(root)
    assert data.chunk_loader("test", [[0]], "cuda").pin_memory
    assert not data.chunk_loader("test", [[0]]).pin_memory
    with pytest.raises(UserError, match="split val or test, whose clips are fixed, got 'train'"):
        data.chunk_loader("train", [[0]])
    with pytest.raises(UserError, match="indices below 8 of clips of the split test, got 8"):
        data.chunk_loader("test", [[0], [8]])
    with pytest.raises(UserError, match="at least one process, got 0"):
        data.chunk_loader("test", [[0]], processes=0)


def test_processes_share_the_cores(root):
    data = folder(root, num_workers=None)
    chunks = [[0]] * 64
    alone = data.chunk_loader("test", chunks).num_workers
    assert data.chunk_loader("test", chunks, processes=64).num_workers == 1 <= alone
    assert folder(root, num_workers=3).chunk_loader("test", chunks, processes=64).num_workers == 3
