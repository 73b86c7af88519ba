"""The table of a results folder, from its files alone: for machines (CSV), people (Markdown) and papers (LaTeX)."""

import csv
import io
import textwrap
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vidtwin.benchmark import published, report_tables, rows
from vidtwin.benchmark.rows import Results, Row
from vidtwin.files import write_text
from vidtwin.metrics.registry import SHOWN, Metric

UNAVAILABLE = "unavailable"
BEST, SECOND = "best", "second"
Marks = dict[tuple[str, str], str]  # (row, metric): BEST or SECOND

_SPREAD = ("median", "min", "max")


def write(folder: str | Path) -> str:
    """Write `table.csv`, `table.md` and `table.tex` of a results folder → the table as Markdown."""
    results = rows.read(folder)
    text = markdown(results)
    write_text(results.folder / "table.csv", as_csv(results))
    write_text(results.folder / "table.md", text)
    write_text(results.folder / "table.tex", latex(results))
    return text


# --- what stands in a cell ---


@dataclass(frozen=True)
class Column:
    """A column between the model's name and its note.

    Attributes:
        head: Its name in Markdown.
        tex: Its name in LaTeX.
        text: A measured row's cell; "" where there is nothing to say.
        metric: What it is ranked by, if it is.
    """

    head: str
    tex: str
    text: Callable[[Row], str]
    metric: Metric | None = None


def columns(results: Results) -> list[Column]:
    """Those in which at least one row has something."""
    found = [
        Column("parameters", "Parameters", lambda row: f"{row['parameters']:,}"),
        Column("rate (%)", r"Rate (\%) $\downarrow$", lambda row: _percent(row["compression_rate"])),
        Column("bits/pixel", r"Bits/pixel $\downarrow$", lambda row: _bits(row["bits_per_pixel"])),
        *(_metric_column(results, metric) for metric in report_tables.columns(results)),
        Column("clips", "Clips", lambda row: f"{row['num_clips']:,}"),
    ]
    measured = [row for row in results.rows if row["kind"] != "failed"]
    return [column for column in found if any(column.text(row) for row in measured)]


def _metric_column(results: Results, metric: Metric) -> Column:
    def text(row: Row) -> str:
        value = report_tables.mean(results, row["name"], metric.key)
        if value is None:
            return UNAVAILABLE if metric.key in row["metrics"] else ""
        if metric.key == "rfvd":
            found = results.comparison["rows"][row["name"]]["rfvd"]
            return f"{metric.text(value)} ({found['num_clips']:,})"
        return metric.text(value)

    head = metric.title + (" (N)" if metric.key == "rfvd" else "")
    arrow = r"$\uparrow$" if metric.higher else r"$\downarrow$"
    return Column(head, f"{escape(head)} {arrow}", text, metric)


def marks(results: Results) -> Marks:
    """The best and the second value of each metric among the ranked rows; equal values are marked alike."""
    found: Marks = {}
    for metric in report_tables.metrics(results):
        values = {
            row["name"]: report_tables.mean(results, row["name"], metric.key)
            for row in results.rows
            if report_tables.ranked(results, row, metric.key)
        }
        places = sorted({value for value in values.values() if value is not None}, reverse=metric.higher)
        if len(values) < 2:  # the best of one says nothing
            continue
        for name, value in values.items():
            if value in places[:2]:
                found[name, metric.key] = BEST if value == places[0] else SECOND
    return found


def note(row: Row) -> str:
    """What a reader must know of a row: its kind, windows, or why it failed."""
    if row["kind"] == "failed":
        return f"failed: {_line(row['error'])}"
    parts = [report_tables.NOTES[row["kind"]]]
    if windows := row.get("windows"):
        parts.append(f"in {windows['windows']} windows of {windows['num_frames']} frames")
    if failed := row.get("failed_clips"):
        parts.append(f"{len(failed):,} clip{'s' if len(failed) > 1 else ''} failed")
    return "; ".join(filter(None, parts))


def _percent(rate: float) -> str:
    return f"{100 * rate:.4g}"


def _bits(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"  # of continuous numbers: not known


def _line(text: str | None) -> str:
    return " ".join(str(text or "").split())


# --- Markdown ---


def markdown(results: Results) -> str:
    """The table with aligned columns, which reads well in a terminal too, and what must be known to read it."""
    shown, marked = columns(results), marks(results)
    lines = [["model", *(column.head for column in shown), "note"]]
    for row in rows.order(results):
        if row["kind"] == "failed":
            cells = ["" for _ in shown]
        else:
            cells = [_bold(column.text(row), _mark(marked, row, column) == BEST) for column in shown]
        lines.append([row["name"], *cells, note(row)])
    protocol = f"Protocol {results.protocol['name']} ({results.protocol_hash})."
    notes = [protocol, *report_tables.quality(results).notes]
    return (
        "\n".join([*_aligned(lines, {0, len(lines[0]) - 1}), "", *_list(notes), *_published_markdown(results)]) + "\n"
    )


def _published_markdown(results: Results) -> Iterator[str]:
    """Numbers of papers on this data set, each marked where its protocol isn't this one."""
    found = _published(results)
    if not found:
        return
    words = {True: "matches", False: "differs"}
    lines = [["published", "source", "rate (%)", "PSNR (dB)", "SSIM", "LPIPS", "LPIPS network", "rFVD", "protocol"]]
    for entry in found:
        numbers = [_number(entry["psnr"], 2), _number(entry["ssim"], 4), _number(entry["lpips"], 4)]
        numbers += [entry["lpips_net"] or "" if entry["lpips"] is not None else "", _number(entry["rfvd"], 1)]
        protocol = words[entry["matches"]] if entry["differs"] or entry["matches"] else "not stated"
        lines.append([entry["method"], entry["source"], _published_rate(entry), *numbers, protocol])
    yield from ["", f"{_published_title(found)}:", "", *_aligned(lines, {0, 1, 6, 8}), ""]
    yield from _list(dict.fromkeys(_reason(entry) for entry in found if not entry["matches"]))


def _published(results: Results) -> list[dict[str, Any]]:
    return published.beside(results.protocol, [row["name"] for row in results.rows])


def _published_title(found: list[dict[str, Any]]) -> str:
    if any(entry["matches"] for entry in found):
        return "Published numbers, comparable where the protocol matches"
    return "Published numbers, of other protocols: not comparable"


def _published_rate(entry: dict[str, Any]) -> str:
    rate = entry["claimed_rate"] if entry["rate"] is None else entry["rate"]
    return "" if rate is None else _percent(rate)


def _reason(entry: dict[str, Any]) -> str:
    parts = [", ".join(entry["differs"])] if entry["differs"] else []
    parts += [f"not stated: {', '.join(entry['unknown'])}"] if entry["unknown"] else []
    return f"{entry['source']}: {'; '.join(parts)}."


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _mark(marked: Marks, row: Row, column: Column) -> str | None:
    return marked.get((row["name"], column.metric.key)) if column.metric else None


def _bold(text: str, best: bool) -> str:
    return f"**{text}**" if best else text


def _aligned(lines: Sequence[Sequence[str]], words: set[int]) -> list[str]:
    """A Markdown table; the columns in `words` are texts, the others numbers."""
    safe = [[_safe(cell).replace("|", "\\|") for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in safe) for i in range(len(safe[0]))]
    texts = [
        "| "
        + " | ".join(
            c.ljust(w) if i in words else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True))
        )
        + " |"
        for line in safe
    ]
    rule = "|" + "|".join("-" * (w + 1) + ("-" if i in words else ":") for i, w in enumerate(widths)) + "|"
    return [texts[0], rule, *texts[1:]]


def _list(notes: Sequence[str] | dict[str, None]) -> list[str]:
    return [f"- {_safe(note)}" for note in notes]


def _safe(text: str) -> str:
    """On one line; no name becomes an HTML element."""
    return _line(text).replace("<", "\\<")


# --- CSV ---


def as_csv(results: Results) -> str:
    """Every number as the JSON files have it, with the same header for every results folder but for its latents.

    Metrics are means and standard deviations over the clips that all measured rows have ("num_common_clips"). PSNR is
    in dB, rates are latent numbers / clip numbers (0.002 is 0.2%), FLOPs of one clip, memory in bytes, time in seconds.
    An empty cell is what a row does not have; "unavailable" is a metric without its network.
    """
    latents = list(dict.fromkeys(name for row in rows.order(results) for name in row.get("latents") or {}))
    lines = [_record(results, row, latents) for row in rows.order(results)]
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(lines[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value) for key, value in line.items()} for line in lines)
    return buffer.getvalue()


def _record(results: Results, row: Row, latents: list[str]) -> dict[str, Any]:
    model, claimed, windows = (row.get(key) or {} for key in ("model", "claimed", "windows"))
    record: dict[str, Any] = {
        "model": row["name"],
        "kind": row["kind"],
        "note": note(row),
        "class_path": model.get("class_path"),
        **{key: row.get(key) for key in ("checkpoint", "fingerprint", "weights", "parameters")},
        "compression_rate": row.get("compression_rate"),
        "bits_per_pixel": row.get("bits_per_pixel"),
        "claimed_rate": claimed.get("rate"),
        "claimed_rate_agrees": claimed.get("agrees"),
        "window_frames": windows.get("num_frames"),
        "num_clips": row.get("num_clips"),
        "num_common_clips": None if row["kind"] == "failed" else results.comparison["num_clips"],
        "num_failed_clips": None if row["kind"] == "failed" else len(row.get("failed_clips") or []),
    }
    record |= _metrics_record(results, row) | _cost_record(row.get("cost") or {})
    record |= _downstream_record(row.get("downstream") or {})
    for name in latents:
        latent = (row.get("latents") or {}).get(name, {})
        record |= {f"latent.{name}.{key}": latent.get(key) for key in ("rate", "numbers", "bits")}
    return record | {
        "device": row.get("device"),
        "protocol": results.protocol["name"],
        "protocol_hash": row["protocol_hash"],
    }


def _metrics_record(results: Results, row: Row) -> dict[str, Any]:
    compared = results.comparison["rows"].get(row["name"], {})
    record: dict[str, Any] = {}
    for key in (metric.key for metric in SHOWN if metric.per_clip):
        absent = UNAVAILABLE if key in row.get("metrics", {}) else None
        found = compared.get(key)
        mean, std = (found["mean"], found["std"]) if isinstance(found, dict) else (absent, None)
        record |= {f"{key}_mean": mean, f"{key}_std": std}
    rfvd = compared.get("rfvd")
    known = rfvd if isinstance(rfvd, dict) else {"value": rfvd}
    return record | {
        "rfvd": known["value"],
        "rfvd_num_clips": known.get("num_clips"),
        "rfvd_ranked": known.get("ranked"),
        "rfvd_note": known.get("note"),
    }


def _cost_record(cost: dict[str, Any]) -> dict[str, Any]:
    parts = ("encode", "decode")
    record = {f"{part}_flops": cost.get("flops", {}).get(part) for part in parts}
    for part in parts:
        found = cost.get(part, {})
        speed = found.get("clips_per_second", {})
        record |= {f"{part}_clips_per_second_{each}": speed.get(each) for each in _SPREAD}
        record |= {f"{part}_peak_memory_bytes": found.get("peak_memory_bytes")}
    settings = ("batch_size", "warmup", "repeats", "memory_counter", "device", "error")
    return record | {f"cost_{key}": cost.get(key) for key in settings}


def _downstream_record(found: dict[str, Any]) -> dict[str, Any]:
    counts = ("tokens", "parameters", "parameters_ffn_norm_only", "embedding_parameters")
    record = {f"dit_{key}": found.get(key) for key in (*counts, "flops_forward", "flops_training_step")}
    record |= {f"dit_seconds_per_step_{each}": found.get("seconds_per_step", {}).get(each) for each in _SPREAD}
    return record | {f"dit_{key}": found.get(key) for key in ("peak_memory_bytes", "memory_counter", "device", "error")}


def _plain(value: Any) -> Any:
    return ("true" if value else "false") if isinstance(value, bool) else value


# --- LaTeX ---


def latex(results: Results) -> str:
    r"""A `table` environment for `\input`; needs the package booktabs."""
    shown, marked = columns(results), marks(results)
    ordered = rows.order(results)
    latents = any(len(row.get("latents") or {}) > 1 for row in ordered)
    head = ["Model", *(column.tex for column in shown)]
    head[_after_rate(shown) : _after_rate(shown)] = [r"Rate of each latent (\%)"] if latents else []
    blocks = [
        [_tex_row(row, shown, marked, latents, len(head)) for row in ordered if row["kind"] == kind]
        for kind in rows.KINDS
    ]
    blocks += list(_published_latex(results, shown, latents, len(head)))
    alignment = "l" + "".join("l" if "each latent" in name else "r" for name in head[1:])
    body = "\n    \\midrule\n".join("\n".join(f"    {line} \\\\" for line in block) for block in blocks if block)
    return "\n".join(
        [
            r"% \usepackage{booktabs}",
            r"\begin{table}",
            r"  \centering",
            r"  \small",
            rf"  \caption{{{_caption(results)}}}",
            rf"  \label{{tab:vidtwin-{results.protocol_hash}}}",
            rf"  \begin{{tabular}}{{{alignment}}}",
            r"    \toprule",
            rf"    {' & '.join(head)} \\",
            r"    \midrule",
            body,
            r"    \bottomrule",
            r"  \end{tabular}",
            r"\end{table}",
            "",
        ]
    )


def escape(text: str) -> str:
    """Text for LaTeX, on one line."""
    return _line(text).translate(_ESCAPES)


_ESCAPES = str.maketrans(
    {
        **{character: f"\\{character}" for character in "&%$#_{}"},
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        "<": r"\textless{}",
        ">": r"\textgreater{}",
        "|": r"\textbar{}",
        '"': "''",
        "[": "{[}",  # at a row's start it would belong to the line break before it, as would the star
        "*": "{*}",
        "∞": r"$\infty$",
        "±": r"$\pm$",
        "\u00d7": r"$\times$",
        "≈": r"$\approx$",
    }
)


def _after_rate(shown: list[Column]) -> int:
    """Where the latents' own rates stand, with the model's name counted."""
    return next(i for i, column in enumerate(shown) if column.head == "rate (%)") + 2 if shown else 1


def _tex_row(row: Row, shown: list[Column], marked: Marks, latents: bool, width: int) -> str:
    name = escape(row["name"])
    if row["kind"] == "failed":
        reason = escape(textwrap.shorten(note(row), 80, placeholder=" …")).replace("…", r"\ldots{}")
        return rf"{name} & \multicolumn{{{width - 1}}}{{l}}{{{reason}}}" if width > 1 else rf"{name}: {reason}"
    cells = [name + (" (untrained)" if row["kind"] == "untrained" else "")]
    cells += [_tex_cell(column.text(row), _mark(marked, row, column)) for column in shown]
    if latents:
        parts = [f"{escape(latent)} {_percent(found['rate'])}" for latent, found in row["latents"].items()]
        cells.insert(_after_rate(shown), ", ".join(parts) if len(parts) > 1 else "")
    return " & ".join(cells)


def _tex_cell(text: str, mark: str | None) -> str:
    text = "--" if text == UNAVAILABLE else escape(text)
    return rf"\textbf{{{text}}}" if mark == BEST else rf"\underline{{{text}}}" if mark == SECOND else text


def _published_latex(results: Results, shown: list[Column], latents: bool, width: int) -> Iterator[list[str]]:
    """Blocks of published rows. LPIPS of another network is left out: its column says which it is."""
    found = _published(results)
    net = results.protocol["lpips"]["net"]
    for matches, title in ((True, "Published, of this protocol"), (False, "Published, of other protocols")):
        lines = []
        for entry in found:
            if entry["matches"] is not matches:
                continue
            numbers = {
                "psnr": _number(entry["psnr"], 2),
                "ssim": _number(entry["ssim"], 4),
                "lpips": _number(entry["lpips"], 4) if entry["lpips_net"] == net else "",
                "rfvd": _number(entry["rfvd"], 1),
            }
            cells = [f"{escape(entry['method'])} ({escape(entry['source'])})"]
            for column in shown:
                rate = _published_rate(entry) if column.head == "rate (%)" else ""
                cells.append(numbers.get(column.metric.key, "") if column.metric else rate)
            if latents:
                cells.insert(_after_rate(shown), "")
            lines.append(" & ".join(cells))
        if lines:
            yield [rf"\multicolumn{{{width}}}{{l}}{{\emph{{{title}}}}}", *lines]


def _caption(results: Results) -> str:
    data, comparison = results.protocol["data"], results.comparison
    clip = f"clips of {data['num_frames']} frames" if data.get("num_frames") else "clips"
    size = data.get("resolution")
    clip += f" of ${size} \\times {size}$" if size else ""
    clip += f" at {data['fps']:g} fps" if data.get("fps") else ""
    name = escape(results.protocol.get("dataset") or data.get("data") or "video clips")
    sentences = [
        f"Compression rate and reconstruction quality on {name}",
        f"means over the $N = {comparison['num_clips']}$ {clip} that all models have",
    ]
    text = f"{': '.join(sentences)}. Protocol {escape(results.protocol['name'])} ({results.protocol_hash}). "
    if marks(results):
        text += "Among trained models the best value is bold, the second underlined. "
    text += "".join(f"{sentence} " for sentence in _caveats(results))
    return text.strip()


def _caveats(results: Results) -> Iterator[str]:
    metrics = report_tables.columns(results)
    measured = [row for row in results.rows if row["kind"] != "failed"]
    if any(_metric_column(results, metric).text(row) == UNAVAILABLE for metric in metrics for row in measured):
        yield "--: unavailable."
    found = [row["rfvd"] for row in results.comparison["rows"].values() if isinstance(row.get("rfvd"), dict)]
    for remark in sorted({each["note"] for each in found if each.get("note")}):
        yield f"rFVD: {escape(remark)}."
    for row in measured:
        claimed = row.get("claimed")
        if claimed and not claimed["agrees"]:
            yield f"{escape(row['name'])} claims a rate of {_percent(claimed['rate'])}\\%."
        if windows := row.get("windows"):
            yield f"{escape(row['name'])} codes {windows['windows']} windows of {windows['num_frames']} frames."
