"""`vidtwin plugins` and `vidtwin configs`."""

import shutil
import sys
from pathlib import Path

from vidtwin import plugins
from vidtwin.cli.parser import command_parser
from vidtwin.errors import UserError


def list_plugins(argv: list[str]) -> int:
    """Run `vidtwin plugins` → exit code."""
    command_parser("plugins", "", "List what installed packages register, with class paths.").parse_args(argv)
    for group in plugins.GROUPS:
        entries = sorted(plugins.available(group).items())
        sys.stdout.write(f"{group}\n" if entries else f"{group}: none\n")
        width = max((len(name) for name, _ in entries), default=0)
        for name, entry in entries:
            sys.stdout.write(f"  {name:<{width}}  {entry.value.replace(':', '.')}\n")
    return 0


def copy_configs(argv: list[str]) -> int:
    """Run `vidtwin configs` → exit code."""
    parser = command_parser("configs", "[FOLDER]", "Copy the configs that come with the package.")
    parser.add_argument("folder", nargs="?", default="configs", metavar="FOLDER", help="New folder for the copies.")
    target = Path(parser.parse_args(argv).folder)
    if target.exists():
        raise UserError(f"Expected a folder that does not exist yet, got {target}; nothing was overwritten.")
    source = Path(__file__).parents[1] / "configs"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    sys.stdout.write(f"{len(list(target.rglob('*.yaml')))} configs -> {target}\n")
    return 0
