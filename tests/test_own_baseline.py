"""docs/your_own_baseline.md from its first line to the row of the table, as an installed package beside ours."""

import importlib
import importlib.metadata
import importlib.util
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vidtwin import plugins
from vidtwin.cli import main
from vidtwin.datamodules.synthetic import write_ucf_like

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs/your_own_baseline.md").read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"```(toml|python|bash)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [shlex.split(line) for line in BLOCKS["bash"].replace("\\\n", " ").splitlines()]
FILES = re.findall(r"`(my-baseline/\S+)`", PAGE)
SMALL = [
    "--data.num_frames=8",
    "--data.resolution=16",
    "--data.batch_size=2",
    "--data.eval_batch_size=2",
    "--data.num_workers=0",
    "--trainer.enable_progress_bar=false",
]


def commands(name: str) -> list[str]:
    """Arguments of the page's one `vidtwin NAME`."""
    (words,) = [words[2:] for words in COMMANDS if words[:2] == ["vidtwin", name]]
    return words


def columns(text: str) -> list[str]:
    """List the columns of the first table in Markdown."""
    header = next(line for line in text.splitlines() if line.startswith("| model"))
    return [cell.strip() for cell in header.split("|")]


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """The page's package, installed into a folder of its own that is on the path as long as the test runs."""
    for tool in ("pip", "setuptools"):
        if importlib.util.find_spec(tool) is None:
            pytest.skip(f"needs {tool} in this environment to build the page's package")
    if "my_baseline" in plugins.available("vidtwin.autoencoders"):
        pytest.skip("the page's package is installed here: pip uninstall my-baseline")
    for path, kind in zip(FILES, ("toml", "python"), strict=True):
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(BLOCKS[kind], encoding="utf-8")
    site = tmp_path / "site"
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run(
        [*pip, "--target", str(site), str(tmp_path / "my-baseline")], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    shutil.copytree(ROOT / "configs", tmp_path / "configs")
    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path / "hub"))  # no LPIPS, as where the page was written
    monkeypatch.setenv("VIDTWIN_OFFLINE", "1")
    monkeypatch.chdir(tmp_path)  # which holds the package's folder too: it must not hide what was installed
    monkeypatch.syspath_prepend(site)
    yield site
    sys.modules.pop("my_baseline", None)


@pytest.mark.usefixtures("without_pictures")
def test_the_page_leads_from_nothing_to_a_row_of_the_table_and_leaves_no_trace(
    installed, monkeypatch, capsys, tmp_path
):
    assert main(["plugins"]) == 0
    assert re.search(r"^  my_baseline +my_baseline\.MyBaseline$", capsys.readouterr().out, re.MULTILINE)

    assert main(["check", *commands("check")]) == 0
    printed = capsys.readouterr().out
    assert "ok       decode needs only the codes" in printed
    assert "codebooks          blocks 4,096 entries" in printed
    (row,) = [
        [cell.strip() for cell in line.split("|")] for line in PAGE.splitlines() if line.startswith("| MyBaseline")
    ]
    parameters, rate, bits = row[2:5]
    for line in (f"parameters         {parameters}", f"bits per pixel     {bits}"):
        assert f"{line}\n" in printed, "the table on the page is of another model than the code"
    exact = re.search(r"^compression rate   ([\d.]+)%$", printed, re.MULTILINE)
    assert f"{float(exact[1]):.4g}" == rate, "the table on the page is of another model than the code"

    data = write_ucf_like(tmp_path / "data", classes=2, groups=9, clips=1, size=(32, 24), frames=30)
    small = [*SMALL, f"--data.root={data}"]
    steps = ["--trainer.max_steps=4", "--trainer.val_check_interval=4", "--model.scheduler.warmup_steps=1"]
    assert main(["fit", *commands("fit"), *small, *steps]) == 0
    assert main(["test", *commands("test"), *small]) == 0
    (row,) = Path("results/demo/rows").glob("MyBaseline/results.json")
    result = json.loads(row.read_text())
    assert result["kind"] == "trained"
    table = Path("results/demo/table.md").read_text()
    assert re.search(r"^\| MyBaseline +\|", table, re.MULTILINE)
    assert columns(table) == columns(PAGE), "the page's table has other columns than the command writes now"

    shutil.rmtree(installed)
    monkeypatch.undo()
    sys.modules.pop("my_baseline")
    importlib.invalidate_caches()
    assert "my_baseline" not in plugins.available("vidtwin.autoencoders")
    assert main(["check", "my_baseline"]) == 2


def test_the_page_is_short():
    lines = [line for line in PAGE.splitlines() if line.strip() and not line.startswith(("|", "```"))]
    assert len(lines) <= 60


def test_every_command_of_the_page_is_one_that_this_test_runs_or_replaces():
    assert [words[:3] for words in COMMANDS if words[0] != "vidtwin"] == [
        ["python", "-m", "pip"],
        ["python", "-m", "vidtwin.datamodules.synthetic"],
    ]
    assert [words[1] for words in COMMANDS if words[0] == "vidtwin"] == ["check", "fit", "test"]
