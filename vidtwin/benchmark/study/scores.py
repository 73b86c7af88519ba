"""Write a study's result: `scores.csv`, `scores.md` and a plot."""

from pathlib import Path
from typing import Any

from vidtwin.benchmark import plots, render
from vidtwin.benchmark.statistics import CONFIDENCE, DRAWS, FEW_SOURCES
from vidtwin.benchmark.study.criteria import CRITERIA
from vidtwin.benchmark.study.opinions import Opinion, Study
from vidtwin.benchmark.summary import Cell, Line, Table
from vidtwin.files import write_text
from vidtwin.metrics.registry import Column
from vidtwin.tables import write_table


def write(study: Study, key: dict[str, Any], out: str | Path) -> tuple[str, list[Path]]:
    """Write the files of a result → the table as Markdown, and the paths."""
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    columns = ["model", "criterion", "mean", "low", "high", "scores", "raters", "sources"]
    lines = [
        [
            each.model,
            each.criterion,
            each.mean,
            *(each.interval or (None, None)),
            each.scores,
            each.raters,
            each.sources,
        ]
        for each in study.opinions
    ]
    write_table(folder / "scores.csv", columns, lines)
    text = markdown(study, key)
    write_text(folder / "scores.md", text)
    return text, [folder / "scores.csv", folder / "scores.md", *_draw(study, folder)]


def markdown(study: Study, key: dict[str, Any]) -> str:
    """Format means with intervals as a table, and notes on raters, agreement and method."""
    columns = [Column(each.key, each.label, "1-5", higher=True) for each in CRITERIA]
    columns += [Column(name, name.capitalize()) for name in ("scores", "sources")]
    lines = []
    for model in key["models"]:
        found = {each.criterion: each for each in study.opinions if each.model == model}
        any_of = found[CRITERIA[0].key]
        cells = [Cell(_format(found[criterion.key])) for criterion in CRITERIA]
        lines.append(Line(model, "trained", [*cells, Cell(f"{any_of.scores}"), Cell(f"{any_of.sources}")]))
    table = Table("opinions", "Mean opinion scores", columns, lines)
    return "\n".join([*render.align(table), "", *render.list_notes(_list_notes(study, key))]) + "\n"


def _format(opinion: Opinion) -> str:
    if opinion.mean is None:
        return "none"
    interval = f" [{opinion.interval[0]:.2f}, {opinion.interval[1]:.2f}]" if opinion.interval else ""
    return f"{opinion.mean:.2f}{interval}"


def _list_notes(study: Study, key: dict[str, Any]) -> list[str]:
    labels = {each.key: each.label.lower() for each in CRITERIA}
    agreement = ", ".join(
        f"{labels[name]} {'undefined' if value is None else f'{value:.2f}'}" for name, value in study.alpha.items()
    )
    notes = [
        f"Mean opinion scores of {len(study.raters)} raters, clips {'alone' if key['alone'] else 'beside the source'}. "
        f"In brackets the {CONFIDENCE:.0%} interval of the mean if raters and sources are drawn with replacement, each "
        f"for itself ({DRAWS:,} draws); a source is a group of UCF-101 or a video, and one rater or source has none.",
        f"Agreement (Krippendorff's alpha, ordinal): {agreement}.",
        f"Results of protocol {key['protocol_hash']}, study {key['study']}.",
    ]
    fewest = min([len(study.raters), *(each.sources for each in study.opinions)])
    if 1 < fewest < FEW_SOURCES:
        notes.append(f"Of fewer than {FEW_SOURCES} raters or sources the intervals are too narrow.")
    notes += [f"Left out: {name} {reason}." for name, reason in study.left_out.items()]
    notes += [
        f"{name.capitalize()} rated {done} of {all_of_them}." for name, (done, all_of_them) in study.partial.items()
    ]
    return notes


def _draw(study: Study, folder: Path) -> list[Path]:
    """Draw the means with their intervals, a panel for each criterion, as `scores.png` and `scores.svg`."""
    models = list(dict.fromkeys(each.model for each in study.opinions))
    with plots.use_style():
        figure = plots.make_figure(len(CRITERIA), columns=len(CRITERIA))
        figure.set_size_inches(8, 1.2 + 0.35 * len(models))
        for place, (axes, criterion) in enumerate(zip(figure.axes, CRITERIA, strict=True)):
            for index, model in enumerate(models):
                (found,) = (each for each in study.opinions if (each.model, each.criterion) == (model, criterion.key))
                if found.mean is None:
                    continue
                low, high = found.interval or (found.mean, found.mean)
                colour = plots.COLOURS[index % len(plots.COLOURS)]
                axes.plot([low, high], [index, index], color=colour, linewidth=2)
                axes.plot([found.mean], [index], "o", color=colour, markersize=6)
            axes.set(title=criterion.label, xlim=(0.8, 5.2), xticks=range(1, 6), ylim=(len(models) - 0.5, -0.5))
            axes.set_yticks(range(len(models)), [""] * len(models) if place else models)
        figure.supxlabel("mean opinion score, 5 is best")
        paths = [folder / f"scores.{kind}" for kind in ("png", "svg")]
        for path in paths:
            plots.save(figure, "Mean opinion scores of each model by each criterion, with their intervals", path)
    return paths
