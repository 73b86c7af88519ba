"""Measure a model on chunks of clips: reconstructions, metrics, features, codes; and what it costs."""

import math
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.fabric import Fabric
from torch import Tensor

from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.benchmark import cost, downstream
from vidtwin.benchmark.loaded_model import LoadedModel, add_latents
from vidtwin.benchmark.options import SweepOptions
from vidtwin.benchmark.plan import CodeCounts, Job, ModelError, Part, Plan, format_error, make_empty_part
from vidtwin.benchmark.rate_distortion import Curves
from vidtwin.benchmark.rfvd import ClipFeatures
from vidtwin.compilation import CompiledUnits, list_units
from vidtwin.distributed import forward_context
from vidtwin.errors import UserError
from vidtwin.metrics.fvd import MIN_FRAMES, FeatureNetwork
from vidtwin.metrics.measures import Measures
from vidtwin.metrics.registry import BY_KEY
from vidtwin.posteriors import Encoding, Quantized, Stream

MAX_TOKENS, MAX_TOKENS_ON_CPU = 20_000, 4_000  # of which a DiT's training step is timed


class DeviceError(Exception):
    """The process can't use its device any more, such as after an assertion in a kernel."""


class Measurer:
    """Measure one model at a time in this process.

    Args:
        options: Options of the sweep, and its data.
        fabric: Processes and the device.
        plan: Clips and protocol.

    Attributes:
        fps: Frames per second of videos that are written.
        unavailable: Metrics that can't be measured here, with the reason.
        features: Features for rFVD; None without its network.
        settings: Settings beside a model that decide a row's numbers; with other ones it is measured again.
        costs_settings: Settings that decide its costs.
    """

    def __init__(self, options: SweepOptions, fabric: Fabric, plan: Plan) -> None:
        self.options, self.fabric, self.plan = options, fabric, plan
        self.device = fabric.device
        self.fps: float = options.source.eval_fps or 25.0
        protocol = plan.protocol
        compared, psnr, epsilon, ssim = (protocol[key] for key in ("compared", "psnr", "psnr_epsilon", "ssim"))
        network = protocol["lpips"]["net"]
        self.measures = Measures(
            *(compared, psnr, epsilon, ssim, network, self.fps),
            *(options.backbones, options.vmaf, options.st_lpips, options.cvvdp),
        )
        self.measures.setup(*plan.smallest)
        for name, reason in self.measures.unavailable.items():  # a metric that an option names is required
            if BY_KEY[name].on_request or any(path and str(path) in reason for path in options.backbones.values()):
                raise UserError(reason)
        home = str(Path.home())  # reports are shared
        self.unavailable = {name: text.replace(home, "~") for name, text in self.measures.unavailable.items()}
        self.features: ClipFeatures | None = None
        if not (options.i3d.path and options.i3d.sha256):
            missing = "Expected an I3D network for rFVD, got none; give --fvd.path and --fvd.sha256."
            self.unavailable["rfvd"] = missing
        elif (length := plan.smallest[0]) < MIN_FRAMES:
            self.unavailable["rfvd"] = f"Expected clips of at least {MIN_FRAMES} frames for rFVD, got {length}."
        else:
            i3d = FeatureNetwork(options.i3d.path, options.i3d.sha256, protocol["fvd"]["convention"])
            self.features = ClipFeatures(i3d, options.folder, plan, self._load_target)
        self.curves = Curves(options, self.measures, self._precision, self.device) if options.rate_distortion else None
        self.settings = {
            "metrics": [*self.measures.names, *(["rfvd"] if self.features else [])],
            "protocol": plan.digest,
            "batch": len(plan.chunks[0]),
            "device": self.device.type,
            **({"compile": options.compile} if options.compile else {}),
            **({"seed": options.seed} if protocol["posterior"] == "sample" or self.curves else {}),
            **({"rate_distortion": self.curves.settings} if self.curves else {}),
        }
        self.costs_settings = [options.repeats, options.cost, options.downstream, cost.device_name(self.device)]

    def build(self, job: Job) -> LoadedModel:
        """Build a model on the device; `ModelError` if that fails or if it does not take the clips."""
        try:
            model = job.build()
            model.check(*self.plan.shape[1:])
            if self.options.precision == "64-true":
                model.dtype = torch.float64
            model.model.eval().requires_grad_(False).to(self.device, model.dtype)
            # A model that is built anew for each shape, and one without repeated blocks, such as a codec, stays plain.
            if self.options.compile and model.rebuild is None and (units := list_units(model.model)[:-1]):
                model.compiled = CompiledUnits(units, self.options.compile, self.options.compile_backend)
        except Exception as error:
            raise ModelError(format_error(error)) from error
        return model

    def load(self, chunks: Sequence[Sequence[int]]) -> Iterable[dict[str, Any]]:
        """Load clips: a batch per chunk, see `ClipSource.chunk_loader`."""
        processes = max(1, self.fabric.world_size // max(1, self.options.num_nodes))
        return self.options.source.chunk_loader("test", chunks, self.device.type, processes)

    def prepare_clip(self, batch: dict[str, Any]) -> Tensor:
        """Return a loaded batch's clips (B, 3, T, H, W) in [-1, 1] on the device."""
        moved = {**batch, "clip": batch["clip"].to(self.device, non_blocking=True)}
        clip: Tensor = self.options.source.on_after_batch_transfer(moved, 0)["clip"]
        return clip

    def measure(self, model: LoadedModel, batch: dict[str, Any]) -> Part:
        """Measure the clips of a batch at once; if that fails, one by one, so that only bad clips are lost."""
        part, indices = make_empty_part(), batch["indices"]
        if indices:
            clip = self.prepare_clip(batch)
            try:
                self._add(part, model, clip, indices)
            except Exception as error:
                self._free(error)
                part = make_empty_part()
                for place, index in enumerate(indices):
                    try:
                        self._add(part, model, clip[place : place + 1], [index])
                    except Exception as alone:
                        self._free(alone)
                        self._add_failure(part, index, format_error(alone))
        part["skipped"] = [[name, reason] for _, name, reason in batch["skipped"]]
        return part

    def reconstruct(self, model: LoadedModel, clip: Tensor, indices: list[int]) -> tuple[list[Encoding], Tensor]:
        """Encode and decode clips by the protocol; samples of posteriors are seeded by the first clip's index.

        Returns:
            The encodings of the parts of the clips, one after the other, and the reconstructions (B, 3, T, H, W).
        """
        encodings, decoded = [], []
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(self.options.seed * 1_000_003 + indices[0])
            for piece in model.cut(clip):
                with self._precision():
                    encoding = model.encode(piece)
                    latents = encoding.sample() if self.plan.protocol["posterior"] == "sample" else encoding.mode()
                    decoded.append(model.decode(latents, piece.shape[2], (piece.shape[3], piece.shape[4])))
                encodings.append(encoding)
        return encodings, decoded[0] if len(decoded) == 1 else torch.cat(decoded, 2)

    @torch.inference_mode()
    def make_views(
        self, model: LoadedModel, batch: dict[str, Any], place: int, num_frames: int | None = None
    ) -> dict[str, Tensor]:
        """Return a clip's reconstructions by title: "" from all latents, others from one alone if the model can.

        Args:
            model: In evaluation mode, on the device.
            batch: A loaded chunk.
            place: Of the clip in it.
            num_frames: Number of the first frames to return; None: all.
        """
        clip = self.prepare_clip(batch)
        encodings, prediction = self.reconstruct(model, clip, batch["indices"])
        shown = {"": prediction}
        if model.model.partial_latents:
            pieces = [(encoding.mode(), piece) for encoding, piece in zip(encodings, model.cut(clip), strict=True)]
            with self._precision():
                for name in pieces[0][0]:
                    parts = [
                        model.decode({name: latents[name]}, piece.shape[2], (piece.shape[3], piece.shape[4]))
                        for latents, piece in pieces
                    ]
                    shown[f"{name} only"] = torch.cat(parts, 2)
        return {title: view[place, :, :num_frames].to("cpu", torch.float32, copy=True) for title, view in shown.items()}

    def measure_costs(self, model: LoadedModel) -> dict[str, Any]:
        """Measure a model's costs and those of a DiT on its latents, as the options say."""
        if model.compiled is not None:
            model.compiled.restore()
        # Of whole videos in windows, the costs are those of one window.
        shape, repeats, precision = model.piece_shape(self.plan.shape), self.options.repeats, self._precision
        model.fit(shape, self.device)
        found: dict[str, Any] = {"cost": None, "downstream": None}
        if model.model.coding:
            return found
        if self.options.cost:

            def wrap(copy: VideoAutoencoder) -> LoadedModel:
                return replace(model, model=copy)

            found["cost"] = _catch(
                lambda: cost.measure(model.model, shape, self.device, precision, repeats=repeats, wrap=wrap)
            )
        if self.options.downstream:
            shapes = model.latent_shapes(shape)
            limit = MAX_TOKENS if self.device.type == "cuda" else MAX_TOKENS_ON_CPU
            measured = _catch(lambda: downstream.measure(shapes, self.device, repeats=repeats, max_tokens=limit))
            if "error" in measured:  # tokens and FLOPs need no run
                measured = _catch(lambda: downstream.counts(shapes)) | measured
            found["downstream"] = measured
        if self.plan.varies:
            found = {key: each and each | {"clip_shape": list(shape)} for key, each in found.items()}
        return found

    @torch.inference_mode()
    def _add(self, part: Part, model: LoadedModel, clip: Tensor, indices: list[int]) -> None:
        """Measure clips and add their numbers to a part."""
        encodings, prediction = self.reconstruct(model, clip, indices)
        broken = [not bool(each.isfinite().all()) for each in prediction]
        prediction = prediction.nan_to_num()  # a file has no NaN: the clip fails, but its neighbours are measured
        prediction, target = self.measures.prepare(prediction.float(), clip)
        values = {name: value.tolist() for name, value in self.measures.values(prediction, target).items()}
        levels = self.curves.measure(model, encodings, clip, target, indices) if self.curves else None
        features = self.features.measure(prediction, target, indices) if self.features else None
        if model.model.coding:
            for encoding, piece in zip(encodings, model.cut(clip), strict=True):
                found = model.sum_streams(encoding, tuple(piece.shape[1:]))
                part["latents"] = add_latents(part["latents"] or {}, found)
            bits = torch.stack([_count_bits(encoding, len(indices)) for encoding in encodings]).sum(0)
            values["bpp"] = (bits / math.prod(clip.shape[2:])).tolist()
        elif self.plan.varies:
            part["latents"] = model.sum_latents([each.mode() for each in encodings], tuple(clip.shape[1:]))
        else:
            (encoding,) = encodings
            latents = model.describe_latents(encoding.mode(), tuple(clip.shape[1:]))
            if part["latents"] not in (None, latents):
                raise RuntimeError(f"latents of other sizes from clip to clip: {part['latents']}, {latents}")
            part["latents"] = latents
        windows = model.count_windows(clip.shape[2])
        for place, index in enumerate(indices):
            numbers = {metric: value[place] for metric, value in values.items()}
            bad = ", ".join(metric for metric, number in numbers.items() if not math.isfinite(number))
            if broken[place] or bad:
                subject = "pixels" if broken[place] else bad
                self._add_failure(part, index, f"{subject} of its reconstruction are not finite")
                continue
            name, start = self.plan.keys[index]
            part["clips"].append({"name": name, "start_frame": start, "num_frames": clip.shape[2], **numbers})
            if features is not None:
                part["features"].append(features[place])
            if levels:
                part["levels"].append([{"name": name, "start_frame": start, **level} for level in levels[place]])
            for encoding in encodings:
                _count_codes(part["codes"], encoding, slice(place * windows, (place + 1) * windows))

    def _add_failure(self, part: Part, index: int, reason: str) -> None:
        name, start = self.plan.keys[index]
        part["failed"].append({"name": name, "start_frame": start, "reason": reason})

    def _free(self, error: Exception) -> None:
        """Free the memory that an error holds; `DeviceError` if the device is unusable after it."""
        error.__traceback__ = None  # which holds the tensors
        if isinstance(error, torch.AcceleratorError) and not isinstance(error, torch.OutOfMemoryError):
            raise DeviceError(format_error(error)) from error
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def _precision(self) -> AbstractContextManager[Any]:
        # 32-true means it: without TensorFloat-32, which PyTorch's convolutions have on CUDA by default.
        return forward_context(self.fabric, self.options.precision)

    def _load_target(self, index: int) -> Tensor:
        (batch,) = self.load([[index]])
        return self.measures.prepare(self.prepare_clip(batch), self.prepare_clip(batch))[1]


def _catch(run: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Return the result of `run`, or its error."""
    try:
        return run()
    except Exception as error:
        return {"error": format_error(error)}


def _count_bits(encoding: Encoding, clips: int) -> Tensor:
    """Count the bits of the streams of each of some clips, (clips,)."""
    streams = [posterior for posterior in encoding.values() if isinstance(posterior, Stream)]
    return torch.stack([8 * stream.sizes.cpu().reshape(clips, -1).sum(1) for stream in streams]).sum(0)


def _count_codes(counts: dict[str, CodeCounts], encoding: Encoding, clips: slice) -> None:
    """Add the codes that occur in some clips of a batch."""
    for name, posterior in encoding.items():
        if not isinstance(posterior, Quantized):
            continue
        codes, times = posterior.codes[clips].flatten().cpu().unique(return_counts=True)
        known = counts.setdefault(name, {"size": posterior.codebook_size, "counts": {}})["counts"]
        for code, number in zip(codes.tolist(), times.tolist(), strict=True):
            known[str(code)] = known.get(str(code), 0) + number
