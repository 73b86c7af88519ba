"""Share options between the commands on videos. Imports no torch, so that `--help` and refusals are quick."""

import importlib.util
import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from vidtwin.apply.export_files import FILES, ONNX
from vidtwin.apply.inputs import check_folder
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

T = TypeVar("T")
# Config → its `class_path` and `init_args`, and a function that builds the autoencoder. With `source`, the file of
# others that names the config, its classes have to be trusted.
ReadModel = Callable[..., tuple[dict[str, Any], Callable[[], Any]]]


@dataclass
class SessionOptions:
    """Choose the weights and the devices.

    Args:
        ckpt_path: Trained weights: a checkpoint of `vidtwin fit`, a folder that `save_pretrained` or `vidtwin convert`
            wrote, or hf://OWNER/NAME. If their class is of a module of your own, give --trust_module MODULE, too.
        config: Config of `fit` with the autoencoder; by default the model that is saved with the weights.
        use_ema: Take the averaged weights of a checkpoint.
        accelerator: As in Lightning: auto, cpu, cuda, ….
        devices: Number of devices, or their indices; each runs a process with its share of the work.
        num_nodes: Number of machines, each with this many devices.
        precision: Precision of the model.
        compile: Compile the model's blocks by torch.compile in this mode; the first windows of each size take seconds
            to minutes longer. reduce-overhead replays CUDA graphs on a GPU, and is the default mode on a CPU.
        compile_backend: Backend of torch.compile; aot_eager writes no kernels (to look for faults).
        read_model: Reads the model of `config`; set by the command line.
    """

    ckpt_path: str | None = None
    config: str | None = None
    use_ema: bool = False
    accelerator: str = "auto"
    devices: int | list[int] | str = 1
    num_nodes: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed", "64-true"] = "32-true"
    compile: Literal["default", "reduce-overhead", "max-autotune-no-cudagraphs", "max-autotune"] | None = None
    compile_backend: str = "inductor"
    read_model: ReadModel | None = None

    def check(self) -> None:
        """Raise `UserError` if no weights are given."""
        if not self.ckpt_path:
            raise UserError("Expected trained weights, got none; give --ckpt_path PATH.")


@dataclass
class EncodeOptions:
    """Options of the encoding.

    Args:
        inputs: Video files, folders, globs.
        out: Folder of the latents.
        size: Side of the square that pictures are cropped and resized to; by default the model's own, or the whole
            picture for models of any size.
        posterior: Part of Gaussian latents to store: the mean, or moments, which are mean and log-variance.
        dtype: Type of continuous latents; codes have the smallest type that holds them.
        clips_per_shard: Windows per shard, held in memory until it is written.
        batch_size: Windows per forward pass.
        labels: Take the folder of a video as its class.
        overwrite: Begin anew if the folder holds latents, these or others.
        progress: Show a progress bar.
    """

    inputs: list[str]
    out: str
    size: int | None = None
    posterior: Literal["mean", "moments"] = "mean"
    dtype: Literal["float32", "float16", "bfloat16"] = "float32"
    clips_per_shard: int = 256
    batch_size: int = 8
    labels: Literal["folders", "none"] = "none"
    overwrite: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        for name in ("clips_per_shard", "batch_size"):
            if getattr(self, name) < 1:
                raise UserError(f"Expected --{name} of at least 1, got {getattr(self, name)}.")


@dataclass
class DecodeOptions:
    """Options of the decoding.

    Args:
        out: Folder of the videos.
        batch_size: Windows per forward pass.
        overwrite: Replace existing videos.
        skip_existing: Leave out existing videos.
        progress: Show a progress bar.
    """

    out: str
    batch_size: int = 8
    overwrite: bool = False
    skip_existing: bool = False
    progress: bool = True

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise UserError(f"Expected --batch_size of at least 1, got {self.batch_size}.")
        if self.overwrite and self.skip_existing:
            raise UserError("Expected --overwrite or --skip_existing, got both.")


@dataclass
class GenerateOptions:
    """Choose the diffusion model, what it generates, and the devices.

    Args:
        ckpt_path: Checkpoint of a diffusion model.
        out: Folder of the videos.
        class_name: Classes, separated by commas, which may be in their names too; by default all.
        num: Number of videos of each class.
        seed: Seed of their noise.
        guidance: Weight of the class, 1 for none; by default that of the training.
        steps: Steps of sampling; by default those of the training.
        batch_size: Videos that are sampled together.
        use_ema: Take the averaged weights; by default if the checkpoint has them.
        autoencoder: Weights of the autoencoder that decodes, if they are not at the path in the checkpoint.
        fps: Frames per second of the videos; by default those of the training clips.
        overwrite: Replace existing videos.
        progress: Show a progress bar.
        accelerator: As in Lightning: auto, cpu, cuda, ….
        devices: Number of devices, or their indices; each runs a process with its share of the videos.
        num_nodes: Number of machines, each with this many devices.
        precision: Precision of the transformer and the autoencoder.
    """

    ckpt_path: str | None = None
    out: str | None = None
    class_name: str | None = None
    num: int = 16
    seed: int = 0
    guidance: float | None = None
    steps: int | None = None
    batch_size: int = 8
    use_ema: bool | None = None
    autoencoder: str | None = None
    fps: float | None = None
    overwrite: bool = False
    progress: bool = True
    accelerator: str = "auto"
    devices: int | list[int] | str = 1
    num_nodes: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"

    def __post_init__(self) -> None:
        if not self.ckpt_path:
            raise UserError("Expected a trained diffusion model, got none; give --ckpt_path PATH.")
        if not self.out:
            raise UserError("Expected a folder to write to, got none; give --out DIR.")
        check_counts(num=self.num, batch_size=self.batch_size, steps=self.steps)
        if self.seed < 0:
            raise UserError(f"Expected --seed of at least 0, got {self.seed}.")
        if self.fps is not None and not 0 < self.fps < math.inf:
            raise UserError(f"Expected a finite --fps above 0, got {self.fps}.")
        if self.guidance is not None and not math.isfinite(self.guidance):
            raise UserError(f"Expected a finite --guidance, got {self.guidance}.")


@dataclass
class ExportOptions:
    """Choose the model and the programs to export.

    Args:
        ckpt_path: Trained weights: a checkpoint of `vidtwin fit`, a folder that `save_pretrained` or `vidtwin convert`
            wrote, or hf://OWNER/NAME.
        out: Folder for the programs.
        format: torch (.pt2), onnx, or both.
        use_ema: Take the averaged weights of a checkpoint.
        num_frames: T of the clips; by default the model's own, or one near 16.
        resolution: H = W of the clips, if the model fixes none; by default 256.
        batch_size: B of the random clips of the comparison, and of programs with a fixed B.
        tolerance: Maximum difference between a program and the model, relative to the largest number (at least 1).
        overwrite: Replace the programs in `out`.
    """

    ckpt_path: str | None = None
    out: str | None = None
    format: Literal["torch", "onnx", "both"] = "torch"
    use_ema: bool = False
    num_frames: int | None = None
    resolution: int | None = None
    batch_size: int = 2
    tolerance: float = 1e-3
    overwrite: bool = False

    def __post_init__(self) -> None:
        if not self.ckpt_path:
            raise UserError("Expected trained weights, got none; give --ckpt_path PATH.")
        if not self.out:
            raise UserError("Expected a folder to write to, got none; give --out DIR.")
        check_counts(num_frames=self.num_frames, resolution=self.resolution, batch_size=self.batch_size)
        if not 0 < self.tolerance < 1:
            raise UserError(f"Expected --tolerance between 0 and 1, got {self.tolerance}.")

    @property
    def formats(self) -> list[Literal["torch", "onnx"]]:
        return ["torch", "onnx"] if self.format == "both" else [self.format]

    def check(self) -> None:
        """Raise `UserError` if libraries or weights are missing, or files of an export exist."""
        if "onnx" in self.formats and (missing := [name for name in ONNX if importlib.util.find_spec(name) is None]):
            raise UserError(f"Expected {', '.join(missing)} for --format onnx; pip install 'vidtwin[export]'.")
        folder = Path(str(self.out))
        check_folder(folder)
        there = [name for name in FILES if (folder / name).exists()]
        if there and not self.overwrite:
            raise UserError(f"Expected no {there[0]} in {folder}; give --overwrite to replace the files.")
        check_weights(self.ckpt_path)


def add_class_options(parser: "ArgumentParser", *classes: type) -> None:
    """Turn the arguments of `classes` into options; `inputs` becomes positional."""
    for cls in classes:
        bare = {"inputs"} & set(inspect.signature(cls).parameters)
        if bare:
            parser.add_argument("inputs", nargs="+", metavar="IN", help="Videos: files, folders of them, globs.")
        parser.add_class_arguments(cls, fail_untyped=False, skip={*bare, "read_model"})


def build(cls: type[T], options: "Namespace") -> T:
    """Build `cls` from the options that are its arguments."""
    return cls(**{name: options[name] for name in inspect.signature(cls).parameters if name in options})


def check_counts(**counts: int | None) -> None:
    """Raise `UserError` for an option that is below 1; None is allowed."""
    for name, count in counts.items():
        if count is not None and count < 1:
            raise UserError(f"Expected --{name} of at least 1, got {count}.")


def check_weights(path: str | None, wanted: str = "a checkpoint, a folder of weights or hf://owner/name") -> None:
    """Raise `UserError` if `path` names a file or folder that does not exist; `wanted` says which forms it may have."""
    if path and not path.startswith("hf:") and not Path(path).exists():
        place = Path(path)
        beside = sorted(p.name for p in place.parent.glob(f"*{place.suffix or '*'}") if p.is_file())[:5]
        among = f"; in its folder are {', '.join(beside)}." if beside else "."
        raise UserError(f"Expected {wanted}, got none at {path}{among}")


def exit_code(done: int, failed: int) -> int:
    """Return 0 if all succeeded, 1 if a part failed, 2 if nothing succeeded."""
    if not failed:
        return 0
    return 1 if done else 2
