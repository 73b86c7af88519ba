"""The tables of a results folder, built once for Markdown, CSV, LaTeX and the page."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from vidtwin.benchmark import places as places_of
from vidtwin.benchmark import published as papers
from vidtwin.benchmark import rows, statistics
from vidtwin.benchmark.rows import Results, Row
from vidtwin.errors import few
from vidtwin.metrics.registry import BY_KEY, SHOWN, Column, Metric

UNAVAILABLE = "unavailable"
WHOLE, NATIVE = "all of a video", "native"  # as a data module's protocol says it
BEST, SECOND = "best", "second"
_KINDS = {"trained": "", "untrained": "untrained weights: not ranked", "reference": "reference: not ranked"}

_RANKING = (
    f"Trained models alone are ranked: the best value of a column is bold. Models share a place if the "
    f"{statistics.CONFIDENCE:.0%} interval of their difference holds 0 (paired bootstrap over source videos, "
    f"{statistics.DRAWS:,} draws, seed {statistics.SEED}; rFVD by its value alone). A value that is worse than "
    "that of a reference, codecs left out, has no place."
)


@dataclass
class Cell:
    """The content of one cell.

    Attributes:
        text: The value for readers; empty if there is none.
        value: The number in full, or the word, by which the column is sorted; None comes last.
        deviation: The standard deviation for readers.
        count: Number of clips of which the value is made, if it depends on that.
        mark: BEST or SECOND, which several rows may share, or empty.
        small: A remark on the value.
        flag: Whether the remark is a warning.
        detail: Parts of the value, a line each.
    """

    text: str = ""
    value: float | str | None = None
    deviation: str = ""
    count: int | None = None
    mark: str = ""
    small: str = ""
    flag: bool = False
    detail: list[str] = field(default_factory=list)

    @property
    def below(self) -> str:
        """The second line of a cell that has room for one."""
        spread = f"± {self.deviation}" if self.deviation else ""
        count = "" if self.count is None else f"N = {self.count:,}"
        return "; ".join(filter(None, [spread, count, self.small]))


@dataclass
class Line:
    """A row of a table: its name, its kind and the cells after the name."""

    name: str
    kind: str
    cells: list[Cell]

    @property
    def group(self) -> int:
        """Sort key: trained models before the others, which are not ranked."""
        return rows.KINDS.index(self.kind)


@dataclass
class Table:
    """A table; `columns` are those after the name, `sorted_by` is the key of the one that decides the order."""

    id: str
    caption: str
    columns: list[Column]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)
    first: str = "Model"
    sorted_by: str = ""


_Fill = Callable[[Row], Cell]


# --- values ---


def metrics(results: Results) -> list[Metric]:
    """List the metrics of at least one row, measured or unavailable."""
    net = results.protocol["lpips"]["net"].replace("_", " ")
    there = {key for row in results.rows for key in row.get("metrics", {})}
    known = [metric for metric in SHOWN if metric.key in there]
    return [replace(metric, label=f"LPIPS ({net})") if metric.key == "lpips" else metric for metric in known]


def measured_metrics(results: Results) -> list[Metric]:
    """List the metrics that have a column: at least one row has a value. Notes explain the others."""
    return [m for m in metrics(results) if any(mean(results, row["name"], m.key) is not None for row in results.rows)]


def mean(results: Results, name: str, key: str) -> float | None:
    """Return a row's mean over the common clips; None if it is not measured."""
    found = results.comparison["rows"].get(name, {}).get(key)
    if not isinstance(found, dict):
        return None
    return float(found["value"] if key == "rfvd" else found["mean"])


def is_ranked(results: Results, row: Row, key: str) -> bool:
    """Check whether a row's value may be called better than another's."""
    value = mean(results, row["name"], key)
    if row["kind"] != "trained" or not results.comparison["ranked"] or value is None or math.isnan(value):
        return False
    return key != "rfvd" or bool(results.comparison["rows"][row["name"]]["rfvd"]["ranked"])


def note(results: Results, row: Row) -> str:
    """Describe how a row differs from a trained model on all clips, or why it failed."""
    if row["kind"] == "failed":
        return f"failed: {' '.join(str(row.get('error') or 'no reason was kept').split())}"
    windows, failed = row.get("windows"), row.get("failed_clips")
    parts = [_KINDS[row["kind"]]]
    if coding := row.get("coding"):
        parts += [coding["settings"], *([] if coding["numbers"] else ["rate: its bytes over the clip's"])]
    if windows:  # a whole video has as many as it takes
        number = f"{windows['windows']} " if windows["windows"] else ""
        parts.append(f"in {number}windows of {windows['num_frames']} frames")
    parts += [f"{_clips(len(failed))} failed"] if failed else []
    used, total = results.comparison["counts"][row["name"]], results.comparison["num_clips"]
    parts += [f"means over {used:,} of the {_clips(total)}"] if used < total else []
    return "; ".join(filter(None, parts))


def data_set(results: Results) -> str:
    """Name the measured videos."""
    return str(results.protocol.get("dataset") or results.protocol["data"].get("data") or "video clips")


def clip_format(results: Results) -> str:
    """Describe the clips: "16 frames of 224 x 224 at 8 fps", width before height."""
    data = results.protocol["data"]
    frames, size = data.get("num_frames"), data.get("resolution")
    parts = ["the data module's length" if not frames else "whole videos" if frames == WHOLE else f"{frames} frames"]
    height, width = size if isinstance(size, list) else (size, size)
    if size:
        parts.append("at their own size" if size == NATIVE else f"of {width} x {height}")
    fps = data.get("fps")
    parts += (
        [f"at {fps:g} fps" if isinstance(fps, int | float) else "at " + str(fps).replace(" ", " fps ", 1)]
        if fps
        else []
    )
    return " ".join(parts)


def count(results: Results) -> tuple[int, str]:
    """Count the clips, or the videos if the protocol averages them, over which the means are taken; name the unit."""
    clips = results.comparison["num_clips"]
    if results.protocol["average"] == "video":
        return results.comparison["num_videos"], f"videos of the {_clips(clips)}"
    return clips, "clips"


def owners(results: Results) -> str:
    """Name the rows that have every common clip."""
    return "all trained models" if any(row["kind"] == "trained" for row in results.rows) else "all models"


def format_rate(rate: float) -> str:
    """Format a compression rate."""
    return f"{100 * rate:.4g}"


# --- tables ---


def quality_table(results: Results, latents: bool = False) -> Table:
    """Build the main table: rates and quality. `latents` adds a column with the rates of several latents."""
    ordered = rows.order(results)
    filled: list[tuple[Column, _Fill]] = [
        (Column("parameters", "Parameters"), lambda row: _number(row["parameters"], ",")),
        (Column("rate", "Rate", "%", higher=False), _rate),
    ]
    if latents:
        filled.append((Column("latents", "Rate of each latent", "%", words=True), _latent_rates))
    filled.append((Column("bits", "Bits/pixel", higher=False), _bits))
    units = places_of.units_of(results)
    filled += [_metric(results, metric, units) for metric in measured_metrics(results)]
    filled.append((Column("clips", "Clips"), lambda row: _number(results.comparison["counts"][row["name"]], ",")))
    measured = [row for row in ordered if row["kind"] != "failed"]
    filled = [(column, fill) for column, fill in filled if any(fill(row).text for row in measured)]
    lines = []
    for row in ordered:
        cells = [Cell() if row["kind"] == "failed" else fill(row) for _, fill in filled]
        lines.append(Line(row["name"], row["kind"], [*cells, _words(note(results, row))]))
    columns = [*(column for column, _ in filled), Column("note", "Note", words=True)]
    notes = list(_notes(results, measured))
    return Table("quality", "Compression rate and quality", columns, lines, notes, sorted_by="psnr")


def cost_table(results: Results) -> Table | None:
    """Build the table of the cost of encoding and decoding one clip; None if no row was timed."""
    filled = []
    for unit, path, text in (
        ("FLOPs a clip", "flops.{}", _flops),
        ("clips/s", "{}.clips_per_second", str),
        ("peak memory", "{}.peak_memory_bytes", _bytes),
    ):
        for part in ("encode", "decode"):
            key, higher = path.format(part), True if unit == "clips/s" else None
            filled.append((Column(key, part.capitalize(), unit, higher), _at(key, text)))
    settings = (
        "Batches of {batch_size}, median of {repeats} runs after {warmup} to warm up, on {device}; memory counter: "
        "{counter}."
    )
    return _costs(results, "cost", "Cost of encoding and decoding", filled, [settings])


def downstream_table(results: Results) -> Table | None:
    """Build the table of the cost of a diffusion transformer on the latents; None if no row has it."""

    def tokens(found: dict[str, Any]) -> Cell:
        parts = [f"{name}: {number:,}" for name, number in found.get("tokens_by_latent", {}).items()]
        return replace(_number(found.get("tokens"), ","), detail=parts)

    filled = [
        (Column("tokens", "Tokens", "a clip"), tokens),
        (Column("forward", "Forward", "FLOPs"), _at("flops_forward", _flops)),
        (Column("step.flops", "Training step", "FLOPs"), _at("flops_training_step", _flops)),
        (Column("step.seconds", "Training step", "seconds"), _at("seconds_per_step")),
        (Column("step.memory", "Training step", "peak memory"), _at("peak_memory_bytes", _bytes)),
        (Column("parameters", "Parameters", "of the DiT"), _at("parameters")),
        (Column("ffn", "Parameters", "the paper's count"), _at("parameters_ffn_norm_only")),
    ]
    notes = [
        "The paper's DiT (appendix C.2) on each model's latents: patch size 2 on every axis, batch 1, Adam.",
        "The paper's count leaves attention's projections out; it is here to be compared with the paper.",
        "On {device}; memory counter: {counter}.",
    ]
    return _costs(results, "downstream", "Cost of a diffusion transformer on the latents", filled, notes)


def codebook_table(results: Results) -> Table | None:
    """Build the table of codes that the clips used; None if no model has a codebook."""
    columns = [
        Column("codebook", "Codebook", words=True),
        Column("codes", "Codes"),
        Column("dead", "Dead codes", "never used"),
        Column("perplexity", "Perplexity", "codes used evenly", higher=True),
    ]
    lines = []
    for row in rows.order(results):
        for name, used in (row.get("codebooks") or {}).items():
            counts = [_number(used["size"], ","), _number(used["dead_codes"], ",")]
            cells = [_words(name), *counts, _number(float(used["perplexity"]), ".1f")]
            lines.append(Line(row["name"], row["kind"], cells))
    return Table("codebooks", "Use of the codebooks", columns, lines) if lines else None


def published_table(results: Results) -> Table | None:
    """Build the table of papers' numbers, each with whether its protocol is the measured one; None without any."""
    found = papers.beside(results.protocol, [row["name"] for row in results.rows])
    if not found:
        return None
    scores = [BY_KEY[key] for key in papers.NUMBERS]
    columns = [
        Column("source", "Source", words=True),
        Column("rate", "Rate", "%", higher=False),
        *scores,
        Column("lpips_net", "LPIPS network", words=True),
        Column("protocol", "Protocol", words=True),
    ]
    lines = []
    for entry in found:
        rate = entry["claimed_rate"] if entry["rate"] is None else entry["rate"]
        cells = [
            _words(entry["source"]),
            Cell() if rate is None else Cell(format_rate(rate), rate),
            *(Cell(metric.text(entry[metric.key]), entry[metric.key]) for metric in scores),
            _words(entry["lpips_net"] or "" if entry["lpips"] is not None else ""),
            _match(entry),
        ]
        lines.append(Line(entry["method"], "trained" if entry["matches"] else "reference", cells))
    caption = "Published numbers, of other protocols: not comparable"
    if any(entry["matches"] for entry in found):
        caption = "Published numbers, comparable where the protocol matches"
    return Table("published", caption, columns, lines, ["As their papers print them."], "Method")


# --- cells ---


def _metric(results: Results, metric: Metric, units: dict[str, list[rows.Unit]]) -> tuple[Column, _Fill]:
    """Make a metric's column; the first and the second place of the ranked rows are marked."""
    values = {row["name"]: mean(results, row["name"], metric.key) for row in results.rows}
    ranked = [row["name"] for row in results.rows if is_ranked(results, row, metric.key)]
    means = {name: value for name in ranked if (value := values[name]) is not None}
    places = places_of.rank(results, metric, means, units)

    def fill(row: Row) -> Cell:
        value = values[row["name"]]
        if value is None:
            return Cell(UNAVAILABLE if metric.key in row["metrics"] else "")
        found = results.comparison["rows"][row["name"]][metric.key]
        cell = Cell(metric.text(value), None if math.isnan(value) else value)
        cell.mark = {1: BEST, 2: SECOND}.get(places.get(row["name"], 0), "")
        if metric.key == "rfvd":
            return replace(cell, count=found["num_clips"], small="" if found["ranked"] else "not ranked")
        return replace(cell, deviation=metric.text(found["std"]))

    return replace(metric, unit="N") if metric.key == "rfvd" else metric, fill


def _rate(row: Row) -> Cell:
    cell = Cell(format_rate(row["compression_rate"]), row["compression_rate"])
    for name, latent in row["latents"].items():
        # Clips that differ in size have latents of other shapes: their numbers are those of all.
        shape = " x ".join(map(str, latent["shape"])) + " = " if latent["shape"] else ""
        bits = "" if latent["bits"] is None else f", {latent['bits']:,.0f} bits"
        cell.detail.append(f"{name}: {format_rate(latent['rate'])} %, {shape}{latent['numbers']:,} numbers{bits}")
    if claimed := row.get("claimed"):
        cell.small, cell.flag = f"claimed {format_rate(claimed['rate'])}", not claimed["agrees"]
    return cell


def _latent_rates(row: Row) -> Cell:
    parts = [f"{name} {format_rate(latent['rate'])}" for name, latent in row["latents"].items()]
    return _words(", ".join(parts) if len(parts) > 1 else "")


def _bits(row: Row) -> Cell:
    cell = _number(row["bits_per_pixel"], ".5f")
    return cell if cell.text else Cell(small="continuous")


def _match(entry: dict[str, Any]) -> Cell:
    if entry["matches"]:
        return Cell("matches", "0")
    parts = [", ".join(entry["differs"])] if entry["differs"] else []
    parts += [f"not stated: {', '.join(entry['unknown'])}"] if entry["unknown"] else []
    return Cell("differs" if entry["differs"] else "not stated", "1", small="; ".join(parts), flag=True)


def _words(text: str) -> Cell:
    return Cell(text, text or None)


def _number(value: float | None, form: str) -> Cell:
    return Cell() if value is None else Cell(format(value, form), value)


def _at(path: str, text: Callable[[Any], str] = "{:,}".format) -> Callable[[dict[str, Any]], Cell]:
    """Make a cell of a number, or of a median with its range, that stands at a dotted path."""

    def fill(found: dict[str, Any]) -> Cell:
        value = rows.look_up(found, path)
        if isinstance(value, dict):
            return Cell(f"{value['median']:.3g}", value["median"], small=f"{value['min']:.3g} to {value['max']:.3g}")
        return Cell() if value is None else Cell(text(value), value)

    return fill


def _costs(results: Results, key: str, caption: str, filled: list[Any], notes: list[str]) -> Table | None:
    """Build a table of the values of rows under `key`; rows with the same settings share the last note."""
    lines = []
    shared: dict[str, list[str]] = {}
    for row in rows.order(results):
        if not (found := row.get(key)):
            continue
        if "error" in found:
            cells = [Cell("failed", small=str(found["error"]), flag=True), *(Cell() for _ in filled[1:])]
        else:
            cells = [fill(found) for _, fill in filled]
            counter = found["memory_counter"]
            counter += " alone, not what kernels take for themselves" if counter == "tensors" else ""
            shared.setdefault(notes[-1].format(**found, counter=counter), []).append(row["name"])
        lines.append(Line(row["name"], row["kind"], cells))
    *general, _ = notes
    settings = [text if len(shared) == 1 else f"{few(names)}: {text}" for text, names in shared.items()]
    return Table(key, caption, [column for column, _ in filled], lines, general + settings) if lines else None


def shorten(value: float, unit: str = "", binary: bool = False) -> str:
    """Format a number with a prefix: "12.3 GFLOP", "118 MiB"."""
    base, prefixes = (1024, ("Ki", "Mi", "Gi", "Ti")) if binary else (1000, ("k", "M", "G", "T", "P"))
    prefix = ""
    for larger in prefixes:
        if value >= base:
            value, prefix = value / base, larger
    return f"{value:.4g} {prefix}{unit}".strip()


_flops = partial(shorten, unit="FLOP")
_bytes = partial(shorten, unit="B", binary=True)


def _clips(number: int) -> str:
    return f"{number:,} clip" + ("" if number == 1 else "s")


# --- notes ---


def _notes(results: Results, measured: list[Row]) -> Iterator[str]:
    if not measured:
        yield "No row was measured: every model failed."
        return
    comparison = results.comparison
    number, unit = count(results)
    spread = ", ± their standard deviation" if number > 1 else ""
    yield (
        f"Means over the {number:,} {unit} that {owners(results)} have{spread}."
        if number
        else f"No clip is common to {owners(results)}, so nothing can be compared."
    )
    trained = [row["name"] for row in measured if row["kind"] == "trained"]
    if comparison["ranked"]:
        if len(trained) > 1:  # the best of one says nothing
            yield _RANKING
    elif trained and number:
        fewest = min(trained, key=lambda name: len(results.clips[name]))
        yield (
            f"Nothing is ranked: {owners(results)} share {number:,} of the {_clips(comparison['num_test_clips'])} of "
            f"the test, below {rows.FLOOR:.0%}; {fewest} has the fewest: remove rows/{fewest} to compare the others."
        )
    for name, clips in comparison["left_out"].items():
        yield f"{name} lacks {_clips(len(clips))} that others have: {few([str(clip[0]) for clip in clips])}."
    for metric in metrics(results):
        reasons: dict[str, list[str]] = {}
        for row in measured:
            if UNAVAILABLE in (row["metrics"].get(metric.key), comparison["rows"][row["name"]].get(metric.key)):
                # Means over fewer clips can be taken from clips.csv, but not rFVD.
                other = f"it was measured on more clips than {owners(results)} have"
                reasons.setdefault(row.get("unavailable", {}).get(metric.key) or other, []).append(row["name"])
        for reason, names in reasons.items():
            of = "" if len(names) == len(measured) else f" for {few(names)}"
            yield f"{metric.label} is unavailable{of}: {reason.rstrip('.')}."
    for row in measured:
        if differs := row.get("differs_from_checkpoint"):
            yield f"The config of {row['name']} is not that of its checkpoint: {'; '.join(differs)}."
    yield from claims(results)
    yield from (f"rFVD: {remark}." for remark in rfvd_remarks(results))
    if departs := results.protocol.get("departs"):
        yield f"The preset's evaluation differs: {'; '.join(departs)}."


def claims(results: Results) -> Iterator[str]:
    """Yield a note for each row whose claimed compression rate differs from the measured one."""
    for row in rows.order(results):
        if (claimed := row.get("claimed")) and not claimed["agrees"]:
            rates = format_rate(claimed["rate"]), format_rate(row["compression_rate"])
            yield f"A rate of {rates[0]} % is claimed for {row['name']}; its latents have {rates[1]} %."


def rfvd_remarks(results: Results) -> list[str]:
    """List the remarks on rFVD: too few clips to rank, or biased."""
    found = [row["rfvd"] for row in results.comparison["rows"].values() if isinstance(row.get("rfvd"), dict)]
    return sorted({each["note"] for each in found if each.get("note")})
