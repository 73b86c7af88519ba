"""Pictures of reconstructions: views of the worst and median clips for the report's players, and the first clips."""

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm import tqdm

from vidtwin.benchmark import players, rows
from vidtwin.benchmark.loaded_model import LoadedModel
from vidtwin.benchmark.measurer import Measurer
from vidtwin.benchmark.plan import one_line
from vidtwin.console import log
from vidtwin.files import replacing
from vidtwin.video import convert, panels, write_video

if TYPE_CHECKING:
    from vidtwin.benchmark.runner import Runner


def write_players(results: rows.Results, runner: "Runner") -> None:
    """Write views of the worst and the median clips by every model, unless they are there."""
    sweep, measurer, plan = runner.sweep, runner.measurer, runner.plan
    chosen = players.choose(results, sweep.players)
    measured = [row for row in runner.rows if row.name in results.clips]
    identities = {row["name"]: row.get("identity") for row in results.rows}
    mark = hashlib.sha256(json.dumps([[clip["name"], clip["start_frame"]] for clip in chosen]).encode())
    mark.update(json.dumps([identities[row.name] for row in measured]).encode())
    if results.players.get("digest") == mark.hexdigest():
        return
    indices = [plan.index_of[(clip["name"], clip["start_frame"])] for clip in chosen]
    # The whole chunk of each, so that samples of posteriors are those that were measured.
    chunks = [next(chunk for chunk in plan.chunks if index in chunk) for index in indices]
    batches = list(measurer.load(chunks))
    places = [batch["indices"].index(index) for batch, index in zip(batches, indices, strict=True)]
    clips = [measurer.clip(batch)[[place]].cpu() for batch, place in zip(batches, places, strict=True)]
    writer = players.Writer(sweep.folder, chosen, clips, measurer.fps)
    for row in tqdm(measured, "players", disable=not sweep.progress, dynamic_ncols=True, leave=False):
        try:
            model = measurer.build(row.job)
            views = [measurer.views(model, batch, place) for batch, place in zip(batches, places, strict=True)]
        except Exception as error:  # the numbers are there, and are to be written
            log(f"no players of {row.name}: {one_line(error)}")
            continue
        for number, shown in enumerate(views):
            writer.add(number, row.name, shown)
    writer.finish(mark.hexdigest())


def write_clips(runner: "Runner") -> list[Path]:
    """Write the missing pictures of the first clips by each model, as clip<i>.mp4 and .png → the paths of all."""
    paths: list[Path] = []
    for row in runner.rows:
        content = row.read()
        if content is None or content["kind"] in ("failed", "reference"):
            continue
        number = min(runner.sweep.pictures, len(runner.plan.keys))
        targets = [(row.folder / f"clip{i}.mp4", row.folder / f"clip{i}.png") for i in range(number)]
        if not all(path.exists() for pair in targets for path in pair):
            try:
                _write_clips(runner.measurer, runner.measurer.build(row.job), targets)
            except Exception as error:  # the numbers are there
                log(f"no pictures of {row.name}: {one_line(error)}")
                continue
        paths += [path for pair in targets for path in pair]
    return paths


def _write_clips(measurer: Measurer, model: LoadedModel, targets: list[tuple[Path, Path]]) -> None:
    chunks = [chunk for chunk in measurer.plan.chunks if chunk[0] < len(targets)]
    for batch in measurer.load(chunks):
        for place, index in enumerate(batch["indices"]):
            if index >= len(targets):
                continue
            views = measurer.views(model, batch, place)
            shown = {"input": measurer.clip(batch)[place].cpu(), "reconstruction": views.pop("")} | views
            frames = {title: convert.to_uint8(clip) for title, clip in shown.items()}
            video, still = targets[index]
            write_video(video, panels.side_by_side(frames), measurer.fps)
            with replacing(still) as temporary:
                temporary.write_bytes(panels.png(panels.filmstrip(frames)))
