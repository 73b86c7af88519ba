"""The measurements of benchmarks/, at tiny size: what they count, leave out and do if a part of them fails."""

import argparse
import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from tiny import write_config
from torch._inductor.exc import CppCompileError

from vidtwin.datamodules.ucf101 import UCF101

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def speed(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    return import_module("speed")


@pytest.fixture
def gpu(speed):
    return import_module("gpu")


def options(folder, *rest):
    config = str(write_config(folder))
    return ["--config", config, "--side", "16", "--warmup", "1", "--repeats", "1", "--precisions", "fp32", *rest]


def test_each_part_has_its_line_and_the_rest_is_named(speed, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    out = tmp_path / "speed.json"
    speed.main(options(tmp_path, "--out", str(out), "--device", "cpu", "--parts", "encode", "step", "loader"))
    content = json.loads(out.read_text())
    encode, step = content["rows"]
    assert (encode["part"], step["part"]) == ("encode", "step")
    for row in (encode, step):
        assert row["share"] == pytest.approx(row["flops"] / row["seconds"]["median"] / row["products_per_second"])
        assert row["peak_bytes"] > 0
    assert step["flops"] == sum(step["flops_by_network"].values())
    assert sum(encode["kinds"].values()) == pytest.approx(1.0)
    assert encode["kinds"]["products"] > 0
    assert content["left_out"] == ["loader: no --data"]
    text = capsys.readouterr().out
    assert "Left out: loader: no --data." in text
    assert ("The machine was not idle" in text) == (content["load_per_core"] >= speed.IDLE)
    assert not list(tmp_path.rglob("*.ckpt"))


def test_no_line_is_begun_without_time(speed, tmp_path):
    content = speed.run(speed.parse(options(tmp_path, "--minutes", "-1", "--parts", "encode", "step")))
    assert content["rows"] == []
    assert content["left_out"] == ["encode, fp32: no time left", "step, fp32: no time left"]


class Loader:
    """Ten batches, of which the workers have four ready; each further one takes a second of a clock that stands."""

    num_workers, prefetch_factor = 2, 2

    def __init__(self, clock):
        self.clock = clock

    def __len__(self):
        return 10

    def __iter__(self):
        for index in range(10):
            self.clock[0] += index >= 4
            yield index


def test_batches_that_wait_in_the_workers_queues_do_not_count(speed, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(speed.time, "perf_counter", lambda: clock[0])
    assert speed.time_batches(lambda: Loader(clock), least=5.0) == pytest.approx(1.0)
    assert clock[0] == 6.0  # three batches of each of two epochs


def test_a_compiler_that_fails_costs_no_line(speed, tmp_path, monkeypatch, capsys):
    def measure(args: argparse.Namespace) -> dict:
        if args.compile:
            raise CppCompileError(["g++"], "virtual memory exhausted")
        return {"part": "step", "compiled": args.compile}

    args = speed.parse(options(tmp_path, "--compile"))
    assert speed.compiled_or_plain(args, measure) == {"part": "step", "compiled": False}
    assert "measured without compilation, which failed: " in capsys.readouterr().err
    assert args.compile


def test_a_part_that_lacks_memory_costs_no_other_line(speed, tmp_path, monkeypatch):
    def lack(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of\nmemory.")

    monkeypatch.setattr(speed, "measure_step", lack)
    content = speed.run(speed.parse(options(tmp_path, "--parts", "step", "encode")))
    assert [row["part"] for row in content["rows"]] == ["encode"]
    assert content["left_out"] == ["step, fp32: CUDA out of memory"]


def test_the_tree_of_links_has_ucf101s_layout(speed, tmp_path):
    loading = import_module("loading")
    clip = tmp_path / "clip.avi"
    clip.write_bytes(b"video")
    root = loading.make_tree([clip], tmp_path / "tree", 101 * 25 + 1)
    data = UCF101(str(root))
    train, val, test = (data.videos(split) for split in ("train", "val", "test"))
    assert len(train) + len(val) + len(test) == 101 * 25 + 1
    assert len(test) == 101 * 7 + 1
    assert {video.label for video in train} == set(range(101))
    assert all(video.path.stat().st_ino == train[0].path.stat().st_ino for video in train + val + test)


def test_every_target_has_a_line_on_a_gpu(gpu, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit, match="Expected a GPU, got none"):
        gpu.main([])

    def run(args: argparse.Namespace) -> dict:
        if "large" in args.config and not args.compile:
            raise RuntimeError("CUDA out of\nmemory")
        rows = [{"part": part, "clips_per_second": 500.0, "share": 0.5, "waiting": 0.01} for part in args.parts]
        return {"device": "H200", "commit": "abc", "rows": [*rows, {"part": "loader + step", "waiting": 0.03}]}

    monkeypatch.setattr(gpu, "run", run)
    out = tmp_path / "gpu.json"
    gpu.main(["--tiny", "--data", "videos", "--out", str(out)])
    text = capsys.readouterr().out
    assert text.startswith("A trial of the script with tiny models: the figures mean nothing.\n")
    assert re.search(r"\| +a trial \|", text)
    assert not re.search(r"\| +(met|missed) ", text)
    monkeypatch.setattr(gpu.torch.cuda, "is_available", lambda: True)
    gpu.main(["--data", "videos", "--out", str(out)])
    text = capsys.readouterr().out
    assert "CUDA out of memory" in text
    lines = [[cell.strip() for cell in line.split("|")] for line in text.splitlines() if line.startswith("| ")]
    found = {(line[1], line[2], line[3]): line[-2] for line in lines[1:]}
    assert found["base, eager", "encode", "clips_per_second"] == "met"
    assert found["base, compiled", "loader + step", "waiting"] == "missed"
    assert len(found) == sum(len(targets) for *_, targets in gpu.RUNS)
    assert set(json.loads(out.read_text())["runs"]) == {name for name, *_ in gpu.RUNS if name != "large, checkpointing"}


def test_counted_growth_is_that_of_products_and_attention(speed, tmp_path, monkeypatch):
    growth = import_module("growth")
    monkeypatch.setitem(growth.BASE, "width", 384)
    points = [{**growth.BASE, "resolution": side} for side in (112, 224, 448)]

    def closed_form(point) -> float:
        """FLOPs of a block a half: 16 C² of products per token, and attention over S and over T."""
        frames, width, tokens = point["frames"], point["width"], (point["resolution"] // 16) ** 2
        return 2 * frames * tokens * (16 * width**2 + 2 * width * (tokens + frames))

    counted = []
    for depth in (1, 2):
        counted.append([growth.flops(growth.build(p, depth, "meta"), growth.clip_shape(p))["encode"] for p in points])
    of_a_block = [two - one for one, two in zip(*counted, strict=True)]
    sides = [point["resolution"] for point in points]
    exponent = growth.fit_exponent(sides, of_a_block)
    assert exponent == pytest.approx(growth.fit_exponent(sides, [closed_form(p) for p in points]), abs=0.01)
    assert 2.1 < exponent < 4  # beyond the number of pixels, by attention

    rows = {"resolution": [p | dict.fromkeys(growth.CURVES, cost) for p, cost in zip(points, of_a_block, strict=True)]}
    growth.draw(rows, tmp_path / "growth.png")
    assert (tmp_path / "growth.png").stat().st_size > 5000
    assert f"{exponent:.2f}" in growth.format_points(rows).splitlines()[-1]
    times = growth.measure({"frames": 4, "resolution": 32, "batch": 1, "width": 48}, depth=1)
    assert set(times) == {"encode_seconds", "step_seconds"}
