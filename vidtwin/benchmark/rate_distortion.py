"""Measure each model at several numbers of bits of its latents, as real bytes, and under noise on its latents.

    mode of the latents ── quantize ── code ── bytes ── decode ── dequantize ──> decoder ──> metrics
    mode of the latents + noise ──────────────────────────────────────────────> decoder ──> metrics

Latents are those of the posterior's mode, which is stored, whatever the protocol decodes for its own numbers.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vidtwin import entropy
from vidtwin.benchmark.latent_coder import Array, ClipCoder, Coded, Codes, Fitted, Values, fit
from vidtwin.benchmark.levels import MEASURED, Level
from vidtwin.benchmark.loaded_model import LoadedModel
from vidtwin.benchmark.options import SweepOptions
from vidtwin.benchmark.plan import compute_digest, format_error
from vidtwin.console import log, log_once
from vidtwin.entropy import Symbols
from vidtwin.errors import UserError, few
from vidtwin.metrics.measures import Measures
from vidtwin.posteriors import Encoding, Latents, Posterior, Quantized

ClipLatents = list[Latents]  # of the parts of clips that are encoded one after the other


class Curves:
    """Measure the levels of clips.

    Args:
        options: Options of the sweep, with `rate_distortion`.
        measures: Metrics, set up for the clips.
        precision: Context of the models' forward passes.
        device: Of the models.

    Attributes:
        settings: What decides the numbers of a level beside the model and the protocol.
    """

    def __init__(
        self,
        options: SweepOptions,
        measures: Measures,
        precision: Callable[[], AbstractContextManager[Any]],
        device: torch.device,
    ) -> None:
        assert options.rate_distortion is not None
        self.chosen = options.rate_distortion
        self.options, self.measures, self.precision, self.device = options, measures, precision, device
        entropy.load()  # a missing package is said before anything is measured
        self.fit_clips: list[int] = []
        self.settings = asdict(self.chosen)
        if self.chosen.tables == "val":
            advice = "give --rate_distortion.tables clip to send the coder's tables with each clip"
            try:
                dataset = options.source.dataset("val")
            except UserError as error:  # of data without a validation split
                raise UserError(f"{str(error).rstrip('.')}; or {advice}.") from error
            count = min(self.chosen.clips, len(dataset))
            if not count:
                raise UserError(f"Expected validation clips to fit the coder's tables, got none; {advice}.")
            self.fit_clips = sorted({int(place) for place in np.linspace(0, len(dataset) - 1, count).round()})
            contents = options.source.digests("val")  # a video may be replaced under its name
            named = [dataset.identity(index) for index in self.fit_clips]
            self.settings["fitted_on"] = compute_digest([[*name, contents.get(name[0], "")] for name in named])
        self._fitted: tuple[LoadedModel, Fitted, dict[str, Values]] | None = None

    @torch.inference_mode()
    def measure(
        self, model: LoadedModel, encodings: Sequence[Encoding], clip: Tensor, target: Tensor, indices: Sequence[int]
    ) -> list[list[Level]]:
        """Measure clips at each level.

        Args:
            model: In evaluation mode, on the device.
            encodings: Of the parts of the clips, see `LoadedModel.cut`.
            clip: (B, 3, T, H, W) in [-1, 1].
            target: The same as it is compared.
            indices: Numbers of the clips, which seed their noise.

        Returns:
            By clip the levels; nothing for codecs, whose bytes are their own. At a level whose pixels are not finite a
            clip has the reason instead of metrics.
        """
        if model.model.coding:
            return []
        fitted, deviations = self._fit(model, encodings)
        # A clip whose latents are not finite fails in its row; its neighbours are measured.
        modes = [{k: x.nan_to_num() for k, x in encoding.mode().items()} for encoding in encodings]
        pixels = math.prod(clip.shape[2:])
        levels: list[list[Level]] = [[] for _ in indices]
        bits = [0] if all(isinstance(x, Quantized) for x in encodings[0].values()) else self.chosen.bits
        for number in bits:
            made, coded = self._code(model, encodings, ClipCoder(fitted, number), len(indices))
            for place, (values, stream) in enumerate(zip(self._compare(model, made, clip, target), coded, strict=True)):
                size = len(stream.content)
                rates = {"bytes": size, "bpp": 8 * size / pixels, "entropy_bpp": stream.entropy / pixels}
                curve = "bits" if number else "codes"
                levels[place].append(_level(clip, curve, number, rates | values))
        noise = self._draw(modes, deviations, indices)
        for strength in (0.0, *self.chosen.noise):
            made = [
                {name: latent + strength * drawn[name] for name, latent in part.items()}
                for part, drawn in zip(modes, noise, strict=True)
            ]
            for place, values in enumerate(self._compare(model, made, clip, target)):
                levels[place].append(_level(clip, "noise", strength, values))
        return levels

    def _code(
        self, model: LoadedModel, encodings: Sequence[Encoding], coder: ClipCoder, clips: int
    ) -> tuple[ClipLatents, list[Coded]]:
        """Code the latents of clips and decode them → what the decoder gets, and the bytes of each clip."""
        tensors = [{name: _select_coded(x) for name, x in encoding.items()} for encoding in encodings]
        made = [{name: torch.empty_like(latent) for name, latent in part.items()} for part in tensors]
        streams = []
        for place in range(clips):
            named = {
                f"{number}/{name}": _flatten(
                    _rows(latent, place, clips), isinstance(encodings[number][name], Quantized)
                )
                for number, part in enumerate(tensors)
                for name, latent in part.items()
            }
            coded = coder.encode(named)
            symbols, values = coder.decode(coded.content, {name: latent.shape for name, latent in named.items()})
            if not all(np.array_equal(symbols[name], coded.symbols[name]) for name in named):
                raise RuntimeError("its latents did not decode to the numbers that were coded")
            for number, part in enumerate(made):
                for name, latent in part.items():
                    _unflatten(values[f"{number}/{name}"], _rows(latent, place, clips))
            streams.append(coded)
        for part, encoding in zip(made, encodings, strict=True):
            if codes := {name: part[name] for name, x in encoding.items() if isinstance(x, Quantized)}:
                part |= model.model.dequantize(codes)
        return made, streams

    def _compare(
        self, model: LoadedModel, latents: ClipLatents, clip: Tensor, target: Tensor
    ) -> Iterator[dict[str, Any]]:
        """Decode latents and measure the clips: metrics of each, or the reason why it has none."""
        pieces = model.cut(clip)
        with self.precision():
            parts = [
                model.decode(part, piece.shape[2], (piece.shape[3], piece.shape[4]))
                for part, piece in zip(latents, pieces, strict=True)
            ]
        prediction = torch.cat(parts, 2).float()
        broken = [not bool(each.isfinite().all()) for each in prediction]
        prediction, _ = self.measures.prepare(prediction.nan_to_num(), clip)
        values = self.measures.values(prediction, target, MEASURED)
        for place, pixels in enumerate(broken):
            found = {name: float(value[place]) for name, value in values.items()}
            bad = ", ".join(name for name, value in found.items() if not math.isfinite(value))
            yield {"missing": f"{'pixels' if pixels else bad} not finite"} if pixels or bad else found

    def _draw(self, modes: ClipLatents, deviations: dict[str, Values], indices: Sequence[int]) -> ClipLatents:
        """Draw noise of the channels' deviations for each clip from its own seed: the same at every strength.

        Without `deviations` they are those of the clip's own latents.
        """
        noise: ClipLatents = [{name: torch.empty_like(latent) for name, latent in part.items()} for part in modes]
        for place, index in enumerate(indices):
            random = torch.Generator().manual_seed(self.options.seed * 1_000_003 + index)
            known = deviations or _deviations_of_clip(modes, place, len(indices))
            for part in noise:
                for name, latent in part.items():
                    rows = _rows(latent, place, len(indices))
                    scale = torch.from_numpy(known[name]).reshape(-1, *[1] * (rows.ndim - 2)).float()
                    drawn = torch.randn(rows.shape, generator=random) * scale
                    rows.copy_(drawn.to(rows.device, rows.dtype))
        return noise

    def _fit(self, model: LoadedModel, encodings: Sequence[Encoding]) -> tuple[Fitted, dict[str, Values]]:
        """Return the model's tables and the deviations of its channels, both of the clips of the fit.

        Latents in the tables are named by the number of their part and their own name. Without such clips there are no
        deviations, and of the tables those of codes alone.
        """
        if self._fitted is None or self._fitted[0] is not model:
            kept: dict[str, list[Values]] = {}
            codes: dict[str, tuple[int, list[Symbols]]] = {}
            for encoding in self._encode_fit_clips(model):
                if not all(bool(latent.isfinite().all()) for latent in encoding.mode().values()):
                    log_once(f"{model.name}: its coder is fitted without clips whose latents are not finite")
                    continue
                for name, posterior in encoding.items():
                    kept.setdefault(name, []).append(_by_channel(posterior.mode()))
                    if isinstance(posterior, Quantized):
                        found = codes.setdefault(name, (posterior.codebook_size, []))
                        found[1].append(posterior.codes.cpu().numpy().astype(np.int32))
            if self.fit_clips and not kept:
                raise UserError("Expected validation clips that it encodes to fit its coder, got none.")
            deviations = {name: np.concatenate(values, 1).std(1) for name, values in kept.items()}
            tables = fit({name: values for name, values in kept.items() if name not in codes}, codes)
            self._fitted = model, tables, deviations
        _, tables, deviations = self._fitted
        if not self.fit_clips:
            own = {name: posterior for encoding in encodings for name, posterior in encoding.items()}
            tables = {name: Codes(x.codebook_size) for name, x in own.items() if isinstance(x, Quantized)}
        every = range(len(encodings))
        return {f"{part}/{name}": table for part in every for name, table in tables.items()}, deviations

    def _encode_fit_clips(self, model: LoadedModel) -> Iterator[Encoding]:
        size = self.options.source.eval_batch_size
        chunks = [self.fit_clips[start : start + size] for start in range(0, len(self.fit_clips), size)]
        if not chunks:
            return
        for batch in self.options.source.chunk_loader("val", chunks, self.device.type):
            if not batch["indices"]:
                continue
            moved = {**batch, "clip": batch["clip"].to(self.device)}
            clip = self.options.source.on_after_batch_transfer(moved, 0)["clip"]
            try:
                with self.precision():
                    encodings = [model.encode(piece) for piece in model.cut(clip)]
            except Exception as error:  # a model may fail on some clips of the test too
                names = few([self.options.source.dataset("val").identity(index)[0] for index in batch["indices"]])
                log(f"{model.name}: its coder is fitted without {names}: {format_error(error)}")
                continue
            yield from encodings


def _level(clip: Tensor, curve: str, level: float, numbers: dict[str, Any]) -> Level:
    found: Any = {"num_frames": clip.shape[2], "curve": curve, "level": level, **numbers}
    return found


def _by_channel(latent: Tensor) -> Values:
    """Reshape (B, C, ...) → (C, N), in double precision."""
    channels: Values = latent.transpose(0, 1).reshape(latent.shape[1], -1).cpu().double().numpy()
    return channels


def _deviations_of_clip(modes: ClipLatents, place: int, clips: int) -> dict[str, Values]:
    """Compute the standard deviation of each channel of one clip's latents, over all of its parts."""
    kept: dict[str, list[Values]] = {}
    for part in modes:
        for name, latent in part.items():
            kept.setdefault(name, []).append(_by_channel(_rows(latent, place, clips)))
    return {name: np.concatenate(values, 1).std(1) for name, values in kept.items()}


def _select_coded(posterior: Posterior) -> Tensor:
    return posterior.codes if isinstance(posterior, Quantized) else posterior.mode().nan_to_num()


def _rows(latent: Tensor, place: int, clips: int) -> Tensor:
    """Return the rows (windows, ...) of one clip of a latent (clips · windows, ...)."""
    each = len(latent) // clips
    return latent[place * each : (place + 1) * each]


def _flatten(rows: Tensor, codes: bool) -> Array:
    """Reshape a clip's rows (windows, C, ...) → (C, N) doubles, or its codes → (N,)."""
    return rows.flatten().cpu().numpy() if codes else _by_channel(rows)


def _unflatten(values: Array, rows: Tensor) -> None:
    """Write the values of `_flatten` into a clip's rows."""
    tensor = torch.from_numpy(np.ascontiguousarray(values))
    if tensor.ndim == 2:
        tensor = tensor.reshape(rows.shape[1], rows.shape[0], *rows.shape[2:]).transpose(0, 1)
    rows.copy_(tensor.reshape(rows.shape).to(rows.device, rows.dtype))
