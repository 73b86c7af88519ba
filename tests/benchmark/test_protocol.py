"""Rows are compared only under one protocol, which its hash names."""

import json

import pytest

from vidtwin.benchmark import protocol
from vidtwin.errors import UserError

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
    """Of folders that were measured before presets described more of their peers."""
    assert protocol.protocol_hash(FULL) == "7b2738feb8d0d073"
    data = {"num_frames": 16, "resolution": 224, "fps": 8.0, "clip": "one per video, from its middle", "tail": "none"}
    assert protocol.protocol_hash(protocol.ProtocolSettings().resolve(data, "32-true")) == "4c98d343b73a7964"


def test_remarks_on_the_peer_stand_in_the_file_but_not_in_the_hash(tmp_path):
    remarks = [line for line in FULL["departs"] if line.startswith(protocol.PEER)]
    assert "peer: fps 25 in whole steps of the source's frames, not 8.0" in remarks
    assert "peer: resize bilinear, antialiased (torchvision), not None (-1.4 to +0.6 dB of PSNR)" in remarks
    without = FULL | {"departs": [line for line in FULL["departs"] if line not in remarks]}
    assert protocol.protocol_hash(without) == protocol.protocol_hash(FULL)
    assert protocol.differences(FULL, without) == []
    protocol.write(without, tmp_path)  # a folder from before there were any
    (tmp_path / "rows" / "a").mkdir(parents=True)
    (tmp_path / "rows" / "a" / "results.json").touch()
    assert protocol.write(FULL, tmp_path) == protocol.protocol_hash(FULL)


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
