"""From a matplotlib drawing to inline SVG that follows the page: its colours, its font, its width.

In: a function that draws a figure for a `Layout`. Out: a `Chart`, drawn twice (wide, and narrow for a
phone; CSS shows one). Not here: what is drawn (`evals/charts.py`).

Text stays text. Colours are drawn as stand-ins and replaced by CSS custom properties (`var(--ink)`), so
that dark mode needs no second picture.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.errors import MissingExtra

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, MUTED, GRID = "#010101", "#020202", "#030303"
METHOD_COLOURS = {"warmup": "#0a0001", "sft": "#0a0002", "kd": "#0a0003", "masters": "#0a0004"}
TEACHER, ACCENT, SECOND = "#0a0005", "#0a0004", "#0a0003"
BAD, CARD = "#0a0006", "#0a0007"
VARIABLES = {
    INK: "--ink", MUTED: "--muted", GRID: "--grid", "#0a0001": "--warmup", "#0a0002": "--sft",
    "#0a0003": "--kd", "#0a0004": "--masters", "#0a0005": "--teacher",
    BAD: "--bad", CARD: "--card",
}  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """How wide the drawing is, in CSS pixels, and whether it is the phone's."""

    width: int
    narrow: bool


WIDE, NARROW = Layout(860, False), Layout(350, True)


@dataclass(frozen=True)
class Chart:
    """Two inline SVG drawings of one picture; `label` says in words what it shows."""

    wide: str
    narrow: str
    label: str


def new_figure(
    layout: Layout, height: int, rows: int, columns: int, heights: Sequence[int] | None = None
) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    # 72 points an inch, so that one point is one CSS pixel.
    figure = Figure(figsize=(layout.width / 72, height / 72), layout="constrained")
    ratios = {"height_ratios": list(heights)} if heights else None
    axes = figure.subplots(rows, columns, squeeze=False, gridspec_kw=ratios)
    return figure, list(axes.flat)


def chart(draw: Callable[[Layout], Figure], label: str) -> Chart:
    return Chart(_svg(draw, WIDE, label), _svg(draw, NARROW, label), label)


def _svg(draw: Callable[[Layout], Figure], layout: Layout, label: str) -> str:
    buffer = io.StringIO()
    with _style(f"{label}/{layout.width}"):
        draw(layout).savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    return _inline(buffer.getvalue(), label)


@contextmanager
def _style(salt: str) -> Iterator[None]:
    try:
        import matplotlib
    except ImportError:
        raise MissingExtra("matplotlib", "report") from None
    settings: dict[str, Any] = {
        "svg.fonttype": "none", "svg.hashsalt": salt, "figure.dpi": 72, "font.family": "DejaVu Sans",
        "font.size": 12, "text.color": INK, "axes.labelcolor": MUTED, "axes.labelsize": 11.5,
        "axes.titlesize": 12.5, "axes.titleweight": "bold", "axes.titlelocation": "left", "axes.titlepad": 10,
        "axes.titlecolor": INK, "axes.edgecolor": GRID, "axes.linewidth": 1, "axes.axisbelow": True,
        "axes.spines.top": False, "axes.spines.right": False, "axes.spines.left": False,
        "xtick.color": GRID, "ytick.color": GRID, "xtick.labelcolor": MUTED, "ytick.labelcolor": INK,
        "xtick.labelsize": 11, "ytick.labelsize": 11.5, "ytick.major.size": 0, "xtick.major.size": 3,
        "grid.color": GRID, "grid.linewidth": 0.8, "lines.linewidth": 2, "lines.solid_capstyle": "round",
        "figure.constrained_layout.hspace": 0.06, "figure.constrained_layout.wspace": 0.05,
    }  # fmt: skip
    with matplotlib.rc_context(settings):  # type: ignore[arg-type]
        yield


def _inline(svg: str, label: str) -> str:
    """Strip what an inline picture does not need, tie colours and fonts to the page, name it for readers."""
    svg = svg[svg.index("<svg") :]
    # The style element would apply to the whole page; report_style.html repeats it for charts only.
    svg = re.sub(r"\s*<(metadata|style)\b.*?</\1>", "", svg, flags=re.S)
    svg = re.sub(
        r' id="(?:matplotlib\.)?[A-Za-z]+2?d?_[\d_]+"', "", svg
    )  # group names repeat from chart to chart
    for stand_in, variable in VARIABLES.items():
        svg = svg.replace(stand_in, f"var({variable})")
    svg = re.sub(r"font-family: [^;\"]*", "font-family: inherit", svg)
    svg = re.sub(r"font: ([^;\"]*?)px [^;\"]*", r"font-size: \1px", svg)
    view = re.search(r'viewBox="([^"]+)"', svg)
    assert view is not None, "matplotlib wrote an SVG without a viewBox"
    body = svg[svg.index(">") + 1 :]
    return f'<svg viewBox="{view[1]}" role="img" aria-label="{html.escape(label)}">{body.strip()}'
