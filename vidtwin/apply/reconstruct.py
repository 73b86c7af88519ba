"""`vidtwin reconstruct`: encode and decode videos of any length, frame by frame.

Imports torch in functions only: `--help` and refusals answer without it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin import console
from vidtwin.apply.command import run_in_session
from vidtwin.apply.inputs import Input, check_folder, check_targets, find, log_existing, target
from vidtwin.apply.options import SessionOptions, add_class_options, check_counts, exit_code
from vidtwin.apply.outputs import Rendering
from vidtwin.apply.tiling import run_in_tiles
from vidtwin.apply.windows import Window, count_frames
from vidtwin.console import Progress
from vidtwin.errors import UserError
from vidtwin.storage.resumable import lock
from vidtwin.tables import read_table, write_table
from vidtwin.video import Frames, panels

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from vidtwin.apply.session import Session

USAGE = "IN [IN ...] --ckpt_path PATH [options]"
DESCRIPTION = """\
Reconstruct videos of any length, size and frame rate: as many frames, at the same times, with the sound.

  vidtwin reconstruct a.mp4 b.mp4 --ckpt_path runs/vidtwin/checkpoints/last.ckpt --side_by_side
  vidtwin reconstruct 'videos/**/*.mp4' --ckpt_path last.ckpt --out full_size --tile
  vidtwin reconstruct videos/ --ckpt_path last.ckpt --only structure --accelerator cuda --devices 4

IN are files, folders (all videos below them) or globs. A video is processed in windows of the model's length, one after
the other, in constant memory; the last window is padded with the last frame. The picture is cropped to a square and
resized to the model's resolution; it stays whole if the model takes any size, or with --tile. PSNR and SSIM of each
video (means over frames, as 8-bit pictures, against the model's input) are printed and written to
OUT/reconstructions.csv.

Exit code: 0 all done, 1 a video failed or is damaged (a line on stderr says which and why; the frames before the damage
are reconstructed), 2 nothing was written.
"""
TABLE = "reconstructions.csv"
_COLUMNS = ("input", "output", "frames", "psnr", "ssim", "note")

# Windows with a function that returns the views of each, when the device has made them.
_Rendered = tuple[list[Window], Callable[[], list[dict[str, Frames]]]]


@dataclass
class Done:
    """Row of the table: a video that was reconstructed, or failed if `frames` is 0."""

    input: str
    output: str
    frames: int
    psnr: float | None
    ssim: float | None
    note: str = ""

    def line(self) -> str:
        quality = [f"PSNR {self.psnr:.2f} dB"] if self.psnr is not None else []
        quality += [f"SSIM {self.ssim:.4f}"] if self.ssim is not None else []
        return f"{self.input} -> {self.output}  {self.frames} frames  {'  '.join(quality)}"


@dataclass
class Reconstruct:
    """Reconstruct videos.

    Args:
        inputs: Video files, folders of them, globs.
        out: Folder for NAME.mp4 of each, and for reconstructions.csv.
        only: Decode this latent alone (VidTwin: structure or dynamics).
        size: Side of the square to which pictures are cropped and resized, for models that take any size; by default
            the whole picture.
        tile: Keep the whole picture at its size, in overlapping tiles of the model's resolution.
        tile_size: Side of the tiles in pixels, for models that take any size.
        overlap: Share of a tile that overlaps with its neighbour.
        side_by_side: Show the input, the reconstruction and each latent decoded alone next to each other.
        error_map: Show the absolute error times four next to them.
        batch_size: Windows, or tiles, per forward pass.
        overwrite: Replace existing outputs.
        skip_existing: Skip inputs whose outputs exist.
        progress: Show a progress bar.
    """

    inputs: list[str]
    out: str = "reconstructions"
    only: str | None = None
    size: int | None = None
    tile: bool = False
    tile_size: int | None = None
    overlap: float = 0.25
    side_by_side: bool = False
    error_map: bool = False
    batch_size: int = 1
    overwrite: bool = False
    skip_existing: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        check_counts(batch_size=self.batch_size)
        if self.tile and self.size is not None:
            raise UserError("Expected --size or --tile, got both: tiles keep the picture's own size.")
        if self.tile_size is not None and not self.tile:
            raise UserError("Expected --tile with --tile_size, got --tile_size alone.")
        if not 0 <= self.overlap <= 0.5:
            raise UserError(f"Expected --overlap from 0 to 0.5 of a tile, got {self.overlap}.")
        if self.only is not None and self.side_by_side:
            raise UserError("Expected --only or --side_by_side, got both; the latter shows each latent alone.")
        if self.overwrite and self.skip_existing:
            raise UserError("Expected --overwrite or --skip_existing, got both.")
        check_folder(self.out)
        self.entries = find(self.inputs)
        self._found = len(self.entries)
        if self.skip_existing:
            self.entries = [entry for entry in self.entries if not self._target(entry).exists()]
        check_targets(map(self._target, self.entries), self.entries, self.overwrite, may_skip=True)

    def run(self, session: "Session") -> int:
        """Reconstruct this process's share of the videos → exit code, the same for all processes."""
        self._check(session)
        mine = self.entries[session.rank :: session.world_size]
        shown = self.progress and session.is_main
        done: list[Done] = []
        with Progress(count_frames(mine) if shown else 0, "reconstructing", "frames", shown) as bar:

            def write(rendering: Rendering, results: Iterator[_Rendered]) -> bool:
                row, disk_full = self._write(rendering, results, bar)
                done.append(row)
                if any(row.frames for row in done):
                    self._record(done)
                if disk_full:
                    console.log("finished videos are kept; free space and continue with --skip_existing")
                return not disk_full

            session.run(
                (Rendering(entry, self._target(entry)) for entry in mine),
                partial(self._read, session),
                partial(self._render, session),
                write,
            )
        if session.is_main:
            log_existing(self._found - len(self.entries), self._found, self.out)
        rows = [row for part in session.gather(done) for row in part]
        return exit_code(sum(row.frames > 0 for row in rows), sum(bool(row.note) for row in rows))

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

    def _read(self, session: "Session", rendering: Rendering) -> Iterator[tuple[list[Window], Any]]:
        size = None if self.tile else session.size(self.size)
        for some in rendering.read(session.num_frames, size, self.batch_size):
            yield some, None if self.tile else session.stack([window.frames for window in some])

    def _render(self, session: "Session", batch: tuple[list[Window], Any]) -> _Rendered:
        some, stacked = batch

        def run(clips: Any) -> dict[str, Any]:
            return session.views(clips, self.only, partial=self.side_by_side)

        if self.tile:
            side = session.model.resolution or self.tile_size or session.usual_tile
            overlap = round(side * self.overlap)

            def run_and_wait(clips: list[Frames]) -> dict[str, list[Frames]]:
                return {name: list(view.wait().numpy()) for name, view in run(clips).items()}

            tiled = [run_in_tiles(window.frames, side, overlap, run_and_wait, self.batch_size) for window in some]
            return some, lambda: tiled
        views = run(stacked)

        def wait() -> list[dict[str, Frames]]:
            arrived = {name: view.wait().numpy() for name, view in views.items()}
            return [{name: clips[place] for name, clips in arrived.items()} for place in range(len(some))]

        return some, wait

    def _write(self, rendering: Rendering, results: Iterator[_Rendered], bar: Progress) -> tuple[Done, bool]:
        """Write and measure a video → its row, and whether the disk is full."""
        from vidtwin.apply.meters import Quality

        entry, path, quality = rendering.entry, rendering.path, Quality()

        def draw() -> Iterator[tuple[Window, Frames]]:
            for some, wait in results:
                for window, views in zip(some, wait(), strict=True):
                    shown = {name: clip[: window.num_frames] for name, clip in views.items()}
                    real = window.frames[: window.num_frames]
                    quality.add(shown[self._title], real)
                    yield window, self._join(real, shown)

        written = rendering.write(draw(), bar)
        if not written.num_frames:
            return Done(str(entry.path), "", 0, None, None, written.note or ""), written.disk_full
        done = Done(str(entry.path), str(path), written.num_frames, **quality.values(), note=written.note or "")
        console.write(done.line())
        return done, written.disk_full

    @property
    def _title(self) -> str:
        return f"{self.only} only" if self.only else "reconstruction"

    def _join(self, real: Frames, shown: dict[str, Frames]) -> Frames:
        if self.side_by_side:
            shown = {"input": real, **shown}
        if self.error_map:
            shown = {**shown, f"error x{panels.ERROR_GAIN}": panels.error_map(shown[self._title], real)}
        return panels.side_by_side(shown) if len(shown) > 1 else shown[self._title]

    def _target(self, entry: Input) -> Path:
        return target(self.out, entry.name, ".mp4")

    def _record(self, done: list[Done]) -> None:
        """Merge the rows of this process into the table, which holds those of other processes and earlier runs."""
        rows: dict[str, dict[str, Any]] = {row.input: vars(row) for row in done}
        path = Path(self.out) / TABLE
        with lock(path.parent, "table of reconstructions", wait=True):
            earlier: dict[str, dict[str, Any]] = {}
            try:
                earlier = {row["input"]: row for row in read_table(path, odd_names=True)}
            except FileNotFoundError:
                pass
            except (KeyError, ValueError) as error:
                console.log(f"{path}: expected a table of reconstructions, got another ({error}); it is begun anew")
            merged = (earlier | rows).values()
            write_table(path, _COLUMNS, ([row.get(column) for column in _COLUMNS] for row in merged))


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the session and of the command."""
    add_class_options(parser, SessionOptions, Reconstruct)


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    return run_in_session(Reconstruct, options)
