"""The report's pictures, from its numbers.

In: a `Results` or its parts. Out: `Chart`s, or None when there is nothing to draw.
Not here: how a drawing becomes part of the page (`evals/svg.py`), tables, sentences.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from evals import formatting as fmt
from evals.chart_stages import StageRow, stage_bars
from evals.results import Bundle, MaskCurve, Method, Model, Results, TrainingCurve
from evals.svg import (
    ACCENT,
    GRID,
    INK,
    METHOD_COLOURS,
    MUTED,
    SECOND,
    TEACHER,
    Chart,
    Layout,
    chart,
    new_figure,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PANELS = (
    ("loss", "Loss"),
    ("divergence_nats", "Divergence to the teacher (JSD, nats)"),
    ("r_acc", "Correctness reward R_acc"),
    ("r_distill", "Distillation reward R_distill"),
    ("zero_variance_share", "Groups without reward variance"),
    ("gradient", "Share of the gradient norm"),
)
GRADIENTS = (
    ("grad_share_rl", "RL term", ACCENT),
    ("grad_share_divergence", "divergence", SECOND),
    ("grad_share_reference_kl", "KL to start", MUTED),
)


def accuracy(results: Results) -> Chart | None:
    """Every method's test accuracy with its interval, one block per student, the teacher as a line."""
    students = [s for s in results.students if any(m.student == s.name for m in results.methods)]
    if not students:
        return None
    blocks = [[m for m in results.methods if m.student == s.name] for s in students]
    teacher = results.teacher.test.accuracy if results.teacher.test else None
    low = min(m.test.low for block in blocks for m in block)
    label = "Test accuracy: " + "; ".join(
        f"{m.student} {m.label} {fmt.percent(m.test.accuracy)}" for block in blocks for m in block
    )

    def draw(layout: Layout) -> Figure:
        heights = [38 * len(block) + (18 if layout.narrow else 0) for block in blocks]
        figure, rows = new_figure(layout, sum(heights) + 66 * len(blocks), len(blocks), 1, heights)
        for i, (axes, block, student) in enumerate(zip(rows, blocks, students, strict=True)):
            _accuracy_block(axes, block, layout)
            axes.set_title(_student_title(student, layout))
            axes.set_xlim(100 * low - (100 - 100 * low) * 0.06, 100 + (100 - 100 * low) * 0.02)
            if teacher is not None:
                axes.axvline(100 * teacher, color=TEACHER, linewidth=1.2, linestyle=(0, (4, 3)))
            if i == len(blocks) - 1:
                axes.set_xlabel("% of test questions right; line: teacher" if teacher else "% right")
        return figure

    return chart(draw, label)


def mask_curve(curve: MaskCurve) -> Chart:
    """The masked teacher's accuracy against r, with the chosen r_max."""
    label = f"Accuracy of the masked teacher on {curve.split} against the masked share r: " + ", ".join(
        f"r {p.ratio:g} {fmt.percent(p.score.accuracy)}" for p in curve.points
    )

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = new_figure(layout, 250, 1, 1)
        ratios = [p.ratio for p in curve.points]
        shares = [100 * p.score.accuracy for p in curve.points]
        axes.fill_between(
            ratios, [100 * p.score.low for p in curve.points], [100 * p.score.high for p in curve.points],
            color=ACCENT, alpha=0.16, linewidth=0,
        )  # fmt: skip
        axes.plot(ratios, shares, color=ACCENT, marker="o", markersize=5, clip_on=False)
        chosen = next((p for p in curve.points if p.ratio == curve.r_max), None)
        axes.axvline(curve.r_max, color=INK, linewidth=1, linestyle=(0, (2, 2)))
        text = f"r_max = {curve.r_max:g}" + (f": {fmt.percent(chosen.score.accuracy)}" if chosen else "")
        bottom, top = min(shares), max(shares)
        axes.set_ylim(bottom - 0.12 * (top - bottom) - 1, top + 0.08 * (top - bottom) + 0.5)
        left = curve.r_max > (min(ratios) + max(ratios)) / 2
        axes.annotate(
            text, (curve.r_max, 0.06), xycoords=("data", "axes fraction"), color=INK, weight="bold",
            xytext=(-6 if left else 6, 0), textcoords="offset points", ha="right" if left else "left",
        )  # fmt: skip
        axes.set_xlabel("masked share of the teacher's weights, r")
        axes.set_title(f"% right on {curve.split}")
        axes.grid(axis="y")
        return figure

    return chart(draw, label)


def training(curves: Sequence[TrainingCurve], labels: dict[str, str]) -> Chart | None:
    """Small multiples of one student's arms: loss, divergence, rewards, dead groups, gradient shares."""
    panels = [(field, title) for field, title in PANELS if any(_panel_lines(c, field) for c in curves)]
    if not panels:
        return None
    described = ", ".join(title for _, title in panels)
    label = f"Training curves of student {curves[0].student} by step: {described}"

    def draw(layout: Layout) -> Figure:
        columns = 1 if layout.narrow else min(2, len(panels))
        rows = -(-len(panels) // columns)
        figure, axes = new_figure(layout, rows * (150 if layout.narrow else 165), rows, columns)
        for one, (field, title) in zip(axes, panels, strict=False):
            _training_panel(one, field, curves, labels)
            one.set_title(title)
        for one in axes[len(panels) :]:
            one.set_visible(False)
        for one in axes[max(0, len(panels) - columns) : len(panels)]:
            one.set_xlabel("step")
        return figure

    return chart(draw, label)


def bundles(chosen: Sequence[Bundle]) -> Chart | None:
    """Size, time to first text and accuracy of the bundles, side by side on the same rows."""
    if not chosen:
        return None
    label = "Bundles: " + "; ".join(map(_bundle_words, chosen))

    def draw(layout: Layout) -> Figure:
        height = 34 * len(chosen) + 52
        grid = (3, 1) if layout.narrow else (1, 3)
        figure, axes = new_figure(layout, height * grid[0], *grid)
        _bars(axes[0], chosen, [b.bytes / 1e6 for b in chosen], "Size on disk", lambda v: fmt.size(v * 1e6))
        ttft = [b.latency.ttft_ms.p50 if b.latency else None for b in chosen]
        _bars(axes[1], chosen, ttft, "Time to first text, p50", fmt.milliseconds)
        _dots(axes[2], chosen)
        for one in axes[1:] if not layout.narrow else []:
            one.set_yticklabels([])
        return figure

    return chart(draw, label)


def stages(chosen: Sequence[Bundle]) -> Chart | None:
    """Where the time to first text goes: p50 of each stage, and the whole as it was measured."""
    fields = ("preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms")
    timed = [
        StageRow(b.name, b.precision, *(getattr(b.latency, name).p50 for name in fields))
        for b in chosen
        if b.latency is not None
    ]
    return stage_bars(timed) if timed else None


def _student_title(student: Model, layout: Layout) -> str:
    facts = (
        f"Student {student.name}",
        fmt.parameters(student.parameters),
        f"{fmt.times(student.ratio)} smaller",
    )
    return ", ".join(facts) if layout.narrow else f"{facts[0]}: {facts[1]} parameters, {facts[2]}"


def _bundle_words(bundle: Bundle) -> str:
    first_text = bundle.latency.ttft_ms.p50 if bundle.latency else None
    right = bundle.test.accuracy if bundle.test else None
    return (
        f"{bundle.name} {fmt.size(bundle.bytes)}, first text after {fmt.milliseconds(first_text)}, "
        f"{fmt.percent(right)} right"
    )


def _accuracy_block(axes: Axes, block: Sequence[Method], layout: Layout) -> None:
    for row, method in enumerate(block):
        colour, score = METHOD_COLOURS.get(method.method, INK), method.test
        axes.plot([100 * score.low, 100 * score.high], [row, row], color=colour, linewidth=2.6)
        axes.plot(100 * score.accuracy, row, "o", color=colour, markersize=8, clip_on=False)
        axes.annotate(
            fmt.percent(score.accuracy), (100 * score.accuracy, row), textcoords="offset points",
            xytext=(0, 9), ha="center", color=colour, weight="bold",
            annotation_clip=False,
        )  # fmt: skip
    width = 14 if layout.narrow else 30
    axes.set_yticks(range(len(block)), [textwrap.fill(m.label, width) for m in block])
    axes.set_ylim(len(block) - 0.45, -0.75)
    axes.grid(axis="x")


def _panel_lines(curve: TrainingCurve, field: str) -> list[tuple[str, str, Sequence[float | None]]]:
    """(label, colour, values) of one arm in one panel; only Masters has gradient shares."""
    if field == "gradient":
        lines = [(name, colour, getattr(curve, key)) for key, name, colour in GRADIENTS]
    else:
        lines = [(curve.method, METHOD_COLOURS.get(curve.method, INK), getattr(curve, field))]
    return [line for line in lines if line[2] is not None and any(v is not None for v in line[2])]


def _training_panel(axes: Axes, field: str, curves: Sequence[TrainingCurve], labels: dict[str, str]) -> None:
    ends: list[tuple[float, str, str]] = []
    for curve in curves:
        for name, colour, values in _panel_lines(curve, field):
            known = [(s, v) for s, v in zip(curve.steps, values, strict=True) if v is not None]
            steps, heights = [s for s, _ in known], [v for _, v in known]
            smooth = _rolling(heights)
            axes.plot(steps, heights, color=colour, linewidth=1, alpha=0.3)
            axes.plot(steps, smooth, color=colour, linewidth=2)
            ends.append((smooth[-1], labels.get(name, name), colour))
        for step in _stage_starts(curve):
            axes.axvline(step, color=GRID, linewidth=1)
    axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]))
    _label_ends(axes, ends)
    axes.grid(axis="y")


def _stage_starts(curve: TrainingCurve) -> list[int]:
    """Steps at which the teacher's mask changes."""
    if curve.mask_ratio is None:
        return []
    pairs = zip(curve.steps[1:], curve.mask_ratio, curve.mask_ratio[1:], strict=False)
    return [step for step, before, after in pairs if before != after]


def _rolling(values: Sequence[float], window: int = 7) -> list[float]:
    half = window // 2
    around = [values[max(0, i - half) : i + half + 1] for i in range(len(values))]
    return [sum(one) / len(one) for one in around]


def _label_ends(axes: Axes, ends: list[tuple[float, str, str]]) -> None:
    """Name each line at its right end, pushed apart so that names do not overlap."""
    low, high = axes.get_ylim()
    heights = [(value - low) / (high - low) for value, _, _ in ends]
    order = sorted(range(len(ends)), key=lambda i: heights[i])
    gap, placed = 0.13, dict[int, float]()
    for rank, i in enumerate(order):
        placed[i] = heights[i] if rank == 0 else max(heights[i], placed[order[rank - 1]] + gap)
    excess = max(0.0, max(placed.values(), default=0.0) - 1.0)
    for i, (_, text, colour) in enumerate(ends):
        axes.annotate(
            text, (1.0, placed[i] - excess), xycoords="axes fraction", xytext=(5, 0),
            textcoords="offset points", va="center", color=colour, annotation_clip=False,
        )  # fmt: skip


def _bars(
    axes: Axes,
    chosen: Sequence[Bundle],
    values: Sequence[float | None],
    title: str,
    write: Callable[[float], str],
) -> None:
    known = [value for value in values if value is not None]
    for row, value in enumerate(values):
        if value is not None:
            axes.barh(row, value, height=0.5, color=SECOND, linewidth=0)
        text = fmt.DASH if value is None else write(value)
        axes.annotate(
            text, (value or 0, row), xytext=(6, 0), textcoords="offset points", va="center", color=INK
        )
    axes.set_xlim(0, max(known, default=1.0) * 1.45)
    _bundle_rows(axes, chosen, title)


def _dots(axes: Axes, chosen: Sequence[Bundle]) -> None:
    scores = [b.test for b in chosen]
    for row, score in enumerate(scores):
        if score is None:
            continue
        axes.plot([100 * score.low, 100 * score.high], [row, row], color=ACCENT, linewidth=2.6)
        axes.plot(100 * score.accuracy, row, "o", color=ACCENT, markersize=8, clip_on=False)
        axes.annotate(
            fmt.percent(score.accuracy), (100 * score.high, row), xytext=(8, 0), textcoords="offset points",
            va="center", color=INK, annotation_clip=False,
        )  # fmt: skip
    known = [score for score in scores if score is not None]
    low, high = (
        min((100 * s.low for s in known), default=0.0),
        max((100 * s.high for s in known), default=100.0),
    )
    axes.set_xlim(low - 0.1 * (high - low), high + 0.55 * (high - low))
    _bundle_rows(axes, chosen, "% right, with interval")


def _bundle_rows(axes: Axes, chosen: Sequence[Bundle], title: str) -> None:
    axes.set_yticks(range(len(chosen)), [b.precision for b in chosen])
    axes.set_ylim(len(chosen) - 0.4, -0.6)
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.set_title(title)
