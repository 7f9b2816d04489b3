"""Who suffers most when questions change: every subject's loss under a variant, and beside the teacher's.

In: an `EvalResults` with variants. Out: `Loss` records, a rich table and lines. Not here: the variants
(`evals/variants/variants.py`), asking (`evals/asking/eval_run.py`).

A distilled student can equal its teacher on the task and still break sooner. So the losses are compared, unit
by unit: (student changed - student as it was) - (teacher changed - teacher as it was), with an interval over
whole images. Below zero, the student is the more brittle one. The teacher is the first subject of that kind;
without one, the first subject.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from evals import formatting as fmt
from evals import stats
from evals.asking.eval_results import ORIGINAL, EvalResults

Floats = NDArray[np.float64]
MEAN = "mean of all"
SHOWN = 5


@dataclass(frozen=True)
class Loss:
    """A subject under a variant. `score` and `change` (to its own original) are shares; `extra` is the change
    minus the other's, None for the other itself; low and high its 95 % interval."""

    subject: str
    against: str
    variant: str
    units: int
    score: float
    change: float
    extra: float | None
    low: float | None
    high: float | None

    @property
    def is_more_brittle(self) -> bool:
        """Whether the whole interval is below zero."""
        return self.high is not None and self.high < 0


def losses(results: EvalResults) -> list[Loss]:
    """Of every subject and variant, in their order, then of the mean over all variants; none without any."""
    names = [one.name for one in results.variants if one.name != ORIGINAL]
    against = next((one.name for one in results.subjects if one.kind == "teacher"), results.subjects[0].name)
    groups = results.groups()
    found = []
    for subject in results.subjects:
        own, other = (_by_variant(results, name, names) for name in (subject.name, against))
        for name in [*names, MEAN] if len(names) > 1 else names:
            if name not in own:
                continue
            units = [
                unit
                for unit in own[name]
                if unit in own.get(ORIGINAL, {}) and unit in other.get(name, {}) and unit in other[ORIGINAL]
            ]
            if not units:
                continue
            changed = np.array([own[name][unit] for unit in units])
            mine = changed - np.array([own[ORIGINAL][unit] for unit in units])
            theirs = np.array([other[name][unit] - other[ORIGINAL][unit] for unit in units])
            beside = None if subject.name == against else _beside(theirs, mine, [groups[u] for u in units])
            figures = float(changed.mean()), float(mine.mean())
            found.append(Loss(subject.name, against, name, len(units), *figures, *(beside or (None,) * 3)))
    return found


def _by_variant(results: EvalResults, subject: str, names: list[str]) -> dict[str, dict[str, float]]:
    """Unit scores by variant, with the mean over the variants of the units that all of them have."""
    found = {name: results.unit_scores(subject, name) for name in [ORIGINAL, *names]}
    found = {name: scores for name, scores in found.items() if scores}
    changed = [found[name] for name in names if name in found]
    if changed:
        common = set.intersection(*(set(one) for one in changed))
        found[MEAN] = {
            unit: float(np.mean([one[unit] for one in changed])) for unit in changed[0] if unit in common
        }
    return found


def _beside(theirs: Floats, mine: Floats, groups: list[str]) -> tuple[float, float, float]:
    """Mean difference of two changes with its interval."""
    interval = stats.paired_interval(theirs.tolist(), mine.tolist(), groups=groups)
    return float((mine - theirs).mean()), interval.low, interval.high


def table(results: EvalResults) -> Table | None:
    """A row for each variant, a column for each subject: score and its change in points; None without any."""
    found = losses(results)
    if not found:
        return None
    shown = Table(
        title="score under each variant (change in points; * loses more than " + found[0].against + ")"
    )
    shown.add_column("variant")
    subjects = list(dict.fromkeys(one.subject for one in found))
    for name in subjects:
        shown.add_column(name, justify="right", overflow="fold")
    cells = {(one.variant, one.subject): one for one in found}
    for variant in dict.fromkeys(one.variant for one in found):
        row = [cells.get((variant, name)) for name in subjects]
        shown.add_row(variant, *(_cell(one) for one in row))
    return shown


def _cell(one: Loss | None) -> str:
    if one is None:
        return fmt.DASH
    return f"{fmt.percent(one.score)} ({fmt.points(one.change)}){'*' if one.is_more_brittle else ' '}"


def lines(results: EvalResults) -> Iterator[str]:
    """Where subjects lose more than the teacher, the worst first."""
    found = [one for one in losses(results) if one.extra is not None]
    worse = sorted((one for one in found if one.is_more_brittle), key=lambda one: one.extra or 0.0)
    for one in worse[:SHOWN]:
        assert one.extra is not None and one.low is not None and one.high is not None
        yield (
            f"{one.subject} loses {fmt.points(-one.extra).lstrip('+')} points more than {one.against} under "
            f"{one.variant} (95 %: {fmt.points(-one.high).lstrip('+')} to {fmt.points(-one.low).lstrip('+')})"
        )
    if found:
        yield (
            f"{len(worse)} of {len(found)} losses exceed those of {found[0].against} beyond their interval; "
            "by chance about one in forty is"
        )
