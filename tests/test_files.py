"""A file is whole or not there."""

import errno
import multiprocessing
import os
import signal
import stat
from pathlib import Path

import av
import pytest

from vidtwin import files
from vidtwin.files import explain, intended_name, link, parse_json, remove_leftovers, replacing, write_text


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


def record(monkeypatch) -> list[str]:
    """What is flushed and moved, in order."""
    order: list[str] = []
    fsync, replace = os.fsync, os.replace

    def flushed(handle):
        order.append("flush folder" if is_folder(handle) else "flush file")
        fsync(handle)

    def moved(source, target):
        order.append("move")
        replace(source, target)

    monkeypatch.setattr(os, "fsync", flushed)
    monkeypatch.setattr(os, "replace", moved)
    return order


def is_folder(handle: int) -> bool:
    return stat.S_ISDIR(os.fstat(handle).st_mode)


def test_content_is_on_the_disk_before_the_move_and_the_move_before_the_end(tmp_path, monkeypatch):
    order = record(monkeypatch)
    write_text(tmp_path / "a.txt", "new")
    assert order == ["flush file", "move", "flush folder"]


def test_a_file_system_that_flushes_no_folders_is_no_error_but_a_broken_one_is(tmp_path, monkeypatch):
    fsync = os.fsync

    def fails_on_folders(code):
        def flush(handle):
            if is_folder(handle):
                raise OSError(code, os.strerror(code))
            fsync(handle)

        return flush

    monkeypatch.setattr(os, "fsync", fails_on_folders(errno.EINVAL))
    write_text(tmp_path / "a.txt", "new")
    assert (tmp_path / "a.txt").read_text() == "new"
    monkeypatch.setattr(os, "fsync", fails_on_folders(errno.EIO))
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write_text(tmp_path / "a.txt", "newer")


@pytest.mark.parametrize("before", ["nothing", "file", "link"])
def test_a_link_is_relative_and_replaces_what_was_there(tmp_path, before, monkeypatch):
    old, new, last = (tmp_path / "run" / name for name in ("old.ckpt", "new.ckpt", "last.ckpt"))
    write_text(old, "old")
    write_text(new, "new")
    if before == "file":
        write_text(last, "last")
    elif before == "link":
        link(last, old)
    order = record(monkeypatch)
    link(last, new)
    assert order == ["move", "flush folder"]
    assert os.readlink(last) == "new.ckpt"
    assert {file.name: file.read_text() for file in last.parent.iterdir()} == {
        "old.ckpt": "old",
        "new.ckpt": "new",
        "last.ckpt": "new",
    }
    last.parent.rename(tmp_path / "moved")
    assert (tmp_path / "moved" / "last.ckpt").read_text() == "new"


def test_where_there_are_no_links_it_is_a_copy(tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr(os, "symlink", fail)
    write_text(tmp_path / "new.ckpt", "new")
    link(tmp_path / "last.ckpt", tmp_path / "new.ckpt")
    assert (tmp_path / "last.ckpt").read_text() == "new"
    assert not (tmp_path / "last.ckpt").is_symlink()
    assert sorted(os.listdir(tmp_path)) == ["last.ckpt", "new.ckpt"]


def test_a_temporary_file_names_its_target(tmp_path, monkeypatch):
    for name in ("step-00001000.ckpt", "clips.csv", "a-b.tar.gz"):
        with replacing(tmp_path / name) as temporary:
            assert intended_name(temporary) == name
        assert intended_name(tmp_path / name) is None
    seen = []
    monkeypatch.setattr(os, "replace", lambda source, target: seen.append(Path(source)))
    link(tmp_path / "last.ckpt", tmp_path / "clips.csv")
    assert [intended_name(path) for path in seen] == ["last.ckpt"]
    for name in (".hidden", ".docker-override.yml", ".bash-history", "last-abcdefgh.ckpt", ".last-short.ckpt"):
        assert intended_name(Path(name)) is None
    assert intended_name(Path(".last-abcdefgh.ckpt"), unmarked=True) == "last.ckpt"  # of earlier versions


@pytest.mark.parametrize("name", ["x" * 250 + ".mp4", "é" * 120 + ".safetensors", "x" * 255, "a." + "b" * 250])
def test_a_name_as_long_as_the_file_system_takes_can_be_written(tmp_path, name):
    write_text(tmp_path / name, "old")
    (tmp_path / "other").mkdir()
    with replacing(tmp_path / name) as temporary:
        temporary.write_text("new")
        assert temporary.suffix == Path(name).suffix or len(Path(name).suffix) > 32
        left = tmp_path / "other" / temporary.name
        left.touch()  # as of a killed process
    assert {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()} == {name: "new"}
    write_text(tmp_path / "other" / ("y" + name[1:]), "of another name")
    assert left.exists()
    write_text(tmp_path / "other" / name, "whole")
    assert not left.exists()
    link(tmp_path / name, tmp_path / "other")
    assert os.readlink(tmp_path / name) == "other"


def test_the_file_gets_the_permissions_that_open_would_give_it(tmp_path, umask):
    write_text(tmp_path / "a.txt", "")
    (tmp_path / "b.txt").touch()
    assert (tmp_path / "a.txt").stat().st_mode == (tmp_path / "b.txt").stat().st_mode


def test_folders_are_made_and_text_is_utf8(tmp_path):
    write_text(tmp_path / "rows" / "a" / "note.txt", "größer, ünï")
    assert (tmp_path / "rows" / "a" / "note.txt").read_bytes() == "größer, ünï".encode()


def test_leftovers_of_killed_processes_go_and_files_in_use_stay(tmp_path):
    users = {".b-abcdefgh.mp4", ".docker-override.yml", ".bash-history", "a-b.mp4"}
    others = {".~vidtwin-abcdefgh-a.png", ".~vidtwin-12345678-note", ".~vidtwin-12345678-x.a-b c"}
    for name in (".~vidtwin-abcdefgh-a.mp4", ".~vidtwin-12345678-a.mp4", ".a-abcdefgh.mp4", *others, *users):
        (tmp_path / name).touch()
    with replacing(tmp_path / "a.mp4") as temporary:
        remove_leftovers(tmp_path, "a.mp4")
        assert set(os.listdir(tmp_path)) == {temporary.name, *others, *users}
        remove_leftovers(tmp_path, "note")
        assert not (tmp_path / ".~vidtwin-12345678-note").exists()
        remove_leftovers(tmp_path)
        assert set(os.listdir(tmp_path)) == {temporary.name, *users}
    remove_leftovers(tmp_path)
    assert set(os.listdir(tmp_path)) == {"a.mp4", *users}


def test_an_error_names_the_file_that_was_to_be_written_however_long_its_name_is(tmp_path):
    path = tmp_path / ("x" * 250 + ".csv")
    path.mkdir()
    with pytest.raises(OSError, match="directory") as caught:
        write_text(path, "")
    assert str(path) in (explain(caught.value) or "")
    with pytest.raises(OSError, match="directory") as caught:
        link(path, tmp_path / "target")
    assert str(path) in (explain(caught.value) or "")
    assert os.listdir(tmp_path) == [path.name]

    def write(path, error) -> None:
        with replacing(path) as temporary:
            raise error(errno.EACCES, os.strerror(errno.EACCES), str(temporary))

    with pytest.raises(av.error.PermissionError) as caught:  # whose name of the file can't be changed
        write(tmp_path / "a.mp4", av.error.PermissionError)
    assert f"permission for {tmp_path}/a.mp4, got" in (explain(caught.value) or "")
    with pytest.raises(OSError, match="denied") as caught:
        write(tmp_path / ("y" * 250 + ".csv"), PermissionError)
    assert f"{tmp_path}/yyy" in (said := explain(caught.value) or "")
    assert "~" not in said


def test_a_temporary_file_that_another_process_removed_before_it_was_locked_is_made_again(tmp_path, monkeypatch):
    lock, taken = files._lock, []

    def lose(handle, wait):
        if not taken:
            (path,) = tmp_path.iterdir()
            taken.append(path.name)
            path.unlink()
        return lock(handle, wait)

    monkeypatch.setattr(files, "_lock", lose)
    with replacing(tmp_path / "a.txt") as temporary:
        assert temporary.name not in taken
        temporary.write_text("whole")
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "whole"}


@pytest.mark.parametrize("text", ["", "{", "[" * 100_000, b"\xff"])
def test_json_that_can_not_be_parsed_is_one_kind_of_error(text):
    with pytest.raises(ValueError, match=r"."):
        parse_json(text)


def test_without_locks_old_temporary_files_go(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", fail)
    left = tmp_path / ".~vidtwin-abcdefgh-a.mp4"
    left.touch()
    os.utime(left, (0, 0))
    with replacing(tmp_path / "a.mp4") as temporary:
        remove_leftovers(tmp_path)
        assert os.listdir(tmp_path) == [temporary.name]


def die_while_writing(path):
    with replacing(path) as temporary:
        temporary.write_text("half")
        os.kill(os.getpid(), signal.SIGKILL)


def test_leftovers_of_a_kill_are_removed_when_the_file_is_written_again(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=die_while_writing, args=(tmp_path / "a.txt",))
    process.start()
    process.join()
    (left,) = tmp_path.iterdir()
    write_text(tmp_path / "b.txt", "another")
    assert left.exists()
    write_text(tmp_path / "a.txt", "whole")
    assert sorted(os.listdir(tmp_path)) == ["a.txt", "b.txt"]
