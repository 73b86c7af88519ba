"""Run a command on videos. Imports torch only after all refusals."""

from typing import TYPE_CHECKING, Any

from vidtwin.apply.options import SessionOptions, build, check_weights

if TYPE_CHECKING:
    from jsonargparse import Namespace


def run_in_session(command: type, options: "Namespace") -> int:
    """Build a command from its options and run it in a session → exit code."""
    session_options = build(SessionOptions, options)
    session_options.check()
    work: Any = build(command, options)
    check_weights(session_options.ckpt_path)
    from vidtwin.apply.session import Session

    return int(work.run(Session(session_options)))
