"""Find and import plug-ins: autoencoders, data modules and commands of installed packages.

A class needs no registration to be used (`class_path: their_package.TheirTokenizer`). An entry point in the group
`vidtwin.autoencoders` or `vidtwin.datamodules` gives it a short name and a line in `vidtwin plugins`; the built-in ones
are registered in the same way. One in `vidtwin.commands` is a function of the arguments that returns the exit code, and
becomes `vidtwin NAME`.
"""

import sys
import warnings
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from typing import Any

from vidtwin.errors import UserError, suggestion

GROUPS = ("vidtwin.autoencoders", "vidtwin.datamodules", "vidtwin.commands")


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
        known = sorted(entries)
        raise UserError(f"Expected one of the plug-ins {', '.join(known)}, got {name!r}{suggestion(name, known)}")
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
