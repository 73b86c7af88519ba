"""Intervals, pairs and the spread over seeds, against scipy, statsmodels and simulated clips."""

import itertools
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from benchmark import fixture_results
from scipy import stats

from vidtwin.benchmark import report, rows, statistics, statistics_tables
from vidtwin.cli import main
from vidtwin.listing import source_of


def by_video(values: list[float], clips: int = 1) -> list[statistics.Unit]:
    return [(f"{place}.avi", 1.0, value) for place, value in enumerate(values) for _ in range(clips)]


def drawn_means(*lists: list[statistics.Unit]) -> Any:
    sources = statistics.list_sources(lists[0])
    return statistics.draw_means(np.stack([statistics.sum_by_source(units, sources) for units in lists]))


def test_a_source_is_a_group_of_ucf_101_or_a_video():
    names = ["Archery/v_Archery_g01_c01.avi", "v_Archery_g01_c02", "v_HandstandPushups_g01_c02.avi"]
    assert [source_of(name) for name in names] == [
        "v_Archery_g01", "v_Archery_g01", "v_HandstandPushups_g01"
    ]  # fmt: skip
    for name in ("bikes.mp4", "v_dog_c01.avi", "scenes/g01_c02.mp4", "v_Archery_g01_c01_small.avi"):
        assert source_of(name) == name


def test_the_interval_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(2).gamma(2, 1, 40)
    low, high = statistics.interval(drawn_means(by_video(values.tolist()))[:, 0])
    expected = stats.bootstrap([values], np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (low, high) == pytest.approx(tuple(expected), abs=0.03)


def test_weights_count_as_in_the_mean():
    units = [("v", 3.0, 1.0), ("v", 1.0, 5.0), ("w", 4.0, 2.0)]
    assert drawn_means(units) == pytest.approx(np.full((statistics.DRAWS, 1), 2.0))


def test_a_source_of_many_clips_is_one_source():
    """Two sources of many clips: each mean of one source alone has a quarter of the draws."""
    units: list[statistics.Unit] = [(f"v_a_g01_c0{i % 2}.avi", 1, 20.0 + i % 2) for i in range(50)]
    units += [("b", 3, 30.0) for _ in range(50)]
    found = statistics.bound_means({"all": {"psnr": units}, "one": {"psnr": units[:50]}})
    assert found["all"]["psnr"] == {"low": 20.5, "high": 30.0, "sources": 2}
    assert found["one"]["psnr"]["low"] is None


def test_draws_are_the_same_in_one_batch_and_in_several(monkeypatch):
    units = by_video(np.random.default_rng(3).normal(size=30).tolist())
    whole = drawn_means(units)
    monkeypatch.setattr(statistics, "_NUMBERS_AT_ONCE", 30 * 64)
    assert (drawn_means(units) == whole).all()


def test_intervals_over_sources_cover_and_those_over_clips_do_not(monkeypatch):
    # 30 sources of 8 clips; the standard deviation is 1 among sources and 0.5 within. Of 95% intervals of 200 tests,
    # 90% to 98% is within three standard errors of what 30 sources give. Clips alone understate the variance by
    # 1.25 / 8 / (1 + 0.25 / 8) = 0.15, so their intervals reach 0.39 of the width and cover by 55%.
    monkeypatch.setattr(statistics, "DRAWS", 400)
    random = np.random.default_rng(4)
    covered = {"sources": 0, "clips": 0}
    for _ in range(200):
        values = random.normal(size=(30, 1)) + 0.5 * random.normal(size=(30, 8))
        lists = {
            "sources": [(f"v_A_g{s:02d}_c{c:02d}.avi", 1.0, values[s, c]) for s in range(30) for c in range(8)],
            "clips": by_video(values.ravel().tolist()),
        }
        for kind, units in lists.items():
            low, high = statistics.interval(drawn_means(units)[:, 0])
            covered[kind] += low <= 0 <= high
    assert 180 <= covered["sources"] <= 196
    assert covered["clips"] < 140


def test_holms_correction_is_that_of_statsmodels():
    # statsmodels 0.15.0: multipletests(p, method="holm")[1]
    p = [0.0201, 0.5, 0.0009, 0.31, 0.0009, 0.072, 0.0145, 1.0, 0.0038, 0.26]
    expected = [0.1206, 1.0, 0.009, 1.0, 0.009, 0.36, 0.1015, 1.0, 0.0304, 1.0]
    assert statistics.adjust_by_holm(p) == pytest.approx(expected)
    assert statistics.adjust_by_holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert statistics.adjust_by_holm([]) == []


# --- a folder of results ---

VIDEOS = [f"v_{name}_g{group:02d}_c{clip:02d}.avi" for name in ("Diving", "Archery")
          for group in range(1, 7) for clip in (1, 2)]  # fmt: skip
A, B, C = "VidTwin seed 0", "VidTwin seed 1", "CMD"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three trained models and a reference on 24 clips of 12 groups; A beats C by 1 dB on all groups but one."""
    path = tmp_path_factory.mktemp("results")
    random = np.random.default_rng(5)
    base = random.normal(25, 4, len(VIDEOS))
    gap = np.where([name.startswith("v_Diving_g03") for name in VIDEOS], 0.5, -1.0) + random.normal(0, 0.1, len(VIDEOS))
    psnr = {A: base, B: base + random.normal(0, 0.5, len(VIDEOS)), C: base + gap, "mean_colour": base - 9}
    described = fixture_results.settings()
    digest = fixture_results.protocol.write(described, path)
    for name, values in psnr.items():
        kind = "reference" if name == "mean_colour" else "trained"
        pairs = zip(VIDEOS, values, strict=True)
        clips = [fixture_results._clip(name, video, float(value), False) for video, value in pairs]
        row = fixture_results._row(name, kind, 0.01, clips, described, digest, rfvd=False)
        if "seed" in name:
            row["seed_of"] = "VidTwin"
        rows.write_row(path, row | {"windows": None}, clips)
    return path


@pytest.fixture(scope="module")
def found(folder: Path) -> dict[str, Any]:
    return statistics.describe(rows.read(folder))


def psnr_of(folder: Path, name: str) -> dict[str, list[float]]:
    """PSNR of a row's clips by group, read from the file without the code under test."""
    lines = (folder / "rows" / name / "clips.csv").read_text().splitlines()
    place, groups = lines[0].split(",").index("psnr"), {}
    for line in lines[1:]:
        cells = line.split(",")
        groups.setdefault(cells[1].rsplit("_c", 1)[0], []).append(float(cells[place]))
    return groups


def test_pairs_are_counted_by_group_and_tested(folder, found):
    (pair,) = [
        each for each in found["pairs"] if each["metric"] == "psnr" and {each["first"], each["second"]} == {A, C}
    ]
    one, other = (psnr_of(folder, name) for name in (A, C))
    differences = [np.mean(one[group]) - np.mean(other[group]) for group in one]
    assert (pair["first"], pair["better"], pair["worse"], pair["sources"]) == (A, 11, 1, 12)
    assert pair["difference"] == pytest.approx(np.mean(differences))
    assert 0 < pair["low"] < pair["difference"] < pair["high"]
    assert pair["p"] == pytest.approx(stats.wilcoxon(differences, method="exact").pvalue)
    ends = stats.bootstrap([differences], np.mean, n_resamples=20_000, method="percentile", rng=1).confidence_interval
    assert (pair["low"], pair["high"]) == pytest.approx(tuple(ends), abs=0.05)


def test_every_two_trained_rows_are_a_pair_of_each_metric_and_corrected_together(found):
    for key, higher in (("psnr", True), ("flicker", False)):
        pairs = [each for each in found["pairs"] if each["metric"] == key]
        named = [{each["first"], each["second"]} for each in pairs]
        assert sorted(map(sorted, named)) == sorted(map(sorted, [(A, C), (B, C)]))  # A and B are seeds of one model
        assert [each["p_holm"] for each in pairs] == statistics.adjust_by_holm([each["p"] for each in pairs])
        assert all((each["difference"] >= 0) == higher for each in pairs)  # the first is the better one


def test_a_row_against_itself_differs_by_nothing(folder):
    results = rows.read(folder)
    results.clips[C] = results.clips[A]
    units = {name: statistics.units_of(results, name) for name in (A, B, C)}
    (pair,) = [each for each in statistics.compare_pairs(results, units) if each["metric"] == "psnr"
               and {each["first"], each["second"]} == {A, C}]  # fmt: skip
    assert (pair["p"], pair["low"], pair["high"], pair["better"]) == (1.0, 0.0, 0.0, 0)


def test_seeds_are_apart_from_the_intervals(folder, found):
    means = [np.mean(list(itertools.chain(*psnr_of(folder, name).values()))) for name in (A, B)]
    assert set(found["seeds"]) == {"VidTwin"}
    assert set(found["seeds"]["VidTwin"]["rows"]) == {A, B}
    psnr = found["seeds"]["VidTwin"]["metrics"]["psnr"]
    assert psnr["mean"] == pytest.approx(np.mean(means))
    assert psnr["std"] == pytest.approx(abs(means[0] - means[1]) / math.sqrt(2))


def test_worst_clips_are_those_of_the_lowest_psnr(folder, found):
    values = sorted(itertools.chain(*psnr_of(folder, C).values()))
    assert [clip["psnr"] for clip in found["worst_clips"][C]] == pytest.approx(values[: statistics.WORST])


def test_numbers_that_are_not_finite_and_single_sources_have_no_interval(folder):
    results = rows.read(folder)
    results.clips[A] = [clip | {"psnr": math.inf} for clip in results.clips[A]]
    ends = statistics.describe(results)
    assert ends["rows"][A]["psnr"] == {"low": None, "high": None, "sources": 12}
    assert A not in {each["first"] for each in ends["pairs"] if each["metric"] == "psnr"}
    results.clips = {name: clips[:1] for name, clips in results.clips.items()}
    ends = statistics.describe(results)
    assert ends["rows"][B]["psnr"]["low"] is None
    assert ends["pairs"] == []


def test_table_csv_comparison_and_page_have_the_same_numbers(folder, found, monkeypatch):
    monkeypatch.setattr("vidtwin.benchmark.plots.write", lambda folder: [])
    monkeypatch.setattr("vidtwin.benchmark.plots.drawings", lambda results: [])
    assert main(["report", str(folder)]) == 0
    kept = json.loads((folder / "comparison.json").read_text())["statistics"]
    assert kept == json.loads(json.dumps(found))
    ends = kept["rows"][A]["psnr"]
    lines = (folder / "table.csv").read_text().splitlines()
    columns = lines[0].split(",")
    (line,) = [dict(zip(columns, each.split(","), strict=False)) for each in lines[1:] if each.startswith(f"{A},")]
    assert (float(line["psnr_low"]), float(line["psnr_high"])) == (ends["low"], ends["high"])
    shown = f"{ends['low']:.2f} to {ends['high']:.2f}"
    table = (folder / "table.md").read_text()
    assert shown in table
    assert "12 groups of UCF-101 of the 24 clips" in table
    assert "With fewer than 20 sources such intervals are too narrow." in table
    page = (folder / "report.html").read_text()
    assert shown in page
    assert "11 of 12" in page
    assert 'id="seeds"' in page
    assert found["worst_clips"][C][0]["name"] in page
    assert rows.read(folder).comparison == {k: v for k, v in json.loads(
        (folder / "comparison.json").read_text()).items() if k != "statistics"}  # fmt: skip


@pytest.mark.parametrize(
    ("low", "high", "p", "verdict"),
    [(-0.1, 0.2, 0.01, "may be chance"), (0.1, 0.2, 0.14, "by the interval alone"), (0.1, 0.2, 0.04, "differ")],
)
def test_a_verdict_says_whether_interval_and_test_agree(folder, found, low, high, p, verdict):
    pair = found["pairs"][0] | {"low": low, "high": high, "p_holm": p}
    table = statistics_tables.pair_table(rows.read(folder), found | {"pairs": [pair]})
    assert table is not None
    assert table.lines[0].cells[-1].text == verdict
    assert table.notes[-1].endswith("of 12 none is below 0.000488.")
    many = statistics_tables.pair_table(rows.read(folder), found | {"pairs": [pair], "num_sources": 20})
    assert many is not None
    assert many.notes == table.notes[:-1]  # of 20 the least is below all that are shown


def test_a_folder_of_one_model_has_intervals_but_no_pairs(folder, tmp_path):
    results = fixture_results.write_results(tmp_path, {"VidTwin": ("trained", 0.01, 28.0)}, failed=False)
    tables = {table.id: table for table in statistics_tables.build(rows.read(results))}
    assert set(tables) == {"intervals", "worst"}
    assert "videos of the 7 clips" in tables["intervals"].notes[0]
    assert "Spread over seeds" not in report.render(rows.read(results))
