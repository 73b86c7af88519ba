"""Read the options that a class gives a command from its source, so that help and refusals import nothing heavy."""

import ast
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

import docstring_parser


class Option(NamedTuple):
    """An argument of a class: its help from the docstring; for a field of a dataclass the source of its default."""

    help: str
    default: str


def read_options(module: str, name: str) -> dict[str, Option]:
    """Read the arguments of a class: the fields of a dataclass, or the parameters of `__init__`."""
    package, *rest = module.split(".")
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModuleNotFoundError(f"No package named {package!r}", name=package)
    tree = ast.parse(Path(spec.submodule_search_locations[0], *rest).with_suffix(".py").read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == name)
    texts = {each.arg_name: each.description for each in docstring_parser.parse(ast.get_docstring(found) or "").params}
    return {key: Option(" ".join((texts.get(key) or "").split()), default) for key, default in _defaults(found).items()}


def _defaults(found: ast.ClassDef) -> dict[str, str]:
    for node in found.body:
        if isinstance(node, ast.FunctionDef) and node.name == "__init__":
            arguments = node.args
            return dict.fromkeys([each.arg for each in (*arguments.args[1:], *arguments.kwonlyargs)], "")
    fields = [node for node in found.body if isinstance(node, ast.AnnAssign)]
    return {ast.unparse(field.target): ast.unparse(field.value) if field.value else "" for field in fields}
