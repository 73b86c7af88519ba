"""Shards and manifests of latents."""

import json
import math
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from vidtwin.errors import UserError
from vidtwin.storage.latent_files import (
    Latent,
    Manifest,
    Piece,
    Shard,
    StoredPiece,
    VideoEntry,
    channel_statistics,
    code_dtype,
    open_shard,
    pack_times,
    shard_path,
    tensor_name,
    unpack_times,
    write_shard,
)

DIGEST = "d" * 64


def numbers(count: int, *shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, *shape, generator=torch.Generator().manual_seed(seed)) + 2


def written(path: Path, **tensors: torch.Tensor) -> Shard:
    """A shard of one piece."""
    count = len(next(iter(tensors.values())))
    named = {tensor_name(0, name): tensor for name, tensor in tensors.items()}
    write_shard(path, DIGEST, [StoredPiece("a", 0, [8] * count)], named)
    return Shard(path, DIGEST)


def manifest() -> Manifest:
    return Manifest(
        model={"class_path": "some.Model", "init_args": {"depth": 2}, "weights_sha256": "ab", "checkpoint": "x.ckpt"},
        settings={"num_frames": 8, "size": None},
        latents={"grid": Latent("gaussian", (3, 4)), "code": Latent("codes", codebook_size=512)},
        videos=[VideoEntry("a", "videos/a.mp4", 1, "30000/1001", 17, 1234, 10**18, num_frames=16, damage="cut off")],
        shards=[[Piece(0, 0, 2, 2)], [Piece(0, 2, 1, 0)]],
        classes=["x", "y"],
        skipped={"b": "no video"},
        complete=True,
        statistics={"grid": {"mean": [0.1], "std": [1 / 3]}},
    )


def test_a_manifest_comes_back_as_it_was_written(tmp_path):
    manifest().write(tmp_path)
    assert Manifest.read(tmp_path) == manifest()
    assert Manifest.read(tmp_path).digest == manifest().digest


def test_the_digest_is_that_of_the_plan_alone():
    """What is found out on the way changes no shard; what they are made of does."""
    first, second = manifest(), manifest()
    second.complete, second.skipped, second.shards = False, {}, [[Piece(0, 0, 2)], [Piece(0, 2, 1)]]
    second.model["checkpoint"] = "moved.ckpt"
    assert first.digest == second.digest
    second.model["weights_sha256"] = "cd"
    assert first.digest != second.digest


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"schema_version": 1}', '{"schema_version": 1, "latents": 3}'])
def test_another_file_is_refused_as_a_manifest(tmp_path, text):
    (tmp_path / "manifest.json").write_text(text)
    with pytest.raises(UserError, match="Expected a manifest written by `vidtwin encode`"):
        Manifest.read(tmp_path)


def test_rows_are_read_as_they_were_written_and_by_safetensors_too(tmp_path):
    grid, code = numbers(5, 3, 4).bfloat16(), torch.arange(5).to(torch.uint16)[:, None]
    path = shard_path(tmp_path, 12)
    shard = written(path, grid=grid, code=code)
    assert path.name == "shard-00012.safetensors"
    assert torch.equal(shard.rows(0, "grid", 1, 3), grid[1:3])
    assert shard.rows(0, "code", 4, 5).tolist() == [[4]]
    assert torch.equal(load_file(path)["0000.grid"], grid)
    shard.check()


def test_the_bytes_are_the_same_each_time(tmp_path):
    for name in ("a", "b"):
        written(tmp_path / f"{name}.safetensors", grid=numbers(5, 3), other=numbers(5, 2, 2))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_a_shard_without_a_window_is_whole(tmp_path):
    write_shard(tmp_path / "a.safetensors", DIGEST, [StoredPiece("a", 0, damage="cut off")], {})
    shard = Shard(tmp_path / "a.safetensors", DIGEST)
    shard.check()
    assert shard.pieces == [StoredPiece("a", 0, damage="cut off")]


@pytest.mark.parametrize("kept", [0, 5, 100, -1])
def test_a_truncated_shard_is_named(tmp_path, kept):
    path = tmp_path / "a.safetensors"
    written(path, grid=numbers(5, 30))
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(UserError, match=r"a\.safetensors: expected a whole shard, got one that is cut off or damaged"):
        Shard(path, DIGEST)


def test_a_flipped_bit_is_found_by_the_check(tmp_path):
    path = tmp_path / "a.safetensors"
    written(path, grid=numbers(5, 30))
    content = bytearray(path.read_bytes())
    content[-50] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.safetensors: .* damaged \(checksum\)"):
        Shard(path, DIGEST).check()


def write_planned(folder: Path) -> Manifest:
    """Latents of one shard: a piece of two windows, and one of none."""
    held = manifest()
    held.settings["posterior"] = "moments"
    held.videos.append(VideoEntry("b", "b.mp4", 0, "25", 8, 1, 1, num_frames=0))
    held.shards = [[Piece(0, 0, 2, 2), Piece(1, 0, 1, 0)]]
    pieces = [StoredPiece("a", 0, [8, 8], 16, 16), StoredPiece("b", 0, damage="cut off")]
    tensors = {"0000.grid": numbers(2, 3, 4), "0000.grid.logvar": numbers(2, 3, 4)}
    tensors |= {"0000.code": torch.tensor([[511], [0]], dtype=torch.uint16)}
    write_shard(shard_path(folder, 0), held.digest, pieces, tensors)
    return held


def read_all(folder: Path, held: Manifest) -> list:
    shard = open_shard(folder, held, 0)
    parts = (("grid", None), ("grid", "logvar"), ("code", None))
    rows = [shard.rows(0, name, 0, 2, part).tolist() for name, part in parts]
    shard.check()
    return [rows, channel_statistics([shard.sums]).keys(), [p.num_frames for p in shard.pieces]]


@pytest.mark.parametrize("bits", [0x01, 0x90])
def test_a_changed_byte_anywhere_is_one_line_or_changes_no_window(tmp_path, bits):
    held = write_planned(tmp_path)
    path, intact = shard_path(tmp_path, 0), read_all(tmp_path, held)
    content = path.read_bytes()
    refused = []
    for place in range(len(content)):
        path.write_bytes(content[:place] + bytes([content[place] ^ bits]) + content[place + 1 :])
        try:
            assert read_all(tmp_path, held) == intact
        except UserError as error:
            refused.append(str(error))
    assert all(text.startswith(f"{path}: ") and "\n" not in text for text in refused)
    assert len(refused) > 0.7 * len(content)  # the rest are digits of sums and picture sizes, and spaces


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"0000.grid": None}, "no .grid. of .a."),
        ({"0000.grid.logvar": None}, "no .grid. of .a."),
        ({"0000.grid": numbers(3, 3, 4)}, "no .grid. of .a."),
        ({"0000.grid": numbers(2, 4, 3)}, "no .grid. of .a."),
        ({"0000.code": torch.zeros(2, 1)}, "no .code. of .a."),
        ({"0000.grid": torch.zeros(2, 3, 4, dtype=torch.uint8)}, "no .grid. of .a."),
        ({"0001.grid": numbers(1, 3, 4)}, "more tensors"),
        ({"0000.code": torch.tensor([[511], [512]], dtype=torch.uint16)}, "codes of code below 512"),
    ],
)
def test_tensors_that_do_not_fit_the_manifest_are_refused(tmp_path, change, fault):
    held = write_planned(tmp_path)
    path = shard_path(tmp_path, 0)
    tensors = {name: tensor for name, tensor in (load_file(path) | change).items() if tensor is not None}
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file(tensors, path, metadata)
    with pytest.raises(UserError, match=rf"shard-00000\.safetensors: expected .*{fault}.*; encode again"):
        read_all(tmp_path, held)


@pytest.mark.parametrize(
    "change",
    [
        ('"kind": "codes"', '"kind": "other"'),
        ('"codebook_size": 512', '"codebook_size": null'),
        ('"label": 1', '"label": "x"'),
        ('"x",', "1,"),
        ("{", "[" * 100_000),
    ],
)
def test_a_manifest_of_other_values_is_refused(tmp_path, change):
    manifest().write(tmp_path)
    text = (tmp_path / "manifest.json").read_text()
    (tmp_path / "manifest.json").write_text(text.replace(*change, 1))
    assert change[0] in text
    with pytest.raises(UserError, match=r"manifest\.json"):
        Manifest.read(tmp_path)


def test_a_shard_of_other_latents_is_refused(tmp_path):
    written(tmp_path / "a.safetensors", grid=numbers(5, 3))
    with pytest.raises(UserError, match="got one of others"):
        Shard(tmp_path / "a.safetensors", "e" * 64)
    with pytest.raises(UserError, match="got no such file"):
        Shard(tmp_path / "absent.safetensors", DIGEST)


def test_statistics_do_not_depend_on_the_order_of_the_shards(tmp_path):
    sums = []
    parts = [numbers(n, 3, 4, 2, seed=n) * 10.0**n for n in range(1, 6)]
    for number, part in enumerate(parts):
        sums.append(written(shard_path(tmp_path, number), grid=part).sums)
    found = channel_statistics(sums)
    assert found == channel_statistics(sums[::-1])
    channels = torch.cat(parts).double().transpose(0, 1).flatten(1).numpy()
    assert found["grid"]["mean"] == pytest.approx(channels.mean(1).tolist(), rel=1e-12)
    assert found["grid"]["std"] == pytest.approx(channels.std(1).tolist(), rel=1e-12)


def test_statistics_with_moments_are_those_of_samples(tmp_path):
    mean, logvar = numbers(200, 2, 50), numbers(200, 2, 50, seed=1) / 4
    named = {"0000.grid": mean, "0000.grid.logvar": logvar}
    write_shard(tmp_path / "a.safetensors", DIGEST, [StoredPiece("a", 0, [8] * 200)], named)
    found = channel_statistics([Shard(tmp_path / "a.safetensors", DIGEST).sums])["grid"]
    samples = mean + torch.exp(logvar / 2) * numbers(200, 2, 50, seed=2).sub(2)
    assert found["sample_std"] == pytest.approx(samples.transpose(0, 1).flatten(1).std(1).tolist(), rel=0.02)


def test_channels_that_differ_between_videos_have_no_statistics(tmp_path):
    pieces = [StoredPiece("a", 0, [8]), StoredPiece("b", 0, [8])]
    write_shard(tmp_path / "a.safetensors", DIGEST, pieces, {"0000.grid": numbers(1, 3), "0001.grid": numbers(1, 5)})
    one = Shard(tmp_path / "a.safetensors", DIGEST).sums
    two, three = (written(tmp_path / f"{n}.safetensors", grid=numbers(1, n)).sums for n in (2, 3))
    assert channel_statistics([one]) == channel_statistics([two, three]) == {"grid": None}


def test_codes_have_no_statistics(tmp_path):
    shard = written(tmp_path / "a.safetensors", code=torch.zeros(4, 3, dtype=torch.int32))
    assert channel_statistics([shard.sums]) == {}


@pytest.mark.parametrize("size", [2, 256, 257, 2**16, 2**16 + 1, 2**18, 2**31, 2**40])
def test_codes_fit_their_type_and_no_smaller_one(size):
    dtype = code_dtype(size)
    assert torch.tensor(size - 1).to(dtype).long() == size - 1
    smaller = [torch.uint8, torch.uint16, torch.int32, torch.int64]
    for other in smaller[: smaller.index(dtype)]:
        assert torch.iinfo(other).max < size - 1


def test_times_come_back_exactly():
    fps = Fraction(30000, 1001)
    assert pack_times([Fraction(k) / fps for k in range(16, 20)], fps, 16) is None
    assert unpack_times(None, fps, 16, 4) == [Fraction(k) / fps for k in range(16, 20)]
    odd = [Fraction(1, 3), Fraction(2, 7), Fraction(5), Fraction(12345, 90000)]
    packed = pack_times(odd, fps, 0)
    assert unpack_times(json.loads(json.dumps(packed)), fps, 0, 4) == odd


def test_sums_of_half_precision_are_those_of_what_is_stored(tmp_path):
    grid = (numbers(7, 2, 3) * 100).half()
    sums = written(tmp_path / "a.safetensors", grid=grid).sums["grid"]
    values = grid.numpy().astype(np.float64)
    assert sums["sum"] == pytest.approx([math.fsum(values[:, c].ravel()) for c in range(2)], rel=1e-15)
    assert sums["count"] == 21
