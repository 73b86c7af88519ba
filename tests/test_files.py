"""A file is whole or not there."""

import os

import pytest

from vidtwin.files import replacing, write_text


@pytest.fixture
def umask():
    previous = os.umask(0o027)
    yield
    os.umask(previous)


def test_the_target_keeps_its_content_until_the_block_ends(tmp_path):
    path = tmp_path / "results.json"
    path.write_text("old")
    with replacing(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent  # a move within one file system
        assert temporary.suffix == path.suffix  # some writers choose the format by it
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["results.json"]


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("existed", [True, False])
def test_an_error_in_the_middle_leaves_the_previous_file_and_no_temporary_one(tmp_path, error, existed):
    path = tmp_path / "results.json"
    if existed:
        path.write_text("old")

    def write():
        with replacing(path) as temporary:
            temporary.write_text("half")
            raise error

    with pytest.raises(type(error)):
        write()
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == ({"results.json": "old"} if existed else {})


def test_a_disk_that_fails_at_the_flush_leaves_the_previous_file(tmp_path, monkeypatch):
    def fail(_):
        raise OSError(5, "Input/output error")

    write_text(tmp_path / "a.txt", "old")
    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(OSError, match="Input/output error"):
        write_text(tmp_path / "a.txt", "new")
    assert {file.name: file.read_text() for file in tmp_path.iterdir()} == {"a.txt": "old"}


def test_the_file_gets_the_permissions_that_open_would_give_it(tmp_path, umask):
    write_text(tmp_path / "a.txt", "")
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_folders_are_made_and_text_is_utf8(tmp_path):
    write_text(tmp_path / "rows" / "a" / "note.txt", "größer, ünï")
    assert (tmp_path / "rows" / "a" / "note.txt").read_bytes() == "größer, ünï".encode()
