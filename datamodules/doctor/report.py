"""Turn measurements into verdicts, report.json and the printed summary."""

import dataclasses
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .measure import Measurement

SCHEMA_VERSION = 1
FROZEN = 0.1  # motion of a still picture that was encoded; docs/doctor.md says how it was chosen
BLACK = 4.0  # mean luma in 0..255
VERDICTS = ("broken", "short", "slow", "static", "cuts", "duplicates")

_EDGES: dict[str, tuple[str, list[float]]] = {  # the last bin is open
    "fps": ("frames per second", [0, 8, 12, 16, 20, 24, 26, 29, 31, 50, 61]),
    "length": ("seconds", [0, 0.5, 1, 2, 4, 8, 16, 32, 64, 300]),
    "size": ("shorter side in pixels", [0, 64, 128, 224, 256, 360, 480, 720, 1080]),
    "motion": ("mean change of luma in 1/8 s, 0 to 255", [0, FROZEN, 1, 2, 4, 8, 16, 32]),
}
_BAR = 32  # characters
_SHOWN = 20  # lines of each list


def judge(video: "Measurement", num_frames: int, fps: float) -> list[str]:
    """Judge a video for clips of `num_frames` at `fps`; an empty list means that nothing is wrong."""
    if video.fault is not None:
        return ["broken"]
    assert video.frames is not None
    assert video.fps is not None
    found = []
    if video.frames <= _count_span(video, num_frames, fps):
        found.append("short")
    if video.fps * 1.001 < fps:
        found.append("slow")
    if (video.luma or 0.0) < BLACK or (video.motion is not None and video.motion < FROZEN):
        found.append("static")
    if video.cuts:
        found.append("cuts")
    return found


def clip_rate(video: "Measurement", fps: float, frame_steps: str) -> float:
    """Return the frames per second of a video's clips: `fps`, or of steps that are "whole" the rate next to it."""
    if frame_steps != "whole" or not video.fps:
        return fps
    return video.fps / max(1, round(video.fps / fps))


def cut_share(video: "Measurement", num_frames: int, fps: float) -> float | None:
    """Return the share of the possible clips that contain a cut; None if the video has no clip."""
    if video.fault is not None or video.fps is None or video.frames is None:
        return None
    starts = video.frames - _count_span(video, num_frames, fps)  # a clip may begin at frames 0 .. starts - 1
    if starts <= 0:
        return None
    duration = (num_frames - 1) / fps
    covered, reached = 0.0, 0.0
    for cut in sorted(video.cuts):  # it cuts clips that begin in (cut - duration, cut)
        first, last = max(reached, cut - duration), min(cut, starts / video.fps)
        if last > first:
            covered, reached = covered + last - first, last
    return min(1.0, covered / (starts / video.fps))


def _count_span(video: "Measurement", num_frames: int, fps: float) -> int:
    """Count the video's frames from a clip's first frame to its last."""
    return int((num_frames - 1) * (video.fps or 0.0) / fps)


def histogram(values: Sequence[float], edges: Sequence[float]) -> list[int]:
    """Count the values from each edge to the next; the last bin is open."""
    counts = [0] * len(edges)
    for value in values:
        counts[max(0, sum(value >= edge for edge in edges) - 1)] += 1
    return counts


def make_report(
    videos: "Sequence[Measurement]",
    splits: dict[str, str],
    split_check: dict[str, Any] | None,
    copies: dict[str, Any],
    others: Counter[str],
    arguments: dict[str, Any],
) -> dict[str, Any]:
    """Make the content of report.json.

    Args:
        others: Number of files that were not scanned, by suffix.
        arguments: Of the command line: num_frames, fps, frame_steps, exclude and so on.
    """
    num_frames = arguments["num_frames"]
    rows = []
    for video in videos:
        row = dataclasses.asdict(video)
        row["split"] = splits.get(video.name)
        fps = clip_rate(video, arguments["fps"], arguments["frame_steps"])
        row["verdicts"] = judge(video, num_frames, fps)
        row["cut_share"] = cut_share(video, num_frames, fps)
        rows.append(row)
    by_name = {row["name"]: row for row in rows}
    for copy in copies["across"]:
        by_name[copy["name"]]["verdicts"].append("duplicates")
    intact = [video for video in videos if video.fault is None]
    shares = [row["cut_share"] for row in rows if row["cut_share"] is not None]
    values = {
        "fps": [video.fps for video in intact],
        "length": [video.seconds for video in intact],
        "size": [min(video.shown_width or 0, video.shown_height or 0) for video in intact],
        "motion": [video.motion for video in intact if video.motion is not None],
    }
    verdicts = Counter(verdict for row in rows for verdict in row["verdicts"])
    return {
        "schema_version": SCHEMA_VERSION,
        "arguments": arguments,
        "totals": {
            "videos": len(videos),
            "bytes": sum(video.bytes for video in videos),
            "frames": sum(video.frames or 0 for video in intact),
            "seconds": round(sum(video.seconds or 0.0 for video in intact), 3),
            "no_verdict": sum(not row["verdicts"] for row in rows),
            **{verdict: verdicts[verdict] for verdict in VERDICTS},
            "cut_share": round(sum(shares) / len(shares), 4) if shares else None,
        },
        "notes": _count_notes(intact),
        "splits": dict(sorted(Counter(splits.values()).items())),
        "split_check": split_check,
        "copies": copies,
        "other_files": dict(sorted(others.items())),
        "histograms": {
            kind: {"unit": unit, "edges": edges, "counts": histogram(values[kind], edges)}  # type: ignore[arg-type]
            for kind, (unit, edges) in _EDGES.items()
        },
        "videos": rows,
    }


def _count_notes(intact: "Sequence[Measurement]") -> dict[str, int]:
    """Count properties that change how a video is read, but are not faults."""
    return {
        "variable frame rate": sum(bool(v.variable_rate) for v in intact),
        "timestamps absent or not rising (frames are counted)": sum(bool(v.disordered) for v in intact),
        "one keyframe (a seek saves nothing)": sum(v.keyframes == 1 for v in intact),
        "fewer frames than the header promises": sum((v.header_frames or 0) > (v.frames or 0) for v in intact),
        "stored turned": sum(bool(v.rotation) for v in intact),
        "pixels not square": sum(v.aspect not in (None, "1:1") for v in intact),
        "BT.709 or full range": sum(v.matrix == 1 or v.colour_range == 2 for v in intact),
    }


def find_exclusions(report: dict[str, Any], kinds: Sequence[str]) -> dict[str, str]:
    """Return the reason for each video with one of the verdicts `kinds`, by name."""
    copies = {copy["name"]: copy for copy in report["copies"]["across"]}
    found = {}
    for row in report["videos"]:
        reasons = [_explain(row, verdict, copies) for verdict in row["verdicts"] if verdict in kinds]
        if reasons:
            found[row["name"]] = "; ".join(reasons)
    return found


def _explain(row: dict[str, Any], verdict: str, copies: dict[str, Any]) -> str:
    if verdict == "broken":
        return f"{row['fault']}: {row['reason']}"
    if verdict == "duplicates":
        copy = copies[row["name"]]
        how = "the same file as" if copy["exact"] else "shows the same as"
        return f"duplicate: {how} {copy['copy_of']} in {copy['copy_split']}"
    if verdict == "cuts":
        return f"cuts: {len(row['cuts'])}, the first at {row['cuts'][0]:.2f} s"
    if verdict == "static":
        return f"static: {'black' if (row['luma'] or 0.0) < BLACK else 'frozen'}"
    return f"{verdict}: {row['frames']} frames at {row['fps']:.4g} per second"


def summarize(report: dict[str, Any], folder: Path, excluded: int) -> str:
    """Write the printed summary of a report that lies in `folder`."""
    totals, arguments = report["totals"], report["arguments"]
    clip = f"a clip of {arguments['num_frames']} frames at {arguments['fps']:g} fps"
    lines = [
        f"{totals['videos']:,} videos, {totals['bytes'] / 1e6:,.1f} MB, {totals['frames']:,} frames, "
        f"{totals['seconds'] / 3600:.2f} h in {arguments['root']}"
    ]
    if report["other_files"]:
        listed = ", ".join(f"{count} {suffix}" for suffix, count in report["other_files"].items())
        lines.append(f"not scanned, since their suffix is not of a video: {listed}")
    listed = ", ".join(f"{count:,} {name}" for name, count in report["splits"].items())
    lines.append(f"splits: {listed or 'none known (no ucfTrainTestlist, no folders train, val, test)'}")
    lines += ["", f"{totals['no_verdict']:>7,} without any of the following"]
    meanings = {
        "broken": "broken: can't be decoded to the end",
        "short": f"short: too short for {clip}",
        "slow": f"slow: fewer than {arguments['fps']:g} frames per second",
        "static": "static: black or frozen",
        "cuts": "cuts: more than one scene",
        "duplicates": "duplicates: another split shows the same",
    }
    lines += [f"{totals[verdict]:>7,} {meaning}" for verdict, meaning in meanings.items()]
    if totals["cuts"]:
        lines.append(f"        {totals['cut_share']:.1%} of all possible clips hold a cut")
    notes = {text: count for text, count in report["notes"].items() if count}
    if notes:
        lines += ["", "Not faults, but useful to know:"]
        lines += [f"{count:>7,} {text}" for text, count in notes.items()]
    for kind, entry in report["histograms"].items():
        lines += ["", f"{kind} ({entry['unit']})", *_draw_bars(entry)]
    lines += _list_some(
        "Broken", [f"{r['name']}: {r['fault']}: {r['reason']}" for r in _rows_with(report, "broken")], folder
    )
    lines += _list_some(
        "With cuts, at seconds",
        [
            f"{r['name']}: {', '.join(f'{cut:.2f}' for cut in r['cuts'][:6])}{', …' if len(r['cuts']) > 6 else ''}"
            for r in _rows_with(report, "cuts")
        ],
        folder,
    )
    lines += _describe_copies(report, folder) + _describe_splits(report)
    lines += ["", *_suggest_next(report, folder, excluded)]
    return "\n".join(lines)


def _rows_with(report: dict[str, Any], verdict: str) -> list[dict[str, Any]]:
    return [row for row in report["videos"] if verdict in row["verdicts"]]


def _draw_bars(entry: dict[str, Any]) -> list[str]:
    """Draw one line per bin, from the first to the last that is not empty."""
    edges, counts = entry["edges"], entry["counts"]
    filled = [index for index, count in enumerate(counts) if count]
    lines = []
    for index in range(filled[0], filled[-1] + 1) if filled else ():
        end = f"{edges[index + 1]:g}" if index + 1 < len(edges) else ""
        bar = "#" * -(-counts[index] * _BAR // max(counts))
        lines.append(f"  {edges[index]:>5g} - {end:<5} {bar:<{_BAR}} {counts[index]:,}".rstrip())
    return lines or ["  none"]


def _list_some(title: str, entries: Sequence[str], folder: Path) -> list[str]:
    if not entries:
        return []
    more = len(entries) - _SHOWN
    tail = [f"  … and {more:,} more in {folder / 'report.json'}"] if more > 0 else []
    return ["", f"{title}:", *(f"  {entry}" for entry in entries[:_SHOWN]), *tail]


def _describe_copies(report: dict[str, Any], folder: Path) -> list[str]:
    copies = report["copies"]

    def line(copy: dict[str, Any]) -> str:
        how = "is the same file as" if copy["exact"] else "shows the same as"
        return f"{copy['name']} ({copy['split']}) {how} {copy['copy_of']} ({copy['copy_split']})"

    lines = _list_some("Copies across splits", [line(copy) for copy in copies["across"]], folder)
    alike = [line(copy) for copy in copies["alike"]]
    lines += _list_some("Alike across splits, but hardly moving: copies, or clips of one scene", alike, folder)
    if copies["within"]:
        exact = sum(copy["exact"] for copy in copies["within"])
        place = " in their own split" if report["splits"] else ""
        count = f"{len(copies['within']):,}, {exact:,} of them the same file (report.json names them)"
        lines += ["", f"Copies of another video{place}: {count}"]
    elif not copies["across"]:
        lines += ["", "Copies of another video: none"]
    return lines


def _describe_splits(report: dict[str, Any]) -> list[str]:
    check = report["split_check"]
    if check is None:
        return []
    lines = ["", f"UCF-101's lists in {check['lists']} ({check['line_ends']} line ends, {check['classes']} classes):"]
    for number, split in check["splits"].items():
        lines.append(
            f"  split {number}: {split['train']:,} train ({split['validation']:,} of them in groups 24 and 25), "
            f"{split['test']:,} test; the full UCF-101 has {split['official_train']:,} and {split['official_test']:,}"
        )
    if check["other_spelling"]:
        lines.append(f"  files spelled otherwise than their class: {', '.join(check['other_spelling'])}")
    lines += [f"  problem: {problem}" for problem in check["problems"]]
    return lines if check["problems"] else [*lines, "  every listed file is there, no group is in train and test"]


def _suggest_next(report: dict[str, Any], folder: Path, excluded: int) -> list[str]:
    totals = report["totals"]
    lines = [f"All measurements: {folder / 'report.json'}"]
    if excluded:
        kinds = ",".join(report["arguments"]["exclude"])
        lines.append(
            f"{excluded:,} videos ({kinds}) are in {folder / 'exclude.txt'}; leave them out by "
            f"--data.exclude {folder / 'exclude.txt'}"
        )
    left = [
        verdict
        for verdict in VERDICTS
        if totals[verdict] and verdict not in report["arguments"]["exclude"] and verdict not in ("broken", "duplicates")
    ]
    if left:
        lines.append(f"To leave out others too: --exclude {','.join([*report['arguments']['exclude'], *left])}")
    return lines
