"""`vidtwin study make`: the page of a rating study, from a results folder alone."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING

from vidtwin.errors import UserError

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "--results FOLDER --out FOLDER [options]"
DESCRIPTION = """\
Make a blinded rating study of the clips that a results folder keeps for its players.

  vidtwin test --config configs/benchmark/demo.yaml --random_players 8 --player_side 224
  vidtwin study make --results runs/benchmark/results --out study

OUT/page.html is for the raters: one file that opens from disk and asks the network for nothing. It names no model; each
rater's number gives an order of its own; some items check attention. Answers stay in the rater's browser until they are
saved as a file. OUT/key.json says which item is of which model: keep it to yourself. `vidtwin study score` joins both.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    parser.add_argument("--results", type=str, required=True, help="Folder that `vidtwin test` wrote, with players.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the study.")
    parser.add_argument(
        "--models", nargs="+", default=None, metavar="NAME", help="Rows to rate (default: trained ones)."
    )
    parser.add_argument(
        "--clips", type=int | None, default=None, help="Number of clips, drawn by the seed (default: all)."
    )
    parser.add_argument("--raters", type=int, default=20, help="Number of raters, each with an order of its own.")
    parser.add_argument(
        "--checks", type=int, default=2, help="Attention checks of each kind: the source, a destroyed clip."
    )
    parser.add_argument("--alone", type=bool, default=False, help="Show each clip alone, not beside its source.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of clips and orders.")


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    from vidtwin.benchmark.study import page

    if not Path(options.results).is_dir():
        raise UserError(f"Expected a results folder, got {options.results}, which does not exist.")
    names = ("models", "clips", "raters", "checks", "alone", "seed")
    written = page.write(options.results, options.out, **{name: options[name] for name in names})
    sys.stdout.write("".join(f"{path}\n" for path in written))
    sys.stdout.write(
        f"Give {written[0].name} and a number from 1 to {options.raters} to each rater; keep {written[1].name}.\n"
    )
    return 0
