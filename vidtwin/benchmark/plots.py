"""Plots of a results folder, made from its files alone: rate and quality, Pareto fronts, the spread over clips.

matplotlib without pyplot: no window, no state that outlives a call. It is imported when a plot is drawn.
"""

import io
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vidtwin.benchmark import rows, summary
from vidtwin.benchmark.rows import Results, Row
from vidtwin.errors import few
from vidtwin.files import inside, remove_leftovers, replacing
from vidtwin.metrics.registry import BY_KEY, Metric

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.text import Annotation
    from matplotlib.transforms import Bbox

# Distinct for every common colour blindness and on white paper. The page has them as variables of these names.
COLOURS = ("#0072b2", "#c84f00", "#00805d", "#a23f8c", "#86690a", "#4b3fae", "#303740")
PALETTE = {f"c{index}": colour for index, colour in enumerate(COLOURS)} | {"reference": "#79828c"}
# Markers of matplotlib with their outlines around (0, 0), about 10 wide, for the page. References have the last one.
MARKERS = {
    "o": "M5 0A5 5 0 1 1 -5 0A5 5 0 1 1 5 0Z",
    "s": "M-4.4 -4.4H4.4V4.4H-4.4Z",
    "^": "M0 -5.4L5.2 4.2H-5.2Z",
    "D": "M0 -6.2L5.2 0L0 6.2L-5.2 0Z",
    "v": "M0 5.4L5.2 -4.2H-5.2Z",
    "P": "M-1.8 -5.4H1.8V-1.8H5.4V1.8H1.8V5.4H-1.8V1.8H-5.4V-1.8H-1.8Z",
    "*": "M0 -6L1.6 -2.2L5.7 -1.9L2.6 0.8L3.5 4.9L0 2.7L-3.5 4.9L-2.6 0.8L-5.7 -1.9L-1.6 -2.2Z",
    "X": "M-5 -3.2L-3.2 -5L0 -1.8L3.2 -5L5 -3.2L1.8 0L5 3.2L3.2 5L0 1.8L-3.2 5L-5 3.2L-1.8 0Z",
}
GRID, SOFT = "#e3e6e9", "#5b646d"
_ON_PAGE = {"#ffffff": "page", "#000000": "ink", GRID: "line", SOFT: "soft"} | {c: name for name, c in PALETTE.items()}
DPI = 150
BITS_OF_A_NUMBER = 16  # a code of one bit and a continuous number weigh the same in a rate that counts numbers

STYLE: Any = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same everywhere
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10,
    "axes.grid": True,
    "grid.color": GRID,
    "grid.linewidth": 0.6,
    "axes.axisbelow": True,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "vidtwin",  # the same file from the same numbers
    "text.parse_math": False,  # a dollar in a name is a dollar
}


@dataclass(frozen=True)
class Axis:
    """A cost of a model: less is better."""

    label: str
    value: Callable[[Row], float | None]


def _flops(row: Row) -> float | None:
    flops = rows.look_up(row, "cost.flops")
    return float(flops["encode"] + flops["decode"]) if flops else None


def _bits(row: Row) -> float | None:
    """Compute bits per pixel: of codes those of their codebooks, of continuous latents `BITS_OF_A_NUMBER` each."""
    latents = (rows.look_up(row, "latents") or {}).values()
    bits = [each["numbers"] * BITS_OF_A_NUMBER if each["bits"] is None else each["bits"] for each in latents]
    numbers = sum(each["numbers"] for each in latents)
    # A rate is numbers over those of the clip, of which a pixel has three.
    return sum(bits) / numbers * 3 * float(row["compression_rate"]) if numbers else None


RATE = Axis("compression rate in numbers (%)", lambda row: 100 * float(row["compression_rate"]))
BITS = Axis(f"bits per pixel, continuous latents as fp{BITS_OF_A_NUMBER}", _bits)
FLOPS = Axis("FLOPs to encode and decode a clip", _flops)
AXES = (
    RATE,
    BITS,
    Axis("parameters", lambda row: rows.look_up(row, "parameters")),
    FLOPS,
    Axis("tokens of the latents in a DiT", lambda row: rows.look_up(row, "downstream.tokens")),
)


@dataclass(frozen=True)
class Point:
    """A model in a panel.

    Attributes:
        name: Of the row.
        x: Cost.
        y: Quality.
        style: Arguments of `Axes.plot`.
        ranked: Whether it may stand on a Pareto front.
        gid: Kind of the row and text on hovering, which `_svg` makes a class and a title.
    """

    name: str
    x: float
    y: float
    style: dict[str, Any]
    ranked: bool
    gid: str = ""


@dataclass(frozen=True)
class Drawing:
    """A plot on the page.

    Attributes:
        label: Its name in the list of plots.
        svgs: Elements whose colours are the page's variables: of all rows and, if there are references, which lie far
            away and squeeze the models, of the others alone.
    """

    label: str
    svgs: list[str]


def write(folder: str | Path) -> list[Path]:
    """Write `plots/{rate_quality,bits_quality,pareto,per_clip}.{png,svg}` of a results folder; return their paths.

    A plot without numbers is not written; an older one and temporary files that a kill left are removed.
    """
    return write_plots(rows.read(folder), _PLOTS)


def write_plots(results: Results, plots: Mapping[str, "Draw"]) -> list[Path]:
    """Write plots by name, as `write` does."""
    written = []
    paths = {name: [inside(results.folder, f"plots/{name}.{kind}") for kind in ("png", "svg")] for name in plots}
    with use_style():
        for name, draw in plots.items():
            drawn = draw(results)
            if drawn is None:
                for path in paths[name]:
                    path.unlink(missing_ok=True)
                    remove_leftovers(path.parent, path.name)
                continue
            for path in paths[name]:
                save(*drawn, path)
            written += paths[name]
    return written


def drawings(results: Results) -> list[Drawing]:
    """Draw the page's plots: every metric against each cost that is known, and the spread over the clips."""
    metrics = summary.measured_metrics(results)
    references = [row for row in results.rows if row["kind"] == "reference"]
    models = replace(results, rows=[row for row in results.rows if row["kind"] != "reference"])
    draws: dict[str, tuple[Draw, bool]] = {
        axis.label: (
            partial(_against, pairs=[(metric, axis) for metric in metrics]),
            any(axis.value(row) for row in references if not row.get("coding")),
        )
        for axis in AXES
    }
    draws["PSNR of the clips"] = _per_clip, bool(references)
    found: list[Drawing] = []
    with use_style():
        for label, (draw, with_references) in draws.items():
            drawn = [each for each in (draw(results), draw(models) if with_references else None) if each]
            svgs = [_for_page(_svg(*each, label), f"plot{len(found)}{i}") for i, each in enumerate(drawn)]
            found += [Drawing(label, svgs)] if svgs else []
    return found


def draw_for_page(results: Results, plots: Mapping[str, "Draw"], ids: str) -> list[Drawing]:
    """Draw plots by label for the page; the ids of their elements begin with `ids`."""
    with use_style():
        drawn = {label: each for label, draw in plots.items() if (each := draw(results))}
        return [Drawing(x, [_for_page(_svg(*each, x), f"{ids}{i}")]) for i, (x, each) in enumerate(drawn.items())]


@contextmanager
def use_style() -> Iterator[None]:
    """Set our style for a while, independently of the user's matplotlibrc."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(STYLE)
        yield


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Find the Pareto front of (cost, quality): the points that no other beats in one and equals in the other.

    Returns:
        Their places in `points`, by rising cost; equal points are there together.
    """
    front: list[int] = []
    best: tuple[float, float] | None = None
    for index in sorted(range(len(points)), key=lambda i: (points[i][0], -points[i][1])):
        if best is None or points[index][1] > best[1] or points[index] == best:
            front.append(index)
            best = points[index]
    return front


def looks(results: Results) -> dict[str, tuple[str, str]]:
    """Choose each row's colour (a name in PALETTE) and marker."""
    found: dict[str, tuple[str, str]] = {}
    *markers, cross = MARKERS
    for index, row in enumerate(row for row in rows.order(results) if row["kind"] != "failed"):
        # Both change from one model to the next, so that 49 have one of their own.
        number = (index + index // len(COLOURS)) % len(markers)
        found[row["name"]] = f"c{index % len(COLOURS)}", markers[number]
        if row["kind"] == "reference":
            found[row["name"]] = "reference", cross
    return found


def styles(results: Results) -> dict[str, dict[str, Any]]:
    """Choose each row's arguments of `Axes.plot`: filled if trained, hollow if untrained, grey for a reference."""
    hollow = [row["name"] for row in results.rows if row["kind"] == "untrained"]
    return {
        name: {
            "color": PALETTE[colour],
            "marker": marker,
            "markerfacecolor": "white" if name in hollow else PALETTE[colour],
        }
        for name, (colour, marker) in looks(results).items()
    }


# --- the plots: a figure, and its description ---


def _quality(results: Results, axis: Axis) -> tuple["Figure", str] | None:
    metrics = [metric for metric in summary.metrics(results) if metric.key in ("psnr", "ssim", "lpips", "rfvd")]
    return _against(results, [(metric, axis) for metric in metrics])


def _pareto(results: Results) -> tuple["Figure", str] | None:
    return _against(results, [(BY_KEY["psnr"], axis) for axis in (RATE, BITS, FLOPS)])


def _against(results: Results, pairs: Sequence[tuple[Metric, Axis]]) -> tuple["Figure", str] | None:
    """Draw a panel with its Pareto front for each pair that any row has both numbers of."""
    panels = [(metric, axis, points) for metric, axis in pairs if (points := _points(results, metric, axis))]
    if not panels:
        return None
    figure = make_figure(len(panels), columns=2)
    drawn = []
    for axes, (metric, axis, points) in zip(figure.axes, panels, strict=True):
        _scatter(axes, points, _metric_title(results, metric), f"{axis.label}, ← better")
        drawn.append((points, _front(axes, [point for point in points if point.ranked], metric.higher)))
    finish(figure, results, drawn)
    metrics = ", ".join(dict.fromkeys(metric.label for metric, _, _ in panels))
    costs = " and ".join(dict.fromkeys(axis.label for _, axis, _ in panels))
    line = "the line joins trained models that no other one beats in both"
    return figure, f"{metrics} of each model against its {costs}; {line}"


def _per_clip(results: Results) -> tuple["Figure", str] | None:
    values = {
        row["name"]: [
            clip["psnr"]
            for clip in rows.chosen_clips(results, row["name"])
            if math.isfinite(clip.get("psnr", math.nan))
        ]
        for row in reversed(rows.order(results))
        if row["kind"] != "failed"
    }
    values = {name: found for name, found in values.items() if found}
    if not values:
        return None
    figure = make_figure(1, columns=1, height=1.1 + 0.36 * len(values))
    axes = figure.axes[0]
    style = styles(results)
    drawn = axes.boxplot(
        list(values.values()),
        orientation="horizontal",
        whis=(0, 100),
        widths=0.55,
        patch_artist=True,
        showmeans=True,
        meanprops={"marker": "D", "markersize": 3.5, "markerfacecolor": "white", "markeredgecolor": "black"},
        medianprops={"color": "black", "linewidth": 1.2},
    )
    for name, box in zip(values, drawn["boxes"], strict=True):
        box.set(facecolor=style[name]["markerfacecolor"], edgecolor=style[name]["color"], alpha=0.75)
    axes.set_yticks(range(1, len(values) + 1), [abbreviate(name) for name in values])
    axes.grid(False, axis="y")
    axes.set_title("PSNR (dB) of the clips, → better", loc="left")
    finish(figure, results, [], "box: middle half; line: median; diamond: mean; whiskers: worst and best clip")
    return figure, "The distribution of PSNR over the clips for each model"


Draw = Callable[[Results], "tuple[Figure, str] | None"]
_PLOTS: dict[str, Draw] = {
    "rate_quality": partial(_quality, axis=RATE),
    "bits_quality": partial(_quality, axis=BITS),
    "pareto": _pareto,
    "per_clip": _per_clip,
}


# --- what they are made of ---


def _points(results: Results, metric: Metric, axis: Axis) -> list[Point]:
    """List the rows that have both numbers; without a cost above 0 there is no place on a logarithmic axis."""
    style = styles(results)
    found = []
    for row in rows.order(results):
        if row["kind"] == "failed" or row.get("coding"):  # codecs have a plot of their own
            continue
        x, y = axis.value(row), summary.mean(results, row["name"], metric.key)
        if x and y is not None and math.isfinite(y):
            text = f"{row['name']}: {metric.title} {metric.text(y)}, {axis.label} {summary.shorten(x)}"
            ranked = summary.is_ranked(results, row, metric.key)
            found.append(Point(row["name"], x, y, style[row["name"]], ranked, f"{row['kind']}|{text}"))
    return found


def _metric_title(results: Results, metric: Metric) -> str:
    title = metric.title
    if metric.key == "rfvd":
        found = [row["rfvd"] for row in results.comparison["rows"].values() if isinstance(row.get("rfvd"), dict)]
        title += f" of {max(each['num_clips'] for each in found):,} clips"
        title += "" if any(each["ranked"] for each in found) else ", too few to rank"
    return f"{title}, {'↑' if metric.higher else '↓'} better"


def make_figure(panels: int, columns: int, height: float = 3.4) -> "Figure":
    """Make a figure of panels of `height` inches in so many columns, without a window."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(panels, columns)
    lines = math.ceil(panels / columns)
    figure = Figure(figsize=(4.8 * columns if panels > 1 else 6.4, height * lines + 0.3), layout="constrained")
    FigureCanvasAgg(figure)
    for index in range(panels):
        figure.add_subplot(lines, columns, index + 1)
    return figure


def _scatter(axes: "Axes", points: list[Point], title: str, label: str) -> None:
    for point in points:
        axes.plot(
            point.x,
            point.y,
            linestyle="none",
            markersize=7,
            markeredgewidth=1.4,
            zorder=3,
            gid=point.gid,
            **point.style,
        )
    axes.set_title(title, loc="left")
    axes.set_xlabel(label)
    set_log_axis(axes, [point.x for point in points])
    axes.margins(y=0.15)


def set_log_axis(axes: "Axes", values: list[float]) -> None:
    """Make the horizontal axis logarithmic: numbers at 1, 2 and 5 if a decade is wide, at decades alone if not."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = min(values), max(values)
    decades = math.log10(high / low)
    space = 10 ** max(0.15, 0.1 * decades)
    axes.set_xlim(low / space, high * space)
    axes.set_xscale("log")
    subs = (1.0, 2.0, 5.0) if decades < 2.5 else (1.0,)
    axes.xaxis.set_major_locator(LogLocator(subs=subs, numticks=12))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: summary.shorten(value)))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_minor_formatter(NullFormatter())


def _front(axes: "Axes", ranked: list[Point], higher: bool) -> list[tuple[float, float]]:
    """Draw the Pareto front; return the corners of its line."""
    front = [ranked[index] for index in pareto([(point.x, point.y if higher else -point.y) for point in ranked])]
    if not front:
        return []
    corners = [(front[0].x, front[0].y)]
    for point in front[1:]:  # up to a point's cost the ones before it are the best
        corners += [(point.x, corners[-1][1]), (point.x, point.y)]
    corners.append((axes.get_xlim()[1], front[-1].y))  # a higher cost can't lose what a lower one reaches
    x, y = zip(*corners, strict=True)
    axes.plot(x, y, color=SOFT, linewidth=1.2, linestyle=(0, (4, 2)), zorder=2)
    return corners


def finish(
    figure: "Figure",
    results: Results,
    panels: list[tuple[list[Point], list[tuple[float, float]]]],
    key: str | None = None,
) -> None:
    """Add the footer, fix the layout, then label the points of each panel beside its line if there is room."""
    number, unit = summary.count(results)
    clips = f"{number:,} {unit} of {summary.data_set(results)} that {summary.owners(results)} have"
    shown = [row["name"] for row in results.rows]
    counts, common = results.comparison["counts"], results.comparison["num_clips"]
    fewer = [f"{name} has {used:,}" for name, used in counts.items() if used < common and name in shown]
    clips += f"; {few(fewer)}" if fewer else ""
    protocol = f"protocol {results.protocol['name']} ({results.protocol_hash})"
    longest = int(figure.get_size_inches()[0] * 17)
    lines = [abbreviate(line, longest) for line in (key, clips, protocol) if line]
    figure.supxlabel("\n".join(lines), fontsize=7, color=SOFT, x=0.01, ha="left")
    engine = figure.get_layout_engine()
    if engine:
        engine.execute(figure)
    figure.set_layout_engine(None)  # otherwise saving lays it out and draws it once more
    for axes, (points, corners) in zip(figure.axes, panels, strict=False):
        _label(axes, points, corners)


# Places of a label, in points from its marker: near first, the right side first.
_PLACES = [
    (x * distance, y * distance)
    for distance in (7, 14, 24, 36)
    for x, y in ((1, 0), (0.8, 0.8), (0.8, -0.8), (-1, 0), (-0.8, 0.8), (-0.8, -0.8), (0, 1.2), (0, -1.2))
]


def _label(axes: "Axes", points: list[Point], corners: list[tuple[float, float]]) -> None:
    """Write each model's name at the place beside its point that covers the least of the rest."""
    from matplotlib.transforms import Bbox

    renderer: Any = axes.get_figure(root=True).canvas.get_renderer()  # type: ignore[union-attr]
    inside = axes.get_window_extent(renderer)
    size = 5 * axes.get_figure(root=True).dpi / 72  # type: ignore[union-attr]
    places = [axes.transData.transform((point.x, point.y)) for point in points]
    taken = [Bbox.from_extents(x - size, y - size, x + size, y + size) for x, y in places]
    line = [axes.transData.transform(corner) for corner in corners]
    for (x0, y0), (x1, y1) in itertools.pairwise(line):
        taken.append(Bbox.from_extents(min(x0, x1) - 1, min(y0, y1) - 1, max(x0, x1) + 1, max(y0, y1) + 1))
    for point in points:
        best: tuple[float, Annotation, Bbox] | None = None
        for place in _PLACES:
            label = _annotate(axes, point, place)
            box = label.get_window_extent(renderer)
            covered = sum(_overlap(box, other) for other in taken) + 4 * (_area(box) - _overlap(box, inside))
            if best is None or covered < best[0] - 1e-6:
                if best:
                    best[1].remove()
                best = covered, label, box
            else:
                label.remove()
            if covered <= 1e-6:
                break
        if best:
            taken.append(best[2])


def _annotate(axes: "Axes", point: Point, place: tuple[float, float]) -> "Annotation":
    x, y = place
    far = math.hypot(x, y) > 20
    label = axes.annotate(
        abbreviate(point.name),
        (point.x, point.y),
        xytext=place,
        textcoords="offset points",
        fontsize=8,
        color=point.style["color"],
        bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.7, "pad": 0.3},
        ha="left" if x > 0 else "right" if x < 0 else "center",
        va="center" if abs(y) < 1 else "bottom" if y > 0 else "top",
        arrowprops={"arrowstyle": "-", "color": point.style["color"], "linewidth": 0.6} if far else None,
        zorder=4,
        gid=point.gid,
    )
    if label.arrow_patch:
        label.arrow_patch.set_gid(point.gid)
    return label


def _overlap(one: "Bbox", other: "Bbox") -> float:
    width = min(one.x1, other.x1) - max(one.x0, other.x0)
    height = min(one.y1, other.y1) - max(one.y0, other.y0)
    return max(width, 0.0) * max(height, 0.0)


def _area(box: "Bbox") -> float:
    return float(box.width * box.height)


def abbreviate(text: str, longest: int = 28) -> str:
    """Cut a text to a length, with an ellipsis at its end."""
    return text if len(text) <= longest else f"{text[: longest - 1]}…"


def save(figure: "Figure", description: str, path: Path) -> None:
    """Write a PNG or SVG, the same bytes each time, with a description for readers who can't see it."""
    with replacing(path) as temporary:
        if path.suffix == ".png":
            figure.savefig(temporary, dpi=DPI, metadata=_metadata(path.stem, description))
        else:
            temporary.write_text(_svg(figure, description, path.stem), encoding="utf-8")


def _svg(figure: "Figure", description: str, name: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, **_metadata(name, description)})
    text = buffer.getvalue().decode()
    # matplotlib writes the title; browsers and screen readers look for the description beside it.
    text = text.replace("</title>", f"</title>\n <desc>{escape(description)}</desc>", 1)
    pattern = r"""<g id=(["'])(trained|untrained|reference)\|(.*?)\1>"""
    text = re.sub(pattern, r'<g class="\2"><title>\3</title>', text)
    return text.replace("<svg ", '<svg role="img" ', 1)


def _for_page(svg: str, name: str) -> str:
    """Make an SVG an element of the page: with the page's colours, ids of its own and no style attributes.

    The page's security policy forbids those; the same properties are allowed as attributes of their own.
    """

    def adapt(tag: re.Match[str]) -> str:
        text = re.sub(
            r' style="([^"]*)"', lambda style: re.sub(r"([\w-]+): ([^;]+);?", r'\1="\2"', f" {style[1]}"), tag[0]
        )
        text = re.sub(r'( id="|url\(#|href="#)', rf"\1{name}-", text)
        return re.sub("#[0-9a-f]{6}\\b", lambda colour: f"var(--{_ON_PAGE[colour[0]]})", text)

    svg = re.sub(r"<(metadata|style)\b.*?</\1>", "", svg[svg.index("<svg ") :], flags=re.DOTALL)
    return re.sub(r"<[^<>]+>", adapt, svg)


def _metadata(name: str, description: str) -> dict[str, str]:
    return {"Title": f"vidtwin: {name.replace('_', ' ')}", "Description": description}
