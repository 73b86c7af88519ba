"""Bugs keep their traceback; what a user can fix is one line."""

import pytest
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from vidtwin.cli import main
from vidtwin.cli.parser import user_errors
from vidtwin.cli.training import _is_of_lightning
from vidtwin.errors import UserError


class Sized:
    def __init__(self, size: int) -> None:
        if size < 1:
            raise ValueError(f"Expected a size of 1 or more, got {size}.")
        compute(size)


def compute(size: int) -> None:
    if size > 1:
        raise ValueError("axes don't match array")


def test_a_refusal_of_a_constructor_is_one_line_and_a_bug_below_it_is_not():
    with pytest.raises(UserError, match="a size of 1 or more"), user_errors():
        Sized(0)
    with pytest.raises(ValueError, match="axes don't match") as caught, user_errors():
        Sized(2)
    assert not isinstance(caught.value, UserError)


def test_a_circle_of_imports_in_a_plug_in_is_not_a_missing_package():
    with pytest.raises(ImportError, match="partially initialized"), user_errors():
        raise ImportError("cannot import name 'foo' from partially initialized module 'theirs'")
    with pytest.raises(UserError, match="Expected the packages"), user_errors():
        raise ModuleNotFoundError("No module named 'absent'")


def handle_a_refusal() -> None:
    try:
        raise UserError("Expected another thing.")
    except UserError:
        raise TypeError("a bug")  # noqa: B904


def test_an_error_that_was_handled_before_is_not_the_reason():
    with pytest.raises(TypeError, match="a bug"), user_errors():
        handle_a_refusal()


def raised_in(module: str, function: str, kind: str) -> Exception:
    """Return an error that a function of Lightning's raises."""
    code = f"def {function}():\n    raise kind('refused')"
    scope = {"__name__": module, "kind": {"value": ValueError, "own": MisconfigurationException}[kind]}
    exec(code, scope)
    with pytest.raises(Exception, match="refused") as caught:
        scope[function]()
    return caught.value


def test_errors_of_lightning_are_explained_before_the_first_batch():
    fit_loop = "lightning.pytorch.loops.fit_loop"
    assert _is_of_lightning(raised_in(fit_loop, "setup_data", "value"))
    assert not _is_of_lightning(raised_in(fit_loop, "advance", "value"))
    assert _is_of_lightning(raised_in(fit_loop, "advance", "own"))
    assert not _is_of_lightning(raised_in("theirs", "setup_data", "own"))


def test_a_variable_shows_the_traceback_of_an_explained_error(monkeypatch, capsys):
    assert main(["fti"]) == 2
    assert "Traceback" not in capsys.readouterr().err
    monkeypatch.setenv("VIDTWIN_TRACEBACK", "1")
    assert main(["fti"]) == 2
    error = capsys.readouterr().err
    assert error.startswith("Traceback")
    assert error.splitlines()[-1].startswith("vidtwin: error: Expected a command, got 'fti'")
