"""The command line: find the command, run it, and turn errors into one line and an exit code.

Import nothing heavy: `vidtwin --help` answers without torch.
"""

import io
import os
import signal
import sys
import traceback

from vidtwin import __version__
from vidtwin.cli import bases, commands, failures, own_modules, paths
from vidtwin.errors import REQUEUE_EXIT_CODE, Preempted, Terminated, UserError

_TRACEBACK = "VIDTWIN_TRACEBACK"  # 1 prints the traceback of an error that is explained in one line, too


def main(argv: list[str] | None = None) -> int:
    """Run `vidtwin ARGV` → exit code.

    0 done, 1 a part of it failed, 2 the input is invalid (one line says what to do), 75 to be run again.
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        _check_folder()
        if not argv or argv[0] in ("-h", "--help"):
            _say(_help())
            return 0
        if argv[0] == "--version":
            _say(f"vidtwin {__version__}")
            return 0
        with own_modules.admit(bases.expand(paths.expand_words(argv[1:]))) as words:
            return commands.run(argv[0], words)
    except Preempted as end:
        sys.stderr.write(f"vidtwin: {end}\n")
        # Lightning kills the process that it was started by when one that it has started itself ends with another code.
        started_by_lightning = int(os.environ.get("LOCAL_RANK", 0)) > 0 and not (
            {"TORCHELASTIC_RUN_ID", "SLURM_NTASKS"} & set(os.environ)
        )
        return 0 if started_by_lightning else REQUEUE_EXIT_CODE
    except Terminated:
        sys.stderr.write("vidtwin: ended by SIGTERM\n")
        return 128 + signal.SIGTERM
    except KeyboardInterrupt:
        sys.stderr.write("vidtwin: interrupted\n")
        return 128 + signal.SIGINT
    except Exception as error:
        if _reader_has_left(error):
            return 128 + signal.SIGPIPE
        line = failures.explain(error, *argv[:1])
        if line is None:
            raise
        if os.environ.get(_TRACEBACK, "0") != "0":
            traceback.print_exception(error)
        sys.stderr.write(f"vidtwin: error: {line}\n")
        return 2


def entry_point() -> None:
    """Run the installed script `vidtwin`."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")  # names that the terminal's encoding lacks, as on stderr
    code = main()
    try:
        sys.stdout.flush()
    except BrokenPipeError as error:
        _reader_has_left(error)
    sys.exit(code)


def _check_folder() -> None:
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("Expected a current folder, got one that was removed; change to one that exists.") from error


def _reader_has_left(error: Exception) -> bool:
    """Return whether a command like `head` has closed the pipe behind stdout; then discard the rest of the output."""
    if not isinstance(error, BrokenPipeError):
        return False
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True
    return False


def _help() -> str:
    lines = ["Train and compare video autoencoders: VidTwin and its baselines behind one interface.", ""]
    lines += ["usage: vidtwin COMMAND [options]        vidtwin COMMAND --help for a command's options", ""]
    lines += [f"  {name:<13} {text}" for name, text in commands.summaries().items()]
    lines += ["", "Weights of a class of your own module need --trust_module MODULE (repeatable) with every command."]
    lines += ["A first run: `make demo`. Configs that come with the package: `vidtwin configs`."]
    return "\n".join(lines)


def _say(text: str) -> None:
    sys.stdout.write(f"{text}\n")
