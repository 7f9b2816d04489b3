"""Intervals, changes and examples of scored answers."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from evals import stats
from evals.asking import eval_summary
from evals.asking.eval_results import EvalResults, Given, Question, Subject, TaskInfo, Variant
from evals.tasks.question import Question as Asked
from evals.tasks.question import Task
from tests.evals.task_files import png


@example(pairs=[(0.0, 0), (1.0, 0)], binary=True)
@given(
    st.lists(st.tuples(st.sampled_from([0.0, 1.0, 0.3]), st.integers(0, 5)), min_size=1, max_size=40),
    st.booleans(),
)
def test_an_interval_holds_its_mean(pairs: list[tuple[float, int]], binary: bool) -> None:
    values = [round(score) if binary else score for score, _ in pairs]
    groups = [str(group) for _, group in pairs]
    interval, how = eval_summary.mean_interval([float(value) for value in values], groups)
    mean = float(np.mean(values))
    assert 0 <= interval.low <= mean <= interval.high <= 1
    if binary:
        wilson = stats.wilson(sum(map(int, values)), len(values))
        assert interval.low <= wilson.low + 1e-12
        assert interval.high >= wilson.high - 1e-12
        assert (how == "wilson") == (len(set(groups)) == len(values))


def test_questions_of_one_image_are_not_independent() -> None:
    """Ten images, all of their questions right or all wrong: as wide as ten questions, not a hundred."""
    values = [float(i < 50) for i in range(100)]
    apart, _ = eval_summary.mean_interval(values, [str(i) for i in range(100)])
    together, how = eval_summary.mean_interval(values, [str(i // 10) for i in range(100)])
    assert how == "bootstrap"
    assert together.high - together.low > 2 * (apart.high - apart.low)


def results(scores: dict[str, list[float]], *, right_from: float = 1.0, category: str = "") -> EvalResults:
    """Subjects with a score a question; every question has its image; `category` has a letter a question."""
    count = len(next(iter(scores.values())))
    return EvalResults(
        schema="pocketvlm.eval@1", created="2026-01-01T00:00:00Z", version="0",
        task=TaskInfo(
            name="t", format="digits", split="test", source="s", data_sha256="0" * 64, questions=count,
            available=count, groups=count, scorer="exact", rules="pocketvlm", right_from=right_from,
            prompt="raw", max_new_tokens=4,
        ),
        variants=[Variant(name="original", family="original")],
        questions=[
            Question(
                id=str(i), unit=str(i), group=f"g{i}", question="q", prompt="q", references=["a"],
                category=category[i : i + 1],
            )
            for i in range(count)
        ],
        subjects=[
            Subject(
                name=name, kind="bundle", path=name, format="onnx", precision="int8",
                answers=[
                    Given(id=str(i), answer=f"{score}", score=score, finish="stop")
                    for i, score in enumerate(values)
                ],
            )
            for name, values in scores.items()
        ],
        summaries=[],
    )  # fmt: skip


def test_categories_and_their_mean() -> None:
    found = eval_summary.summaries(results({"m": [1, 1, 1, 0]}, category="aaab"))
    assert [(one.category, one.value, one.units) for one in found] == [
        ("", 0.75, 4),
        ("a", 1, 3),
        ("b", 0, 1),
    ]
    assert found[0].macro == 0.5
    assert found[1].macro is None


def test_a_change_counts_flips_by_direction_and_keeps_fractions() -> None:
    given_ = results({"old": [1.0, 1.0, 0.6, 0.0], "new": [0.0, 1.0, 0.4, 1.0]}, right_from=0.5)
    (change,) = eval_summary.changes(given_)
    assert (change.right_to_wrong, change.wrong_to_right, change.both_right) == (2, 1, 1)
    assert change.difference == pytest.approx((-1 + 0 - 0.2 + 1) / 4)
    assert change.low <= change.difference <= change.high
    assert change.p_value == stats.mcnemar_exact(2, 1)


def test_a_planted_loss_is_found() -> None:
    old = [1.0] * 180 + [0.0] * 20
    new = [1.0] * 160 + [0.0] * 40
    (change,) = eval_summary.changes(results({"old": old, "new": new}))
    assert change.p_value < 1e-4
    assert change.high < 0
    assert change.difference == pytest.approx(-0.1)


def test_examples_show_flips_first_one_a_picture() -> None:
    given_ = results({"old": [1, 1, 0, 1, 1, 1], "new": [1, 0, 0, 1, 1, 1], "newer": [1, 0, 0, 0, 1, 1]})
    asked = tuple(
        Asked(str(i), f"g{i}", "q", "q", (png(i),) if i != 4 else (b"no picture",), ("a",)) for i in range(6)
    )
    task = Task("t", "digits", "test", "s", asked, "exact")
    found = eval_summary.examples(given_, task, 8)
    assert [(one.id, one.why) for one in found[:3]] == [("1", "flip"), ("3", "flip"), ("2", "wrong")]
    assert {one.id for one in found} == {"0", "1", "2", "3", "5"}, (
        "a picture that cannot be shown is left out"
    )
    assert all(one.images[0].startswith("data:image/png;base64,") for one in found)
