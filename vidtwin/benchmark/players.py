"""Pictures of reconstructions: views of the worst and median clips for the report's players, and the first clips.

A view is one WebP picture with the clip's frames from top to bottom, which a page shows frame by frame: all players of
a page then run by one clock, unlike videos.
"""

import hashlib
import io
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps
from torch import Tensor

from vidtwin.benchmark import rows
from vidtwin.benchmark.loaded_model import LoadedModel
from vidtwin.benchmark.measurer import Measurer
from vidtwin.benchmark.plan import format_error
from vidtwin.benchmark.runner import Runner
from vidtwin.console import Progress, log
from vidtwin.files import inside, replacing, write_text
from vidtwin.listing import source_of
from vidtwin.video import Frames, convert, panels, write_video

SIDE = 160  # pixels of a frame by default: a page with ten models stays below 20 MB
MAX_HEIGHT = 16_383  # of a WebP picture
QUALITY = 85


def write_players(results: rows.Results, runner: Runner) -> None:
    """Write views of the worst and the median clips by every model, unless they are there."""
    options, measurer, plan = runner.options, runner.measurer, runner.plan
    chosen = choose(results, options.players, options.random_players, options.seed)
    named = choose_rows(results)
    measured = [row for row in runner.rows if row.name in named]
    identities = {row["name"]: row.get("identity") for row in results.rows}
    mark = hashlib.sha256(json.dumps([[clip["name"], clip["start_frame"]] for clip in chosen]).encode())
    mark.update(json.dumps([identities[row.name] for row in measured]).encode())
    if drawn := [place for place, clip in enumerate(chosen) if "random" in clip["why"]]:
        mark.update(json.dumps(drawn).encode())  # which may be among the worst and median ones
    if options.player_side != SIDE:
        mark.update(str(options.player_side).encode())
    if results.players.get("digest") == mark.hexdigest():
        return
    indices = [plan.index_of[(clip["name"], clip["start_frame"])] for clip in chosen]
    # The whole chunk of each, so that samples of posteriors are those that were measured.
    chunks = [next(chunk for chunk in plan.chunks if index in chunk) for index in indices]
    batches = list(measurer.load(chunks))
    places = [batch["indices"].index(index) for batch, index in zip(batches, indices, strict=True)]
    frames = None
    if plan.varies:
        # The end of a whole video is left out.
        frames = min(MAX_HEIGHT // options.player_side, *(batch["clip"].shape[1] for batch in batches))
    clips = [
        measurer.prepare_clip(batch)[[place], :, :frames].cpu() for batch, place in zip(batches, places, strict=True)
    ]
    writer = Writer(options.folder, chosen, clips, measurer.fps, options.player_side)
    with Progress(len(measured), "players", "models", options.progress) as bar:
        for row in measured:
            try:
                model = measurer.build(row.job)
                views = [
                    measurer.make_views(model, batch, place, frames)
                    for batch, place in zip(batches, places, strict=True)
                ]
            except Exception as error:  # the numbers are there, and are to be written
                log(f"no players of {row.name}: {format_error(error)}")
                views = []
            for number, shown in enumerate(views):
                writer.add(number, row.name, shown)
            bar.update()
    writer.finish(mark.hexdigest())


def choose_rows(results: rows.Results) -> set[str]:
    """Choose the measured rows with players: all but codecs, and of each codec's curve the row of the median rate."""
    curves: dict[str, list[tuple[float, str]]] = {}
    chosen = set()
    for row in results.rows:
        if coding := row.get("coding"):
            curves.setdefault(coding["curve"], []).append((row["bits_per_pixel"], row["name"]))
        elif row["kind"] != "failed":
            chosen.add(row["name"])
    return chosen | {sorted(found)[len(found) // 2][1] for found in curves.values()}


def write_clips(runner: Runner) -> list[Path]:
    """Write the missing pictures of the first clips by each model, as clip<i>.mp4 and .png → the paths of all."""
    paths: list[Path] = []
    for row in runner.rows:
        content = row.read()
        if content is None or content["kind"] in ("failed", "reference"):
            continue
        number = min(runner.options.pictures, len(runner.plan.keys))
        targets = [(row.folder / f"clip{i}.mp4", row.folder / f"clip{i}.png") for i in range(number)]
        if not all(path.exists() for pair in targets for path in pair):
            try:
                _write_clips(runner.measurer, runner.measurer.build(row.job), targets)
            except Exception as error:  # the numbers are there
                log(f"no pictures of {row.name}: {format_error(error)}")
                continue
        paths += [path for pair in targets for path in pair]
    return paths


def _write_clips(measurer: Measurer, model: LoadedModel, targets: list[tuple[Path, Path]]) -> None:
    chunks = [chunk for chunk in measurer.plan.chunks if chunk[0] < len(targets)]
    for batch in measurer.load(chunks):
        for place, index in enumerate(batch["indices"]):
            if index >= len(targets):
                continue
            views = measurer.make_views(model, batch, place)
            shown = {"input": measurer.prepare_clip(batch)[place].cpu(), "reconstruction": views.pop("")} | views
            frames = {title: convert.to_uint8(clip) for title, clip in shown.items()}
            video, still = targets[index]
            write_video(video, panels.side_by_side(frames), measurer.fps)
            with replacing(still) as temporary:
                temporary.write_bytes(panels.png(panels.filmstrip(frames)))


def choose(results: rows.Results, number: int, others: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Choose the `number` worst and the `number` median of the common clips by the mean PSNR over trained models.

    They are of different videos if there are enough. Without trained models the mean is over all. `others` are drawn by
    the seed, of different sources, whatever their PSNR: they stand for all clips.
    """
    measured = [row for row in results.rows if row["kind"] != "failed"]
    counted = [row for row in measured if row["kind"] == "trained"] or measured
    common = rows.common_clips(results)
    sums: dict[rows.Key, float] = dict.fromkeys(sorted(common), 0.0)
    for row in counted:
        for clip in results.clips[row["name"]]:
            if rows.key_of(clip) in sums:
                sums[rows.key_of(clip)] += clip["psnr"]
    ranked = sorted(sums, key=lambda key: (sums[key], key))
    worst = _take_other_videos(ranked, number, [])
    # Next to the middle of all clips.
    middle = (len(ranked) - 1) / 2
    places = {key: place for place, key in enumerate(ranked)}
    median = _take_other_videos(sorted(ranked, key=lambda key: (abs(places[key] - middle), places[key])), number, worst)
    drawn = random.Random(f"players {seed}").sample(sorted(sums), len(sums))
    further = _take_other_videos(drawn, others, [], source_of)
    reasons: dict[rows.Key, list[str]] = {}
    for why, keys in (("worst", worst), ("median", median), ("random", further)):
        for key in keys:
            reasons.setdefault(key, []).append(why)
    return [{"name": name, "start_frame": start, "why": ", ".join(why)} for (name, start), why in reasons.items()]


def _take_other_videos(
    ranked: list[rows.Key], number: int, taken: list[rows.Key], name: Callable[[str], str] = str
) -> list[rows.Key]:
    """Take the first clips, no two of one video, or of one `name` of it; if there are too few, other clips too."""
    chosen: list[rows.Key] = []
    for again in (False, True):
        for key in ranked:
            seen = {name(video) for video, _ in [*taken, *chosen]}
            if len(chosen) < number and key not in [*taken, *chosen] and (again or name(key[0]) not in seen):
                chosen.append(key)
    return chosen


class Writer:
    """Write views to new files, which replace the earlier ones at the end.

    Args:
        folder: Results folder.
        chosen: Clips, see `choose`.
        clips: The clips' input, each (1, 3, T, H, W) in [-1, 1].
        fps: Frames per second.
        side: Pixels of a side at most.
    """

    def __init__(
        self, folder: Path, chosen: list[dict[str, Any]], clips: list[Tensor], fps: float, side: int = SIDE
    ) -> None:
        self.folder = folder
        self.fps = fps
        self.num_frames = clips[0].shape[2]
        side = min(side, MAX_HEIGHT // self.num_frames, max(64, *(max(clip.shape[3:]) for clip in clips)))
        self.size = side
        self.inputs = [convert.to_uint8(clip[0]) for clip in clips]
        self.clips: list[dict[str, Any]] = [{"id": str(i), **clip, "views": []} for i, clip in enumerate(chosen)]
        self.temporary = inside(folder, ".players")
        shutil.rmtree(self.temporary, ignore_errors=True)
        for place, frames in enumerate(self.inputs):
            self._add(place, "input", None, "input", frames)

    def add(self, place: int, model: str, views: dict[str, Tensor]) -> None:
        """Add a model's views of clip number `place`: its reconstruction under "", others by their titles."""
        frames = convert.to_uint8(views[""])
        self._add(place, model, model, "reconstruction", frames)
        error = panels.error_map(frames, self.inputs[place])
        self._add(place, f"{model} error x{panels.ERROR_GAIN}", model, "error", error)
        for title, view in views.items():
            if title:
                self._add(place, f"{model} {title}", model, "partial", convert.to_uint8(view))

    def finish(self, digest: str) -> None:
        """Replace the earlier pictures by the new ones, and write `players.json` last."""
        target = inside(self.folder, "players")
        content = {"digest": digest, "fps": self.fps, "num_frames": self.num_frames, "size": self.size}
        content["clips"] = self.clips
        shutil.rmtree(target, ignore_errors=True)
        self.temporary.rename(target)
        write_text(target / "players.json", json.dumps(content, indent=2) + "\n")

    def _add(self, place: int, title: str, model: str | None, kind: str, frames: Frames) -> None:
        views = self.clips[place]["views"]
        name = f"{place}/{len(views)}.webp"
        with replacing(self.temporary / name) as temporary:
            temporary.write_bytes(_encode_strip(frames, self.size))
        views.append({"title": title, "model": model, "kind": kind, "file": f"players/{name}"})


def _encode_strip(frames: Frames, size: int) -> bytes:
    """Encode frames (T, H, W, 3) as a WebP picture of frames of size × size, from top to bottom.

    Pictures that are not square have black bars.
    """
    resampling = Image.Resampling.NEAREST if max(frames.shape[1:3]) < size else Image.Resampling.LANCZOS
    images = [ImageOps.pad(Image.fromarray(frame), (size, size), resampling) for frame in frames]
    buffer = io.BytesIO()
    Image.fromarray(np.concatenate([np.asarray(image) for image in images])).save(buffer, "webp", quality=QUALITY)
    return buffer.getvalue()
