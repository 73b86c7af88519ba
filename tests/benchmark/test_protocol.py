"""Rows are compared only under one protocol, which its hash names."""

import json
import re

import pytest

from vidtwin.benchmark import protocol
from vidtwin.errors import UserError
from vidtwin.video import RESIZE_FILTERS

FULL = protocol.ProtocolSettings(posterior="mode").resolve(
    {"num_frames": 16, "fps": 8.0, "clips": ["a", "b"]}, "32-true", "a" * 64, "MCL-JCV", {"v.avi": "too short"}
)


def changed(path):
    """FULL with another value at a path of keys."""
    copy = json.loads(json.dumps(FULL))
    place = copy
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = "another"
    return copy


def test_the_order_of_keys_and_a_way_through_json_do_not_change_the_hash():
    digest = protocol.protocol_hash(FULL)
    assert len(digest) == 16
    assert int(digest, 16) >= 0
    assert protocol.protocol_hash(dict(reversed(FULL.items()))) == digest
    assert protocol.protocol_hash(json.loads(json.dumps(FULL, indent=2))) == digest


@pytest.mark.parametrize("path", [*((key,) for key in FULL), *(("data", key) for key in FULL["data"])], ids=".".join)
def test_any_other_value_gives_another_hash(path):
    assert protocol.protocol_hash(changed(path)) != protocol.protocol_hash(FULL)


def test_one_key_more_gives_another_hash():
    assert protocol.protocol_hash({**FULL, "crop": "centre"}) != protocol.protocol_hash(FULL)


def test_the_default_protocol_keeps_its_hash():
    """Folders that were measured under these hashes are continued."""
    assert protocol.protocol_hash(FULL) == "7b2738feb8d0d073"
    data = {"num_frames": 16, "resolution": 224, "fps": 8.0, "clip": "one per video, from its middle", "tail": "none"}
    assert protocol.protocol_hash(protocol.ProtocolSettings().resolve(data, "32-true")) == "4c98d343b73a7964"


def test_remarks_on_the_peer_stand_in_the_file_but_not_in_the_hash(tmp_path):
    remarks = [line for line in FULL["departs"] if line.startswith(protocol.PEER)]
    assert "peer: fps 25 in whole steps of the source's frames, not 8.0" in remarks
    assert "peer: resize bilinear, antialiased (torchvision), not None" in remarks
    without = FULL | {"departs": [line for line in FULL["departs"] if line not in remarks]}
    assert protocol.protocol_hash(without) == protocol.protocol_hash(FULL)
    assert protocol.differences(FULL, without) == []
    protocol.write(without, tmp_path)  # a folder from before there were any
    (tmp_path / "rows" / "a").mkdir(parents=True)
    (tmp_path / "rows" / "a" / "results.json").touch()
    assert protocol.write(FULL, tmp_path) == protocol.protocol_hash(FULL)
    assert json.loads((tmp_path / "protocol.json").read_text()) == FULL  # which table and report print


def remarks_of(preset="wfvae", precision="bf16-true", data=None, **settings):
    """The remarks on a preset's peer for clips of files, or as `data` changes them."""
    described = {"num_frames": 33, "crop": "largest centre square", "resize": RESIZE_FILTERS["bilinear"]} | (data or {})
    departs = protocol.ProtocolSettings(preset=preset, **settings).resolve(described, precision)["departs"]
    return [line.removeprefix(protocol.PEER) for line in departs if line.startswith(protocol.PEER)]


@pytest.mark.parametrize("preset", ["vidtwin", "vidtok", "wfvae"])
def test_remarks_on_resizing_are_those_of_the_filter_and_not_of_rendered_clips(preset):
    def remarks(resize):
        return [line for line in remarks_of(preset, data={"resize": resize}) if "resize" in line or "square" in line]

    peers, area = (
        [line for line in remarks(RESIZE_FILTERS[name]) if "cropped" not in line] for name in ("bilinear", "area")
    )
    assert [line[:16] for line in peers] == ["resized pictures", "pixels that are "]
    assert area[1:] == peers
    assert area[0].startswith("resize bilinear, antialiased (torchvision), not area (swscale): ")
    assert area[0].endswith(" dB of PSNR)")
    rendered = remarks_of(preset, data={"resize": "none", "crop": "none"})
    assert [line for line in rendered if "resize" in line or "square" in line or "cropped" in line] == []


def test_remarks_are_those_of_what_is_compared():
    def about(word, preset, **settings):
        return [line for line in remarks_of(preset, **settings) if word in line]

    for compared in ("mp4v", "8-bit"):
        assert len(about("truncation", "wfvae", compared=compared)) == 1
    for compared in ("floats", "h264"):
        assert about("truncation", "wfvae", compared=compared) == []
    assert len(about("186.6", "tokenbench")) == len(about("a file is", "tokenbench")) == 1
    assert about("186.6", "tokenbench", psnr_epsilon=1e-8) == []
    assert about("a file is", "tokenbench", compared="floats") == []


def test_frames_that_no_clip_of_tokenbench_has_are_named():
    def lines(**data):
        return [line for line in remarks_of("tokenbench", data=data) if line.startswith(("tail", "short"))]

    assert lines(tail="drop", short_videos="skip") == [
        "tail none, not drop (frames at the end that fill no clip are left out)",
        "short_videos none, not skip (videos that are shorter than a clip are left out)",
    ]
    assert lines(tail="pad", short_videos="pad") == [
        "tail none, not pad (the last clip repeats its last frame)",
        "short_videos none, not pad (videos that are shorter than a clip repeat their last frame)",
    ]


def test_crop_truncation_and_bf16_of_wfvae_are_named_with_what_they_change():
    found = remarks_of("wfvae", "32-true")
    for word in ("truncation", "--crop_size", "bf16-true, not 32-true"):
        (line,) = [line for line in found if word in line]
        assert re.search(r"[+-]0\.\d+ to [+-]0\.\d+ dB of PSNR\)$", line), line
    assert not any(line.startswith("precision") for line in remarks_of("wfvae", "bf16-true"))


def test_a_precision_that_is_not_the_peers_is_named():
    departs = protocol.ProtocolSettings().resolve(FULL["data"], "bf16-mixed")["departs"]
    assert "peer: precision 32-true, not bf16-mixed" in departs
    assert not any("precision" in line for line in FULL["departs"])


@pytest.mark.parametrize("preset", ["wfvae", "tokenbench"])
def test_files_that_are_compared_are_described_so_that_rows_of_other_files_are_refused(preset, tmp_path):
    found = protocol.ProtocolSettings(preset=preset).resolve(FULL["data"], "32-true")
    before = {key: value for key, value in found.items() if key != "files"}
    protocol.write(before, tmp_path)
    (tmp_path / "rows" / "a").mkdir(parents=True)
    (tmp_path / "rows" / "a" / "results.json").touch()
    with pytest.raises(UserError, match=r"they differ in files .* for None\); choose another --results_dir\.$"):
        protocol.write(found, tmp_path)
    assert "files" not in FULL


def test_the_protocol_is_written_once_and_rows_of_the_same_one_are_welcome(tmp_path):
    digest = protocol.write(FULL, tmp_path / "results")
    path = tmp_path / "results" / "protocol.json"
    written = path.stat().st_mtime_ns, path.read_bytes()
    assert json.loads(path.read_text()) == FULL
    assert protocol.write(dict(reversed(FULL.items())), tmp_path / "results") == digest == protocol.protocol_hash(FULL)
    assert (path.stat().st_mtime_ns, path.read_bytes()) == written


def test_rows_of_another_protocol_are_refused_and_nothing_is_overwritten(tmp_path):
    protocol.write(FULL, tmp_path)
    (tmp_path / "rows" / "VidTwin" / "parts").mkdir(parents=True)
    before = (tmp_path / "protocol.json").read_bytes()
    other = {**changed(("data", "fps")), "posterior": "sample"}
    with pytest.raises(UserError) as error:
        protocol.write(other, tmp_path)
    assert str(error.value) == (
        f"Expected results of protocol {protocol.protocol_hash(other)} in {tmp_path}, got those of "
        f"{protocol.protocol_hash(FULL)} "
        "(they differ in data.fps another for 8.0, posterior sample for mode); choose another --results_dir."
    )
    assert (tmp_path / "protocol.json").read_bytes() == before


def test_a_protocol_under_which_nothing_was_measured_may_be_put_right(tmp_path):
    protocol.write(FULL, tmp_path)
    other = changed(("data", "fps"))
    assert protocol.write(other, tmp_path) == protocol.protocol_hash(other)
    assert json.loads((tmp_path / "protocol.json").read_text()) == other


@pytest.mark.parametrize("text", ["[1]", '{"name": "vid', "[" * 100_000])
def test_a_protocol_that_is_not_a_json_object_is_one_line(tmp_path, text):
    (tmp_path / "protocol.json").write_text(text)
    with pytest.raises(UserError, match=r"Expected JSON in .*protocol\.json, got a file that is cut off or damaged"):
        protocol.write(FULL, tmp_path)
