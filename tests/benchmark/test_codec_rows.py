"""Codecs in a sweep: real bytes per clip, references that take nobody's place, one row of a curve in the players."""

import json
from pathlib import Path
from typing import Any

import av
import pytest
from sweeping import FRAMES, SIDE, NumberedData, checkpoint, contents, sweep

from vidtwin.baselines.codecs import JPEG, X264
from vidtwin.benchmark import plots, report, rows, summary
from vidtwin.benchmark.sweep import Entry

CODECS = "vidtwin.baselines.codecs"


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plots and report are tested elsewhere."""
    monkeypatch.setattr(plots, "write", lambda folder: [])
    monkeypatch.setattr(report, "write", lambda folder: Path(folder) / "report.html")


def entries() -> list[Entry]:
    return [
        Entry("x264 20", model=f"{CODECS}.X264", arguments={"crf": 20}),
        Entry("x264 30", model=f"{CODECS}.X264", arguments={"crf": 30}),
        Entry("x264 45", model=f"{CODECS}.X264", arguments={"crf": 45}),
        Entry("jpeg", model=f"{CODECS}.JPEG", arguments={"quality": 30}),
    ]


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep of four codecs and two trained models, with players."""
    folder = tmp_path_factory.mktemp("codecs")
    patch = pytest.MonkeyPatch()
    patch.setattr(plots, "write", lambda folder: [])
    patch.setattr(report, "write", lambda folder: Path(folder) / "report.html")
    models = [Entry(f"Pool {s}", checkpoint=checkpoint(folder / f"{s}.ckpt", s)) for s in (0.9, 0.5)]
    assert sweep(folder / "r", [*models, *entries()], players=1).run() == 0
    patch.undo()
    return folder / "r"


def row(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "rows" / name / "results.json").read_text())


def frames_of(index: int) -> Any:
    return NumberedData().dataset("test").clip(0, index)["clip"]


def test_a_clips_bits_are_those_of_its_stream(measured):
    for name, codec in (("x264 30", X264(30)), ("jpeg", JPEG(30))):
        found = row(measured, name)
        clips = rows.read_clips(measured / "rows" / name, found)
        sizes = [len(codec.compress(frames_of(index))) for index in range(6)]
        pixels = FRAMES * SIDE * SIDE
        assert [clip["bpp"] for clip in clips] == pytest.approx([8 * size / pixels for size in sizes], rel=1e-6)
        assert found["bits_per_pixel"] == pytest.approx(8 * sum(sizes) / 6 / pixels)
        assert found["metrics"]["bpp"]["mean"] == pytest.approx(found["bits_per_pixel"])
        assert found["compression_rate"] == pytest.approx(sum(sizes) / 6 / (3 * pixels))
        assert found["kind"] == "reference"
        assert found["coding"]["curve"] == codec.coding.curve
        assert "bpp" not in row(measured, "Pool 0.9")["metrics"]


def test_a_codec_of_more_bits_takes_no_models_place(measured):
    results = rows.read(measured)
    table = summary.quality_table(results)
    places = {line.name: line.cells[[c.key for c in table.columns].index("psnr")].mark for line in table.lines}
    psnr = {name: summary.mean(results, name, "psnr") for name in places}
    assert psnr["x264 20"] > psnr["Pool 0.9"] > psnr["Pool 0.5"]
    assert places["Pool 0.9"] == summary.BEST
    notes = {line.name: line.cells[-1].text for line in table.lines}
    assert "libx264, preset medium, CRF 20, GOP 250, yuv420p" in notes["x264 20"]


def test_players_have_one_row_of_a_curve(measured):
    views = json.loads((measured / "players" / "players.json").read_text())["clips"][0]["views"]
    shown = {view["model"] for view in views if view["model"]}
    assert {name for name in shown if "x264" in name or name == "jpeg"} == {"x264 30", "jpeg"}
    assert {"Pool 0.9", "Pool 0.5"} <= shown


def test_numbers_do_not_depend_on_what_is_in_a_chunk_and_a_second_run_measures_nothing(tmp_path, measured, monkeypatch):
    alone = sweep(tmp_path / "r", entries(), NumberedData(eval_batch_size=1))
    assert alone.run() == 0
    for name in ("x264 30", "jpeg"):
        files = [folder / "rows" / name / "clips.csv" for folder in (measured, tmp_path / "r")]
        assert files[0].read_text() == files[1].read_text()
    before = contents(tmp_path / "r")
    monkeypatch.setattr(X264, "compress", lambda *_: pytest.fail("was measured again"))
    assert alone.run() == 0
    assert contents(tmp_path / "r") == before


def test_a_row_whose_encoder_is_missing_fails_by_its_name(tmp_path, monkeypatch):
    known = av.Codec

    def lacking(name: str, mode: str) -> Any:
        if name == "libsvtav1":
            raise ValueError(name)
        return known(name, mode)

    monkeypatch.setattr(av, "Codec", lacking)
    added = [Entry("AV1", model=f"{CODECS}.SVTAV1"), Entry("jpeg", model=f"{CODECS}.JPEG")]
    assert sweep(tmp_path / "r", added, references=[]).run() == 1
    assert "Expected libsvtav1 in PyAV's FFmpeg for SVT-AV1" in row(tmp_path / "r", "AV1")["error"]
    assert row(tmp_path / "r", "jpeg")["kind"] == "reference"


def test_costs_of_codecs_are_not_measured(tmp_path):
    assert sweep(tmp_path / "r", entries()[-1:], references=[], cost=True, downstream=True).run() == 0
    assert row(tmp_path / "r", "jpeg")["cost"] is None


@pytest.mark.parametrize(
    ("entry", "reason"),
    [
        (Entry("a", model="vidtwin.baselines.codecs.Nothing"), "Nothing"),
        (Entry("a", model="magvit2", config="x.yaml"), "a config or a model for a, got both"),
        (Entry("a", model=f"{CODECS}.JPEG", arguments={"quality": 0}), "quality of JPEG from 1 to 95"),
        (Entry("a", model=f"{CODECS}.JPEG", arguments={"qual": 3}), "qual"),
    ],
)
def test_a_wrong_entry_is_a_row_with_the_reason(tmp_path, entry, reason):
    assert sweep(tmp_path / "r", [entry], references=["mean_colour"]).run() == 1
    assert reason in row(tmp_path / "r", "a")["error"]
