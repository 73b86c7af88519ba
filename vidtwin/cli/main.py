"""The command line: find the command, run it, and turn errors into one line and an exit code.

Import nothing heavy: `vidtwin --help` answers without torch.
"""

import os
import re
import sys

from vidtwin import __version__
from vidtwin.cli import bases, commands, own_modules
from vidtwin.errors import REQUEUE_EXIT_CODE, Preempted, UserError
from vidtwin.files import NO_ROOM


def main(argv: list[str] | None = None) -> int:
    """Run `vidtwin ARGV` → exit code.

    0 done, 1 a part of it failed, 2 the input is invalid (one line says what to do), 75 to be run again.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if not argv or argv[0] in ("-h", "--help"):
            _say(_help())
            return 0
        if argv[0] == "--version":
            _say(f"vidtwin {__version__}")
            return 0
        with own_modules.admit(bases.expand(argv[1:])) as words:
            return commands.run(argv[0], words)
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


def entry_point() -> None:
    """Run the installed script `vidtwin`."""
    sys.exit(main())


def _help() -> str:
    lines = ["Train and compare video autoencoders: VidTwin and its baselines behind one interface.", ""]
    lines += ["usage: vidtwin COMMAND [options]        vidtwin COMMAND --help for a command's options", ""]
    lines += [f"  {name:<13} {text}" for name, text in commands.summaries().items()]
    lines += ["", "Weights of a class of your own module need --trust_module MODULE (repeatable) with every command."]
    lines += ["A first run: `make demo`. Configs that come with the package: `vidtwin configs`."]
    return "\n".join(lines)


def _one_line(error: Exception) -> str:
    # An error from a data loader's worker comes back with the worker's traceback around it.
    text = str(error)
    if "Original Traceback" in text:
        text = text.strip().splitlines()[-1].partition(": ")[2] or text
    return re.sub(r"\s+", " ", text).strip()


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
