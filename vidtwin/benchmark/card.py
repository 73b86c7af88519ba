"""Sections of a model card that a results folder and the logs of a training fill: measured, never written by hand."""

import csv
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vidtwin.benchmark import plots, rows, statistics, summary
from vidtwin.benchmark.protocol import flat
from vidtwin.benchmark.rows import Results, Row
from vidtwin.cards import code, escape, settings_table, table
from vidtwin.errors import UserError, few, suggestion
from vidtwin.listing import source_of
from vidtwin.metrics.registry import BY_KEY, Metric

CURVES = "training_curves.png"
_WORST = 3  # clips that are named
_PANELS = {"PSNR (dB)": ("train/psnr", "val/psnr"), "loss": ("train/loss", "val/loss")}
Curve = tuple[list[int], list[float]]


def find_row(results: Results, fingerprint: str, name: str | None, weights: str) -> Row:
    """Find the measured row of a checkpoint by its fingerprint, or the one of a name, which must be of it too.

    Args:
        results: The rows.
        fingerprint: Of the checkpoint.
        name: Of the row; None if it is the only one.
        weights: Which of the checkpoint's weights the card describes, see `LoadedModel`.

    Raises:
        UserError: There is none, there are several, or other weights of the checkpoint were measured.
    """
    found = [row for row in results.rows if row["kind"] == "trained" and row.get("fingerprint") == fingerprint]
    others = [row for row in found if row.get("weights", weights) != weights]
    found = [row for row in found if row not in others]
    if others and not found:
        raise UserError(
            f"Expected a row of this checkpoint's weights ({weights}) in {results.folder}, got "
            f"{few([row['name'] for row in others])} ({others[0]['weights']}); change --use_ema, or measure them by "
            "--protocol.weights."
        )
    names = [row["name"] for row in found]
    if name is not None:
        if name not in names:
            raise UserError(
                f"Expected a row of this checkpoint in {results.folder}, got {name!r}; its rows are "
                f"{few(names) or 'none'}{suggestion(name, names)}"
            )
        return next(row for row in found if row["name"] == name)
    if len(found) != 1:
        raise UserError(
            f"Expected one row of this checkpoint in {results.folder}, got {few(names) or 'none'}; "
            + ("name one by --row." if found else "measure it by `vidtwin test --ckpt_path`.")
        )
    return found[0]


def measured_sections(results: Results, row: Row) -> list[str]:
    """Return the sections on quality, protocol, rates and limits of a row, in Markdown."""
    parts = (_quality(results, row), _protocol(results), _rates(row), _limits(results, row))
    return ["\n".join(part) for part in parts]


def metadata(results: Results, row: Row) -> dict[str, Any]:
    """Return the values of a card's header: the data set and the means, as a model index."""
    from huggingface_hub import EvalResult

    data = summary.data_set(results)
    found = [
        EvalResult(
            task_type="video-reconstruction",
            task_name="Video reconstruction",
            dataset_type="video",
            dataset_name=data,
            dataset_split=str(results.protocol["data"].get("split") or "test"),
            metric_type=metric.key,
            metric_name=metric.title,
            metric_value=round(value, metric.digits),
            metric_args={"protocol": results.protocol["name"], "clips": row["num_clips"]},
        )
        for metric in _metrics(row)
        if math.isfinite(value := _value(row, metric))
    ]
    return {"model_name": " ".join(row["name"].split()), "eval_results": found or None}


def _metrics(row: Row) -> list[Metric]:
    return [metric for key, metric in BY_KEY.items() if metric.shown and isinstance(row["metrics"].get(key), dict)]


def _is_reference(row: Row) -> bool:
    """Return whether a row is a reference without a size of its own, unlike that of a codec."""
    return row["kind"] == "reference" and not row.get("coding")


def _value(row: Row, metric: Metric) -> float:
    found = row["metrics"][metric.key]
    return float(found["mean"] if metric.per_clip else found["value"])


def _quality(results: Results, row: Row) -> Iterator[str]:
    clips = results.clips[row["name"]]
    units = rows.units_of(clips, results.protocol)
    metrics = _metrics(row)
    values = {x.key: [(video, weight, found[x.key]) for video, weight, found in units] for x in metrics if x.per_clip}
    intervals = statistics.bound_means({row["name"]: values})[row["name"]]
    references = [each for each in rows.order(results) if _is_reference(each)]
    videos = {clip["name"] for clip in clips}
    sources = len({source_of(video) for video in videos})
    yield "## Measured quality"
    yield ""
    counts = f"{row['num_clips']:,} clips of {len(videos):,} videos ({sources:,} sources)"
    protocol = f"{escape(results.protocol['name'])} ({results.protocol_hash})"
    narrow = f"; of fewer than {statistics.FEW_SOURCES} it is too narrow" if sources < statistics.FEW_SOURCES else ""
    yield (
        f"Reconstructions of {counts} of {escape(summary.data_set(results))} ({escape(summary.clip_format(results))}), "
        f"protocol {protocol}, weights: {escape(row.get('weights') or 'of the checkpoint')}. In brackets the "
        f"{statistics.CONFIDENCE:.0%} interval of the mean if sources (groups of UCF-101, else videos) are drawn with "
        f"replacement ({statistics.DRAWS:,} draws){narrow}."
    )
    yield ""
    head = ["metric", "better", "this model", *(escape(each["name"]) for each in references)]
    lines = []
    for metric in metrics:
        ends = intervals.get(metric.key, {})
        text = metric.text(_value(row, metric))
        text += f" [{metric.text(ends['low'])}, {metric.text(ends['high'])}]" if ends.get("low") is not None else ""
        others = [
            metric.text(_value(each, metric)) if isinstance(each["metrics"].get(metric.key), dict) else ""
            for each in references
        ]
        lines.append([escape(metric.title), "higher" if metric.higher else "lower", text, *others])
    yield from table(head, lines)
    if references:
        yield ""
        yield "The references have no weights: they show how much a single frame or colour explains."


def _protocol(results: Results) -> list[str]:
    settings = {
        key: value for key, value in flat(results.protocol | {"skipped": {}}).items() if value not in (None, {})
    }
    lists = {key: "; ".join(map(str, value)) for key, value in settings.items() if isinstance(value, list)}
    return settings_table(settings | lists, "Protocol in full")


def _rates(row: Row) -> Iterator[str]:
    yield "## Rate and cost"
    yield ""
    yield f"- {row.get('parameters') or 0:,} parameters."
    yield f"- Compression rate {row['compression_rate']:.4%} (latent numbers over those of the clip)" + "".join(
        f"{', ' if place else ': '}{escape(name)} {latent['rate']:.4%}"
        for place, (name, latent) in enumerate(row["latents"].items())
        if latent.get("rate") is not None
    )
    if (bits := row.get("bits_per_pixel")) is not None:
        yield f"- {bits:.4g} bits per pixel, without entropy coding."
    if (claimed := row.get("claimed")) and not claimed["agrees"]:
        yield f"- A rate of {claimed['rate']:.4%} is claimed for it."
    cost = row.get("cost") or {}
    if flops := cost.get("flops"):
        yield f"- {flops['encode'] / 1e9:,.4g} GFLOPs to encode and {flops['decode'] / 1e9:,.4g} to decode a clip."
    for part in ("encode", "decode"):
        if speed := rows.look_up(row, f"cost.{part}.clips_per_second.median"):
            yield f"- {part.capitalize()}s {speed:.3g} clips a second on {escape(cost.get('device'))}."
    if tokens := rows.look_up(row, "downstream.tokens"):
        yield f"- {tokens:,} tokens in a DiT with patches of 2 on every axis."


def _limits(results: Results, row: Row) -> Iterator[str]:
    clips = sorted(results.clips[row["name"]], key=lambda clip: (clip["psnr"], clip["name"], clip["start_frame"]))
    psnr = BY_KEY["psnr"]
    yield "## Limits, as measured"
    yield ""
    if len(clips) > 1:
        named = [
            f"{code(clip['name'])} from frame {clip['start_frame']} ({psnr.text(clip['psnr'])})"
            for clip in clips[:_WORST]
        ]
        spread = f"{psnr.text(clips[0]['psnr'])} to {psnr.text(clips[-1]['psnr'])} dB"
        yield f"- PSNR of single clips is {spread}; the worst are {', '.join(named)}."
    worse = [
        f"{escape(metric.label)} ({escape(reference['name'])})"
        for reference in results.rows
        if _is_reference(reference)
        for metric in _metrics(row)
        if isinstance(reference["metrics"].get(metric.key), dict)
        and (_value(row, metric) < _value(reference, metric)) == metric.higher
        and _value(row, metric) != _value(reference, metric)
    ]
    if worse:
        yield f"- It is worse than a reference without weights in {', '.join(worse)}."
    if failed := row.get("failed_clips"):
        name, reason = code(failed[0]["name"]), escape(failed[0]["reason"])
        yield f"- Clips that it failed on: {len(failed):,}, such as {name}: {reason}."
    if windows := row.get("windows"):
        yield f"- Longer clips are coded in windows of {windows['num_frames']} frames."
    for key, reason in (row.get("unavailable") or {}).items():
        yield f"- {escape(BY_KEY[key].label if key in BY_KEY else key)} was not measured: {escape(reason)}"
    rfvd = row["metrics"].get("rfvd")
    if isinstance(rfvd, dict) and rfvd.get("note"):
        yield f"- rFVD of {rfvd['num_clips']:,} clips: {escape(rfvd['note'])}."
    yield (
        f"- Measured on {escape(summary.data_set(results))} alone; other videos, lengths and sizes were not measured. "
        "Numbers of other protocols can't be put beside these."
    )


# --- curves ---


def read_curves(run: Path) -> dict[str, Curve]:
    """Read the logged scalars that a card shows, of a run's folder: its TensorBoard files, or its metrics.csv."""
    wanted = {tag for tags in _PANELS.values() for tag in tags}
    found: dict[str, Curve] = {}
    if any(run.glob("events.out.tfevents.*")):
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        events = EventAccumulator(str(run), size_guidance={"scalars": 0})
        events.Reload()
        for tag in sorted(wanted & set(events.Tags()["scalars"])):
            scalars = events.Scalars(tag)
            found[tag] = [each.step for each in scalars], [each.value for each in scalars]
    elif (path := run / "metrics.csv").is_file():
        try:
            with path.open(newline="", encoding="utf-8") as file:
                for line in csv.DictReader(file):
                    for tag in wanted & line.keys():
                        if line[tag]:
                            steps, values = found.setdefault(tag, ([], []))
                            steps.append(int(line["step"]))
                            values.append(float(line[tag]))
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(f"Expected Lightning's metrics at {path}, got a damaged file ({error}).") from error
    return found


def write_curves(curves: dict[str, Curve], path: Path) -> str:
    """Draw curves as a picture at `path` → the section that shows it."""
    panels = {title: tags for title, tags in _PANELS.items() if set(tags) & set(curves)}
    with plots.use_style():
        figure = plots.make_figure(len(panels), columns=len(panels), height=2.5)
        for axes, (title, tags) in zip(figure.axes, panels.items(), strict=True):
            for index, tag in enumerate(tag for tag in tags if tag in curves):
                label = {"train": "training", "val": "validation"}[tag.partition("/")[0]]
                axes.plot(*curves[tag], color=plots.COLOURS[index], label=label, marker="." if label[0] == "v" else "")
            axes.set(xlabel="step", ylabel=title)
            axes.legend()
        plots.save(figure, f"{', '.join(panels)} over the steps of the training", path)
    last = [f"{tag} {values[-1]:.4g} at step {steps[-1]:,}" for tag, (steps, values) in curves.items()]
    return "\n".join(
        ["## Training curves", "", f"![Training curves]({path.name})", "", f"Last values: {', '.join(last)}."]
    )
