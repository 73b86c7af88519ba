"""Find and import plug-ins: autoencoders, data modules and commands of installed packages.

A class needs no registration to be used (`class_path: their_package.TheirTokenizer`). An entry point in the group
`vidtwin.autoencoders` or `vidtwin.datamodules` gives it a short name and a line in `vidtwin plugins`; the built-in ones
are registered in the same way. One in `vidtwin.commands` is a function of the arguments that returns the exit code, and
becomes `vidtwin NAME`.

Files that come from others (checkpoints, folders of weights, latents) name classes, too. `check_trusted` accepts those
of vidtwin, of registered plug-ins and of modules that the user has named or imported (docs/security.md).
"""

import os
import re
import sys
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, distributions
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import yaml

from vidtwin.errors import UserError, name_choices, suggestion

GROUPS = ("vidtwin.autoencoders", "vidtwin.datamodules", "vidtwin.commands")
_DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+")
_trusted: set[str] = set()  # modules of the user's own


def current_folder() -> str:
    """Return the current folder; an empty text if it was removed."""
    try:
        return os.path.realpath(os.getcwd())
    except FileNotFoundError:
        return ""


def entry_points(group: str) -> list[EntryPoint]:
    """Return the entry points of installed packages; what lies in the current folder is not installed."""
    here = current_folder()
    return [
        entry
        for entry in _read_entry_points(tuple(folder for folder in sys.path if os.path.realpath(folder) != here))
        if entry.group == group
    ]


@cache
def _read_entry_points(folders: tuple[str, ...]) -> list[EntryPoint]:
    """Read the entry points of all groups once: there may be hundreds of packages."""
    found: dict[tuple[str, str], list[EntryPoint]] = {}
    for package in distributions(path=list(folders)):
        entries = [entry for entry in package.entry_points if entry.group.startswith("vidtwin.")]
        for group in {entry.group for entry in entries}:
            same = [entry for entry in entries if entry.group == group]
            found.setdefault((package.metadata["Name"], group), same)
    return [entry for entries in found.values() for entry in entries]


def available(group: str) -> dict[str, EntryPoint]:
    """Return the entry points of a group by short name, importing none."""
    found: dict[str, EntryPoint] = {}
    for entry in entry_points(group=group):
        if entry.name in found and found[entry.name].value != entry.value:
            warnings.warn(
                f"Two plug-ins are called {entry.name!r}: {found[entry.name].value} is used, {entry.value} is not.",
                stacklevel=2,
            )
            continue
        found.setdefault(entry.name, entry)
    return found


def resolve(name: str, group: str) -> str:
    """Return the class path of a short name (`ucf101`) or class name (`UCF101`); any other name as it is."""
    entries = available(group)
    for short, entry in entries.items():
        if name in (short, entry.value.rpartition(":")[2]):
            return entry.value.replace(":", ".")
    return name


def load(name: str, group: str) -> Any:
    """Import the plug-in of a short name. Raises `UserError` if it is absent or broken."""
    entries = available(group)
    if name not in entries:
        raise UserError(f"Expected the name of a plug-in, got {name!r}{name_choices(name, entries)}")
    try:
        return entries[name].load()
    except Exception as error:
        raise UserError(f"Plug-in {name} ({entries[name].value}) does not import: {error}") from error


def load_all(group: str) -> dict[str, Any]:
    """Import all plug-ins of a group; warn of broken ones by name."""
    loaded = {}
    for name in available(group):
        try:
            loaded[name] = load(name, group)
        except UserError as error:
            warnings.warn(str(error), stacklevel=2)
    return loaded


@contextmanager
def trusting(modules: Iterable[str]) -> Iterator[None]:
    """Trust modules, with those inside of them, whatever file names their classes."""
    before = set(_trusted)
    _trusted.update(modules)
    try:
        yield
    finally:
        _trusted.intersection_update(before)


def check_trusted(content: Any, source: str | Path) -> None:
    """Raise `UserError` if a file that others may have written names a class that it must not import.

    Args:
        content: Its classes by `class_path`, with their arguments. Nothing is imported.
        source: Name of the file for the message.
    """
    if isinstance(content, Mapping):
        for key, value in content.items():
            if key == "class_path" and not isinstance(value, str):
                raise UserError(f"Expected the name of a class in {source}, got {value!r}.")
            if key == "class_path" and not _is_trusted(module := value.rpartition(".")[0]):
                raise UserError(
                    f"Expected a class of vidtwin or of an installed plug-in in {source}, got {value}; if you trust "
                    f"the module, give --trust_module {module} (in Python trust_modules=[{module!r}])."
                )
            elif key != "class_path":
                check_trusted(value, source)
    elif isinstance(content, list | tuple):
        for value in content:
            check_trusted(value, source)
    elif isinstance(content, str):
        _check_text(content, source)


def _check_text(text: str, source: str | Path) -> None:
    """Check a value that the parser may read as a config, as the name of one, or as the name of a class."""
    if _holds_config(text):
        raise UserError(f"Expected {source} to name no other config, got {text}; give --config yourself.")
    try:
        value = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        return  # the parser can't read it either
    if value != text:
        check_trusted(value, source)
    elif _DOTTED.fullmatch(text):
        top = text.partition(".")[0]
        if top not in sys.modules and find_spec(top):  # some arguments are functions or classes by their names
            check_trusted({"class_path": text}, source)


def _holds_config(name: str) -> bool:
    """Return whether a file of this name holds keys, whatever its suffix."""
    try:
        return os.path.isfile(name) and isinstance(yaml.safe_load(Path(name).read_text(encoding="utf-8")), dict | list)
    except (OSError, ValueError, yaml.YAMLError):
        return False


def _is_trusted(module: str) -> bool:
    groups = ("vidtwin.autoencoders", "vidtwin.references", "vidtwin.datamodules")
    registered = {entry.value.partition(":")[0] for group in groups for entry in available(group).values()}
    return (
        not module
        or module.partition(".")[0] == "vidtwin"
        or module in {*registered, *sys.modules}  # what was imported before does not run again
        or any(f"{module}.".startswith(f"{name}.") for name in _trusted)
    )


def class_of(class_path: str, base: type) -> Any:
    """Import a class by its path. Raises `UserError` if it is not installed or not a subclass of `base`."""
    module, _, name = class_path.rpartition(".")
    try:
        cls = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        near = suggestion(name, dir(sys.modules.get(module)) if isinstance(error, AttributeError) else [])
        raise UserError(f"Expected the class {class_path} to be installed: {error}{near}") from error
    if not (isinstance(cls, type) and issubclass(cls, base)):
        raise UserError(f"Expected a {base.__name__}, got {class_path}.")
    return cls


def build(spec: dict[str, Any], base: type) -> Any:
    """Instantiate a class from its `class_path` and `init_args`. Raises `UserError` if the arguments do not fit."""
    cls = class_of(spec["class_path"], base)
    try:
        return cls(**spec.get("init_args", {}))
    except TypeError as error:
        raise UserError(f"Expected arguments of {spec['class_path']}, got others: {error}.") from error
