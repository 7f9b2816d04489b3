"""Where the time to first text goes: one bar of stages for each bundle.

In: medians in ms. Out: a `Chart`. Not here: measuring, other pictures (`evals/charts.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from evals import formatting as fmt
from evals.svg import ACCENT, INK, MUTED, SECOND, Chart, Layout, chart, new_figure

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class StageRow:
    """Medians in ms; None where a stage was not measured. `label` stands at the bar, `name` in the text."""

    name: str
    label: str
    preprocess_ms: float | None
    encode_ms: float | None
    prefill_ms: float | None
    ttft_ms: float | None


STAGE_PARTS = (
    ("preprocess_ms", "preprocess", MUTED),
    ("encode_ms", "encode", SECOND),
    ("prefill_ms", "prefill", ACCENT),
)


def stage_bars(rows: Sequence[StageRow]) -> Chart:
    """Stacked stages, with the time to first text, measured whole, as a diamond. Wants at least one row."""
    label = "Stages in ms, p50: " + "; ".join(map(_stage_words, rows))

    def draw(layout: Layout) -> Figure:
        figure, (axes,) = new_figure(layout, 36 * len(rows) + 66, 1, 1)
        longest = 1e-9
        for i, row in enumerate(rows):
            left = 0.0
            for field, _, colour in STAGE_PARTS:
                width = getattr(row, field) or 0.0
                axes.barh(i, width, left=left, height=0.5, color=colour, linewidth=0)
                left += width
            longest = max(longest, row.ttft_ms or left)
            if row.ttft_ms is not None:
                axes.plot(row.ttft_ms, i, marker="D", color=INK, markersize=6, clip_on=False)
                axes.annotate(
                    fmt.milliseconds(row.ttft_ms), (row.ttft_ms, i), xytext=(8, 0),
                    textcoords="offset points", va="center", color=INK,
                )  # fmt: skip
        axes.set_yticks(range(len(rows)), [row.label for row in rows])
        axes.invert_yaxis()
        axes.set_xlim(0, longest * (1.3 if layout.narrow else 1.14))
        axes.set_xlabel("milliseconds, p50")
        axes.grid(axis="x")
        return figure

    return chart(draw, label)


def _stage_words(row: StageRow) -> str:
    stages = [(name, getattr(row, field)) for field, name, _ in STAGE_PARTS]
    stages.append(("first text, measured whole", row.ttft_ms))
    known = [f"{name} {fmt.significant(value)}" for name, value in stages if value is not None]
    return f"{row.name} {', '.join(known)}"
