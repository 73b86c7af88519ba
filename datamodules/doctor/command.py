"""`vidtwin doctor`: check every video before a training reads it, and list those to leave out."""

import dataclasses
import json
import sys
from collections import Counter
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from tqdm import tqdm

from vidtwin import listing
from vidtwin.datamodules.cores import count_cores
from vidtwin.datamodules.ucf101.lists import class_root
from vidtwin.errors import UserError, suggestion
from vidtwin.files import parse_json, write_text
from vidtwin.listing import identity, is_text

from . import pool
from .report import VERDICTS, find_exclusions, make_report, summarize

if TYPE_CHECKING:
    from jsonargparse import ArgumentParser, Namespace

    from .measure import Measurement

USAGE = "DIR [options]"
DESCRIPTION = """\
Decode every video of a folder, report the broken, short, cut and duplicate ones, and list those to leave out.

  vidtwin doctor data/UCF-101
  vidtwin doctor videos --out results --num_frames 16 --fps 8 --exclude broken,duplicates,static

Nothing in DIR is changed. A second run measures only what is new or changed.
"""
SECONDS_PER_MEGABYTE = 30.0

Key = tuple[str, int, int]  # name, bytes, time of the last change


@dataclass
class DoctorOptions:
    """Choose the clips that a training will take, and the verdicts that exclude a video.

    Args:
        dir: Folder of videos, at any depth.
        out: Folder of the results.
        workers: Processes, by default one per core.
        num_frames: Frames of a clip.
        fps: Frames per second of a clip.
        frame_steps: Frames that a clip takes at `fps`, as of `data.frame_steps` in evaluation: with "whole", every n-th
            frame, no video is slow.
        split: Which official split of UCF-101.
        image_folders: Treat folders of numbered images as videos too.
        exclude: Verdicts that put a video on exclude.txt, separated by commas: broken, duplicates, cuts, short, slow,
            static.
        time_limit: Seconds after which a video is given up, in addition to 30 s per MB.
    """

    dir: str
    out: str = "doctor"
    workers: int | None = None
    num_frames: int = 16
    fps: float = 8.0
    frame_steps: Literal["timed", "whole"] = "timed"
    split: Literal[1, 2, 3] = 1
    image_folders: bool = False
    exclude: str = "broken,duplicates"
    time_limit: float = 300.0

    def __post_init__(self) -> None:
        for name in ("workers", "num_frames"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise UserError(f"Expected --{name} of at least 1, got {value}.")
        for name in ("fps", "time_limit"):
            if not 0 < (value := getattr(self, name)) < float("inf"):
                raise UserError(f"Expected --{name} above 0, got {value:g}.")
        for verdict in self.excluded:
            if verdict not in VERDICTS:
                near = suggestion(verdict, VERDICTS)
                raise UserError(f"Expected --exclude with some of {', '.join(VERDICTS)}, got {verdict!r}{near}")

    @property
    def excluded(self) -> list[str]:
        """Verdicts that exclude a video."""
        return [verdict for verdict in self.exclude.split(",") if verdict]


def add_options(parser: "ArgumentParser") -> None:
    """Add the options of the command."""
    parser.add_argument("dir", metavar="DIR", help="Folder of videos, at any depth.")
    parser.add_class_arguments(DoctorOptions, skip={"dir"})


def run(options: "Namespace") -> int:
    """Run the command → exit code."""
    given = DoctorOptions(**{field.name: options[field.name] for field in dataclasses.fields(DoctorOptions)})
    try:
        return _run(given)
    except KeyboardInterrupt:
        sys.stderr.write(
            f"vidtwin: interrupted; the measurements so far are in {Path(given.out) / 'measurements.jsonl'}, and the "
            "same command measures the rest\n"
        )
        return 130


def _run(options: DoctorOptions) -> int:
    paths, root, others = find_videos(Path(options.dir), options.image_folders)
    # Only now: neither numpy nor FFmpeg is light, and `--help` and refusals need none of them.
    from .splits import find_copies, split_names

    out = Path(options.out)
    workers = options.workers or count_cores()
    measured = _measure_all(paths, out, workers, options.time_limit)
    videos = [measured[name] for name in sorted(measured)]
    splits, check = split_names([video.name for video in videos], root, options.split)
    given = dataclasses.asdict(options) | {"workers": workers, "exclude": options.excluded, "root": str(root)}
    report = make_report(videos, splits, check, find_copies(videos, splits), others, given)
    excluded = find_exclusions(report, options.excluded)
    write_text(out / "report.json", json.dumps(report, indent=1) + "\n")  # ASCII holds any file's name
    write_text(out / "exclude.txt", format_exclusions(excluded, root, options.excluded))
    sys.stdout.write(_escape(summarize(report, out, len(excluded))) + "\n")
    return 0


def _escape(text: str) -> str:
    """Escape characters that the terminal's encoding lacks, since file names may hold any bytes."""
    encoding = sys.stdout.encoding or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def find_videos(folder: Path, image_folders: bool) -> tuple[dict[str, Path], Path, Counter[str]]:
    """Find videos: paths by name, the folder to which names are relative, and a count of the other files' suffixes.

    A folder that holds `UCF-101` stands for it, as it does for the data module.
    """
    from vidtwin.video import VIDEO_SUFFIXES

    if not folder.is_dir():
        raise UserError(f"Expected a folder of videos, got {folder}, which is not a folder.")
    root = class_root(folder)
    paths, others = listing.find_videos(root, image_folders)
    if not paths:
        also = "" if image_folders else "; with --image_folders, folders of images are videos too"
        raise UserError(f"{root}: expected videos ({', '.join(sorted(VIDEO_SUFFIXES))}), found none{also}.")
    return {path.relative_to(root).as_posix(): path for path in paths}, root, others


def format_exclusions(excluded: dict[str, str], root: Path, kinds: Sequence[str]) -> str:
    """Write a line per video, its name, a tab and the reason, for `data.exclude`."""
    lines = [
        f"# Videos of {root} to leave out, by `vidtwin doctor`: {', '.join(kinds)}.",
        "# One per line, relative to that folder, then a tab and the reason.",
    ]
    for name, reason in sorted(excluded.items()):
        if name.startswith("#") or any(letter in name for letter in "\t\r\n") or not is_text(name):
            lines.append(f"# can't be listed because of its name, rename it: {name!a} {reason}")
        else:
            lines.append(f"{name}\t{reason}")
    return "\n".join(lines) + "\n"


def _measure_all(paths: dict[str, Path], out: Path, workers: int, time_limit: float) -> "dict[str, Measurement]":
    """Measure the videos that are new or have changed since an earlier run; return the measurements of all."""
    from .measure import Measurement, measure

    done: dict[str, Measurement] = {}
    missing: list[Key] = []
    journal = out / "measurements.jsonl"
    known = _read_journal(journal)
    for name, path in paths.items():
        try:
            key = (name, *identity(path))
        except OSError:  # gone or forbidden: measuring reports it
            key = (name, 0, 0)
        if key in known:
            done[name] = known[key]
        else:
            missing.append(key)
    missing.sort(key=lambda key: -key[1])  # the largest first, so that no worker ends with a long one alone
    jobs = [(paths[name], name) for name, _, _ in missing]
    limits = [time_limit + size / 1e6 * SECONDS_PER_MEGABYTE for _, size, _ in missing]
    if done:
        sys.stderr.write(f"{len(done):,} of {len(paths):,} videos were measured before ({journal}).\n")
    bar = tqdm(total=sum(size for _, size, _ in missing), unit="B", unit_scale=True, disable=None)
    broken = 0
    with _open_journal(journal, known) as file, closing(pool.run(measure, jobs, limits, workers)) as results, bar:
        for index, result in results:
            name, size, changed = missing[index]
            if isinstance(result, pool.Failure):
                fault = "timeout" if result.timeout else "crash"
                result = Measurement(name, size, changed, fault, result.reason, lasting=False)
            if result.lasting:  # else the next run tries again
                file.write(_format_line(result))
                file.flush()
            done[name] = result
            broken += result.fault is not None
            bar.set_postfix_str(f"{len(done)}/{len(paths)} videos, {broken} broken", refresh=False)
            bar.update(size)
    return done


def _read_journal(journal: Path) -> "dict[Key, Measurement]":
    """Read the measurements of earlier runs, skipping lines that a kill cut off or another version wrote."""
    from .measure import FIELDS, VERSION, Measurement

    known = {}
    try:
        lines = journal.read_bytes().splitlines()
    except (FileNotFoundError, NotADirectoryError):
        return {}
    for line in lines:
        try:
            entry = parse_json(line)
        except ValueError:
            continue
        if isinstance(entry, dict) and entry.pop("version", None) == VERSION and entry.keys() == FIELDS:
            found = Measurement(**entry)
            known[found.name, found.bytes, found.mtime_ns] = found
    return known


def _format_line(measurement: "Measurement") -> str:
    from .measure import VERSION

    return json.dumps({"version": VERSION, **dataclasses.asdict(measurement)}) + "\n"  # ASCII holds any file's name


def _open_journal(journal: Path, known: "dict[Key, Measurement]") -> TextIO:
    """Open the journal for more lines, after dropping half a line at its end."""
    try:
        write_text(journal, "".join(map(_format_line, known.values())))
        return journal.open("a", encoding="utf-8")
    except OSError as error:
        raise UserError(f"Expected to write into {journal.parent}: {error.strerror}; set --out.") from None
