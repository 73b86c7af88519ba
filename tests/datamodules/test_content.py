"""Digests of videos' content: read once, by size and modification time, and the same from files, caches and shards."""

import errno
import hashlib
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from vidtwin.benchmark import protocol
from vidtwin.benchmark.sweep import Sweep
from vidtwin.datamodules import content
from vidtwin.errors import UserError

DATA = {"data": "VideoFolder", "num_frames": 4, "resolution": 32}


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_a_file_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDTWIN_CACHE", str(tmp_path / "cache"))
    paths = [tmp_path / "a.avi", tmp_path / "b.avi"]
    for path in paths:
        path.write_bytes(path.name.encode())
    known = [sha256(b"a.avi"), sha256(b"b.avi")]
    assert content.digest_all(paths) == known
    read: list[Path] = []
    digest = content._digest
    monkeypatch.setattr(content, "_digest", lambda path: read.append(path) or digest(path))
    assert content.digest_all(paths) == known
    assert read == []
    paths[0].write_bytes(b"c.avi")
    os.utime(paths[0], ns=(0, 7))
    assert content.digest_all(paths) == [sha256(b"c.avi"), known[1]]
    assert read == paths[:1]
    assert content.digest_all([tmp_path / "missing.avi"]) == [""]


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_a_file_that_the_system_fails_to_find_is_not_taken_for_a_missing_one(tmp_path, monkeypatch, number):
    def fail(path):
        raise OSError(number, os.strerror(number), str(path))

    monkeypatch.setattr(content, "identity", fail)
    with pytest.raises(UserError, match=rf"an error of the system: {os.strerror(number)}; try again"):
        content.digest_all([tmp_path / "a.avi"])


def test_a_folder_of_images_is_known_by_all_of_them(tmp_path):
    for name in ("0.png", "1.png"):
        (tmp_path / "v").mkdir(exist_ok=True)
        (tmp_path / "v" / name).write_bytes(name.encode())
    (first,) = content.digest_all([tmp_path / "v"])
    (tmp_path / "v" / "1.png").write_bytes(b"2.png")
    os.utime(tmp_path / "v" / "1.png", ns=(0, 7))
    os.utime(tmp_path / "v", ns=(0, 2**62))
    assert content.digest_all([tmp_path / "v"]) != [first]


def test_a_damaged_cache_of_digests_is_written_again(tmp_path, monkeypatch):
    monkeypatch.setenv("VIDTWIN_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.avi"
    path.write_bytes(b"a")
    content.digest_all([path])
    (file,) = (tmp_path / "cache").iterdir()
    whole = file.read_bytes()
    file.write_text("a\tb\n")
    assert content.digest_all([path]) == [sha256(b"a")]
    assert file.read_bytes() == whole


def test_videos_of_another_content_are_refused_by_name(tmp_path):
    def resolve(digest: str) -> dict:
        return protocol.ProtocolSettings().resolve(DATA | {"videos_sha256": digest}, "32-true")

    protocol.write(resolve("1"), tmp_path, {"a.avi": "1", "b.avi": "1"})
    (tmp_path / "rows" / "a").mkdir(parents=True)
    (tmp_path / "rows" / "a" / "clips.csv").touch()
    with pytest.raises(UserError, match=r"data.videos_sha256 2 for 1; the content of b.avi has changed\); choose"):
        protocol.write(resolve("2"), tmp_path, {"a.avi": "1", "b.avi": "2"})
    (tmp_path / "videos.json").unlink()
    with pytest.raises(UserError, match=r"data.videos_sha256 2 for 1\); choose"):
        protocol.write(resolve("2"), tmp_path, {"a.avi": "1", "b.avi": "2"})
    assert protocol.write(resolve("1"), tmp_path, {}) == protocol.protocol_hash(resolve("1"))


@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES])
def test_content_that_can_not_be_read_becomes_no_part_of_a_protocol(tmp_path, monkeypatch, number):
    monkeypatch.setenv("VIDTWIN_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.avi").write_bytes(b"a")

    def fail(*_):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(hashlib, "file_digest", fail)
        reason = os.strerror(number)
        with pytest.raises(
            UserError, match=rf"Expected to read .*a\.avi, got an error of the system: {reason}; try again"
        ):
            content.digest_all([tmp_path / "a.avi"])
    assert content.digest_all([tmp_path / "a.avi"]) == [sha256(b"a")]  # nothing was stored for it


def test_one_process_alone_reads_the_content_of_the_videos():
    class Clips(list):
        def identity(self, index):
            return self[index], 0

    source = SimpleNamespace(  # without `digests` and `protocol`, which read
        dataset=lambda split: Clips(["a.avi", "b.avi", "c.avi"]), eval_batch_size=2, resolution=32, num_frames=4
    )
    fabric = SimpleNamespace(is_global_zero=False, broadcast=lambda mine: (DATA, ""))
    sweep = SimpleNamespace(source=source, shapes=[(4, 32, 32)], shape=(3, 4, 32, 32), varies=False)
    plan = Sweep._make_plan(sweep, fabric)
    assert (plan.chunks, plan.protocol) == ([[0, 1], [2]], DATA)
