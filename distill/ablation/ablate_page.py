"""The page of an ablation: one self-contained HTML file with its charts.

In: `Results`. Out: HTML text, no network, no script. Not here: figures and sentences
(`distill/ablation/ablate_report.py`), how a drawing becomes part of a page (`evals/svg.py`).
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import evals
from distill.ablation import ablate_report
from distill.ablation.ablate_arms import EXPERIMENTS
from distill.ablation.ablate_report import ArmResult, Compared, Results
from evals import formatting as fmt
from evals.svg import ACCENT, GRID, INK, MUTED, SECOND, TEACHER, Chart, Layout, chart, new_figure
from runtime.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FAMILY_COLOURS = {"masters": ACCENT, "control": SECOND, "labels": MUTED}
ROW = 44
"""CSS pixels of one arm or comparison: its name above, its line below."""


def render(results: Results) -> str:
    """The page as text. Raises MissingExtra without jinja2 or matplotlib."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("jinja2", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(evals.__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    return environment.get_template("ablation.html").render(**_context(results))


def _context(results: Results) -> dict[str, Any]:
    sections = []
    for name, question in EXPERIMENTS.items():
        own = [one for one in results.compared if one.comparison.experiment == name]
        if own:
            rows = [_row(results, one) for one in own]
            sections.append({"id": name, "question": question, "rows": rows, "chart": forest(results, own)})
    return {
        "r": results,
        "fmt": fmt,
        "headline": ablate_report.headline(results),
        "notes": ablate_report.notes(results),
        "sections": sections,
        "accuracy": accuracy(results),
        "tiles": _tiles(results),
        "mean": statistics.fmean,
        "watched": [arm for arm in results.arms.values() if "grad_share_rl" in arm.means],
    }


def _row(results: Results, one: Compared) -> dict[str, Any]:
    return {
        "candidate": results.label(one.comparison.candidate),
        "reference": results.label(one.comparison.reference),
        "found": one.found,
        "main": one.comparison.main,
        "reading": ablate_report.reading(one),
    }


def _tiles(results: Results) -> list[dict[str, str]]:
    found = []
    for name, values in results.baselines.items():
        spread = f"{fmt.interval(min(values), max(values))} over seeds" if len(values) > 1 else "before"
        found.append({"name": name, "value": fmt.percent(statistics.fmean(values)), "note": spread})
    masters = results.arms["masters"]
    found.append(
        {"name": masters.label, "value": fmt.percent(masters.mean), "note": f"{len(masters.seeds)} seeds"}
    )
    return found


def accuracy(results: Results) -> Chart:
    """Every arm's accuracy, a dot a seed and the mean as a bar, the teachers as lines."""
    arms = sorted(results.arms.values(), key=lambda arm: -arm.mean)
    label = "Test accuracy by arm: " + "; ".join(f"{arm.label} {fmt.percent(arm.mean)}" for arm in arms)
    teachers = [values[0] for values in results.baselines.values() if len(values) == 1]

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = new_figure(layout, ROW * len(arms) + 60, 1, 1)
        every = [100 * value for arm in arms for value in arm.accuracy]
        low, high = min(every), max([*every, *(100 * value for value in teachers)])
        for row, arm in enumerate(arms):
            _arm_row(axes, row, arm)
        for value in teachers:
            axes.axvline(100 * value, color=TEACHER, linewidth=1.2, linestyle=(0, (4, 3)))
        axes.set_xlim(low - 0.04 * (high - low) - 0.1, high + 0.04 * (high - low) + 0.1)
        axes.set_ylim(len(arms) - 0.3, -0.8)
        axes.set_yticks([])
        axes.grid(axis="x")
        axes.set_xlabel("% of test questions right; dashed: teachers" if teachers else "% right")
        return figure

    return chart(draw, label)


def _arm_row(axes: Any, row: int, arm: ArmResult) -> None:
    colour = FAMILY_COLOURS[arm.family]
    axes.plot([100 * x for x in arm.accuracy], [row] * len(arm.accuracy), "o", color=colour, alpha=0.45)
    axes.plot([100 * arm.mean] * 2, [row - 0.2, row + 0.2], color=colour, linewidth=3)
    _name(axes, row, f"{arm.label}: {fmt.percent(arm.mean)}")


def _name(axes: Any, row: int, text: str) -> None:
    axes.annotate(
        text, (0.0, row - 0.32), xycoords=("axes fraction", "data"), xytext=(2, 0),
        textcoords="offset points", va="bottom", ha="left", color=INK, fontsize=11,
    )  # fmt: skip


def forest(results: Results, own: Sequence[Compared]) -> Chart:
    """Differences of one experiment in points: a dot a seed, mean and interval, noise in grey."""
    label = "; ".join(ablate_report.sentence(one, results.arms) for one in own)

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = new_figure(layout, ROW * len(own) + 60, 1, 1)
        for row, one in enumerate(own):
            found, colour = one.found, MUTED if one.found.is_noise else ACCENT
            axes.plot([100 * x for x in one.differences], [row] * len(one.differences), "o", color=colour,
                      alpha=0.35, markersize=5)  # fmt: skip
            if found.low is not None and found.high is not None:
                axes.plot([100 * found.low, 100 * found.high], [row, row], color=colour, linewidth=2.6)
            axes.plot(100 * found.mean, row, "D", color=colour, markersize=8)
            name = results.label(one.comparison.candidate)
            than = results.label(one.comparison.reference)
            _name(axes, row, name if layout.narrow else f"{name}, against {than}")
        axes.axvline(0, color=INK, linewidth=1)
        axes.set_ylim(len(own) - 0.3, -0.8)
        axes.set_yticks([])
        axes.grid(axis="x", color=GRID)
        axes.set_xlabel("points of test accuracy")
        return figure

    return chart(draw, label)
