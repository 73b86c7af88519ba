"""Encode videos into a folder of latents (vidtwin/storage/latent_files.py).

    inputs ── survey ──> plan: windows of each shard ── each process its share of the shards ──> shards ──> totals

The plan depends on the inputs and the settings alone, and a batch never spans two shards: neither a kill nor the number
of processes changes a shard.
"""

import math
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vidtwin import console
from vidtwin.apply.inputs import Input
from vidtwin.apply.latent_plan import cut, difference, finish, read_since, survey_inputs
from vidtwin.apply.options import EncodeOptions, SessionOptions
from vidtwin.apply.pieces import PieceReader
from vidtwin.apply.session import Download, Session
from vidtwin.apply.windows import Window
from vidtwin.console import Progress
from vidtwin.errors import UserError, few
from vidtwin.posteriors import DiagonalGaussian, Posterior, Quantized
from vidtwin.storage.latent_files import (
    DTYPES,
    LOGVAR,
    MANIFEST,
    SHARD,
    Latent,
    Manifest,
    Piece,
    Shard,
    StoredPiece,
    VideoEntry,
    code_dtype,
    open_shard,
    pack_times,
    tensor_name,
    write_shard,
)
from vidtwin.storage.resumable import Resumable, lock
from vidtwin.video import COLOUR, RESIZE_FILTER

_ADVICE = "set another --out, or --overwrite to begin anew"


class _Waiting(NamedTuple):
    """A window to be encoded, of a piece of a shard."""

    place: int
    video: str
    window: Window


@dataclass
class _Output:
    """A shard to write; its stored pieces are complete when it has been read."""

    path: Path
    planned: list[Piece]
    pieces: list[StoredPiece] = field(default_factory=list)


class _Encoded(NamedTuple):
    """Windows with their latents' parts: those of each by the name of the latent and of the part."""

    batch: list[_Waiting]
    parts: dict[tuple[str, str], Download]


class LatentWriter:
    """Encode videos; see `EncodeOptions`.

    Args:
        options: Options of the encoding.
        session_options: Weights and devices.
        inputs: Videos.
    """

    def __init__(self, options: EncodeOptions, session_options: SessionOptions, inputs: list[Input]) -> None:
        self.options = options
        self.session_options = session_options
        self.folder = Path(options.out)
        self.inputs = inputs
        self.session = Session(session_options)
        self.side = self.session.size(options.size)

    def run(self) -> int:
        """Make the missing shards → exit code: 1 if a video or a shard is missing in the end, 2 if all are."""
        planned = self._on_main(self._plan)
        try:
            with lock(self.folder, "encoding", self.session.fabric):
                return self._run(planned)
        except KeyboardInterrupt:
            if self.session.is_main:
                console.log(f"complete shards are in {self.folder}; run the same command again to continue")
            raise

    def _run(self, planned: Manifest) -> int:
        session = self.session
        manifest, missing = self._on_main(lambda: self._prepare(planned))
        start = time.perf_counter()
        begin, end = (len(missing) * rank // session.world_size for rank in (session.rank, session.rank + 1))
        try:
            self._encode(manifest, missing[begin:end])
        except UserError as error:
            console.log(str(error))
        session.fabric.barrier()
        seconds = time.perf_counter() - start
        return int(self._on_main(lambda: self._finish(manifest, planned.unread, missing, seconds)))

    def _on_main(self, work: Any) -> Any:
        """Do `work` in the main process → its result, or `UserError`, in all processes."""
        result, refused = None, None
        if self.session.is_main:
            try:
                result = work()
            except UserError as error:
                refused = str(error)
        result, refused = self.session.fabric.broadcast((result, refused))
        if refused is not None:
            raise UserError(refused)
        return result

    def _plan(self) -> Manifest:
        session, options = self.session, self.options
        videos, classes, skipped, unread = survey_inputs(self.inputs, options.labels == "folders", self._known())
        for name, reason in skipped.items():
            console.log(f"{name}: {reason}; skipped")
        for name, reason in unread.items():
            console.log(f"{name}: {reason}; left out until it can be read")
        if not videos:
            raise UserError(f"Expected a video that can be read, got none of {len(self.inputs)}; nothing was written.")
        settings = {
            "num_frames": session.num_frames,
            "size": self.side,
            "crop": "none" if self.side is None else "largest centre square",
            "resize": "none" if self.side is None else RESIZE_FILTER,
            "colour": COLOUR,
            "padding": "last frame repeated",
            "posterior": options.posterior,
            "dtype": options.dtype,
            "precision": session.precision,
            "clips_per_shard": options.clips_per_shard,
            **({"compile": mode} if (mode := self.session_options.compile) else {}),
        }
        model = {**session.model.spec(), "weights_sha256": session.weights_sha256, "checkpoint": session.checkpoint}
        model |= {"config": self.session_options.config, "use_ema": self.session_options.use_ema}
        counts = [math.ceil(video.planned_frames / session.num_frames) for video in videos]
        shards = cut(counts, options.clips_per_shard)
        return Manifest(model, settings, self._latents(), videos, shards, classes, skipped, unread)

    def _known(self) -> dict[str, VideoEntry]:
        """Return the videos that an earlier run has surveyed."""
        try:
            return {video.name: video for video in Manifest.read(self.folder).videos}
        except UserError:
            return {}

    def _latents(self) -> dict[str, Latent]:
        """Find the kinds of the model's latents by encoding a black clip."""
        session = self.session
        side = self.side or 64 + -64 % session.model.spatial_multiple
        black = np.zeros((session.num_frames, side, side, 3), np.uint8)
        latents = {name: _kind(posterior) for name, posterior in session.encode([black]).items()}
        if self.options.posterior == "moments" and all(latent.kind != "gaussian" for latent in latents.values()):
            kinds = ", ".join(f"{name} ({latent.kind})" for name, latent in latents.items())
            raise UserError(
                f"Expected Gaussian latents for --posterior moments, got {kinds} of {type(session.model).__name__}; "
                "leave it out."
            )
        return latents

    def _prepare(self, planned: Manifest) -> tuple[Manifest, list[int]]:
        """Claim the folder for these latents → its manifest and the missing shards."""
        store = Resumable(self.folder, SHARD, partial(_read_shard, planned), "latents", MANIFEST)
        anew = self.options.overwrite or self._may_grow(planned)
        store.begin(lambda: self._compare(planned, store), _ADVICE, anew)
        missing = store.missing(range(len(planned.shards)))
        with suppress(UserError):  # of a manifest that is missing or damaged
            earlier = Manifest.read(self.folder)
            if earlier.complete and earlier.skipped == planned.skipped and not missing:
                return earlier, []
        self._write(store.folder / MANIFEST, lambda: planned.write(self.folder))
        return planned, missing

    def _may_grow(self, planned: Manifest) -> bool:
        """Return whether the folder holds these latents without videos that can be read by this run."""
        with suppress(UserError):
            earlier = Manifest.read(self.folder)
            names = read_since(planned, earlier)
            if names and difference(planned, earlier) is None:
                console.log(f"{few(names)} can be read now, which moves the others to other shards: all are made again")
                return True
        return False

    def _compare(self, planned: Manifest, store: "Resumable[Shard]") -> str | None:
        """Compare the folder's manifest to the plan → the difference; for a damaged one compare the shards."""
        try:
            return difference(planned, Manifest.read(self.folder))
        except UserError as error:
            for number in range(len(planned.shards)):
                with suppress(UserError):
                    Shard(store.path(number), planned.digest)
                    console.log(f"{error} The shards are of this command: it is written anew.")
                    return None
            raise UserError(f"{error} {_ADVICE.capitalize()}.") from error

    def _encode(self, manifest: Manifest, numbers: list[int]) -> None:
        reader = PieceReader(manifest, self.inputs, self.side)
        total = sum(piece.windows for number in numbers for piece in manifest.shards[number])
        shared = f" ({self.session.world_size} processes, each)" if self.session.world_size > 1 else ""

        def write(output: _Output, results: Iterator[_Encoded]) -> None:
            try:
                tensors = self._collect(manifest, results, bar)
            except UserError as error:  # the other shards can still be made
                console.log(f"{output.path.name} is not made: {error}")
                return
            self._write(output.path, lambda: write_shard(output.path, manifest.digest, output.pieces, tensors))

        with Progress(total, f"encoding{shared}", "clips", self.session.is_main and self.options.progress) as bar:
            outputs = [_Output(self.folder / SHARD.format(number), manifest.shards[number]) for number in numbers]
            self.session.run(outputs, partial(self._read, reader), self._encode_batch, write)

    def _read(self, reader: PieceReader, output: _Output) -> Iterator[tuple[list[_Waiting], Tensor]]:
        """Yield the windows of a shard in batches of one size, and complete its pieces."""
        waiting: list[_Waiting] = []

        def flush() -> tuple[list[_Waiting], Tensor]:
            batch, waiting[:] = waiting[:], []
            return batch, self.session.stack([each.window.frames for each in batch])

        whole = False
        try:
            for place, piece in enumerate(output.planned):
                stored, packed, shape = reader.start(piece), [], (0, 0)
                for window in reader.windows(piece):
                    full = len(waiting) == self.options.batch_size
                    if waiting and (full or waiting[0].window.frames.shape != window.frames.shape):
                        yield flush()
                    waiting.append(_Waiting(place, stored.video, window))
                    stored.num_frames.append(window.num_frames)
                    packed += window.times
                    shape = window.frames.shape[1:3]
                if stored.num_frames:
                    start = piece.first_window * self.session.num_frames
                    times = pack_times(packed, reader.fps, start)
                    stored = replace(stored, height=shape[0], width=shape[1], times=times)
                output.pieces.append(replace(stored, damage=reader.damage))
            if waiting:
                yield flush()
            whole = True
        finally:
            if not whole:
                reader.reset()

    def _encode_batch(self, read: tuple[list[_Waiting], Tensor]) -> _Encoded:
        batch, stacked = read
        try:
            encoding = self.session.encode(stacked)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"Expected windows of {tuple(stacked.shape)} to fit the device's memory, they do not; lower "
                "--batch_size or --size."
            ) from error
        with torch.inference_mode():
            found = {(name, part): Download(value) for name, posterior in encoding.items()
                     for part, value in self._parts(posterior).items()}  # fmt: skip
        return _Encoded(batch, found)

    def _collect(self, manifest: Manifest, results: Iterator[_Encoded], bar: Progress) -> dict[str, Tensor]:
        """Collect the latents of a shard → its tensors by name."""
        rows: dict[str, list[Tensor]] = {}
        for batch, parts in results:
            for (latent, part), download in parts.items():
                value = download.wait()
                if size := manifest.latents[latent].codebook_size:
                    value = value.to(code_dtype(size))
                for each, row in zip(batch, value, strict=True):
                    if row.is_floating_point() and not torch.isfinite(row).all():
                        raise UserError(
                            f"{each.video}: expected {latent} of finite numbers in {self.options.dtype}, got others in "
                            f"the window from frame {each.window.start_frame} on; take --dtype float32 and --precision "
                            "32-true, or other weights."
                        )
                    rows.setdefault(tensor_name(each.place, latent, part or None), []).append(row)
            bar.update(len(batch))
        return {name: torch.stack(tensors) for name, tensors in rows.items()}

    def _parts(self, posterior: Posterior) -> dict[str, Tensor]:
        dtype = DTYPES[self.options.dtype]
        if isinstance(posterior, Quantized):
            return {"": posterior.codes}
        if isinstance(posterior, DiagonalGaussian) and self.options.posterior == "moments":
            return {"": posterior.mean.to(dtype), LOGVAR: posterior.logvar.to(dtype)}
        return {"": posterior.mode().to(dtype)}

    def _write(self, path: Path, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(
                f"Expected to write {path}, got {(error.strerror or str(error))!r}; complete shards stay, and "
                "run the same command again to continue."
            ) from error

    def _finish(self, manifest: Manifest, unread: dict[str, str], made: list[int], seconds: float) -> int:
        session, folder = self.session, self.folder
        missing = [number for number in range(len(manifest.shards)) if not (folder / SHARD.format(number)).exists()]
        if missing:
            whole = len(manifest.shards) - len(missing)
            console.log(
                f"{whole} of {len(manifest.shards)} shards are complete in {folder}; run the same command again to "
                "continue"
            )
            return 1 if whole else 2
        if unread:
            console.log(
                f"{few(list(unread))} could not be read, so the latents in {folder} are not complete; try again, or "
                "give the other videos alone"
            )
            return 1
        if not manifest.complete:
            done = finish(manifest, folder)
            self._write(folder / MANIFEST, lambda: done.write(folder))
            manifest = done
        damaged = {video.name: video.damage for video in manifest.videos if video.damage and video.num_frames}
        empty = {video.name: video.damage or "no frame decodes" for video in manifest.videos if not video.num_frames}
        for name, reason in damaged.items():
            console.log(f"{name}: {reason}; the frames before are encoded")
        for name, reason in empty.items():
            console.log(f"{name}: {reason}; skipped")
        totals = manifest.totals
        if not totals["clips"]:
            raise UserError(f"Expected a video that can be decoded, got none of {len(self.inputs)}.")
        new = sum(piece.stored or 0 for number in made for piece in manifest.shards[number])
        rate = f"compression rate {totals['compression_rate']:.4%}"
        if totals["bits_per_pixel"] is not None:
            rate = f"{totals['bits_per_pixel']:.4g} bits per pixel"
        speed = f", {new / seconds:.1f} clips/s" if new else ", all encoded before"
        session.say(
            f"{totals['clips']:,} clips of {totals['videos']:,} videos, {rate} (padding counts), "
            f"{totals['bytes']:,} bytes{speed} -> {folder}"
        )
        return 1 if damaged or empty or manifest.skipped else 0


def _read_shard(planned: Manifest, number: int, path: Path) -> Shard:
    return open_shard(path.parent, planned, number).check()


def _kind(posterior: Posterior) -> Latent:
    if isinstance(posterior, Quantized):
        return Latent("codes", codebook_size=posterior.codebook_size)
    return Latent("gaussian" if isinstance(posterior, DiagonalGaussian) else "deterministic")
