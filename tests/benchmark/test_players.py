"""Clips that the report plays: which ones, and that the pictures are the models' own."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from sweeping import FRAMES, SIDE, NumberedData, Pool, Two, checkpoint, sweep

from vidtwin.benchmark import players, plots, report, rows
from vidtwin.benchmark.sweep import Entry

CODEC = 6  # mean absolute difference that WebP makes of smooth pictures, of 255


def results(psnr: dict[str, list[float]], kinds: dict[str, str]) -> rows.Results:
    listed = [{"name": name, "kind": kind} for name, kind in kinds.items()]
    clips = {
        name: [{"name": f"{i}.avi", "start_frame": 0, "psnr": value} for i, value in enumerate(values)]
        for name, values in psnr.items()
    }
    return rows.Results(Path(), {}, "", listed, clips)


def chosen(found: rows.Results, number: int) -> list[tuple[str, str]]:
    return [(clip["name"], clip["why"]) for clip in players.choose(found, number)]


def test_the_worst_and_the_median_clips_are_those_by_the_mean_over_trained_models():
    psnr = {"a": [30, 10, 25, 28, 40.0], "b": [30, 12, 23, 20, 20.0], "raw": [0, 90, 90, 90, 90.0]}
    found = results(psnr, {"a": "trained", "b": "trained", "raw": "untrained"})
    # Means: 30, 11, 24, 24, 30; equal ones in the order of their names.
    assert chosen(found, 1) == [("1.avi", "worst"), ("3.avi", "median")]
    assert chosen(found, 2) == [("1.avi", "worst"), ("2.avi", "worst"), ("3.avi", "median"), ("0.avi", "median")]


def test_no_clip_is_chosen_twice_and_few_clips_are_all():
    found = results({"a": [3, 2, 1.0]}, {"a": "trained"})
    assert chosen(found, 5) == [("2.avi", "worst"), ("1.avi", "worst"), ("0.avi", "worst")]
    assert chosen(found, 0) == []


def test_further_clips_are_drawn_by_the_seed_whatever_their_psnr_and_none_is_kept_twice():
    found = results({"a": [float(i) for i in range(8)]}, {"a": "trained"})
    listed = players.choose(found, 1, 3, seed=5)
    drawn = {clip["name"] for clip in listed if "random" in clip["why"]}
    assert len(drawn) == 3
    assert len({clip["name"] for clip in listed}) == len(listed)
    assert drawn == {clip["name"] for clip in players.choose(found, 0, 3, seed=5)}
    groups = results({"a": [1.0] * 6}, {"a": "trained"})
    for place, clip in enumerate(groups.clips["a"]):
        clip["name"] = f"v_Archery_g{place // 2:02d}_c0{place % 2}.avi"
    assert len({clip["name"][:13] for clip in players.choose(groups, 0, 3)}) == 3  # each of another recording
    more = [players.choose(found, 0, 3, seed=seed) for seed in range(40)]
    assert {clip["name"] for chosen in more for clip in chosen} == {f"{i}.avi" for i in range(8)}


def test_without_trained_models_all_count_and_only_common_clips_are_chosen():
    found = results({"a": [3, 2, 1.0], "b": [9, 1.0]}, {"a": "untrained", "b": "reference", "c": "failed"})
    assert chosen(found, 1) == [("1.avi", "worst"), ("0.avi", "median")]


def frames_of(folder: Path, view: dict[str, str]) -> np.ndarray:
    """(T, H, W, 3) of a strip."""
    image = np.asarray(Image.open(folder / view["file"]).convert("RGB"))
    return image.reshape(FRAMES, -1, image.shape[1], 3)


def as_pixels(clip: torch.Tensor) -> np.ndarray:
    """(1, 3, T, H, W) in [-1, 1] → 0–255, enlarged to the 64 px of a player."""
    frames = ((clip[0].clamp(-1, 1) + 1) * 127.5).round().permute(1, 2, 3, 0).detach().numpy()
    return frames.repeat(64 // SIDE, 1).repeat(64 // SIDE, 2)


@pytest.fixture
def played(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, list[Entry]]:
    monkeypatch.setattr(plots, "write", lambda folder: [])
    monkeypatch.setattr(report, "write", lambda folder: Path(folder) / "report.html")
    two = Two()
    entries = [
        Entry("a", checkpoint=checkpoint(tmp_path / "a.ckpt", 0.8)),
        Entry("two", checkpoint=checkpoint(tmp_path / "two.ckpt", 0.9, model=two)),
    ]
    assert sweep(tmp_path / "r", entries, players=1, references=[]).run() == 0
    return tmp_path / "r", entries


def test_pictures_have_the_side_that_is_asked_for(tmp_path):
    clip = torch.zeros(1, 3, 2, 96, 96)
    for side, expected in ((160, 96), (64, 64)):
        writer = players.Writer(tmp_path, [{"name": "a", "start_frame": 0, "why": "random"}], [clip], 8.0, side)
        writer.finish("")
        assert Image.open(tmp_path / "players" / "0" / "0.webp").size == (expected, 2 * expected)


def test_the_pictures_are_the_clips_their_reconstructions_their_errors_and_what_latents_give_alone(played):
    folder, _ = played
    content = json.loads((folder / "players" / "players.json").read_text())
    assert (content["fps"], content["num_frames"], content["size"]) == (8.0, FRAMES, 64)
    assert [clip["why"] for clip in content["clips"]] == ["worst", "median"]
    one, two = Pool(), Two()
    one.scale.data.fill_(0.8)
    for clip in content["clips"]:
        index = int(clip["name"][1:-4]) * 2 + clip["start_frame"] // FRAMES
        source = torch.from_numpy(NumberedData().dataset("test").clip(0, index)["clip"])
        source = source.permute(3, 0, 1, 2)[None].float() / 127.5 - 1
        target = as_pixels(source)
        latents = two.encode(source).mode()
        made = {
            "a": as_pixels(one.decode(one.encode(source).mode(), FRAMES)),
            "two": as_pixels(two.decode(latents, FRAMES)),
        }
        expected = {
            "input": target,
            "a": made["a"],
            "a error x4": np.clip(4 * np.abs(made["a"] - target), 0, 255),
            "two": made["two"],
            "two error x4": np.clip(4 * np.abs(made["two"] - target), 0, 255),
            "two still only": as_pixels(two.decode({"still": latents["still"]}, FRAMES)),
            "two moving only": as_pixels(two.decode({"moving": latents["moving"]}, FRAMES)),
        }
        assert [view["title"] for view in clip["views"]] == list(expected)
        assert [view["kind"] for view in clip["views"]][3:] == ["reconstruction", "error", "partial", "partial"]
        for view in clip["views"]:
            shown, wanted = frames_of(folder, view).astype(float), expected[view["title"]]
            difference = np.abs(shown - wanted).mean()
            assert difference < (2 if view["kind"] == "error" else 1) * CODEC, view["title"]
            if view["kind"] == "error":
                assert difference < np.abs(shown - wanted / 2).mean()  # amplified by 4, not by 2
    # The codec is far from what tells one picture from another.
    assert np.abs(expected["a"] - expected["two"]).mean() > CODEC or np.abs(expected["a"] - target).mean() > CODEC


def test_a_run_that_changes_nothing_leaves_the_pictures_alone(played):
    folder, entries = played
    before = {path: path.stat().st_mtime_ns for path in (folder / "players").rglob("*")}
    assert sweep(folder, entries, players=1, references=[]).run() == 0
    assert {path: path.stat().st_mtime_ns for path in (folder / "players").rglob("*")} == before


def test_drawn_clips_that_are_kept_already_are_marked_as_drawn(played):
    folder, entries = played
    assert sweep(folder, entries, players=3, references=[]).run() == 0  # all six clips
    assert sweep(folder, entries, players=3, random_players=2, references=[]).run() == 0
    content = json.loads((folder / "players" / "players.json").read_text())
    assert sum("random" in clip["why"] for clip in content["clips"]) == 2


def test_another_checkpoint_makes_other_pictures_and_leaves_none_of_the_old_ones(played, tmp_path):
    folder, entries = played
    view = json.loads((folder / "players" / "players.json").read_text())["clips"][0]["views"][1]
    before = frames_of(folder, view)
    checkpoint(tmp_path / "a.ckpt", 0.1)
    assert sweep(folder, entries[:1], players=1, references=[]).run() == 0
    content = json.loads((folder / "players" / "players.json").read_text())
    listed = {view["file"] for clip in content["clips"] for view in clip["views"]}
    assert {str(path.relative_to(folder)) for path in (folder / "players").rglob("*.webp")} == listed
    assert np.abs(frames_of(folder, view) - before.astype(float)).mean() > CODEC
