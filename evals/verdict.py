"""What the run showed, in two plain sentences. First the student, then whether the method earned it.

In: a `Results`. Out: sentences; the bundle to feature. Not here: markup, charts.
A difference counts only when its paired 95 % interval leaves out zero (without a paired comparison: when the
two Wilson intervals do not overlap). Otherwise the sentence says that it is noise.
"""

from __future__ import annotations

from evals import formatting as fmt
from evals.results import Bundle, Method, Model, Results

HEADLINE = "masters"
CONTROLS = (("sft", "the same student trained on the labels alone"), ("kd", "the same pool without RL"))
WITHIN = 0.005
"""A bundle is featured when it loses at most this share against its checkpoint."""


def sentences(results: Results) -> list[str]:
    """One sentence on what the student is, one on what the controls say. Empty without a student."""
    if not results.students:
        return []
    student = results.students[0]
    row = results.method(student.name, HEADLINE)
    if row is None:
        return [f"Student {student.name} was not trained with Masters in this run, so there is no verdict."]
    return [_what_it_is(results, student, row), _against_controls(results, student, row)]


def headline(results: Results) -> str:
    """A few words for the top of the page: the ratio and the accuracy."""
    student = results.students[0] if results.students else None
    row = results.method(student.name, HEADLINE) if student else None
    if student is None or row is None:
        return "No distilled student in this run"
    return f"{fmt.times(student.ratio)} smaller, {fmt.percent(row.test.accuracy)} right"


def featured_bundle(results: Results) -> Bundle | None:
    """The smallest bundle of the first student that loses at most WITHIN, else its first bundle."""
    name = results.students[0].name if results.students else None
    own = [bundle for bundle in results.bundles if bundle.student == name]
    close = [b for b in own if b.agreement is not None and b.agreement.difference >= -WITHIN]
    return min(close, key=lambda b: b.bytes) if close else (own[0] if own else None)


def is_noise(results: Results, student: str, reference: str, candidate: str) -> bool | None:
    """Whether candidate and reference cannot be told apart; None when either is absent."""
    comparison = results.comparison(student, reference, candidate)
    if comparison is not None:
        return comparison.low <= 0 <= comparison.high
    first, second = results.method(student, reference), results.method(student, candidate)
    if first is None or second is None:
        return None
    return first.test.low <= second.test.high and second.test.low <= first.test.high


def _what_it_is(results: Results, student: Model, row: Method) -> str:
    text = (
        f"Student {student.name} has {fmt.parameters(student.parameters)} parameters, "
        f"{fmt.times(student.ratio)} fewer than its teacher, and answers {fmt.percent(row.test.accuracy)} of "
        f"{fmt.count(row.test.n)} test questions correctly "
        f"(95{fmt.THIN}% interval {fmt.interval(row.test.low, row.test.high)})"
    )
    if results.teacher.test is not None:
        text += f"; the teacher answers {fmt.percent(results.teacher.test.accuracy)}"
    return text + "."


def _against_controls(results: Results, student: Model, row: Method) -> str:
    controls = [(results.method(student.name, method), name) for method, name in CONTROLS]
    clauses = [_clause(results, row, control, name) for control, name in controls if control is not None]
    if not clauses:
        return "No control was trained, so nothing says that the method, rather than the data, made it."
    return f"With one seed, Masters {'; it '.join(clauses)}."


def _clause(results: Results, row: Method, control: Method, name: str) -> str:
    """Continues "Masters ..." with how it compares to one control."""
    difference, spread = row.test.accuracy - control.test.accuracy, ""
    comparison = results.comparison(row.student, control.method, row.method)
    if comparison is not None:
        difference = comparison.difference
        spread = f" ({fmt.points(comparison.low)} to {fmt.points(comparison.high)})"
    size = fmt.points(abs(difference)).lstrip("+")
    against = f"{name} ({fmt.percent(control.test.accuracy)})"
    if is_noise(results, row.student, control.method, row.method):
        return f"cannot be told from {against}: {fmt.points(difference)} points{spread} are noise"
    if difference > 0:
        return f"beats {against} by {size} points"
    return f"does not beat {against}: it is {size} points below{spread}"
