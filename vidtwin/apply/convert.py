"""`vidtwin convert`: options. converter.py does the work and imports torch."""

import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from vidtwin.apply.inputs import check_folder
from vidtwin.apply.options import check_weights
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "IN OUT [--model NAME] [options]"
DESCRIPTION = """\
Turn weights into the folder that from_pretrained and --ckpt_path take: config.json, model.safetensors, README.md.

  vidtwin convert vidtwin_structure_7_7_8_dynamics_7_8.ckpt my_vidtwin
  vidtwin convert ivideogpt-oxe-64-act-free my_tokenizer --model ivideogpt
  vidtwin convert runs/vidtwin/checkpoints/last.ckpt my_vidtwin --use_ema

IN is one of
  a checkpoint of `vidtwin fit`, which holds the class and its arguments. A record of the training (steps, data, loss)
    is written to config.json, from the checkpoint and from config.yaml beside its folder, or --config; paths are
    reduced to their last part;
  released weights, of the class that --model names (by default vidtwin). Further options are the arguments of that
    class's from_official, such as --num_heads of vidtwin: `vidtwin convert --model NAME --help` lists them.

Exit code: 0 written, 2 failed, with OUT unchanged.
"""
_DEFAULT = "vidtwin"


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of all classes."""
    parser.add_argument(
        "places", nargs="*", metavar="IN OUT", help="Weights (a file or a folder), the folder to write."
    )
    parser.add_argument("--model", type=str | None, default=None, help=f"Class of released weights ({_DEFAULT}).")
    parser.add_argument("--use_ema", type=bool, default=False, help="Take the averaged weights of a checkpoint.")
    parser.add_argument("--config", type=str | None, default=None, help="Config with which a checkpoint was trained.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace the weights in OUT.")


def add_more_options(parser: "ArgumentParser", options: "Namespace", wants_help: bool) -> None:
    """Add the options of the class of weights, after all checks that do not import it."""
    if wants_help and options.model is None:
        return
    if not wants_help:
        if len(options.places) != 2:
            raise UserError(f"Expected `vidtwin convert IN OUT`, got {len(options.places)} of the two.")
        if options.places[0].startswith("hf:"):
            raise UserError(f"Expected a file or folder, got {options.places[0]}; --ckpt_path takes it as it is.")
        check_weights(options.places[0], "a checkpoint or released weights (a file or a folder)")
        _check_target(Path(options.places[1]), options.overwrite)
    from vidtwin.apply.converter import released_class, suggest_options

    if not wants_help and options.model is None and (wanted := suggest_options(Path(options.places[0]))):
        raise UserError(f"Expected the class of the weights in {options.places[0]}, got none; give {wanted}.")
    cls = released_class(options.model or _DEFAULT)
    parser.add_method_arguments(cls, "from_official", skip={"path"}, fail_untyped=False)


def run(options: "Namespace", unknown: Sequence[tuple[str, str]]) -> int:
    """Run the command → exit code."""
    from vidtwin.apply.converter import convert, released_class

    cls = released_class(options.model or _DEFAULT)
    names = inspect.signature(cls.from_official).parameters  # type: ignore[attr-defined]
    arguments = {name: options[name] for name in names if name in options}
    convert(options, cls, arguments, [name for name, _ in unknown])
    return 0


def _check_target(out: Path, overwrite: bool) -> None:
    if not out.exists():
        check_folder(out)
        return
    if not out.is_dir():
        raise UserError(f"Expected OUT to be a folder, got the file {out}.")
    from vidtwin import hub

    held = sorted(path.name for path in out.iterdir())
    if not held:
        return
    if not set(held) & {hub.CONFIG, hub.WEIGHTS}:
        raise UserError(f"Expected OUT to be new or a folder of weights, got {out} with {', '.join(held[:3])}.")
    if not overwrite:
        raise UserError(
            f"Expected OUT to be a new folder, got {out} with weights in it; give --overwrite to replace them."
        )
