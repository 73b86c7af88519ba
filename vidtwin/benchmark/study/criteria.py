"""The form of a rating study: criteria, scale, kinds of items, and the seals of its files."""

import hashlib
import hmac
import json
from collections.abc import Iterable
from typing import Any, NamedTuple

FORMAT_VERSION = 1
SCALE = range(1, 6)
MODEL, IDENTICAL, DESTROYED = "model", "identical", "destroyed"  # kinds of items; the last two check attention


class Criterion(NamedTuple):
    """A question about a reconstruction, answered by 1 to 5 (Tab. 4 of the paper's supplement names the three).

    Attributes:
        key: Its name in files.
        label: Its name for readers.
        question: What a rater judges beside the source.
        alone: The same without the source.
    """

    key: str
    label: str
    question: str
    alone: str


CRITERIA = (
    Criterion(
        "semantic",
        "Semantic",
        "Are people, objects and scene those of the source?",
        "Are people, objects and scene whole and recognizable?",
    ),
    Criterion(
        "temporal",
        "Temporal",
        "Is motion that of the source, smooth and without flicker?",
        "Is motion natural, smooth and without flicker?",
    ),
    Criterion(
        "detail",
        "Detail",
        "Are textures, edges and small things kept?",
        "Are textures, edges and small things clear?",
    ),
)


def seal(key: str, content: dict[str, Any]) -> str:
    """Compute the HMAC-SHA256 of content as compact JSON, as hexadecimal digits.

    Args:
        key: Hexadecimal digits.
        content: Strings, whole numbers, lists and dictionaries, whose JSON is the same in a browser.
    """
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False)
    return hmac.new(bytes.fromhex(key), text.encode(), hashlib.sha256).hexdigest()


def page_digest(parts: Iterable[str]) -> str:
    """Compute the SHA-256 of a page's parts, a line each: its data, script, style and pictures."""
    return hashlib.sha256("".join(f"{part}\n" for part in parts).encode()).hexdigest()
