"""Measure models chunk by chunk, keep the parts of their rows, and join them.

Run by `vidtwin.benchmark.sweep`, in each of its processes.
"""

import base64
import hashlib
import json
import shutil
import sys
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from lightning.fabric import Fabric
from torch import Tensor
from tqdm import tqdm

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark import cost, downstream, players, rows
from vidtwin.benchmark.measure import Subject, claim, describe, seeded
from vidtwin.distributed import forward_context
from vidtwin.errors import UserError
from vidtwin.files import replacing, write_text
from vidtwin.metrics.fvd import MIN_FRAMES, NUM_FEATURES, FeatureNetwork, frechet_video_distance
from vidtwin.metrics.latents import LatentStatistics
from vidtwin.metrics.measures import Measures
from vidtwin.posteriors import Encoding, Quantized
from vidtwin.video import convert, panels, write_video

if TYPE_CHECKING:
    from vidtwin.benchmark.sweep import Sweep

PARTS, EARLIER, COSTS = "parts", "earlier", "costs.json"
PICTURES = "clip[0-9]*.*"
MAX_TOKENS, MAX_TOKENS_ON_CPU = 20_000, 4_000  # of which a DiT's training step is timed
HEAD = 16  # clips: a model that fails on all of the first ones fails, one that fails on others lacks those


@dataclass
class Plan:
    """Clips of a sweep in chunks, and the protocol that they are measured by."""

    chunks: list[list[int]]
    keys: list[rows.Key]  # by index
    shape: tuple[int, int, int, int]
    protocol: dict[str, Any]
    digest: str

    def clips(self, chunk: int) -> list[list[Any]]:
        return [list(self.keys[index]) for index in self.chunks[chunk]]


@dataclass
class Job:
    """One row to be measured: `identity` is known before the model is built, and what it is built from."""

    name: str
    identity: dict[str, Any]
    build: Callable[[], Subject]
    error: str | None = None
    claimed_rate: float | None = None
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        text = json.dumps(self.identity, sort_keys=True, default=str)
        self.digest = hashlib.sha256(text.encode()).hexdigest()[:16]


class DeviceError(Exception):
    """The process can't use its device any more, as after an assertion in a kernel."""


class ModelError(Exception):
    """A model that can't be measured, in a line."""


class Runner:
    """Measures jobs chunk by chunk. Each process takes every world-size-th chunk; the first one joins them."""

    def __init__(self, sweep: "Sweep", fabric: Fabric, plan: Plan) -> None:
        self.sweep, self.fabric, self.plan = sweep, fabric, plan
        described = plan.protocol
        self.measures = Measures(
            described["compared"],
            described["psnr"],
            described["psnr_epsilon"],
            described["ssim"],
            described["lpips"]["net"],
            self.fps,
            sweep.backbones,
            sweep.vmaf,
        )
        self.failed: list[str] = []
        self.measures.setup(*plan.shape[1:])
        home = str(Path.home())  # a report is passed on
        for name, reason in self.measures.unavailable.items():  # what was asked for has to be there
            given = [path for path in sweep.backbones.values() if path and str(path) in reason]
            if given or name == "vmaf":
                raise UserError(reason)
        self.unavailable = {name: text.replace(home, "~") for name, text in self.measures.unavailable.items()}
        self.features: FeatureNetwork | None = None
        if sweep.fvd.path and sweep.fvd.sha256 and plan.shape[1] < MIN_FRAMES:
            self.unavailable["rfvd"] = f"Expected clips of at least {MIN_FRAMES} frames for rFVD, got {plan.shape[1]}."
        elif sweep.fvd.path and sweep.fvd.sha256:
            self.features = FeatureNetwork(sweep.fvd.path, sweep.fvd.sha256, described["fvd"]["convention"])
        else:
            self.unavailable["rfvd"] = "Expected an I3D network for rFVD, got none; give --fvd.path and --fvd.sha256."
        size = len(plan.chunks[0])
        self.head = range(-(-HEAD // size))
        # What a row is measured by beside the protocol: with more of it the row is measured again.
        self.extent = {
            "metrics": [*self.measures.names, *(["rfvd"] if self.features else [])],
            "protocol": plan.digest,
            "batch": size,
            "device": fabric.device.type,
            **({"seed": sweep.seed} if described["posterior"] == "sample" else {}),
        }

    @property
    def fps(self) -> float:
        return self.sweep.data.eval_fps or 25.0

    def identity(self, job: Job) -> str:
        return hashlib.sha256(json.dumps([job.digest, self.extent], sort_keys=True).encode()).hexdigest()[:16]

    def is_complete(self, job: Job) -> bool:
        """Return whether an up-to-date result row exists; log the reason if not."""
        folder = self.sweep.folder / "rows" / job.name
        if self.fabric.is_global_zero and not job.error:
            self._restore(job)
        self.fabric.barrier()
        if not (folder / "results.json").exists():
            return False
        try:
            row = self._whole_row(folder)
        except UserError as error:
            self._tell(f"{job.name} is measured again: {error}")
            return False
        if row["kind"] == "failed":
            self._tell(f"{job.name} failed before and is tried again")
            return False
        if row.get("identity") != self.identity(job):
            if not job.error:
                self._tell(
                    f"{job.name} is measured again: the row there is of another checkpoint, model or set of metrics"
                )
            return False
        if row["failed_clips"]:
            self._tell(f"{job.name} failed on {len(row['failed_clips'])} clips, which are tried again")
            return False
        return True

    def has_failed(self, job: Job) -> bool:
        """Return whether the job failed before; such models are measured last, since some end the process."""
        try:
            return bool(rows.read_row(self.sweep.folder / "rows" / job.name / "results.json")["kind"] == "failed")
        except UserError:
            return False

    def _whole_row(self, folder: Path) -> rows.Row:
        """A row whose files are all there; `UserError` says which is not."""
        row = rows.read_row(folder / "results.json")
        if row["kind"] == "failed":
            return row
        clips = rows.read_clips(folder, row)
        if isinstance(row["metrics"].get("rfvd"), dict):
            try:
                shape = np.load(folder / "features.npy", mmap_mode="r").shape
            except (OSError, ValueError) as error:
                raise UserError(f"Expected the features of its clips, got none that can be read ({error}).") from error
            if shape != (len(clips), NUM_FEATURES):
                raise UserError(f"Expected features of {len(clips)} clips, got {shape}.")
        return row

    def _restore(self, job: Job) -> None:
        """Take a row back that was put aside, if it is the one that is wanted now."""
        folder = self.sweep.folder / "rows" / job.name
        earlier = folder / EARLIER / self.identity(job)
        try:
            self._whole_row(earlier)
        except UserError:
            return
        try:
            if rows.read_row(folder / "results.json").get("identity") == self.identity(job):
                return
        except UserError:
            pass
        self._keep_earlier(job)
        _move_row(earlier, folder)
        self._tell(f"{job.name}: the row that was put aside is taken back")

    def remove_left_parts(self, complete: list[Job]) -> None:
        """Parts of rows that are complete: the sweep was killed before it took them away."""
        for job in complete:
            shutil.rmtree(self._parts(job), ignore_errors=True)

    def measure_all(self, jobs: list[Job], total: int) -> None:
        """Every row that is missing. A model that fails is a row with its error; the others go on."""
        mine = self._mine(range(len(self.plan.chunks)))
        if total > len(jobs):
            self._tell(f"{total - len(jobs)} of {total} rows are complete")
        clips = sum(len(self.plan.chunks[chunk]) for chunk in mine)
        if self.fabric.is_global_zero:
            for path in (path for job in jobs for path in self._parts(job).glob("error-*.json")):
                path.unlink()  # of a sweep that was killed
        self.fabric.barrier()
        bar = tqdm(
            total=clips * len(jobs),
            unit="clip",
            disable=not (self.sweep.progress and self.fabric.is_global_zero and jobs),
            dynamic_ncols=True,
        )
        with bar:
            for job in jobs:
                bar.set_description(job.name)
                before = bar.n
                error = self._measured(job, mine, bar)
                self.fabric.barrier()
                if self.fabric.is_global_zero:
                    self._finish(job, error)
                self.fabric.barrier()
                bar.update(before + clips - bar.n)

    def _measured(self, job: Job, mine: list[int], bar: tqdm) -> str | None:
        """Measure this process's chunks of a model → why it can't be, if it can't."""
        parts = self._parts(job)
        error, subject = job.error, None
        missing = [] if error else [chunk for chunk in mine if self._part(parts, job, chunk) is None]
        costs = not error and self.fabric.is_global_zero and self._costs_missing(job)
        if not error:
            self._tell_what_is_there(job, mine, missing, bar)
        if missing or costs:
            try:
                subject = self._built(job)
            except ModelError as caught:
                error = str(caught)
                write_text(parts / f"error-{self.fabric.global_rank}.json", json.dumps({"error": error}) + "\n")
        failed = []
        if subject:
            failed = self._measure_chunks(job, subject, [chunk for chunk in missing if chunk in self.head], bar)
        self.fabric.barrier()  # the first clips' parts are there, and all processes decide alike
        own = error is not None and job.error is None
        error = error or self._hopeless(job)
        if error:
            if not job.error:  # which was told at the start
                self._tell(f"{job.name} failed: {error}", everywhere=own)
        elif subject:
            for line in subject.differs:
                self._tell(f"{job.name}: the checkpoint differs from the config, which wins: {line}")
            self._tell_failed(job, failed)
            self._measure_chunks(job, subject, [chunk for chunk in missing if chunk not in self.head], bar, tell=True)
        self.fabric.barrier()  # what a model costs is measured while the others wait
        if costs and subject and not error:
            self._measure_costs(job, subject)
        subject = None
        if self.fabric.device.type == "cuda":
            torch.cuda.empty_cache()
        return error

    def _tell_what_is_there(self, job: Job, mine: list[int], missing: list[int], bar: tqdm) -> None:
        ready = sum(len(self.plan.chunks[chunk]) for chunk in mine if chunk not in missing)
        stale = len(list(self._parts(job).glob("[0-9]*.json"))) - len(mine) + len(missing)
        if self.fabric.world_size == 1 and stale > 0:
            self._tell(f"{job.name}: {stale} chunks there are of another checkpoint, model or batch size")
        if ready:
            self._tell(f"{job.name}: {ready} clips were measured before")
            if not bar.disable:  # a bar that is not shown has no such attribute
                bar.initial += ready  # the rate, and with it the ETA, is of what is measured now
            bar.update(ready)

    def _hopeless(self, job: Job) -> str | None:
        """Why a model failed on every one of the first clips: it is the model then, not the clips.

        Decided by the parts of all processes, so that their number changes nothing.
        """
        head = [self._part(self._parts(job), job, chunk) for chunk in self.head if chunk < len(self.plan.chunks)]
        if None in head or any(part["clips"] for part in head if part):
            return None
        return next((clip["reason"] for part in head if part for clip in part["failed"]), None)

    def _built(self, job: Job) -> Subject:
        try:
            subject = job.build()
            subject.check(self.plan.shape[1], self.plan.shape[2])
            subject.model.eval().requires_grad_(False).to(self.fabric.device)
        except UserError as error:
            raise ModelError(one_line(error)) from error
        except Exception as error:
            raise ModelError(f"{type(error).__name__}: {one_line(error)}") from error
        return subject

    def _parts(self, job: Job) -> Path:
        return self.sweep.folder / "rows" / job.name / PARTS

    def _part(self, folder: Path, job: Job, chunk: int) -> dict[str, Any] | None:
        """A part that was written before; None where there is none for these clips of this model."""
        return self._kept(folder / f"{chunk:06d}.json", self.identity(job), self.plan.clips(chunk))

    def _kept(self, path: Path, identity: str, clips: list[list[Any]] | None) -> dict[str, Any] | None:
        try:
            part = json.loads(path.read_text(encoding="utf-8"))
            found = part["identity"], part["chunk"]
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError):
            self._tell(f"{path} is cut off or damaged, and is measured again", everywhere=True)
            path.unlink(missing_ok=True)
            return None
        return part if found == (identity, clips) else None

    def _measure_chunks(
        self, job: Job, subject: Subject, missing: list[int], bar: tqdm, tell: bool = False
    ) -> list[dict[str, Any]]:
        """Measure chunks and write their parts → the clips on which the model failed; with `tell` each is told."""
        if not missing:
            return []
        folder = self._parts(job)
        processes = max(1, self.fabric.world_size // max(1, self.sweep.num_nodes))
        chunks = [self.plan.chunks[chunk] for chunk in missing]
        loader = self.sweep.data.chunk_loader("test", chunks, self.fabric.device.type, processes)
        failed: list[dict[str, Any]] = []
        for chunk, batch in zip(missing, loader, strict=True):
            try:
                part = self._measure_chunk(subject, chunk, batch)
            except DeviceError as error:
                self._write_failed(job, str(error))  # and the next run takes the other models first
                raise UserError(
                    f"{job.name} has left {self.fabric.device} unusable: {error}; run the same command again, which "
                    "measures the other models first."
                ) from error
            part |= {"identity": self.identity(job), "chunk": self.plan.clips(chunk)}
            write_text(folder / f"{chunk:06d}.json", json.dumps(part) + "\n")
            failed += part["failed"]
            if tell:
                self._tell_failed(job, part["failed"])
            bar.update(len(self.plan.chunks[chunk]))
        return failed

    def _tell_failed(self, job: Job, failed: list[dict[str, Any]]) -> None:
        for clip in failed:
            line = f"{job.name} fails on {clip['name']} at frame {clip['start_frame']}: {clip['reason']}"
            self._tell(line, everywhere=True)

    def _measure_chunk(self, subject: Subject, chunk: int, batch: dict[str, Any]) -> dict[str, Any]:
        """All clips of a batch at once; if that fails, one by one, so that a bad clip costs itself alone."""
        part: dict[str, Any] = {"clips": [], "failed": [], "features": [], "latents": None, "codes": {}}
        part["skipped"] = [[name, reason] for _, name, reason in batch["skipped"]]
        if not batch["indices"]:
            return part
        clip = self._clip(batch)
        indices = batch["indices"]
        try:
            self._reconstruct(subject, clip, indices, part)
        except Exception as error:
            self._free(error)
            part |= {"clips": [], "failed": [], "features": [], "latents": None, "codes": {}}
            for place, index in enumerate(indices):
                try:
                    self._reconstruct(subject, clip[place : place + 1], [index], part)
                except Exception as alone:
                    self._free(alone)
                    self._fail(part, index, f"{type(alone).__name__}: {one_line(alone)}")
        return part

    def _free(self, error: Exception) -> None:
        error.__traceback__ = None  # which holds the tensors
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            raise DeviceError(one_line(error)) from error
        if self.fabric.device.type == "cuda":
            torch.cuda.empty_cache()

    @torch.inference_mode()
    def _reconstruct(self, subject: Subject, clip: Tensor, indices: list[int], part: dict[str, Any]) -> None:
        encoding, prediction = self._forward(subject, clip, self._seed(indices))
        broken = [not bool(each.isfinite().all()) for each in prediction]
        prediction = prediction.nan_to_num()  # a file has no NaN: the clip fails, but its neighbours are measured
        prediction, target = self.measures.prepare(prediction.float(), clip)
        values = {name: value.tolist() for name, value in self.measures.values(prediction, target).items()}
        features = self._features(prediction, target, indices)
        latents = subject.latents(encoding.mode(), tuple(clip.shape[1:]))
        if part["latents"] not in (None, latents):
            raise RuntimeError(f"latents of other sizes from clip to clip: {part['latents']}, {latents}")
        part["latents"] = latents
        windows = subject.windows(clip.shape[2])
        for place, index in enumerate(indices):
            name, start = self.plan.keys[index]
            numbers = {metric: value[place] for metric, value in values.items()}
            bad = [metric for metric, value in numbers.items() if not np.isfinite(value)]
            if broken[place] or bad:
                what = (
                    f"{', '.join(bad)} of its reconstruction" if not broken[place] else "pixels of its reconstruction"
                )
                self._fail(part, index, f"{what} are not finite")
                continue
            part["clips"].append({"name": name, "start_frame": start, "num_frames": clip.shape[2], **numbers})
            if features is not None:
                part["features"].append(features[place])
            _count_codes(part["codes"], encoding, slice(place * windows, (place + 1) * windows))

    def _forward(self, subject: Subject, clip: Tensor, seed: int) -> tuple[Encoding, Tensor]:
        sampled = self.plan.protocol["posterior"] == "sample"

        def run() -> tuple[Encoding, Tensor]:
            with self._context():
                encoding = subject.encode(clip)
                latents = encoding.sample() if sampled else encoding.mode()
                return encoding, subject.decode(latents, clip.shape[2])

        return seeded(seed, self.fabric.device, run)

    def _context(self) -> AbstractContextManager[Any]:
        # 32-true means it: without TensorFloat-32, which PyTorch's convolutions have on CUDA by default.
        return forward_context(self.fabric, self.sweep.precision)

    def _fail(self, part: dict[str, Any], index: int, reason: str) -> None:
        name, start = self.plan.keys[index]
        part["failed"].append({"name": name, "start_frame": start, "reason": reason})

    def _features(self, prediction: Tensor, target: Tensor, indices: list[int]) -> list[str] | None:
        """The reconstructions' features; the clips' own are measured once for all models."""
        if self.features is None:
            return None
        paths = [self._real(index) for index in indices]
        for place, path in enumerate(paths):
            if not path.exists():  # one by one: what is found does not depend on which others are missing
                found = self.features(target[place : place + 1])[0]
                with replacing(path) as temporary, temporary.open("wb") as file:
                    np.save(file, found.cpu().numpy())
        return [_text(found) for found in self.features(prediction)]

    def _real_features(self, index: int) -> Tensor:
        """Return the features of an input clip (1, 400), computed again if their file is missing or damaged."""
        try:
            return torch.from_numpy(np.load(self._real(index)))[None]
        except (OSError, ValueError):
            assert self.features is not None
            self._real(index).unlink(missing_ok=True)
            (batch,) = self.sweep.data.chunk_loader("test", [[index]], self.fabric.device.type)
            target = self.measures.prepare(self._clip(batch), self._clip(batch))[1]
            self._features(target, target, [index])
            return torch.from_numpy(np.load(self._real(index)))[None]

    def _clip(self, batch: dict[str, Any]) -> Tensor:
        """(B, 3, T, H, W) in [-1, 1] on the device, from what the loader gives."""
        moved = {**batch, "clip": batch["clip"].to(self.fabric.device)}
        clip: Tensor = self.sweep.data.on_after_batch_transfer(moved, 0)["clip"]
        return clip

    def _real(self, index: int) -> Path:
        """Return the path of the features of an input clip."""
        name, start = self.plan.keys[index]
        mark = hashlib.sha256(f"{name}\t{start}".encode()).hexdigest()[:32]
        return self.sweep.folder / "inputs" / mark[:2] / f"{mark}.npy"

    def _costs_identity(self, job: Job) -> str:
        sweep = self.sweep
        extent = [sweep.repeats, sweep.cost, sweep.downstream, cost.device_name(self.fabric.device)]
        return hashlib.sha256(json.dumps([self.identity(job), extent]).encode()).hexdigest()[:16]

    def _costs(self, job: Job) -> dict[str, Any] | None:
        return self._kept(self.sweep.folder / "rows" / job.name / COSTS, self._costs_identity(job), None)

    def _costs_missing(self, job: Job) -> bool:
        if not (self.sweep.cost or self.sweep.downstream):
            return False
        costs = self._costs(job)
        # Out of memory may have been a neighbour's doing.
        return costs is None or bool(costs["cost"] and "error" in costs["cost"])

    def refresh(self, jobs: list[Job]) -> None:
        """Update claimed rates and costs in complete rows to the present settings."""
        for job in jobs:
            path = self.sweep.folder / "rows" / job.name / "results.json"
            row = rows.read_row(path)
            if row["kind"] == "failed" or row.get("identity") != self.identity(job):
                continue
            if self._costs_missing(job):
                self._tell(f"{job.name}: its costs are measured")
                try:
                    self._measure_costs(job, self._built(job))
                except ModelError as error:
                    self._tell(f"{job.name}: no costs: {error}")
            costs = self._costs(job) or {}
            new = row | ({"unavailable": self.unavailable} if set(row["unavailable"]) == set(self.unavailable) else {})
            new |= {"claimed": claim(row["compression_rate"], job.claimed_rate)}
            new |= {key: costs[key] for key in ("cost", "downstream") if costs.get(key)}
            if new != row:
                write_text(path, json.dumps(new, indent=2) + "\n")

    def _measure_costs(self, job: Job, subject: Subject) -> None:
        found: dict[str, Any] = {"cost": None, "downstream": None}
        shape, device, repeats = self.plan.shape, self.fabric.device, self.sweep.repeats
        if self.sweep.cost:

            def encode(model: VideoAutoencoder, clip: Tensor) -> Any:
                return _with(subject, model).encode(clip).mode()

            def decode(model: VideoAutoencoder, latents: Any, num_frames: int) -> Tensor:
                return _with(subject, model).decode(latents, num_frames)

            found["cost"] = _or_error(
                lambda: cost.measure(
                    subject.model, shape, device, self._context, repeats=repeats, encode=encode, decode=decode
                )
            )
        if self.sweep.downstream:
            inner = (shape[0], shape[1] // subject.windows(shape[1]), *shape[2:])
            windows = subject.windows(shape[1])
            sizes = {
                name: size if windows == 1 else (size[0], windows, *size[1:])
                for name, size in subject.model.latent_shapes(inner).items()
            }
            limit = MAX_TOKENS if device.type == "cuda" else MAX_TOKENS_ON_CPU
            found["downstream"] = _downstream(sizes, device, repeats, limit)
        found |= {"identity": self._costs_identity(job), "chunk": None}
        write_text(self.sweep.folder / "rows" / job.name / COSTS, json.dumps(found) + "\n")

    def _finish(self, job: Job, error: str | None) -> None:
        """Join the parts of all processes to a row, and take them away."""
        parts = self._parts(job)
        told = [json.loads(path.read_text())["error"] for path in sorted(parts.glob("error-*.json"))]
        if error or told:
            if self._hopeless(job):
                shutil.rmtree(parts)  # so that they are tried again in the next run
            self._write_failed(job, error or told[0])
            for path in parts.glob("error-*.json"):
                path.unlink()
            return
        clips: list[rows.Clip] = []
        failed: list[dict[str, Any]] = []
        skipped: dict[str, str] = dict(self.plan.protocol["skipped"])
        codes = LatentStatistics()
        latents: dict[str, Any] | None = None
        fakes: list[np.ndarray] = []
        for chunk in range(len(self.plan.chunks)):
            part = self._part(parts, job, chunk)
            if part is None:
                self._write_failed(job, f"part {chunk} of it, which was measured, is not there; run the sweep again")
                return
            clips += [{"model": job.name, **clip} for clip in part["clips"]]
            failed += part["failed"]
            skipped |= dict(part["skipped"])
            fakes += [_array(text) for text in part["features"]]
            latents = part["latents"] or latents
            _add_codes(codes, part["codes"])
        if not clips or latents is None:
            reason = failed[0]["reason"] if failed else "no clip could be read"
            self._write_failed(job, f"none of the clips could be measured; {reason}")
            shutil.rmtree(parts)  # so that they are tried again
            return
        try:
            subject = self._built_without_weights(job)
        except ModelError as caught:
            self._write_failed(job, str(caught))
            return
        costs = self._costs(job) or {}
        row = describe(subject, latents, self.plan.shape, codes, self.fabric.device)
        metrics: dict[str, Any] = rows.means(clips, self.plan.protocol)
        unavailable = dict(self.unavailable)
        if self.features:
            try:
                metrics["rfvd"] = self._frechet({rows.key_of(clip): f for clip, f in zip(clips, fakes, strict=True)})
            except UserError as caught:  # features that are no numbers
                unavailable["rfvd"] = one_line(caught)
        metrics |= dict.fromkeys(unavailable, "unavailable")
        row |= {
            "metrics": metrics,
            "unavailable": unavailable,
            "num_clips": len(clips),
            "failed_clips": failed,
            "skipped": skipped,
            "cost": costs.get("cost"),
            "downstream": costs.get("downstream"),
            "identity": self.identity(job),
            "protocol": self.plan.protocol,
            "protocol_hash": self.plan.digest,
        }
        self._keep_earlier(job)
        folder = self.sweep.folder / "rows" / job.name
        for picture in folder.glob(PICTURES):
            picture.unlink()
        if fakes:
            with replacing(folder / "features.npy") as temporary, temporary.open("wb") as file:
                np.save(file, np.stack(fakes))
        rows.write_row(self.sweep.folder, row, clips)
        if failed:  # tried again in the next run, which needs the other parts
            for chunk in _chunks_of(failed, self.plan):
                (parts / f"{chunk:06d}.json").unlink()
        else:
            shutil.rmtree(parts)

    def _built_without_weights(self, job: Job) -> Subject:
        try:
            return job.build()
        except Exception as error:
            raise ModelError(one_line(error)) from error

    def _write_failed(self, job: Job, error: str) -> None:
        self.failed.append(job.name)
        folder = self.sweep.folder / "rows" / job.name
        if job.error and (folder / "results.json").exists():
            try:
                kept = rows.read_row(folder / "results.json")["kind"] != "failed"
            except UserError:
                kept = False
            if kept:
                self._tell(f"{job.name}: the row that is there stays, of its own checkpoint")
                return
        row = {
            "schema_version": rows.SCHEMA_VERSION,
            "name": job.name,
            "kind": "failed",
            "error": error,
            "model": job.identity.get("model"),
            "protocol": self.plan.protocol,
            "protocol_hash": self.plan.digest,
        }
        self._keep_earlier(job)
        write_text(folder / "results.json", json.dumps(row, indent=2) + "\n")

    def _keep_earlier(self, job: Job) -> None:
        """Put a complete row of another checkpoint, model or set of metrics aside before another takes its place."""
        folder = self.sweep.folder / "rows" / job.name
        try:
            row = rows.read_row(folder / "results.json")
        except UserError:
            return
        if row["kind"] == "failed" or row.get("identity") == self.identity(job):
            return
        target = folder / EARLIER / str(row.get("identity") or row["fingerprint"] or "row")
        _move_row(folder, target)
        self._tell(f"{job.name}: the earlier row is kept in {target}")

    def _frechet(self, clips: dict[rows.Key, np.ndarray]) -> Any:
        """Compute rFVD over some clips from their reconstructions' features."""
        places = {key: index for index, key in enumerate(self.plan.keys)}
        order = sorted(clips)
        real = torch.cat([self._real_features(places[key]) for key in order])
        fake = torch.from_numpy(np.stack([clips[key] for key in order]))
        return frechet_video_distance(real, fake)

    def frechet_of_common_clips(self, results: rows.Results) -> dict[str, Any]:
        """rFVD of each row over the clips that all have, in the form of a comparison."""
        common = rows.common_clips(results.clips)
        identities = {row["name"]: row.get("identity") for row in results.rows}
        found: dict[str, Any] = {"clips_sha256": rows.digest_of(common), "rows": {}, "identities": identities}
        for name, clips in results.clips.items():
            path = self.sweep.folder / "rows" / name / "features.npy"
            known = next(row for row in results.rows if row["name"] == name)["metrics"].get("rfvd") != "unavailable"
            if self.features and known and path.exists() and len(common) < len(clips):
                fakes = np.load(path, mmap_mode="r")
                keys = map(rows.key_of, clips)
                chosen = {key: np.array(fake) for key, fake in zip(keys, fakes, strict=True) if key in common}
                found["rows"][name] = {"rfvd": self._frechet(chosen) if chosen else "unavailable"}
        return found

    def write_players(self, results: rows.Results, jobs: list[Job]) -> None:
        """Pictures of the worst and the median clips by every model."""
        chosen = players.choose(results, self.sweep.players)
        measured = [job for job in jobs if job.name in results.clips]
        mark = hashlib.sha256(json.dumps([[c["name"], c["start_frame"]] for c in chosen]).encode())
        identities = {row["name"]: row.get("identity") for row in results.rows}
        mark.update(json.dumps([identities[job.name] for job in measured]).encode())
        if results.players.get("digest") == mark.hexdigest():
            return
        places = {key: index for index, key in enumerate(self.plan.keys)}
        indices = [places[(clip["name"], clip["start_frame"])] for clip in chosen]
        # The whole chunk of each, so that samples of posteriors are those that were measured.
        chunks = [next(chunk for chunk in self.plan.chunks if index in chunk) for index in indices]
        batches = list(self.sweep.data.chunk_loader("test", chunks, self.fabric.device.type))
        at = [batch["indices"].index(index) for batch, index in zip(batches, indices, strict=True)]
        clips = [self._clip(batch)[[place]].cpu() for batch, place in zip(batches, at, strict=True)]
        writer = players.Writer(self.sweep.folder, chosen, clips, self.fps)
        bar = tqdm(measured, "players", disable=not self.sweep.progress, dynamic_ncols=True, leave=False)
        for job in bar:
            try:
                subject = self._built(job)
                views = [self._views(subject, batch, place) for batch, place in zip(batches, at, strict=True)]
            except Exception as error:  # the numbers are there, and are to be written
                self._tell(f"no players of {job.name}: {one_line(error)}")
                continue
            for place, shown in enumerate(views):
                writer.add(place, job.name, shown)
        writer.finish(mark.hexdigest())

    def write_pictures(self, jobs: list[Job]) -> list[Path]:
        """Write the first clips by each entry's model, as far as they are missing → the paths of all."""
        paths: list[Path] = []
        for job in jobs:
            folder = self.sweep.folder / "rows" / job.name
            row = rows.read_row(folder / "results.json")
            if row["kind"] in ("failed", "reference"):
                continue
            own = [folder / f"clip{i}" for i in range(min(self.sweep.pictures, len(self.plan.keys)))]
            missing = [p for p in own if not (p.with_suffix(".mp4").exists() and p.with_suffix(".png").exists())]
            if missing:
                try:
                    self._write_pictures(self._built(job), own)
                except Exception as error:  # the numbers are there
                    self._tell(f"no pictures of {job.name}: {one_line(error)}")
                    continue
            paths += [p.with_suffix(suffix) for p in own for suffix in (".mp4", ".png")]
        return paths

    def _write_pictures(self, subject: Subject, targets: list[Path]) -> None:
        size = len(self.plan.chunks[0])
        chunks = self.plan.chunks[: -(-len(targets) // size)]
        loader = self.sweep.data.chunk_loader("test", chunks, self.fabric.device.type)
        for chunk, batch in zip(chunks, loader, strict=True):
            for index in set(chunk[: len(targets)]) & set(batch["indices"]) & set(range(len(targets))):
                place = batch["indices"].index(index)
                views = self._views(subject, batch, place)
                shown = {"input": self._clip(batch)[place].cpu(), "reconstruction": views.pop("")} | views
                frames = {title: convert.to_uint8(clip) for title, clip in shown.items()}
                write_video(targets[index].with_suffix(".mp4"), panels.side_by_side(frames), self.fps)
                with replacing(targets[index].with_suffix(".png")) as temporary:
                    temporary.write_bytes(panels.png(panels.filmstrip(frames)))

    @torch.inference_mode()
    def _views(self, subject: Subject, batch: dict[str, Any], place: int) -> dict[str, Tensor]:
        """The reconstruction of a batch's clip, and what each latent gives alone where the model can."""
        clip = self._clip(batch)
        encoding, prediction = self._forward(subject, clip, self._seed(batch["indices"]))
        shown = {"": prediction}
        if subject.model.partial_latents:
            with self._context():
                for name, latent in encoding.mode().items():
                    shown[f"{name} only"] = subject.decode({name: latent}, clip.shape[2])
        return {title: view[place].float().cpu() for title, view in shown.items()}

    def _seed(self, indices: list[int]) -> int:
        return self.sweep.seed * 1_000_003 + indices[0]

    def _mine(self, chunks: Iterable[int]) -> list[int]:
        return [chunk for chunk in chunks if chunk % self.fabric.world_size == self.fabric.global_rank]

    def _tell(self, line: str, everywhere: bool = False) -> None:
        if everywhere or self.fabric.is_global_zero:
            tqdm.write(f"vidtwin: {line}", file=sys.stderr)


def _chunks_of(failed: list[dict[str, Any]], plan: Plan) -> list[int]:
    """The chunks that some clips are in."""
    keys = {rows.key_of(clip) for clip in failed}
    return [number for number, chunk in enumerate(plan.chunks) if keys & {plan.keys[index] for index in chunk}]


def _move_row(source: Path, target: Path) -> None:
    """`results.json`, which says that a row is complete, leaves first and arrives last."""
    target.mkdir(parents=True, exist_ok=True)
    content = (source / "results.json").read_bytes()
    (source / "results.json").unlink()
    for name in ("features.npy", "clips.csv"):
        (target / name).unlink(missing_ok=True)
        if (source / name).exists():
            (source / name).replace(target / name)
    for path in target.glob(PICTURES):
        path.unlink()
    for path in source.glob(PICTURES):
        path.replace(target / path.name)
    with replacing(target / "results.json") as temporary:
        temporary.write_bytes(content)


def _with(subject: Subject, model: VideoAutoencoder) -> Subject:
    """The same with another copy of the model, as one on the meta device."""
    return Subject(subject.name, subject.kind, model, window=subject.window)


def _downstream(sizes: dict[str, tuple[int, ...]], device: torch.device, repeats: int, limit: int) -> dict[str, Any]:
    """Tokens and FLOPs in any case; time and memory where a step does not take minutes."""
    found = _or_error(lambda: downstream.measure(sizes, device, repeats=repeats, max_tokens=limit))
    return found if "error" not in found else _or_error(lambda: downstream.counts(sizes)) | found


def _or_error(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    try:
        return run()
    except UserError as error:
        return {"error": one_line(error)}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {one_line(error)}"}


def _count_codes(counts: dict[str, Any], encoding: Encoding, clips: slice) -> None:
    """Add the codes that occur in some clips of a batch: {"size", "counts": {code: times}} by latent."""
    for name, posterior in encoding.items():
        if not isinstance(posterior, Quantized):
            continue
        codes, times = posterior.codes[clips].flatten().cpu().unique(return_counts=True)
        known = counts.setdefault(name, {"size": posterior.codebook_size, "counts": {}})["counts"]
        for code, number in zip(codes.tolist(), times.tolist(), strict=True):
            known[str(code)] = known.get(str(code), 0) + number


def _add_codes(statistics: LatentStatistics, counts: dict[str, Any]) -> None:
    other = LatentStatistics()
    for name, found in counts.items():
        codes = torch.zeros(found["size"], dtype=torch.int64)
        codes[torch.tensor([int(code) for code in found["counts"]])] = torch.tensor(list(found["counts"].values()))
        other.sums[name] = {"codes": codes}
    statistics.merge(other)


def _text(features: Tensor) -> str:
    return base64.b64encode(features.float().cpu().numpy().tobytes()).decode("ascii")


def _array(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype=np.float32).copy()  # writable, as torch wants it


def one_line(error: BaseException) -> str:
    return " ".join(str(error).split()) or type(error).__name__
