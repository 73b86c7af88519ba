"""Clips that the report plays: the worst and the median ones, as the input and by every model.

A view of a clip is one WebP picture with its frames from top to bottom, which a page shows frame by frame: all players
of a page then run by one clock, which videos do not.
"""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor

from vidtwin.benchmark import rows
from vidtwin.files import inside, replacing, write_text
from vidtwin.video import Frames, convert, panels

MAX_SIDE = 160  # pixels of a frame: a page with ten models stays below 20 MB
MAX_HEIGHT = 16_383  # of a WebP picture
QUALITY = 85


def choose(results: rows.Results, number: int) -> list[dict[str, Any]]:
    """The `number` worst and the `number` median clips by the mean PSNR over models, of the clips that all have.

    Clips of different videos, as far as there are. Over trained models, or where there are none over all.
    """
    measured = [row for row in results.rows if row["kind"] != "failed"]
    counted = [row for row in measured if row["kind"] == "trained"] or measured
    common = rows.common_clips(results.clips)
    sums: dict[rows.Key, float] = dict.fromkeys(sorted(common), 0.0)
    for row in counted:
        for clip in results.clips[row["name"]]:
            if rows.key_of(clip) in sums:
                sums[rows.key_of(clip)] += clip["psnr"]
    ranked = sorted(sums, key=lambda key: (sums[key], key))
    worst = _of_other_videos(ranked, number, [])
    # Next to the middle of all clips.
    middle = (len(ranked) - 1) / 2
    places = {key: place for place, key in enumerate(ranked)}
    median = _of_other_videos(sorted(ranked, key=lambda key: (abs(places[key] - middle), places[key])), number, worst)
    chosen = [(key, "worst") for key in worst] + [(key, "median") for key in median]
    return [{"name": name, "start_frame": start, "why": why} for (name, start), why in chosen]


def _of_other_videos(ranked: list[rows.Key], number: int, taken: list[rows.Key]) -> list[rows.Key]:
    """The first ones, no two of one video; where there are too few videos, other clips of them after all."""
    chosen: list[rows.Key] = []
    for again in (False, True):
        for key in ranked:
            seen = {name for name, _ in [*taken, *chosen]}
            if len(chosen) < number and key not in [*taken, *chosen] and (again or key[0] not in seen):
                chosen.append(key)
    return chosen


class Writer:
    """Writes the views beside the earlier ones, whose place they take in the end.

    Args:
        folder: Of the results.
        chosen: The clips, by `choose`.
        clips: Each (1, 3, T, H, W) in [-1, 1].
        fps: Frames per second.
    """

    def __init__(self, folder: Path, chosen: list[dict[str, Any]], clips: list[Tensor], fps: float) -> None:
        self.folder = folder
        self.fps = fps
        self.num_frames = clips[0].shape[2]
        side = min(MAX_SIDE, MAX_HEIGHT // self.num_frames, max(64, clips[0].shape[3]))
        self.size = side
        self.inputs = [convert.to_uint8(clip[0]) for clip in clips]
        self.clips: list[dict[str, Any]] = [{"id": str(i), **clip, "views": []} for i, clip in enumerate(chosen)]
        self.temporary = inside(folder, ".players")
        shutil.rmtree(self.temporary, ignore_errors=True)
        for place, frames in enumerate(self.inputs):
            self._add(place, "input", None, "input", frames)

    def add(self, place: int, model: str, views: dict[str, Tensor]) -> None:
        """A model's views of clip number `place`: its reconstruction under "", others by their titles."""
        frames = convert.to_uint8(views[""])
        self._add(place, model, model, "reconstruction", frames)
        error = panels.error_map(frames, self.inputs[place])
        self._add(place, f"{model} error x{panels.ERROR_GAIN}", model, "error", error)
        for title, view in views.items():
            if title:
                self._add(place, f"{model} {title}", model, "partial", convert.to_uint8(view))

    def finish(self, digest: str) -> None:
        """Put the new pictures in the place of those before, and write `players.json`, which is the last."""
        target = inside(self.folder, "players")
        content = {
            "digest": digest,
            "fps": self.fps,
            "num_frames": self.num_frames,
            "size": self.size,
            "clips": self.clips,
        }
        shutil.rmtree(target, ignore_errors=True)
        self.temporary.rename(target)
        write_text(target / "players.json", json.dumps(content, indent=2) + "\n")

    def _add(self, place: int, title: str, model: str | None, kind: str, frames: Frames) -> None:
        views = self.clips[place]["views"]
        name = f"{place}/{len(views)}.webp"
        with replacing(self.temporary / name) as temporary:
            temporary.write_bytes(_strip(frames, self.size))
        views.append({"title": title, "model": model, "kind": kind, "file": f"players/{name}"})


def _strip(frames: Frames, size: int) -> bytes:
    """(T, H, W, 3) → WebP of T frames of size × size, from top to bottom."""
    small = frames.shape[1] < size
    images = [
        Image.fromarray(frame).resize((size, size), Image.Resampling.NEAREST if small else Image.Resampling.LANCZOS)
        for frame in frames
    ]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(image) for image in images])).save(buffer, "webp", quality=QUALITY)
    return buffer.getvalue()
