"""The tables of the report: what stands in each cell, and by what number or word it is sorted."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from vidtwin.benchmark import rows
from vidtwin.benchmark.protocol import flat
from vidtwin.benchmark.rows import Results, Row
from vidtwin.errors import few
from vidtwin.metrics.registry import SHOWN, Metric

ABSENT = "–"  # noqa: RUF001
# rFVD is of a set of clips: means over fewer of them can be taken from clips.csv, but not rFVD.
_OF_OTHER_CLIPS = "what was measured is of more clips than all rows have"
NOTES = {
    "trained": "",
    "untrained": "untrained weights: not ranked",
    "reference": "reference: not ranked",
    "failed": "failed",
}


@dataclass
class Cell:
    """What stands in one cell.

    Attributes:
        text: Its first line.
        value: What the column is sorted by; None comes last.
        small: A second line.
        detail: Lines that are folded under the first one.
        best: Whether it is the best of the ranked rows.
        flag: Whether the second line is a warning.
    """

    text: str
    value: float | str | None = None
    small: str = ""
    detail: list[str] = field(default_factory=list)
    best: bool = False
    flag: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.value, float) and math.isnan(self.value):
            self.value = None


@dataclass(frozen=True)
class Column:
    """The head of a column; a first click sorts `descending` or not."""

    label: str
    small: str = ""
    descending: bool = False
    sorted: str = "none"  # how it is when the page opens, as aria-sort has it
    words: bool = False


@dataclass
class Line:
    """A row: its name, its kind and the cells after the name."""

    name: str
    kind: str
    cells: list[Cell]

    @property
    def group(self) -> int:
        """Sorting keeps trained models before the others, which are not ranked."""
        return rows.KINDS.index(self.kind)


@dataclass
class Table:
    """A sortable table."""

    id: str
    caption: str
    columns: list[Column]
    lines: list[Line]
    notes: list[str] = field(default_factory=list)


def metrics(results: Results) -> list[Metric]:
    """Those that at least one row has, measured or unavailable."""
    net = results.protocol["lpips"]["net"].replace("_", " ")
    there = {key for row in results.rows for key in row.get("metrics", {})}
    known = [metric for metric in SHOWN if metric.key in there]
    return [replace(metric, label=f"LPIPS ({net})") if metric.key == "lpips" else metric for metric in known]


def columns(results: Results) -> list[Metric]:
    """Those that a table has a column for: at least one row has a value. Why others are missing stands in the notes."""
    return [m for m in metrics(results) if any(mean(results, row["name"], m.key) is not None for row in results.rows)]


def mean(results: Results, name: str, key: str) -> float | None:
    """Of a row over the common clips; None where it is not measured."""
    found = results.comparison["rows"].get(name, {}).get(key)
    if not isinstance(found, dict):
        return None
    return float(found["value"] if key == "rfvd" else found["mean"])


def ranked(results: Results, row: Row, key: str) -> bool:
    """Whether a row's value may be called better than another's."""
    value = mean(results, row["name"], key)
    if row["kind"] != "trained" or value is None or math.isnan(value):
        return False
    return key != "rfvd" or bool(results.comparison["rows"][row["name"]]["rfvd"]["ranked"])


def quality(results: Results) -> Table:
    """Rates and quality: the table that the page opens with."""
    shown = columns(results)
    bits = any(row.get("bits_per_pixel") is not None for row in results.rows)
    best = {metric.key: _best(results, metric) for metric in shown}
    heads = [
        Column("Rate", "% ↓ smaller"),
        *(
            Column(
                metric.label,
                " ".join(filter(None, [metric.unit, "↑ better" if metric.higher else "↓ better"])),
                descending=metric.higher,
                sorted="descending" if metric.key == "psnr" else "none",
            )
            for metric in shown
        ),
        *([Column("Bits", "per pixel")] if bits else []),
        Column("Parameters"),
        Column("Note", words=True),
    ]
    lines = [
        Line(
            row["name"],
            row["kind"],
            [
                _rate(row),
                *(_metric(results, row, metric, best[metric.key]) for metric in shown),
                *([_bits(row)] if bits else []),
                _count(row.get("parameters")),
                _note(row),
            ],
        )
        for row in rows.order(results)
    ]
    return Table("quality", "Compression rate and quality", heads, lines, list(_notes(results, metrics(results))))


def cost(results: Results) -> Table | None:
    """What encoding and decoding of one clip takes; None if no row was timed."""
    chosen = [row for row in rows.order(results) if row.get("cost")]
    if not chosen:
        return None
    columns = [
        Column("Encode", "FLOPs a clip"),
        Column("Decode", "FLOPs a clip"),
        Column("Encode", "clips/s", descending=True),
        Column("Decode", "clips/s", descending=True),
        Column("Encode", "peak memory"),
        Column("Decode", "peak memory"),
    ]
    lines = []
    for row in chosen:
        found = row["cost"]
        cells = [
            *(_of(found, ["flops", part], lambda value: f"{_si(value)}FLOP") for part in ("encode", "decode")),
            *(_spread(found, [part, "clips_per_second"]) for part in ("encode", "decode")),
            *(_of(found, [part, "peak_memory_bytes"], _bytes) for part in ("encode", "decode")),
        ]
        lines.append(_or_error(row, found, cells))
    ways = _said(
        [row for row in chosen if "error" not in row["cost"]],
        lambda row: (
            f"Batches of {row['cost']['batch_size']}, median of {row['cost']['repeats']} runs after "
            f"{row['cost']['warmup']} to warm up, on {row['cost']['device']}; memory counter: "
            f"{_counter(row['cost']['memory_counter'])}."
        ),
    )
    return Table("cost", "Cost of encoding and decoding", columns, lines, ways)


def downstream(results: Results) -> Table | None:
    """What a diffusion transformer on the latents takes; None if no row has it."""
    chosen = [row for row in rows.order(results) if row.get("downstream")]
    if not chosen:
        return None
    columns = [
        Column("Tokens", "a clip"),
        Column("Forward", "FLOPs"),
        Column("Training step", "FLOPs"),
        Column("Training step", "seconds"),
        Column("Training step", "peak memory"),
        Column("Parameters", "of the DiT"),
        Column("Parameters", "the paper's count"),
    ]
    lines = []
    for row in chosen:
        found = row["downstream"]
        tokens = _of(found, ["tokens"], lambda value: f"{value:,}")
        tokens.detail = [f"{name}: {count:,}" for name, count in found.get("tokens_by_latent", {}).items()]
        cells = [
            tokens,
            _of(found, ["flops_forward"], lambda value: f"{_si(value)}FLOP"),
            _of(found, ["flops_training_step"], lambda value: f"{_si(value)}FLOP"),
            _spread(found, ["seconds_per_step"]),
            _of(found, ["peak_memory_bytes"], _bytes),
            _count(found.get("parameters")),
            _count(found.get("parameters_ffn_norm_only")),
        ]
        lines.append(_or_error(row, found, cells))
    notes = ["The paper's DiT (appendix C.2) on each model's latents: patch size 2 on every axis, batch 1, Adam."]
    notes.append("The paper's count leaves attention's projections out; it is here to be compared with the paper.")
    notes += _said(
        [row for row in chosen if "error" not in row["downstream"]],
        lambda row: (
            f"On {row['downstream']['device']}; memory counter: {_counter(row['downstream']['memory_counter'])}."
        ),
    )
    return Table("downstream", "Cost of a diffusion transformer on the latents", columns, lines, notes)


def codebooks(results: Results) -> Table | None:
    """How much of each codebook the clips used; None if no model has one."""
    columns = [
        Column("Codebook", words=True),
        Column("Codes"),
        Column("Dead codes", "never used"),
        Column("Perplexity", "codes used evenly", descending=True),
    ]
    lines = [
        Line(
            row["name"],
            row["kind"],
            [
                Cell(name, name),
                _count(used["size"]),
                _count(used["dead_codes"]),
                Cell(f"{used['perplexity']:.1f}", float(used["perplexity"])),
            ],
        )
        for row in rows.order(results)
        for name, used in (row.get("codebooks") or {}).items()
    ]
    return Table("codebooks", "Use of the codebooks", columns, lines) if lines else None


def published(found: list[dict[str, Any]]) -> Table | None:
    """Numbers of papers, each with whether its protocol is this one; None if there are none."""
    if not found:
        return None
    columns = [
        Column("Source", words=True),
        Column("Data set", words=True),
        Column("Rate", "% ↓ smaller"),
        Column("PSNR", "dB", descending=True),
        Column("SSIM", descending=True),
        Column("LPIPS"),
        Column("rFVD"),
        Column("Protocol", words=True),
    ]
    lines = []
    for entry in found:
        rate = entry["rate"] if entry.get("rate") is not None else entry.get("claimed_rate")
        lines.append(
            Line(
                entry["method"],
                "trained" if entry["matches"] else "reference",
                [
                    Cell(entry["source"], entry["source"]),
                    Cell(entry["dataset"], entry["dataset"]),
                    _number(None if rate is None else 100 * rate, "{:.3g}"),
                    _number(entry.get("psnr"), "{:.2f}"),
                    _number(entry.get("ssim"), "{:.4f}"),
                    _number(entry.get("lpips"), "{:.4f}"),
                    _number(entry.get("rfvd"), "{:.1f}"),
                    _match(entry),
                ],
            )
        )
    notes = ["As their papers print them; comparable with the measured rows only where the protocol matches."]
    return Table("published", "Published numbers", columns, lines, notes)


def protocol(results: Results) -> list[tuple[str, str]]:
    """Every field of the protocol by its dotted name, as text."""
    shown = {key: value for key, value in results.protocol.items() if key != "skipped"}
    return [("hash", results.protocol_hash), *((key, _plain(value)) for key, value in flat(shown).items())]


def models(results: Results) -> list[tuple[str, list[tuple[str, str]]]]:
    """By row: what was measured, on which device, with which versions."""
    found = []
    for row in rows.order(results):
        facts = {"kind": row["kind"], **flat(row.get("model") or {})}
        facts |= {key: row.get(key) for key in ("checkpoint", "fingerprint", "weights", "device", "error")}
        facts |= row.get("versions", {})
        found.append((row["name"], [(key, _plain(value)) for key, value in facts.items() if value is not None]))
    return found


def lost(results: Results) -> list[tuple[str, str, str]]:
    """Clips and videos without numbers: (model or "all", clip or video, reason)."""
    skipped = dict(results.protocol.get("skipped", {}))
    found = [("all", name, reason) for name, reason in sorted(skipped.items())]
    for row in rows.order(results):
        unread = row.get("skipped") or {}
        found += [(row["name"], name, unread[name]) for name in sorted(unread) if name not in skipped]
    for row in rows.order(results):
        failed = {(clip["name"], clip["start_frame"]): clip["reason"] for clip in row.get("failed_clips") or []}
        lacks = {(name, start) for name, start in results.comparison["left_out"].get(row["name"], [])}
        reasons = {key: failed.get(key, "no numbers of this model") for key in sorted({*failed, *lacks})}
        found += [(row["name"], f"{name}, frame {start}", reason) for (name, start), reason in reasons.items()]
    return found


def _counter(name: str) -> str:
    """What counted the memory, and what it does not see."""
    return f"{name} alone, not what kernels take for themselves" if name == "tensors" else name


def _best(results: Results, metric: Metric) -> float | None:
    values = [mean(results, row["name"], metric.key) for row in results.rows if ranked(results, row, metric.key)]
    known = [value for value in values if value is not None]
    if len(known) < 2:  # the best of one says nothing
        return None
    return max(known) if metric.higher else min(known)


def _metric(results: Results, row: Row, metric: Metric, best: float | None) -> Cell:
    value = mean(results, row["name"], metric.key)
    if value is None:
        return Cell("unavailable" if _unavailable(results, row, metric.key) else ABSENT)
    found = results.comparison["rows"][row["name"]][metric.key]
    is_best = value == best and ranked(results, row, metric.key)
    if metric.key == "rfvd":
        small = f"N = {found['num_clips']:,}" + ("" if found["ranked"] else "; not ranked")
        return Cell(metric.text(value), value, small, best=is_best)
    return Cell(metric.text(value), value, f"± {metric.text(float(found['std']))}", best=is_best)


def _unavailable(results: Results, row: Row, key: str) -> bool:
    compared = results.comparison["rows"].get(row["name"], {}).get(key)
    return "unavailable" in (row.get("metrics", {}).get(key), compared)


def _rate(row: Row) -> Cell:
    if row.get("compression_rate") is None:
        return Cell(ABSENT)
    cell = Cell(_percent(row["compression_rate"]), row["compression_rate"])
    for name, latent in row["latents"].items():
        shape = " x ".join(str(size) for size in latent["shape"])
        bits = "" if latent["bits"] is None else f", {latent['bits']:,.0f} bits"
        cell.detail.append(f"{name}: {_percent(latent['rate'])} %, {shape} = {latent['numbers']:,} numbers{bits}")
    if claimed := row.get("claimed"):
        cell.small = f"claimed {_percent(claimed['rate'])}"
        cell.flag = not claimed["agrees"]
    return cell


def _bits(row: Row) -> Cell:
    value = row.get("bits_per_pixel")
    return (
        Cell(ABSENT, small="continuous" if row["kind"] != "failed" else "")
        if value is None
        else _number(value, "{:.4f}")
    )


def _note(row: Row) -> Cell:
    if row["kind"] == "failed":
        return Cell("failed", "failed", str(row.get("error") or "no reason was kept"), flag=True)
    windows = row.get("windows")
    parts = [NOTES[row["kind"]]]
    parts += [f"in {windows['windows']} windows of {windows['num_frames']} frames"] if windows else []
    text = "; ".join(filter(None, parts))
    return Cell(text, text or None)


def _notes(results: Results, shown: list[Metric]) -> Iterator[str]:
    comparison = results.comparison
    measured = [row for row in rows.order(results) if row["kind"] != "failed"]
    if not measured:
        yield "No row was measured: every model failed."
        return
    spread = ", with the standard deviation over them" if comparison["num_clips"] > 1 else ""
    yield (
        f"Means over the {comparison['num_clips']:,} clips that all measured rows have{spread}. Trained models alone "
        "are ranked: the best value of a column is bold."
        if comparison["num_clips"]
        else "No clip is common to all measured rows, so nothing can be compared."
    )
    for name, clips in comparison["left_out"].items():
        yield f"{name} lacks {_clips(len(clips))} that others have: {few([str(clip[0]) for clip in clips])}."
    for metric in shown:
        reasons: dict[str, list[str]] = {}
        for row in measured:
            if _unavailable(results, row, metric.key):
                reason = row.get("unavailable", {}).get(metric.key) or _OF_OTHER_CLIPS
                reasons.setdefault(reason, []).append(row["name"])
        for reason, names in reasons.items():
            of = "" if len(names) == len(measured) else f" for {few(names)}"
            yield f"{metric.label} is unavailable{of}: {reason.rstrip('.')}."
    for row in measured:
        if differs := row.get("differs_from_checkpoint"):
            yield f"The config of {row['name']} is not that of its checkpoint: {'; '.join(differs)}."
        claimed = row.get("claimed")
        if claimed and not claimed["agrees"]:
            yield (
                f"{row['name']} claims a rate of {_percent(claimed['rate'])} %; its latents have "
                f"{_percent(row['compression_rate'])} %."
            )
    remarks = {
        found["note"]
        for row in comparison["rows"].values()
        if isinstance(found := row.get("rfvd"), dict) and found.get("note")
    }
    yield from (f"rFVD: {note}." for note in sorted(remarks))
    if departs := results.protocol.get("departs"):
        yield f"The clips are not those of the preset: {', '.join(departs)}."


def _clips(count: int) -> str:
    return f"{count:,} clip" + ("" if count == 1 else "s")


def _match(entry: dict[str, Any]) -> Cell:
    if entry["matches"]:
        return Cell("matches", "0")
    parts = [f"differs: {', '.join(entry['differs'])}"] if entry["differs"] else []
    parts += [f"not stated: {', '.join(entry['unknown'])}"] if entry["unknown"] else []
    return Cell("protocol differs" if entry["differs"] else "protocol not known", "1", "; ".join(parts), flag=True)


def _or_error(row: Row, found: dict[str, Any], cells: list[Cell]) -> Line:
    if "error" in found:
        cells = [Cell("failed", None, str(found["error"]), flag=True), *(Cell(ABSENT) for _ in cells[1:])]
    return Line(row["name"], row["kind"], cells)


def _look(found: dict[str, Any], path: list[str]) -> Any:
    value: Any = found
    for key in path:
        value = value.get(key) if isinstance(value, dict) else None
    return value


def _of(found: dict[str, Any], path: list[str], text: Callable[[Any], str]) -> Cell:
    value = _look(found, path)
    return Cell(ABSENT) if value is None else Cell(text(value), value)


def _spread(found: dict[str, Any], path: list[str]) -> Cell:
    value = _look(found, path)
    if value is None:
        return Cell(ABSENT)
    return Cell(f"{value['median']:.3g}", value["median"], f"{value['min']:.3g} to {value['max']:.3g}")


def _count(value: int | None) -> Cell:
    if value is None:
        return Cell(ABSENT)
    return Cell(f"{value:,}", value)


def _number(value: float | None, form: str) -> Cell:
    return Cell(ABSENT) if value is None else Cell(form.format(value), float(value))


def _percent(rate: float) -> str:
    return f"{100 * rate:.3g}"


def _si(value: float) -> str:
    for power, prefix in ((1e15, "P"), (1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= power:
            return f"{value / power:.3g} {prefix}"
    return f"{value:.3g} "


def _bytes(value: float) -> str:
    for power, unit in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if value >= power:
            return f"{value / power:.3g} {unit}"
    return f"{value} B"


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, (list, tuple)):
        return ", ".join(str(item) for item in value) or "none"
    return str(value)


def _said(chosen: list[Row], text: Callable[[Row], str]) -> list[str]:
    """One note where all rows have the same, else one for each, with the names."""
    said: dict[str, list[str]] = {}
    for row in chosen:
        said.setdefault(text(row), []).append(row["name"])
    if len(said) == 1:
        return list(said)
    return [f"{few(names)}: {note}" for note, names in said.items()]
