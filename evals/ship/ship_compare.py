"""What became worse between two reports, found by tests and not by eye.

In: two `Evidence`s, the gate's rules for comparing. Out: a `Comparison`. Not here: the tests themselves
(`evals/ship/ship_change.py`), timings (`evals/ship/ship_compare_timings.py`), bytes and parity
(`evals/ship/ship_facts.py`), words, drawing.

The chance that anything is called worse when nothing changed is at most ALPHA for a whole comparison: it is
split evenly over the families that have tests, and within a family p-values are adjusted by Holm's method.
What both sides did not measure alike is not compared, and the reason is told.
"""

from __future__ import annotations

import datetime
from collections.abc import Mapping, Sequence

from evals.agreement import holm
from evals.asking.eval_results import ORIGINAL
from evals.bench.bench_conditions import Reason
from evals.ship import ship_change, ship_facts
from evals.ship import ship_compare_timings as timings
from evals.ship import ship_compare_words as words
from evals.ship.ship_compare_results import Comparison, Family, Finding, Tested, TestedFamily
from evals.ship.ship_evidence import Evidence, Task, unlike
from evals.ship.ship_gate import CompareRules
from runtime.errors import InputError

ALPHA = 0.05
ONLY_NEW = timings.ONLY_NEW
ALIKE_TASK = (
    "data_sha256", "scorer", "rules", "right_from", "circular", "prompt", "max_new_tokens", "judge",
)  # fmt: skip
FAMILIES: tuple[Family, ...] = ("accuracy", "robustness", "speed")


def compare(
    old: Evidence,
    new: Evidence,
    rules: CompareRules | None = None,
    *,
    pairs: Mapping[str, str] | None = None,
    version: str = "",
    created: str = "",
) -> Comparison:
    """`pairs`: a name in `old` to its name in `new`, where they differ.

    Raises InputError when nothing can be compared, or a name of `pairs` or of the control is not there.
    """
    rules = rules or CompareRules()
    matched, missing = _matched(old, new, pairs or {})
    tests, reasons = _accuracy(old, new, matched)
    missing += reasons
    timed, reasons = timings.tests(old, new, matched, rules)
    missing += reasons
    facts = ship_facts.facts(old, new, matched, rules.tolerance)
    if not tests and not timed and not facts:
        why = "; ".join(f"{one.what}: {one.why}" for one in missing) or "they have no bundle in common"
        raise InputError(f"compare: nothing can be compared ({why})")
    judged, families = _judge([*tests, *timed], rules)
    findings = [one.finding for one in judged] + [one.finding for one in facts]
    gone = [one for one in missing if one.why != ONLY_NEW]
    regressed = "worse" in findings or (rules.missing == "fail" and bool(gone))
    return Comparison(
        created=created or datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=version,
        old=old.sources,
        new=new.sources,
        rules=rules,
        regressed=regressed,
        headline=words.headline(findings, len(gone), strict=rules.missing == "fail"),
        sentences=tuple(words.sentences(judged, facts)),
        families=tuple(families),
        tests=tuple(judged),
        facts=tuple(facts),
        not_compared=tuple(missing),
        caveats=tuple(words.caveats(judged, rules)),
    )


# --- who is compared with whom ----------------------------------------


def _matched(old: Evidence, new: Evidence, pairs: Mapping[str, str]) -> tuple[dict[str, str], list[Reason]]:
    """New name to old name of every subject that both have."""
    before, after = _subjects(old), _subjects(new)
    for was, now in pairs.items():
        if was not in before or now not in after:
            side, name, names = ("old", was, before) if was not in before else ("new", now, after)
            raise InputError(f"--pair {was}={now}: {name} is not in {side} ({', '.join(names) or 'none'})")
    found = {now: was for was, now in pairs.items()}
    found |= {name: name for name in after if name in before and name not in found}
    alone = [n for n in after if n not in found], [n for n in before if n not in found.values()]
    bundles = [
        [one for one in names if evidence.bundle(one)]
        for names, evidence in zip(alone, (new, old), strict=True)
    ]
    if len(bundles[0]) == len(bundles[1]) == 1:  # renamed: there is only one it can be
        found[bundles[0][0]] = bundles[1][0]
        alone = [n for n in alone[0] if n not in found], [n for n in alone[1] if n not in found.values()]
    sides = zip(alone, (ONLY_NEW, "only in old"), strict=True)
    return found, [Reason(what=name, why=why) for names, why in sides for name in names]


def _subjects(evidence: Evidence) -> list[str]:
    checkpoints = [s.name for task in evidence.tasks for s in task.subjects if s.kind == "checkpoint"]
    return list(dict.fromkeys([*(one.name for one in evidence.bundles), *checkpoints]))


# --- accuracy ---------------------------------------------------------


def _accuracy(old: Evidence, new: Evidence, matched: Mapping[str, str]) -> tuple[list[Tested], list[Reason]]:
    tests: list[Tested] = []
    missing: list[Reason] = []
    before = {task.name: task for task in old.tasks}
    for task in new.tasks:
        known = before.get(task.name)
        if known is None:
            missing.append(Reason(what=task.name, why=ONLY_NEW))
        elif (key := unlike(known.info, task.info, ALIKE_TASK)) or known.units != task.units:
            missing.append(Reason(what=task.name, why=key or "other questions"))
        else:
            tests += _task_tests(known, task, matched)
    now = {task.name for task in new.tasks}
    missing += [Reason(what=name, why="only in old") for name in before if name not in now]
    return tests, missing


def _task_tests(old: Task, new: Task, matched: Mapping[str, str]) -> list[Tested]:
    found = []
    for one in new.answered:
        was = matched.get(one.subject)
        before = old.scores(was, one.variant) if was else None
        if was is None or before is None:
            continue
        both = [
            (a, b, group)
            for a, b, group in zip(before, one.scores, new.groups, strict=True)
            if a is not None and b is not None
        ]
        if not both:
            continue
        a, b, groups = zip(*both, strict=True)
        change = ship_change.scores(a, b, groups)
        original = one.variant == ORIGINAL
        found.append(
            Tested(
                family="accuracy" if original else "robustness",
                label="accuracy", bundle=one.subject, old_bundle=was, task=new.name,
                variant="" if original else one.variant, unit="points",
                old=100 * sum(a) / len(a), new=100 * sum(b) / len(b),
                change=100 * change.estimate, low=100 * change.low, high=100 * change.high,
                p_worse=change.p_down, p_better=change.p_up, detectable=100 * change.detectable,
                units=change.units, finding="unchanged",
            )
        )  # fmt: skip
    return found


# --- judging ----------------------------------------------------------


def _judge(tests: Sequence[Tested], rules: CompareRules) -> tuple[list[Tested], list[TestedFamily]]:
    """Findings by Holm's method within each family."""
    present = [family for family in FAMILIES if any(one.family == family for one in tests)]
    level = ALPHA / max(1, len(present))
    judged: list[Tested] = []
    families = []
    for family in present:
        own = [one for one in tests if one.family == family]
        worse = holm([one.p_worse for one in own])
        better = holm([one.p_better for one in own])
        families.append(TestedFamily(family=family, tests=len(own), level=level))
        for one, down, up in zip(own, worse, better, strict=True):
            finding = _finding(one, down <= level, up <= level, rules)
            update = {"p_worse_adjusted": down, "p_better_adjusted": up, "finding": finding}
            judged.append(one.model_copy(update=update))
    shown = [one.model_copy(update={"finding": "shown"}) for one in tests if one.family == "stages"]
    return [*judged, *shown], families


def _finding(one: Tested, worse: bool, better: bool, rules: CompareRules) -> Finding:
    if not worse:
        return "better" if better else "unchanged"
    forgiven = rules.tolerance.slowdown_percent
    if one.unit == "points":
        forgiven = rules.tolerance.accuracy_points
    elif one.label == timings.LABELS["peak_rss_mib"]:
        forgiven = rules.tolerance.memory_percent
    return "worse" if abs(one.change) > forgiven else "tolerated"
