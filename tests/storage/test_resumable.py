"""A killed run is resumed: whole units stay, invalid ones are made again, leftovers go; one writer at a time."""

import errno
import json
import multiprocessing
import os
import signal
from functools import partial
from pathlib import Path

import pytest
from filelock import FileLock

from vidtwin.errors import UserError
from vidtwin.files import replacing, write_text
from vidtwin.storage.resumable import Resumable, lock, lock_file, read_json


def read_unit(identity, number, path):
    return read_json(path, identity=identity, number=number)


def make_store(folder: Path, identity: str = "a") -> Resumable:
    return Resumable(folder, "unit-{:03d}.json", partial(read_unit, identity), "numbers", "manifest.json")


def write_unit(store: Resumable, number: int, identity: str = "a") -> None:
    write_text(store.path(number), json.dumps({"identity": identity, "number": number}))


def refuse() -> str:
    return "those of b"


def die_at(folder: Path, number: int) -> None:
    """Write units until a kill in the middle of one."""
    store = make_store(folder)
    with lock(folder, "test"):
        store.begin(lambda: None, "stop")
        for each in store.missing(range(4)):
            if each == number:
                with replacing(store.path(each)) as temporary:
                    temporary.write_text('{"identity"')
                    os.kill(os.getpid(), signal.SIGKILL)
            write_unit(store, each)


def start(target, *arguments):
    process = multiprocessing.get_context("fork").Process(target=target, args=arguments)
    process.start()
    return process


def test_a_killed_run_resumes_with_the_missing_units_and_its_leftovers_are_removed(tmp_path):
    process = start(die_at, tmp_path, 2)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(list(tmp_path.glob(".*-unit-002.json"))) == 1
    store = make_store(tmp_path)
    with lock(tmp_path, "test"):  # which the kill has released
        assert store.begin(lambda: None, "stop") is True
        assert store.missing(range(4)) == [2, 3]
    assert sorted(os.listdir(tmp_path)) == [".lock", "unit-000.json", "unit-001.json"]


def test_an_invalid_unit_is_logged_and_made_again_and_one_of_another_identity_is_replaced(tmp_path, capfd):
    store = make_store(tmp_path)
    for number in range(3):
        write_unit(store, number, identity="b" if number == 1 else "a")
    store.path(2).write_text('{"identity"')
    assert store.get(0) == {"identity": "a", "number": 0}
    assert store.missing(range(4)) == [1, 2, 3]
    assert "unit-002.json: expected a whole JSON file, got one that is truncated or damaged. It is made again." in (
        said := capfd.readouterr().err
    )
    assert said.count("\n") == 1
    assert store.path(1).exists()
    assert not store.path(2).exists()


@pytest.mark.parametrize("content", ["", "[" * 100_000, "[]", "3", '{"number": 1}', "\udcff"])
def test_json_that_is_not_whole_is_an_error(tmp_path, content):
    (tmp_path / "a.json").write_bytes(content.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match="truncated or damaged"):
        read_json(tmp_path / "a.json", identity="a")


def test_another_identity_and_other_files_are_refused_by_one_line_and_nothing_is_removed(tmp_path):
    store = make_store(tmp_path / "units")
    store.folder.mkdir()
    assert store.begin(refuse, "stop") is False  # there is nothing to compare to
    write_unit(store, 0, identity="b")
    with pytest.raises(UserError, match="to hold the numbers of this command, got those of b; give another folder"):
        store.begin(refuse, "give another folder")
    assert store.path(0).exists()
    (store.folder / "README.md").touch()
    assert store.begin(refuse, "stop", overwrite=True) is True  # also beside other files
    assert [path.name for path in store.folder.iterdir()] == ["README.md"]
    (store.folder / "README.md").unlink()
    assert store.begin(refuse, "stop") is False
    (store.folder / "manifest.json").touch()
    with pytest.raises(UserError, match="got those of b"):
        store.begin(refuse, "stop")
    (store.folder / "manifest.json").unlink()
    (store.folder / "thesis.tex").touch()
    (store.folder / ".thesis-abcdefgh.tex").touch()
    with pytest.raises(UserError, match=r"Expected an empty folder or one of numbers, got .* with other files"):
        store.begin(lambda: None, "stop")
    assert sorted(os.listdir(store.folder)) == [".thesis-abcdefgh.tex", "thesis.tex"]


def test_hidden_files_of_a_user_stay(tmp_path):
    store = make_store(tmp_path)
    users = {".docker-override.yml", ".DS_Store", ".note-abcdefgh"}
    for name in (*users, ".~vidtwin-abcdefgh-unit-000.json"):
        (tmp_path / name).touch()
    assert store.begin(refuse, "stop") is False
    assert set(os.listdir(tmp_path)) == users
    write_unit(store, 0)
    store.begin(refuse, "stop", overwrite=True)
    assert set(os.listdir(tmp_path)) == users


def test_a_second_writer_is_refused_or_waits_with_one_line(tmp_path, capfd):
    ready, release = multiprocessing.Event(), multiprocessing.Event()

    def hold():
        with lock(tmp_path, "test"):
            ready.set()
            release.wait(60)

    first = start(hold)
    assert ready.wait(60)
    with pytest.raises(UserError, match="for this test alone, got another one writing to it"), lock(tmp_path, "test"):
        pass

    def wait():
        with lock(tmp_path, "test", wait=True):
            assert release.is_set()

    second = start(wait)
    second.join(1)
    assert second.is_alive()
    release.set()
    second.join()
    first.join()
    assert (first.exitcode, second.exitcode) == (0, 0)
    assert capfd.readouterr().err == f"vidtwin: {tmp_path}: waiting for the end of another test that writes to it\n"


def test_a_file_in_the_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file/below"):
        with pytest.raises(UserError, match="which is a file or inside one"), lock(folder, "test"):
            pass


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (OSError(37, "No locks available"), "No locks available"),
        (NotImplementedError("FileSystem does not appear to support flock"), "a file system without locks"),
    ],
)
def test_without_locks_the_work_is_done_with_a_warning(tmp_path, monkeypatch, capfd, error, reason):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(FileLock, "acquire", fail)
    for locked in (lock(tmp_path, "test"), lock(tmp_path, "test", wait=True)):
        with locked:
            pass
    assert capfd.readouterr().err == f"vidtwin: {tmp_path} can't be locked ({reason}); run one test at a time in it\n"


@pytest.mark.parametrize("number", [errno.EACCES, errno.EPERM, errno.EROFS])
@pytest.mark.parametrize("wait", [True, False])
def test_a_folder_that_may_not_be_written_is_refused_with_the_reason(tmp_path, monkeypatch, number, wait):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    with monkeypatch.context() as patched:
        patched.setattr(FileLock, "acquire", fail)
        expected = rf"Expected to write .*/\.lock, .* got '{os.strerror(number)}'; change its permissions"
        with pytest.raises(UserError, match=expected), lock(tmp_path, "test", wait=wait):
            pass
        with pytest.raises(UserError, match=expected), lock_file(tmp_path / ".lock"):
            pass
    monkeypatch.setattr(Path, "mkdir", fail)
    expected = f"Expected to make the folder .*, got '{os.strerror(number)}'; give another"
    with pytest.raises(UserError, match=expected), lock(tmp_path / "new", "test", wait=wait):
        pass
