"""Pictures of the ship report: the trade-off, robustness, a long run.

In: points and lines. Out: `Chart`s, or None when there is nothing to draw. Not here: tables, sentences.

Bundles are numbered as in the page's tables, so that twelve labels never overlap.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals import formatting as fmt
from evals.svg import ACCENT, BAD, CARD, GRID, INK, MUTED, SECOND, Chart, Layout, chart, new_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


STRONG = (SECOND, ACCENT, INK)
"""Colours of lines that are named; the page's legend has `--kd`, `--masters`, `--ink` for them."""


@dataclass(frozen=True)
class Candidate:
    """A bundle in the trade-off. accuracy, low, high: percent. state: passed, failed, unproven or missing."""

    number: int
    name: str
    state: str
    size_mb: float | None
    ttft_ms: float | None
    accuracy: float | None
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Line:
    """Percent right at each severity, 0 for the question as it is. strong: place in STRONG, None: faint."""

    name: str
    strong: int | None
    severities: tuple[int, ...]
    percent: tuple[float, ...]


@dataclass(frozen=True)
class Run:
    """A sustained run: minutes, and the median time of an answer around them."""

    name: str
    minutes: tuple[float, ...]
    answer_ms: tuple[float, ...]


def front(candidates: Sequence[Candidate]) -> set[int]:
    """Numbers of those that no other beats: as good in size, time to first text and accuracy, better in one.

    Whatever is not measured of a candidate is not counted against others, and never beats anything.
    """

    def beats(a: Candidate, b: Candidate) -> bool:
        pairs = [(x, y) for x, y in zip(_costs(a), _costs(b), strict=True) if y is not None]
        known = [(x, y) for x, y in pairs if x is not None]
        if not known or len(known) < len(pairs):
            return False
        return all(x <= y for x, y in known) and any(x < y for x, y in known)

    return {b.number for b in candidates if not any(beats(a, b) for a in candidates)}


def _costs(c: Candidate) -> tuple[float | None, ...]:
    return c.size_mb, c.ttft_ms, None if c.accuracy is None else -c.accuracy


def tradeoff(candidates: Sequence[Candidate], device: str, *, sizes: bool = True) -> Chart | None:
    """Accuracy against download and against time to first text; the front of all three is drawn strong.

    `sizes`: whether to draw the panel of downloads, which is the same for every device.
    """
    by_size = [c for c in candidates if c.accuracy is not None and c.size_mb]
    by_time = [c for c in candidates if c.accuracy is not None and c.ttft_ms]
    panels: list[tuple[str, Sequence[Candidate], Callable[[Candidate], float]]] = []
    if by_size and sizes:
        panels.append(("download, MB", by_size, lambda c: c.size_mb or 0.0))
    if by_time:
        panels.append((f"time to first text on {device}, ms", by_time, lambda c: c.ttft_ms or 0.0))
    if not panels:
        return None
    best = front(candidates)
    label = "Trade-off: " + "; ".join(map(_candidate_words, candidates))

    def draw(layout: Layout) -> Figure:
        grid = (len(panels), 1) if layout.narrow else (1, len(panels))
        figure, axes = new_figure(layout, 300 * grid[0], *grid)
        for one, (title, chosen, x_of) in zip(axes, panels, strict=True):
            _scatter(one, chosen, x_of, best)
            one.set_xlabel(title)
            one.set_title("% right")
        return figure

    return chart(draw, label)


def _scatter(
    axes: Axes, chosen: Sequence[Candidate], x_of: Callable[[Candidate], float], best: set[int]
) -> None:
    xs = [x_of(c) for c in chosen]
    logarithmic = max(xs) > 8 * min(xs) > 0
    if logarithmic:
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axes.xaxis.set_minor_formatter(lambda value, _: "")
    steps = sorted((x_of(c), c.accuracy or 0.0) for c in chosen if c.number in best)
    stairs = [step for i, step in enumerate(steps) if all(step[1] > other[1] for other in steps[:i])]
    axes.plot([x for x, _ in stairs], [y for _, y in stairs], color=GRID, linewidth=2, drawstyle="steps-post")
    for c in chosen:
        if c.low is not None and c.high is not None:
            axes.plot([x_of(c)] * 2, [c.low, c.high], color=_colour(c), linewidth=1.6, alpha=0.5)
    bounds = [bound for c in chosen for bound in (c.low, c.high, c.accuracy) if bound is not None]
    _room(axes, xs, bounds, logarithmic)
    _numbers(axes, chosen, x_of, best, logarithmic)
    axes.grid(axis="y")


def _colour(c: Candidate) -> str:
    return {"passed": ACCENT, "failed": BAD}.get(c.state, MUTED)


def _room(axes: Axes, xs: Sequence[float], ys: Sequence[float], logarithmic: bool) -> None:
    if logarithmic:
        axes.set_xlim(min(xs) / 1.35, max(xs) * 1.35)
    else:
        spread = max(max(xs) - min(xs), 0.2 * max(xs))
        axes.set_xlim(max(0.0, min(xs) - 0.15 * spread), max(xs) + 0.15 * spread)
    space = 0.12 * max(max(ys) - min(ys), 0.5)
    axes.set_ylim(min(ys) - space, max(ys) + space)


PANEL = (340.0, 230.0)
"""Width and height of a panel in pixels, near enough to tell which numbers would overlap."""
APART = 21.0


def _numbers(
    axes: Axes,
    chosen: Sequence[Candidate],
    x_of: Callable[[Candidate], float],
    best: set[int],
    logarithmic: bool,
) -> None:
    """A dot where the bundle is, its number in a circle there or, if that is taken, beside it on a line."""
    scale = math.log if logarithmic else float
    (left, right), (low, high) = map(scale, axes.get_xlim()), axes.get_ylim()
    placed: list[tuple[float, float]] = []
    for c in sorted(chosen, key=lambda c: c.number not in best):
        x, y, colour = x_of(c), c.accuracy or 0.0, _colour(c)
        spot = (PANEL[0] * (scale(x) - left) / (right - left), PANEL[1] * (y - low) / (high - low))
        dx, dy = _free(spot, placed)
        placed.append((spot[0] + dx, spot[1] + dy))
        strong = c.number in best
        axes.plot(x, y, "o", markersize=4, color=colour, clip_on=False)
        axes.annotate(
            str(c.number), (x, y), xytext=(dx, dy), textcoords="offset points", ha="center", va="center",
            fontsize=9.5, weight="bold", zorder=4 if dx == dy == 0 else 3,  # lines below circles
            color=CARD if strong else colour, annotation_clip=False,
            bbox={
                "boxstyle": "circle,pad=0.28", "facecolor": colour if strong else CARD, "edgecolor": colour,
                "linewidth": 1.4,
            },
            arrowprops={"arrowstyle": "-", "color": colour, "linewidth": 1, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip


def _free(spot: tuple[float, float], placed: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The nearest of some offsets, in rings around the spot, at which nothing lies yet."""
    rings = [(0.0, 0.0)] + [
        (radius * math.cos(math.pi * turn / 6), radius * math.sin(math.pi * turn / 6))
        for radius in (APART, 1.6 * APART, 2.4 * APART, 3.2 * APART)
        for turn in range(12)
    ]
    for dx, dy in rings:
        there = (spot[0] + dx, spot[1] + dy)
        if all(math.dist(there, other) >= APART for other in placed):
            return dx, dy
    return rings[-1]


def _candidate_words(c: Candidate) -> str:
    size = fmt.DASH if c.size_mb is None else f"{fmt.significant(c.size_mb)} MB"
    right = fmt.DASH if c.accuracy is None else f"{c.accuracy:.1f} % right"
    return f"{c.number} {c.name} {size}, first text {fmt.milliseconds(c.ttft_ms)}, {right}, {c.state}"


def robustness(panels: Sequence[tuple[str, Sequence[Line]]]) -> Chart | None:
    """Small multiples: one panel for each kind of change, percent right against its severity."""
    panels = [(title, lines) for title, lines in panels if any(len(line.percent) > 1 for line in lines)]
    if not panels:
        return None
    label = "Percent right by severity: " + "; ".join(
        f"{title}: " + ", ".join(f"{one.name} {one.percent[0]:.1f} to {one.percent[-1]:.1f}" for one in lines)
        for title, lines in panels
    )

    def draw(layout: Layout) -> Figure:
        columns = 1 if layout.narrow else min(3, len(panels))
        rows = math.ceil(len(panels) / columns)
        figure, axes = new_figure(layout, 190 * rows, rows, columns)
        low = min(value for _, lines in panels for line in lines for value in line.percent)
        for one, (title, lines) in zip(axes, panels, strict=False):
            for line in sorted(lines, key=lambda line: line.strong is not None):
                faint = line.strong is None
                colour = MUTED if line.strong is None else STRONG[line.strong % len(STRONG)]
                one.plot(
                    line.severities, line.percent, color=colour, linewidth=1 if faint else 2.2,
                    alpha=0.55 if faint else 1, marker="o", markersize=2 if faint else 4,
                )  # fmt: skip
            one.set_title(title)
            one.set_ylim(max(0.0, low - 4), 101)
            one.set_xticks(range(6))
            one.grid(axis="y")
        for one in axes[len(panels) :]:
            one.set_visible(False)
        return figure

    return chart(draw, label)


def sustained(runs: Sequence[Run]) -> Chart | None:
    """Time of an answer as a run goes on, over its first value."""
    runs = [one for one in runs if len(one.answer_ms) > 1 and one.answer_ms[0] > 0]
    if not runs:
        return None
    label = "Sustained: " + "; ".join(
        f"{one.name} {one.answer_ms[-1] / one.answer_ms[0]:.2f} times its first after "
        f"{one.minutes[-1]:.0f} min"
        for one in runs
    )

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = new_figure(layout, 240, 1, 1)
        for i, one in enumerate(runs):
            ratios = [value / one.answer_ms[0] for value in one.answer_ms]
            colour = (ACCENT, SECOND, INK, MUTED)[i % 4]
            axes.plot(one.minutes, ratios, color=colour)
            axes.annotate(
                one.name, (one.minutes[-1], ratios[-1]), xytext=(5, 0), textcoords="offset points",
                va="center", color=colour, annotation_clip=False,
            )  # fmt: skip
        axes.axhline(1, color=GRID, linewidth=1)
        axes.set_xlabel("minutes")
        axes.set_title("time of an answer over its first")
        axes.grid(axis="y")
        return figure

    return chart(draw, label)
