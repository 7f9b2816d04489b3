"""Who loses more under a variant: by hand, with images that hang together, and without a teacher."""

from __future__ import annotations

import numpy as np
import pytest

from evals.asking.eval_results import EvalResults, Given, Question, Subject, TaskInfo, Variant
from evals.variants import brittleness

Scores = dict[str, dict[str, list[float]]]


def results(scores: Scores, groups: list[str], kinds: dict[str, str] | None = None) -> EvalResults:
    """`scores`: by subject and variant, a value per question."""
    count = len(groups)
    names = list(next(iter(scores.values())))
    questions = [
        Question(id=str(i), unit=str(i), group=group, question="?", prompt="?", references=["yes"])
        for i, group in enumerate(groups)
    ]
    subjects = [
        Subject(
            name=name,
            kind=(kinds or {}).get(name, "checkpoint"),  # type: ignore[arg-type]
            path=name,
            format="safetensors",
            precision="fp32",
            answers=[
                Given(id=str(i), variant=variant, answer="", score=value, finish="stop")
                for variant, values in own.items()
                for i, value in enumerate(values)
            ],
        )
        for name, own in scores.items()
    ]
    task = TaskInfo(
        name="t", format="digits", split="test", source="s", data_sha256="0" * 64, questions=count,
        available=count, groups=len(set(groups)), scorer="exact", rules="pocketvlm", right_from=1,
        prompt="raw", max_new_tokens=4,
    )  # fmt: skip
    return EvalResults(
        schema="pocketvlm.eval@1",
        created="2026-01-01T00:00:00Z",
        version="0",
        task=task,
        variants=[Variant(name=name, family=name.split("-")[0]) for name in names],
        questions=questions,
        subjects=subjects,
        summaries=[],
    )


def by_name(found: EvalResults) -> dict[tuple[str, str], brittleness.Loss]:
    return {(one.subject, one.variant): one for one in brittleness.losses(found)}


def test_losses_by_hand() -> None:
    found = by_name(
        results(
            {
                "student": {"original": [1, 1, 1, 0], "blur-1": [0, 1, 0, 0], "noise-1": [1, 1, 1, 1]},
                "teacher": {"original": [1, 1, 1, 1], "blur-1": [0, 1, 1, 1], "noise-1": [1, 1, 1, 1]},
            },
            ["a", "b", "c", "d"],
            {"teacher": "teacher"},
        )
    )
    student, teacher = found["student", "blur-1"], found["teacher", "blur-1"]
    assert (student.score, student.change) == (0.25, -0.5)
    assert (teacher.score, teacher.change, teacher.extra) == (0.75, -0.25, None)
    assert student.against == "teacher" and student.extra == -0.25
    assert student.low is not None and student.high is not None
    assert student.low <= student.extra <= student.high and not student.is_more_brittle
    assert found["student", "noise-1"].extra == 0.25
    mean = found["student", brittleness.MEAN]
    assert mean.score == 0.625 and mean.change == -0.125 and mean.extra == 0.0


def test_a_brittle_student_is_found_and_an_equal_one_is_not() -> None:
    draw = np.random.default_rng(0)
    groups = [str(i // 3) for i in range(600)]
    teacher = (draw.random(600) < 0.97).astype(float)
    flips = draw.random(600)

    def changed(scores: np.ndarray, share: float) -> list[float]:
        return np.where(flips < share, 0.0, scores).tolist()

    plain = teacher.tolist()
    found = results(
        {
            "equal": {"original": plain, "noise-3": changed(teacher, 0.10)},
            "brittle": {"original": plain, "noise-3": changed(teacher, 0.20)},
            "big": {"original": plain, "noise-3": changed(teacher, 0.10)},
        },
        groups,
        {"big": "teacher"},
    )
    rows = by_name(found)
    brittle = rows["brittle", "noise-3"]
    assert brittle.is_more_brittle and brittle.extra == pytest.approx(-0.1, abs=0.04)
    assert not rows["equal", "noise-3"].is_more_brittle
    lines = list(brittleness.lines(found))
    assert lines[0].startswith("brittle loses ") and "more than big under noise-3" in lines[0]
    assert lines[-1].startswith("1 of 2 losses exceed those of big")
    table = brittleness.table(found)
    assert table is not None and [column.header for column in table.columns] == [
        "variant", "equal", "brittle", "big",
    ]  # fmt: skip
    cells = list(table.columns[2].cells)
    assert len(cells) == 1 and str(cells[0]).endswith("*")


def test_questions_of_one_image_are_no_independent_evidence() -> None:
    """Ten flips on one image say less than ten on ten."""
    plain, lost = [1.0] * 40, [0.0] * 10 + [1.0] * 30
    scores = {"student": {"original": plain, "blur-1": lost}, "teacher": {"original": plain, "blur-1": plain}}
    apart = by_name(results(scores, [str(i) for i in range(40)], {"teacher": "teacher"}))
    together = by_name(results(scores, [str(i // 10) for i in range(40)], {"teacher": "teacher"}))
    one, other = apart["student", "blur-1"], together["student", "blur-1"]
    assert one.extra == other.extra == -0.25 and one.is_more_brittle and not other.is_more_brittle


def test_without_a_teacher_the_first_subject_is_compared_with() -> None:
    found = results(
        {name: {"original": [1, 1], "blur-1": [1, 0]} for name in ("checkpoint", "bundle")}, ["a", "b"]
    )
    assert [(one.subject, one.against, one.extra) for one in brittleness.losses(found)] == [
        ("checkpoint", "checkpoint", None), ("bundle", "checkpoint", 0.0),
    ]  # fmt: skip


def test_only_questions_that_both_have_count() -> None:
    """A variant with wordings for some questions only."""
    scores: Scores = {
        "student": {"original": [1, 1, 0], "wording=x": [0]},
        "teacher": {"original": [1, 0, 0], "wording=x": [1]},
    }
    found = by_name(results(scores, ["a", "b", "c"], {"teacher": "teacher"}))
    one = found["student", "wording=x"]
    assert (one.units, one.change, one.extra) == (1, -1.0, -1.0)


def test_without_variants_there_is_nothing_to_show() -> None:
    found = results({"one": {"original": [1]}}, ["a"])
    assert brittleness.losses(found) == [] and brittleness.table(found) is None
    assert list(brittleness.lines(found)) == []
