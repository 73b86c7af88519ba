"""The command line: `vidtwin fit | validate | test | predict | replay` by LightningCLI, and commands on files.

Nothing heavy is imported at the top: `vidtwin --help` answers without torch.
"""

import os
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from vidtwin import __version__, plugins
from vidtwin.cli import bases
from vidtwin.errors import REQUEUE_EXIT_CODE, Preempted, UserError, suggestion
from vidtwin.files import NO_ROOM

TRAINER_COMMANDS = {
    "fit": "Train an autoencoder: vidtwin fit --config configs/vidtwin_base.yaml --data.root PATH",
    "validate": "Measure an autoencoder on the validation clips.",
    "test": "Measure an autoencoder, or a list of them, on the test clips: table, plots, report.",
    "predict": "Write latents and reconstruction of each test clip.",
    "replay": "Run a step again that training skipped, and say where it breaks: vidtwin replay DUMP",
}


def plugins_command(argv: list[str]) -> int:
    """List the autoencoders, data modules and commands that installed packages register."""
    _no_arguments("plugins", argv)
    for group in plugins.GROUPS:
        _say(group)
        for name, entry in sorted(plugins.available(group).items()):
            _say(f"  {name:<16} {entry.value.replace(':', '.')}")
    return 0


def configs_command(argv: list[str]) -> int:
    """Copy the configs that come with the package: vidtwin configs [FOLDER]"""
    if len(argv) > 1 or any(word.startswith("-") for word in argv):
        raise UserError("Expected `vidtwin configs [FOLDER]`.")
    target = Path(argv[0] if argv else "configs")
    if target.exists():
        raise UserError(f"Expected a folder that does not exist yet, got {target}; nothing was overwritten.")
    source = Path(__file__).parents[1] / "configs"
    shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__"))
    _say(f"{len(list(target.rglob('*.yaml')))} configs -> {target}")
    return 0


FILE_COMMANDS: dict[str, Callable[[list[str]], int]] = {"plugins": plugins_command, "configs": configs_command}


def main(argv: list[str] | None = None) -> int:
    """Run `vidtwin ARGV` → exit code.

    0 done, 1 a part of it failed, 2 the user can mend it (one line says what), 75 to be run again.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            _say(_help())
            return 0
        if argv[0] == "--version":
            _say(f"vidtwin {__version__}")
            return 0
        command, rest = argv[0], bases.expand(argv[1:])
        if command in FILE_COMMANDS:
            if rest and rest[0] in ("-h", "--help"):
                _say(FILE_COMMANDS[command].__doc__ or "")
                return 0
            return FILE_COMMANDS[command](rest)
        registered = plugins.available("vidtwin.commands")
        if command in registered:
            return _exit_code(plugins.load(command, "vidtwin.commands"), rest)
        if command not in TRAINER_COMMANDS:
            names = [*TRAINER_COMMANDS, *FILE_COMMANDS, *registered]
            raise UserError(f"Expected a command, got {command!r}{suggestion(command, names)}")
        from vidtwin.cli.training import run

        return run(command, rest)
    except UserError as error:
        sys.stderr.write(f"vidtwin: error: {_one_line(error)}\n")
        return 2
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise
        sys.stderr.write(
            f"vidtwin: error: Expected room to write {error.filename or 'a file'}, got {error.strerror!r}.\n"
        )
        return 2
    except Preempted as end:
        sys.stderr.write(f"vidtwin: {end}\n")
        # Lightning kills the process that it was started by when one that it has started itself ends with another code.
        started_by_lightning = int(os.environ.get("LOCAL_RANK", 0)) > 0 and not (
            {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & set(os.environ)
        )
        return 0 if started_by_lightning else REQUEUE_EXIT_CODE
    except KeyboardInterrupt:
        sys.stderr.write("vidtwin: interrupted\n")
        return 130
    return 0


def entry_point() -> None:
    """What the installed script `vidtwin` calls."""
    sys.exit(main())


def _exit_code(command: Callable[[list[str]], int], argv: list[str]) -> int:
    """Of a command that parses its own arguments, by argparse."""
    try:
        return command(argv)
    except SystemExit as end:  # --help, with 0, and arguments that it does not know, with 2
        return int(end.code or 0)


def _help() -> str:
    lines = ["Train and compare video autoencoders: VidTwin and its baselines behind one interface.", ""]
    lines += ["usage: vidtwin COMMAND [options]        vidtwin COMMAND --help for a command's options", ""]
    commands = TRAINER_COMMANDS | {name: (command.__doc__ or "") for name, command in FILE_COMMANDS.items()}
    for name in plugins.available("vidtwin.commands"):
        try:
            commands[name] = (plugins.load(name, "vidtwin.commands").__doc__ or "").strip().splitlines()[0]
        except (UserError, IndexError) as error:  # one that does not import keeps no one from the others
            commands[name] = f"({error})"
    lines += [f"  {name:<13} {text}" for name, text in commands.items()]
    lines += ["", "A first run: `make demo`. Configs that come with the package: `vidtwin configs`."]
    return "\n".join(lines)


def _no_arguments(command: str, argv: list[str]) -> None:
    if argv:
        raise UserError(f"Expected no arguments after `vidtwin {command}`, got {' '.join(argv)}.")


def _one_line(error: Exception) -> str:
    # An error from a data loader's worker comes back with the worker's traceback around it.
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    return re.sub(r"\s+", " ", text).strip()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
