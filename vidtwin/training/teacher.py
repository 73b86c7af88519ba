"""Distillation: a trained autoencoder, the teacher, whose latents another one, the student, learns.

    clip ── teacher, or latents on disk ──> latents ──┬── student's latents of the clip: latent_match
                                                      └── student's decoder ──> clip: teacher_decode

Decoded from its teacher's latents a student is a decoder of that latent space, matched to them an encoder of it.
"""

import json
import os
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from vidtwin import weights
from vidtwin.autoencoder import Reconstruction, VideoAutoencoder
from vidtwin.data import ClipSettings, is_varying
from vidtwin.errors import UserError
from vidtwin.losses.autoencoder import AutoencoderLoss
from vidtwin.posteriors import Encoding, Latents
from vidtwin.storage import checkpoints
from vidtwin.storage.latent_files import Manifest, OpenShards


class Teacher(nn.Module):
    """Take latents from a trained autoencoder, or from disk, and compare a student to them.

    The teacher's weights are frozen, in evaluation mode and no submodule: optimizers, DDP, averages and checkpoints do
    not see them. A checkpoint holds `teacher`, its path and the SHA-256 of its weights, and the running statistics of
    its latents.

    Args:
        path: Teacher's weights: a checkpoint, a folder of `save_pretrained`, or hf://owner/name.
        latents: Folder that `vidtwin encode` has written with the teacher, instead of `path`: the teacher does not run.
            The clips have to be its windows, in training by `data.fps: null` and `data.augment: windows`.
        use_ema: Take the averaged weights of `path`.
        latent_weight: Weight of `latent_match` against the mean pixel error; 0 leaves it out.
        decode_weight: Weight of `teacher_decode`: the loss of pixels and the perceptual one between the clip and the
            student's decoding of the teacher's latents; 0 leaves it out.
        only_decoder: Train a decoder alone: the teacher's latents stand for those of the student's encoder, which does
            not run, in the whole loss (a GAN included) and in validation. The two weights have no effect then.

    Attributes:
        identity: `{"path": str, "weights_sha256": str}` of the teacher, known after `setup`.

    Raises:
        UserError: Neither or both of `path` and `latents` are given, or weights are invalid.
    """

    def __init__(
        self,
        path: str | None = None,
        latents: str | None = None,
        use_ema: bool = False,
        latent_weight: float = 1.0,
        decode_weight: float = 1.0,
        only_decoder: bool = False,
    ) -> None:
        super().__init__()
        if (path is None) == (latents is None):
            got = "neither" if path is None else "both"
            raise UserError(f"Expected either --model.teacher.path or --model.teacher.latents, got {got}.")
        if latents is not None and use_ema:
            raise UserError("Expected no --model.teacher.use_ema for latents on disk, got true; leave it out.")
        for name, weight in (("latent_weight", latent_weight), ("decode_weight", decode_weight)):
            if not 0 <= weight < float("inf"):
                raise UserError(f"Expected --model.teacher.{name} of at least 0, got {weight}.")
        if not (latent_weight or decode_weight or only_decoder):
            raise UserError(
                "Expected --model.teacher.latent_weight or decode_weight above 0, or only_decoder, got a teacher that "
                "teaches nothing."
            )
        self.path, self.folder, self.use_ema = path, latents, use_ema
        self.latent_weight, self.decode_weight, self.only_decoder = latent_weight, decode_weight, only_decoder
        self.identity: dict[str, str] = {}
        self._source: _Weights | _Folder | None = None  # neither is a submodule
        self._checked: set[tuple[int, ...]] = set()

    def setup(self, student: VideoAutoencoder, settings: ClipSettings | None) -> None:
        """Load the teacher, once, and check that student and clips fit it.

        Args:
            student: The autoencoder in training.
            settings: Choice of the clips, if it is known.

        Raises:
            UserError: The teacher can't be read, has other latents than the student, or is on disk with other clips.
        """
        if self._source is None:
            self._source = _Weights(self.path, self.use_ema) if self.path is not None else _Folder(str(self.folder))
            self.identity = self._source.identity
            # Number of values, their sum and the sum of their squares, per channel.
            for name, moments in self._source.moments().items():
                self.register_buffer(f"moments_{name}", moments)
        if settings is not None:
            self._source.check_clips(settings)
            if settings.num_frames is not None and settings.size is not None:
                self.check(student, (3, settings.num_frames, *settings.size))

    def check(self, student: VideoAutoencoder, clip_shape: Sequence[int]) -> None:
        """Raise `UserError` unless teacher and student have the same latents of a clip (3, T, H, W)."""
        shape = tuple(clip_shape)
        if shape in self._checked:
            return
        ours, theirs = student.latent_shapes(shape), self._get_source().shapes(shape)
        if ours != theirs:
            named = f"{self._get_source().name} of {self.identity['path']}"
            raise UserError(
                f"Expected a student with the latents of its teacher, {_describe(theirs)} of {named} for a clip of "
                f"{shape}, got {_describe(ours)} of {type(student).__name__}; set model.autoencoder accordingly."
            )
        self._checked.add(shape)

    @torch.no_grad()
    def latents(self, batch: Mapping[str, Any], parts: int = 1) -> list[Latents]:
        """Return the teacher's latents of each part of a batch: its posteriors' modes by name, float32 (B, ...)."""
        found = self._get_source().latents(batch, parts)
        return [{name: z.float() for name, z in latents.items()} for latents in found]

    @torch.no_grad()
    def measure(self, latents: Sequence[Latents]) -> None:
        """Add the latents of a training batch, on all ranks, to the running statistics; those on disk have theirs."""
        if not self.latent_weight or self.only_decoder or isinstance(self._source, _Folder):
            return
        for name in latents[0]:
            values = torch.cat([part[name] for part in latents]).double()
            values = values.movedim(1, 0).flatten(1) if values.ndim > 1 else values[None]
            count = torch.full_like(values[:, 0], values.shape[1])
            sums = torch.stack([count, values.sum(1), values.square().sum(1)])
            if dist.is_available() and dist.is_initialized():
                dist.all_reduce(sums)
            # A step that is not finite is skipped; asked on the device, which the host does not wait for.
            self.get_buffer(f"moments_{name}").add_(torch.where(sums.isfinite().all(), sums, 0.0))

    def latent_match(self, encoding: Encoding, latents: Latents) -> Tensor:
        """Return the mean over the latents of ((student's mode − teacher's) / σ)², with σ of the teacher's channel."""
        terms = []
        for name, mode in encoding.mode().items():
            count, total, squares = self.get_buffer(f"moments_{name}")
            variance = squares / count - (total / count).square()
            variance = torch.where(is_varying(variance, squares / count), variance, 1.0).float()
            error = (mode.float() - latents[name]).square()
            terms.append((error.movedim(1, -1) / variance if error.ndim > 1 else error / variance).mean())
        return torch.stack(terms).mean()

    def reconstruct(self, student: VideoAutoencoder, latents: Latents, clip: Tensor) -> Reconstruction:
        """Decode the teacher's latents of a clip (B, 3, T, H, W) by the student."""
        return Reconstruction(student.decode(latents, clip.shape[2]), latents)

    def add_terms(
        self,
        terms: dict[str, Tensor],
        student: VideoAutoencoder,
        reconstruction: Reconstruction,
        latents: Latents,
        clip: Tensor,
        loss: AutoencoderLoss,
    ) -> dict[str, Tensor]:
        """Add the weighted terms to a loss's `total` → all terms, with `latent_match` and `teacher_decode` unweighted.

        Args:
            terms: Of `AutoencoderLoss.generator_loss`.
            student: The autoencoder in training.
            reconstruction: Its reconstruction of `clip`.
            latents: The teacher's latents of `clip`.
            clip: (B, 3, T, H, W).
            loss: The loss, whose reduction counts.
        """
        if self.only_decoder:
            return terms
        added: dict[str, Tensor] = {}
        total = terms["total"]
        if self.latent_weight:
            assert reconstruction.encoding is not None
            added["latent_match"] = self.latent_match(reconstruction.encoding, latents)
            total = total + self.latent_weight * loss.scale(clip) * added["latent_match"]
        if self.decode_weight:
            decoded = self.reconstruct(student, latents, clip)
            added["teacher_decode"] = loss.generator_loss(decoded, clip, None, step=-1)["total"]
            total = total + self.decode_weight * added["teacher_decode"]
        return terms | {"total": total} | {name: term.detach() for name, term in added.items()}

    def _get_source(self) -> "_Weights | _Folder":
        assert self._source is not None, "setup() comes first"
        return self._source


class _Weights:
    """A teacher that runs."""

    def __init__(self, path: str, use_ema: bool) -> None:
        self.model = checkpoints.load_autoencoder(path, use_ema).requires_grad_(False)
        self.name = type(self.model).__name__
        self.identity = {"path": path, "weights_sha256": weights.sha256(self.model.state_dict())}

    def shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return self.model.latent_shapes(clip_shape)

    def moments(self) -> dict[str, Tensor]:
        """Return zeros, to be measured in training."""
        side = self.model.resolution or 8 * self.model.spatial_multiple
        shapes = self.shapes((3, self.model.temporal.usual_length, side, side))
        return {name: torch.zeros(3, shape[0] if shape else 1, dtype=torch.float64) for name, shape in shapes.items()}

    def check_clips(self, settings: ClipSettings) -> None:
        """Accept all clips."""

    def latents(self, batch: Mapping[str, Any], parts: int) -> list[Latents]:
        self.model.to(batch["clip"].device)
        return [self.model.encode(clip).mode() for clip in batch["clip"].tensor_split(parts)]


class _Folder:
    """Latents on disk, found by the name and start frame of a clip."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.manifest = manifest = Manifest.read_complete(folder)
        for name, latent in manifest.latents.items():
            if latent.kind == "codes":
                raise UserError(
                    f"Expected continuous latents in {folder}, got codes of {name}, which need the teacher; set "
                    "--model.teacher.path instead."
                )
            if latent.shape is None or not manifest.statistics.get(name):
                raise UserError(
                    f"Expected {name} of one shape in {folder}, got one for each size of picture; encode with --size."
                )
        self.name = str(manifest.model["class_path"]).rpartition(".")[2]
        self.identity = {
            "path": str(manifest.model.get("checkpoint")),
            "weights_sha256": manifest.model["weights_sha256"],
        }
        self._pieces: dict[str, list[tuple[int, int, int, int]]] = {}  # first window, windows, shard, place in it
        for video, places in zip(manifest.videos, manifest.places(), strict=True):
            for number, place in places:
                piece = manifest.shards[number][place]
                entry = (piece.first_window, piece.stored or 0, number, place)
                self._pieces.setdefault(video.name, []).append(entry)
        self._shards = OpenShards(folder, manifest)

    def shapes(self, clip_shape: Sequence[int]) -> dict[str, tuple[int, ...]]:
        return {name: tuple(latent.shape or ()) for name, latent in self.manifest.latents.items()}

    def moments(self) -> dict[str, Tensor]:
        """Return the folder's statistics of each latent, as those of a single value."""
        found = {}
        for name, held in self.manifest.statistics.items():
            mean, std = (torch.tensor((held or {})[key], dtype=torch.float64) for key in ("mean", "std"))
            found[name] = torch.stack([torch.ones_like(mean), mean, std.square() + mean.square()])
        return found

    def check_clips(self, settings: ClipSettings) -> None:
        """Raise `UserError` unless clips with these settings can be windows of the folder."""
        held = self.manifest.settings
        wanted = {
            "num_frames": (settings.num_frames, held["num_frames"]),
            "resolution": (settings.resolution, held["size"]),
            "fps": (settings.fps, None),
            "resize": (settings.resize, "area"),
            "augment": (settings.augment, "windows"),
        }
        wrong = {key: (got, want) for key, (got, want) in wanted.items() if got != want}
        if wrong:
            got = ", ".join(f"data.{key}={_write(value)}" for key, (value, _) in wrong.items())
            want = " ".join(f"--data.{key} {_write(value)}" for key, (_, value) in wrong.items())
            raise UserError(f"Expected clips that are windows of {self.folder}, got {got}; set {want}.")

    def latents(self, batch: Mapping[str, Any], parts: int) -> list[Latents]:
        if missing := {"name", "start_frame"} - set(batch):
            raise UserError(
                f"Expected batches with {' and '.join(sorted(missing))}, by which latents on disk are found, got "
                f"{', '.join(batch)}; set --data to one of videos."
            )
        clip = batch["clip"]
        padded = batch["padded"].tolist() if "padded" in batch else [0] * len(clip)
        rows = [self._read(*each) for each in zip(batch["name"], batch["start_frame"].tolist(), padded, strict=True)]
        whole = {name: torch.stack([row[name] for row in rows]).to(clip.device) for name in self.manifest.latents}
        split = {name: z.tensor_split(parts) for name, z in whole.items()}
        return [{name: z[part] for name, z in split.items()} for part in range(parts)]

    def _read(self, name: str, start: int, padded: int) -> Latents:
        """Read the latents of the clip of a video that starts at a frame."""
        pieces = self._pieces.get(name) or self._pieces.get(os.path.splitext(name)[0])
        if pieces is None:
            raise UserError(
                f"Expected latents of {name} in {self.folder}, got none of that video; encode data.root, so that names "
                "are alike."
            )
        length = self.manifest.settings["num_frames"]
        window, beyond = divmod(start, length)
        first, stored, number, place = pieces[max(0, bisect_right(pieces, window, key=lambda piece: piece[0]) - 1)]
        row = window - first
        frames = self._shards[number].pieces[place].num_frames if row < stored else []
        if beyond or row >= stored or frames[row] != length - padded:
            raise UserError(
                f"Expected latents of {length - padded} frames of {name} from frame {start} on in {self.folder}, got "
                f"none; its windows start at multiples of {length}: set --data.fps null, --data.augment windows and, "
                "to validate a decoder alone, --data.eval_clips first."
            )
        return {latent: self._shards[number].rows(place, latent, row, row + 1)[0] for latent in self.manifest.latents}


def check_resumed(teacher: Teacher | None, checkpoint: Mapping[str, Any]) -> None:
    """Raise `UserError` unless a checkpoint is of a training with this teacher, or with none if it is None."""
    ours, theirs = (teacher.identity if teacher else {}), checkpoint.get("teacher") or {}
    if ours.get("weights_sha256") != theirs.get("weights_sha256"):
        named = [f"{each['path']} ({each['weights_sha256'][:8]})" if each else "none" for each in (ours, theirs)]
        raise UserError(
            f"Expected a checkpoint of a training with model.teacher {named[0]}, got one with {named[1]}; --init_from "
            "starts a new training from its weights."
        )


def _describe(shapes: Mapping[str, tuple[int, ...]]) -> str:
    return ", ".join(f"{name} {shape}" for name, shape in shapes.items())


def _write(value: object) -> str:
    """Return a value as the command line takes it."""
    return json.dumps(value).strip('"')
