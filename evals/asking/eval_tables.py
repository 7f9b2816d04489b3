"""What `pocketvlm eval` prints: scores, changes, and what to know about them.

In: `EvalResults`. Out: rich tables and lines. Not here: the report page (`evals/ship/ship_page.py`).
"""

from __future__ import annotations

from collections.abc import Iterator

from rich.table import Table

from evals import formatting as fmt
from evals.asking.eval_results import ORIGINAL, Change, EvalResults

SIGNIFICANT = 0.05


def scores(results: EvalResults) -> Table:
    """One row a subject; variants have a table of their own (`evals/variants/brittleness.py`)."""
    task = results.task
    table = Table(title=f"{task.name}, {task.split}: {task.questions} questions, {task.scorer}")
    for name in ("model", "score", "95 %", "right", "cut", "not asked"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for one in results.summaries:
        if not one.category and one.variant == ORIGINAL:
            table.add_row(
                one.subject,
                fmt.percent(one.value),
                fmt.interval(one.low, one.high),
                f"{one.right}/{one.units}",
                fmt.count(one.cut) if one.cut else "",
                fmt.count(one.failed) if one.failed else "",
            )
    return table


def changes(results: EvalResults) -> Table | None:
    """Models against the first one, on the questions as they are; None without any."""
    compared = [one for one in results.changes if one.variant == one.reference_variant == ORIGINAL]
    if not compared:
        return None
    table = Table(title=f"against {compared[0].reference}, in points")
    for name in ("model", "change", "95 %", "lost", "won", "McNemar", "same text"):
        table.add_column(name, justify="left" if name == "model" else "right", overflow="fold")
    for one in compared:
        table.add_row(
            one.candidate,
            fmt.points(one.difference),
            f"{fmt.points(one.low)} {fmt.DASH} {fmt.points(one.high)}",
            fmt.count(one.right_to_wrong),
            fmt.count(one.wrong_to_right),
            fmt.p_value(one.p_value),
            fmt.count(one.same_text),
        )
    return table


def lines(results: EvalResults) -> Iterator[str]:
    """Notes: what is missing, what a unit is, and which changes are more than noise."""
    if results.task.circular:
        units = len({one.unit for one in results.questions})
        yield f"{units} questions count, each right only in every order of its options"
    for one in results.changes:
        if one.p_value < SIGNIFICANT and one.variant == one.reference_variant == ORIGINAL:
            yield _sentence(one)
    for gap in results.missing:
        yield f"{gap.what}: {gap.why}"


def _sentence(one: Change) -> str:
    which = "worse" if one.right_to_wrong > one.wrong_to_right else "better"
    return (
        f"{one.candidate} is {which} than {one.reference}: {one.right_to_wrong} answers lost, "
        f"{one.wrong_to_right} won ({fmt.p_value(one.p_value)})"
    )
