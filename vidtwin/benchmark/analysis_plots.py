"""The plots of the analysis: PSNR of each clip against what is in it, and PSNR by frame."""

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin.benchmark import failures, plots, rows
from vidtwin.benchmark.analysis_files import MEASURES, read_all, read_content
from vidtwin.benchmark.plots import Draw, Drawing
from vidtwin.benchmark.rows import Results

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HEIGHT = 3.6  # inches of a panel with its legend


def write(folder: str | Path) -> list[Path]:
    """Write `plots/{content,frames}.{png,svg}` of a results folder with an analysis; return their paths."""
    return plots.write_plots(rows.read(folder), {"content": draw_content, "frames": draw_frames})


def drawings(results: Results) -> list[Drawing]:
    """Draw the plots for the page; none without an analysis."""
    draws: dict[str, Draw] = {"PSNR against the content": draw_content, "PSNR by frame": draw_frames}
    return plots.draw_for_page(results, draws, "analysis")


def draw_content(results: Results) -> "tuple[Figure, str] | None":
    """Draw PSNR of the clips over motion, change and texture, a point for each clip of each model."""
    content = {rows.key_of(clip): clip for clip in read_content(results.folder, results.protocol_hash)}
    names = [row["name"] for row in rows.order(results) if row["kind"] in ("trained", "untrained")]
    style = plots.styles(results)
    lists: dict[str, list[rows.Clip]] = {}
    for name in names:
        clips = [clip for clip in rows.chosen_clips(results, name) if rows.key_of(clip) in content]
        lists |= {name: clips} if clips and all(math.isfinite(clip["psnr"]) for clip in clips) else {}
    if not lists:
        return None
    shown = [key for key in MEASURES if key != "cuts"]
    figure = plots.make_figure(len(shown), columns=len(shown), height=HEIGHT)
    for axes, measure in zip(figure.axes, shown, strict=True):
        for name, clips in lists.items():
            x = [content[rows.key_of(clip)][measure] for clip in clips]
            marks = {**style[name], "linestyle": "none", "markersize": 3.5, "alpha": 0.6, "markeredgewidth": 0.5}
            axes.plot(x, [clip["psnr"] for clip in clips], label=name, **marks)
        axes.set_title("PSNR (dB), ↑ better", loc="left")
        axes.set_xlabel(MEASURES[measure])
    _add_legend(figure)
    return figure, "PSNR of each clip by each model against the motion, change and texture of the clip"


def draw_frames(results: Results) -> "tuple[Figure, str] | None":
    """Draw mean PSNR by the frame's place in the clip with 95% intervals, and the seams of windows."""
    analyses = read_all(results)
    if not analyses:
        return None
    style = plots.styles(results)
    figure = plots.make_figure(1, columns=1, height=HEIGHT)
    (axes,) = figure.axes
    seams = [analysis["seams"] for analysis in analyses.values()]
    for name, analysis in analyses.items():
        found = failures.describe_frames(analysis)
        places = range(len(found["mean"]))
        colour = style[name]["color"]
        axes.plot(places, found["mean"], label=name, markersize=4, linewidth=1.2, **style[name])
        if found["low"][0] is not None:
            axes.fill_between(places, found["low"], found["high"], color=colour, alpha=0.15, linewidth=0)
        for seam in found["seams"]:
            axes.axvline(seam - 0.5, color=colour, linewidth=0.8, linestyle=(0, (2, 2)))
    axes.set_title("PSNR (dB) by frame with its 95% interval, ↑ better", loc="left")
    axes.set_xlabel("frame of the clip" + ("; dotted: a new window" if any(seams) else ""))
    _add_legend(figure)
    return figure, "Mean PSNR of each model by the frame's place in the clip, with its 95% interval"


def _add_legend(figure: "Figure") -> None:
    handles: Any
    handles, labels = figure.axes[0].get_legend_handles_labels()
    columns = min(3 * len(figure.axes), 6, len(labels))  # so that long names stay in the picture
    figure.legend(handles, labels, loc="outside lower left", ncols=columns, frameon=False, fontsize=8)
