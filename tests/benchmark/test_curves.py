"""Curves of a results folder: BD against published values, which points count, tables, files and plots."""

import csv
import json
import math
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark.fixture_results import write_results

from vidtwin.benchmark import curve_plots, curves, levels, render, report, rows
from vidtwin.errors import UserError
from vidtwin.files import parse_json

# JCTVC-E137: rates and PSNR of two of its sequences, and the BD-rates of Netflix' implementation of PCHIP in VMAF.
E137 = [
    (
        [(108048.8736, 43.6471), (61279.976, 40.3953), (33905.6656, 37.247), (18883.6928, 34.2911)],
        [(108061.2784, 43.6768), (61299.9936, 40.4232), (33928.7472, 37.2761), (18910.912, 34.3147)],
        -0.00465215420752807,
    ),
    (
        [(40433.8848, 37.5761), (7622.7456, 35.3756), (2394.488, 33.8977), (1017.6184, 32.0603)],
        [(40370.12, 37.5982), (7587.0024, 35.4025), (2390.0944, 33.9194), (1017.0984, 32.0822)],
        -0.018779823450567612,
    ),
]


@pytest.mark.parametrize(("anchor", "test", "expected"), E137)
def test_bd_rates_are_the_published_ones(anchor, test, expected):
    assert curves.compare(anchor, test).rate == pytest.approx(expected, abs=1e-6)


def curve(*psnr: float, factor: float = 1.0) -> list[tuple[float, float]]:
    """Points whose rate doubles every 3 dB."""
    return [(factor * 2 ** ((value - 30) / 3), value) for value in psnr]


def test_twice_the_rate_is_a_bd_rate_of_100_percent_and_3_db():
    found = curves.compare(curve(25, 28, 31, 34, 37), curve(26, 29, 32, 35, 38, factor=2))
    assert found.rate == pytest.approx(1.0)
    assert found.psnr == pytest.approx(-3.0)
    assert found.reasons == {}


@pytest.mark.parametrize(
    ("anchor", "test", "rate", "psnr"),
    [
        (curve(25, 28, 31), curve(25, 28, 31, 34), "3 of 4", "3 of 4"),
        (curve(25, 28, 31, 34), curve(40, 43, 46, 49), "0 of 4", "0 of 4"),
        (curve(25, 28, 31, 34), curve(33, 36, 39, 42, factor=1e6), "2 of 4", "0 of 4"),
        ([], curve(25, 28, 31, 34), "0 of 4", "0 of 4"),
        (curve(25, 28, 31, 34), [*curve(25, 28, 31), (9.0, 31.0), (10.0, 30.9)], "3 of 4", "3 of 4"),  # no more quality
    ],
)
def test_without_four_points_at_shared_values_there_is_a_reason_and_no_number(anchor, test, rate, psnr):
    found = curves.compare(anchor, test)
    assert (found.rate, found.psnr) == (None, None)
    assert found.reasons["rate"].startswith(f"{rate} points at a shared PSNR")
    assert found.reasons["psnr"].startswith(f"{psnr} points at a shared rate")


def test_without_the_package_the_reason_says_how_to_install_it(monkeypatch):
    monkeypatch.setattr(curves, "_load", lambda: None)
    assert curves.compare(*E137[0][:2]).reasons["rate"] == "pip install 'vidtwin[rates]'"


# A folder with curves.

PSNR = {"x264 medium": 27.0, "VidTwin": 25.0, "MAGVIT-v2": 24.0}


def add_curves(folder: Path) -> None:
    """Give a results folder curves of two models, noise, and a codec of five rows."""
    for name in ("VidTwin", "MAGVIT-v2"):
        path = folder / "rows" / name
        row = parse_json((path / "results.json").read_text())
        row["rate_distortion"] = {"tables": "val", "clips": 64, "bits": [2], "noise": [1.0]}
        clips = rows.read_clips(path, row)
        found = [
            {
                **{key: clip[key] for key in ("name", "start_frame", "num_frames")},
                "curve": kind,
                "level": level,
                **({"bytes": 10 * level, "bpp": rate, "entropy_bpp": 0.9 * rate} if kind == "bits" else {}),
                "mse": 10 ** (-psnr / 10),
                "psnr": psnr + place,
                "ssim": psnr / 50,
            }
            for place, clip in enumerate(clips)
            for kind, level, rate, psnr in [
                *(("bits", bits, 0.02 * 2**i, PSNR[name] + 2 * i) for i, bits in enumerate((2, 3, 4, 6, 8))),
                *(("noise", s, 0, PSNR[name] + 8 - 4 * s) for s in (0.0, 0.5, 1.0)),
            ]
        ]
        levels.write(path, row, found)
        (path / "results.json").write_text(json.dumps(row))
    template = parse_json((folder / "rows" / "mean_colour" / "results.json").read_text())
    clips = rows.read_clips(folder / "rows" / "mean_colour", template)
    for i, crf in enumerate((50, 45, 40, 35, 30)):
        name = f"x264 {crf}"
        coding = {"curve": "x264 medium", "settings": f"libx264, CRF {crf}", "numbers": False}
        own = [clip | {"model": name, "bpp": 0.015 * 2**i, "psnr": PSNR["x264 medium"] + 2 * i} for clip in clips]
        rows.write_row(folder, template | {"name": name, "coding": coding, "bits_per_pixel": 0.015 * 2**i}, own)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = write_results(tmp_path_factory.mktemp("curves") / "r", players=False)
    add_curves(path)
    return path


def lines_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_curves_are_means_over_the_common_clips_by_rising_rate(folder):
    results = rows.read(folder)
    found = {curve.name: curve for curve in curves.read(results)}
    assert list(found) == ["VidTwin", "MAGVIT-v2", "x264 medium"] or list(found) == [
        "MAGVIT-v2",
        "VidTwin",
        "x264 medium",
    ]
    common = len(rows.common_clips(results))
    assert common == 6
    vidtwin = found["VidTwin"].points
    assert [point.label for point in vidtwin] == [f"{bits} bits a number" for bits in (2, 3, 4, 6, 8)]
    assert [point.bpp for point in vidtwin] == pytest.approx([0.02 * 2**i for i in range(5)])
    assert [point.means["psnr"] for point in vidtwin] == pytest.approx(
        [25 + 2 * i + np.mean(range(6)) for i in range(5)]
    )
    assert vidtwin[0].means["entropy_bpp"] == pytest.approx(0.018)
    assert [point.row for point in found["x264 medium"].points] == [f"x264 {crf}" for crf in (50, 45, 40, 35, 30)]
    noise = {curve.name: curve for curve in curves.read_noise(results)}
    assert [point.level for point in noise["VidTwin"].points] == [0, 0.5, 1.0]


def test_a_codec_that_failed_on_some_clips_is_no_point(folder, tmp_path):
    copy = tmp_path / "r"
    shutil.copytree(folder, copy)
    path = copy / "rows" / "x264 40"
    row = parse_json((path / "results.json").read_text())
    clips = rows.read_clips(path, row)
    rows.write_row(copy, row | {"num_clips": len(clips) - 2}, clips[2:])
    results = rows.read(copy)
    (codec,) = [curve for curve in curves.read(results) if curve.kind == curves.CODEC]
    assert [point.row for point in codec.points] == [f"x264 {crf}" for crf in (50, 45, 35, 30)]
    table = curves.points_table(results)
    assert table is not None
    assert table.notes[-1] == "x264 40 has no point: it lacks 2 of the 6 clips that the others have."


def test_files_and_tables_have_the_deltas_to_each_codec(folder):
    text = render.write(folder)
    deltas = {(line["curve"], line["anchor"]): line for line in lines_of(folder / "bd.csv")}
    assert set(deltas) == {(name, "x264 medium") for name in ("VidTwin", "MAGVIT-v2")}
    # The same slope, 2 dB for each doubling: VidTwin is 2.5 - 2 dB above at 4/3 of the rate.
    gap = 25 + 2.5 - 27 - 2 * math.log2(4 / 3)
    found = deltas["VidTwin", "x264 medium"]
    assert float(found["bd_psnr"]) == pytest.approx(gap, abs=1e-9)
    assert float(found["bd_rate"]) == pytest.approx(2 ** (-gap / 2) - 1, abs=1e-9)
    points = lines_of(folder / "curves.csv")
    assert len(points) == 5 + 5 + 5 + 3 + 3
    assert re.search(rf"{re.escape(f'{100 * (2 ** (-gap / 2) - 1):+.1f}')} \|\s+{re.escape(f'{gap:+.2f}')} \|", text)
    assert "BD-rate and BD-PSNR:" in text
    assert "6 bits a number" in text
    assert "fitted on 64 validation clips" in text


def test_a_missing_delta_has_its_reason_in_the_notes(folder, monkeypatch):
    monkeypatch.setattr(curves, "LEAST", 6)
    table = curves.bd_table(rows.read(folder))
    assert table is not None
    assert [cell.text for cell in table.lines[0].cells[:2]] == ["", ""]
    assert [cell.small for cell in table.lines[0].cells[:2]] == ["5 of 6 at PSNR", "5 of 6 at rate"]
    assert table.notes[1].startswith("Each needs 6 points of both curves")
    render.write(folder)
    assert lines_of(folder / "bd.csv")[0]["no_bd_rate"] == "5 of 6 points at a shared PSNR"


def test_deltas_that_were_computed_stay_where_their_package_is_missing(folder, monkeypatch, capsys):
    render.write(folder)
    before = (folder / "bd.csv").read_bytes()
    monkeypatch.setattr(curves, "_load", lambda: None)
    render.write(folder)
    assert (folder / "bd.csv").read_bytes() == before
    assert "bd.csv stays as it is: pip install 'vidtwin[rates]'" in capsys.readouterr().err


def test_plots_and_page_show_them(folder):
    written = curve_plots.write(folder)
    assert [path.name for path in written] == ["rate_distortion.png", "rate_distortion.svg", "noise.png", "noise.svg"]
    svg = (folder / "plots" / "rate_distortion.svg").read_text()
    assert "VidTwin" in svg
    assert "x264 medium" in svg
    assert '<g class="reference"><title>x264 medium: 27.00 dB at 0.015 bits/pixel' in svg
    page = report.render(rows.read(folder))
    assert "rate-distortion: bits per pixel of real bytes" in page
    for title in ("BD-rate and BD-PSNR", "Points of the rate-distortion curves", "Robustness to noise on the latents"):
        assert title in page


def test_codecs_beside_many_models_have_colours_of_their_own():
    """With six models one colour is left, which all codecs would share."""
    point = curves.Point("a", "", 0, {"bpp": 0.1, "psnr": 20.0})
    models = [curves.Curve(name, "trained", [point]) for name in "abcdef"]
    codecs = [curves.Curve(name, curves.CODEC, [point]) for name in ("x264", "x265", "JPEG")]
    results = rows.Results(Path(), {}, "", [{"name": each.name, "kind": each.kind} for each in models], {})
    results.comparison = {"rows": {}}
    styles = [style for curve, style in curve_plots._styles(results, [*models, *codecs]) if curve.kind == curves.CODEC]
    assert len({style["color"] for style in styles}) == 3


def test_a_folder_without_curves_has_none_of_it(tmp_path):
    path = write_results(tmp_path / "r", players=False)
    (path / "curves.csv").write_text("of an earlier sweep")
    text = render.write(path)
    assert "BD-rate" not in text
    assert not (path / "curves.csv").exists()
    assert curve_plots.write(path) == []
    assert curves.tables(rows.read(path)) == []


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
def test_sizes_that_are_none_are_refused_or_no_point(folder, tmp_path, value):
    copy = tmp_path / "r"
    shutil.copytree(folder, copy)
    for name in ("rows/x264 50/clips.csv", "rows/VidTwin/levels.csv"):
        lines = (copy / name).read_text().splitlines()
        cells, place = lines[1].split(","), lines[0].split(",").index("bpp")
        lines[1] = ",".join([*cells[:place], value, *cells[place + 1 :]])
        (copy / name).write_text("\n".join(lines) + "\n")
        if "x264" in name:
            if value != "-1":
                (codec,) = [curve for curve in curves.read(rows.read(copy)) if curve.kind == curves.CODEC]
                assert "x264 50" not in {point.row for point in codec.points}
            curve_plots.write(copy)
    with pytest.raises(UserError, match=f"levels.csv, got none that can be read \\(bpp {value}\\)"):
        curves.read(rows.read(copy))


def test_a_codec_alone_is_a_curve_without_a_model(tmp_path):
    path = write_results(tmp_path / "r", {"mean_colour": ("reference", 1e-6, 13.0)}, players=False, failed=False)
    template: dict[str, Any] = parse_json((path / "rows" / "mean_colour" / "results.json").read_text())
    clips = rows.read_clips(path / "rows" / "mean_colour", template)
    coding = {"curve": "JPEG", "settings": "quality 30", "numbers": False}
    row = template | {"name": "jpeg", "coding": coding, "bits_per_pixel": 0.5}
    rows.write_row(path, row, [clip | {"model": "jpeg", "bpp": 0.5} for clip in clips])
    (found,) = curves.read(rows.read(path))
    assert found.kind == curves.CODEC
    assert curves.bd_table(rows.read(path)) is None
    assert curve_plots.write(path)[0].name == "rate_distortion.png"
