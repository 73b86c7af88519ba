"""`vidtwin doctor DIR`: look at every video before a training does, and write a list of those to leave out."""

import argparse
import dataclasses
import json
import os
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn, TextIO

from vidtwin.datamodules.ucf101.lists import class_root
from vidtwin.errors import UserError
from vidtwin.listing import is_text

if TYPE_CHECKING:
    from .measure import Measurement

EXCLUDED = ("broken", "duplicates")
SECONDS_PER_MEGABYTE = 30.0

Key = tuple[str, int, int]  # name, bytes, time of the last change


def doctor_command(argv: list[str]) -> int:
    """Check a folder of videos and list those to leave out: vidtwin doctor DIR"""
    try:
        arguments = _parser().parse_args(argv)
    except SystemExit as end:  # --help
        return int(end.code or 0)
    try:
        return _run(arguments)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"vidtwin: interrupted; what was measured is in {arguments.out / 'measurements.jsonl'}, and the same "
            "command goes on with the rest\n"
        )
        return 130


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"vidtwin doctor: {message}; see vidtwin doctor --help.")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="vidtwin doctor",
        description="Decode every video of a folder; say what is broken, short, cut, doubled; list what to leave out. "
        "A second run measures only what is new or changed.",
    )
    parser.add_argument(
        "dir", type=Path, metavar="DIR", help="folder of videos, at any depth; nothing in it is changed"
    )
    parser.add_argument("--out", type=Path, default=Path("doctor"), help="folder of the results (default: doctor)")
    parser.add_argument("--workers", type=_count, default=_cores(), help="processes (default: one for each core)")
    parser.add_argument("--num_frames", type=_count, default=16, help="frames of a clip (default: 16)")
    parser.add_argument("--fps", type=_positive, default=8.0, help="frames per second of a clip (default: 8)")
    parser.add_argument("--split", type=int, choices=(1, 2, 3), default=1, help="which split of UCF-101 (default: 1)")
    parser.add_argument("--image_folders", action="store_true", help="folders of numbered images are videos too")
    parser.add_argument(
        "--exclude",
        type=_kinds,
        default=list(EXCLUDED),
        metavar="KIND,…",
        help="what exclude.txt lists: broken, duplicates, cuts, short, slow, static (default: broken,duplicates)",
    )
    parser.add_argument(
        "--time_limit",
        type=_positive,
        default=300.0,
        metavar="SECONDS",
        help=f"after which a video is given up, beside {SECONDS_PER_MEGABYTE:g} s for each MB of it (default: 300)",
    )
    return parser


def _run(arguments: argparse.Namespace) -> int:
    paths, root, others = find_videos(arguments.dir, arguments.image_folders)
    # Only now: `vidtwin --help` imports this module, and neither numpy nor FFmpeg is light.
    from vidtwin.files import write_text

    from .report import exclusions, make_report, summary
    from .splits import find_copies, split_names

    measured = _measure_all(paths, arguments.out, arguments.workers, arguments.time_limit)
    videos = [measured[name] for name in sorted(measured)]
    splits, check = split_names([video.name for video in videos], root, arguments.split)
    given = {**vars(arguments), "dir": str(arguments.dir), "out": str(arguments.out), "root": str(root)}
    report = make_report(videos, splits, check, find_copies(videos, splits), others, given)
    excluded = exclusions(report, arguments.exclude)
    write_text(arguments.out / "report.json", json.dumps(report, indent=1) + "\n")  # ASCII holds any file's name
    write_text(arguments.out / "exclude.txt", exclusion_list(excluded, root, arguments.exclude))
    sys.stdout.write(_printable(summary(report, arguments.out, len(excluded))) + "\n")
    return 0


def _printable(text: str) -> str:
    """With escapes for what the terminal's encoding lacks: names of files may hold any bytes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def find_videos(folder: Path, image_folders: bool) -> tuple[dict[str, Path], Path, Counter[str]]:
    """Name → path of each video, the folder to which names are relative, and the suffixes of what is no video.

    A folder that holds `UCF-101` stands for that, as it does for the data module.
    """
    from vidtwin import listing
    from vidtwin.video import VIDEO_SUFFIXES

    if not folder.is_dir():
        raise UserError(f"Expected a folder of videos, got {folder}, which is none.")
    root = class_root(folder)
    paths, others = listing.find_videos(root, image_folders)
    if not paths:
        also = "" if image_folders else "; with --image_folders, folders of images are videos too"
        raise UserError(f"{root}: expected videos ({', '.join(sorted(VIDEO_SUFFIXES))}), found none{also}.")
    return {path.relative_to(root).as_posix(): path for path in paths}, root, others


def exclusion_list(excluded: dict[str, str], root: Path, kinds: Sequence[str]) -> str:
    """Lines of a name, a tab and the reason, which the data modules read."""

    lines = [
        f"# Videos of {root} that `vidtwin doctor` would leave out: {', '.join(kinds)}.",
        "# One a line, relative to that folder, then a tab and the reason.",
    ]
    for name, reason in sorted(excluded.items()):
        if name.startswith("#") or any(letter in name for letter in "\t\r\n") or not is_text(name):
            lines.append(f"# can't be listed because of its name, rename it: {name!a} {reason}")
        else:
            lines.append(f"{name}\t{reason}")
    return "\n".join(lines) + "\n"


def _measure_all(paths: dict[str, Path], out: Path, workers: int, time_limit: float) -> "dict[str, Measurement]":
    """Measure every video that no earlier run has measured as it now is."""
    from tqdm import tqdm

    from vidtwin.listing import identity

    from .measure import Measurement, measure
    from .pool import Lost, run

    done: dict[str, Measurement] = {}
    missing: list[Key] = []
    journal = out / "measurements.jsonl"
    known = _read_journal(journal)
    for name, path in paths.items():
        try:
            key = (name, *identity(path))
        except OSError:  # gone or forbidden: measuring says so
            key = (name, 0, 0)
        if key in known:
            done[name] = known[key]
        else:
            missing.append(key)
    missing.sort(key=lambda key: -key[1])  # the largest first, so that none is left alone at the end
    jobs = [(paths[name], name) for name, _, _ in missing]
    limits = [time_limit + size / 1e6 * SECONDS_PER_MEGABYTE for _, size, _ in missing]
    if done:
        sys.stderr.write(f"{len(done):,} of {len(paths):,} videos were measured before ({journal}).\n")
    bar = tqdm(total=sum(size for _, size, _ in missing), unit="B", unit_scale=True, disable=None)
    broken = 0
    with _open_journal(journal, known) as file, closing(run(measure, jobs, limits, workers)) as results, bar:
        for index, result in results:
            name, size, changed = missing[index]
            if isinstance(result, Lost):
                fault = "timeout" if result.timeout else "crash"
                result = Measurement(name, size, changed, fault, result.reason, lasting=False)
            if result.lasting:  # else the next run tries again
                file.write(_line(result))
                file.flush()
            done[name] = result
            broken += result.fault is not None
            bar.set_postfix_str(f"{len(done)}/{len(paths)} videos, {broken} broken", refresh=False)
            bar.update(size)
    return done


def _read_journal(journal: Path) -> "dict[Key, Measurement]":
    """Measurements of earlier runs. A line that a kill cut off, or that another version wrote, counts for nothing."""
    from .measure import FIELDS, VERSION, Measurement

    known = {}
    try:
        lines = journal.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in lines:
        try:
            entry: Any = json.loads(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.pop("version", None) == VERSION and entry.keys() == FIELDS:
            found = Measurement(**entry)
            known[found.name, found.bytes, found.mtime_ns] = found
    return known


def _line(measurement: "Measurement") -> str:
    from .measure import VERSION

    return json.dumps({"version": VERSION, **dataclasses.asdict(measurement)}) + "\n"  # ASCII holds any file's name


def _open_journal(journal: Path, known: "dict[Key, Measurement]") -> TextIO:
    """Ready for more lines; half a line at its end is gone."""
    from vidtwin.files import write_text

    try:
        write_text(journal, "".join(map(_line, known.values())))
        return journal.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Expected to write into {journal.parent}: {error.strerror}; set --out.") from None


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected at least 1, got {value}")
    return value


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, got {text}")
    return value


def _kinds(text: str) -> list[str]:
    allowed = ("broken", "duplicates", "cuts", "short", "slow", "static")
    kinds = [kind for kind in text.split(",") if kind]
    if wrong := [kind for kind in kinds if kind not in allowed]:
        raise argparse.ArgumentTypeError(f"expected some of {', '.join(allowed)}, got {', '.join(wrong)}")
    return kinds
