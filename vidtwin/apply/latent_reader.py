"""Decode a folder of latents (vidtwin/storage/latent_files.py) into videos."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from itertools import chain, islice
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from vidtwin import console, weights
from vidtwin.apply.inputs import Input, check_targets, log_existing
from vidtwin.apply.options import DecodeOptions, SessionOptions, exit_code
from vidtwin.apply.session import Download, Session
from vidtwin.console import Progress
from vidtwin.errors import UserError
from vidtwin.files import inside, no_room
from vidtwin.storage import checkpoints
from vidtwin.storage.latent_files import (
    MANIFEST,
    Manifest,
    Shard,
    VideoEntry,
    open_shard,
    shard_path,
    unpack_times,
)
from vidtwin.video import Frames, VideoWriter


@dataclass
class _Output:
    """A video to write.

    Attributes:
        video: The video.
        places: Shard and place in it of each of its pieces.
        problem: Why it ends early, from the end of its reading.
    """

    video: VideoEntry
    places: list[tuple[int, int]]
    problem: str | None = None


class _Stored(NamedTuple):
    """Windows of a video as they are stored.

    Attributes:
        values: Latents or codes by name.
        counts: Frames of each window.
        times: Times of the frames.
        size: Height and width of the pictures.
    """

    values: dict[str, Tensor]
    counts: list[int]
    times: list[Fraction]
    size: tuple[int, int]


_Decoded = tuple[_Stored, Download]


class LatentReader:
    """Decode latents; see `DecodeOptions`.

    Args:
        folder: Folder of the latents.
        options: Options of the decoding.
        session_options: Weights and devices; without a checkpoint, the manifest's weights.
    """

    def __init__(self, folder: str, options: DecodeOptions, session_options: SessionOptions) -> None:
        self.folder = Path(folder)
        self.options = options
        self.manifest = Manifest.read(folder)
        self.videos = [video for video in self.manifest.videos if video.num_frames != 0]
        self._found = len(self.videos)
        if options.skip_existing:
            self.videos = [video for video in self.videos if not self._target(video).exists()]
        self._wanted = {video.name for video in self.videos}
        sources = [Input(Path(video.source), video.name) for video in self.videos]
        check_targets([self._target(video) for video in self.videos], sources, options.overwrite, may_skip=True)
        self.session = Session(self._choose_weights(session_options))
        self._check_model()
        self._shard: Shard | None = None  # the last opened one

    def run(self) -> int:
        """Write every video → exit code: 1 if a part is missing, 2 if all are."""
        session, manifest = self.session, self.manifest
        if not manifest.complete and session.is_main:
            console.log(
                f"{self.folder} is not complete; decoding the shards that exist (`vidtwin encode` makes the others)"
            )
        places, shares = manifest.places(), self._assign()
        outputs = [
            _Output(video, places[number])
            for number, video in enumerate(manifest.videos)
            if shares[number] == session.rank and video.name in self._wanted
        ]
        total = sum(manifest.shards[number][place].windows for output in outputs for number, place in output.places)
        done = failed = frames = 0

        def write(output: _Output, results: Iterator[_Decoded]) -> bool:
            nonlocal done, failed, frames
            written, problem, disk_full = self._write(output, results, bar)
            done, frames = done + bool(written), frames + written
            failed += problem is not None
            if problem is not None:
                console.log(f"{output.video.name}: {problem}")
            if disk_full:
                console.log("finished videos are kept; free space and continue with --skip_existing")
            return not disk_full

        with Progress(total, "decoding", "clips", session.is_main and self.options.progress) as bar:
            session.run(outputs, self._read, self._decode, write)
        if session.is_main:
            log_existing(self._found - len(self.videos), self._found, self.options.out)
        done, failed, frames = map(sum, zip(*session.gather((done, failed, frames)), strict=True))
        if done:
            session.say(f"{done:,} videos, {frames:,} frames -> {self.options.out}")
        return exit_code(done, failed + (not manifest.complete))

    def _choose_weights(self, options: SessionOptions) -> SessionOptions:
        if options.ckpt_path:
            return options
        model = self.manifest.model
        path = str(model.get("checkpoint"))
        if not path.startswith("hf://") and not Path(path).exists():
            raise UserError(f"Expected the weights that {self.folder} names at {path}, got none; give --ckpt_path.")
        options = replace(options, ckpt_path=path, use_ema=bool(model.get("use_ema")))
        if options.config or not model.get("config"):
            return options
        # The user has not asked for that config: its classes have to be trusted.
        read_model = options.read_model and partial(options.read_model, source=self.folder / MANIFEST)
        return replace(options, config=model["config"], read_model=read_model)

    def _check_model(self) -> None:
        model, stored = self.session.model, self.manifest.model
        ours, theirs = self.session.weights_sha256, stored["weights_sha256"]
        same = (model.class_path, ours) == (stored["class_path"], theirs)
        if not same and not self._is_taught(theirs) and not self._encodes_alike():
            averaged = " with --use_ema true" if stored.get("use_ema") else ""
            raise UserError(
                f"Expected the latents of {type(model).__name__} {ours[:8]}, {self.folder} holds those of "
                f"{stored['class_path'].rpartition('.')[2]} {theirs[:8]}; give the weights that encoded, "
                f"{stored.get('checkpoint')}{averaged}."
            )
        if self.session.num_frames != self.manifest.settings["num_frames"]:
            raise UserError(
                f"Expected latents of {self.session.num_frames} frames a window, {self.folder} holds those of "
                f"{self.manifest.settings['num_frames']}; give the --config that encoded."
            )

    def _is_taught(self, teacher: str) -> bool:
        """Return whether the decoder was trained for the latents of a teacher, given by its `weights_sha256`."""
        path = self.session.checkpoint
        held = checkpoints.read(path, lazily=True).get("teacher") or {}
        if held.get("weights_sha256") != teacher:
            return False
        self.session.say(f"{path} decodes latents of its teacher")
        return True

    @torch.inference_mode()
    def _encodes_alike(self) -> bool:
        """Return whether the weights that encoded give the same latents, as before a training of the decoder alone.

        Both encode a clip of noise, bit for bit. Weights on the Hub are not compared: nothing is downloaded for this.
        """
        model, stored = self.session.model, self.manifest.model
        path = str(stored.get("checkpoint"))
        if not Path(path).exists() or stored.get("config") or model.class_path != stored["class_path"]:
            return False
        try:
            before = checkpoints.load_autoencoder(path, bool(stored.get("use_ema")))
        except UserError:  # another file at that path: the message on the latents' weights is the one that helps
            return False
        if weights.sha256(before.state_dict()) != stored["weights_sha256"]:
            return False
        if (before.resolution, before.temporal) != (model.resolution, model.temporal):
            return False
        side = model.resolution or 8 * model.spatial_multiple
        clip = torch.rand(1, 3, self.session.num_frames, side, side, generator=torch.Generator().manual_seed(0))
        clip = (2 * clip - 1).to(self.session.fabric.device, self.session.dtype)
        # Kernels for weights that are trained may round otherwise, and so do compiled ones.
        before.to(clip.device, self.session.dtype).requires_grad_(False)
        with torch.compiler.set_stance("force_eager"):
            ours, theirs = model.encode(clip).mode(), before.encode(clip).mode()
        if not all(name in ours and torch.equal(z, ours[name]) for name, z in theirs.items()):
            return False
        self.session.say(f"{self.session.checkpoint} decodes latents of {path}, which encodes alike")
        return True

    def _assign(self) -> list[int]:
        """Assign a process to each video: neighbours together, since they share shards."""
        windows = [0] * len(self.manifest.videos)
        for pieces in self.manifest.shards:
            for piece in pieces:
                windows[piece.video] += piece.windows
        shares, before = [], 0
        for count in windows:
            shares.append(before * self.session.world_size // sum(windows))
            before += count
        return shares

    def _target(self, video: VideoEntry) -> Path:
        path = inside(self.options.out, video.name)
        return path.with_name(f"{path.name}.mp4")

    def _read(self, output: _Output) -> Iterator[_Stored]:
        """Yield the windows of a video in batches; end at a damaged shard."""
        start = 0
        for number, place in output.places:
            try:
                shard = self._open(number)
            except UserError as error:
                output.problem = str(error).rstrip(".")
                return
            piece = shard.pieces[place]
            times = unpack_times(piece.times, Fraction(output.video.fps), start, sum(piece.num_frames))
            start += len(times)
            rest = iter(times)
            for first in range(0, len(piece.num_frames), self.options.batch_size):
                counts = piece.num_frames[first : first + self.options.batch_size]
                values = {}
                for name, latent in self.manifest.latents.items():
                    rows = shard.rows(place, name, first, first + len(counts))
                    values[name] = self.session.pin(rows.long() if latent.kind == "codes" else rows.float())
                size = piece.height or 0, piece.width or 0
                yield _Stored(values, counts, list(islice(rest, sum(counts))), size)

    @torch.inference_mode()
    def _decode(self, stored: _Stored) -> _Decoded:
        session = self.session
        latents = {name: value.to(session.fabric.device, non_blocking=True) for name, value in stored.values.items()}
        codes = {name: value for name, value in latents.items() if self.manifest.latents[name].kind == "codes"}
        if codes:
            latents |= session.model.dequantize(codes)
        return stored, session.decode(latents, *stored.size)

    def _write(self, output: _Output, results: Iterator[_Decoded], bar: Progress) -> tuple[int, str | None, bool]:
        """Write a video up to the first damaged shard → number of frames, the problem, and whether the disk is full."""
        path, count = self._target(output.video), 0

        def iterate() -> Iterator[tuple[Frames, Fraction]]:
            for stored, download in results:
                times = iter(stored.times)
                for clip, real in zip(download.wait().numpy(), stored.counts, strict=True):
                    yield from zip(clip[:real], islice(times, real), strict=True)
                    bar.update()

        frames = iterate()
        first = list(islice(frames, 1))
        if not first:
            return 0, f"{output.problem or 'no frame'}; skipped", False
        try:
            with VideoWriter(path, Fraction(output.video.fps), timed=True) as writer:
                for picture, time in chain(first, frames):
                    writer.write(picture, time)
                    count += 1
        except UserError as error:  # of the writer
            return 0, str(error), no_room(error) is not None
        except OSError as error:
            return 0, f"expected to write {path}, got {error.strerror or error}", no_room(error) is not None
        problem = output.problem
        return count, f"{problem}; the {count} frames before are decoded" if problem else None, False

    def _open(self, number: int) -> Shard:
        path = shard_path(self.folder, number)
        if self._shard is None or self._shard.path != path:
            self._shard = None
            self._shard = open_shard(self.folder, self.manifest, number).check()
        return self._shard
