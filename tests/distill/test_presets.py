"""Presets by name: what each one is, and that each one trains."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from distill.losses import presets
from distill.losses.divergence import divergence_t
from distill.losses.objective import Objective
from distill.losses.presets import PRESETS
from distill.losses.rewards import response_mean
from runtime.errors import InputError
from tests.distill.loss_cases import case


def test_masters() -> None:
    """METHOD 5: `paper` has no gate, no floor that matters, no truncation; beta 0.1 in both."""
    paper, robust = PRESETS["paper"].objective, PRESETS["robust"].objective
    assert robust == Objective() == Objective.robust() and paper == Objective.paper()
    assert (paper.gate, paper.negatives, paper.kl_beta) == (False, "full", 0.1)
    assert paper.std_floor <= 1e-3
    assert (robust.gate, robust.negatives, robust.std_floor, robust.kl_beta) == (True, "truncated", 0.1, 0.1)
    for one in (paper, robust):
        assert (one.rl, one.divergence, one.divergence_kind, one.normaliser) == (1, 1, "jsd", "sequence")


@pytest.mark.parametrize(
    ("name", "kind", "alpha"),
    [("kd_forward", "forward_kl", 0.1), ("kd_reverse", "reverse_kl", 0.1), ("distillm", "skew_kl", 0.1),
     ("distillm_reverse", "skew_rkl", 0.1), ("gkd", "gjsd", 0.5), ("prue", "forward_kl", 0.1),
     ("mt_kd", "forward_kl", 0.1), ("dgkd", "forward_kl", 0.1)],
)  # fmt: skip
def test_the_others_are_one_divergence(name: str, kind: str, alpha: float) -> None:
    """Their gradient is that of the mean of one divergence, whatever the answers are worth."""
    it = case(3)
    loss, found = it.gradient(PRESETS[name].objective)
    leaf = it.logits.clone().requires_grad_()
    divergence = divergence_t(leaf.log_softmax(-1), it.teacher_tv, kind, alpha)
    mean_r = response_mean(divergence, it.batch.response_t, it.batch.length_r)
    expected = (it.batch.count_r / it.batch.count_r.sum() * mean_r).sum()
    expected.backward()
    assert loss == pytest.approx(expected.item())
    torch.testing.assert_close(found, leaf.grad)


def test_advdistill_is_likelihood_alone() -> None:
    """No teacher distribution is read; the student's responses do not matter; right answers weigh more."""
    it = case(4)
    switches = PRESETS["advdistill"].objective
    assert not switches.needs_teacher and not switches.needs_reference
    _, found = it.gradient(switches)
    teacher_r = it.batch.teacher_r
    assert teacher_r is not None
    of_student = (teacher_r == 0)[it.batch.response_t]
    assert of_student.any() and (found[of_student] == 0).all() and (found[~of_student] != 0).any()


def test_schedules_and_teachers() -> None:
    assert {name for name, preset in PRESETS.items() if preset.restore == "stages"} == {"robust", "paper"}
    assert PRESETS["prue"].restore == "never" and "mask" in PRESETS["prue"].wants
    assert (PRESETS["mt_kd"].teachers, PRESETS["dgkd"].teachers) == ("accuracy", "drop")


def test_by_name_with_changes() -> None:
    changed = presets.objective("gkd", {"alpha": 0.9, "rl": 0.5})
    assert changed == replace(PRESETS["gkd"].objective, alpha=0.9, rl=0.5)
    assert presets.objective("robust") == Objective()


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [("masters", {}, "known: robust"), ("robusd", {}, "did you mean 'robust'"),
     ("robust", {"klbeta": 1}, "did you mean 'kl_beta'"), ("gkd", {"alpha": 2}, "alpha 2"),
     ("paper", {"normaliser": "tokens"}, "known: sequence, token, constant")],
)  # fmt: skip
def test_unknown_names(name: str, change: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        presets.objective(name, change)
