"""`vidtwin card`: the model card of a checkpoint, from what is known of it."""

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin.apply.inputs import check_folder
from vidtwin.apply.options import check_weights
from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "--ckpt_path PATH --out README.md [--results FOLDER] [options]"
DESCRIPTION = """\
Write the model card of a checkpoint: class, sizes, rate, training, and what a results folder has measured of it.

  vidtwin card --ckpt_path runs/vidtwin/checkpoints/last.ckpt --out README.md
  vidtwin card --ckpt_path my_vidtwin --results results --license mit --repo owner/name --out my_vidtwin/README.md

Nothing is written that is not known: without --results it has no quality and no limits, without logs in the run's
folder no curves, without --license it says that none is stated. The row of the results is the one of these weights. The
header is that of the Hugging Face Hub; in Python `model.push_to_hub("owner/name", card="README.md")` sends the card.
"""
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    text = str | None
    parser.add_argument(
        "--ckpt_path", type=str, required=True, help="A checkpoint, a folder of weights, or hf://OWNER/NAME."
    )
    parser.add_argument("--out", type=str, required=True, help="File to write; training_curves.png stands beside it.")
    parser.add_argument("--results", type=text, default=None, help="Folder that `vidtwin test` wrote.")
    parser.add_argument("--row", type=text, default=None, help="Row of these weights, if several are.")
    parser.add_argument("--repo", type=text, default=None, help="Name on the Hub, OWNER/NAME, for the examples.")
    parser.add_argument(
        "--license", type=text, default=None, help="The Hub's name of the weights' licence, such as mit."
    )
    parser.add_argument("--description", type=str, default="", help="Text in Markdown below the title.")
    parser.add_argument("--use_ema", type=bool, default=False, help="Describe the averaged weights of a checkpoint.")
    parser.add_argument("--config", type=text, default=None, help="Config with which a checkpoint was trained.")
    parser.add_argument("--overwrite", type=bool, default=False, help="Replace an existing card.")


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    out = Path(options.out)
    check_weights(options.ckpt_path)
    if out.is_dir():
        raise UserError(f"Expected a file for the card, got the folder {out}; give --out {out / 'README.md'}.")
    if out.exists() and not options.overwrite:
        raise UserError(f"Expected no card at {out}, got one; give --overwrite to replace it.")
    if options.license is not None and not _LICENSE.fullmatch(options.license):
        raise UserError(f"Expected the Hub's name of a licence, such as mit or cc-by-4.0, got {options.license!r}.")
    if options.row and not options.results:
        raise UserError(f"Expected --results with --row {options.row}, got none.")
    check_folder(out.parent)
    for path in write(options, out):
        sys.stdout.write(f"{path}\n")
    return 0


def write(options: "Namespace", out: Path) -> list[Path]:
    """Write the card, and the picture of the curves if there are logs → their paths."""
    from vidtwin import hub
    from vidtwin.apply.converter import record_training
    from vidtwin.benchmark import card, rows
    from vidtwin.benchmark.loaded_model import AVERAGE, LAST, fingerprint
    from vidtwin.cards import code, quote, training_section
    from vidtwin.files import write_text
    from vidtwin.storage import checkpoints

    source = options.ckpt_path
    results = rows.read(options.results) if options.results else None
    weights = AVERAGE if options.use_ema else LAST
    row = card.find_row(results, fingerprint(source), options.row, weights) if results else None
    model = checkpoints.load_autoencoder(source, options.use_ema)
    curves: dict[str, card.Curve] = {}
    if hub.is_pretrained(source):
        model.training_record = hub.read_config(hub.fetch(source), source).get("training") or {}
    else:
        path, config = Path(source), Path(options.config) if options.config else None
        held = checkpoints.read(path, lazily=True)
        model.training_record = record_training(held, path, options.use_ema, options.read_config, config)
        curves = card.read_curves(path.resolve().parent.parent)
    sections, metadata = [], dict[str, Any]()
    if results and row:
        sections += card.measured_sections(results, row)
        metadata |= card.metadata(results, row)
    else:
        sections.append("## Measured quality\n\nNot measured: `vidtwin test` does, `vidtwin card --results` shows it.")
    written = [out]
    if curves:
        written.append(out.with_name(card.CURVES))
        sections.append(card.write_curves(curves, written[-1]))
    sections.append("\n".join(training_section(model.training_record)))
    stated = f"{code(options.license)} (weights)." if options.license else "No licence is stated for these weights."
    sections.append(f"## Licence\n\n{stated}")
    if options.license:
        metadata["license"] = options.license
    repo = options.repo or Path(source).name
    folder = {"address": "pretrained", "checkpoint": quote(repo)} if Path(source).is_file() else {"address": repo}
    made = model.generate_model_card(
        **({"address": repo} if options.repo else folder),
        ckpt_path=f"{hub.HUB_PREFIX}{repo}" if options.repo else repo,
        description=options.description,
        sections=[section for section in sections if section],
        metadata={name: value for name, value in metadata.items() if value is not None},
    )
    write_text(out, str(made.content).rstrip() + "\n")
    return written
