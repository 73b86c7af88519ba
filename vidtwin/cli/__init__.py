"""The command line."""

from vidtwin.cli.main import entry_point, main

__all__ = ["entry_point", "main"]
