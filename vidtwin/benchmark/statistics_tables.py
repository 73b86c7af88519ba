"""The tables of `statistics.describe` for Markdown and the page."""

from collections.abc import Iterator
from typing import Any

from vidtwin.benchmark import rows, statistics, summary
from vidtwin.benchmark.rows import Results
from vidtwin.benchmark.summary import Cell, Line, Table
from vidtwin.metrics.registry import Column, Metric, format_number

_LEAST_P = 1e-4  # that is shown as a number


def build(results: Results) -> list[Table]:
    """Build the tables that have lines: intervals, pairs, spread over seeds, worst clips."""
    found = statistics.of(results)
    makers = (interval_table, pair_table, seed_table, worst_table)
    return [table for make in makers if (table := make(results, found))]


def interval_table(results: Results, found: dict[str, Any]) -> Table | None:
    """Build the table of the means' intervals; None if no mean has one."""
    metrics = [metric for metric in summary.measured_metrics(results) if metric.per_clip]
    lines = []
    for row in rows.order(results):
        intervals = found["rows"].get(row["name"], {})
        ends = [intervals.get(metric.key) for metric in metrics]
        if not any(each and each["low"] is not None for each in ends):
            continue
        cells = [
            _interval(metric, each, summary.mean(results, row["name"], metric.key))
            for metric, each in zip(metrics, ends, strict=True)
        ]
        lines.append(Line(row["name"], row["kind"], cells))
    if not lines:
        return None
    caption = f"{found['confidence']:.0%} intervals of the means"
    return Table("intervals", caption, list(metrics), lines, list(_notes(results, found)), sorted_by="psnr")


def _interval(metric: Metric, ends: dict[str, Any] | None, mean: float | None) -> Cell:
    if not ends or ends["low"] is None:
        return Cell()
    return Cell(f"{metric.text(ends['low'])} to {metric.text(ends['high'])}", mean)


def _notes(results: Results, found: dict[str, Any]) -> Iterator[str]:
    number, source = found["num_sources"], found["source"]
    yield (
        f"Percentile bootstrap over {number:,} {source} of the {results.comparison['num_clips']:,} clips, "
        f"{found['draws']:,} draws, seed {found['seed']}: the clips of one source are drawn together."
    )
    if number < statistics.FEW_SOURCES:
        yield f"With fewer than {statistics.FEW_SOURCES} sources such intervals are too narrow."
    if any(metric.key == "rfvd" for metric in summary.measured_metrics(results)):
        yield "rFVD, one number of all clips, has no interval."


def pair_table(results: Results, found: dict[str, Any]) -> Table | None:
    """Build the table of paired differences; None without a pair of trained models."""
    metrics = {metric.key: metric for metric in summary.measured_metrics(results)}
    columns = [
        Column("second", "Against", words=True),
        Column("metric", "Metric", words=True),
        Column("better", "Better on", found["source"].replace(" of UCF-101", "")),
        Column("difference", "Difference", "mean"),
        Column("interval", "Interval", f"{found['confidence']:.0%}"),
        Column("p", "p", "Wilcoxon"),
        Column("p_holm", "p", "Holm"),
        Column("verdict", "Verdict", words=True),
    ]
    lines = []
    for pair in found["pairs"]:
        if pair["metric"] not in metrics:
            continue
        metric = metrics[pair["metric"]]
        cells = [
            Cell(pair["second"], pair["second"]),
            Cell(metric.label, metric.label),
            Cell(f"{pair['better']:,} of {pair['sources']:,}", pair["better"] / pair["sources"]),
            Cell(_signed(metric, pair["difference"]), pair["difference"]),
            Cell(f"{_signed(metric, pair['low'])} to {_signed(metric, pair['high'])}", pair["low"]),
            *(Cell(_format_p(pair[key]), pair[key]) for key in ("p", "p_holm")),
            Cell(verdict := _judge(pair), verdict),
        ]
        lines.append(Line(pair["first"], "trained", cells))
    notes = [
        f"The first model has the better mean. Better on: the {found['source']} on which it is better by the mean of "
        "their clips. The interval is of the mean difference; if it holds 0, the two share a place.",
        "p: Wilcoxon's signed-rank test of the differences, two-sided. Holm: adjusted for the number of pairs of a "
        "metric. The test asks for a shift of most differences, the interval for their mean.",
        f"Two models differ if the interval does not hold 0 and the adjusted p is below {1 - found['confidence']:.2f}.",
    ]
    least = 2.0 ** (1 - found["num_sources"])  # if all differences have one sign
    if least >= _LEAST_P:
        notes.append(f"Of few sources no p is small: of {found['num_sources']:,} none is below {_format_p(least)}.")
    return Table("pairs", "Paired differences of trained models", columns, lines, notes, "Better") if lines else None


def _judge(pair: dict[str, Any]) -> str:
    if pair["low"] <= 0 <= pair["high"]:
        return "may be chance"
    return "differ" if pair["p_holm"] < 1 - statistics.CONFIDENCE else "by the interval alone"


def _signed(metric: Metric, value: float) -> str:
    return format_number(value, f"+.{metric.digits}f")


def _format_p(value: float) -> str:
    return f"{value:.3g}" if value >= _LEAST_P else f"<{_LEAST_P:.4f}"


def seed_table(results: Results, found: dict[str, Any]) -> Table | None:
    """Build the table of the spread over seeds; None without several trainings of one model."""
    measured = summary.measured_metrics(results)
    lines = []
    for group, each in found["seeds"].items():
        values = each["metrics"]
        cells = [Cell(f"{len(each['rows'])}", len(each["rows"]), detail=list(each["rows"]))]
        for metric in measured:
            known = values.get(metric.key)
            text = {} if known is None else {"text": metric.text(known["mean"]), "value": known["mean"]}
            cells.append(Cell(**text, deviation=metric.text(known["std"]) if known else ""))
        lines.append(Line(group, "trained", cells))
    columns = [Column("seeds", "Trainings"), *measured]
    notes = [
        "Mean and standard deviation (n - 1) of the means of trainings that differ in their seed, all over the same "
        "clips: what another training would change. The intervals say what other clips would change."
    ]
    return Table("seeds", "Spread over seeds", columns, lines, notes, "Trainings of") if lines else None


def worst_table(results: Results, found: dict[str, Any]) -> Table | None:
    """Build the table of each model's worst clips; None without clips."""
    metrics = [metric for metric in summary.measured_metrics(results) if metric.per_clip]
    lines = []
    for row in rows.order(results):
        for clip in found["worst_clips"].get(row["name"], ()) if row["kind"] != "reference" else ():
            numbers = [Cell(metric.text(clip.get(metric.key)), clip.get(metric.key)) for metric in metrics]
            cells = [Cell(clip["name"], clip["name"]), Cell(f"{clip['start_frame']:,}", clip["start_frame"]), *numbers]
            lines.append(Line(row["name"], row["kind"], cells))
    columns = [Column("clip", "Clip", words=True), Column("start", "Frame", "first"), *metrics]
    notes = [f"The {statistics.WORST} clips of the lowest PSNR of each model."]
    return Table("worst", "Worst clips", columns, lines, notes) if lines else None
