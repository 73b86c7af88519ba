"""Cached clips are the online ones bit for bit; no kill, no full disk and no damage loses or changes one unnoticed."""

import errno
import hashlib
import json
import multiprocessing
import os
import pickle
import shutil
import signal
import time
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from broken_tree import BAD, write_tree
from torch.utils.data import DataLoader

from vidtwin.datamodules.clips import ClipDataset
from vidtwin.datamodules.data_module import ClipDataModule
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.datamodules.shards import sources
from vidtwin.datamodules.shards import writer as cache_writer
from vidtwin.datamodules.shards.cached import CachedClips
from vidtwin.datamodules.shards.format import Manifest
from vidtwin.datamodules.shards.writer import write_cache
from vidtwin.datamodules.streaming import Streamed
from vidtwin.datamodules.synthetic import Synthetic
from vidtwin.datamodules.ucf101 import UCF101
from vidtwin.errors import UserError
from vidtwin.video import VideoError

SMALL: dict[str, Any] = {"num_frames": 4, "resolution": 16, "batch_size": 2, "num_workers": 0}
SHARD = 10_000  # bytes: three clips

Make = Callable[..., ClipDataModule]


@pytest.fixture(scope="module")
def make(small_ucf: Path) -> Make:
    """8 training clips, 4 of validation, 4 of test."""
    return lambda **kwargs: UCF101(str(small_ucf), **(SMALL | kwargs))


@pytest.fixture(scope="module")
def written(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two epochs; nobody writes into it."""
    out = tmp_path_factory.mktemp("written") / "cache"
    write_cache(make(), out, epochs=2, shard_bytes=SHARD)
    return out


@pytest.fixture
def copied(written: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(written, tmp_path / "cache"))


def contents(folder: Path) -> dict[str, str]:
    """Checksum of each file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def assert_equal(a: dict[str, Any], b: dict[str, Any]) -> None:
    a, b = dict(a), dict(b)
    assert np.array_equal(np.asarray(a.pop("clip")), np.asarray(b.pop("clip")))
    assert a == b


def test_cached_clips_are_the_online_ones_bit_for_bit(make, written):
    data = make()
    for split, epochs in (("train", 2), ("val", 1), ("test", 1)):
        online, cached = data.dataset(split), CachedClips(written / split, data.describe(split))
        assert len(cached) == len(online)
        for index in range(len(online)):
            assert cached.identity(index) == online.identity(index) or split == "train"
            for epoch in range(2 * epochs):
                assert_equal(cached[epoch, index], online[epoch % epochs, index])
            assert_equal(cached[index], online[index])


def test_a_data_module_takes_its_clips_from_a_cache(make, written, small_ucf, tmp_path):
    def batches(data: ClipDataModule) -> list[Any]:
        seen: list[Any] = []
        loader: Any = data.train_dataloader()
        for epoch in (0, 1):
            loader.sampler.set_epoch(epoch)
            seen += [(b["name"], b["start_frame"].tolist(), b["label"].tolist(), int(b["clip"].sum())) for b in loader]
        for loader in (data.val_dataloader(), data.test_dataloader()):
            seen += [(b["name"], b["start_frame"].tolist(), b["label"].tolist(), int(b["clip"].sum())) for b in loader]
        return seen

    online, cached = make(), make(cache=str(written))
    assert isinstance(cached.dataset("train"), CachedClips)
    assert batches(cached) == batches(online)
    assert cached.protocol() == online.protocol()
    # Without the videos and their lists the cache knows what it is.
    away = UCF101(str(tmp_path), cache=str(written), **SMALL)
    assert batches(away) == batches(online)
    assert away.protocol() == online.protocol()
    with pytest.raises(UserError, match="expected the requested clips, got num_frames=4, not num_frames=3"):
        make(cache=str(written), num_frames=3).dataset("val")
    with pytest.raises(UserError, match=r"manifest\.json, got no such file; write it by `vidtwin cache`"):
        make(cache=str(tmp_path)).dataset("val")


def test_a_cache_without_digests_of_its_videos_is_known_by_its_shards(make, written, tmp_path):
    shutil.copytree(written, tmp_path / "cache")
    path = tmp_path / "cache" / "test" / "manifest.json"
    manifest = json.loads(path.read_text())
    assert sorted(manifest.pop("digests")) == sorted(video.name for video in make().videos("test"))
    path.write_text(json.dumps(manifest))
    found = make(cache=str(tmp_path / "cache")).protocol()
    assert found["videos_sha256"] not in (None, make().protocol()["videos_sha256"])
    manifest["shards"][0]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest))
    assert make(cache=str(tmp_path / "cache")).protocol()["videos_sha256"] != found["videos_sha256"]


def test_a_cached_evaluation_skips_what_could_not_be_read(tmp_path, capfd):
    root = write_tree(tmp_path / "videos")
    arguments: dict[str, Any] = {"val_fraction": 0.0, "test_fraction": 1.0, "max_broken": 0.5, **SMALL}
    online = VideoFolder(str(root), **arguments)
    write_cache(online, tmp_path / "cache", ["test"])
    names = [name for batch in online.test_dataloader() for name in batch["name"]]
    told = sorted(line for line in capfd.readouterr().err.splitlines() if "skipped" in line)
    cached = VideoFolder(str(root), cache=str(tmp_path / "cache"), **arguments)
    assert [name for batch in cached.test_dataloader() for name in batch["name"]] == names
    assert cached.skipped == online.skipped
    assert cached.protocol() == online.protocol()
    assert len(told) >= len(BAD)


def test_real_clips_are_equal_too(shared, tmp_path):
    data = UCF101(str(shared / "data/ucf_like/UCF-101"), num_frames=8, resolution=32, val_groups=(10,), num_workers=0)
    write_cache(data, tmp_path, ["val"])
    cached, online = CachedClips(tmp_path / "val", data.describe("val")), data.dataset("val")
    for index in range(len(online)):
        assert_equal(cached[0, index], online[0, index])
        assert cached.identity(index) == online.identity(index)


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_read_what_one_process_reads(written, workers):
    cached = CachedClips(written / "train")
    keys = [(1, 5), (0, 2), (1, 0), (3, 7)]
    loader = DataLoader(cached, batch_size=2, sampler=keys, num_workers=workers)  # type: ignore[arg-type]
    clips = torch.cat([batch["clip"] for batch in loader])
    assert torch.equal(clips, torch.stack([cached[key]["clip"] for key in keys]))


def test_the_bytes_do_not_depend_on_the_number_of_workers(make, written, tmp_path):
    write_cache(make(num_workers=2), tmp_path / "cache", epochs=2, shard_bytes=SHARD)
    assert contents(tmp_path / "cache") == contents(written)


def test_a_clip_is_mapped_not_copied_and_writing_into_it_changes_no_file(written):
    before = contents(written)
    array = CachedClips(written / "train").clip(0, 1)["clip"]
    assert not array.flags.owndata
    assert array.flags.writeable
    clip = CachedClips(written / "train")[0, 1]["clip"]
    clip.zero_()
    array[:] = 1
    assert contents(written) == before


def test_it_goes_into_workers_without_an_open_file(written):
    cached = CachedClips(written / "train")
    cached[0, 0], cached[1, 7]
    handles = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    again = pickle.loads(pickle.dumps(cached))
    for index in range(8):
        assert_equal(again[1, index], cached[1, index])
    if handles:
        assert len(os.listdir("/proc/self/fd")) == handles


def test_litdata_reads_the_shards_itself(written, make, monkeypatch):
    monkeypatch.setenv("LITDATA_DISABLE_VERSION_CHECK", "1")  # it would ask PyPI
    litdata = pytest.importorskip("litdata")
    monkeypatch.setattr("litdata.streaming.dataset._check_version_and_prompt_upgrade", lambda version: None)
    items = litdata.StreamingDataset(str(written / "val"))
    online = make().dataset("val")
    assert len(items) == len(online)
    for index, item in enumerate(items):
        assert_equal(item, online.clip(0, index))


def write_thirty(out: Path, workers: int = 1) -> None:
    os.setsid()  # a process group, that a kill reaches the workers too
    data = Synthetic(num_train=30, num_val=1, num_test=1, num_frames=4, resolution=32, num_workers=workers)
    write_cache(data, out, ["train"], epochs=2, shard_bytes=30_000)


def test_a_cache_killed_at_any_moment_resumes_to_the_same_bytes(tmp_path):
    """Once as nobody disturbs it, then killed after each few shards until it comes through."""
    start = multiprocessing.get_context("fork").Process
    undisturbed = start(target=write_thirty, args=(tmp_path / "whole",))
    undisturbed.start()
    undisturbed.join()
    whole = contents(tmp_path / "whole")
    shards = [name for name in whole if name.endswith(".bin")]
    assert len(shards) == 30
    out = tmp_path / "killed/train"
    kept: dict[str, int] = {}
    for goal in (1, 2, 10, 30):
        process = start(target=write_thirty, args=(out.parent,))
        process.start()
        while process.is_alive() and (goal == 30 or len(list(out.glob("chunk-*.json"))) < goal):
            time.sleep(0.001)
        if goal < 30:
            os.killpg(process.pid, signal.SIGKILL)
            process.join()
            assert process.exitcode == -signal.SIGKILL
            assert goal <= len(list(out.glob("chunk-*.json"))) < 30
            with pytest.raises(UserError, match="expected a finished cache; run `vidtwin cache` again"):
                CachedClips(out)
        assert all((out / name).stat().st_mtime_ns == changed for name, changed in kept.items())
        kept = {p.with_suffix(".bin").name: p.with_suffix(".bin").stat().st_mtime_ns for p in out.glob("chunk-*.json")}
    assert contents(tmp_path / "killed") == whole  # nothing else is left behind either


def write_slowly(out: Path, half: Any) -> None:
    """Stay in the middle of shard 5 for a while."""
    whole = sources.replacing

    @contextmanager
    def slow(path: Path):
        with whole(path) as temporary:
            yield temporary
            if Path(path).name == "chunk-0-5.bin":
                half.set()
                time.sleep(1.5)

    sources.replacing = slow  # in this process alone
    write_thirty(out, workers=0)


def test_of_two_processes_that_write_one_cache_the_second_waits_and_the_bytes_are_the_same(tmp_path, capfd):
    context = multiprocessing.get_context("fork")
    alone = context.Process(target=write_thirty, args=(tmp_path / "alone", 0))
    alone.start()
    alone.join()
    half = context.Event()
    first = context.Process(target=write_slowly, args=(tmp_path / "both", half))
    first.start()
    assert half.wait(60)
    second = context.Process(target=write_thirty, args=(tmp_path / "both", 0))
    second.start()
    second.join()
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert contents(tmp_path / "both") == contents(tmp_path / "alone")
    assert capfd.readouterr().err.count("waiting for the end of another `vidtwin cache`") == 1


@pytest.mark.parametrize("workers", [0, 1])
def test_a_full_disk_leaves_the_shards_before_it(make, written, tmp_path, monkeypatch, workers):
    whole = sources.replacing

    @contextmanager
    def full(path: Path):
        if Path(path).name == "chunk-0-3.bin":
            raise OSError(errno.ENOSPC, "No space left on device")
        with whole(path) as temporary:
            yield temporary

    monkeypatch.setattr(sources, "replacing", full)
    with pytest.raises(UserError, match="the disk is full; free some of it and run the same command again"):
        write_cache(make(num_workers=workers), tmp_path / "cache", epochs=2, shard_bytes=SHARD)
    assert (tmp_path / "cache/train/chunk-0-2.bin").exists()
    monkeypatch.undo()
    done = write_cache(make(), tmp_path / "cache", epochs=2, shard_bytes=SHARD)
    assert done[0].made <= 3
    assert contents(tmp_path / "cache") == contents(written)


def test_too_little_room_is_an_error_before_the_first_shard(make, tmp_path, monkeypatch):
    monkeypatch.setattr(cache_writer.shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(UserError, match=r"expected 0\.0 GB of free disk for the clips still to be written"):
        write_cache(make(), tmp_path, ["train"])


@pytest.mark.parametrize(
    ("arguments", "difference"),
    [
        ({"num_frames": 5}, "num_frames=4, not num_frames=5"),
        ({"resolution": 24}, "resolution=16, not resolution=24"),
        ({"fps": 4.0}, "fps=8.0, not fps=4.0"),
        ({"seed": 1}, "seed=0, not seed=1"),
        ({"horizontal_flip": False}, "horizontal_flip=true, not horizontal_flip=false"),
        ({"augment": False}, "augment=true, not augment=false"),
        ({"short_videos": "loop"}, 'short_videos="skip", not short_videos="loop"'),
        ({"val_groups": (9,)}, "val_groups="),
    ],
)
def test_a_cache_of_something_else_is_refused(make, copied, arguments, difference):
    other = make(**arguments)
    with pytest.raises(UserError, match="expected the requested clips, got ") as error:
        CachedClips(copied / "train", other.describe("train"))
    assert difference in str(error.value)
    before = contents(copied)
    with pytest.raises(UserError, match="to hold the cached clips of this command, got "):
        write_cache(other, copied, ["train"], epochs=2, shard_bytes=SHARD)
    assert contents(copied) == before


def test_excluded_videos_are_not_stored_and_belong_to_the_caches_identity(make, tmp_path):
    (tmp_path / "exclude.txt").write_text("Bounce/v_Bounce_g25_c01.avi\n")
    data = make(exclude=str(tmp_path / "exclude.txt"))
    write_cache(data, tmp_path / "cache", ["val"])
    cached = CachedClips(tmp_path / "cache/val", data.describe("val"))
    assert cached.clip(0, 0)["name"] == "Bounce/v_Bounce_g25_c02.avi"
    with pytest.raises(UserError, match=r"expected the requested clips, got exclude=.*, not exclude=null"):
        CachedClips(tmp_path / "cache/val", make().describe("val"))
    with pytest.raises(UserError, match=r"got no file; set data\.exclude"):
        make(exclude="absent.txt").describe("val")


def test_other_epochs_formats_and_folders_are_refused(make, copied, tmp_path):
    with pytest.raises(UserError, match="got epochs=2, not epochs=3; give another folder"):
        write_cache(make(), copied, ["train"], epochs=3)
    with pytest.raises(UserError, match="shards of another size"):
        write_cache(make(), copied, ["train"], epochs=2, shard_bytes=2 * SHARD)
    with pytest.raises(UserError, match='got format="clips", not format="videos"'):
        write_cache(make(), copied, ["val"], format="videos")
    (tmp_path / "other/val").mkdir(parents=True)
    (tmp_path / "other/val/thesis.tex").touch()
    with pytest.raises(UserError, match=r"Expected an empty folder or one of cached clips, got .* with other files"):
        write_cache(make(), tmp_path / "other", ["val"])
    (tmp_path / "file").touch()
    for out in (tmp_path / "file", tmp_path / "other/val/thesis.tex/cache"):
        with pytest.raises(UserError, match="which is a file or inside one; give another"):
            write_cache(make(), out, ["val"])
    with pytest.raises(UserError, match=r"got no such file; write it by `vidtwin cache`"):
        CachedClips(tmp_path / "nowhere")
    (tmp_path / "manifest.json").write_text("{}")
    with pytest.raises(UserError, match="expected a manifest written by"):
        CachedClips(tmp_path)
    (tmp_path / "manifest.json").write_text('{"schema_version": 99}')
    with pytest.raises(UserError, match="expected schema version 1, got 99"):
        CachedClips(tmp_path)


def test_a_cache_serves_without_its_videos(written, small_ucf, tmp_path):
    """What the data module says of itself is still compared."""

    class Own(UCF101):
        def cache_key(self, split):
            return {"val_groups": self.val_groups}

    moved = Path(shutil.copytree(small_ucf, tmp_path / "moved"))
    write_cache(Own(str(moved), **SMALL), tmp_path / "cache", ["val"])
    shutil.rmtree(moved)
    assert len(CachedClips(tmp_path / "cache/val", Own(str(moved), **SMALL).describe("val"))) == 4
    with pytest.raises(UserError, match=r"val_groups=\[24, 25\], not val_groups=\[9\]"):
        CachedClips(tmp_path / "cache/val", Own(str(moved), val_groups=(9,), **SMALL).describe("val"))


def test_a_cache_of_videos_that_have_changed_is_refused(make, copied, small_ucf, tmp_path):
    moved = Path(shutil.copytree(small_ucf, tmp_path / "moved"))
    data = UCF101(str(moved), **SMALL)
    assert len(CachedClips(copied / "train", data.describe("train"))) == 8
    first, second = (Path(video.path) for video in data.videos("train")[:2])
    os.utime(first)  # as a copy is: younger, but the same
    assert len(CachedClips(copied / "train", data.describe("train"))) == 8
    (copied / "train/chunk-0-1.bin").unlink()
    first.write_bytes(second.read_bytes() + b"longer")
    with pytest.raises(UserError, match=r"expected the requested clips, got videos=.* not videos="):
        CachedClips(copied / "train", data.describe("train"))
    for out, format in ((copied, "clips"), (tmp_path / "videos", "videos")):
        if format == "videos":
            write_cache(make(), out, ["train"], format="videos")
        before = contents(out)
        with pytest.raises(UserError, match=r"got videos=.*; give another folder, or delete this one"):
            write_cache(data, out, ["train"], 2 if format == "clips" else 1, format, shard_bytes=SHARD)  # type: ignore[arg-type]
        assert contents(out) == before
    assert len(CachedClips(copied / "test", data.describe("test"))) == 4  # of which nothing has changed


def test_an_interrupted_cache_does_not_mix_old_and_new_videos(make, small_ucf, tmp_path, monkeypatch):
    moved = Path(shutil.copytree(small_ucf, tmp_path / "moved"))
    data = UCF101(str(moved), **SMALL)
    with monkeypatch.context() as patch:
        patch.setattr(cache_writer._SplitWriter, "_finish", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            write_cache(data, tmp_path / "cache", ["train"], shard_bytes=SHARD)
    (tmp_path / "cache/train/chunk-0-0.bin").unlink()
    first, second = (Path(video.path) for video in data.videos("train")[:2])
    first.write_bytes(second.read_bytes() + b"longer")
    with pytest.raises(UserError, match=r"got videos=.*; give another folder, or delete this one"):
        write_cache(data, tmp_path / "cache", ["train"], shard_bytes=SHARD)


def test_damage_is_found_and_mended(make, copied, written, capfd):
    shard = copied / "train/chunk-0-1.bin"
    content = shard.read_bytes()
    shard.write_bytes(content[:-1])
    with pytest.raises(UserError, match=r"chunk-0-1\.bin: expected 9,481 bytes, got 9,480; run `vidtwin cache` again"):
        CachedClips(copied / "train")
    done = write_cache(make(), copied, epochs=2, shard_bytes=SHARD)
    assert [split.made for split in done] == [1, 0, 0]
    assert "chunk-0-1.bin: expected 9,481 bytes, got 9,480" in capfd.readouterr().err
    assert contents(copied) == contents(written)
    shard.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # of the right size
    CachedClips(copied / "train")
    assert write_cache(make(), copied, epochs=2, shard_bytes=SHARD)[0].made == 0
    assert write_cache(make(), copied, epochs=2, shard_bytes=SHARD, verify=True)[0].made == 1
    assert "chunk-0-1.bin: expected sha256" in capfd.readouterr().err
    shard.unlink()
    with pytest.raises(UserError, match="got no such file; run `vidtwin cache` again"):
        CachedClips(copied / "train")
    assert write_cache(make(), copied, epochs=2, shard_bytes=SHARD)[0].made == 1
    assert contents(copied) == contents(written)


def test_damage_in_the_header_of_a_shard_or_an_item_is_one_line(copied):
    path = copied / "val/chunk-0-0.bin"
    content = path.read_bytes()
    items = int.from_bytes(content[:4], "little")
    for place in range(4 * (items + 2) + 4 * 4 + 4 * 6):  # offsets of the items, then sizes and shape of the first one
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x41]) + content[place + 1 :])
        with pytest.raises(UserError, match=r"chunk-0-0\.bin: expected .*; run `vidtwin cache` again"):
            list(map(CachedClips(copied / "val").__getitem__, range(items)))


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("manifest.json", lambda text: "[" * 100_000),
        ("manifest.json", lambda text: text.replace('"first": 0', '"first": 1')),
        ("manifest.json", lambda text: text.replace('"clips": 4', '"clips": 40')),
        ("manifest.json", lambda text: text.replace('"description": {', '"description": [], "left_out": {', 1)),
        ("manifest.json", lambda text: text.replace('"skipped": {}', '"skipped": {"99": ["a", "b"]}')),
        ("clips.csv", lambda text: text.replace("start_frame", "start")),
        ("clips.csv", lambda text: text[: len(text) // 2]),
        ("clips.csv", lambda text: text.replace("\n0,1,", "\n0,x,")),
        ("clips.csv", lambda text: text.replace("\n0,1,", "\n0,0,")),
        ("clips.csv", lambda text: "\udcff" + text),
        ("clips.csv", None),
    ],
)
def test_damage_in_a_manifest_or_a_table_is_one_line(copied, file, change):
    path = copied / "val" / file
    text = path.read_text()
    if change is None:
        path.unlink()
    else:
        path.write_text(change(text), errors="surrogateescape")
        assert change(text) != text
    with pytest.raises(UserError, match=rf"{file}: expected") as caught:
        CachedClips(copied / "val").identity(1)
    assert "\n" not in str(caught.value)


def snapshot(folder: Path, out: Path) -> Path:
    """Arrange files as the Hub's cache does: links to blobs outside of the snapshot's folder."""
    for path in sorted(p for p in folder.rglob("[!.]*") if p.is_file()):
        blob = out / "blobs" / hashlib.sha256(path.read_bytes()).hexdigest()
        link = out / "snapshots" / "main" / path.relative_to(folder)
        for each in (blob, link):
            each.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, blob)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return out / "snapshots" / "main"


def test_a_snapshot_of_links_is_read_and_writing_changes_no_blob(make, written, tmp_path):
    linked = snapshot(written, tmp_path)
    data, expected = Streamed(str(linked), **SMALL), CachedClips(written / "val")
    assert all(np.array_equal(data.dataset("val")[0, i]["clip"], expected[0, i]["clip"]) for i in range(len(expected)))
    assert len(make(cache=str(linked)).dataset("val")) == len(expected)
    shard = linked / "val/chunk-0-0.bin"
    blob = shard.resolve()
    blob.write_bytes(blob.read_bytes()[:-1] + b"?")
    before = contents(tmp_path / "blobs")
    assert write_cache(make(), linked, ["val"], shard_bytes=SHARD, verify=True)[0].made == 1
    assert not shard.is_symlink()
    assert contents(tmp_path / "blobs") == before


@pytest.mark.parametrize("format", ["clips", "videos"])
def test_names_like_formulas_come_back(small_ucf, tmp_path, format):
    (tmp_path / "in").mkdir()
    shutil.copy(next(small_ucf.rglob("*.avi")), tmp_path / "in" / "=1+1.avi")
    data = VideoFolder(str(tmp_path / "in"), val_fraction=0, test_fraction=1, **SMALL)
    write_cache(data, tmp_path / "out", ["test"], format=format)
    assert ",'=1+1.avi," in (tmp_path / "out/test/clips.csv").read_text()
    streamed = Streamed(str(tmp_path / "out"), **SMALL)
    assert streamed.dataset("test").identity(0)[0] == "=1+1.avi"


class Faulty(Synthetic):
    """Of validation clip 1 nothing can be read; in training another one stands in for clip 2."""

    def make_dataset(self, split: str) -> Any:
        dataset = super().make_dataset(split)
        clip = dataset.clip

        def faulty(epoch: int, index: int) -> dict[str, Any]:
            if split != "train" and index == 1:
                raise VideoError("broken.avi: decoding stops")
            if split == "train" and index == 2:
                return {**clip(epoch, 3), "skipped": [("broken.avi", "decoding stops")]}
            return clip(epoch, index)

        dataset.clip = faulty
        return dataset


def test_unreadable_clips_are_listed_with_the_reason_and_never_replaced(tmp_path):
    data = Faulty(num_train=5, num_val=5, num_test=1, **SMALL)
    train, val = write_cache(data, tmp_path, ["train", "val"], epochs=2, shard_bytes=SHARD)
    assert val.manifest.skipped == {1: ("Drift/val_00001", "broken.avi: decoding stops")}
    assert "val: 4 clips" in str(val)
    assert "skipped Drift/val_00001: broken.avi: decoding stops" in str(val)
    assert "replaced broken.avi by other clips: decoding stops" in str(train)
    cached, online = CachedClips(tmp_path / "val"), data.dataset("val")
    assert len(cached) == 5
    with pytest.raises(VideoError, match="decoding stops"):
        cached.clip(0, 1)
    assert cached[0, 1] == {"skipped": [("Drift/val_00001", "broken.avi: decoding stops")]}
    for index in (0, 2, 3, 4):
        assert_equal(cached.clip(0, index), online.clip(0, index))
    cached, online = CachedClips(tmp_path / "train"), data.dataset("train")
    assert cached.clip(1, 2)["skipped"] == [("broken.avi", "decoding stops")]
    for epoch, index in ((0, 2), (1, 2), (1, 4)):
        assert_equal(cached.clip(epoch, index), online.clip(epoch, index))


@pytest.mark.parametrize("format", ["clips", "videos"])
def test_a_read_error_of_the_system_leaves_no_gap_in_a_cache(make, small_ucf, tmp_path, monkeypatch, format):
    bad = next(path for path in sorted(small_ucf.rglob("*_g25_c02.avi")))
    dataset = make().make_dataset("val")
    clip, read = dataset.clip, Path.read_bytes

    def failing_clip(epoch: int, index: int) -> dict[str, Any]:
        if index == 1:
            error = VideoError(f"{bad}: expected a readable video, FFmpeg says: Input/output error.")
            error.lasting = False
            raise error
        return clip(epoch, index)

    def failing_read(path: Path) -> bytes:
        if path == bad:
            raise OSError(errno.EIO, "Input/output error")
        return read(path)

    with monkeypatch.context() as patch:
        patch.setattr(dataset, "clip", failing_clip)
        patch.setattr(UCF101, "make_dataset", lambda self, split: dataset)
        patch.setattr(Path, "read_bytes", failing_read)
        with pytest.raises(UserError, match="Input/output error"):
            write_cache(make(), tmp_path, ["val"], format=format)
    (done,) = write_cache(make(), tmp_path, ["val"], format=format)
    assert done.items == 4
    assert not done.manifest.skipped


def test_a_training_clip_that_can_not_be_replaced_ends_the_writing(tmp_path):
    class Hopeless(Synthetic):
        def make_dataset(self, split: str) -> Any:
            dataset = super().make_dataset(split)

            def hopeless(epoch: int, index: int) -> dict[str, Any]:
                raise VideoError("broken.avi: 99 others could not be read either")

            dataset.clip = hopeless
            return dataset

    with pytest.raises(UserError, match="99 others"):
        write_cache(Hopeless(num_train=2, **SMALL), tmp_path, ["train"])


def test_the_manifest_says_what_was_cached(written):
    content = json.loads((written / "val/manifest.json").read_text())
    assert content["schema_version"] == 1
    assert content["description"]["fps"] == 8.0
    assert content["split_name"] == "vallist01"
    assert [shard["sha256"] for shard in content["shards"]] == [
        hashlib.sha256((written / "val" / shard["file"]).read_bytes()).hexdigest() for shard in content["shards"]
    ]
    assert Manifest.read(written / "val/manifest.json").to_json() == (written / "val/manifest.json").read_text()
    names = [line.split(",")[2] for line in (written / "val/clips.csv").read_text().splitlines()[1:]]
    assert names == [f"{name}/v_{name}_g25_c0{k}.avi" for name in ("Bounce", "Drift") for k in (1, 2)]


def test_an_index_beyond_the_end_is_an_error(written):
    dataset: ClipDataset = CachedClips(written / "val")
    with pytest.raises(IndexError):
        dataset[0, 4]
