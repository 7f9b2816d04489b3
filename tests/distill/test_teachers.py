"""The gate: the curve, what it allows and refuses, resuming. The phases: shares, stages, growth."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from transformers import PreTrainedModel

from distill.masks import teachers
from distill.masks.masking import Masker
from distill.masks.teachers import Phase, Point, decide, gate, phases, ratios
from distill.settings import Gate, Mask, Teacher
from runtime.errors import StateError, TrainingError

ASKED = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)


def curve(right: Sequence[int], count: int = 100) -> list[Point]:
    """Points at 0, 0.1, ...: the first questions are right, so lost ones are paired."""
    scores = [tuple([1.0] * n + [0.0] * (count - n)) for n in right]
    return [Point(r, s, r, 1.0) for r, s in zip(ASKED, scores, strict=False)]


def test_auto_takes_the_largest_ratio_that_keeps_enough() -> None:
    found = decide("big", curve([90, 91, 89, 87, 80, 20]), "auto", Gate(most_lost=0.03))
    assert found.r_max == 0.3 and not found.inert
    assert decide("big", curve([90, 91, 89, 87, 80, 20]), "auto", Gate(most_lost=0.1)).r_max == 0.4
    lost, half = found.lost(found.curve[4])
    assert lost == pytest.approx(0.10)
    assert half == pytest.approx(1.96 * (0.1 * 0.9 / 99) ** 0.5), (
        "of paired differences, not of two accuracies"
    )


def test_a_fixed_r_max_is_checked() -> None:
    points, settings = curve([90, 91, 89, 87, 80, 20]), Gate(most_lost=0.03)
    assert decide("big", points, 0.2, settings).r_max == 0.2
    with pytest.raises(
        TrainingError,
        match=r"big: at its r_max 0.4 the teacher loses 10.0 points and at most 3 points may be lost .*"
        r"r 0: 90.0%, r 0.1: 91.0%, .* r 0.5: 20.0%; take r_max 0.3 or auto",
    ):
        decide("big", points, 0.4, settings)


def test_a_teacher_that_collapses_at_once_is_refused_with_its_curve() -> None:
    with pytest.raises(
        TrainingError, match=r"big: collapses at every ratio .*r 0: 90.0%, r 0.1: 50.0%.*mask: n"
    ):
        decide("big", curve([90, 50, 10, 0, 0, 0]), "auto", Gate(most_lost=0.03))
    with pytest.raises(TrainingError, match="answers none of 100 held-out questions correctly"):
        decide("big", curve([0, 0, 0, 0, 0, 0]), "auto", Gate())


def test_inert_and_noisy_masks_are_said() -> None:
    found = decide("big", curve([990, 990, 991, 989, 988, 986], 1000), "auto", Gate())
    assert found.inert and found.r_max == 0.5
    assert found.notes == ("masking is inert for this teacher: every r up to 0.5 loses less than 1 point",)
    short = decide("big", curve([9, 9, 9], 10), "auto", Gate(ratios=(0.0, 0.1, 0.2)))
    assert "every r up to 0.2" in short.notes[0]
    noisy = decide("big", curve([9, 9, 8, 7], 10), "auto", Gate(ratios=ASKED[:4], most_lost=0.1))
    assert "10 questions tell losses to +-26.1 points only, and r_max hangs on 10" in noisy.notes[-1]
    wide = Console(width=160, file=io.StringIO(), record=True)
    wide.print(noisy.table())
    text = wide.export_text()
    assert "r_max = 0.2" in text and "10.0 +- 19.6" in text and "20.0%" in text


# --- with a model ------------------------------------------------------


class Answers:
    """Scores that follow from how many weights are zero; counts how often it was asked."""

    def __init__(self, model: Any, right: Callable[[float], int], count: int = 20) -> None:
        self.weight = model.model.text_model.layers[0].mlp.up_proj.weight
        self.right, self.count, self.asked = right, count, 0
        self.masker = Masker(model, 0.5)

    def __call__(self, ratio: float) -> tuple[list[float], float]:
        self.asked += 1
        self.masker.set(ratio)
        try:
            right = self.right(float((self.weight == 0).float().mean()))
            return [1.0] * right + [0.0] * (self.count - right), self.masker.sparsity
        finally:
            self.masker.set(0.0)


MASK = Mask(gate=Gate(ratios=ASKED[:4], samples=20, most_lost=0.05))


def test_the_gate_measures_and_keeps_a_record(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    answers, lines = Answers(tiny_model, lambda zeros: 20 if zeros < 0.15 else 19 if zeros < 0.25 else 3), []
    record = tmp_path / "gate.json"
    found = gate("tiny", answers, MASK, record, {"teacher": "a"}, progress=lines.append)
    assert found.r_max == 0.2 and answers.asked == 4 == len(lines)
    assert [p.accuracy for p in found.curve] == [1.0, 1.0, 0.95, 0.15]
    assert [p.sparsity for p in found.curve] == pytest.approx(ASKED[:4], abs=1e-3), "measured"
    again = gate("tiny", answers, MASK, record, {"teacher": "a"})
    assert again == found and answers.asked == 4, "everything was in the record"
    more = MASK.model_copy(update={"r_max": 0.15})
    assert gate("tiny", answers, more, record, {"teacher": "a"}).r_max == 0.15
    assert answers.asked == 5, "only the ratio that is new"
    with pytest.raises(StateError, match=r"gate.json: measured with other teacher; delete it"):
        gate("tiny", answers, MASK, record, {"teacher": "b"})
    with pytest.raises(StateError, match=r"measured with other tensors"):
        gate("tiny", answers, Mask(tensors=("vision",)), record, {"teacher": "a"})


def test_an_interrupted_gate_continues(tiny_model: PreTrainedModel, tmp_path: Path) -> None:
    def break_at(zeros: float) -> int:
        if zeros > 0.15:
            raise KeyboardInterrupt
        return 20

    with pytest.raises(KeyboardInterrupt):
        gate("tiny", Answers(tiny_model, break_at), MASK, tmp_path / "gate.json", {})
    answers = Answers(tiny_model, lambda zeros: 20)
    found = gate("tiny", answers, MASK, tmp_path / "gate.json", {})
    assert answers.asked == 2 and len(found.curve) == 4 and found.inert


def test_scores_must_be_scores(tmp_path: Path) -> None:
    for scores in ([], [0.5, 1.5], [float("nan")]):
        with pytest.raises(TrainingError, match=r"at least one, all in \[0, 1\]"):
            gate("tiny", lambda ratio, scores=scores: (scores, ratio), MASK, tmp_path / "gate.json", {})


def test_without_a_gate_r_max_is_taken_unseen(tmp_path: Path) -> None:
    found = gate("tiny", lambda ratio: ([], ratio), Mask(r_max=0.4, gate=None), tmp_path / "gate.json", {})
    assert found.r_max == 0.4 and "not checked" in found.notes[0] and not (tmp_path / "gate.json").exists()


# --- phases ------------------------------------------------------------


def teacher(name: str, share: float = 1.0, mask: Mask | None = None) -> Teacher:
    return Teacher(checkpoint=f"org/{name}", share=share, mask=mask)


def test_teachers_grow_and_each_is_restored() -> None:
    """METHOD 2: mid-size first, an equal share each, its own schedule; every question in one phase."""
    mid = teacher("mid", mask=Mask(r_max=0.4, step=0.2))
    large = teacher("large", mask=Mask(r_max="auto", stages=5))
    found = phases([mid, large], [0.4, 0.2], 1000)
    assert [(p.teacher, p.ratio) for p in found] == [
        (0, 0.4), (0, 0.2), (0, 0.0),
        (1, 0.2), (1, 0.15), (1, 0.1), (1, 0.05), (1, 0.0),
    ]  # fmt: skip
    assert [p.questions for p in found] == [166, 167, 167, 100, 100, 100, 100, 100]
    assert found[0] == Phase("1 mid r 0.4", 0, 0.4, 166)


def test_shares_add_up() -> None:
    for count in range(12, 60):
        found = phases(
            [teacher("a", 1.0, Mask(stages=3)), teacher("b", 2.0), teacher("c", 0.7)], [0.3, 0.0, 0.0], count
        )
        assert sum(p.questions for p in found) == count and all(p.questions for p in found)


def test_schedules_of_one_teacher() -> None:
    assert ratios(None, 0.0) == (0.0,)
    assert ratios(Mask(), 0.2) == (0.2, 0.15, 0.1, 0.05, 0.0), "five stages unless the recipe says otherwise"
    assert ratios(Mask(step=0.1), 0.3) == (0.3, 0.2, 0.1, 0.0)
    assert ratios(Mask(restore=False), 0.3) == (0.3,), "PrUE: a pruned teacher is never restored"
    assert ratios(Mask(), 0.0) == (0.0,)


def test_teachers_at_once() -> None:
    both = [teacher("a"), teacher("b")]
    assert phases(both, [0.0, 0.0], 64, together=True) == [
        Phase("all teachers", teachers.ALL_TEACHERS, 0.0, 64)
    ]


def test_too_few_questions() -> None:
    with pytest.raises(TrainingError, match=r"org/a: 4 of 4 questions for 5 stages; give more questions"):
        phases([teacher("a", mask=Mask())], [0.2], 4)
