"""Share options between the commands on videos. Imports no torch, so that `--help` and refusals are quick."""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeVar

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
        read_model: Reads the model of `config`; set by the command line.
    """

    ckpt_path: str | None = None
    config: str | None = None
    use_ema: bool = False
    accelerator: str = "auto"
    devices: int | list[int] | str = 1
    num_nodes: int = 1
    precision: Literal["32-true", "16-mixed", "bf16-mixed"] = "32-true"
    read_model: ReadModel | None = None

    def check(self) -> None:
        """Raise `UserError` if no weights are given."""
        if not self.ckpt_path:
            raise UserError("Expected trained weights, got none; give --ckpt_path PATH.")


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


def check_weights(path: str | None) -> None:
    """Raise `UserError` if `path` names a file or folder of weights that does not exist."""
    if path and not path.startswith("hf:") and not Path(path).exists():
        place = Path(path)
        beside = sorted(p.name for p in place.parent.glob(f"*{place.suffix or '*'}") if p.is_file())[:5]
        among = f"; in its folder are {', '.join(beside)}." if beside else "."
        raise UserError(f"Expected a file of weights, got none at {path}{among}")


def exit_code(done: int, failed: int) -> int:
    """Return 0 if all succeeded, 1 if a part failed, 2 if nothing succeeded."""
    if not failed:
        return 0
    return 1 if done else 2
