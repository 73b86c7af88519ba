"""Read the key and the answers of a study; refuse by name what was edited or belongs to another study."""

import hmac
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from vidtwin.benchmark.study.criteria import CRITERIA, DESTROYED, FORMAT_VERSION, IDENTICAL, MODEL, SCALE, seal
from vidtwin.benchmark.study.page import PAGE
from vidtwin.errors import UserError, few
from vidtwin.files import parse_json

_HEX = re.compile(r"[0-9a-f]{64}")
_KEY_FORMAT, _ANSWERS_FORMAT = "vidtwin study key", "vidtwin study answers"
_NEEDED = {
    "study": str,
    "seal": str,
    "page": str,
    "page_sha256": str,
    "raters": int,
    "alone": bool,
    "models": list,
    "items": dict,
    "protocol_hash": str,
}


@dataclass(frozen=True)
class Answers:
    """The answers of one rater.

    Attributes:
        path: Of the file.
        rater: The rater's number.
        scores: By item and criterion.
    """

    path: Path
    rater: int
    scores: dict[str, dict[str, int]]

    @property
    def name(self) -> str:
        """The rater's name in tables."""
        return f"rater {self.rater}"


def read_key(path: str | Path) -> dict[str, Any]:
    """Read `key.json`, and check that the page beside it, if there is one, is that of the study.

    Raises:
        UserError: It is missing or damaged, or the page was changed.
    """
    path = Path(path)
    key = _read(path, "the key.json of `vidtwin study make`")
    if key.get("format") != _KEY_FORMAT or key.get("format_version") != FORMAT_VERSION:
        raise UserError(
            f"Expected the key of a study in {path}, got {key.get('format')} of version "
            f"{key.get('format_version')}; give the key.json that `vidtwin study make` of this version wrote."
        )
    wrong = [name for name, kind in _NEEDED.items() if not isinstance(key.get(name), kind)]
    if wrong or not _HEX.fullmatch(key["seal"]):
        raise UserError(
            f"Expected {few(wrong or ['seal'])} in {path}, got none of this kind; take the key.json from a copy."
        )
    for item in key["items"].values():
        known = isinstance(item, dict) and item.get("kind") in (MODEL, IDENTICAL, DESTROYED)
        known = known and all(isinstance(item.get(name), str) for name in ("model", "video"))
        if not known or (item["kind"] == MODEL and item["model"] not in key["models"]):
            raise UserError(
                f"Expected items of {', '.join(map(str, key['models']))} in {path}, got another; take the file from a "
                "copy."
            )
    page = path.with_name(PAGE)
    if page.is_file() and sha256(page.read_bytes()).hexdigest() != key["page_sha256"]:
        raise UserError(
            f"Expected {page} as `vidtwin study make` wrote it, got a changed file; put the original back, "
            "or, if the raters had the original, move this one away."
        )
    return key


def read_answers(paths: Sequence[str | Path], key: dict[str, Any]) -> list[Answers]:
    """Read answers that the study's page has saved, in the order of the raters.

    Raises:
        UserError: A file was edited, is of another study or of a changed page, or two are of one rater.
    """
    if not paths:
        raise UserError("Expected files of answers, got none; give those that the raters have saved.")
    found = sorted((_check(Path(path), key) for path in paths), key=lambda each: each.rater)
    for first, second in itertools.pairwise(found):
        if first.rater == second.rater:
            raise UserError(
                f"Expected one file of each rater, got {first.path} and {second.path} of rater {first.rater}; "
                "leave one out."
            )
    return found


def _check(path: Path, key: dict[str, Any]) -> Answers:
    file = _read(path, "a file that the study's page has saved")
    answers, given = file.get("answers"), file.get("seal")
    if not isinstance(answers, dict) or answers.get("format") != _ANSWERS_FORMAT or not isinstance(given, str):
        raise UserError(f"Expected answers of a study in {path}, got another file; leave it out.")
    if answers.get("study") != key["study"]:
        raise UserError(
            f"Expected answers of study {key['study']} in {path}, got those of {answers.get('study')!r}; "
            "leave the file out, or give the key of its study."
        )
    try:
        whole = hmac.compare_digest(seal(key["seal"], answers), given)
    except (TypeError, ValueError):  # text that is no Unicode or no seal
        whole = False
    if not whole:
        raise UserError(
            f"Expected answers as the page has saved them, got {path}, which was edited; ask rater "
            f"{str(answers.get('rater'))[:9]} for the file again."
        )
    if answers.get("page") != key["page"]:
        raise UserError(
            f"Expected answers to the page of this study, got {path} by a page that was changed; leave it out."
        )
    rater, items = answers.get("rater"), answers.get("items")
    if type(rater) is not int or not 1 <= rater <= key["raters"]:
        raise UserError(f"Expected a rater from 1 to {key['raters']} in {path}, got {rater!r}; leave the file out.")
    scores: dict[str, dict[str, int]] = {}
    for item in items if isinstance(items, list) else [None]:
        entry = item if isinstance(item, dict) else {}
        id, chosen = str(entry.get("id")), {each.key: entry.get(each.key) for each in CRITERIA}
        known = id in key["items"] and id not in scores
        if not known or any(type(value) is not int or value not in SCALE for value in chosen.values()):
            raise UserError(f"Expected scores of 1 to 5 of the study's items in {path}, got others; leave it out.")
        scores[id] = {name: int(value) for name, value in chosen.items() if value is not None}
    return Answers(path, rater, scores)


def _read(path: Path, wanted: str) -> dict[str, Any]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(f"Expected {wanted} at {path}, got no such file; check the path.") from error
    except ValueError as error:
        raise UserError(
            f"Expected {wanted} at {path}, got no JSON ({error}); it was cut off or edited: take a copy."
        ) from error
    if not isinstance(content, dict):
        raise UserError(f"Expected {wanted} at {path}, got a {type(content).__name__}; give that file.")
    return content
