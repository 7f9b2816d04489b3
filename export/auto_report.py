"""What the automatic search found: records, the frontier, a table.

In: measured candidates. Out: `Result`, `frontier.json`, `frontier.md`. Not here: measuring.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from evals.records import Comparison, Count, Record, Score
from export.quantize_policy import Scheme
from runtime import files


class Candidate(Record):
    """One choice per axis: bytes of its parts and cache, and its answers against float32's."""

    key: str
    setting: dict[str, Scheme]
    bytes: Count
    cache_bytes: Count
    score: Score
    comparison: Comparison
    fits: bool

    @property
    def total_bytes(self) -> int:
        return self.bytes + self.cache_bytes

    @property
    def drop(self) -> float:
        """Points below float32."""
        return -100 * self.comparison.difference


class Result(Record):
    """The chosen bundle and everything that was tried.

    `held_out`: it against float32 on questions that chose nothing; `confirmed`: inside the budget there, too.
    `frontier`: candidates that no smaller one equals or beats.
    """

    bundle: Path
    policy: Path
    max_drop: float
    chosen: Candidate
    held_out: Comparison
    confirmed: bool
    frontier: list[Candidate]
    candidates: list[Candidate]


def frontier(candidates: Iterable[Candidate]) -> list[Candidate]:
    """From the smallest up: each loses less than everything smaller."""
    best = float("inf")
    found = []
    for each in sorted(candidates, key=lambda one: (one.total_bytes, one.drop)):
        if each.drop < best:
            found.append(each)
            best = each.drop
    return found


def write(result: Result, work: Path) -> None:
    """`frontier.json` (everything) and `frontier.md` (the table)."""
    files.write_text(work / "frontier.json", result.model_dump_json(indent=2) + "\n")
    files.write_text(work / "frontier.md", "\n".join(table(result)) + "\n")


def table(result: Result) -> list[str]:
    """Markdown: all candidates by size, the frontier marked, the chosen one in bold."""
    axes = list(result.chosen.setting)
    on_frontier = {each.key for each in result.frontier}
    lines = [
        f"| {' | '.join(axes)} | parts, kB | cache, kB | accuracy, % | drop, points | fits | frontier |",
        f"|{'---|' * len(axes)}---:|---:|---:|---:|---|---|",
    ]
    for each in sorted(result.candidates, key=lambda one: one.total_bytes):
        cells: list[str] = [each.setting[axis] for axis in axes]
        cells += [
            f"{each.bytes / 1e3:.0f}",
            f"{each.cache_bytes / 1e3:.0f}",
            f"{100 * each.score.accuracy:.2f}",
        ]
        cells += [
            _drop(each.comparison),
            "yes" if each.fits else "no",
            "x" if each.key in on_frontier else "",
        ]
        if each.key == result.chosen.key:
            cells = [f"**{cell}**" if cell else "" for cell in cells]
        lines.append(f"| {' | '.join(cells)} |")
    held = result.held_out
    verdict = "inside" if result.confirmed else "outside"
    lines += [
        "",
        f"Held out, {held.n} questions asked once: drop {_drop(held)} points, {verdict} the budget of "
        f"{result.max_drop:g}; {held.right_to_wrong} answers became wrong, {held.wrong_to_right} right.",
    ]
    return lines


def _drop(found: Comparison) -> str:
    middle, low, high = (-100 * share + 0.0 for share in (found.difference, found.high, found.low))
    return f"{middle:+.2f} ({low:+.2f} to {high:+.2f})"
