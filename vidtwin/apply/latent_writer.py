"""Encode videos into a folder of latents (vidtwin/latent_files.py).

    inputs ── survey ──> plan: what each shard holds ── every process its share of the shards ──> shards ──> totals

The plan follows from the inputs and the settings alone, and a batch never goes beyond a shard: neither a kill nor the
number of processes changes a shard.
"""

import math
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vidtwin.apply.inputs import Input
from vidtwin.apply.latent_plan import cut, difference, finish, survey_inputs
from vidtwin.apply.options import SessionOptions
from vidtwin.apply.pieces import PieceReader
from vidtwin.apply.session import Session
from vidtwin.apply.windows import Window
from vidtwin.distributed import locked
from vidtwin.errors import UserError
from vidtwin.files import intended_name
from vidtwin.posteriors import DiagonalGaussian, Posterior, Quantized
from vidtwin.storage.latent_files import (
    DTYPES,
    LOGVAR,
    MANIFEST,
    Latent,
    Manifest,
    Piece,
    Shard,
    StoredPiece,
    VideoEntry,
    code_dtype,
    own_files,
    pack_times,
    shard_path,
    tensor_name,
    write_shard,
)
from vidtwin.video import COLOUR, RESIZE_FILTER

if TYPE_CHECKING:
    from vidtwin.apply.encode import EncodeOptions


class _Waiting(NamedTuple):
    """A window that is to be encoded, of a piece of a shard."""

    place: int
    video: str
    window: Window


class LatentWriter:
    """Encodes videos; see `EncodeOptions`.

    Args:
        options: What is encoded, and how it is written.
        session_options: By which weights, and where.
        inputs: The videos.
    """

    def __init__(self, options: "EncodeOptions", session_options: SessionOptions, inputs: list[Input]) -> None:
        self.options = options
        self.session_options = session_options
        self.folder = Path(options.out)
        self.inputs = inputs
        self.session = Session(session_options)
        self.side = self.session.size(options.size)

    def run(self) -> int:
        """Make the shards that are missing → 0, 1 where a video or a shard is lacking."""
        planned = self._on_main(self._plan)
        try:
            with locked(self.folder, self.session.fabric, "encoding"):
                return self._run(planned)
        except KeyboardInterrupt:
            if self.session.is_main:
                self.session.tell(f"what was encoded is in {self.folder}; the same command goes on")
            raise

    def _run(self, planned: Manifest) -> int:
        session = self.session
        manifest, missing = self._on_main(lambda: self._prepare(planned))
        start = time.perf_counter()
        begin, end = (len(missing) * rank // session.world_size for rank in (session.rank, session.rank + 1))
        try:
            self._encode(manifest, missing[begin:end])
        except UserError as error:
            session.tell(str(error))
        session.fabric.barrier()
        seconds = time.perf_counter() - start
        return int(self._on_main(lambda: self._finish(manifest, missing, seconds)))

    def _on_main(self, work: Any) -> Any:
        """What the main process gets, for all of them; its `UserError` too."""
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

    # What is to be encoded.

    def _plan(self) -> Manifest:
        session, options = self.session, self.options
        videos, classes, skipped = survey_inputs(self.inputs, options.labels == "folders", self._known())
        for name, reason in skipped.items():
            session.tell(f"{name}: {reason}; skipped")
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
        }
        model = {**session.model.spec(), "weights_sha256": session.weights_sha256, "checkpoint": session.checkpoint}
        model |= {"config": self.session_options.config, "use_ema": self.session_options.use_ema}
        counts = [math.ceil(video.planned_frames / session.num_frames) for video in videos]
        shards = cut(counts, options.clips_per_shard)
        return Manifest(model, settings, self._latents(), videos, shards, classes, skipped)

    def _known(self) -> dict[str, VideoEntry]:
        """Videos that an earlier run has surveyed."""
        try:
            return {video.name: video for video in Manifest.read(self.folder).videos}
        except UserError:
            return {}

    def _latents(self) -> dict[str, Latent]:
        """What kinds of latents the model has, from a black clip."""
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
        """The folder is made one of these latents → its manifest, the shards that are missing."""
        folder = self.folder
        for path in folder.iterdir():
            if (intended_name(path) or "").startswith(("shard-", MANIFEST)):
                path.unlink()  # of a run that was killed
        if self.options.overwrite:
            for path in own_files(folder):
                path.unlink()
        held = next(own_files(folder), None)
        if held is None and any(not path.name.startswith(".") for path in folder.iterdir()):
            raise UserError(f"Expected an empty folder or one of latents, got {folder} with other files; set --out.")
        earlier = None
        if held is not None:
            earlier = self._earlier(planned)
        if earlier is not None and (found := difference(planned, earlier)):
            raise UserError(
                f"Expected {folder} to hold the latents of this command, it has {found}; set another --out, or "
                "--overwrite to begin anew."
            )
        missing = []
        for number in range(len(planned.shards)):
            path = shard_path(folder, number)
            try:
                Shard(path, planned.digest).check()
            except UserError as error:
                if path.exists():
                    self.session.tell(f"{error} It is made again.")
                    path.unlink()
                missing.append(number)
        if earlier and earlier.complete and earlier.skipped == planned.skipped and not missing:
            return earlier, []
        self._writing(folder / MANIFEST, lambda: planned.write(folder))
        return planned, missing

    def _earlier(self, planned: Manifest) -> Manifest | None:
        """The manifest that is there; None for one that is damaged or lost among shards of this very plan."""
        try:
            return Manifest.read(self.folder)
        except UserError as error:
            for number in range(len(planned.shards)):
                with suppress(UserError):
                    Shard(shard_path(self.folder, number), planned.digest)
                    self.session.tell(f"{error} The shards are of this command: it is written anew.")
                    return None
            advice = "Set another --out, or --overwrite to begin anew."
            raise UserError(f"{error} {advice}") from error

    # The share of a process.

    def _encode(self, manifest: Manifest, numbers: list[int]) -> None:
        reader = PieceReader(manifest, self.inputs, self.side)
        total = sum(piece.windows for number in numbers for piece in manifest.shards[number])
        shared = f" ({self.session.world_size} processes, each)" if self.session.world_size > 1 else ""
        hidden = None if self.session.is_main and self.options.progress else True
        with tqdm(total=total, desc=f"encoding{shared}", unit="clip", disable=hidden, dynamic_ncols=True) as bar:
            for number in numbers:
                path = shard_path(self.folder, number)
                try:
                    pieces, tensors = self._shard(reader, manifest.shards[number], bar)
                except UserError as error:  # the other shards can be made for all that
                    self.session.tell(f"{path.name} is not made: {error}")
                    reader.reset()
                    continue
                self._writing(path, lambda: write_shard(path, manifest.digest, pieces, tensors))  # noqa: B023

    def _shard(
        self, reader: PieceReader, planned: list[Piece], bar: "tqdm[Any]"
    ) -> tuple[list[StoredPiece], dict[str, Tensor]]:
        pieces: list[StoredPiece] = []
        rows: dict[str, list[Tensor]] = {}
        waiting: list[_Waiting] = []

        def flush() -> None:
            for name, tensors in self._rows(waiting).items():
                rows.setdefault(name, []).extend(tensors)
            bar.update(len(waiting))
            waiting.clear()

        for place, piece in enumerate(planned):
            stored, packed = reader.start(piece), []
            for window in reader.windows(piece):
                full = len(waiting) == self.options.batch_size
                if waiting and (full or waiting[0].window.frames.shape != window.frames.shape):
                    flush()
                waiting.append(_Waiting(place, stored.video, window))
                stored.num_frames.append(window.num_frames)
                packed += window.times
            if stored.num_frames:
                height, width = waiting[-1].window.frames.shape[1:3]
                start = piece.first_window * self.session.num_frames
                stored = replace(stored, height=height, width=width, times=pack_times(packed, reader.fps, start))
            pieces.append(replace(stored, damage=reader.damage))
        flush()
        return pieces, {name: torch.stack(tensors) for name, tensors in rows.items()}

    def _rows(self, batch: list[_Waiting]) -> dict[str, list[Tensor]]:
        """What is stored of each window, by the name of its tensor."""
        if not batch:
            return {}
        try:
            encoding = self.session.encode([each.window.frames for each in batch])
        except torch.OutOfMemoryError as error:
            shape = (len(batch), *batch[0].window.frames.shape)
            raise UserError(
                f"Expected windows of {shape} to fit the device's memory, they do not; lower --batch_size or --size."
            ) from error
        rows: dict[str, list[Tensor]] = {}
        for latent, posterior in encoding.items():
            for part, value in self._parts(posterior).items():
                for each, row in zip(batch, value.cpu(), strict=True):
                    if row.is_floating_point() and not torch.isfinite(row).all():
                        raise UserError(
                            f"{each.video}: expected {latent} of finite numbers in {self.options.dtype}, got others in "
                            f"the window from frame {each.window.start_frame} on; take --dtype float32 and --precision "
                            "32-true, or other weights."
                        )
                    rows.setdefault(tensor_name(each.place, latent, part or None), []).append(row)
        return rows

    def _parts(self, posterior: Posterior) -> dict[str, Tensor]:
        dtype = DTYPES[self.options.dtype]
        if isinstance(posterior, Quantized):
            return {"": posterior.codes.cpu().to(code_dtype(posterior.codebook_size))}
        if isinstance(posterior, DiagonalGaussian) and self.options.posterior == "moments":
            return {"": posterior.mean.to(dtype), LOGVAR: posterior.logvar.to(dtype)}
        return {"": posterior.mode().to(dtype)}

    def _writing(self, path: Path, write: Any) -> None:
        try:
            write()
        except OSError as error:
            raise UserError(
                f"Expected to write {path}, got {(error.strerror or str(error))!r}; the shards that are whole stay, "
                "and the same command goes on."
            ) from error

    # The end.

    def _finish(self, manifest: Manifest, made: list[int], seconds: float) -> int:
        session, folder = self.session, self.folder
        missing = [number for number in range(len(manifest.shards)) if not shard_path(folder, number).exists()]
        if missing:
            whole = len(manifest.shards) - len(missing)
            session.tell(f"{whole} of {len(manifest.shards)} shards are whole in {folder}; the same command goes on")
            return 1 if whole else 2
        if not manifest.complete:
            done = finish(manifest, folder)
            self._writing(folder / MANIFEST, lambda: done.write(folder))
            manifest = done
        damaged = {video.name: video.damage for video in manifest.videos if video.damage and video.num_frames}
        empty = {video.name: video.damage or "it gives no frame" for video in manifest.videos if not video.num_frames}
        for name, reason in damaged.items():
            session.tell(f"{name}: {reason}; what came before is encoded")
        for name, reason in empty.items():
            session.tell(f"{name}: {reason}; skipped")
        totals = manifest.totals
        if not totals["clips"]:
            raise UserError(f"Expected a video that can be decoded, got none of {len(self.inputs)}.")
        new = sum(piece.stored or 0 for number in made for piece in manifest.shards[number])
        rate = f"compression rate {totals['compression_rate']:.4%}"
        if totals["bits_per_pixel"] is not None:
            rate = f"{totals['bits_per_pixel']:.4g} bits per pixel"
        speed = f", {new / seconds:.1f} clips/s" if new else ", all there before"
        session.say(
            f"{totals['clips']:,} clips of {totals['videos']:,} videos, {rate}, {totals['bytes']:,} bytes{speed} "
            f"-> {folder}"
        )
        return 1 if damaged or empty or manifest.skipped else 0


def _kind(posterior: Posterior) -> Latent:
    if isinstance(posterior, Quantized):
        return Latent("codes", codebook_size=posterior.codebook_size)
    return Latent("gaussian" if isinstance(posterior, DiagonalGaussian) else "deterministic")
