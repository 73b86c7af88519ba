"""Rows of a results folder: means as the protocol weights them, common clips, and files that are not whole."""

import json
import math
import os
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from benchmark.fixture_results import settings, write_results

from vidtwin.benchmark import rows
from vidtwin.benchmark.row_folder import RowFolder, _move_row
from vidtwin.errors import UserError

# Two clips of one video, one shorter of another: name, start_frame, num_frames, mse.
CLIPS = [("v.avi", 0, 16, 0.01), ("v.avi", 16, 4, 0.001), ("w.avi", 0, 16, 0.1)]


def clip(name: str, start: int, frames: int, mse: float, **more: float) -> rows.Clip:
    found = {"model": "a", "name": name, "start_frame": start, "num_frames": frames, "mse": mse}
    return found | {"psnr": -10 * math.log10(mse), "ssim": 1 - mse} | more


def results(clips: dict[str, list[rows.Clip]], **more: dict[str, Any]) -> rows.Results:
    listed = [
        {"name": name, "kind": "trained", "num_clips": len(found), "metrics": more.get(name, {})}
        for name, found in clips.items()
    ]
    return rows.Results(Path(), settings() | {"average": "clip"}, "", listed, clips)


@pytest.mark.parametrize(
    ("average", "weights"),
    # A video counts once, its clips in it by their frames: 16 and 4 of 20.
    [("clip", [1 / 3, 1 / 3, 1 / 3]), ("frame", [16 / 36, 4 / 36, 16 / 36]), ("video", [0.4, 0.1, 0.5])],
)
def test_means_weight_clips_as_the_protocol_says(average, weights):
    clips = [clip(*entry) for entry in CLIPS]
    found = rows.means(clips, settings() | {"average": average})
    for name in ("psnr", "ssim"):
        values = np.array([entry[name] for entry in clips])
        assert found[name]["mean"] == pytest.approx((values * weights).sum())
    assert "mse" not in found


def test_standard_deviations_are_those_of_a_sample_of_clips_or_videos():
    clips = [clip(*entry) for entry in CLIPS]
    values = np.array([entry["psnr"] for entry in clips])
    deviations = {
        "clip": values.std(ddof=1),
        "frame": np.sqrt(np.cov(values, aweights=[16, 4, 16])),
        "video": np.std([(16 * values[0] + 4 * values[1]) / 20, values[2]], ddof=1),
    }
    for average, wanted in deviations.items():
        assert rows.means(clips, settings() | {"average": average})["psnr"]["std"] == pytest.approx(wanted)


def test_psnr_of_one_mse_a_video_is_of_the_mean_squared_error_of_all_its_frames():
    described = settings() | {"average": "video", "psnr": "video", "psnr_epsilon": 0.0}
    found = rows.means([clip(*entry) for entry in CLIPS], described)
    of_videos = [-10 * math.log10((16 * 0.01 + 4 * 0.001) / 20), -10 * math.log10(0.1)]
    assert found["psnr"]["mean"] == pytest.approx(np.mean(of_videos))
    assert found["ssim"]["mean"] == pytest.approx(1 - np.mean([(16 * 0.01 + 4 * 0.001) / 20, 0.1]))


def test_equal_pictures_end_at_100_decibels_or_where_epsilon_says():
    assert rows.psnr_of(0.0, 0.0) == 100
    assert rows.psnr_of(0.0, 1e-8) == pytest.approx(80)


def test_means_are_the_same_to_the_last_bit_in_any_order():
    draw = np.random.default_rng(0)
    clips = [clip(f"{i}.avi", 0, 16, float(mse)) for i, mse in enumerate(draw.lognormal(-4, 3, 100))]
    shuffled = [clips[i] for i in draw.permutation(100)]
    for average in ("clip", "frame"):
        described = settings() | {"average": average}
        assert rows.means(clips, described) == rows.means(shuffled, described)


def test_a_comparison_is_over_the_clips_that_all_have_and_says_which_each_lacks():
    every = [clip(*entry) for entry in CLIPS]
    compared = rows.compare(results({"a": every, "b": every[1:], "c": [every[1]]}), {})
    assert (compared["num_clips"], compared["num_videos"]) == (1, 1)
    assert compared["left_out"] == {"b": [("v.avi", 0)], "c": [("v.avi", 0), ("w.avi", 0)]}
    for name in "abc":
        assert compared["rows"][name]["psnr"] == {"mean": pytest.approx(30), "std": None}
    assert compared["clips_sha256"] == rows.digest_of([("v.avi", 16)])


def test_a_comparison_is_over_the_clips_of_trained_rows_whatever_the_others_lack():
    every = [clip(*entry) for entry in CLIPS]
    found = results({"a": every, "b": every, "mean_colour": every[:1]}, mean_colour={"rfvd": {"value": 1.0}})
    found.rows[2]["kind"] = "reference"
    compared = rows.compare(found, {})
    assert (compared["num_clips"], compared["counts"]) == (3, {"a": 3, "b": 3, "mean_colour": 1})
    assert compared["ranked"]
    assert compared["rows"]["a"]["psnr"]["mean"] == pytest.approx(20)
    for row in found.rows:
        row["kind"] = "untrained"
    assert rows.compare(found, {})["num_clips"] == 1


@pytest.mark.parametrize(("planned", "ranked"), [(None, True), (6, True), (7, False)])
def test_fewer_common_clips_than_half_of_the_test_are_not_ranked(planned, ranked):
    found = results({"a": [clip(*entry) for entry in CLIPS]})
    found.protocol["data"] = found.protocol["data"] | {"num_clips": planned}
    assert rows.compare(found, {})["ranked"] == ranked


def test_a_failed_row_takes_no_clip_from_the_others():
    every = [clip(*entry) for entry in CLIPS]
    found = results({"a": every})
    found.rows.append({"name": "broken", "kind": "failed"})
    assert rows.compare(found, {})["num_clips"] == 3


def test_an_earlier_rfvd_holds_while_the_clips_are_the_same():
    every = [clip(*entry) for entry in CLIPS]
    value = {"value": 3.0, "num_clips": 3}
    found = results({"a": every, "b": every[:2]}, a={"rfvd": value}, b={"rfvd": {"value": 9.0, "num_clips": 2}})
    compared = rows.compare(found, {})
    assert compared["rows"]["a"]["rfvd"] == "unavailable"  # it is of three clips
    assert compared["rows"]["b"]["rfvd"]["value"] == 9.0  # its own clips are the common ones
    kept = compared | {"rows": {"a": {"rfvd": {"value": 4.0, "num_clips": 2}}}}
    assert rows.compare(found, kept)["rows"]["a"]["rfvd"]["value"] == 4.0
    of_another = kept | {"identities": {"a": "another checkpoint's"}}
    assert rows.compare(found, of_another)["rows"]["a"]["rfvd"] == "unavailable"
    assert rows.compare(found, kept | {"clips_sha256": "of others"})["rows"]["a"]["rfvd"] == "unavailable"


def test_numbers_come_back_from_a_file_as_they_went_in(tmp_path):
    clips = [clip('a "b", c.avi', 0, 16, 0.1, lpips=1 / 3), clip("é\n.avi", 3, 16, 1e-17, lpips=5e-324)]
    clips.append(clip("=1+1.avi", 0, 16, 2.0, lpips=0.1))
    row = {"schema_version": rows.SCHEMA_VERSION, "name": "a", "kind": "trained", "num_clips": 3, "protocol_hash": "x"}
    row |= {"metrics": {}, "latents": {}, "compression_rate": 0.1}
    rows.write_row(tmp_path, row, clips)
    assert rows.read_clips(tmp_path / "rows" / "a", row) == clips
    assert "\na,'=1+1.avi,0,16," in (tmp_path / "rows/a/clips.csv").read_text()  # no formula for a spreadsheet
    assert rows.read_row(tmp_path / "rows" / "a" / "results.json") == row


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}


def test_a_kill_at_any_step_of_moving_a_row_leaves_it_whole_in_one_folder(tmp_path, monkeypatch):
    row = dict.fromkeys(("results.json", "clips.csv", "features.npy", "clip0.mp4", "clip0.png"), b"new")
    left = 0  # changes until the kill

    def killed(change):
        def run(*arguments):
            nonlocal left
            left -= 1
            if left < 0:
                raise KeyboardInterrupt
            return change(*arguments)

        return run

    for kill in range(100):
        source, target = tmp_path / str(kill), tmp_path / str(kill) / "earlier" / "x"
        target.mkdir(parents=True)
        for name, content in row.items():
            (source / name).write_bytes(content)
        for name in ("results.json", "clips.csv", "clip1.png"):  # an earlier row of the same identity
            (target / name).write_bytes(b"old")
        left = kill
        with monkeypatch.context() as patched, suppress(KeyboardInterrupt):
            patched.setattr(os, "unlink", killed(os.unlink))
            patched.setattr(os, "replace", killed(os.replace))
            _move_row(source, target)
        moved = contents(target).items() >= row.items() and "clip1.png" not in contents(target)
        assert moved or contents(source) == row
        assert moved or contents(target).get("results.json") != b"new"
        if left >= 0:
            break
    assert kill > 10
    assert (contents(source), contents(target)) == ({}, row)


def test_rows_that_lack_an_identity_are_put_aside_beside_one_another(tmp_path):
    folder = write_results(tmp_path / "r", num_clips=3, players=False)
    job = SimpleNamespace(name="CMD", identity={"name": "CMD"}, error=None)
    row_folder = RowFolder(folder, job, None, {}, [])
    row = rows.read_row(row_folder.folder / "results.json") | {"identity": None, "fingerprint": None}
    for speed in (1, 2):
        row_folder.update({**row, "speed": speed})
        row_folder._put_aside()
    kept = sorted((row_folder.folder / "earlier").glob("*/results.json"))
    assert sorted(json.loads(path.read_text())["speed"] for path in kept) == [1, 2]


def test_a_clips_file_that_ends_anywhere_is_refused(tmp_path):
    folder = write_results(tmp_path / "r", num_clips=3, players=False)
    row = rows.read_row(folder / "rows" / "CMD" / "results.json")
    path = folder / "rows" / "CMD" / "clips.csv"
    content = path.read_bytes()
    for end in range(len(content) - 1):  # without its last line break it is whole
        path.write_bytes(content[:end])
        with pytest.raises(UserError):
            rows.read_clips(path.parent, row)


@pytest.mark.parametrize("name", ["protocol.json", "comparison.json", "players/players.json", "rows/CMD/results.json"])
def test_reading_a_folder_names_the_file_that_is_cut_off(tmp_path, name):
    folder = write_results(tmp_path / "r", num_clips=3)
    rows.write_comparison(folder, rows.read(folder).comparison)
    path = folder / name
    path.write_text(path.read_text()[:20])
    with pytest.raises(UserError, match=f"Expected JSON in .*{path.name}, got a file that is cut off"):
        rows.read(folder)


def test_rows_of_another_protocol_or_version_are_refused(tmp_path):
    folder = write_results(tmp_path / "r", num_clips=3)
    path = folder / "rows" / "CMD" / "results.json"
    row = json.loads(path.read_text())
    path.write_text(json.dumps(row | {"protocol_hash": "0" * 16}))
    with pytest.raises(UserError, match="got others: CMD; they can't be compared"):
        rows.read(folder)
    path.write_text(json.dumps(row | {"schema_version": 1}))
    with pytest.raises(UserError, match="Expected a row of schema_version 2"):
        rows.read(folder)
    with pytest.raises(UserError, match="which does not exist"):
        rows.read(tmp_path / "nothing")


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("seed_of", {"a": 1}),
        ("coding", "x264"),
        ("coding", {"curve": "x264"}),
        ("rate_distortion", {"tables": "val"}),
        ("windows", [4]),
    ],
)
def test_a_part_of_a_row_of_another_form_is_refused(tmp_path, key, value):
    folder = write_results(tmp_path / "r", num_clips=3, players=False)
    path = folder / "rows" / "CMD" / "results.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"Expected {key} of a row in"):
        rows.read(folder)
