"""Several ways to do one thing, timed in turn: a b c a b c ..., compared within each round.

In: named callables. Out: wall and CPU times and their ratios to the first one. A drift of the machine
falls on all of them, and a ratio compares neighbours in time. Not here: what is timed.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

Spread = tuple[float, float, float]  # min, median, max


@dataclass(frozen=True)
class Figure:
    """Times over the rounds, and their ratio to the first callable's in the same round."""

    wall_ms: Spread
    cpu_ms: Spread
    wall_ratio: Spread
    cpu_ratio: Spread


def measure(arms: Mapping[str, Callable[[], Any]], rounds: int, label: str) -> dict[str, Figure]:
    """Call each of `arms` once a round; a round before the first warms up. CPU time is this process's."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in arms}
    for number in range(-1, rounds):
        for name, arm in arms.items():
            wall, cpu = time.perf_counter(), time.process_time()
            arm()
            if number >= 0:
                times[name].append((time.perf_counter() - wall, time.process_time() - cpu))
        print(f"{label}: round {number + 1} of {rounds}", file=sys.stderr)
    first = next(iter(times.values()))
    found = {}
    for name, taken in times.items():
        milliseconds = [[1000 * pair[kind] for pair in taken] for kind in (0, 1)]
        ratios = [[a[kind] / b[kind] for a, b in zip(taken, first, strict=True)] for kind in (0, 1)]
        found[name] = Figure(*map(_spread, [*milliseconds, *ratios]))
    return found


def _spread(values: list[float]) -> Spread:
    return min(values), statistics.median(values), max(values)


def table(figures: Mapping[str, Figure]) -> list[str]:
    """Markdown lines: median times, ratios as min / **median** / max."""
    base = next(iter(figures))
    lines = [f"| arm | CPU ms | wall ms | CPU, times {base} | wall, times {base} |", "|---|---|---|---|---|"]
    for name, figure in figures.items():
        ratios = ["{:.2f} / **{:.2f}** / {:.2f}".format(*r) for r in (figure.cpu_ratio, figure.wall_ratio)]
        lines.append(
            f"| {name} | {figure.cpu_ms[1]:.0f} | {figure.wall_ms[1]:.0f} | {ratios[0]} | {ratios[1]} |"
        )
    return lines
