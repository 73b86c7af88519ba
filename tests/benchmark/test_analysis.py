"""The analysis of a sweep: what it finds of models whose latents are known, its files, its resumption."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sweeping
import torch
from sweeping import FRAMES, SIDE, Interruption, NumberedData, Pool, Two, checkpoint, feature_network, sweep
from torch import Tensor

from vidtwin.benchmark import analysis, analysis_plots, analysis_tables, latent_looks, leakage, plots, report, rows
from vidtwin.benchmark.analysis_files import MEASURES, read_all, read_content
from vidtwin.benchmark.clip_content import measure_content
from vidtwin.benchmark.sweep import Entry
from vidtwin.errors import UserError
from vidtwin.metrics import frames
from vidtwin.metrics.fvd import FeatureNetwork, frechet_video_distance
from vidtwin.posteriors import Deterministic, Encoding, Latents


class FirstAndChanges(Two):
    """The first frame's blocks, and the differences of neighbouring frames."""

    latent_names = ("first", "changes")

    def _encode(self, clip: Tensor) -> Encoding:
        grid = Pool._encode(self, clip).mode()["grid"]
        return Encoding(first=self._posterior(grid[:, :, 0]), changes=Deterministic(grid.diff(dim=2)))

    def _decode(self, latents: Latents) -> Tensor:
        some = next(iter(latents.values()))
        first = latents.get("first", some.new_zeros(len(some), 3, *some.shape[-2:]))[:, :, None]
        changes = latents.get("changes", some.new_zeros(len(some), 3, FRAMES - 1, *some.shape[-2:]))
        return Pool._decode(self, {"grid": torch.cat([first, first + changes.cumsum(2)], 2)})

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        channels, length, height, width = Pool._latent_shapes(self, clip_shape)["grid"]
        return {"first": (channels, height, width), "changes": (channels, length - 1, height, width)}


ENTRIES = {"Two": Two, "FirstAndChanges": FirstAndChanges}
CLIPS = 12


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sweep with an analysis of two models with two latents and one with one, in windows."""
    path = tmp_path_factory.mktemp("analysis")
    _run(path / "results", path)
    return path


@contextmanager
def without_pictures() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for module in (plots, analysis_plots):
            patch.setattr(module, "write", lambda folder: [])
        patch.setattr(report, "write", lambda folder: Path(folder) / "report.html")
        yield


def _run(folder: Path, checkpoints: Path, analyzed: bool = True) -> int:
    entries = [Entry(name, checkpoint=_checkpoint(checkpoints, name, model())) for name, model in ENTRIES.items()]
    entries.append(Entry("Pool", checkpoint=_checkpoint(checkpoints, "Pool", Pool(frames=FRAMES // 2)), windows=True))
    with without_pictures():
        return sweep(folder, entries, NumberedData(count=CLIPS), analysis=analyzed).run()


def _checkpoint(folder: Path, name: str, model: Any) -> str:
    path = folder / f"{name}.ckpt"
    return str(path) if path.exists() else checkpoint(path, model=model)


def read(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "rows" / name / "analysis.json").read_text())


def loaded_clips(data: NumberedData | None = None) -> Tensor:
    dataset = (data or NumberedData(count=CLIPS)).dataset("test")
    clips = [torch.from_numpy(dataset.clip(0, index)["clip"]) for index in range(len(dataset))]
    return torch.stack(clips).permute(0, 4, 1, 2, 3).float() / 127.5 - 1


def test_shuffled_frames_change_what_depends_on_their_order_alone(swept):
    latents = read(swept / "results", "Two")["latents"]
    assert latents["still"]["shuffled"] < 1e-5  # a mean over time
    assert latents["moving"]["shuffled"] > 0.5


def test_an_object_is_in_the_first_frame_and_its_motion_in_the_changes(swept):
    latents = read(swept / "results", "FirstAndChanges")["latents"]
    assert latents["first"]["object"] > 0.5
    assert latents["first"]["motion"] == 0  # it starts at the same place
    assert latents["changes"]["object"] < latents["first"]["object"] / 2  # it hides what moves behind it
    assert latents["changes"]["motion"] > 1


def test_changes_are_relative_to_the_spread_over_the_clips(swept):
    clips = loaded_clips()
    model = Two()
    sweeping.calls.clear()
    units = model.encode(clips).mode()["moving"].flatten(1).double()
    order = analysis.shuffle_frames(clips)
    assert sorted(order[0, 0, :, 5, 5].tolist()) == sorted(clips[0, 0, :, 5, 5].tolist())
    change = (model.encode(order).mode()["moving"].flatten(1).double() - units).square().mean()
    expected = (change / units.var(0, correction=0).mean()).sqrt()
    assert read(swept / "results", "Two")["latents"]["moving"]["shuffled"] == pytest.approx(float(expected), rel=1e-4)


def test_units_are_active_by_the_variance_of_their_mean(swept):
    latents = read(swept / "results", "Two")["latents"]
    units = Two().encode(loaded_clips()).mode()["still"].flatten(1).double()
    assert latents["still"]["active"] == pytest.approx(float((units.var(0, correction=0) > 0.01).double().mean()))
    assert latents["still"]["numbers"] == units.shape[1]
    assert latents["still"]["kl"] > 0
    assert read(swept / "results", "FirstAndChanges")["latents"]["changes"]["kl"] is None  # without noise


def test_each_latent_is_decoded_alone_and_each_frame_is_measured(swept):
    clips = loaded_clips()
    model = Two()
    latents = model.encode(clips).mode()
    alone = frames.psnr(model.decode({"still": latents["still"]}), clips).mean()
    found = read(swept / "results", "Two")
    assert found["latents"]["still"]["psnr"] == pytest.approx(float(alone.detach()), abs=1e-3)
    whole = frames.psnr(model.decode(latents), clips)
    assert np.array([clip["frame_psnr"] for clip in found["clips"]]) == pytest.approx(whole.detach().numpy(), abs=1e-3)
    measured = rows.read(swept / "results").clips["Two"]
    assert [np.mean(clip["frame_psnr"]) for clip in found["clips"]] == pytest.approx(
        [clip["psnr"] for clip in measured], abs=1e-3
    )


def test_windows_have_seams_and_one_latent_leaks_into_none(swept):
    found = read(swept / "results", "Pool")
    assert found["seams"] == [FRAMES // 2]
    assert found["leakage"] == []
    assert "psnr" not in found["clips"][0]["latents"]["grid"]
    assert read(swept / "results", "Two")["seams"] == []


def test_leakage_is_probed_both_ways_over_the_videos(swept):
    found = read(swept / "results", "Two")["leakage"]
    assert [(pair["from"], pair["to"]) for pair in found] == [("still", "moving"), ("moving", "still")]
    assert all(pair["sources"] == CLIPS // 2 and pair["clips"] == CLIPS for pair in found)
    latents = {name: value.flatten(1).double().numpy() for name, value in Two().encode(loaded_clips()).mode().items()}
    sources = [f"v{index // 2}.avi" for index in range(CLIPS)]
    expected = leakage.probe(latents["still"], latents["moving"], sources)["r2"]
    assert found[0]["r2"] == pytest.approx(expected, abs=1e-4)


def test_cheap_looks_are_those_of_the_whole_latents(swept):
    found = read(swept / "results", "Two")
    latents = {name: value.double().numpy() for name, value in Two().encode(loaded_clips()).mode().items()}
    for name, value in latents.items():
        each = found["latents"][name]
        assert each["low"] == pytest.approx(latent_looks.share_low_frequencies(value).mean(), rel=1e-4)
        whole = latent_looks.describe_channels([latent_looks.sum_channels(value)])
        assert each["channels"]["eigenvalues"] == pytest.approx(whole["eigenvalues"], rel=1e-4)
        assert each["probe"]["accuracy"] is None  # all clips have one class
    assert found["latents"]["still"]["white"] == latent_looks.share_of_noise((3, 8, 8))


def test_tfvd_is_that_of_decoded_midpoints_of_neighbouring_clips(tmp_path):
    entry = Entry("Pool", checkpoint=checkpoint(tmp_path / "pool.ckpt", scale=0.5))
    network = feature_network(tmp_path / "i3d.pt")
    data = NumberedData(count=8, num_frames=10)
    with without_pictures():
        sweep(tmp_path / "r", [entry], data, analysis=True, references=[], fvd=network).run()
    found = read(tmp_path / "r", "Pool")["tfvd"]
    clips = loaded_clips(data)
    model = Pool()
    model.scale.data.fill_(0.5)
    with torch.no_grad():
        grid = model.encode(clips).mode()["grid"]
        middle = model.decode({"grid": (grid[0::2] + grid[1::2]) / 2})
    i3d = FeatureNetwork(network.path, network.sha256)
    expected = frechet_video_distance(i3d(clips[0::2]), i3d(middle))
    assert found["value"] == pytest.approx(expected["value"], rel=1e-3)
    assert found["num_clips"] == 4  # two clips of each video
    (looks,) = [table for table in analysis_tables.build(rows.read(tmp_path / "r")) if table.id == "looks"]
    assert looks.lines[0].cells[[column.key for column in looks.columns].index("tfvd")].text == f"{found['value']:.1f}"


def test_content_is_of_each_clip_once(swept):
    folder = swept / "results"
    content = read_content(folder, rows.read(folder).protocol_hash)
    data = NumberedData(count=CLIPS).dataset("test")
    assert [rows.key_of(clip) for clip in content] == [data.identity(index) for index in range(CLIPS)]
    assert {key: content[3][key] for key in MEASURES} == pytest.approx(measure_content(data.clip(0, 3)["clip"]))
    assert not (folder / "content").exists()
    assert not (folder / "rows" / "Two" / "analysis").exists()
    assert not (folder / "rows" / "mean_colour" / "analysis.json").exists()


def test_frames_and_latents_alone_are_those_of_the_common_clips(swept):
    results = rows.read(swept / "results")
    lost = results.clips["Two"].pop(3)
    for each in read_all(results).values():
        assert len(each["clips"]) == CLIPS - 1
        assert rows.key_of(lost) not in map(rows.key_of, each["clips"])
    results.clips["Two"] = []
    assert read_all(results) == {}


def test_the_page_has_its_tables_and_plots(swept):
    results = rows.read(swept / "results")
    tables = {table.id: table for table in analysis_tables.build(results)}
    assert set(tables) == {"content", "frames", "latents", "leakage", "looks"}
    assert [line.name for line in tables["latents"].lines].count("Two") == 2
    assert "Pool" not in {line.name for line in tables["latents"].lines}
    assert {(line.name, line.cells[0].text) for line in tables["content"].lines} >= {
        ("Two", "all latents"), ("Two", "still"), ("Two", "moving"), ("Pool", "all latents")
    }  # fmt: skip
    labels = [column.label for column in tables["content"].columns]
    assert labels == ["Decoded", "Metric", "Motion", "Change", "Texture"]  # no clip has a cut
    assert {len(line.cells) for line in tables["content"].lines} == {len(labels)}
    assert tables["content"].notes[-1] == "All clips have the same number of cuts, which correlates with nothing."
    seams = {line.name: line.cells[-1].text for line in tables["frames"].lines}
    assert seams["Two"] == ""
    assert seams["Pool"] != ""
    page = report.render(results)
    assert "What each latent carries" in page
    assert "PSNR by frame" in page
    ids = re.findall(r' id="([^"]+)"', page)
    assert len(ids) == len(set(ids))
    assert any(name.startswith("analysis1-") for name in ids)
    written = analysis_plots.write(swept / "results")
    assert {path.name for path in written} == {"content.png", "content.svg", "frames.png", "frames.svg"}


def test_a_complete_analysis_is_kept_and_a_damaged_one_or_that_of_another_row_is_made_again(swept, caplog):
    folder = swept / "results"
    sweeping.calls.clear()
    assert _run(folder, swept) == 0
    assert sweeping.calls == []
    path, content = folder / "rows" / "Two" / "analysis.json", folder / "content.csv"
    text, lines = path.read_text(), content.read_text()
    for changed in (text.replace('"row_identity": "', '"row_identity": "0'), text[:80]):
        path.write_text(changed)
        content.write_text(lines.replace("motion", "notion"))
        tables = {table.id: table for table in analysis_tables.build(rows.read(folder))}
        assert {line.name for line in tables["latents"].lines} == {"FirstAndChanges"}
        assert "content" not in tables
        assert _run(folder, swept) == 0
        assert (path.read_text(), content.read_text()) == (text, lines)
    assert "Two has no analysis: Expected JSON in" in caplog.text
    assert "Expected a line for each clip in" in caplog.text


def test_an_interrupted_analysis_continues_and_ends_with_the_same_bytes(swept, tmp_path, monkeypatch):
    assert _run(tmp_path / "r", swept, analyzed=False) == 0
    assert not (tmp_path / "r" / "content.csv").exists()
    monkeypatch.setattr(Interruption, "after", 9)
    with pytest.raises(KeyboardInterrupt):
        _run(tmp_path / "r", swept)
    parts = list((tmp_path / "r" / "rows" / "Two" / "analysis").glob("*.json"))
    assert 0 < len(parts) < CLIPS // 2
    monkeypatch.setattr(Interruption, "after", None)
    sweeping.calls.clear()
    assert _run(tmp_path / "r", swept) == 0
    assert len(sweeping.calls) == 4 * (3 * CLIPS // 2 - len(parts))
    for name in ("rows/Two/analysis.json", "rows/Pool/analysis.json", "content.csv"):
        assert (tmp_path / "r" / name).read_bytes() == (swept / "results" / name).read_bytes()


def test_a_clip_on_which_the_model_fails_is_left_out_until_it_is_measured(tmp_path, monkeypatch):
    model = Two(raise_on=[3])
    entry = Entry("Two", checkpoint=checkpoint(tmp_path / "two.ckpt", model=model))

    def clips() -> list[tuple[str, int]]:
        with without_pictures():
            sweep(tmp_path / "r", [entry], analysis=True, references=[]).run()
        return [(clip["name"], clip["start_frame"]) for clip in read(tmp_path / "r", "Two")["clips"]]

    every = [(f"v{index // 2}.avi", index % 2 * FRAMES) for index in range(6)]
    assert clips() == [key for key in every if key != ("v1.avi", FRAMES)]
    monkeypatch.setattr(sweeping, "numbers_of", lambda clip: [])  # it fails on no number any more
    assert clips() == every


class Whole(Two):
    """It says that it decodes latents alone, and does not."""

    def _decode(self, latents: Latents) -> Tensor:
        if len(latents) < 2:
            raise RuntimeError("a latent\nis missing")
        return super()._decode(latents)


def test_a_model_that_can_not_be_analyzed_is_logged_and_fails_the_sweep_but_keeps_its_row(tmp_path, caplog):
    entries = [Entry(name, checkpoint=checkpoint(tmp_path / f"{name}.ckpt", model=model))
               for name, model in {"Whole": Whole(), "Two": Two()}.items()]  # fmt: skip
    with without_pictures():
        assert sweep(tmp_path / "r", entries, analysis=True, references=[]).run() == 1
    assert "no analysis of Whole: RuntimeError: a latent is missing" in caplog.text
    assert not (tmp_path / "r" / "rows" / "Whole" / "analysis.json").exists()
    assert (tmp_path / "r" / "rows" / "Two" / "analysis.json").exists()
    assert rows.read(tmp_path / "r").clips["Whole"]


def test_parts_that_a_kill_has_left_beside_a_complete_analysis_are_removed(swept):
    left = [swept / "results" / "content", swept / "results" / "rows" / "Two" / "analysis"]
    for folder in left:
        folder.mkdir()
        (folder / "000000.json").write_text("{}")
    assert _run(swept / "results", swept) == 0
    assert not any(folder.exists() for folder in left)


def test_clips_of_several_sizes_are_refused(tmp_path):
    data = NumberedData()
    data.settings = type(data.settings)(**{**vars(data.settings), "resolution": None})
    with pytest.raises(UserError, match="Expected clips of one size for analysis"):
        sweep(tmp_path, [], data, analysis=True).run()
    assert not list(tmp_path.iterdir())


def test_the_square_moves_from_the_left_to_the_right():
    clip = torch.full((2, 3, 5, 16, 24), -0.2)
    clip[1] = 0.5
    still, moving = analysis.draw_square(clip, False), analysis.draw_square(clip, True)
    assert (still[:, :, 0] == moving[:, :, 0]).all()
    assert (still == still[:, :, :1]).all()
    columns = [(moving[0, 0, time, 8] == 1).nonzero().flatten().tolist() for time in range(5)]
    assert columns == [list(range(left, left + 4)) for left in (0, 5, 10, 15, 20)]
    assert (moving[1] == -1).sum() == 3 * 5 * 16  # black on a light clip
    assert (moving != clip).sum() == 2 * 3 * 5 * 16
    assert SIDE // 4 == 8
