"""The items of a study, chosen among the clips that a results folder keeps for its players, and their order."""

import itertools
import random
import secrets
from dataclasses import dataclass
from typing import Any

from vidtwin.benchmark.rows import Results
from vidtwin.benchmark.study.criteria import DESTROYED, IDENTICAL, MODEL
from vidtwin.console import log
from vidtwin.errors import UserError, few, suggestion

_TRIES = 100  # orders of which that with the fewest neighbours of one clip is taken


@dataclass(frozen=True)
class Item:
    """One judgement.

    Attributes:
        id: Random, so that it says nothing.
        kind: MODEL, or IDENTICAL or DESTROYED, whose scores are known.
        model: Whose reconstruction it is; empty for the other kinds.
        video: Name of the clip's video.
        start_frame: First frame of the clip in it.
        source: File of the source's strip in the results folder.
        shown: File of the strip to judge; for DESTROYED that of the source, to be destroyed.
    """

    id: str
    kind: str
    model: str
    video: str
    start_frame: int
    source: str
    shown: str


def choose_models(results: Results, names: list[str] | None) -> list[str]:
    """Return the models of a study: the named ones, or by default all trained ones, without any all but references.

    Raises:
        UserError: The folder keeps no clips, or none of a named model.
    """
    if not (results.players or {}).get("clips"):
        raise UserError(
            f"Expected clips with players in {results.folder}, got none; `vidtwin test --random_players 8` keeps some."
        )
    kinds = {row["name"]: row["kind"] for row in results.rows}
    there = {view["model"] for clip in results.players["clips"] for view in clip["views"] if view["model"]}
    known = [name for name in kinds if name in there]
    if names:
        for name in names:
            if name not in known:
                raise UserError(
                    f"Expected models with players in {results.folder}, got {name!r}{suggestion(name, known)}"
                )
        return list(dict.fromkeys(names))
    trained = [name for name in known if kinds[name] == "trained"]
    chosen = trained or [name for name in known if kinds[name] != "reference"]
    if not chosen:
        raise UserError(
            f"Expected a model with players in {results.folder}, got references alone; name them (--models)."
        )
    return chosen


def choose_items(results: Results, models: list[str], clips: int | None, checks: int, seed: int) -> list[Item]:
    """Choose clips and make their items: one for each model, and `checks` of each kind of attention check.

    Of clips that were drawn at random, if the folder keeps any; the worst and the median ones stand for no others.

    Args:
        results: A results folder with players.
        models: Their names.
        clips: Number of clips, drawn by the seed; None takes all.
        checks: Number of items IDENTICAL, and of items DESTROYED, on clips of the study.
        seed: Of the draws.

    Raises:
        UserError: There are fewer clips, or one lacks a model.
    """
    kept = results.players["clips"]
    drawn = [clip for clip in kept if "random" in clip["why"]]  # which stand for all clips
    kept = drawn or kept
    if clips is not None and not 1 <= clips <= len(kept):
        raise UserError(
            f"Expected clips from 1 to {len(kept)}, which {results.folder} keeps, got {clips}; "
            "`vidtwin test --random_players N` keeps more."
        )
    if not drawn:
        log(
            f"{results.folder} keeps no clips drawn at random, so the study has the worst and the median ones, which "
            "stand for no others; `vidtwin test --random_players 8` keeps some"
        )
    draw = random.Random(f"clips {seed}")
    chosen = kept if clips is None else sorted(draw.sample(kept, clips), key=kept.index)
    items: list[Item] = []
    for clip in chosen:
        views = {view["model"]: view["file"] for view in clip["views"] if view["kind"] == "reconstruction"}
        if lacking := [name for name in models if name not in views]:
            raise UserError(f"Expected every clip by {few(lacking)}, got none of {clip['name']}; run the sweep again.")
        items += [_make_item(MODEL, clip, name, views[name]) for name in models]
    for kind in (IDENTICAL, DESTROYED):
        checked = draw.sample(chosen, min(checks, len(chosen)))
        items += [_make_item(kind, clip, "", _source(clip)) for clip in checked]
    return sorted(items, key=lambda item: item.id)


def order_items(items: list[Item], rater: int, seed: int) -> list[int]:
    """Return the places of items in a rater's order, with few neighbours of one clip and no check at the beginning."""
    draw = random.Random(f"order {seed} {rater}")
    best: tuple[int, list[int]] | None = None
    for _ in range(_TRIES):
        order = list(range(len(items)))
        draw.shuffle(order)
        shown = [items[place] for place in order]
        pairs = itertools.pairwise(shown)
        faults = sum((a.video, a.start_frame) == (b.video, b.start_frame) for a, b in pairs)
        faults += len(items) * (shown[0].kind != MODEL)
        if best is None or faults < best[0]:
            best = faults, order
    assert best is not None
    return best[1]


def _make_item(kind: str, clip: dict[str, Any], model: str, shown: str) -> Item:
    return Item(secrets.token_hex(8), kind, model, clip["name"], clip["start_frame"], _source(clip), shown)


def _source(clip: dict[str, Any]) -> str:
    return next(str(view["file"]) for view in clip["views"] if view["kind"] == "input")
