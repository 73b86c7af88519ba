"""Tables keep every text, and no spreadsheet takes one for a formula."""

import csv

import pytest

from vidtwin.tables import escape, format_table, read_table, unescape, write_table

TEXTS = [
    "=1+1",
    "+cmd",
    "-a",
    "@x",
    "\tx",
    "\rx",
    "'=1",
    "''-a",
    "'a",
    "'",
    "",
    "a=b",
    'a,"b"\nc',
    "a\rb",
    " =1",
    "-1e3x",
]


@pytest.mark.parametrize("text", TEXTS)
def test_every_text_comes_back_and_begins_with_no_formula(text):
    assert unescape(escape(text)) == text
    assert not escape(text).startswith(("=", "+", "-", "@", "\t", "\r"))


@pytest.mark.parametrize("number", [-1, -0.5, "-1", "+2", "-.5", "-1.5e-07", None])
def test_numbers_stay(number):
    assert escape(number) == number


def test_a_table_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "table.csv"
    write_table(path, ["name", "label"], [[text, -1] for text in TEXTS])
    assert read_table(path) == [{"name": text, "label": "-1"} for text in TEXTS]


def test_names_of_files_that_are_no_utf_8_come_back(tmp_path):
    name = b"caf\xe9.mp4".decode(errors="surrogateescape")
    write_table(tmp_path / "table.csv", ["name"], [[name]])
    assert read_table(tmp_path / "table.csv", odd_names=True) == [{"name": name}]
    with pytest.raises(UnicodeDecodeError):
        read_table(tmp_path / "table.csv")


def test_a_table_that_a_spreadsheet_has_saved_is_read(tmp_path):
    write_table(tmp_path / "table.csv", ["name", "label"], [["=a", 1]])
    saved = (tmp_path / "table.csv").read_text().replace("\n", "\r\n")
    (tmp_path / "table.csv").write_bytes(saved.encode("utf-8-sig"))
    assert read_table(tmp_path / "table.csv") == [{"name": "=a", "label": "1"}]


def test_common_cells_are_written_as_by_the_csv_module(tmp_path):
    rows = [["a b", 1, 0.1, None], ['q"', -1, "x,y", ""], ["two\nlines", 0, "", ""]]
    with (tmp_path / "expected.csv").open("w", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([["n", "i", "f", "t"], *rows])
    assert format_table(["n", "i", "f", "t"], rows) == (tmp_path / "expected.csv").read_bytes().decode()


def test_files_without_escaped_cells_are_read(tmp_path):
    (tmp_path / "old.csv").write_text("name,label\n=1+1,-1\n'a,2\n")
    assert [row["name"] for row in read_table(tmp_path / "old.csv")] == ["=1+1", "'a"]


@pytest.mark.parametrize("text", ["", "a,b\n1\n", 'a,b\n"1,2\n', "a,b\n1,2,3\n"])
def test_a_damaged_table_is_refused(tmp_path, text):
    (tmp_path / "table.csv").write_text(text)
    with pytest.raises(ValueError, match=r"."):
        read_table(tmp_path / "table.csv")
