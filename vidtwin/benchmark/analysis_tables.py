"""The tables of the analysis for the page: quality against content, frames and seams, what each latent carries."""

from collections.abc import Iterable
from typing import Any

from vidtwin.benchmark import failures, rows
from vidtwin.benchmark.analysis_files import MEASURES, read_all, read_content
from vidtwin.benchmark.rows import Results
from vidtwin.benchmark.summary import Cell, Line, Table
from vidtwin.metrics.registry import BY_KEY, Column, format_number


def build(results: Results) -> list[Table]:
    """Build the tables that have lines; none without an analysis."""
    analyses = read_all(results)
    content = read_content(results.folder, results.protocol_hash)
    made = [content_table(results, content, analyses)]
    made += [make(results, analyses) for make in (seam_table, latent_table, leakage_table, looks_table)]
    return [table for table in made if table]


def content_table(results: Results, content: list[rows.Clip], analyses: dict[str, Any]) -> Table | None:
    """Build the table of rank correlations of quality with the clips' content; None without `content.csv`."""
    found = failures.correlate_content(results, content, analyses) if content else []
    kinds = {row["name"]: row["kind"] for row in results.rows}
    lines: dict[tuple[Any, ...], Line] = {}
    for each in found:
        key = each["row"], each["latent"], each["metric"]
        if key not in lines:
            decoded, label = each["latent"] or "all latents", BY_KEY[each["metric"]].label
            lines[key] = Line(each["row"], kinds[each["row"]], [Cell(decoded, decoded), Cell(label, label)])
        lines[key].cells.append(_correlation(each))
    columns = [Column("decoded", "Decoded", words=True), Column("metric", "Metric", words=True)]
    columns += [Column(key, title.partition(" (")[0], "rank correlation") for key, title in MEASURES.items()]
    columns, alike = _drop_empty(columns, lines.values())
    notes = [
        "Spearman's rank correlation of each clip's quality with what is in the clip, and its 95% interval over source "
        "videos: -1 says that more of it always is worse (PSNR, SSIM) or better (LPIPS).",
        "Of the input clip: motion is the mean length of block-matching vectors between neighbouring frames (FFmpeg's "
        "mestimate), change the mean absolute difference of neighbouring frames, texture the mean gradient of luma, "
        "cuts the frames that begin a scene.",
    ]
    if alike:
        notes.append(f"All clips have the same number of {', '.join(alike)}, which correlates with nothing.")
    return (
        Table("content", "Quality against the content of the clips", columns, list(lines.values()), notes)
        if lines
        else None
    )


def _correlation(found: dict[str, Any]) -> Cell:
    if found["rho"] is None:
        return Cell()
    return Cell(format_number(found["rho"], "+.2f"), found["rho"], small=_format_ends(found))


def _format_ends(found: dict[str, Any]) -> str:
    """Format the ends of an interval; empty without one."""
    if found["low"] is None:
        return ""
    return f"{format_number(found['low'], '+.2f')} to {format_number(found['high'], '+.2f')}"


def seam_table(results: Results, analyses: dict[str, Any]) -> Table | None:
    """Build the table of PSNR by frame: first, worst and last frame, and at the seams of windows."""
    lines = []
    kinds = {row["name"]: row["kind"] for row in results.rows}
    psnr = BY_KEY["psnr"]
    for name, analysis in analyses.items():
        found = failures.describe_frames(analysis)
        mean, seam = found["mean"], found["seam"]
        worst = min(range(len(mean)), key=mean.__getitem__)
        cells = [Cell(psnr.text(value), value) for value in (mean[0], mean[worst], mean[-1])]
        cells[1].small = f"frame {worst}"
        if seam is None:
            cells.append(Cell())
        else:
            cells.append(Cell(format_number(seam["mean"], "+.2f"), seam["mean"], small=_format_ends(seam)))
        lines.append(Line(name, kinds[name], cells))
    columns = [
        Column("first", "First frame", "PSNR, dB", higher=True),
        Column("worst", "Worst frame", "PSNR, dB", higher=True),
        Column("last", "Last frame", "PSNR, dB", higher=True),
        Column("seam", "At seams", "dB to other frames", higher=True),
    ]
    notes = [
        "Means over the clips, by the frame's place in the clip (from 0). At seams: the two frames at each border of "
        "the windows that a model takes one at a time, with a 95% interval; empty for models that take the clip whole."
    ]
    return Table("frames", "PSNR by frame", columns, lines, notes) if lines else None


def latent_table(results: Results, analyses: dict[str, Any]) -> Table | None:
    """Build the table of what each latent carries; None without an analysis of a model with several latents."""
    lines = []
    kinds = {row["name"]: row["kind"] for row in results.rows}
    for name, analysis in analyses.items():
        latents = analysis["latents"]
        total = sum(each["numbers"] for each in latents.values())
        for latent, each in latents.items() if len(latents) > 1 else ():
            share = each["numbers"] / total
            cells = [Cell(latent, latent), Cell(f"{share:.1%}", share)]
            cells += [Cell(BY_KEY[key].text(each[key]), each[key]) for key in ("psnr", "ssim")]
            cells += [_ratio(each[key]) for key in ("shuffled", "object", "motion")]
            cells.append(Cell() if each["active"] is None else Cell(f"{each['active']:.1%}", each["active"]))
            cells.append(Cell() if each["kl"] is None else Cell(f"{each['kl']:,.1f}", each["kl"]))
            lines.append(Line(name, kinds[name], cells))
    columns = [
        Column("latent", "Latent", words=True),
        Column("share", "Numbers", "of all"),
        Column("psnr", "PSNR", "dB, alone"),
        Column("ssim", "SSIM", "alone"),
        Column("shuffled", "Shuffled", "change"),
        Column("object", "Object", "change"),
        Column("motion", "Motion", "change"),
        Column("active", "Active", "units"),
        Column("kl", "KL", "nats a clip"),
    ]
    notes = [
        "Alone: decoded without the other latents. Changes are root mean squares over numbers and clips, in the "
        "latent's standard deviation over the clips: 1 is as far as a clip is from the mean clip, 1.41 as far as from "
        "another clip.",
        "Shuffled: the frames in another order. Object: a still square on the clip, against the clip. Motion: the same "
        "square, moving across the picture, against the still one.",
        "Active: numbers whose mean varies over the clips with a variance above 0.01 (Burda et al. 2016, 5.2). Codes "
        "have none, and latents without noise no KL.",
    ]
    return Table("latents", "What each latent carries", columns, lines, notes) if lines else None


def _ratio(value: float | None) -> Cell:
    return Cell() if value is None else Cell(f"{value:.3f}", value)


def leakage_table(results: Results, analyses: dict[str, Any]) -> Table | None:
    """Build the table of how well one latent predicts another; None without several latents."""
    kinds = {row["name"]: row["kind"] for row in results.rows}
    lines = []
    for name, analysis in analyses.items():
        for pair in analysis["leakage"]:
            r2 = Cell("too few sources") if pair["r2"] is None else Cell(format_number(pair["r2"], ".3f"), pair["r2"])
            words = [Cell(pair[key], pair[key]) for key in ("from", "to")]
            counts = [Cell(f"{pair[key]:,}", pair[key]) for key in ("clips", "sources")]
            lines.append(Line(name, kinds[name], [*words, r2, *counts]))
    columns = [
        Column("from", "From", words=True),
        Column("to", "To", words=True),
        Column("r2", "R²", "of held-out sources"),
        Column("clips", "Clips"),
        Column("sources", "Sources"),
    ]
    notes = [
        "A ridge regression predicts all numbers of one latent from all of the other, each in its standard deviation, "
        "of clips whose source videos it has not seen. 1: the other latent decides all of it, linearly; 0 or less: "
        "nothing of it can be read linearly after so many clips. More clips give higher values.",
    ]
    return Table("leakage", "How well one latent predicts another", columns, lines, notes) if lines else None


def looks_table(results: Results, analyses: dict[str, Any]) -> Table | None:
    """Build the table of cheap looks at the latents of all analyzed models; None without any."""
    kinds = {row["name"]: row["kind"] for row in results.rows}
    lines = []
    for name, analysis in analyses.items():
        latents = analysis["latents"]
        tfvd = Cell() if analysis["tfvd"] is None else _distance(analysis["tfvd"])
        accuracy = _accuracy(analysis["probe"])
        if len(latents) > 1 and (accuracy.text or tfvd.text):
            lines.append(Line(name, kinds[name], [Cell("all", "all"), accuracy, tfvd, *_empty(3)]))
        for latent, each in latents.items():
            cells = [Cell(latent, latent), _accuracy(each["probe"]), *_empty(4)]
            cells[2] = tfvd if len(latents) == 1 else Cell()
            if each["low"] is not None:
                noise = "" if each["white"] is None else f"noise {each['white']:.1%}"
                cells[3] = Cell(f"{each['low']:.1%}", each["low"], small=noise)
            if (channels := each["channels"]) and channels["eigenvalues"]:
                first = channels["eigenvalues"][0]
                number = len(channels["eigenvalues"])
                cells[4] = Cell(f"{channels['effective']:.2f}", channels["effective"], small=f"of {number}")
                cells[5] = Cell(f"{first:.1%}", first)
            lines.append(Line(name, kinds[name], cells))
    columns = [
        Column("latent", "Latent", words=True),
        Column("probe", "Class by a linear probe", "accuracy", higher=True),
        Column("tfvd", "tFVD", "N", higher=False),
        Column("low", "Low frequencies", "of the energy"),
        Column("effective", "Channels", "effective"),
        Column("first", "First eigenvalue", "of their sum"),
    ]
    notes = [
        "The probe is a ridge regression to one-hot classes on the test clips, judged on source videos that it has not "
        "seen; chance is the share of the most frequent class. Classes of one source are left out; with fewer than two "
        "others there is none. Papers train theirs on the train split: not comparable.",
        "tFVD: FVD of clips that are decoded from the midpoints between the latents of neighbouring clips of a video, "
        "against the first of the two, by the network of rFVD; none without it, and without neighbours in a chunk.",
        "Low frequencies: the lowest quarter on every axis of the latent's DCT, without its constant. Effective "
        "channels: exp of the entropy of the eigenvalues of the channels' covariance over clips and places.",
    ]
    columns, _ = _drop_empty(columns, lines)
    return Table("looks", "Latents before a diffusion model", columns, lines, notes) if lines else None


def _drop_empty(columns: list[Column], lines: Iterable[Line]) -> tuple[list[Column], list[str]]:
    """Remove columns without a text from lines → the others, and the names of those in lower case."""
    lines = list(lines)
    filled = [place for place in range(len(columns)) if any(line.cells[place].text for line in lines)]
    for line in lines:
        line.cells = [line.cells[place] for place in filled]
    empty = [column.label.lower() for place, column in enumerate(columns) if place not in filled]
    return [columns[place] for place in filled], empty


def _empty(number: int) -> list[Cell]:
    return [Cell() for _ in range(number)]


def _distance(found: dict[str, Any]) -> Cell:
    metric = BY_KEY["rfvd"]
    return Cell(metric.text(found["value"]), found["value"], count=found["num_clips"])


def _accuracy(probe: dict[str, Any] | None) -> Cell:
    if not probe or probe["accuracy"] is None:
        return Cell()
    return Cell(
        f"{probe['accuracy']:.1%}", probe["accuracy"], small=f"chance {probe['chance']:.1%}, N = {probe['clips']:,}"
    )
