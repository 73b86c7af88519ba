"""Messages on stderr and output on stdout."""

import os
import re
import subprocess
import sys

import pytest
from lightning_utilities.core.rank_zero import rank_zero_only
from tqdm import tqdm

from vidtwin import console


def test_messages_go_to_stderr_with_the_prefix_and_output_to_stdout(capfd: pytest.CaptureFixture[str]) -> None:
    with tqdm(total=2) as bar:
        console.log("50% done")
        console.write("the output")
        bar.update()
    captured = capfd.readouterr()
    assert "vidtwin: 50% done\n" in captured.err
    assert captured.out == "the output\n"


def test_a_name_that_is_no_text_is_written_by_its_codes(capsys: pytest.CaptureFixture[str]) -> None:
    console.write(b"caf\xe9.mp4".decode(errors="surrogateescape"))
    assert capsys.readouterr().out == "caf\\udce9.mp4\n"


def test_a_message_that_is_logged_once_comes_once(capfd: pytest.CaptureFixture[str]) -> None:
    console.log_once.cache_clear()
    for message in ("a", "b", "a"):
        console.log_once(message)
    assert capfd.readouterr().err == "vidtwin: a\nvidtwin: b\n"


def test_the_first_rank_alone_logs_if_asked(capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", 1, raising=False)
    console.log("once", rank_zero=True)
    console.write("once", rank_zero=True)
    console.log("of each")
    captured = capfd.readouterr()
    assert (captured.out, captured.err) == ("", "vidtwin: of each\n")


def test_progress_is_a_line_from_time_to_time_without_a_terminal(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with console.Progress(2000, "encoding", "clips") as bar:
        bar.update(1)
    assert capfd.readouterr().err == ""  # done within the first minute
    monkeypatch.setattr(console.Progress, "_SECONDS", 0.0)
    with console.Progress(2000, "encoding", "clips") as bar:
        for _ in range(3):
            bar.update(500)
    lines = capfd.readouterr().err.splitlines()
    assert re.fullmatch(r"vidtwin: encoding: 1,500 of 2,000 clips, \S+ clips/s, \d\d:\d\d left", lines[-1])
    with console.Progress(2000, "encoding", "clips", shown=False) as bar:
        bar.update(2000)
    assert capfd.readouterr().err == ""


def test_progress_beyond_a_total_that_headers_promised_leaves_nothing(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(console.Progress, "_SECONDS", 0.0)
    clock = [0.0]
    with console.Progress(2000, "encoding", "clips") as bar:
        monkeypatch.setattr(bar, "_time", lambda: clock[0])
        bar.start_t = bar.last_print_t = 0.0
        for clock[0], count in ((100.0, 1000), (200.0, 1500)):
            bar.update(count)
    assert re.search(r"encoding: 2,500 of 2,000 clips, \S+ clips/s, 00:00 left\n$", capfd.readouterr().err)


PROGRESS = """
from vidtwin import console
with console.Progress(20, "encoding", "clips") as bar:
    bar.update(5)
"""


@pytest.mark.parametrize("columns", [0, 100])
def test_a_terminal_has_a_bar_also_if_it_does_not_say_its_size(columns: int) -> None:
    import pty
    import termios

    mine, theirs = pty.openpty()
    termios.tcsetwinsize(mine, (columns // 4, columns))
    subprocess.run([sys.executable, "-c", PROGRESS], stderr=theirs, check=True)
    os.close(theirs)
    shown = os.read(mine, 10_000).decode()
    os.close(mine)
    assert re.search(r"encoding:  25%\|.*\| 5/20, +\S+ clips/s, \d\d:\d\d left", shown)
