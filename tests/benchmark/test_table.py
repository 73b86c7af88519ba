"""The table of a results folder: its order, its cells and its files."""

import csv
import json

import pytest

from vidtwin.benchmark import table


def add_row(folder, name, kind, psnr, **more):
    row = {
        "name": name,
        "kind": kind,
        "parameters": 1234567,
        "compression_rate": 0.0020461,
        "bits_per_pixel": None,
        "metrics": {"psnr": {"mean": psnr}, "ssim": {"mean": 0.81236}, "lpips": "unavailable"},
        "num_clips": 23,
        "protocol_hash": "0123456789abcdef",
    }
    path = folder / "rows" / name / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(row | more))


@pytest.fixture
def folder(tmp_path):
    add_row(tmp_path, "temporal_mean", "reference", 35.0)
    add_row(tmp_path, "weak", "trained", 20.0)
    add_row(tmp_path, "lucky", "untrained", 40.0)
    add_row(tmp_path, "strong", "trained", 30.126)
    add_row(tmp_path, "mean_colour", "reference", 13.0)
    add_row(tmp_path, "fresh", "untrained", 11.0)
    return tmp_path


def test_trained_models_come_by_falling_psnr_then_untrained_ones_then_references(folder):
    names = [row["name"] for row in table.read_rows(folder)]
    assert names == ["strong", "weak", "lucky", "fresh", "temporal_mean", "mean_colour"]


def test_an_untrained_row_says_that_it_is_not_ranked(folder):
    notes = {row["name"]: table.cells(row)[-1] for row in table.read_rows(folder)}
    assert notes["lucky"] == notes["fresh"] == "untrained weights: not ranked"
    assert notes["strong"] == notes["weak"] == ""
    assert notes["mean_colour"] == "reference"


def test_cells_are_the_measured_values_with_their_units(folder):
    row = table.read_rows(folder)[0]
    assert dict(zip(table.COLUMNS, table.cells(row), strict=True)) == {
        "model": "strong",
        "parameters": "1,234,567",
        "rate (%)": "0.2046",
        "bits/pixel": "",
        "PSNR (dB)": "30.13",
        "SSIM": "0.8124",
        "LPIPS": "unavailable",
        "clips": "23",
        "note": "",
    }


def test_a_measured_lpips_is_shown_with_four_digits(tmp_path):
    metrics = {"psnr": {"mean": 30.0}, "ssim": {"mean": 0.8}, "lpips": {"mean": 0.12344}}
    add_row(tmp_path, "a", "trained", 30.0, metrics=metrics)
    assert table.cells(table.read_rows(tmp_path)[0])[6] == "0.1234"


def test_a_model_with_codebooks_shows_its_bits(tmp_path):
    add_row(tmp_path, "codes", "trained", 30.0, bits_per_pixel=0.0119176)
    assert table.cells(table.read_rows(tmp_path)[0])[3] == "0.01192"


def test_markdown_has_one_aligned_line_for_each_row(folder):
    lines = table.markdown(table.read_rows(folder)).splitlines()
    assert len(lines) == 2 + 6
    assert len({len(line) for line in lines}) == 1
    assert {line.count("|") for line in lines} == {len(table.COLUMNS) + 1}
    cells = [cell.strip() for cell in lines[2].strip("|").split("|")]
    assert tuple(cells) == table.cells(table.read_rows(folder)[0])


def test_table_files_hold_the_same_rows_and_csv_the_protocol_of_each(folder):
    text = table.write(folder)
    assert (folder / "table.md").read_text() == text
    with (folder / "table.csv").open(newline="") as file:
        found = list(csv.reader(file))
    assert found[0] == [*table.COLUMNS, "protocol_hash"]
    assert found[1:] == [[*table.cells(row), "0123456789abcdef"] for row in table.read_rows(folder)]


def test_a_folder_without_rows_gives_an_empty_table(tmp_path):
    assert len(table.write(tmp_path).splitlines()) == 2
