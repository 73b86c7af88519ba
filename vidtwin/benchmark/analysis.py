"""A second pass over the clips of complete rows: where a model fails, and what each of its latents carries.

content/<chunk>.json ──> content.csv                                motion, texture and cuts of each clip, for all rows
rows/<name>/analysis/<chunk>.json ──> rows/<name>/analysis.json     PSNR of each frame and of each latent alone, and
                                                                    what moves a latent, whether it predicts another

Chunks are those of the sweep and are shared by its processes; a killed pass continues with the missing ones. The
files hold the identities of their rows: a row that is measured again is analyzed again.
"""

import base64
import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vidtwin.benchmark import latent_looks, leakage, rows
from vidtwin.benchmark.analysis_files import ANALYSIS, CONTENT, MEASURES, VERSION, read_analysis, read_content
from vidtwin.benchmark.clip_content import measure_content
from vidtwin.benchmark.loaded_model import LoadedModel
from vidtwin.benchmark.plan import compute_digest, format_error
from vidtwin.benchmark.row_folder import RowFolder
from vidtwin.benchmark.runner import Runner
from vidtwin.console import log
from vidtwin.distributed import forward_context
from vidtwin.errors import UserError
from vidtwin.files import inside, remove_leftovers, write_text
from vidtwin.listing import source_of
from vidtwin.metrics import frames
from vidtwin.metrics.latents import ACTIVE_VARIANCE
from vidtwin.posteriors import DiagonalGaussian, Encoding, Quantized
from vidtwin.storage.resumable import Resumable, read_json
from vidtwin.tables import write_table
from vidtwin.video import convert

MAX_UNITS = 4096
"""Numbers of a latent that are kept of each clip; of a larger latent evenly spaced ones."""


def analyze(runner: Runner) -> None:
    """Analyze the clips and every complete row of a model, in all processes; what is there is not computed again."""
    fabric, plan, options = runner.fabric, runner.plan, runner.options
    analyst = Analyst(runner)
    waiting: list[int] = []
    content = False
    if fabric.is_global_zero:
        waiting = [number for number, row in enumerate(runner.rows) if analyst.is_wanted(row)]
        content = not analyst.has_content()
    waiting, content = fabric.broadcast((waiting, content))
    if content:
        analyst.measure_clips()
        fabric.barrier()
        if fabric.is_global_zero:
            analyst.join_content()
    hidden = not (options.progress and fabric.is_global_zero and waiting)
    with tqdm(total=len(waiting) * len(runner.mine), unit="chunk", disable=hidden, dynamic_ncols=True) as bar:
        for number in waiting:
            row = runner.rows[number]
            bar.set_description(f"analysis of {row.name}")
            error = analyst.measure(row, bar)
            fabric.barrier()
            if fabric.is_global_zero:
                error = error or analyst.join(row)
            if error:
                log(f"no analysis of {row.name}: {error}")
                runner.failed.append(row.name)
            fabric.barrier()
    if options.progress and fabric.is_global_zero and plan.chunks and not waiting:
        log("all rows have been analyzed")


class Analyst:
    """Analyze one model at a time in this process.

    Args:
        runner: The runner of the sweep, after its rows are complete.
    """

    def __init__(self, runner: Runner) -> None:
        self.runner, self.measurer, self.plan = runner, runner.measurer, runner.plan
        self.folder = runner.options.folder
        self.protocol = self.plan.protocol
        self.channels: dict[str, dict[str, Any]] = {}  # of the present chunk
        self.midpoints: list[list[Any]] = []  # of the present chunk: name, start, features
        self.labels: dict[int, int] = {}
        self.content = self._units(inside(self.folder, "content"), compute_digest([VERSION, self.plan.digest]))

    def _units(self, folder: Path, identity: str) -> Resumable[dict[str, Any]]:
        def read(chunk: int, path: Path) -> dict[str, Any] | None:
            found = read_json(path, identity=identity, chunk=self.plan.list_clips(chunk))
            return found if isinstance(found, dict) else None

        return Resumable(folder, "{:06d}.json", read)

    def _parts(self, row: RowFolder) -> Resumable[dict[str, Any]]:
        return self._units(inside(row.folder, "analysis"), self._identity(row))

    def _identity(self, row: RowFolder) -> str:
        return compute_digest([VERSION, row.identity])

    # --- the clips ---

    def has_content(self) -> bool:
        """Return whether `content.csv` has the measured clips."""
        there = {rows.key_of(clip) for clip in read_content(self.folder, self.plan.digest)} >= self._measured()
        if there:
            _remove(self.content.folder)  # the sweep was killed before it did that
        return there

    def _measured(self) -> set[rows.Key]:
        """Return the clips that any row has: others could not be read."""
        found = [rows.read_clips(row.folder, content) for row in self.runner.rows if (content := _complete(row))]
        return {rows.key_of(clip) for clips in found for clip in clips}

    def measure_clips(self) -> None:
        """Measure the content of the missing chunks of this process."""
        missing = [chunk for chunk in self.runner.mine if self.content.get(chunk) is None]
        identity = compute_digest([VERSION, self.plan.digest])
        batches = self.measurer.load([self.plan.chunks[chunk] for chunk in missing])
        for chunk, batch in zip(missing, batches, strict=True):
            clips = []
            prepared = self.measurer.prepare_clip(batch) if batch["indices"] else ()
            for index, clip in zip(batch["indices"], prepared, strict=True):
                name, start = self.plan.keys[index]
                clips.append({"name": name, "start_frame": start, **measure_content(convert.to_uint8(clip.cpu()))})
            content = {"identity": identity, "chunk": self.plan.list_clips(chunk), "clips": clips}
            write_text(self.content.path(chunk), json.dumps(content) + "\n")

    def join_content(self) -> None:
        """Write `content.csv` from all chunks, and remove these."""
        found = [self.content.get(chunk) for chunk in range(len(self.plan.chunks))]
        clips = [clip for part in found if part for clip in part["clips"]]
        columns = ["name", "start_frame", *MEASURES]
        lines = ([*(clip[key] for key in columns), self.plan.digest] for clip in clips)
        write_table(self.folder / CONTENT, [*columns, "protocol_hash"], lines)
        _remove(self.content.folder)

    # --- rows ---

    def is_wanted(self, row: RowFolder) -> bool:
        """Return whether a row is that of a model, complete, and not analyzed."""
        content = _complete(row)
        if content is None or content["kind"] not in ("trained", "untrained"):
            return False
        remove_leftovers(row.folder)
        wanted = read_analysis(row.folder, content) is None
        if not wanted:
            _remove(self._parts(row).folder)
        return wanted

    def measure(self, row: RowFolder, bar: "tqdm[Any]") -> str | None:
        """Analyze the missing chunks of a row in this process → the reason if that failed."""
        parts = self._parts(row)
        missing = [chunk for chunk in self.runner.mine if parts.get(chunk) is None]
        bar.update(len(self.runner.mine) - len(missing))
        if not missing:
            return None
        content = row.read() or {}
        failed = {(clip["name"], clip["start_frame"]) for clip in content.get("failed_clips") or []}
        try:
            model = self.measurer.build(row.job)
            batches = self.measurer.load([self.plan.chunks[chunk] for chunk in missing])
            for chunk, batch in zip(missing, batches, strict=True):
                self.channels, self.midpoints = {}, []
                clips = self._analyze(model, batch, failed)
                part: dict[str, Any] = {"identity": self._identity(row), "chunk": self.plan.list_clips(chunk)}
                part["clips"] = clips
                part["midpoints"] = self.midpoints
                part["channels"] = {name: _encode_sums(sums) for name, sums in self.channels.items()}
                write_text(parts.path(chunk), json.dumps(part) + "\n")
                bar.update(1)
        except Exception as error:  # the numbers of the row are there
            return format_error(error)
        return None

    @torch.inference_mode()
    def _analyze(self, model: LoadedModel, batch: dict[str, Any], failed: set[rows.Key]) -> list[dict[str, Any]]:
        indices: list[int] = batch["indices"]
        if not indices:
            return []
        clip = self.measurer.prepare_clip(batch)
        self.labels = dict(zip(indices, batch["label"].tolist(), strict=True))
        if failed.isdisjoint(self.plan.keys[index] for index in indices):
            return self._describe(model, clip, indices)
        # The sweep measured the clips of such a chunk one by one, each with a sample of its own.
        good = [(place, index) for place, index in enumerate(indices) if self.plan.keys[index] not in failed]
        return [found for place, index in good for found in self._describe(model, clip[place : place + 1], [index])]

    def _describe(self, model: LoadedModel, clip: Tensor, indices: list[int]) -> list[dict[str, Any]]:
        """Describe the clips of a batch (B, 3, T, H, W), a dictionary each."""
        (encoding,), prediction = self.measurer.reconstruct(model, clip, indices)
        found: list[dict[str, Any]] = []
        for index, values in zip(indices, self._frame_psnr(prediction, clip), strict=True):
            name, start = self.plan.keys[index]
            found.append({"name": name, "start_frame": start, "frame_psnr": values, "latents": {}})
            found[-1]["label"] = self.labels[index]
        self._decode_midpoints(model, encoding, clip, indices)
        kept = self._keep(model, encoding, clip)
        changes = self._find_changes(model, clip, kept)
        alone = self._measure_alone(model, encoding, clip)
        for name, posterior in encoding.items():
            kl = (
                _by_clip(posterior.kl(), len(clip)).sum(1).tolist() if isinstance(posterior, DiagonalGaussian) else None
            )
            value = posterior.mode()
            numbers = value.numel() // len(clip)
            low = self._look(name, value, len(clip))
            for place, each in enumerate(found):
                each["latents"][name] = {
                    "numbers": numbers,
                    "units": _encode(kept[name][place]),
                    "kl": None if kl is None else kl[place],
                    "codebook": isinstance(posterior, Quantized),
                    "low": low[place],
                    "white": latent_looks.share_of_noise(value.shape[1:]),
                    **{key: values[name][place] for key, values in changes.items()},
                    **{key: values[place] for key, values in alone.get(name, {}).items()},
                }
        return found

    def _decode_midpoints(self, model: LoadedModel, encoding: Encoding, clip: Tensor, indices: list[int]) -> None:
        """Decode the midpoints between the latents of neighbouring clips of a video, and keep their features for tFVD.

        Neighbours follow one another in a chunk. Without the network of rFVD nothing is decoded.
        """
        names = [self.plan.keys[index][0] for index in indices]
        places = [place for place in range(len(indices) - 1) if names[place] == names[place + 1]]
        if self.measurer.features is None or not places:
            return
        middle = {}
        for name, value in encoding.mode().items():
            of_clips = value.reshape(len(clip), -1, *value.shape[1:])  # (B, windows, ...)
            both = (of_clips[places] + of_clips[[place + 1 for place in places]]) / 2
            middle[name] = both.flatten(0, 1)
        with forward_context(self.runner.fabric, self.runner.options.precision):
            decoded = model.decode(middle, clip.shape[2], (clip.shape[3], clip.shape[4]))
        prepared, _ = self.measurer.measures.prepare(decoded.float(), clip[places])
        found = self.measurer.features.network(prepared).float().cpu()
        self.midpoints += [
            [*self.plan.keys[indices[place]], _encode(each)] for place, each in zip(places, found, strict=True)
        ]

    def _compute_tfvd(self, midpoints: list[list[Any]]) -> dict[str, Any] | None:
        """Compute FVD of the decoded midpoints against the first clip of each pair; None if it can't be."""
        features = self.measurer.features
        if features is None or not midpoints:
            return None
        try:
            keys = [(name, start) for name, start, _ in midpoints]
            values = [_decode(text).astype(np.float32) for *_, text in midpoints]
            return dict(features.compute_distance(keys, values))
        except UserError as error:
            log(f"no tFVD: {error}")
            return None

    def _look(self, name: str, value: Tensor, clips: int) -> list[float | None]:
        """Return the share of low frequencies of each clip, and add its channels to the sums of the chunk."""
        if value.ndim < 2:
            return [None] * clips
        numbers = value.cpu().double().numpy()  # not every accelerator has doubles
        sums, known = latent_looks.sum_channels(numbers), self.channels.get(name)
        if sums:
            self.channels[name] = {key: sums[key] + known[key] for key in sums} if known else sums
        low = latent_looks.share_low_frequencies(numbers).reshape(clips, -1).mean(1)
        return [value if math.isfinite(value) else None for value in low.tolist()]

    def _frame_psnr(self, prediction: Tensor, clip: Tensor) -> list[list[float]]:
        """Measure PSNR of each frame as the protocol compares pictures → (B, T)."""
        pair = self.measurer.measures.prepare(prediction.float(), clip)
        values = frames.psnr(*pair, "frame", self.protocol["psnr_epsilon"])
        return [[round(value, 4) for value in each] for each in values.tolist()]

    def _measure_alone(self, model: LoadedModel, encoding: Encoding, clip: Tensor) -> dict[str, dict[str, list[float]]]:
        """Measure PSNR and SSIM of each latent decoded alone; nothing if the model can't or has one latent."""
        latents = encoding.mode()
        if not model.model.partial_latents or len(latents) < 2:
            return {}
        found = {}
        for name in latents:
            with forward_context(self.runner.fabric, self.runner.options.precision):
                view = model.decode({name: latents[name]}, clip.shape[2], (clip.shape[3], clip.shape[4]))
            pair = self.measurer.measures.prepare(view.float(), clip)
            found[name] = {"psnr": frames.psnr(*pair, "frame", self.protocol["psnr_epsilon"]).mean(1).tolist()}
            if "ssim" in self.measurer.measures.names:
                found[name]["ssim"] = frames.ssim(*pair, self.protocol["ssim"]).mean(1).tolist()
        return found

    def _keep(self, model: LoadedModel, encoding: Encoding, clip: Tensor) -> dict[str, Tensor]:
        """Return the kept numbers of each latent's mode, (B, at most `MAX_UNITS`), of all windows together."""
        kept = {}
        for name, value in encoding.mode().items():
            units = _by_clip(value, len(clip))
            places = torch.linspace(0, units.shape[1] - 1, min(units.shape[1], MAX_UNITS), dtype=torch.float64)
            kept[name] = units[:, places.round().long().to(units.device)].float().cpu()
        return kept

    def _find_changes(
        self, model: LoadedModel, clip: Tensor, kept: dict[str, Tensor]
    ) -> dict[str, dict[str, list[float]]]:
        """Return the mean squared change of each latent (B,) by what is changed in the clip: see `describe_latents`."""

        def encode(changed: Tensor) -> dict[str, Tensor]:
            with forward_context(self.runner.fabric, self.runner.options.precision):
                return self._keep(model, model.encode(changed), clip)

        still, moving = draw_square(clip, False), draw_square(clip, True)
        of_still = encode(still)
        pairs = {
            "shuffled": (encode(shuffle_frames(clip, model.count_windows(clip.shape[2]))), kept),
            "object": (of_still, kept),
            "motion": (encode(moving), of_still),
        }
        return {
            key: {name: (one[name] - other[name]).double().square().mean(1).tolist() for name in kept}
            for key, (one, other) in pairs.items()
        }

    def join(self, row: RowFolder) -> str | None:
        """Write the analysis of a row from the parts of all processes → the reason if one is missing."""
        parts = self._parts(row)
        found = [parts.get(chunk) for chunk in range(len(self.plan.chunks))]
        if any(part is None for part in found):
            return "a part is missing; run the same command again"
        clips = [clip for part in found if part for clip in part["clips"]]
        channels = [part["channels"] for part in found if part]
        if not clips:
            return "no clip could be analyzed"
        content = _complete(row)
        assert content is not None
        frames_of_window = (content.get("windows") or {}).get("num_frames")
        length = len(clips[0]["frame_psnr"])
        described = {
            "version": VERSION,
            "row_identity": row.identity,
            "seams": list(range(frames_of_window, length, frames_of_window)) if frames_of_window else [],
            **describe_latents(clips, channels),
            "tfvd": self._compute_tfvd([each for part in found if part for each in part["midpoints"]]),
            "clips": [_shorten(clip) for clip in clips],
        }
        write_text(inside(row.folder, ANALYSIS), json.dumps(described) + "\n")
        _remove(parts.folder)
        return None


def describe_latents(clips: Sequence[dict[str, Any]], channels: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Describe each latent over all clips.

    A unit is a number of the latent's mode. Its spread is the variance over the clips; changes are root mean squares
    over units and clips, divided by that of the spread: 1 is as much as a clip differs from the mean clip, √2 as much
    as from another clip.

    Args:
        clips: Of the parts of a row.
        channels: Sums of each part by latent, see `latent_looks.sum_channels`.

    Returns:
        "latents": by name "numbers" (of a clip), "shuffled" (the frames of the clip, or of each window, in another
        order), "object" (a still square that is drawn on the clip), "motion" (the same square, moving, against the
        still one), "active" (share of the units whose variance is above 0.01, as of Burda et al. 2016, section 5.2;
        None for codes), "kl" (nats a clip; None without noise), "psnr" and "ssim" (decoded alone; None
        if it can't be).
        "low" and "white" (share of energy in low frequencies, and that of white noise), "channels" (eigenvalues of the
        channels' covariance; None for too many) and "probe" (of the class), all by `latent_looks`.
        "probe": of the class from all latents together; None without classes.
        "leakage": by pairs of names, which latent predicts which, see `leakage.probe`.
    """
    names = list(clips[0]["latents"])
    units = {name: np.stack([_decode(clip["latents"][name]["units"]) for clip in clips]) for name in names}
    sources = [source_of(clip["name"]) for clip in clips]
    labels = [clip["label"] for clip in clips]
    labels = labels if min(labels) >= 0 else []  # -1: the data have no classes
    latents: dict[str, Any] = {}
    for name in names:
        each = [clip["latents"][name] for clip in clips]
        variance = units[name].var(0)
        spread = float(variance.mean())
        latents[name] = {"numbers": each[0]["numbers"], "spread": math.sqrt(spread)}
        for key in ("shuffled", "object", "motion"):
            change = math.fsum(found[key] for found in each) / len(each)
            latents[name][key] = math.sqrt(change / spread) if spread else None
        latents[name]["active"] = None if each[0]["codebook"] else float((variance > ACTIVE_VARIANCE).mean())
        latents[name]["white"] = each[0]["white"]
        sums = [_decode_sums(part[name]) for part in channels if name in part]
        latents[name]["channels"] = latent_looks.describe_channels(sums) if sums else None
        latents[name]["probe"] = latent_looks.probe_classes(units[name], labels, sources) if labels else None
        for key in ("kl", "psnr", "ssim", "low"):
            values = [found[key] for found in each if found.get(key) is not None]
            latents[name][key] = math.fsum(values) / len(values) if values else None
    pairs = [(one, other) for one in names for other in names if one != other]
    found = [{"from": one, "to": other, **leakage.probe(units[one], units[other], sources)} for one, other in pairs]
    every = np.concatenate(list(units.values()), 1)
    return {
        "latents": latents,
        "probe": latent_looks.probe_classes(every, labels, sources) if labels else None,
        "leakage": found,
    }


def shuffle_frames(clip: Tensor, windows: int = 1) -> Tensor:
    """Put the frames of clips (B, 3, T, H, W) into another order, the same one in each of their windows."""
    length = clip.shape[2] // windows
    order = torch.randperm(length, generator=torch.Generator().manual_seed(0))
    places = torch.cat([order + length * window for window in range(windows)])
    return clip[:, :, places.to(clip.device)]


def draw_square(clip: Tensor, moving: bool) -> Tensor:
    """Draw a square on clips (B, 3, T, H, W) in [-1, 1], white on dark ones, else black.

    Its side is a quarter of the clip's shorter one. It is at half of the height and, in the first frame, at the left;
    moving, it arrives at the right in the last frame.
    """
    drawn = clip.clone()
    frames_, height, width = clip.shape[2:]
    side = max(1, min(height, width) // 4)
    top, way = (height - side) // 2, width - side
    colour = torch.where(clip.mean(dim=(1, 2, 3, 4)) > 0, -1.0, 1.0)[:, None, None, None].to(clip.dtype)
    for time in range(frames_):
        left = round(way * time / max(1, frames_ - 1)) if moving else 0
        drawn[:, :, time, top : top + side, left : left + side] = colour
    return drawn


def _complete(row: RowFolder) -> rows.Row | None:
    """Return the content of a row of the present settings."""
    content = row.read()
    return content if content and content["kind"] != "failed" and content.get("identity") == row.identity else None


def _remove(folder: Path) -> None:
    if folder.exists():
        shutil.rmtree(folder)


def _by_clip(value: Tensor, clips: int) -> Tensor:
    """Reshape a latent (clips · windows, ...) → (clips, numbers)."""
    return value.reshape(clips, -1)


def _encode(values: Tensor) -> str:
    return base64.b64encode(values.numpy().astype("<f4").tobytes()).decode("ascii")


def _decode(text: str) -> "np.ndarray[Any, np.dtype[np.float64]]":
    return np.frombuffer(base64.b64decode(text), dtype="<f4").astype(np.float64)


def _encode_sums(sums: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key == "count" else value.tolist() for key, value in sums.items()}


def _decode_sums(sums: dict[str, Any]) -> dict[str, Any]:
    return {key: value if key == "count" else np.array(value) for key, value in sums.items()}


def _shorten(clip: dict[str, Any]) -> dict[str, Any]:
    """Keep what tables and plots show of a clip: PSNR of its frames and of each latent alone."""
    alone = {name: {key: found[key] for key in ("psnr", "ssim") if key in found}
             for name, found in clip["latents"].items()}  # fmt: skip
    return clip | {"latents": alone}
