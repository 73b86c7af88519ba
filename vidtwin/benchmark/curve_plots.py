"""Plots of the curves of a results folder: quality over real bits per pixel, and over noise on the latents."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin.benchmark import curves, plots, rows
from vidtwin.benchmark.curves import CODEC, Curve, Point
from vidtwin.benchmark.rows import Results
from vidtwin.metrics.registry import BY_KEY, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_METRICS = ("psnr", "ssim", "lpips")
_FEWEST_COLOURS = 3  # of codecs: one for all would not keep them apart
_DASHES = ((0, (4, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))


def write(folder: str | Path) -> list[Path]:
    """Write `plots/{rate_distortion,noise}.{png,svg}` of a results folder; return the paths of those that there are."""
    return plots.write_plots(rows.read(folder), {"rate_distortion": draw_rates, "noise": draw_noise})


def drawings(results: Results) -> list[plots.Drawing]:
    """Draw both for the page."""
    draws = {"rate-distortion: bits per pixel of real bytes": draw_rates, "noise on the latents": draw_noise}
    return plots.draw_for_page(results, draws, "curves")


def draw_rates(results: Results) -> "tuple[Figure, str] | None":
    """Draw quality over bits per pixel, models solid and codecs dashed; None without curves."""
    found = [curve for curve in curves.read(results) if curve.kind != "reference"]
    panels = _panels(found)
    if not panels:
        return None
    figure = _figure(len(panels), len(found))
    for axes, metric in zip(figure.axes, panels, strict=True):
        points = [point for curve in found for point in curve.points if metric.key in point.means]
        for curve, style in _styles(results, found):
            x = [point.bpp for point in curve.points if metric.key in point.means]
            y = [point.means[metric.key] for point in curve.points if metric.key in point.means]
            axes.plot(x, y, label=plots.abbreviate(curve.name), **style)
        axes.set_xlabel("bits per pixel (real bytes), ← better")
        _finish_panel(axes, metric)
        plots.set_log_axis(axes, [point.bpp for point in points])
    key = "solid: models, latents quantized and coded; dashed or dotted: codecs"
    _finish(figure, results, key)
    names = ", ".join(metric.label for metric in panels)
    return figure, f"{names} over the bits per pixel of real bytes: models by the bits of their latents, and codecs"


def draw_noise(results: Results) -> "tuple[Figure, str] | None":
    """Draw quality over the strength of noise on the latents; None without it."""
    every = curves.read_noise(results)
    found = [curve for curve in every if curve.kind != "reference"] or every
    panels = [metric for metric in _panels(found) if metric.key != "lpips"]
    if not panels:
        return None
    figure = _figure(len(panels), len(found))
    for axes, metric in zip(figure.axes, panels, strict=True):
        for curve, style in _styles(results, found):
            axes.plot(
                [point.level for point in curve.points],
                [point.means[metric.key] for point in curve.points],
                label=plots.abbreviate(curve.name),
                **style,
            )
        axes.set_xlabel("noise in standard deviations of the channels")
        _finish_panel(axes, metric)
    _finish(figure, results, "Gaussian noise on the mode of the latents; 0: none")
    names = ", ".join(metric.label for metric in panels)
    return figure, f"{names} of clips decoded from latents with Gaussian noise of rising strength"


def _panels(found: list[Curve]) -> list[Metric]:
    known: set[str] = {key for curve in found for point in curve.points for key in point.means}
    return [BY_KEY[key] for key in _METRICS if key in known]


def _styles(results: Results, found: list[Curve]) -> list[tuple[Curve, dict[str, Any]]]:
    """Choose arguments of `Axes.plot`: rows look as in the other plots, codecs are dashed and small."""
    own = plots.styles(results)
    markers = list(plots.MARKERS)[:-1]
    used = sum(curve.kind != CODEC for curve in found)
    free = plots.COLOURS[used:]  # those that no model has
    colours = free if len(free) >= _FEWEST_COLOURS else plots.COLOURS
    chosen, codecs = [], 0
    for curve in found:
        style: dict[str, Any] = {"markersize": 5, "linewidth": 1.4, "zorder": 3}
        if curve.kind == CODEC:
            style |= {"color": colours[codecs % len(colours)], "marker": markers[(used + 2 * codecs) % len(markers)]}
            style |= {"linestyle": _DASHES[codecs % len(_DASHES)], "linewidth": 1.1, "markersize": 4}
            codecs += 1
        else:
            style |= own[curve.name]
        kind = "reference" if curve.kind == CODEC else curve.kind
        style["gid"] = f"{kind}|{curve.name}: {_describe(curve.points)}"
        chosen.append((curve, style))
    return chosen


def _describe(points: list[Point]) -> str:
    """List the points for hovering."""
    parts = []
    for point in points:
        rate = f" at {point.bpp:.4g} bits/pixel" if "bpp" in point.means else f" at {point.label}"
        parts.append(f"{BY_KEY['psnr'].text(point.means.get('psnr'))} dB{rate}")
    return ", ".join(parts)


def _figure(panels: int, curves: int) -> "Figure":
    figure = plots.make_figure(panels, columns=2)
    width, height = figure.get_size_inches()
    figure.set_size_inches(width + 0.6, height + 0.5 + 0.18 * (curves // 4))
    return figure


def _finish_panel(axes: "Axes", metric: Metric) -> None:
    axes.set_title(f"{metric.title}, {'↑' if metric.higher else '↓'} better", loc="left")
    axes.margins(y=0.08)


def _finish(figure: "Figure", results: Results, key: str) -> None:
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=8)
    plots.finish(figure, results, [], key)
