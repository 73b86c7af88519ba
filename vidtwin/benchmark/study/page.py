"""Write a study: `page.html` for the raters, without a model's name, and `key.json` for the experimenter."""

import base64
import io
import json
import random
import secrets
from collections.abc import Iterable
from dataclasses import asdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vidtwin.benchmark import rows
from vidtwin.benchmark.pages import Assets, as_json, read_strip
from vidtwin.benchmark.rows import Results
from vidtwin.benchmark.study.criteria import CRITERIA, DESTROYED, FORMAT_VERSION, SCALE, page_digest
from vidtwin.benchmark.study.items import Item, choose_items, choose_models, order_items
from vidtwin.errors import UserError
from vidtwin.files import write_text

PAGE, KEY = "page.html", "key.json"
_BLOCKS = 8  # a side of a destroyed clip
_QUALITY = 85  # as of the players' pictures


def write(
    folder: str | Path,
    out: str | Path,
    *,
    models: list[str] | None = None,
    clips: int | None = None,
    raters: int = 20,
    checks: int = 2,
    alone: bool = False,
    seed: int = 0,
) -> list[Path]:
    """Write the page and the key of a study → their paths.

    Args:
        folder: Results folder with players.
        out: Folder of the study; it may hold none yet.
        models: Names of models; None takes all trained ones.
        clips: Number of clips, drawn by the seed; None takes all that have players.
        raters: Number of raters, each with an order of its own.
        checks: Number of attention checks of each kind: the source itself, and a destroyed clip.
        alone: Show each clip alone, not beside its source.
        seed: Of the choice of clips and of the orders.

    Raises:
        UserError: The results folder lacks what is needed, or `out` holds a study.
    """
    target = Path(out)
    for name, value, least in (("raters", raters, 1), ("checks", checks, 0)):
        if value < least:
            raise UserError(f"Expected {name} of at least {least}, got {value}.")
    if (target / KEY).exists():
        raise UserError(f"Expected a folder without a study, got {target} with {KEY}; name another by --out.")
    results = rows.read(folder)
    chosen = choose_models(results, models)
    items = choose_items(results, chosen, clips, checks, seed)
    study, seal_key = secrets.token_hex(8), secrets.token_hex(32)
    shown = {_shown(item) for item in items}
    strips, places = _collect_strips(
        results, shown if alone else shown | {(item.source, False) for item in items}, seed
    )
    data = {
        "study": study,
        "seal": seal_key,
        "fps": results.players["fps"],
        "frames": results.players["num_frames"],
        "alone": alone,
        "scale": list(SCALE),
        "criteria": [
            {"key": each.key, "label": each.label, "question": each.alone if alone else each.question}
            for each in CRITERIA
        ],
        "items": [
            {"id": item.id, "source": None if alone else places[item.source, False], "shown": places[_shown(item)]}
            for item in items
        ],
        "orders": [order_items(items, rater, seed) for rater in range(1, raters + 1)],
    }
    page, seen = _render(data, strips)
    key = {
        "format": "vidtwin study key",
        "format_version": FORMAT_VERSION,
        "study": study,
        "seal": seal_key,
        "page": seen,
        "page_sha256": sha256(page.encode()).hexdigest(),
        "raters": raters,
        "seed": seed,
        "alone": alone,
        "models": chosen,
        "protocol_hash": results.protocol_hash,
        "items": {item.id: {name: value for name, value in asdict(item).items() if name != "id"} for item in items},
    }
    write_text(target / PAGE, page)
    write_text(target / KEY, json.dumps(key, indent=2) + "\n")
    return [target / PAGE, target / KEY]


def _shown(item: Item) -> tuple[str, bool]:
    return item.shown, item.kind == DESTROYED


def _collect_strips(
    results: Results, files: Iterable[tuple[str, bool]], seed: int
) -> tuple[list[str], dict[tuple[str, bool], int]]:
    """Read files, or destroyed ones, as base64, in a random order → their texts, and their places in the list."""
    wanted = list(files)
    secrets.SystemRandom().shuffle(wanted)  # no order says which ones are of one model
    strips = []
    for file, destroyed in wanted:
        text = read_strip(results.folder, file)
        strips.append(_destroy(text, results.players["num_frames"], seed) if destroyed else text)
    return strips, {key: place for place, key in enumerate(wanted)}


def _destroy(strip: str, num_frames: int, seed: int) -> str:
    """Destroy a strip: frames in another order, each a coarse mosaic under strong noise."""
    try:
        with Image.open(io.BytesIO(base64.b64decode(strip))) as image:
            pixels = np.asarray(image.convert("RGB"))
        frames = pixels.reshape(num_frames, -1, pixels.shape[1], 3)
    except (OSError, ValueError) as error:
        raise UserError(
            f"Expected pictures of {num_frames} frames in players/, got a damaged one ({error}); remove that folder "
            "and run the sweep again."
        ) from error
    size = frames.shape[2], frames.shape[1]
    order = list(range(num_frames))
    random.Random(f"frames {seed}").shuffle(order)
    noise = np.random.default_rng(seed)
    made = []
    for place in order:
        coarse = Image.fromarray(frames[place]).resize((_BLOCKS, _BLOCKS), Image.Resampling.BOX)
        mosaic = np.asarray(coarse.resize(size, Image.Resampling.NEAREST)).astype(np.float64)
        made.append((mosaic + noise.normal(0, 40, mosaic.shape)).clip(0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate(made)).save(buffer, "webp", quality=_QUALITY)
    return base64.b64encode(buffer.getvalue()).decode()


def _render(data: dict[str, Any], strips: list[str]) -> tuple[str, str]:
    """Render the page → its text, and the digest that it computes of itself."""
    assets = Assets.load("vidtwin.benchmark.study", "assets", "study")
    text = as_json(data)
    return assets.render(data=text, strips=strips), page_digest([text, assets.script, assets.style, *strips])
