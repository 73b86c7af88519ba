"""Generate videos: sample latents by a diffusion model, decode them, write the videos, a picture and a manifest."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from vidtwin import __version__, plugins, weights
from vidtwin.apply.inputs import check_targets
from vidtwin.apply.options import GenerateOptions, SessionOptions
from vidtwin.apply.outputs import write_png
from vidtwin.apply.session import Session
from vidtwin.console import Progress
from vidtwin.diffusion.codebooks import snap
from vidtwin.diffusion.model import LatentDiffusion, draw_noise
from vidtwin.diffusion.process import Process
from vidtwin.distributed import forward_context
from vidtwin.errors import UserError, few
from vidtwin.files import inside, write_text
from vidtwin.storage import checkpoints, diffusion
from vidtwin.video import Frames, panels, write_video

MANIFEST, GRID = "samples.json", "grid.png"
_SHOWN = 8  # samples of each class in the picture
_CLASSES_SHOWN = 12
_UNLABELLED = "sample"


@dataclass(frozen=True)
class Sample:
    """A video to generate.

    Attributes:
        label: Its class, -1 without.
        class_name: The class's name.
        index: Its number in the class.
        file: Path below the folder of outputs.
    """

    label: int
    class_name: str
    index: int
    file: str


class Sampler:
    """A diffusion model with its autoencoder on the device of this process.

    Args:
        path: Checkpoint of the diffusion model.
        session: Of its autoencoder.
        model: The diffusion model.
        held: The checkpoint's `diffusion`.
    """

    def __init__(self, path: str, session: Session, model: LatentDiffusion, held: dict[str, Any]) -> None:
        self.path, self.session, self.held = path, session, held
        self.model = model.to(session.fabric.device).requires_grad_(False)
        self.classes: list[str] = held["classes"]
        # A decoder of its teacher's latents has codebooks of its own, of which those are not.
        self.codebooks = held["autoencoder"]["weights_sha256"] == session.weights_sha256

    @torch.inference_mode()
    def sample(
        self,
        labels: list[int],
        indices: list[int],
        seed: int,
        guidance: float | None = None,
        steps: int | None = None,
        report: Any = lambda: None,
    ) -> list[Frames]:
        """Sample clips uint8 (T, H, W, 3), each from the noise of (seed, label, index)."""
        device = self.session.fabric.device
        words = [(seed, label + 1, index) for label, index in zip(labels, indices, strict=True)]
        noise = draw_noise(self.model.numbers, words).to(device)
        weight = self.held["guidance"] if guidance is None else guidance
        with forward_context(self.session.fabric, self.session.precision):
            latents = self.model.sample(
                torch.tensor(labels, device=device), noise, weight, steps or self.held["steps"], report
            )
        height, width = self.held["size"]
        if self.codebooks:
            latents = snap(self.session.model, latents, (3, self.held["num_frames"], height, width))
        return list(self.session.decode(latents, height, width, self.held["num_frames"]).wait().numpy())


def load_sampler(options: GenerateOptions) -> Sampler:
    """Load a diffusion model and the autoencoder of its latents; raise `UserError` if it is another one."""
    path = str(options.ckpt_path)
    model, held = diffusion.load(path, options.use_ema)
    stored = held["autoencoder"]
    named = options.autoencoder or str(stored["checkpoint"])
    if not named.startswith("hf://") and not Path(named).exists():
        raise UserError(
            f"Expected the autoencoder that {path} names at {named}, got none; give --autoencoder PATH of "
            f"{stored['class_path'].rpartition('.')[2]} {stored['weights_sha256'][:8]}."
        )
    content = checkpoints.read(named, lazily=True)
    session = Session(
        SessionOptions(
            named,
            None,
            bool(stored.get("use_ema")) and "ema" in content,  # a folder of weights may hold the averaged ones
            options.accelerator,
            options.devices,
            options.num_nodes,
            options.precision,
        )
    )
    ours, theirs = session.weights_sha256, stored["weights_sha256"]
    taught = (content.get("teacher") or {}).get("weights_sha256")  # a decoder of the latents of its teacher
    if theirs not in (ours, taught):
        raise UserError(
            f"Expected the autoencoder {stored['class_path'].rpartition('.')[2]} {theirs[:8]}, whose latents {path} "
            f"generates, got {type(session.model).__name__} {ours[:8]} at {named}; give the weights that encoded."
        )
    return Sampler(path, session, model, held)


class Generator:
    """Generate videos; see `GenerateOptions`."""

    def __init__(self, options: GenerateOptions) -> None:
        self.options = options
        self.out = Path(str(options.out))
        held = diffusion.describe(checkpoints.read(str(options.ckpt_path), lazily=True), str(options.ckpt_path))
        names = split_names(options.class_name or "", held["classes"])
        self.samples = list_samples(held["classes"], names, options.num)
        if not held["classes"] and options.guidance not in (None, 1):
            raise UserError(
                f"Expected no --guidance for a model without classes, got {options.guidance}; leave it out."
            )
        names = [*(sample.file for sample in self.samples), GRID, MANIFEST]
        check_targets([inside(self.out, name) for name in names], overwrite=options.overwrite)
        if options.steps is not None:
            plugins.build(held["process"], Process).check_steps(options.steps)
        self.sampler = load_sampler(options)
        self.session = self.sampler.session

    def run(self) -> int:
        """Write the videos, the picture and, when all are written, the manifest → exit code."""
        session, options = self.session, self.options
        if session.is_main:
            (self.out / MANIFEST).unlink(missing_ok=True)  # a folder with one is complete
        session.fabric.barrier()
        steps = options.steps or self.sampler.held["steps"]
        size = options.batch_size
        batches = [self.samples[first : first + size] for first in range(0, len(self.samples), size)]
        mine = batches[session.rank :: session.world_size]
        shown: dict[str, Frames] = {}

        def compute(batch: list[Sample]) -> list[Frames]:
            # A batch is always full: products of matrices round by the number of their rows.
            padded = [*batch, *[batch[-1]] * (size - len(batch))]
            return self.sampler.sample(
                [sample.label for sample in padded],
                [sample.index for sample in padded],
                options.seed,
                options.guidance,
                steps,
                lambda: bar.update(len(batch) / steps),
            )

        def write(batch: list[Sample], results: Iterator[list[Frames]]) -> None:
            for clips in results:
                for sample, clip in zip(batch, clips, strict=False):
                    write_video(inside(self.out, sample.file), clip, self.fps)
                    if sample.index < _SHOWN:
                        shown[sample.file] = clip[[len(clip) // 2]]

        with Progress(sum(map(len, mine)), "generating", "clips", session.is_main and options.progress) as bar:
            session.run(mine, lambda batch: [batch], compute, write)
        for others in session.gather(shown):
            shown |= others
        if session.is_main:
            write_png(self.out / GRID, draw(self.samples, shown))
            write_text(self.out / MANIFEST, json.dumps(self._manifest(steps), indent=1) + "\n")
        session.fabric.barrier()
        session.say(f"{len(self.samples):,} videos, {GRID} and {MANIFEST} -> {self.out}")
        return 0

    @property
    def fps(self) -> Fraction:
        """Frames per second of the videos."""
        return Fraction(self.options.fps or self.sampler.held["fps"]).limit_denominator(1001)

    def _manifest(self, steps: int) -> dict[str, Any]:
        held, options = self.sampler.held, self.options
        guidance = held["guidance"] if options.guidance is None else options.guidance
        return {
            "schema_version": 1,
            "vidtwin": __version__,
            "checkpoint": self.sampler.path,
            "weights_sha256": weights.sha256(self.sampler.model.state_dict()),
            "use_ema": held["use_ema"],
            "autoencoder": {
                "checkpoint": self.session.checkpoint,
                "weights_sha256": self.session.weights_sha256,
                "class_path": self.session.model.class_path,
            },
            "process": held["process"],
            "guidance": guidance,
            "steps": steps,
            "seed": options.seed,
            "batch_size": options.batch_size,
            "precision": options.precision,
            "device": self.session.fabric.device.type,
            "num_frames": held["num_frames"],
            "size": held["size"],
            "fps": str(self.fps),
            "samples": [
                {
                    "file": sample.file,
                    "class": sample.class_name,
                    "label": sample.label,
                    "seed": [options.seed, sample.label + 1, sample.index],
                }
                for sample in self.samples
            ],
        }


def split_names(text: str, classes: list[str]) -> list[str]:
    """Split names of classes at commas, each once; of commas that are in a class's name too, the longest name wins."""
    parts, names = text.split(","), []
    while parts:
        lengths = range(len(parts), 0, -1)
        length = next((n for n in lengths if ",".join(parts[:n]).strip() in classes), 1)
        names.append(",".join(parts[:length]).strip())
        parts = parts[length:]
    return list(dict.fromkeys(name for name in names if name))


def list_samples(classes: list[str], names: list[str], num: int) -> list[Sample]:
    """List the videos to generate: `num` of each of the named classes, or of all; raise `UserError` for another."""
    if names and not classes:
        raise UserError(f"Expected no --class_name for a model without classes, got {names[0]}; leave it out.")
    unknown = [name for name in names if name not in classes]
    if unknown:
        near = get_close_matches(unknown[0], classes, n=3, cutoff=0.5)
        advice = f"did you mean {' or '.join(near)}?" if near else f"the model knows {few(classes)}."
        raise UserError(f"Expected classes of the training data, got {unknown[0]!r}; {advice}")
    digits = max(4, len(str(num - 1)))
    wanted = [(classes.index(name), name) for name in names or classes] or [(-1, _UNLABELLED)]
    return [
        Sample(label, name, index, f"{name}/{index:0{digits}d}.mp4") for label, name in wanted for index in range(num)
    ]


def draw(samples: list[Sample], shown: dict[str, Frames]) -> Frames:
    """Draw the middle frame of the first samples of each class in a row: (H, W, 3)."""
    rows: dict[str, dict[str, Frames]] = {}
    for sample in samples:
        if sample.file in shown:
            rows.setdefault(sample.class_name, {})[f"{sample.class_name} {sample.index}"] = shown[sample.file]
    return panels.grid(list(rows.values())[:_CLASSES_SHOWN])[0]
