"""Failures that a user can fix are one line: of the system, of processes that end, of locale and terminal."""

import errno
import locale
import multiprocessing
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.data import DataLoader, Dataset

from vidtwin.cli import failures, main
from vidtwin.files import replacing


class Killed(Dataset):
    """Its fourth item ends the process that reads it, perhaps while the items before are handed over."""

    def __len__(self) -> int:
        return 6

    def __getitem__(self, index: int) -> torch.Tensor:
        if index == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.zeros(2)


def test_a_worker_that_the_system_kills_is_named_with_the_options_that_need_less_memory():
    with pytest.raises((RuntimeError, ConnectionError, EOFError, FileNotFoundError)) as caught:
        list(DataLoader(Killed(), num_workers=1, batch_size=None))
    line = failures.explain(caught.value)
    assert line is not None
    assert line.startswith("Expected the data's processes to live, got ")
    assert re.search(r"DataLoader worker \(pid|process \d+ ended by SIGKILL", line)
    assert "lower data.num_workers or data.batch_size" in line


def test_a_broken_connection_of_another_kind_is_a_bug():
    assert failures.explain(ConnectionResetError(errno.ECONNRESET, "Connection reset by peer")) is None


@pytest.mark.parametrize(
    "text",
    [
        "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that dataloader's workers are out of "
        "shared memory. Please try to raise your shared memory limit.",
        "unable to write to file </torch_7_1_0>: No space left on device (28)",
    ],
)
def test_too_little_shared_memory_is_named(text):
    line = failures.explain(RuntimeError(text))
    assert line is not None
    assert "--shm-size" in line
    assert "lower data.num_workers" in line


def shared(reason: str) -> RuntimeError:
    return RuntimeError(f"unable to open shared memory object </torch_7_12_0> in read-write mode: {reason}")


@pytest.mark.parametrize(
    "error",
    [
        shared("Too many open files (24)"),
        RuntimeError("Too many open files. Communication with the workers is no longer possible. Please increase the"),
        RuntimeError("received 0 items of ancdata"),
    ],
)
def test_too_many_shared_files_are_a_matter_of_handles_not_of_memory(error):
    line = failures.explain(error)
    assert line is not None
    assert "`ulimit -n`" in line
    assert "--shm-size" not in line


def test_memory_that_is_short_or_on_a_device_is_no_shared_memory():
    line = failures.explain(shared("Cannot allocate memory (12)"))
    assert line is not None
    assert "lower data.num_workers or data.batch_size" in line
    assert "--shm-size" not in line
    assert failures.explain(RuntimeError("CUDA error: Shared memory limit exceeded")) is None
    assert failures.explain(shared("Invalid argument (22)")) is None


@pytest.fixture
def at_once(monkeypatch):
    """Forget the children of other tests, and don't wait for those that may end."""
    multiprocessing.active_children()
    monkeypatch.setattr(failures, "_PATIENCE", 0)


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError(
            "The client socket has timed out after 600000ms while trying to connect to (10.0.0.1, 29500)."
        ),
        dist.DistNetworkError(
            "The server socket has failed to listen on any local network address. port: 29500, useIpv6: false, code: "
            "-98, name: EADDRINUSE, message: address already in use"
        ),
        dist.DistStoreError("Timed out after 61 seconds waiting for clients. 1/2 clients joined."),
        dist.DistStoreError("wait timeout after 300000ms, keys: /default_pg/0//cpu//0/rank_1"),
    ],
)
def test_processes_that_do_not_meet_are_pointed_to_their_address(error, at_once):
    line = failures.explain(error, "fit")
    assert line is not None
    assert f"reach one another, got {str(error)!r}; check MASTER_ADDR and MASTER_PORT, and that all" in line
    assert "lack of memory" not in line


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError(
            "[../gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 1800000ms for recv operation to complete"
        ),
        RuntimeError("Application timeout caused pair closure"),
        dist.DistBackendError("[1] is setting up NCCL communicator, but store->get('0') got error: wait timeout"),
    ],
)
def test_a_process_that_does_not_answer_is_not_called_killed(error, at_once):
    line = failures.explain(error, "fit")
    assert line is not None
    assert line.startswith("Expected all processes to answer, got ")
    assert "killed" not in line


@pytest.mark.parametrize(
    "error",
    [
        dist.DistNetworkError(
            "failed to recv, got 0 bytes. Connection was likely closed. Did the remote server crash?"
        ),
        dist.DistBackendError("NCCL error: ncclRemoteError: A call failed possibly due to a network error"),
        RuntimeError("[../gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:6104"),
    ],
)
def test_a_lost_process_is_resumed_by_the_command_that_can(error, at_once):
    for command, ending in {"fit": "continue by --resume auto.", "test": "run the command again."}.items():
        line = failures.explain(error, command)
        assert line is not None
        assert line.startswith("Expected all processes to live, got a lost one: ")
        assert line.endswith(ending)


def end(status: int) -> None:
    os._exit(status)


def test_a_child_that_ended_well_is_not_the_lost_one(at_once):
    context = multiprocessing.get_context("fork")
    children = [context.Process(target=end, args=(status,)) for status in (0, 3)]
    error = RuntimeError("[gloo/transport/tcp/pair.cc:534] Connection closed by peer [127.0.0.1]:6104")
    try:
        for child in children:
            child.start()
            os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
            line = failures.explain(error)
            assert line is not None
            assert str(children[0].pid) not in line
        assert f"got process {children[1].pid} ended with exit code 3; " in line
    finally:
        for child in children:
            child.join()


def finish(process: multiprocessing.Process, outcome: "multiprocessing.SimpleQueue[Any]") -> Any:
    """Return what a process has put; one that has ended otherwise would be waited for without end."""
    process.join(60)
    process.kill()
    assert process.exitcode == 0
    return outcome.get()


def die() -> None:
    raise SystemExit(7)


def test_a_process_that_ends_without_a_result_is_a_failure():
    context = multiprocessing.get_context("fork")
    process = context.Process(target=die)
    process.start()
    with pytest.raises(AssertionError, match="7 == 0"):
        finish(process, context.SimpleQueue())


def exchange(rank: int, store: Path) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    dist.barrier()
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.barrier()


def lead(store: Path, outcome: "multiprocessing.SimpleQueue[str | None]") -> None:
    other = multiprocessing.get_context("fork").Process(target=exchange, args=(1, store))
    other.start()
    try:
        exchange(0, store)
    except RuntimeError as error:
        line = failures.explain(error, "fit")
        outcome.put(None if line is None else line.replace(str(other.pid), "PID"))


def test_another_process_that_the_system_kills_is_named_with_its_signal(tmp_path):
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    process = context.Process(target=lead, args=(tmp_path / "store", outcome))
    process.start()
    line = finish(process, outcome)
    assert line is not None
    assert "processes to live, got process PID ended by SIGKILL; " in line
    assert line.endswith("continue by --resume auto.")


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        (errno.ENOSPC, "Expected room to write results/a.csv, got 'No space left on device'; free"),
        (errno.EDQUOT, "Expected room to write results/a.csv"),
        (errno.EACCES, "Expected permission for results/a.csv, got 'Permission denied'; correct it"),
        (errno.EROFS, "Expected permission for results/a.csv, got 'Read-only file system'; "),
        (errno.ENOTDIR, "Expected a path that can be used, not results/a.csv, got 'Not a directory'; "),
        (errno.ENAMETOOLONG, "Expected a name that the file system takes, not results/a.csv"),
        (errno.EIO, "Expected a disk that can be read and written at results/a.csv"),
        (errno.EMFILE, "raise the limit by `ulimit -n`"),
    ],
)
def test_a_refusal_of_the_system_names_the_file_that_was_to_be_written(code, expected):
    # A temporary file's name says nothing to a user.
    refused = OSError(code, os.strerror(code), "results/.~vidtwin-abcd1234-a.csv")
    through_a_worker = OSError(
        "Caught OSError in DataLoader worker process 0.\nOriginal Traceback (most recent call last):\n"
        f"{type(refused).__name__}: {refused}"
    )
    for error in (refused, through_a_worker):
        assert expected in (failures.explain(error) or "")


def test_other_errors_of_the_system_are_bugs_and_keep_their_traceback():
    for error in (
        FileNotFoundError(errno.ENOENT, "No such file", "a"),
        OSError(errno.EINVAL, "Invalid argument", "a"),
        PermissionError(errno.EPERM, "Operation not permitted"),  # of a system call without a file
        KeyError("a"),
        RuntimeError("Expected all tensors to be on the same device"),
    ):
        assert failures.explain(error) is None


def full_disk_of_safetensors() -> None:
    raise RuntimeError('Error while serializing: I/O error: Os { message: "No space left on device" } (os error 28)')


def full_disk() -> None:
    raise OSError(errno.ENOSPC, "No space left on device")  # as `write` raises it, without a name


@pytest.mark.parametrize("write", [full_disk, full_disk_of_safetensors])
def test_a_full_disk_names_the_file_that_there_was_no_room_for(tmp_path, write):
    with pytest.raises(OSError, match="No space left") as caught, replacing(tmp_path / "a.safetensors"):
        write()
    assert f"room to write {tmp_path / 'a.safetensors'}, got" in (failures.explain(caught.value) or "")
    assert list(tmp_path.iterdir()) == []


def copy_configs_as_nobody(folder: Path, outcome: "multiprocessing.SimpleQueue[tuple[int, str]]") -> None:
    if os.getuid() == 0:
        os.setuid(65534)
    read, write = os.pipe()
    os.dup2(write, 2)
    code = main(["configs", str(folder / "copied")])
    sys.stderr.flush()
    outcome.put((code, os.read(read, 4096).decode()))


def test_a_folder_that_belongs_to_another_user_is_named(tmp_path, monkeypatch):
    tmp_path.chmod(0o555)
    context = multiprocessing.get_context("fork")
    outcome = context.SimpleQueue()
    monkeypatch.setattr(sys, "stderr", os.fdopen(os.dup(2), "w"))  # pytest's own file has no descriptor
    monkeypatch.setattr(sys.stderr, "write", lambda text: os.write(2, text.encode()))
    process = context.Process(target=copy_configs_as_nobody, args=(tmp_path, outcome))
    process.start()
    code, line = finish(process, outcome)
    assert code == 2
    assert line.startswith(f"vidtwin: error: Expected permission for {tmp_path / 'copied'}")
    assert line.count("\n") == 1


def test_a_current_folder_that_was_removed_is_one_line(tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    assert main(["plugins"]) == 2
    assert "Expected a current folder, got one that was removed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("of_locale", "error", "lacking"),
    [
        (
            "ANSI_X3.4-1968",
            UnicodeEncodeError("ascii", "größe.mp4", 2, 4, ""),
            "encoding ascii, which lacks '\\xf6\\xdf'",
        ),
        ("ascii", UnicodeDecodeError("ascii", b"\xc3\xa4", 0, 1, ""), "which lacks b'\\xc3'"),  # a config's text
        ("ISO-8859-1", UnicodeEncodeError("latin-1", "\u4e2d", 0, 1, ""), "encoding latin-1, "),
        ("cp1252", UnicodeEncodeError("charmap", "\u4e2d", 0, 1, ""), "encoding charmap, "),
    ],
)
def test_a_locale_without_a_names_letters_is_named(monkeypatch, of_locale, error, lacking):
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: of_locale)
    line = failures.explain(error)
    assert line is not None
    assert lacking in line
    assert "; set LC_ALL=C.UTF-8" in line


def test_an_encoding_that_code_names_is_not_the_locales(monkeypatch):
    monkeypatch.setattr(locale, "getpreferredencoding", lambda do_setlocale=True: "UTF-8")
    for encoding in ("ascii", "latin-1", "charmap", "utf-8"):
        assert failures.explain(UnicodeEncodeError(encoding, "\udcff", 0, 1, "")) is None


def test_names_that_a_terminal_lacks_are_printed_and_a_reader_that_leaves_is_no_error(tmp_path):
    code = "from vidtwin.cli import entry_point; entry_point()"
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    named = subprocess.run(
        [sys.executable, "-c", code, "configs", "größe"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert (named.returncode, named.stderr) == (0, "")
    assert named.stdout.endswith("-> gr\\xf6\\xdfe\n")
    with subprocess.Popen(
        [sys.executable, "-c", code, "configs", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as left:
        assert left.stdout is not None
        assert left.stderr is not None
        left.stdout.close()
        assert left.stderr.read() == b""
