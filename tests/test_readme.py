"""README.md and docs/training.md: their commands parse, their Python runs, their files exist."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
TRAINING = (ROOT / "docs/training.md").read_text()
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README + TRAINING, re.DOTALL)
PYTHON = [text for kind, text in BLOCKS if kind == "python"]
COMMANDS = [line for kind, text in BLOCKS if kind == "bash" for line in text.splitlines() if line.startswith("vidtwin")]
COMMANDS += re.findall(r"^    (vidtwin .*)$", README, re.MULTILINE)


ON_VIDEOS = [
    c
    for c in COMMANDS
    if c.split()[1] in ("reconstruct", "decouple", "reenact", "encode", "decode", "convert", "export")
]
ON_DATA = [
    c for c in COMMANDS if c.split()[1] in ("prepare", "doctor", "cache", "check", "generate", "score")
]  # these parse their own options


@pytest.mark.parametrize("command", ON_DATA, ids=lambda c: " ".join(c.split()[1:3]))
def test_a_command_on_data_has_options_that_exist(command, capsys):
    from vidtwin.cli import main

    _, name, *words = shlex.split(command)
    assert main([name, "--help"]) == 0
    text = capsys.readouterr().out
    assert [word for word in words if word.startswith("--") and not re.search(rf"{word}\b", text)] == []


@pytest.mark.parametrize(
    "command",
    [c for c in COMMANDS if "my_tokenizer" not in c and c not in [*ON_DATA, *ON_VIDEOS]],
    ids=lambda c: " ".join(shlex.split(c)[1:4]),
)
def test_a_command_has_options_that_exist(command, monkeypatch, capsys, tmp_path):
    """Everything up to the run itself: each option is parsed, with its class and its config."""
    from vidtwin.cli import main
    from vidtwin.storage import checkpoints

    monkeypatch.chdir(ROOT)
    spec = {"class_path": "vidtwin.models.vidtwin.VidTwin", "init_args": {}}
    monkeypatch.setattr(checkpoints, "read", lambda path, lazily=False: {"state_dict": {}, "model_spec": spec})
    monkeypatch.setattr("vidtwin.cli.trainer_commands.check_weights", lambda *_: None)
    argv = shlex.split(command)[1:]
    assert main([*argv, "--print_config"]) == 0
    assert "autoencoder:" in capsys.readouterr().out


def test_the_commands_on_videos_and_the_python_after_them_run(tmp_path, monkeypatch, capsys):
    """As they stand, one after the other, with a small model on made-up videos."""
    import numpy as np
    import torch
    from sweeping import Pool, checkpoint
    from tiny import tiny_model

    from vidtwin.cli import main
    from vidtwin.video import probe, write_video

    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    checkpoint(tmp_path / "runs/demo/checkpoints/last.ckpt", model=tiny_model())
    noise = np.random.default_rng(0).integers(0, 256, (9, 5, 6, 3), np.uint8)
    for name in ("a.mp4", "b.mp4", "videos/c.mp4", "data/UCF-101/Archery/d.mp4"):
        write_video(name, np.roll(noise.repeat(8, 1).repeat(8, 2), len(name), 1), 25)
    assert len(ON_VIDEOS) == 8
    Pool(frames=4).save_pretrained("pool")
    for command in ON_VIDEOS:
        words = shlex.split(command)[1:]
        if words[0] == "export":  # which takes long for VidTwin; tests/apply/test_export.py does so
            words = [word.replace("pretrained", "pool") for word in words] + ["--resolution=32"]
        assert main(words) == 0, capsys.readouterr().err
    assert probe("reconstructions/a.mp4").num_frames == probe("decoded/c.mp4").num_frames == 9
    for file in ("decoupled/a.png", "crossed/grid.png", "pretrained/config.json", "exported/manifest.json"):
        assert Path(file).is_file(), file
    exec(compile(PYTHON[0], "README.md", "exec"), {"__name__": "__main__"})
    assert probe("again.mp4").num_frames == tiny_model().num_frames
    page = (ROOT / "docs/own_videos.md").read_text()
    namespace = {"__name__": "__main__"}
    for block in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(block, "own_videos.md", "exec"), namespace)
    assert probe("both.mp4").num_frames == tiny_model().num_frames
    assert probe("long.mp4").num_frames == 9


def test_ones_own_autoencoder_keeps_the_contract_and_trains_by_its_class_path(tmp_path, monkeypatch):
    from vidtwin.cli import main

    monkeypatch.chdir(tmp_path)
    Path("my_tokenizer.py").write_text(PYTHON[1])
    runpy.run_path("my_tokenizer.py", run_name="__main__")
    check, command = [command for command in COMMANDS if "my_tokenizer" in command]
    assert main(shlex.split(check)[1:]) == 0
    small = ["--data.resolution=16", "--data.num_frames=4", "--data.batch_size=1", "--data.num_workers=0"]
    assert main([*shlex.split(command)[1:], *small, "--data.num_train=1", "--data.num_val=1"]) == 0


def test_links_and_targets_exist():
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", README)
    missing = [link for link in links if not link.startswith("http") and not (ROOT / link).exists()]
    for page in (ROOT / "docs").glob("*.md"):
        links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
        missing += [link for link in links if not link.startswith("http") and not (page.parent / link).exists()]
    assert missing == []
    pages = [path.relative_to(ROOT).as_posix() for path in (ROOT / "docs").glob("*.md")]
    assert [page for page in pages if f"({page})" not in README] == []  # the index of the documentation
    makefile = (ROOT / "Makefile").read_text()
    assert all(f"\n{target}:" in makefile for target in re.findall(r"^make ([\w-]+)", README, re.MULTILINE))


def test_nothing_was_left_to_fill_in():
    pages = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]
    assert [page.name for page in pages if re.search(r"\b[A-Z]+_(TABLE|SECTION)\b|TODO", page.read_text())] == []


def test_configs_that_are_named_exist():
    names = re.findall(r"configs/[\w/]+\.yaml", README + TRAINING)
    assert names
    assert [name for name in names if not (ROOT / name).is_file()] == []


def test_ci_calls_the_readmes_test_command():
    assert "\nmake test\n" in (ROOT / ".ci" / "run").read_text()
    assert "make test " in README


def test_the_baselines_page_runs_and_names_configs_that_exist(capsys):
    page = (ROOT / "docs" / "baselines.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    exec(compile(code, "baselines.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out == "0.0703 bits per pixel\n"
    names = {path.stem for path in (ROOT / "configs/baselines").glob("*.yaml")}
    assert {name for name in names if f"`{name}`" not in page and f"`baselines/{name}`" not in page} <= {
        name for name in names if name.endswith("_tiny")
    }


def test_the_readme_is_short_and_needs_no_data_of_ours():
    assert len(README.splitlines()) <= 150
    assert [command for command in COMMANDS if "shared" in command] == []


def test_the_example_of_a_base_is_taken(tmp_path, monkeypatch, capsys):
    from vidtwin.cli import main

    monkeypatch.chdir(tmp_path)
    (example,) = [text for kind, text in BLOCKS if kind == "yaml"]
    assert main(["configs"]) == 0
    Path("configs/mine.yaml").write_text(example)
    assert main(["fit", "--config", "configs/mine.yaml", "--print_config"]) == 0
    assert "depth: 12\n" in capsys.readouterr().out
