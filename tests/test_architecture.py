"""The import rules of docs/architecture.md, read from the sources with `ast`.

Imports inside functions count; those under `if TYPE_CHECKING:` run nothing and count in the check of circles alone.
"""

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
# From the ground up. A room (a package, or a module at the top of vidtwin/) imports from layers below its own.
LAYERS = (
    ("errors",),
    ("cards", "console", "files", "precision", "weights"),
    ("distributed", "entropy", "layers", "plugins", "posteriors", "schedules", "video"),
    ("compilation", "hub", "listing", "tables"),
    ("autoencoder", "data"),
    ("clips", "diffusion", "losses", "models", "baselines", "testing"),
    ("metrics", "storage"),
    ("apply", "datamodules", "training"),
    ("benchmark",),
    ("cli",),
    ("__main__",),
)
LAYER = {room: number for number, layer in enumerate(LAYERS) for room in layer}
# All of ours that data modules may use: they know no model, no loss and no metric.
_BELOW_DATA = (
    "errors files console distributed listing tables video data storage.latent_files storage.resumable datamodules"
)
BELOW_DATA = tuple(f"vidtwin.{name}" for name in _BELOW_DATA.split())
# Of vidtwin.benchmark: modules that read a results folder, or write from it.
WITH_TORCH = (
    "analysis",
    "cost",
    "downstream",
    "generation",
    "latent_coder",
    "loaded_model",
    "measurer",
    "memory",
    "meta",
)
WITH_TORCH += (
    "options",
    "plan",
    "players",
    "rate_distortion",
    "rfvd",
    "row_folder",
    "runner",
    "sweep",
    "training_cost",
)
PLUGIN = re.compile(r"vidtwin\.(baselines|datamodules)\.\w[\w.]*")


@dataclass(frozen=True)
class Import:
    line: int
    name: str  # with what is imported from it: vidtwin.errors.UserError

    def within(self, *packages: str) -> bool:
        return any(self.name == package or self.name.startswith(f"{package}.") for package in packages)

    @property
    def room(self) -> str:
        return [*self.name.split("."), ""][1] if self.within("vidtwin") else ""


def module_of(path: Path, root: Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    parts = ("vidtwin", *parts) if parts[0] in LINKED else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: Path, root: Path, types: bool = False) -> Iterator[Import]:
    """Yield every import; relative ones and the lazy names of vidtwin/__init__.py are resolved.

    `types`: Yield those for types alone too.
    """
    tree = ast.parse(path.read_text(), str(path))
    module = module_of(path, root)
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    types_only = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"
        for statement in node.body
        for inner in ast.walk(statement)
    }
    for node in ast.walk(tree):
        if id(node) in types_only and not types:
            continue
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
    """Yield class paths of plug-ins in strings, except docstrings: an import by another way."""
    tree = ast.parse(path.read_text(), str(path))
    prose = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in prose:
            for match in PLUGIN.finditer(node.value):
                yield Import(node.lineno, match[0])


def sources(root: Path) -> list[Path]:
    """List each file once: by the folders at the top, not by the links."""
    inside = [path for path in (root / "vidtwin").rglob("*.py") if path.relative_to(root).parts[1] not in LINKED]
    return sorted([*inside, *(path for folder in LINKED for path in (root / folder).rglob("*.py"))])


def broken_rules(path: Path, root: Path) -> Iterator[str]:
    module = module_of(path, root)
    part, name = [*module.split("."), "", ""][1:3]
    found = list(imports(path, root))

    def report(entry: Import, rule: str) -> str:
        return f"{path.relative_to(root).as_posix()}:{entry.line} imports {entry.name}, but rule {rule}"

    if part and part not in LAYER:
        yield f"{path.relative_to(root).as_posix()} is a room without a layer: give it one in LAYERS"
        return
    for entry in found:
        plugin = entry.room in LINKED and part not in LINKED  # rule 3's
        if part and entry.room in LAYER and entry.room != part and not plugin and LAYER[entry.room] >= LAYER[part]:
            yield report(entry, f"1 says that imports only go down: {entry.room} does not lie below {part}")
        elif part in ("models", "baselines") and entry.within(*LIGHTNING, "vidtwin.losses", "vidtwin.data"):
            yield report(entry, "2 says that a model or a baseline knows no Lightning, no loss and no data")
        elif (
            part == "baselines" and entry.within("vidtwin.baselines") and not entry.within(f"vidtwin.baselines.{name}")
        ):
            yield report(entry, "2 says that a baseline imports no other baseline (shared code moves to layers)")
        elif part == "datamodules" and entry.within("vidtwin") and not entry.within(*BELOW_DATA):
            yield report(entry, f"4 says that datamodules import only {', '.join(BELOW_DATA)}")
        heavy = (*LIGHTNING, "torch", "torchvision", "torchmetrics")
        if part == "benchmark" and name not in ("", *WITH_TORCH) and entry.within(*heavy):
            yield report(entry, "4 says that tables and plots read JSON and CSV and import no torch")
    if part not in LINKED and module != "vidtwin.cli.commands":  # whose table names the commands on data
        for entry in [*found, *named_plugins(path)]:
            if entry.within("vidtwin.baselines", "vidtwin.datamodules", *LINKED):
                yield report(entry, "3 says that the core never names a plug-in (YAML and entry points do)")


def import_graph(root: Path, types: bool = False) -> dict[str, set[str]]:
    """Map each module of ours to those that it imports, with `types` for types alone too."""
    modules = {module_of(path, root): path for path in sources(root)}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        names = {entry.name for entry in imports(path, root, types)}
        inner = {name if name in modules else name.rpartition(".")[0] for name in names}
        graph[module] = (inner & set(modules)) - {module, "vidtwin"}
    return graph


def circles(graph: dict[str, set[str]]) -> list[list[str]]:
    """List the groups of modules that import one another, directly or through others."""

    def reachable(start: str) -> set[str]:
        seen: set[str] = set()
        waiting = [start]
        while waiting:
            for module in graph[waiting.pop()] - seen:
                seen.add(module)
                waiting.append(module)
        return seen

    reached = {module: reachable(module) for module in graph}
    groups = {
        tuple(sorted(other for other in reached[module] if module in reached[other]))
        for module in graph
        if module in reached[module]
    }
    return [list(group) for group in sorted(groups)]


@pytest.mark.parametrize("path", sources(ROOT), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_imports_keep_the_rules(path):
    assert list(broken_rules(path, ROOT)) == []


def test_no_modules_import_one_another_in_a_circle():
    assert circles(import_graph(ROOT)) == []


def test_for_types_only_a_mixin_and_a_callback_name_the_class_that_they_are_part_of():
    assert circles(import_graph(ROOT, types=True)) == [
        ["vidtwin.autoencoder", "vidtwin.hub"],
        ["vidtwin.training.base", "vidtwin.training.callbacks.ema"],
    ]


def test_a_planted_circle_is_found(tmp_path):
    (tmp_path / "vidtwin" / "video").mkdir(parents=True)
    (tmp_path / "vidtwin" / "video" / "__init__.py").write_text("")
    (tmp_path / "vidtwin" / "video" / "a.py").write_text("def f():\n    from vidtwin.video import b\n")
    (tmp_path / "vidtwin" / "video" / "b.py").write_text("from .c import g\n")
    (tmp_path / "vidtwin" / "video" / "c.py").write_text("from vidtwin.video.a import f\n")
    assert circles(import_graph(tmp_path)) == [[f"vidtwin.video.{name}" for name in "abc"]]
    types = "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from vidtwin.video.a import f\n"
    (tmp_path / "vidtwin" / "video" / "c.py").write_text(types)
    assert circles(import_graph(tmp_path)) == []
    assert circles(import_graph(tmp_path, types=True)) == [[f"vidtwin.video.{name}" for name in "abc"]]


def test_every_part_with_a_rule_is_read():
    read = {module_of(path, ROOT) for path in sources(ROOT)}
    assert {
        "vidtwin.posteriors",
        "vidtwin.video.reading",
        "vidtwin.layers.attention",
        "vidtwin.models.vidtwin",
        "vidtwin.benchmark.render",
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
        ("baselines/new.py", "from vidtwin.losses import LPIPS", ":1 imports vidtwin.losses.LPIPS, but rule 1"),
        ("baselines/new.py", "from .references import MeanColour", "a baseline imports no other baseline"),
        ("baselines/new.py", "from . import references", "a baseline imports no other baseline"),
        ("vidtwin/training/task.py", "from vidtwin.baselines import references", "rule 3 says"),
        ("vidtwin/training/task.py", "from ..datamodules.clips import ClipDataset", "rule 3 says"),
        ("vidtwin/training/task.py", "import datamodules", "rule 3 says"),
        (
            "vidtwin/training/new.py",
            'import_module("vidtwin.baselines.references")',
            ":1 imports vidtwin.baselines.references, but rule 3",
        ),
        ("datamodules/new.py", "from vidtwin.autoencoder import TemporalSpec", "rule 4 says that datamodules"),
        ("vidtwin/benchmark/render.py", "from torch import Tensor", ":1 imports torch.Tensor, but rule 4"),
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
def test_allowed_imports_are_not_reported(tmp_path, file, source):
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
        "from vidtwin.benchmark import card, plots, protocol, published, render, report, report_command, rows\n"
        "from vidtwin.benchmark.study import answers, make_command, opinions, page, score_command, scores\n"
        "from vidtwin.benchmark import summary",
    ],
    ids=["vidtwin --help", "tables"],
)
def test_help_and_tables_import_no_torch(code):
    done = subprocess.run([sys.executable, "-c", LIGHT.format(code)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
