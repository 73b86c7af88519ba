"""`vidtwin test --meta`: shapes, rates and FLOPs by hand, without data, weights or a run; the tables of the docs."""

import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
import yaml
from sweeping import FRAMES, SIDE, Coded, NumberedData, Pool, Two, checkpoint, sweep
from torch import nn

from vidtwin.autoencoder import TemporalSpec
from vidtwin.benchmark.options import Entry
from vidtwin.cli import main
from vidtwin.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
CLIP = (3, FRAMES, SIDE, SIDE)
PIXELS = FRAMES * SIDE * SIDE


class Absent(NumberedData):
    """Data that are not there."""

    def make_dataset(self, split):
        raise AssertionError("no clip is needed")


class Causal(Pool):
    """Clips of 3k + 1 frames; a convolution decodes."""

    def __init__(self) -> None:
        super().__init__(pool=8)
        self.temporal = TemporalSpec(multiple=3, offset=1, pad="last")
        self.last = nn.Conv3d(3, 3, 1, bias=False)

    def _decode(self, latents):
        return self.last(super()._decode(latents))


class Selfish(Pool):
    """Values are read while it is built; and by its encoder, if `encodes`."""

    def __init__(self, encodes: bool = False) -> None:
        super().__init__()
        self.encodes = encodes
        self.level = float(self.scale.detach())

    def _encode(self, clip):
        if self.encodes and float(clip.mean()) > 2:
            raise AssertionError
        return super()._encode(clip)


class Liar(Pool):
    def _decode(self, latents):
        return super()._decode(latents)[..., 1:]


class Broken(Pool):
    def _encode(self, clip):
        raise TypeError("a mistake of its author")


@pytest.fixture
def count(tmp_path, monkeypatch):
    """Count models of this module by name: their items in meta.json, the table, and the exit code."""
    monkeypatch.setitem(sys.modules, "counted", sys.modules[__name__])
    monkeypatch.chdir(tmp_path)

    def run(entries, data=None):
        code = sweep(tmp_path / "out", entries, data or Absent(), meta=True).run()
        found = json.loads(Path("out/meta.json").read_text())
        assert {path.name for path in Path("out").iterdir()} == {"meta.json", "meta.md"}
        return {model["name"]: model for model in found["models"]}, Path("out/meta.md").read_text(), code

    return run


def entry(name, cls, claimed=None, windows=False, checkpoint=None, **arguments):
    path = Path(f"{name}.yaml")
    spec = {"class_path": f"{cls.__module__}.{cls.__qualname__}", "init_args": arguments}
    path.write_text(yaml.safe_dump({"model": {"autoencoder": spec}}))
    return Entry(name, str(path), checkpoint, claimed, windows)


def test_numbers_are_those_of_the_arithmetic_and_need_no_data_or_weights(count):
    entries = [
        entry("grid", Pool, claimed=1 / 16, checkpoint="absent.ckpt"),
        entry("codes", Coded, windows=True, frames=4),
        entry("parts", Two, claimed=0.01),
    ]
    found, table, code = count(entries)
    assert code == 0
    assert {name: model["compression_rate"] for name, model in found.items()} == {
        "grid": 1 / 16,
        "codes": 1 / 16,
        "parts": (1 + FRAMES) / FRAMES / 16,
    }
    grid, codes, parts = found.values()
    assert (grid["parameters"], grid["claimed"]) == (1, {"rate": 1 / 16, "agrees": True})
    assert grid["latents"]["grid"]["shape"] == [3, FRAMES, 8, 8]
    assert (codes["windows"], codes["bits_per_pixel"]) == ({"num_frames": 4, "windows": 2}, 3 * FRAMES * 64 / PIXELS)
    assert codes["latents"]["grid"]["shape"] == [2, 3, 4, 8, 8]
    assert parts["claimed"] == {"rate": 0.01, "agrees": False}
    assert grid["downstream"]["tokens"] == FRAMES * 8 * 8 // 8
    assert table.count(" 6.2500 |") == 2
    assert "still 3 x 8 x 8, moving 3 x 8 x 8 x 8" in table
    assert "A rate of 1 % is claimed for parts; its latents have 7.0312 %." in table
    assert "codes takes 2 windows of 4 frames." in table


def test_padding_counts_and_flops_are_those_of_the_padded_clip(count):
    found, table, _ = count([entry("causal", Causal, claimed=0.01)])
    padded = 10 * SIDE * SIDE
    assert found["causal"]["compression_rate"] == padded / 64 / PIXELS
    assert (found["causal"]["padded_frames"], found["causal"]["latents"]["grid"]["shape"]) == (2, [3, 10, 4, 4])
    assert found["causal"]["flops"] == {"encode": 0, "decode": 2 * 3 * 3 * padded}
    assert "2 frames of padding included" in table


def test_a_model_that_fails_is_named_and_the_others_are_counted(count):
    entries = [entry("short", Pool, frames=3), entry("cut", Liar), entry("broken", Broken), entry("grid", Pool)]
    entries.append(Entry("none", "absent.yaml"))
    found, table, code = count(entries)
    assert code == 1
    assert "set data.num_frames=3" in found["short"]["error"]
    assert "absent.yaml" in found["none"]["error"]
    assert found["grid"]["error"] is None
    assert found["cut"]["error"] == "Expected cut to decode a clip of (3, 8, 32, 32), got (3, 8, 32, 31)."
    assert found["broken"]["error"] == "TypeError: a mistake of its author"
    assert "- short failed: " in table


def test_a_class_that_reads_values_is_counted_as_far_as_it_goes(count):
    found, table, code = count([entry("built", Selfish), entry("run", Selfish, encodes=True)])
    assert code == 0
    assert found["built"]["flops"] == {"encode": 0, "decode": 0}
    assert found["run"]["flops"] is None
    assert {model["compression_rate"] for model in found.values()} == {1 / 16}
    assert "run: latents as its class states them, FLOPs not counted: Expected Selfish to run on the meta" in table


def test_a_checkpoint_alone_knows_its_model(count):
    found, _, _ = count([Entry("trained", checkpoint=checkpoint(Path("a.ckpt"), pool=8))])
    assert found["trained"]["compression_rate"] == 1 / 64


@pytest.mark.parametrize("size", [{"num_frames": None}, {"resolution": None}])
def test_clips_of_no_size_are_refused(count, size):
    with pytest.raises(UserError, match="clips of one size for --meta"):
        count([entry("grid", Pool)], Absent(**size, eval_batch_size=1))


def test_arguments_stand_over_those_of_the_config(count):
    wide = entry("wide", Pool, pool=4, sigma=0.2)
    wide.arguments = {"pool": 8}
    found, _, _ = count([wide, Entry("bare", checkpoint=checkpoint(Path("a.ckpt")), arguments={"pool": 8})])
    given = found["wide"]["model"]["init_args"]
    assert (given["pool"], given["sigma"], found["wide"]["compression_rate"]) == (8, 0.2, 1 / 64)
    assert "Expected a config for the arguments of bare" in found["bare"]["error"]


@pytest.mark.parametrize("flag", [["--meta"], ["--meta", "true"], ["--meta=true"]])
def test_the_command_counts_one_model_of_a_config_or_a_list(flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    one = ["test", "--config", str(ROOT / "configs/demo.yaml"), *flag, "--name", "demo"]
    assert main([*one, "--results_dir", "one"]) == 0
    listed = {"autoencoders": [{"name": "demo", "config": str(ROOT / "configs/demo.yaml")}]}
    Path("listed.yaml").write_text(yaml.safe_dump(listed))
    data = ["--data", "ucf101", "--data.root=absent", "--data.resolution=64"]
    assert main(["test", *flag, "-c", "listed.yaml", *data, "--results_dir=two"]) == 0
    found = [json.loads(Path(folder, "meta.json").read_text()) for folder in ("one", "two")]
    assert found[0] == found[1]
    assert (found[0]["clip"], found[0]["models"][0]["parameters"]) == ([3, 16, 64, 64], 1_506_392)
    assert set(found[0]["versions"]) == {"python", "vidtwin", "torch"}
    assert "| demo " in capsys.readouterr().out


# The tables of the docs.

PAGES = {"seed_systems": "benchmark.md", "library": "library.md"}


def shown(name):
    """The command's table as the page shows it: its header and rows, and the notes below."""
    text = (ROOT / "docs" / PAGES[name]).read_text()
    found = re.search(
        rf"vidtwin test --config configs/benchmark/{name}\.yaml --meta\n+((?:\|.*\n)+)\n((?:- .*\n)+)", text
    )
    assert found, f"docs/{PAGES[name]} has no table below its command"
    return found[1], found[2]


def cells(line):
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


@pytest.mark.parametrize("name", PAGES)
def test_the_rates_in_the_docs_are_those_of_the_latents_beside_them(name):
    head, _, *lines = map(cells, shown(name)[0].splitlines())
    assert len(lines) == len(yaml.safe_load((ROOT / f"configs/benchmark/{name}.yaml").read_text())["autoencoders"])
    for line in lines:
        row = dict(zip(head, line, strict=True))
        sizes = [[int(size) for size in re.findall(r"\d+", part)] for part in row["latents"].split(",")]
        assert f"{100 * sum(map(math.prod, sizes)) / (3 * 16 * 224 * 224):.4f}" == row["rate (%)"], row


@pytest.mark.slow
@pytest.mark.parametrize("name", PAGES)
def test_the_docs_show_what_the_command_prints(name, tmp_path, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["test", "--config", f"configs/benchmark/{name}.yaml", "--meta", f"--results_dir={tmp_path}"]) == 0
    table, notes = shown(name)
    printed = (tmp_path / "meta.md").read_text()
    assert printed.startswith(table)
    # Versions are those of the day.
    assert printed[len(table) :].strip().splitlines()[:-1] == notes.strip().splitlines()[:-1]


def test_the_librarys_sweep_has_every_official_model():
    listed = yaml.safe_load((ROOT / "configs/benchmark/library.yaml").read_text())["autoencoders"]
    trainings = re.compile("finetune|.*_(tiny|decoder)")
    names = {path.stem for path in (ROOT / "configs/library").glob("*.yaml")}
    assert {entry["name"] for entry in listed} == {name for name in names if not trainings.fullmatch(name)}


def test_the_device_of_a_count_does_not_stay(count):
    count([entry("grid", Pool)])
    assert torch.empty(1).device.type == "cpu"


def test_codecs_are_left_out_by_one_line(tmp_path, capsys):
    entries = [Entry("Pool", model="sweeping.Pool"), Entry("jpeg", model="vidtwin.baselines.codecs.JPEG")]
    assert sweep(tmp_path / "r", entries, Absent(), references=[], meta=True).run() == 0
    assert [model["name"] for model in json.loads((tmp_path / "r" / "meta.json").read_text())["models"]] == ["Pool"]
    assert "left out jpeg: codecs have no weights" in capsys.readouterr().err
