"""`vidtwin plugins` and `vidtwin configs`."""

import shutil
import sys
from pathlib import Path

from vidtwin import plugins
from vidtwin.errors import UserError


def list_plugins(argv: list[str]) -> int:
    """List the autoencoders, data modules and commands that installed packages register."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(f"usage: vidtwin plugins\n\n{list_plugins.__doc__}\n")
        return 0
    if argv:
        raise UserError(f"Expected no arguments after `vidtwin plugins`, got {' '.join(argv)}.")
    for group in plugins.GROUPS:
        sys.stdout.write(f"{group}\n")
        for name, entry in sorted(plugins.available(group).items()):
            sys.stdout.write(f"  {name:<16} {entry.value.replace(':', '.')}\n")
    return 0


def copy_configs(argv: list[str]) -> int:
    """Copy the configs that come with the package."""
    if {"-h", "--help"} & set(argv):
        sys.stdout.write(f"usage: vidtwin configs [FOLDER]\n\n{copy_configs.__doc__}\n")
        return 0
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        raise UserError("Expected `vidtwin configs [FOLDER]`.")
    target = Path(argv[0] if argv else "configs")
    if target.exists():
        raise UserError(f"Expected a folder that does not exist yet, got {target}; nothing was overwritten.")
    source = Path(__file__).parents[1] / "configs"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    sys.stdout.write(f"{len(list(target.rglob('*.yaml')))} configs -> {target}\n")
    return 0
