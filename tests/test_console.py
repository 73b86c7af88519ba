"""Messages on stderr and output on stdout."""

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
