"""Export encoder and decoder of an autoencoder by torch.export or to ONNX, and compare them with the model.

Imports torch and lightning.
"""

import io
import json
import math
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.export import ExportedProgram

from vidtwin import hub, weights
from vidtwin.apply.export_files import FAILED, FILES, MANIFEST, ONNX
from vidtwin.apply.options import ExportOptions
from vidtwin.apply.programs import CODES, DecoderProgram, EncoderProgram, Part, prune, quiet, summarize_error, trace
from vidtwin.autoencoder import VideoAutoencoder
from vidtwin.errors import UserError
from vidtwin.files import write_text
from vidtwin.posteriors import Latents
from vidtwin.storage import checkpoints

FORMAT_VERSION = 1
_SUFFIXES = {"torch": ".pt2", "onnx": ".onnx"}
_CODES_THAT_MAY_DIFFER = 0.01  # rounding breaks ties between two entries of a codebook


class Exporter:
    """Export encoder and decoder; see `ExportOptions`."""

    def __init__(self, options: ExportOptions) -> None:
        self.options, self.folder = options, Path(str(options.out))

    def run(self) -> int:
        """Write the programs and print their differences from the model → exit code."""
        model = checkpoints.load_autoencoder(str(self.options.ckpt_path), self.options.use_ema).requires_grad_(False)
        shape = self._clip_shape(model)
        files: dict[str, dict[str, Any]] = {}
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".export-", dir=self.folder.parent) as stage:
            for part in self._parts(model, shape):
                for kind in self.options.formats:
                    name = f"{part.name}{_SUFFIXES[kind]}"
                    files[name] = self._write(part, kind, Path(stage) / name)
                    sys.stdout.write(f"{name}: {_summarize(files[name])}\n")
            self._publish(Path(stage), files, model, shape)
        sys.stdout.write(f"-> {self.folder}\n")
        return 0 if all(entry["agrees"] for entry in files.values()) else 1

    def _clip_shape(self, model: VideoAutoencoder) -> tuple[int, int, int, int]:
        frames = model.temporal.usual_length if self.options.num_frames is None else self.options.num_frames
        model.temporal.legal_length(frames)
        side = self.options.resolution or model.resolution or 256
        if model.resolution not in (None, side):
            raise UserError(f"Expected --resolution {model.resolution}, which the model was built for, got {side}.")
        if side % model.spatial_multiple:
            raise UserError(f"Expected --resolution to be a multiple of {model.spatial_multiple}, got {side}.")
        return 3, frames, side, side

    def _parts(self, model: VideoAutoencoder, shape: tuple[int, int, int, int]) -> Iterator[Part]:
        # torch.export treats a size of 1 as constant.
        clip = _draw_clips(max(2, self.options.batch_size), shape)
        yield Part("encoder", EncoderProgram(model).eval(), {"clip": clip})
        with torch.no_grad():
            latents = model.encode(clip).mode()
        yield Part("decoder", DecoderProgram(model, shape[1]).eval(), {n: z.detach() for n, z in latents.items()})

    def _write(self, part: Part, kind: str, path: Path) -> dict[str, Any]:
        """Write a program, read it back and compare it with the model → its entry in the manifest."""
        inputs = part.inputs
        program, reason = trace(part, inputs, dynamic=True)
        if program is None:
            inputs = {name: value[: self.options.batch_size] for name, value in inputs.items()}
            program, fixed_reason = trace(part, inputs, dynamic=False)
            if program is None:
                raise UserError(f"The {part.name} of {self._name(part)} can't be exported: {fixed_reason}.")
        axes = part.axes() if reason is None else None
        run = (
            self._write_torch(part, program, path)
            if kind == "torch"
            else self._write_onnx(part, program, inputs, axes, path)
        )
        tried = {name: value[: self.options.batch_size] for name, value in inputs.items()}
        batches = [tried] if axes is None else [tried, {n: torch.cat([z, z[:1]]) for n, z in tried.items()}]
        entry = _compare(part, run, batches, self.options.tolerance)
        entry["batch"] = "any" if axes is not None else self.options.batch_size
        return entry if reason is None else entry | {"batch_fixed_because": reason}

    def _write_torch(self, part: Part, program: ExportedProgram, path: Path) -> Callable[[Latents], Latents]:
        with quiet():
            written = io.BytesIO()  # if torch writes the file itself, a full disk aborts the process
            torch.export.save(prune(program), written)
            path.write_bytes(written.getvalue())
            loaded = torch.export.load(path).module()

        def run(given: Latents) -> Latents:
            outputs: Latents = loaded(*part.arguments(given))
            return outputs

        return run

    def _write_onnx(
        self, part: Part, program: ExportedProgram, inputs: Latents, axes: Any, path: Path
    ) -> Callable[[Latents], Latents]:
        import onnxruntime

        with torch.no_grad():
            outputs = list(part.module(*part.arguments(inputs)))
        try:
            with quiet():
                made = torch.onnx.export(
                    program,
                    part.arguments(inputs),
                    dynamo=True,
                    dynamic_shapes=axes,
                    input_names=list(inputs),
                    output_names=outputs,
                    verbose=False,
                )
                assert made is not None
                made.save(path)
        except Exception as error:
            raise UserError(
                f"The {part.name} of {self._name(part)} can't be turned into ONNX: {summarize_error(error)}; "
                "--format torch needs no ONNX."
            ) from error
        try:
            session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise UserError(
                f"onnxruntime can't run the {part.name} of {self._name(part)}: {summarize_error(error)}."
            ) from error

        def run(given: Latents) -> Latents:
            results = session.run(outputs, {name: value.numpy() for name, value in given.items()})
            return {name: torch.from_numpy(result) for name, result in zip(outputs, results, strict=True)}

        return run

    def _name(self, part: Part) -> str:
        return type(part.module.model).__name__

    def _publish(
        self, stage: Path, files: dict[str, dict[str, Any]], model: VideoAutoencoder, shape: tuple[int, ...]
    ) -> None:
        """Move the programs into place; the manifest is written last and marks a complete export."""
        self.folder.mkdir(exist_ok=True)
        for name in FILES:
            old = self.folder / name
            shutil.rmtree(old) if old.is_dir() else old.unlink(missing_ok=True)
        for path in sorted(stage.iterdir()):
            agrees = files[path.name.removesuffix(".data")]["agrees"]
            target = self.folder if agrees else self.folder / FAILED
            target.mkdir(exist_ok=True)
            path.rename(target / path.name)
        sha256 = weights.sha256(model.state_dict())
        described = hub.describe(model, sha256)
        preprocessing = described["preprocessing"] | {"num_frames": shape[1], "resolution": shape[2]}
        used = ["torch", *(ONNX if "onnx" in self.options.formats else ())]
        manifest = {
            "format_version": FORMAT_VERSION,
            **{key: described[key] for key in ("class_path", "init_args", "weights_sha256")},
            "preprocessing": preprocessing,
            "versions": {"vidtwin": described["vidtwin_version"]} | {name: version(name) for name in used},
            "tolerance": self.options.tolerance,
            "files": {name if entry["agrees"] else f"{FAILED}/{name}": entry for name, entry in files.items()},
        }
        write_text(self.folder / MANIFEST, json.dumps(manifest, indent=2) + "\n")


def _draw_clips(count: int, shape: tuple[int, ...]) -> Tensor:
    """Draw clips (count, 3, T, H, W) in [-1, 1], the same at each call."""
    return torch.rand((count, *shape), generator=torch.Generator().manual_seed(0)) * 2 - 1


@torch.no_grad()
def _compare(part: Part, run: Callable[[Latents], Latents], batches: list[Latents], tolerance: float) -> dict[str, Any]:
    """Compare a program's outputs with the model's → its entry in the manifest."""
    far: dict[str, float] = {}
    agrees = True
    for inputs in batches:
        expected, got = part.module(*part.arguments(inputs)), run(inputs)
        for name, wanted in expected.items():
            given = got[name]
            same = given.shape == wanted.shape and given.dtype == wanted.dtype
            if not same:
                distance, within = float("inf"), False
            elif name.endswith(CODES):  # share of differing codes
                distance = float((given != wanted).double().mean())
                within = distance <= _CODES_THAT_MAY_DIFFER
            else:
                difference = (given.double() - wanted.double()).abs()
                if f"{name}{CODES}" in expected:  # vectors of differing codes differ too
                    same_code = got[f"{name}{CODES}"] == expected[f"{name}{CODES}"]
                    difference = difference.movedim(1, -1)[same_code]
                distance = float(difference.max()) if difference.numel() else 0.0
                within = distance <= tolerance * max(1.0, float(wanted.abs().max()))
            far[name] = max(far.get(name, 0.0), math.inf if math.isnan(distance) else distance)
            agrees = agrees and within
    return {
        "inputs": {name: _describe(value) for name, value in batches[0].items()},
        "outputs": {name: _describe(value) for name, value in expected.items()},
        "difference": {name: value if math.isfinite(value) else None for name, value in far.items()},
        "agrees": agrees,
    }


def _describe(value: Tensor) -> dict[str, Any]:
    return {"shape": ["batch", *value.shape[1:]], "dtype": str(value.dtype).removeprefix("torch.")}


def _summarize(entry: dict[str, Any]) -> str:
    batch = "any number of clips" if entry["batch"] == "any" else f"{entry['batch']} clips at a time"
    far = ", ".join(f"{name} {_format_distance(name, value)}" for name, value in entry["difference"].items())
    return f"{batch}; largest difference to the model: {far}{'' if entry['agrees'] else '  DOES NOT AGREE'}"


def _format_distance(name: str, value: float | None) -> str:
    if value is None:
        return "infinite"
    return f"{value:.2%} of the codes" if name.endswith(CODES) else f"{value:.2g}"
