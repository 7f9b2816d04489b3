"""What answers add up to: means with intervals, changes between models, questions worth looking at.

In: an `EvalResults` without its summaries. Out: `Summary`, `Change`, `Example` and `Missing` records.
Not here: asking and scoring (`evals/asking/eval_run.py`), drawing.

A unit is what counts once: a question, or a circular group, which is as right as its worst question.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import numpy as np

from evals import stats
from evals.asking.eval_results import ORIGINAL, Change, EvalResults, Example, Given, Subject, Summary
from evals.gather import data_uri_of
from evals.results import Missing
from evals.tasks.question import Question, Task, opened
from runtime.errors import InputError

EXAMPLES = 12
Scores = Mapping[str, float]


# --- means ------------------------------------------------------------


def summaries(results: EvalResults) -> list[Summary]:
    """Of every subject and variant; of the questions as they are also by category."""
    found = []
    category = {one.unit: one.category for one in results.questions}
    categories = sorted({name for name in category.values() if name})
    for subject in results.subjects:
        for variant in results.variants:
            scores = results.unit_scores(subject.name, variant.name)
            if not scores:
                continue
            parts = {
                name: {unit: score for unit, score in scores.items() if category[unit] == name}
                for name in categories
            }
            parts = {name: part for name, part in parts.items() if part}
            means = [float(np.mean(list(part.values()))) for part in parts.values()]
            macro = float(np.mean(means)) if len(means) > 1 else None
            found.append(_summary(results, subject, variant.name, "", scores, macro))
            if variant.name == ORIGINAL and len(parts) > 1:
                found += [
                    _summary(results, subject, ORIGINAL, name, part, None) for name, part in parts.items()
                ]
    return found


def _summary(
    results: EvalResults, subject: Subject, variant: str, category: str, scores: Scores, macro: float | None
) -> Summary:
    groups = results.groups()
    own = [groups[unit] for unit in scores]
    values = list(scores.values())
    interval, how = mean_interval(values, own)
    units = {one.id: one.unit for one in results.questions}
    given = [one for one in subject.answers if one.variant == variant and units[one.id] in scores]
    return Summary(
        subject=subject.name,
        variant=variant,
        category=category,
        units=len(values),
        groups=len(set(own)),
        value=float(np.mean(values)),
        low=interval.low,
        high=interval.high,
        interval="wilson" if how == "wilson" else "bootstrap",
        right=sum(value >= results.task.right_from for value in values),
        macro=macro,
        failed=sum(one.finish == "failed" for one in given),
        cut=sum(one.finish in ("length", "context") for one in given),
    )


def mean_interval(values: Sequence[float], groups: Sequence[str]) -> tuple[stats.Interval, str]:
    """95 % interval of a mean score, and how it was found.

    `wilson`: 0/1 scores with an image each. Else `bootstrap` over whole images; for 0/1 scores never inside
    Wilson's interval, because few images give a bootstrap that is too narrow, and none at all where all score
    alike (then Wilson's, for as many questions as there are images).
    """
    count, mean, right = len(set(groups)), float(np.mean(values)), round(sum(values))
    binary = set(values) <= {0.0, 1.0}
    if binary and count == len(values):
        return stats.wilson(right, count), "wilson"
    found = stats.bootstrap_difference([0.0] * len(values), values, groups=groups)
    held = [found, stats.Interval(mean, mean)]
    if binary:
        held.append(stats.wilson(right, len(values)))
    if found.high - found.low < 1e-12:
        held += [stats.wilson(whole(mean * count), count) for whole in (math.floor, math.ceil)]
    low, high = min(each.low for each in held), max(each.high for each in held)
    return stats.Interval(max(0.0, low), min(1.0, high)), "bootstrap"


# --- changes ----------------------------------------------------------


def changes(results: EvalResults) -> list[Change]:
    """The first subject against every other under each variant, then each subject's variants against its own
    answers to the questions as they are."""
    first, *others = results.subjects
    names = [variant.name for variant in results.variants]
    pairs = [((first.name, name), (other.name, name)) for other in others for name in names]
    pairs += [
        ((one.name, ORIGINAL), (one.name, name))
        for one in results.subjects
        for name in names
        if name != ORIGINAL
    ]
    found = (change(results, before, after) for before, after in pairs)
    return [one for one in found if one is not None]


def change(results: EvalResults, before: tuple[str, str], after: tuple[str, str]) -> Change | None:
    """(subject, variant) against (subject, variant) over the units that both have; None without any."""
    old, new = results.unit_scores(*before), results.unit_scores(*after)
    units = [unit for unit in old if unit in new]
    if not units:
        return None
    limit, groups = results.task.right_from, results.groups()
    was, now = [old[unit] for unit in units], [new[unit] for unit in units]
    flips = stats.flips([value >= limit for value in was], [value >= limit for value in now])
    interval = stats.paired_interval(was, now, groups=[groups[unit] for unit in units])
    texts, later = _texts(results, *before), _texts(results, *after)
    return Change(
        reference=before[0],
        candidate=after[0],
        reference_variant=before[1],
        variant=after[1],
        units=len(units),
        right_to_wrong=flips.right_to_wrong,
        wrong_to_right=flips.wrong_to_right,
        both_right=flips.both_right,
        same_text=sum(texts[key] == later[key] for key in texts if key in later),
        difference=float(np.mean(np.subtract(now, was))),
        low=interval.low,
        high=interval.high,
        p_value=stats.mcnemar_exact(flips.right_to_wrong, flips.wrong_to_right),
    )


def _texts(results: EvalResults, subject: str, variant: str) -> dict[str, str]:
    return {one.id: one.answer for one in results.subject(subject).answers if one.variant == variant}


# --- what to look at --------------------------------------------------


def examples(results: EvalResults, task: Task, count: int, *, seed: int = 0) -> list[Example]:
    """Up to `count` questions on different images: half where a later subject lost what the first has right,
    then those that most subjects have wrong, a quarter at random. The worst come first."""
    order = [results.questions[i].id for i in np.random.default_rng(seed).permutation(len(results.questions))]
    scores = [_scores(subject) for subject in results.subjects]
    asked = {one.id: one for one in task.questions}

    def lost(key: str) -> int:
        return sum(scores[0].get(key, 0.0) > later.get(key, 0.0) for later in scores[1:])

    def wrong(key: str) -> float:
        return sum(1.0 - one.get(key, 0.0) for one in scores)

    flips = sorted((key for key in order if lost(key)), key=lost, reverse=True)
    worst = sorted((key for key in order if wrong(key)), key=wrong, reverse=True)
    found: list[Example] = []
    used: set[str] = set()
    limits: tuple[tuple[Literal["flip", "wrong", "random"], list[str], int], ...] = (
        ("flip", flips, count // 2),
        ("wrong", worst, count - count // 4),
        ("random", order, count),
    )
    for why, keys, limit in limits:
        for key in keys:
            if len(found) < limit and asked[key].group not in used and (shown := _pictures(asked[key])):
                used.add(asked[key].group)
                found.append(Example(id=key, why=why, images=shown))
    return found


def _scores(subject: Subject) -> dict[str, float]:
    return {one.id: one.score for one in subject.answers if one.variant == ORIGINAL}


def _pictures(question: Question) -> list[str]:
    """As data URIs; none when one of them cannot be decoded."""
    try:
        return [data_uri_of(opened(picture)) for picture in question.images]
    except InputError:
        return []


def missing(subjects: Iterable[Subject]) -> list[Missing]:
    """What was emulated, questions that a subject could not be asked, and answers that were cut."""
    found = []
    for subject in subjects:
        if subject.emulated:
            found.append(Missing(what=f"{subject.name}: the device's own arithmetic", why=subject.emulated))
        failed = [one for one in subject.answers if one.finish == "failed"]
        if failed:
            found.append(
                Missing(
                    what=f"{subject.name}: {len(failed)} of {len(subject.answers)} questions",
                    why=f"could not be asked and count as wrong; the first: {failed[0].error}",
                )
            )
        cut = sum(_cut(one) for one in subject.answers)
        if cut:
            found.append(
                Missing(
                    what=f"{subject.name}: the end of {cut} of {len(subject.answers)} answers",
                    why="they reached the most new tokens, or the end of the context",
                )
            )
    return found


def _cut(one: Given) -> bool:
    return one.finish in ("length", "context")
