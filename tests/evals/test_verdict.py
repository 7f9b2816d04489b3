from __future__ import annotations

from evals import verdict
from evals.results import Results, Score
from tests.evals import synthetic


def _with(results: Results, right: int, low: float, high: float) -> Results:
    """The same run, with another result of Masters S and another interval against both controls."""
    methods = [
        m.model_copy(update={"test": Score.of(right, 9673)})
        if (m.student, m.method) == ("S", "masters")
        else m
        for m in results.methods
    ]
    by_method = {m.method: m.test.accuracy for m in methods if m.student == "S"}
    comparisons = []
    for c in results.comparisons:
        if c.student == "S":
            difference = by_method["masters"] - by_method[c.reference]
            bounds = {"difference": difference, "low": difference + low, "high": difference + high}
            c = c.model_copy(update=bounds)
        comparisons.append(c)
    return results.model_copy(update={"methods": methods, "comparisons": comparisons})


def test_a_gain_within_the_interval_is_called_noise() -> None:
    first, second = verdict.sentences(synthetic.results())
    assert "211\u202fk parameters, 2.7× fewer" in first and "98.3\u202f%" in first and "98.0–98.5" in first
    assert "teacher answers 99.9\u202f%" in first
    assert second.startswith("With one seed, Masters beats the same student trained on the labels alone")
    assert "cannot be told from the same pool without RL" in second and second.endswith("are noise.")


def test_a_loss_is_said_plainly() -> None:
    _, second = verdict.sentences(_with(synthetic.results(), 9000, -0.003, 0.003))
    assert "does not beat the same pool without RL (97.9\u202f%): it is 4.9 points below" in second


def test_a_gain_outside_the_interval_is_a_gain() -> None:
    _, second = verdict.sentences(_with(synthetic.results(), 9640, -0.003, 0.003))
    assert "beats the same pool without RL (97.9\u202f%) by 1.7 points" in second
    assert "noise" not in second


def test_without_a_paired_comparison_overlapping_intervals_are_noise() -> None:
    results = synthetic.results().model_copy(update={"comparisons": []})
    assert verdict.is_noise(results, "S", "kd", "masters") is True
    assert verdict.is_noise(results, "S", "sft", "masters") is False
    assert verdict.is_noise(results, "S", "none", "masters") is None


def test_runs_without_controls_or_student_promise_nothing() -> None:
    results = synthetic.results()
    alone = results.model_copy(update={"methods": [m for m in results.methods if m.method == "masters"]})
    assert "No control was trained" in verdict.sentences(alone)[1]
    bare = results.model_copy(update={"methods": []})
    assert "no verdict" in verdict.sentences(bare)[0]


def test_the_featured_bundle_is_the_smallest_faithful_one() -> None:
    results = synthetic.results()
    featured = verdict.featured_bundle(results)
    assert featured is not None and featured.name == "student-int8"
    lossy = results.model_copy(update={"bundles": results.bundles[2:]})
    only = verdict.featured_bundle(lossy)
    assert only is not None and only.name == "student-int4"
    assert verdict.featured_bundle(results.model_copy(update={"bundles": []})) is None
