"""UCF-101: the data module, its official lists, and `vidtwin prepare ucf101`."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data_module import UCF101

__all__ = ["UCF101"]


def __getattr__(name: str) -> Any:
    """Import the data module on first use, since `prepare` and `doctor` read the lists without torch."""
    if name == "UCF101":
        from .data_module import UCF101

        return UCF101
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
