"""`vidtwin reconstruct`: videos of any length through an autoencoder and back, frame by frame those of the input.

Heavy imports stand in functions: `--help` and refusals answer without torch.
"""

import csv
import io
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from vidtwin.apply.command import run_in_session
from vidtwin.apply.inputs import Input, check_folder, check_targets, find, target
from vidtwin.apply.options import SessionOptions, add_class_options, exit_code
from vidtwin.apply.tiling import in_tiles
from vidtwin.apply.windows import BeforeDamage, Window, examine, windows
from vidtwin.errors import UserError
from vidtwin.files import no_room, write_text
from vidtwin.video import Frames, VideoError, VideoWriter

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from vidtwin.apply.session import Session

USAGE = "IN [IN ...] --ckpt_path PATH [options]"
DESCRIPTION = """\
Reconstruct videos of any length, size and frame rate: as many frames, at the same times, with the sound.

  vidtwin reconstruct a.mp4 b.mp4 --ckpt_path runs/vidtwin/checkpoints/last.ckpt --side_by_side
  vidtwin reconstruct 'videos/**/*.mp4' --ckpt_path last.ckpt --out full_size --tile
  vidtwin reconstruct videos/ --ckpt_path last.ckpt --only structure --accelerator cuda --devices 4

IN are files, folders (all videos below them) or globs. A video goes through in windows of the model's length, one after
the other, in constant memory; the last frame pads the last window, and the padding is cut off again. The picture is
cropped to a square and resized to the model's resolution, or kept whole: by --tile, or if the model takes any size.
PSNR and SSIM of each video, means over its frames of 8-bit pictures against the model's input, are printed and written
to OUT/reconstructions.csv.

Exit code: 0 all done, 1 a video failed or is damaged (a line on stderr gives the reason; the frames before the damage
are reconstructed), 2 nothing was made.
"""
TABLE = "reconstructions.csv"
_COLUMNS = ("input", "output", "frames", "psnr", "ssim", "note")


@dataclass
class Done:
    """Result for a video; `frames` is 0 if it failed."""

    input: str
    output: str
    frames: int
    psnr: float | None
    ssim: float | None
    note: str = ""

    def line(self) -> str:
        likeness = [f"PSNR {self.psnr:.2f} dB"] if self.psnr is not None else []
        likeness += [f"SSIM {self.ssim:.4f}"] if self.ssim is not None else []
        return f"{self.input} -> {self.output}  {self.frames} frames  {'  '.join(likeness)}"


class Reconstruct:
    """Reconstruct videos.

    Args:
        inputs: Video files, folders of them, globs.
        out: Folder for NAME.mp4 of each, and for reconstructions.csv.
        only: Decode this latent alone (VidTwin: structure or dynamics).
        size: Side of the square that pictures are cropped and resized to, for models that take any size; by default
            those take the whole picture.
        tile: Keep the whole picture at its size, in overlapping tiles of the model's resolution.
        tile_size: Side of the tiles in pixels, for models that take any size.
        overlap: Share of a tile that it has in common with its neighbour.
        side_by_side: Show the input, the reconstruction and the picture of each latent alone next to each other.
        error_map: Show the absolute error, four times enlarged, next to it.
        batch_size: Windows, or tiles, per forward pass.
        overwrite: Replace existing outputs.
        skip_existing: Leave out inputs whose outputs exist.
        progress: Show a progress bar.
    """

    def __init__(
        self,
        inputs: list[str],
        out: str = "reconstructions",
        only: str | None = None,
        size: int | None = None,
        tile: bool = False,
        tile_size: int | None = None,
        overlap: float = 0.25,
        side_by_side: bool = False,
        error_map: bool = False,
        batch_size: int = 1,
        overwrite: bool = False,
        skip_existing: bool = False,
        progress: bool = True,
    ) -> None:
        self.out = Path(out)
        self.only, self.side_by_side, self.error_map = only, side_by_side, error_map
        self.size, self.tile, self.tile_size, self.overlap = size, tile, tile_size, overlap
        self.batch_size, self.progress = batch_size, progress
        if batch_size < 1:
            raise UserError(f"Expected --batch_size of at least 1, got {batch_size}.")
        if tile and size is not None:
            raise UserError("Expected --size or --tile, got both: tiles keep the picture's own size.")
        if tile_size is not None and not tile:
            raise UserError("Expected --tile with --tile_size, got --tile_size alone.")
        if not 0 <= overlap <= 0.5:
            raise UserError(f"Expected --overlap from 0 to 0.5 of a tile, got {overlap}.")
        if only is not None and side_by_side:
            raise UserError("Expected --only or --side_by_side, got both; the latter shows each latent alone.")
        if overwrite and skip_existing:
            raise UserError("Expected --overwrite or --skip_existing, got both.")
        check_folder(out)
        self.inputs = find(inputs)
        self._full = False  # whether the disk is
        if skip_existing:
            self.inputs = [entry for entry in self.inputs if not self._target(entry).exists()]
        check_targets(map(self._target, self.inputs), self.inputs, overwrite)

    def run(self, session: "Session") -> int:
        """Reconstruct this process's share → exit code, the same for all processes."""
        self._check(session)
        mine = self.inputs[session.rank :: session.world_size]
        shown = self.progress and session.is_main
        with tqdm(total=_count_frames(mine) if shown else None, unit="frame", disable=not shown) as bar:
            done = []
            for entry in mine:
                done.append(self._reconstruct(session, entry, bar))
                if any(row.frames for row in done):
                    self._record(done)
                if self._full:
                    session.tell("complete videos stay; --skip_existing goes on when there is room")
                    break
        everything = [row for rows in session.gather(done) for row in rows]
        whole = sum(row.frames > 0 for row in everything)
        return exit_code(whole, sum(bool(row.note) for row in everything))

    def _check(self, session: "Session") -> None:
        model = session.model
        if self.only is not None:
            session.check_partial(self.only)
        session.size(self.size)
        if self.tile_size is not None and model.resolution not in (None, self.tile_size):
            raise UserError(
                f"Expected --tile_size {model.resolution} of this model, got {self.tile_size}; leave it out."
            )
        if self.tile_size is not None and (self.tile_size < 1 or self.tile_size % model.spatial_multiple):
            raise UserError(f"Expected --tile_size a multiple of {model.spatial_multiple}, got {self.tile_size}.")

    def _reconstruct(self, session: "Session", entry: Input, bar: "tqdm[None]") -> Done:
        path = self._target(entry)
        done = Done(str(entry.path), str(path), 0, None, None)
        from vidtwin.apply.meters import Likeness

        likeness = Likeness()
        size = None if self.tile else session.size(self.size)
        try:
            info, wrong = examine(entry.path)
            parts = BeforeDamage(windows(entry.path, session.num_frames, size))
            with VideoWriter(path, info.fps, timed=True, sound=entry.path) as writer:
                for window, shown in self._iter_views(session, parts):
                    real = window.frames[: window.num_frames]
                    likeness.add(shown[self._title], real)
                    for picture, time in zip(self._join(real, shown), window.times, strict=True):
                        writer.write(picture, time)
                    done.frames += window.num_frames
                    bar.update(window.num_frames)
        except VideoError as error:
            self._full = no_room(error) is not None
            session.tell(str(error))
            return Done(str(entry.path), "", 0, None, None, str(error))
        damage = parts.reason or (str(wrong) if wrong else None)
        done.note = session.tell_lack(path, done.frames, damage, writer.lost_sound) or ""
        done.psnr, done.ssim = likeness.psnr.value, likeness.ssim.value
        session.report(done.line())
        return done

    @property
    def _title(self) -> str:
        return f"{self.only} only" if self.only else "reconstruction"

    def _iter_views(self, session: "Session", parts: Iterable[Window]) -> Iterator[tuple[Window, dict[str, Frames]]]:
        """Yield windows with the real frames of their views."""
        waiting: list[Window] = []
        for window in parts:
            waiting.append(window)
            if len(waiting) == self.batch_size:
                yield from self._run_batch(session, waiting)
                waiting = []
        if waiting:
            yield from self._run_batch(session, waiting)

    def _run_batch(self, session: "Session", some: list[Window]) -> Iterator[tuple[Window, dict[str, Frames]]]:
        def run(clips: list[Frames]) -> dict[str, list[Frames]]:
            return session.views(clips, self.only, partial=self.side_by_side)

        if self.tile:
            side = session.model.resolution or self.tile_size or session.usual_tile
            overlap = round(side * self.overlap)
            made = [in_tiles(window.frames, side, overlap, run, self.batch_size) for window in some]
        else:
            by_name = run([window.frames for window in some])
            made = [{name: clips[place] for name, clips in by_name.items()} for place in range(len(some))]
        for window, shown in zip(some, made, strict=True):
            yield window, {name: clip[: window.num_frames] for name, clip in shown.items()}

    def _join(self, real: Frames, shown: dict[str, Frames]) -> Frames:
        from vidtwin.video import panels

        if self.side_by_side:
            shown = {"input": real, **shown}
        if self.error_map:
            shown = {**shown, f"error x{panels.ERROR_GAIN}": panels.error_map(shown[self._title], real)}
        return panels.side_by_side(shown) if len(shown) > 1 else shown[self._title]

    def _target(self, entry: Input) -> Path:
        return target(self.out, entry.name, ".mp4")

    def _record(self, done: list[Done]) -> None:
        """Merge the rows of this process into the table of other processes and earlier runs."""
        from vidtwin.storage.resumable import lock

        rows = {row.input: {column: getattr(row, column) for column in _COLUMNS} for row in done}
        path = self.out / TABLE
        with lock(self.out, "table of reconstructions", wait=True):
            earlier: dict[str, dict[str, Any]] = {}
            if path.exists():
                with path.open(encoding="utf-8", newline="") as file:
                    earlier = {row["input"]: row for row in csv.DictReader(file) if row.get("input")}
            text = io.StringIO()
            writer = csv.DictWriter(text, _COLUMNS, lineterminator="\n", extrasaction="ignore")
            writer.writeheader()
            writer.writerows((earlier | rows).values())
            write_text(path, text.getvalue())


def _count_frames(inputs: list[Input]) -> int:
    total = 0
    for entry in inputs:
        try:
            total += examine(entry.path)[0].num_frames
        except VideoError:  # reported at its turn
            continue
    return total


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the session and of the command."""
    add_class_options(parser, SessionOptions, Reconstruct)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    return run_in_session(Reconstruct, options)
