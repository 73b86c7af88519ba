"""The tables of a results folder as files: Markdown for people, CSV for machines, LaTeX for papers.

The page has the same tables; its template lays them out.
"""

import textwrap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from vidtwin import cards
from vidtwin.benchmark import curves, rows, statistics, statistics_tables, summary
from vidtwin.benchmark.rows import Results, Row
from vidtwin.benchmark.summary import BEST, SECOND, UNAVAILABLE, Cell, Table
from vidtwin.files import write_text
from vidtwin.metrics.registry import SHOWN, Column, Metric
from vidtwin.tables import format_table


def write(folder: str | Path) -> str:
    """Write `table.csv`, `table.md`, `table.tex` and the curves' files of a results folder.

    Returns:
        What a terminal shows: `table.md` without the tables of pairs and seeds, which are long.
    """
    results = rows.read(folder)
    text = markdown(results)
    write_text(results.folder / "table.csv", as_csv(results))
    write_text(results.folder / "table.md", text + _statistics(results))
    write_text(results.folder / "table.tex", latex(results))
    curves.write(results)
    return text


# --- Markdown ---


def markdown(results: Results) -> str:
    """Render the tables with aligned columns, which read well in a terminal too, and the notes on them."""
    main, published = summary.quality_table(results), summary.published_table(results)
    protocol = f"Protocol {results.protocol['name']} ({results.protocol_hash})."
    lines = [*align(main), "", *list_notes([protocol, *main.notes])]
    if intervals := statistics_tables.interval_table(results, statistics.of(results)):
        lines += ["", f"{intervals.caption}:", "", *align(intervals), "", *list_notes(intervals.notes)]
    if published:
        lines += ["", f"{published.caption}:", "", *align(published), ""]
        places = [[column.key for column in published.columns].index(key) for key in ("source", "protocol")]
        cells = [[line.cells[place] for place in places] for line in published.lines]
        lines += list_notes(dict.fromkeys(f"{source.text}: {match.small}." for source, match in cells if match.small))
    for table in curves.tables(results):
        lines += ["", f"{table.caption}:", "", *align(table), "", *list_notes(table.notes)]
    return "\n".join(lines) + "\n"


def _statistics(results: Results) -> str:
    """Render the tables of pairs of models and of the spread over seeds; empty without any."""
    lines = []
    for table in statistics_tables.build(results):
        if table.id in ("pairs", "seeds"):
            lines += ["", f"{table.caption}:", "", *align(table), "", *list_notes(table.notes)]
    return "".join(f"{line}\n" for line in lines)


def align(table: Table) -> Iterator[str]:
    """Yield the lines of a table with aligned columns."""
    heads = [Column("", table.first), *table.columns]
    lines = [[head.title if isinstance(head, Metric) else _lower(head.title) for head in heads]]
    lines += [[line.name, *(_markdown_cell(cell) for cell in line.cells)] for line in table.lines]
    safe = [[cards.escape(cell, terminal=True) for cell in line] for line in lines]
    widths = [max(len(line[i]) for line in safe) for i in range(len(safe[0]))]
    words = [True, *(column.words for column in table.columns)]
    for number, line in enumerate(safe):
        cells = [c.ljust(w) if left else c.rjust(w) for c, w, left in zip(line, widths, words, strict=True)]
        yield f"| {' | '.join(cells)} |"
        if number == 0:
            rules = ["-" * (w + 1) + ("-" if left else ":") for w, left in zip(widths, words, strict=True)]
            yield f"|{'|'.join(rules)}|"


def _lower(title: str) -> str:
    """Begin a title in lower case, but not an abbreviation."""
    return title[0].lower() + title[1:] if title[1].islower() else title


def _markdown_cell(cell: Cell) -> str:
    text = f"**{cell.text}**" if cell.mark == BEST else cell.text
    text += f" ± {cell.deviation}" if cell.deviation else ""
    return text + ("" if cell.count is None else f" ({cell.count:,})")


def list_notes(notes: Iterable[str]) -> list[str]:
    """List notes as Markdown, a line each."""
    return [f"- {cards.escape(note, terminal=True)}" for note in notes]


# --- CSV ---

_PARTS, _SPREAD = ("encode", "decode"), ("median", "min", "max")
_TIMED = ("batch_size", "warmup", "repeats", "memory_counter", "device", "error")
_DIT = (
    *("tokens", "parameters", "parameters_ffn_norm_only", "embedding_parameters"),
    *("flops_forward", "flops_training_step", *(f"seconds_per_step.{each}" for each in _SPREAD)),
    *("peak_memory_bytes", "memory_counter", "device", "error"),
)
# Columns by the place in `results.json` that fills them, before and after those of the metrics.
_BEFORE = {
    "class_path": "model.class_path",
    **{key: key for key in ("checkpoint", "fingerprint", "weights", "parameters")},
    **{key: key for key in ("compression_rate", "bits_per_pixel")},
    "claimed_rate": "claimed.rate",
    "claimed_rate_agrees": "claimed.agrees",
    "window_frames": "windows.num_frames",
    "num_clips": "num_clips",
}
_AFTER = {
    **{f"{part}_flops": f"cost.flops.{part}" for part in _PARTS},
    **{f"{part}_clips_per_second_{x}": f"cost.{part}.clips_per_second.{x}" for part in _PARTS for x in _SPREAD},
    **{f"{part}_peak_memory_bytes": f"cost.{part}.peak_memory_bytes" for part in _PARTS},
    **{f"cost_{key}": f"cost.{key}" for key in _TIMED},
    **{f"dit_{path.replace('.', '_')}": f"downstream.{path}" for path in _DIT},
}


def as_csv(results: Results) -> str:
    """Write every number as the JSON files have it, with the same header for every folder but for its latents.

    Metrics are means, standard deviations and the ends of the mean's 95% interval, over a row's part
    ("num_common_clips") of the clips that all trained rows have. PSNR is in dB, rates are latent numbers / clip numbers
    (0.002 is 0.2%), FLOPs of one clip, memory in bytes, time in seconds.
    A cell is empty if its row has no such number; "unavailable" is a metric without its network.
    """
    ordered = rows.order(results)
    latents = dict.fromkeys(name for row in ordered for name in row.get("latents") or {})
    measured = {metric.key for metric in summary.metrics(results)}
    metrics = [metric for metric in SHOWN if metric.key in measured or not metric.on_request]
    intervals = statistics.of(results)["rows"]
    lines = [_record(results, row, metrics, latents, intervals.get(row["name"], {})) for row in ordered]
    return format_table(list(lines[0]), [[_csv_cell(value) for value in line.values()] for line in lines])


def _record(
    results: Results, row: Row, metrics: Iterable[Metric], latents: Iterable[str], intervals: dict[str, Any]
) -> dict[str, Any]:
    measured = row["kind"] != "failed"
    record = {"model": row["name"], "kind": row["kind"], "note": summary.note(results, row)}
    record |= {key: rows.look_up(row, path) for key, path in _BEFORE.items()}
    record["num_common_clips"] = results.comparison["counts"].get(row["name"])
    record["num_failed_clips"] = len(row.get("failed_clips") or []) if measured else None
    compared = results.comparison["rows"].get(row["name"], {})
    for metric in metrics:
        found = compared.get(metric.key, UNAVAILABLE if metric.key in row.get("metrics", {}) else None)
        found = found if isinstance(found, dict) else {"mean": found, "value": found}
        if metric.per_clip:
            ends = intervals.get(metric.key, {})
            record |= {f"{metric.key}_{part}": found.get(part) for part in ("mean", "std")}
            record |= {f"{metric.key}_{part}": ends.get(part) for part in ("low", "high")}
        else:
            record[metric.key] = found["value"]
            record |= {f"{metric.key}_{part}": found.get(part) for part in ("num_clips", "ranked", "note")}
    record |= {key: rows.look_up(row, path) for key, path in _AFTER.items()}
    for name in latents:
        latent = (row.get("latents") or {}).get(name, {})
        record |= {f"latent.{name}.{key}": latent.get(key) for key in ("rate", "numbers", "bits")}
    return record | {
        "device": row.get("device"),
        "protocol": results.protocol["name"],
        "protocol_hash": row["protocol_hash"],
    }


def _csv_cell(value: Any) -> Any:
    return str(value).lower() if isinstance(value, bool) else value  # as JSON has it


# --- LaTeX ---


def latex(results: Results) -> str:
    r"""Render a `table` environment for `\input`; needs the package booktabs."""
    main = summary.quality_table(results, latents=True)
    columns = main.columns[:-1]  # the notes are in the caption, or take the place of a failed row's numbers
    blocks = [
        [_tex_row(line.name, line.kind, line.cells) for line in main.lines if line.kind == kind] for kind in rows.KINDS
    ]
    blocks += list(_published_blocks(results, columns))
    head = ["Model", *(_tex_head(column) for column in columns)]
    alignment = "l" + "".join("l" if column.words else "r" for column in columns)
    body = "\n    \\midrule\n".join("\n".join(f"    {line} \\\\" for line in block) for block in blocks if block)
    return rf"""% \usepackage{{booktabs}}
\begin{{table}}
  \centering
  \small
  \caption{{{_caption(results, main)}}}
  \label{{tab:vidtwin-{results.protocol_hash}}}
  \begin{{tabular}}{{{alignment}}}
    \toprule
    {" & ".join(head)} \\
    \midrule
{body}
    \bottomrule
  \end{{tabular}}
\end{{table}}
"""


def escape(text: str) -> str:
    """Escape text for LaTeX, on one line."""
    return " ".join(text.split()).translate(_ESCAPES)


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
        "…": r"\ldots{}",
    }
)


def _tex_head(column: Column) -> str:
    arrow = "" if column.higher is None else r" $\uparrow$" if column.higher else r" $\downarrow$"
    return escape(column.title) + arrow


def _tex_row(name: str, kind: str, cells: Sequence[Cell]) -> str:
    *numbers, note = cells
    if kind == "failed":
        reason = escape(textwrap.shorten(note.text, 80, placeholder=" …"))
        return escape(name) + (rf" & \multicolumn{{{len(numbers)}}}{{l}}{{{reason}}}" if numbers else f": {reason}")
    first = escape(name) + (" (untrained)" if kind == "untrained" else "")
    return " & ".join([first, *map(_tex_cell, numbers)])


def _tex_cell(cell: Cell) -> str:
    text = "--" if cell.text == UNAVAILABLE else escape(cell.text)
    text = {BEST: rf"\textbf{{{text}}}", SECOND: rf"\underline{{{text}}}"}.get(cell.mark, text)
    text += rf" $\pm$ {escape(cell.deviation)}" if cell.deviation else ""
    return text + ("" if cell.count is None else f" ({cell.count:,})")


def _published_blocks(results: Results, columns: Sequence[Column]) -> Iterator[list[str]]:
    """Render published rows in the columns of the measured ones. LPIPS by another network is left out."""
    table = summary.published_table(results)
    if not table:
        return
    net = results.protocol["lpips"]["net"]
    for kind, title in (("trained", "Published, of this protocol"), ("reference", "Published, of other protocols")):
        lines = []
        for line in (line for line in table.lines if line.kind == kind):
            found = {column.key: cell for column, cell in zip(table.columns, line.cells, strict=True)}
            if found["lpips_net"].text != net:
                del found["lpips"]
            name = f"{escape(line.name)} ({escape(found['source'].text)})"
            lines.append(" & ".join([name, *(_tex_cell(found.get(column.key, Cell())) for column in columns)]))
        if lines:
            yield [rf"\multicolumn{{{1 + len(columns)}}}{{l}}{{\emph{{{title}}}}}", *lines]


def _caption(results: Results, main: Table) -> str:
    number, unit = summary.count(results)
    clips = escape(f"{unit} of {summary.clip_format(results)}").replace(" x ", r" $\times$ ")
    cells = [cell for line in main.lines for cell in line.cells]
    sentences = [
        f"Compression rate and reconstruction quality on {escape(summary.data_set(results))}: means over the "
        f"$N = {number}$ {clips} that {summary.owners(results)} have"
        + (r", $\pm$ their standard deviation" if any(cell.deviation for cell in cells) else ""),
        f"Protocol {escape(results.protocol['name'])} ({results.protocol_hash})",
    ]
    if any(cell.mark for cell in cells):
        sentences.append(
            "Among trained models the best value is bold, the second underlined; models whose difference may be chance "
            "(paired bootstrap over source videos) share a place, and none is worse than a reference"
        )
    if any(cell.text == UNAVAILABLE for cell in cells):
        sentences.append("--: unavailable")
    sentences += [f"rFVD: {escape(remark)}" for remark in summary.rfvd_remarks(results)]
    sentences += [escape(claim.rstrip(".")) for claim in summary.claims(results)]
    for row in results.rows:
        if windows := row.get("windows"):
            number, length = windows["windows"], windows["num_frames"]
            sentences.append(f"{escape(row['name'])} codes {f'{number} ' if number else ''}windows of {length} frames")
    return ". ".join(sentences) + "."
