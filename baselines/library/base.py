"""The adapter of an autoencoder of diffusers or transformers to the interface.

    clip ── library's encoder ──> mean, log-variance ── (z − shift) / scale ──> latent
    latent ── z · scale + shift ── library's decoder ──> clip

A subclass names the library's class, and says how a clip's length and size become the latent's. The base class builds
the library's class, standardizes the latent as the library's generators do, holds every result to the shape that was
promised, and loads official weights. The library is imported when a model is built.
"""

import inspect
import json
from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from functools import partial
from importlib import import_module, metadata
from pathlib import Path
from typing import Any, ClassVar, Self

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vidtwin import weights
from vidtwin.autoencoder import TemporalSpec, VideoAutoencoder
from vidtwin.errors import UserError, suggestion
from vidtwin.posteriors import Deterministic, Encoding, Latents, Posterior, StandardizedGaussian

EXTRA = "vidtwin[library]"
# The versions that the extra installs at least, which have every class that an adapter names.
VERSIONS = {"diffusers": "0.42", "transformers": "5.23"}
# Switches of diffusers' classes that split a clip into tiles, whose borders show, or into clips.
_TILING = ("use_tiling", "use_slicing", "use_framewise_encoding", "use_framewise_decoding")


class LibraryAutoencoder(VideoAutoencoder):
    """Base class of the adapters.

    Args:
        arguments: Arguments of the library's class by name. Those left out have the library's default, as a rule the
            official model's.
        activation_checkpointing: Recompute the library's blocks in the backward pass: less memory, more time.

    Attributes:
        model: The library's model.
        time: Frames per step of the latent.
        space: Pixels per place of the latent, in height and in width.
        channels: Channels of the latent.
        minimum_side: Pixels that height and width have at least.
        library_class: Import path of the library's class.
        last_weight: Name of the last weight before the pixels in the library's model.
        causal: Whether clips have 1 + k·time frames, of which the first is a step by itself, or k·time.
        cache_attribute: Name under which the library's layers keep frames of a clip from one call to the next.
        pads_time: Whether the library's convolutions pad time themselves.

    Raises:
        UserError: The library is missing, or refuses the arguments.
    """

    latent_names: ClassVar[tuple[str, ...]] = ("latent",)
    library_class: ClassVar[str]
    last_weight: ClassVar[str] = "decoder.conv_out.conv.weight"
    causal: bool = True
    cache_attribute: ClassVar[str | None] = None
    pads_time: ClassVar[bool] = False

    def __init__(self, arguments: dict[str, Any] | None = None, activation_checkpointing: bool = False) -> None:
        super().__init__()
        self.model = self._build(arguments or {})
        for switch in _TILING:
            if hasattr(self.model, switch):
                setattr(self.model, switch, False)
        if activation_checkpointing:
            self._enable_checkpointing()
        self.time, self.space = self._read_factors(self.model.config)
        self.channels = self._count_channels(self.model.config)
        self.spatial_multiple = self.minimum_side = self.space
        self.temporal = (
            TemporalSpec(multiple=self.time, offset=1, pad="last")
            if self.causal
            else TemporalSpec(multiple=self.time, minimum=self.time, pad="last")
        )
        shift, scale = self._read_scaling(self.model.config)
        self.register_buffer("shift", shift, persistent=False)
        self.register_buffer("scale", scale, persistent=False)

    # To be implemented by an adapter.

    @abstractmethod
    def _read_factors(self, config: Any) -> tuple[int, int]:
        """Return (frames per step, pixels per place) of a model with these arguments."""

    def _count_channels(self, config: Any) -> int:
        return int(config.latent_channels)

    def _run_encoder(self, clip: Tensor) -> tuple[Tensor, Tensor | None]:
        """Encode (B, 3, T, H, W) by the library → mean and log-variance (None: no noise), each (B, C, T', h, w)."""
        posterior = self.model.encode(clip).latent_dist
        return posterior.mean, posterior.logvar

    def _run_decoder(self, latent: Tensor) -> Tensor:
        """Decode (B, C, T', h, w) by the library → (B, 3, T, H, W)."""
        decoded: Tensor = self.model.decode(latent).sample
        return decoded

    def _clear_caches(self) -> None:
        """Remove what the library's model keeps of a clip, after each call and after an exception."""
        if self.cache_attribute is not None:
            for module in _find_caching(self.model, self.cache_attribute):
                setattr(module, self.cache_attribute, None)

    def _enable_checkpointing(self) -> None:
        if not getattr(self.model, "_supports_gradient_checkpointing", False):
            name = type(self.model).__name__
            raise UserError(
                f"Expected activation_checkpointing false for {name}, which does not support it, got true; remove it."
            )
        function = partial(_checkpoint_module, self.cache_attribute) if self.cache_attribute is not None else None
        self.model.enable_gradient_checkpointing(function)

    def _read_scaling(self, config: Any) -> tuple[Tensor, Tensor]:
        """Return shift and scale of the latent, each broadcast to (B, C, T', h, w)."""
        values = {"latents_mean": 0.0, "latents_std": 1.0}
        tensors = []
        for name, default in values.items():
            given = getattr(config, name, None)
            given = [default] if given is None else list(given)
            if len(given) not in (1, self.channels):
                raise UserError(
                    f"Expected {name} of {self.channels} numbers, one per channel of the latent, got {len(given)}; "
                    f"give {name} in arguments."
                )
            tensors.append(torch.tensor(given, dtype=torch.float32).view(1, -1, 1, 1, 1))
        shift, scale = tensors
        if (offset := getattr(config, "shift_factor", None)) is not None:
            shift = shift + offset
        return shift, scale / (getattr(config, "scaling_factor", None) or 1.0)

    def _get_scaling(self, steps: int) -> tuple[Tensor, Tensor]:
        """Return shift and scale for a latent of `steps` steps."""
        shift, scale = self.shift, self.scale
        assert isinstance(shift, Tensor)
        assert isinstance(scale, Tensor)
        return shift, scale

    # Shared by all adapters.

    def check_clip(self, clip: Tensor) -> None:
        """Raise `UserError` unless the model takes `clip`, of at least `minimum_side` pixels in height and width."""
        super().check_clip(clip)
        if min(clip.shape[3:]) < self.minimum_side:
            raise UserError(
                f"Expected a clip of at least {self.minimum_side} pixels in height and width for "
                f"{type(self).__name__}, got {tuple(clip.shape)}; set data.resolution accordingly."
            )

    @property
    def last_layer(self) -> nn.Parameter:
        return self.model.get_parameter(self.last_weight)

    def _encode(self, clip: Tensor) -> Encoding:
        with self._call_library(clip.shape[2], clip.device):
            mean, logvar = self._run_encoder(clip)
        shape = self._latent_shapes((3, *clip.shape[2:]))["latent"]
        self._check_shape("encode", mean, (clip.shape[0], *shape))
        return Encoding(latent=self._make_posterior(mean, logvar))

    def _make_posterior(self, mean: Tensor, logvar: Tensor | None) -> Posterior:
        shift, scale = self._get_scaling(mean.shape[2])
        if logvar is None:
            return Deterministic((mean - shift) / scale)
        return StandardizedGaussian(mean, logvar, shift, scale)

    def _decode(self, latents: Latents) -> Tensor:
        latent = latents["latent"]
        if latent.ndim != 5 or latent.shape[1] != self.channels:
            raise UserError(f"Expected a latent of shape (B, {self.channels}, T', h, w), got {tuple(latent.shape)}.")
        batch, _, steps, height, width = latent.shape
        shift, scale = self._get_scaling(steps)
        frames = self._count_frames(steps)
        with self._call_library(frames, latent.device):
            decoded = self._run_decoder(latent * scale + shift)
        shape = (batch, 3, frames, height * self.space, width * self.space)
        self._check_shape("decode", decoded, shape)
        # In training the test would make the host wait for the device in each step.
        if not (self.training or decoded.is_meta or torch.compiler.is_compiling()):
            low, high = decoded.detach().aminmax()
            if low == high:
                raise UserError(
                    f"Expected {type(self.model).__name__} to decode a picture, got {float(low):g} in every pixel; its "
                    "weights or arguments do not fit it."
                )
        return decoded

    def _latent_shapes(self, clip_shape: tuple[int, int, int, int]) -> dict[str, tuple[int, ...]]:
        _, frames, height, width = clip_shape
        return {"latent": (self.channels, self._count_steps(frames), height // self.space, width // self.space)}

    def _count_steps(self, frames: int) -> int:
        return 1 + (frames - 1) // self.time if self.causal else frames // self.time

    def _count_frames(self, steps: int) -> int:
        return 1 + (steps - 1) * self.time if self.causal else steps * self.time

    def _check_shape(self, method: str, result: Tensor, expected: tuple[int, ...]) -> None:
        if tuple(result.shape) != expected:
            raise UserError(
                f"Expected {type(self.model).__name__}.{method} to give {expected}, got {tuple(result.shape)}; its "
                "arguments or the library's version do not fit this adapter."
            )

    @staticmethod
    def _check_codes(codes: Latents, size: int) -> Tensor:
        """Return the codes of the latent. Raises `UserError` unless they are integers (B, T', h, w) below `size`."""
        given = codes.get("latent")
        if set(codes) != {"latent"} or given is None or given.ndim != 4 or given.is_floating_point():
            got = {name: (tuple(code.shape), code.dtype) for name, code in codes.items()}
            raise UserError(f"Expected integer codes latent of shape (B, T', h, w), got {got}.")
        if ((given < 0) | (given >= size)).any():
            raise UserError(f"Expected latent codes in 0..{size - 1}, got {int(given.min())} to {int(given.max())}.")
        return given

    @contextmanager
    def _call_library(self, frames: int, device: torch.device) -> Iterator[None]:
        """Clear the caches after the block, and leave autocast if the library's layers would see two frames on a CPU.

        An exception must not spoil the next clip. On a CPU that computes in bfloat16, oneDNN returns unwritten memory
        as a convolution's weight gradient if it pads fewer frames than its kernel spans, but not one frame.
        """
        short = self.pads_time and device.type == "cpu" and 1 < frames < 3 * self.time
        try:
            with torch.autocast(device.type, enabled=False) if short else nullcontext():
                yield
        finally:
            self._clear_caches()

    # Construction and weights.

    @classmethod
    def _import_class(cls, path: str | None = None) -> Any:
        """Import the class at `path`, by default `library_class`."""
        module, _, name = (path or cls.library_class).rpartition(".")
        package = module.partition(".")[0]
        try:
            # A module is imported once, and its tensors are for all models to come: not on the device of this one.
            with torch.device("cpu"):
                return getattr(import_module(module), name)
        except (ImportError, AttributeError) as error:
            try:
                version = metadata.version(package)
            except metadata.PackageNotFoundError:
                raise UserError(
                    f"Expected the package {package}, got none installed; run pip install '{EXTRA}'."
                ) from error
            reason = " ".join(str(error).split())
            raise UserError(
                f"Expected {package} with {name}, as {VERSIONS[package]} has it, got {version} ({reason}); run pip "
                f"install '{EXTRA}'."
            ) from error

    @classmethod
    def _argument_names(cls, library: Any) -> list[str]:
        return [name for name in inspect.signature(library.__init__).parameters if name != "self"]

    @classmethod
    def _construct(cls, library: Callable[..., nn.Module], arguments: Mapping[str, Any]) -> nn.Module:
        return library(**arguments)

    @classmethod
    def _build(cls, arguments: Mapping[str, Any], path: str | None = None) -> Any:
        """Build the library's class at `path`, by default `library_class`."""
        library = cls._import_class(path)
        known = cls._argument_names(library)
        for name in arguments:
            if name not in known:
                raise UserError(f"Expected arguments of {library.__name__}, got {name!r}{suggestion(name, known)}")
        try:
            return cls._construct(library, arguments)
        except Exception as error:  # of any class: libraries check arguments by asserts and by failing
            reason = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"Expected arguments that {library.__name__} takes, got others: {reason}.") from error

    @classmethod
    def from_official(cls, path: str | Path, subfolder: str | None = None, revision: str | None = None) -> Self:
        """Load official weights in the library's form: config.json and .safetensors files. No code is run.

        Args:
            path: A folder, or an id on the Hugging Face Hub (owner/name), which is downloaded.
            subfolder: The model's folder inside of it, such as vae.
            revision: Branch, tag or commit on the Hub.

        Raises:
            UserError: Files are missing, or are those of another class or size.
        """
        folder = cls._find_folder(path, subfolder, revision)
        arguments, state = cls._read_official(folder)
        model = cls(arguments=arguments)
        model._load_official(model.model, state, folder)
        return model.eval()

    @staticmethod
    def _find_folder(path: str | Path, subfolder: str | None, revision: str | None) -> Path:
        folder = Path(path) if Path(path).is_dir() else _download(str(path), subfolder, revision)
        return folder / (subfolder or "")

    @classmethod
    def _read_official(cls, folder: Path, path: str | None = None) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Read arguments and tensors of the library's class at `path`, by default `library_class`."""
        config = _read_config(folder)
        library = cls._import_class(path)
        names = config.get("architectures") or [config.get("_class_name")]
        if library.__name__ not in names:
            raise UserError(f"Expected weights of {library.__name__} in {folder}, got those of {names[0]}.")
        known = cls._argument_names(library)
        state: dict[str, Tensor] = {}
        for file in _list_weights(folder):
            state |= weights.read(file)
        return {name: value for name, value in config.items() if name in known}, state

    @staticmethod
    def _load_official(model: nn.Module, state: dict[str, Tensor], folder: Path) -> None:
        weights.check_fit(state, model.state_dict(), str(folder))
        model.load_state_dict(state)


def checkpoint_with_caches(
    run: Callable[..., Any], arguments: tuple[Any, ...], read: Callable[[], Any], write: Callable[[Any], None]
) -> Any:
    """Checkpoint `run(*arguments)`, which reads and changes caches.

    The rerun in the backward pass starts with the caches that the first run found, and leaves those of that moment.

    Args:
        run: Block of the library.
        arguments: Passed to `run`.
        read: Return a copy of the caches.
        write: Set the caches to a copy.
    """
    before, reruns = read(), False

    def run_again(*arguments: Any) -> Any:
        nonlocal reruns
        if not reruns:
            reruns = True
            return run(*arguments)
        present = read()
        write(before)
        try:
            return run(*arguments)
        finally:
            write(present)

    return checkpoint(run_again, *arguments, use_reentrant=False)


def _find_caching(model: nn.Module, attribute: str) -> list[nn.Module]:
    return [module for module in model.modules() if hasattr(module, attribute)]


def _checkpoint_module(attribute: str, block: nn.Module, *arguments: Any) -> Any:
    """Checkpoint a block whose layers keep frames under `attribute`."""
    modules = _find_caching(block, attribute)

    def write(values: list[Any]) -> None:
        for module, value in zip(modules, values, strict=True):
            setattr(module, attribute, value)

    return checkpoint_with_caches(block, arguments, lambda: [getattr(module, attribute) for module in modules], write)


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / "config.json"
    if not path.is_file():
        inner = sorted(found.parent.name for found in folder.glob("*/config.json"))
        advice = f"give --subfolder {' or '.join(inner)}" if inner else "name the folder that has it"
        raise UserError(f"Expected official weights with config.json, got none in {folder}; {advice}.")
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise UserError(f"Expected JSON in {path}, got: {error}.") from error
    if not isinstance(config, dict):
        raise UserError(f"Expected an object in {path}, got {type(config).__name__}.")
    return config


def _list_weights(folder: Path) -> list[Path]:
    """List the .safetensors files of a folder, without variants such as *.fp16.safetensors."""
    files = sorted(path for path in folder.glob("*.safetensors") if "." not in path.stem)
    if not files:
        raise UserError(f"Expected .safetensors files in {folder}, got none; other formats may hold code.")
    return files


def _download(name: str, subfolder: str | None, revision: str | None) -> Path:
    prefix = f"{subfolder}/" if subfolder else ""
    try:
        return Path(
            snapshot_download(
                name, revision=revision, allow_patterns=[f"{prefix}config.json", f"{prefix}*.safetensors"]
            )
        )
    except Exception as error:  # errors of network, server and file system share no base class
        reason = " ".join(str(error).split()).partition(". ")[0].rstrip(".") or type(error).__name__
        raise UserError(f"Expected a folder or an id of the Hugging Face Hub, got {name}: {reason}.") from error
