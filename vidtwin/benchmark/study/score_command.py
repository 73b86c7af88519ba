"""`vidtwin study score`: mean opinion scores from the answers of a rating study."""

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

USAGE = "ANSWERS... --key FILE --out FOLDER [options]"
DESCRIPTION = """\
Turn the answers of a rating study into mean opinion scores with intervals and the raters' agreement.

  vidtwin study score answers/*.json --key study/key.json --out study/scores

Answers that were edited, of another study or of a changed page are refused by name, and so is a changed page beside the
key. Raters who failed an attention check are left out, and named. Writes scores.csv, scores.md, scores.png and
scores.svg.
"""


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    parser.add_argument("answers", nargs="*", metavar="ANSWERS", help="Files that the page has saved.")
    parser.add_argument("--key", type=str, required=True, help="key.json of `vidtwin study make`.")
    parser.add_argument("--out", type=str, required=True, help="Folder of the scores.")
    parser.add_argument(
        "--identical_at_least",
        type=int | None,
        default=None,
        help="Least score for the source itself that passes its check (default: 5, of clips alone 4).",
    )
    parser.add_argument(
        "--destroyed_at_most", type=int, default=2, help="Greatest score for a destroyed clip that passes its check."
    )
    parser.add_argument("--seed", type=int, default=0, help="Seed of the intervals' draws.")


def run(options: "Namespace") -> int:
    """Run the command → exit code: 1 if no rater counts."""
    from vidtwin.benchmark.study import answers, opinions, scores

    key = answers.read_key(options.key)
    given = answers.read_answers(options.answers, key)
    names = ("identical_at_least", "destroyed_at_most", "seed")
    study = opinions.score(key, given, **{name: options[name] for name in names})
    text, paths = scores.write(study, key, options.out)
    sys.stdout.write(f"{text}\n" + "".join(f"{path}\n" for path in paths))
    return 0 if study.raters else 1
