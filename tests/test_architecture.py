"""Who may import whom (docs/architecture.md), read from the sources with `ast`."""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import vidtwin

ROOT = Path(__file__).resolve().parents[1]
LINKED = ("baselines", "datamodules")  # folders at the top that vidtwin/ links to
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities")
# Ours that import Lightning, compute losses or load data.
_TRAINING = "losses datamodules training storage benchmark cli apply"
TRAINING = tuple(f"vidtwin.{name}" for name in _TRAINING.split())
# Of vidtwin.benchmark: what reads a results folder, or writes from it.
WITHOUT_TORCH = ("protocol", "rows", "table", "plots", "published", "report", "report_tables", "report_command")
PLUGIN = re.compile(r"vidtwin\.(baselines|datamodules)\.\w[\w.]*")


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # with what is imported from it: vidtwin.errors.UserError

    def within(self, *packages: str) -> bool:
        return any(self.name == package or self.name.startswith(f"{package}.") for package in packages)


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = ("vidtwin", *parts) if parts[0] in LINKED else parts
    return ".".join(parts)


def imports(path: Path, root: Path) -> Iterator[Import]:
    """Every import, in functions too; relative ones and the lazy names of vidtwin/__init__.py resolved."""
    package = module_of(path, root).rpartition(".")[0]
    for node in ast.walk(ast.parse(path.read_text(), str(path))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield Import(node.lineno, alias.name)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, *([base] if base else [])])
            for alias in node.names:
                source = vidtwin._EXPORTS.get(alias.name, base) if base == "vidtwin" else base
                yield Import(node.lineno, f"{source}.{alias.name}")


def named_plugins(path: Path) -> Iterator[Import]:
    """Class paths of plug-ins in strings, docstrings aside: an import by another way."""
    tree = ast.parse(path.read_text(), str(path))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            for match in PLUGIN.finditer(node.value):
                yield Import(node.lineno, match[0])


def sources(root: Path) -> list[Path]:
    """Each file once: by the folders at the top, not by the links."""
    inside = [path for path in (root / "vidtwin").rglob("*.py") if path.relative_to(root).parts[1] not in LINKED]
    return sorted([*inside, *(path for folder in LINKED for path in (root / folder).rglob("*.py"))])


def broken_rules(path: Path, root: Path) -> Iterator[str]:
    module = module_of(path, root)
    part, name = [*module.split("."), "", ""][1:3]
    found = list(imports(path, root))

    def report(entry: Import, rule: str) -> str:
        return f"{path.relative_to(root).as_posix()}:{entry.line} imports {entry.name}, but rule {rule}"

    for entry in found:
        ours = entry.within("vidtwin")
        basic = entry.within("vidtwin.errors", "vidtwin.files")
        if part in ("layers", "posteriors", "video") and ours and not basic and not entry.within(f"vidtwin.{part}"):
            yield report(entry, f"1 says that {part} imports nothing of ours but errors and files")
        if part in ("models", "baselines") and entry.within(*LIGHTNING, *TRAINING):
            yield report(entry, "2 says that a model or a baseline knows no Lightning, no loss and no data")
        if part == "baselines" and entry.within("vidtwin.baselines") and not entry.within(f"vidtwin.baselines.{name}"):
            yield report(entry, "2 says that a baseline imports no other baseline (what two share moves to layers)")
        below = entry.within(
            "vidtwin.video",
            "vidtwin.data",
            "vidtwin.distributed",
            "vidtwin.storage.latent_files",
            "vidtwin.datamodules",
        )
        if part == "datamodules" and ours and not basic and not below:
            yield report(
                entry, "4 says that datamodules import only data, video, distributed, latent_files, errors and files"
            )
        heavy = (*LIGHTNING, "torch", "torchvision", "torchmetrics")
        if part == "benchmark" and name in WITHOUT_TORCH and entry.within(*heavy):
            yield report(entry, "4 says that tables and plots read JSON and CSV and import no torch")
    if part not in LINKED:
        for entry in [*found, *named_plugins(path)]:
            if entry.within("vidtwin.baselines", "vidtwin.datamodules", *LINKED):
                yield report(entry, "3 says that the core never names a plug-in (YAML and entry points do)")


@pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_keep_the_rules(path):
    assert list(broken_rules(path, ROOT)) == []


def test_every_part_with_a_rule_is_read():
    read = {module_of(path, ROOT) for path in sources(ROOT)}
    assert {
        "vidtwin.posteriors",
        "vidtwin.video.reading",
        "vidtwin.layers.attention",
        "vidtwin.models.vidtwin",
        "vidtwin.benchmark.table",
        "vidtwin.benchmark.protocol",
        "vidtwin.baselines.references",
        "vidtwin.datamodules.clips",
        "vidtwin.datamodules.data_module",
    } <= read


@pytest.mark.parametrize(
    ("file", "source", "expected"),
    [
        ("vidtwin/layers/conv3d.py", "\nfrom vidtwin import posteriors", ":2 imports vidtwin.posteriors, but rule 1"),
        ("vidtwin/layers/conv3d.py", "from ..models import vidtwin", ":1 imports vidtwin.models.vidtwin, but rule 1"),
        ("vidtwin/posteriors.py", "import vidtwin.autoencoder", ":1 imports vidtwin.autoencoder, but rule 1"),
        (
            "vidtwin/video/reading.py",
            "def read():\n    from vidtwin.autoencoder import TemporalSpec",
            ":2 imports vidtwin.autoencoder.TemporalSpec, but rule 1",
        ),
        ("vidtwin/models/new.py", "import lightning.pytorch as pl", ":1 imports lightning.pytorch, but rule 2"),
        (
            "baselines/new.py",
            "from vidtwin import AutoencoderTask",
            ":1 imports vidtwin.training.task.AutoencoderTask, but rule",
        ),
        ("baselines/new.py", "from vidtwin.losses import LPIPS", ":1 imports vidtwin.losses.LPIPS, but rule 2"),
        ("baselines/new.py", "from .references import MeanColour", "a baseline imports no other baseline"),
        ("baselines/new.py", "from . import references", "a baseline imports no other baseline"),
        ("vidtwin/task.py", "from vidtwin.baselines import references", "rule 3 says"),
        ("vidtwin/task.py", "from .datamodules.clips import ClipDataset", "rule 3 says"),
        ("vidtwin/task.py", "import datamodules", "rule 3 says"),
        (
            "vidtwin/cli.py",
            'import_module("vidtwin.baselines.references")',
            ":1 imports vidtwin.baselines.references, but rule 3",
        ),
        ("datamodules/new.py", "from vidtwin.autoencoder import TemporalSpec", "rule 4 says that datamodules"),
        ("vidtwin/benchmark/table.py", "from torch import Tensor", ":1 imports torch.Tensor, but rule 4"),
    ],
)
def test_a_planted_violation_is_found_where_it_is(tmp_path, file, source, expected):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    found = [line for path in sources(tmp_path) for line in broken_rules(path, tmp_path)]
    assert len(found) == 1
    assert found[0].startswith(f"{file}:")
    assert expected in found[0]


@pytest.mark.parametrize(
    ("file", "source"),
    [
        ("vidtwin/layers/conv3d.py", "from vidtwin.errors import UserError\nfrom .attention import SelfAttention"),
        ("vidtwin/models/new.py", "from vidtwin import UserError, weights\nfrom vidtwin.layers import attention"),
        ("baselines/new.py", "from vidtwin.autoencoder import VideoAutoencoder\nimport torch"),
        ("datamodules/new.py", "import lightning\nfrom vidtwin.video import probe\nfrom .clips import Video"),
        ("vidtwin/plugins.py", '"""Such as vidtwin.datamodules.ucf101."""\nGROUP = "vidtwin.datamodules"'),
        ("vidtwin/benchmark/sweep.py", "import torch"),
    ],
)
def test_what_the_rules_allow_is_not_reported(tmp_path, file, source):
    path = tmp_path / file
    path.parent.mkdir(parents=True)
    path.write_text(source + "\n")
    assert list(broken_rules(path, tmp_path)) == []


LIGHT = """
import contextlib, io, sys
{}
print(sorted({{"torch", "lightning", "torchvision", "av", "jsonargparse"}} & set(sys.modules)))
"""


@pytest.mark.parametrize(
    "code",
    [
        "import vidtwin.cli\nwith contextlib.redirect_stdout(io.StringIO()):\n    vidtwin.cli.main(['--help'])",
        "from vidtwin.benchmark import plots, protocol, published, report, report_command, rows, table",
    ],
    ids=["vidtwin --help", "tables"],
)
def test_what_needs_no_torch_imports_none(code):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
