"""Errors are explained by those that they were raised from."""

import errno

import pytest

from vidtwin.errors import UserError, causes
from vidtwin.files import no_room


def refuse(hidden: bool) -> None:
    try:
        raise OSError(errno.ENOSPC, "No space left on device")
    except OSError:
        if hidden:
            raise UserError("Expected another thing.") from None
        raise UserError("Expected another thing.")  # noqa: B904


def test_an_error_that_was_being_handled_counts_unless_it_was_hidden():
    with pytest.raises(UserError) as caught:
        refuse(hidden=False)
    assert [type(each) for each in causes(caught.value, contexts=True)] == [UserError, OSError]
    assert list(causes(caught.value)) == [caught.value]
    assert no_room(caught.value) == "No space left on device"
    with pytest.raises(UserError) as caught:
        refuse(hidden=True)
    assert no_room(caught.value) is None


def test_causes_in_a_circle_end():
    first, second = ValueError(), ValueError()
    first.__cause__, second.__cause__ = second, first
    assert list(causes(first)) == [first, second]
    assert list(causes(None)) == []
