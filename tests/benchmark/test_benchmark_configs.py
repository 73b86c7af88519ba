"""Every config of a sweep is one that `vidtwin test` runs, and its models have the rates that it says."""

import ast
import inspect
import io
import json
import math
import re
import shlex
from contextlib import redirect_stdout
from dataclasses import fields
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from vidtwin import plugins
from vidtwin.benchmark.loaded_model import CLAIM_TOLERANCE, LoadedModel
from vidtwin.benchmark.protocol import PRESETS, ProtocolSettings
from vidtwin.benchmark.sweep import FVD, Entry, Sweep
from vidtwin.cli import main, model_config
from vidtwin.datamodules.synthetic import write_ucf_like
from vidtwin.errors import UserError
from vidtwin.video import write_video

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "configs" / "benchmark"
README, PAGE = ROOT / "README.md", ROOT / "docs" / "benchmark.md"
SWEEPS = sorted(path.stem for path in FOLDER.glob("*.yaml"))
TINY_SWEEPS = ["demo", "evidence", "seed_systems_tiny"]  # their models are tiny as they are
FULL_SWEEPS = [name for name in SWEEPS if name not in TINY_SWEEPS]
# seed_systems runs as seed_systems_tiny; tests/baselines/test_library.py has the models of library at small sizes.
RUN_SWEEPS = [name for name in SWEEPS if name not in ("seed_systems", "library")]
QUICK_SWEEPS = ["demo", "evidence", "native", "fps40"]
PAPER_SWEEPS = [name for name in FULL_SWEEPS if name != "native"]  # on other videos

# Rows that run; `demo`, and the tests of codecs and of windows have the others.
CHOSEN = {
    "evidence": ["VidTwin", "MAGVIT-v2", "x264 51", "DCT step 512"],
    "native": ["MAGVIT-v2 (5 channels)", "WF-VAE", "CV-VAE"],
}

# Arguments that make each model small; its structure and its latents' sizes stay those of the config.
SMALL: dict[str, dict[str, Any]] = {
    "VidTwin": {"resolution": 32, "patch_size": 4, "hidden_size": 48, "depth": 1, "num_heads": 4},
    "MAGVIT2": {"channels": 8, "num_blocks": 1},
    "CMD": {"resolution": 32, "hidden_size": 48, "depth": 1, "num_heads": 4},
    "IVideoGPT": {"resolution": 32, "inner_resolution": 32, "channels": [32, 32], "layers_per_block": 1}
    | {"latent_channels": 8, "codebook_size": 16, "dynamics_codebook_size": 16, "norm_groups": 8}
    | {"attention_resolution": 16},
    "WFVAE": {"channels": 8, "encoder_flow_channels": 8, "decoder_flow_channels": 8, "num_blocks": 1},
    "ODVAE": {"channels": 8, "num_blocks": 1, "norm_groups": 4},
    "CVVAE": {"channels": 8, "num_blocks": 1, "norm_groups": 4},
    "OpenSora": {"channels": [8, 8, 8, 16], "num_blocks": 1, "norm_groups": 4}
    | {"frame_channels": [8, 8, 8, 16], "frame_blocks": 1},
}
# Claimed and counted rates that differ by more than a rounding, all else agrees.
DIFFER = {("paper", "iVideoGPT")}
DIFFER |= {("seed_systems", name) for name in ("iVideoGPT", "CV-VAE", "OD-VAE", "CogVideoX")}
OPTIONS = ["--data.eval_batch_size=2", "--data.num_workers=0", "--accelerator=cpu"]
OPTIONS += ["--cost=false", "--downstream=false", "--players=0", "--progress=false"]


def sweep(name: str) -> dict[str, Any]:
    content: dict[str, Any] = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    if isinstance(content["data"], str):
        content["data"] = yaml.safe_load((FOLDER / content["data"]).read_text())
    return content


def paths(entry: dict[str, Any]) -> list[Path]:
    """The configs of an entry, which stand relative to the sweep's."""
    named = entry.get("config") or []  # a codec is named by its class
    given = named if isinstance(named, list) else [named]
    return [(FOLDER / path).resolve() for path in given]


def at_full_size(entry: dict[str, Any]) -> Any:
    with torch.device("meta"):
        return model_config.build(*model_config.parse(paths(entry), arguments=entry.get("arguments")))


def made_small(entry: dict[str, Any], folder: Path, tiny: bool) -> dict[str, Any]:
    """The entry with a config of small sizes behind its own, and a checkpoint of that model in the place of its.

    Every key is given: what a list in a later config leaves out, it takes from the one before.
    """
    mark = re.sub(r"\W+", "_", entry["name"])
    configs = [str(path) for path in paths(entry)]
    if not tiny:
        kind = model_config.spec(model_config.parse(configs)[1])["class_path"].rpartition(".")[2]
        configs.append(str(folder / f"{mark}.yaml"))
        Path(configs[-1]).write_text(yaml.safe_dump({"model": {"autoencoder": {"init_args": SMALL[kind]}}}))
    small = {"claimed_rate": None, "windows": False, "checkpoint": None, "arguments": None, "model": None, **entry}
    small["config"] = configs or None
    if small["checkpoint"]:
        model = model_config.build(*model_config.parse(configs))
        state = {f"autoencoder.{key}": value for key, value in model.state_dict().items()}
        small["checkpoint"] = f"{mark}.ckpt"
        torch.save({"state_dict": state, "model_spec": model.spec()}, folder / small["checkpoint"])
    return small


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two videos of 40 frames at 50 per second."""
    folder = tmp_path_factory.mktemp("fast")
    write_videos(folder, 50)
    return folder


@pytest.fixture(scope="module")
def ucf(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ucf_like(tmp_path_factory.mktemp("ucf") / "data", 2, 3, 1, size=(48, 32), frames=40) / "UCF-101"


def write_videos(folder: Path, fps: int) -> None:
    for place in range(2):
        still = np.random.default_rng(place).integers(0, 255, (1, 5, 6, 3), dtype=np.uint8).repeat(8, 1).repeat(8, 2)
        frames = np.concatenate([np.roll(still, 2 * step, axis=2) for step in range(40)])
        write_video(folder / f"v{place}.mp4", frames, fps)


@pytest.mark.parametrize(
    "name", [name if name in QUICK_SWEEPS else pytest.param(name, marks=pytest.mark.slow) for name in RUN_SWEEPS]
)
def test_a_sweep_runs_with_a_row_for_each_entry(name, root, ucf, tmp_path, monkeypatch, capsys, request):
    if name != "demo":
        request.getfixturevalue("without_pictures")
    monkeypatch.chdir(tmp_path)  # what a config names is found beside it, from any folder
    content = sweep(name)
    # Of a codec one quality.
    chosen = {entry.get("model") or entry["name"]: entry for entry in content["autoencoders"]}.values()
    if name in CHOSEN:
        chosen = [entry for entry in chosen if entry["name"] in CHOSEN[name]]
        assert len(chosen) == len(CHOSEN[name])
    entries = [made_small(entry, tmp_path, name not in FULL_SWEEPS) for entry in chosen]
    Path("small.yaml").write_text(yaml.safe_dump({"autoencoders": entries}))
    data = content["data"]
    videos = ucf if data["class_path"].endswith("UCF101") else root
    argv = ["--config", str(FOLDER / f"{name}.yaml"), "--config", "small.yaml", f"--data.root={videos}", *OPTIONS]
    if name == "evidence":  # tests of their own have these metrics
        argv += ["--st_lpips=null", "--vmaf=false", "--cvvdp=null", "--random_players=0"]
        argv += [f"--rate_distortion.{key}" for key in ("bits=[4]", "noise=[0.1]", "clips=2")]
    if name == "native":
        argv.append("--data.eval_batch_size=1")
    else:
        argv.append(f"--data.resolution={64 if name in TINY_SWEEPS else 32}")
    assert main(["test", *argv, "--checkpoints_dir=."]) == 0
    out = Path(content["results_dir"])
    rows = {path.parent.name: json.loads(path.read_text()) for path in out.glob("rows/*/results.json")}
    references = {key for key, row in rows.items() if row["kind"] == "reference" and not row["coding"]}
    assert references == {"mean_colour", "temporal_mean"}
    assert set(rows) - references == {entry["name"] for entry in entries}
    num_frames = data["init_args"].get("num_frames", 16) or 40  # of whole videos
    whole, first = name == "native", name == "seed_systems_tiny"
    # Of two videos of 40 frames: UCF-101's have 25 a second and clips 8, the others have 50.
    shown = 40 * 8 / 25 if name in ("demo", "evidence") else 40 * (data["init_args"]["fps"] or 50) / 50
    for entry in entries:
        row = rows[entry["name"]]
        assert row["kind"] == ("trained" if entry["checkpoint"] else "reference" if entry["model"] else "untrained")
        assert row["failed_clips"] == []
        claimed = entry["claimed_rate"]
        agrees = claimed is not None and abs(row["compression_rate"] - claimed) <= CLAIM_TOLERANCE * claimed
        assert row["claimed"] == (None if claimed is None else {"rate": claimed, "agrees": agrees})
        in_windows = {"num_frames": 16, "windows": num_frames // 16}
        if whole:
            of_any_length = entry["name"] in ("MAGVIT-v2 (5 channels)", "Open-Sora")
            in_windows = {"num_frames": 16 if of_any_length else 17, "windows": None}
        assert row["windows"] == (in_windows if entry["windows"] and num_frames > 16 else None)
        assert row["num_clips"] == 2 * (1 if first else math.ceil(shown / num_frames))
    protocol = json.loads((out / "protocol.json").read_text())
    assert protocol["dataset"] == content.get("dataset")
    clips = (protocol["data"]["num_frames"], protocol["data"]["tail"])
    assert clips == (("all of a video", "none") if whole else (num_frames, "none" if first else "pad"))
    written = {path.name for path in out.iterdir()}
    assert {"table.csv", "table.md", "table.tex", "comparison.json"} <= written
    if name == "demo":
        assert {"plots", "report.html"} <= written
        # The page's Python, which reads its results.
        (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
        exec(compile(code, "benchmark.md", "exec"), {"__name__": "__main__"})
        shown = ast.literal_eval(capsys.readouterr().out.splitlines()[-1])
        assert shown == {key: row["metrics"]["psnr"]["mean"] for key, row in rows.items()}


@pytest.mark.parametrize("name", SWEEPS)
def test_a_sweep_names_files_that_exist_and_names_that_differ(name):
    content = sweep(name)
    assert [path for entry in content["autoencoders"] for path in paths(entry) if not path.is_file()] == []
    text = (FOLDER / f"{name}.yaml").read_text()
    assert [path for path in re.findall(r"configs/[\w/]+\.yaml", text) if not (ROOT / path).is_file()] == []
    assert content["protocol"]["preset"] in PRESETS
    assert f"configs/benchmark/{name}.yaml" in text  # its own command


def test_sweeps_leave_their_results_in_folders_of_their_own():
    folders = [sweep(name)["results_dir"] for name in SWEEPS]
    assert len(set(folders)) == len(folders)


@pytest.mark.parametrize("name", PAPER_SWEEPS)
def test_the_papers_sweeps_take_the_clips_of_its_protocol(name):
    data = sweep(name)["data"]["init_args"]
    if name != "fps40":
        kept = {key: value for key, value in data.items() if key not in ("num_frames", "resolution")}
        assert kept == yaml.safe_load((ROOT / "configs/data/mcl_jcv.yaml").read_text())["init_args"]
    wanted = {
        key: value for key, value in PRESETS["vidtwin"]["data"].items() if key not in ("num_frames", "resolution")
    }
    assert wanted == {"clip": f"{data['eval_clips']} clips of a video", "tail": data["tail"]}


@cache
def run_name(config: Path) -> str:
    """Return the name that a config's logger gives to its runs."""
    with redirect_stdout(io.StringIO()) as printed:
        assert main(["fit", f"--config={config}", "--print_config"]) == 0
    return str(yaml.safe_load(printed.getvalue())["trainer"]["logger"]["init_args"]["name"])


@pytest.mark.parametrize("name", FULL_SWEEPS)
def test_the_checkpoints_are_where_the_commands_in_the_header_leave_them(name):
    """Of each `vidtwin fit`: the logger's folder, and in it the configs of the entry that takes the checkpoint."""
    text = (FOLDER / f"{name}.yaml").read_text().replace("\\\n#", "")
    commands = [shlex.split(line) for line in re.findall(r"^#   vidtwin (fit .*)$", text, re.MULTILINE)]
    converted = dict(re.findall(r"^#   vidtwin convert PATH/TO/\S+ runs/(\S+)\s+--model (\w+)", text, re.MULTILINE))
    left = {}
    for command in commands:
        configs = [ROOT / path for flag, path in pairwise(command) if flag == "--config"]
        given = [path for path in configs if path.parent.name != "trainer"]
        folder = run_name(given[0])
        if "--trainer.logger.name" in command:
            folder = command[command.index("--trainer.logger.name") + 1]
        left[f"{folder}/version_0/checkpoints/last.ckpt"] = given
    for entry in sweep(name)["autoencoders"]:
        if entry["checkpoint"] in converted:
            spec = model_config.spec(model_config.parse(paths(entry))[1])
            assert plugins.resolve(converted[entry["checkpoint"]], "vidtwin.autoencoders") == spec["class_path"]
            continue
        wanted = [path for path in paths(entry) if path.stem != "setting1"]  # which vidtwin_base has
        assert left[entry["checkpoint"]] == wanted
    assert sweep(name)["checkpoints_dir"] == "runs"


@pytest.mark.parametrize(
    ("name", "rates"),
    [
        ("paper", [0.0020, 0.0065, 0.0685, 0.0150]),
        ("rates", [0.0011, 0.0016, 0.0020, 0.0048]),
        ("scales", [None] * 3),
        ("frames32", [None] * 2),
        ("fps40", [0.0020]),
        ("seed_systems", [None, 0.0020, None, 0.0065, 0.0685, 0.0150, *[0.0053] * 5, None]),
    ],
)
def test_claimed_rates_are_those_of_the_paper_and_agree_if_they_should(name, rates):
    entries = sweep(name)["autoencoders"]
    assert [entry.get("claimed_rate") for entry in entries] == rates
    for entry in entries:
        if claimed := entry.get("claimed_rate"):
            rate = at_full_size(entry).compression_rate((3, 16, 224, 224))
            assert (abs(rate - claimed) > CLAIM_TOLERANCE * claimed) == ((name, entry["name"]) in DIFFER), rate


def test_the_tiny_sweep_has_the_rows_of_the_papers_systems_of_the_same_configs():
    full, tiny = (sweep(name)["autoencoders"] for name in ("seed_systems", "seed_systems_tiny"))
    assert [(entry["name"], entry["config"]) for entry in tiny] == [(entry["name"], entry["config"]) for entry in full]
    for entry, small in zip(full, tiny, strict=True):
        claimed = small.get("claimed_rate")
        assert claimed in (None, entry.get("claimed_rate"))
        if claimed:
            assert at_full_size(small).compression_rate((3, 16, 64, 64)) == at_full_size(entry).compression_rate(
                (3, 16, 224, 224)
            )


def test_full_size_rates_are_those_that_the_headers_state():
    """Latent numbers by hand, over 3·T·224²."""
    clip = 3 * 16 * 224**2
    magvit, cmd, ivideogpt = (at_full_size(entry) for entry in sweep("paper")["autoencoders"][1:])
    assert magvit.compression_rate((3, 16, 224, 224)) == 5 * 4 * 28 * 28 / clip
    assert cmd.compression_rate((3, 16, 224, 224)) == (3 * 224 * 224 + 32 * 2 * 14 * 16) / clip
    assert ivideogpt.compression_rate((3, 16, 224, 224)) == 64 * (2 * 16 * 16 + 14 * 4 * 4) / clip
    for entry in sweep("scales")["autoencoders"]:
        assert round(at_full_size(entry).compression_rate((3, 16, 224, 224)), 6) == 0.002046
    windows, longer = (at_full_size(entry) for entry in sweep("frames32")["autoencoders"])
    assert round(windows.compression_rate((3, 16, 224, 224)), 6) == 0.002046
    assert longer.compression_rate((3, 32, 224, 224)) == (4 * 16 * 7 * 7 + 8 * 32 * 14) / (2 * clip)
    assert "0.1395%" in (FOLDER / "frames32.yaml").read_text()


def test_forty_frames_a_second_of_videos_with_25_are_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    write_videos(tmp_path / "slow", 25)
    argv = ["test", "--config", str(FOLDER / "fps40.yaml"), f"--data.root={tmp_path / 'slow'}", *OPTIONS]
    assert main(argv) == 2
    logged = capsys.readouterr().err
    assert "expected at least data.fps=40 frames per second, got 25" in logged
    assert not (tmp_path / "runs").exists()


def commands(path: Path) -> list[str]:
    """The commands on sweeps that a page or a config's header shows."""
    text = re.sub(r"\\\n#?", " ", path.read_text())
    return re.findall(r"^(?:#  )? *(vidtwin (?:test|report) .*(?:configs|runs)/benchmark/.*)$", text, re.MULTILINE)


@pytest.mark.parametrize("path", [README, PAGE, *FOLDER.glob("*.yaml")], ids=lambda path: path.stem)
def test_commands_that_are_shown_are_taken(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert commands(path)
    for command in commands(path):
        _, name, *argv = shlex.split(command.partition("    ")[0])
        if name == "report":
            assert len(argv) == 1
        else:
            assert main(["test", *argv, "--print_config"]) == 0
            assert "autoencoders:" in capsys.readouterr().out


def refused(argv: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, str]:
    """The models of a command that do not take its clips, at full size, each with the reason."""
    assert main(["test", *argv, "--print_config"]) == 0
    printed = yaml.safe_load(capsys.readouterr().out)
    data = {"num_frames": 16, "resolution": 224} | printed["data"]["init_args"]
    found = {}
    for entry in printed["autoencoders"]:
        model = at_full_size(entry)
        window = model.temporal.usual_length if entry.get("windows") else None
        try:
            side = data["resolution"]
            native = side is None and data["num_frames"] is None
            clip = (300, 1080, 1920) if native else (data["num_frames"], side, side)
            LoadedModel(entry["name"], "untrained", model, window=window, pads=native).check(*clip)
        except UserError as error:
            found[entry["name"]] = str(error)
    return found


PROTOCOLS = sorted((ROOT / "configs" / "protocols").glob("*.yaml"))


@pytest.mark.parametrize("path", [PAGE, *PROTOCOLS, FOLDER / "paper256.yaml"], ids=lambda path: path.stem)
def test_models_take_the_clips_of_the_protocols_that_they_are_shown_with(path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    shown = [command for command in commands(path) if "configs/protocols/" in command]
    assert shown
    for command in shown:
        assert refused(shlex.split(command)[2:], capsys) == {}, command


def test_the_models_that_do_not_take_the_peers_clips_are_those_that_the_page_names(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    for preset in ("vidtok", "wfvae"):
        protocol = ["--config", f"configs/protocols/{preset}.yaml"]
        assert set(refused(["--config", "configs/benchmark/paper.yaml", *protocol], capsys)) == {
            "VidTwin",
            "CMD",
            "iVideoGPT",
        }
        assert set(refused(["--config", "configs/benchmark/paper256.yaml", *protocol], capsys)) == {"VidTwin", "CMD"}


def test_the_page_names_every_option_every_preset_and_every_config():
    text = PAGE.read_text()
    options = set(inspect.signature(Sweep).parameters) - {"autoencoders", "read_config", "pictures", "strict"}
    options |= {each.name for each in fields(Entry)} | {f"fvd.{each.name}" for each in fields(FVD)}
    options |= {each.name for each in fields(ProtocolSettings)} - {"preset", "fvd", "weights"}
    missing = {name for name in options - {"fvd"} if f"`{name}`" not in text}
    assert missing == set()
    assert [name for name in [*PRESETS, *SWEEPS] if f"`{name}`" not in text] == []
    assert [link for link in re.findall(r"\]\((\w[^)#:]*\.md)", text) if not (PAGE.parent / link).exists()] == []


def test_the_pages_configs_are_taken(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    blocks = [yaml.safe_load(text) for text in re.findall(r"```yaml\n(.*?)```", PAGE.read_text(), re.DOTALL)]
    sweeps = [block for block in blocks if "autoencoders" in block]
    assert len(sweeps) == 2
    for block in sweeps:
        (tmp_path / "sweep.yaml").write_text(yaml.safe_dump(block))
        assert main(["test", "--config", str(tmp_path / "sweep.yaml"), "--print_config"]) == 0
