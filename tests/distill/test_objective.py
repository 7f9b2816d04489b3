"""The loss: values by hand, a slow reference of Eq. 6-11 with every switch, and how parts add up."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses import objective, rewards
from distill.losses.divergence import jsd_t
from distill.losses.objective import Batch, Objective, TokenTerms, dense_terms, masters, weight_part
from runtime.errors import TrainingError
from tests.distill.loss_cases import Case, case

PURE = Objective(rl=0.0, kl_beta=0.0)
SWITCHES = {
    "paper": Objective.paper(),
    "robust": Objective(),
    "weights": Objective(rl=0.3, divergence=2.0, kl_beta=0.05, distill_weight=0.5, gate=False, std_floor=0.3),
    "token": Objective(normaliser="token", divergence_kind="reverse_kl"),
    "constant": Objective(normaliser="constant", constant_tokens=7.0, negatives="none"),
    "sums": Objective(divergence_tokens="sum", policy_tokens="sum", divergence_kind="skew_rkl", alpha=0.2),
    "likelihood": Objective(rl=0.0, likelihood=0.7, distill_weight=0.0, std_floor=1e-4, divergence=0.0),
    "everything": Objective(likelihood=0.5, divergence_kind="gjsd", alpha=0.3, normaliser="token"),
}
EACH = pytest.mark.parametrize("switches", SWITCHES.values(), ids=SWITCHES)


def slow_divergence(q: torch.Tensor, p: torch.Tensor, switches: Objective) -> torch.Tensor:
    """Of two probability vectors (V,)."""

    def kl(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (x * (x / y).log()).sum()

    a = switches.alpha
    if switches.divergence_kind == "reverse_kl":
        return kl(q, p)
    if switches.divergence_kind == "skew_rkl":
        return kl(q, (1 - a) * p + a * q)
    if switches.divergence_kind == "gjsd":
        m = a * p + (1 - a) * q
        return a * kl(p, m) + (1 - a) * kl(q, m)
    assert switches.divergence_kind == "jsd"
    m = (p + q) / 2
    return (kl(p, m) + kl(q, m)) / 2


def slow_masters(logits: torch.Tensor, it: Case, switches: Objective) -> Any:
    """Eq. 6-11 as they are written: one response at a time, every duplicate as a response of its own."""
    batch, wide_total, loss = it.batch, 0.0, torch.zeros((), dtype=torch.float64)
    student_tv = logits.log_softmax(-1)
    spans, start = [], 0
    for length in batch.length_r.tolist():
        spans.append(range(start, start + length))
        start += length
    tokens = [
        slow_divergence(student_tv[t].exp(), it.teacher_tv[t].exp(), switches) for t in range(len(student_tv))
    ]
    distance = []
    for span in spans:
        total = torch.stack([tokens[t] for t in span]).sum()
        distance.append(total / len(span) if switches.divergence_tokens == "mean" else total)
    for group in range(batch.groups):
        members = []  # (response, drawn by the teacher)
        for r in range(len(spans)):
            if batch.group_r[r] == group:
                teacher = int(batch.teacher_r[r]) if batch.teacher_r is not None else 0
                members += [(r, number < teacher) for number in range(int(batch.count_r[r]))]
        distances = [distance[r].item() for r, _ in members]
        scores = []
        for (r, _), far in zip(members, distances, strict=True):
            span_nats = max(distances) - min(distances)
            close = 0.5 if span_nats < switches.divergence_floor else (max(distances) - far) / span_nats
            right = batch.correct_r[r].item()
            scores.append(right + switches.distill_weight * (close * right if switches.gate else close))
        taught = [score for score, (_, teacher) in zip(scores, members, strict=True) if teacher]
        for (r, teacher), score in zip(members, scores, strict=True):
            length = len(spans[r])
            wide_total += {"sequence": 1.0, "token": length, "constant": switches.constant_tokens}[
                switches.normaliser
            ]
            advantage = standard(score, scores, switches.std_floor)
            weight = 0.0
            if teacher:
                raised = [math.exp(standard(other, taught, switches.std_floor)) for other in taught]
                mine = math.exp(standard(score, taught, switches.std_floor))
                weight = len(taught) * mine / sum(raised)
            policy = torch.stack(
                [slow_token(student_tv, it, t, advantage, weight, switches) for t in spans[r]]
            ).sum()
            per_token = switches.normaliser == "sequence"
            loss = loss + policy / (length if per_token and switches.policy_tokens == "mean" else 1)
            whole = torch.stack([tokens[t] for t in spans[r]]).sum()
            mean = per_token and switches.divergence_tokens == "mean"
            loss = loss + switches.divergence * whole / (length if mean else 1)
    return loss / wide_total


def standard(value: float, values: list[float], floor: float) -> float:
    mean = sum(values) / len(values)
    return (value - mean) / max(math.sqrt(sum((v - mean) ** 2 for v in values) / len(values)), floor)


def slow_token(
    student_tv: torch.Tensor, it: Case, t: int, advantage: float, weight: float, switches: Objective
) -> torch.Tensor:
    """What one token adds to the loss beside the divergence."""
    log_pi = student_tv[t, it.batch.target_t[t]]
    push = advantage
    if advantage < 0 and switches.negatives == "truncated":
        push *= min(1.0, math.exp(log_pi.item() - it.batch.mu_t[t].item()))
    if advantage < 0 and switches.negatives == "none":
        push = 0.0
    ratio = log_pi.exp() / log_pi.exp().detach()
    kl = (student_tv[t].exp() * (student_tv[t] - it.reference_tv[t])).sum()
    return -switches.rl * ratio * push + switches.kl_beta * kl - switches.likelihood * weight * log_pi


@EACH
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_slow_reference(switches: Objective, seed: int) -> None:
    it = case(seed)
    leaf = it.logits.clone().requires_grad_()
    expected = slow_masters(leaf, it, switches)
    expected.backward()
    loss, found = it.gradient(switches)
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(found, leaf.grad, atol=1e-10, rtol=1e-8)


def by_hand(mu: float = 0.1, teacher: torch.Tensor | None = None) -> tuple[torch.Tensor, Batch]:
    """Two one-token answers over two words, the first right; the student says 0.8 / 0.2."""
    student = torch.tensor([[0.8, 0.2]] * 2, dtype=torch.float64).log().requires_grad_()
    batch = Batch(
        target_t=torch.tensor([0, 1]), response_t=torch.tensor([0, 1]), length_r=torch.tensor([1, 1]),
        group_r=torch.tensor([0, 0]), groups=1, count_r=torch.ones(2).double(),
        correct_r=torch.tensor([1.0, 0.0]).double(), mu_t=torch.tensor([0.5, mu]).double().log(),
        teacher_r=teacher,
    )  # fmt: skip
    return student, batch


def test_one_group_by_hand() -> None:
    """The teacher says 0.5 / 0.5. Both responses have the same JSD, so R_distill is 0.5 for both; the right
    one gets R = 1.5, the wrong one 0: A = +-1. The gradient of -mean(ratio * A) for log pi is -1/2 and +1/2.
    """
    student, batch = by_hand()
    switches = Objective(kl_beta=0.0, negatives="full")
    teacher = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    terms = masters(dense_terms(student, batch.target_t, teacher), batch, switches)
    assert terms.rl.item() == pytest.approx(0.0, abs=1e-12)
    terms.rl.backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[pytest.approx(-0.5), 0.0], [0.0, pytest.approx(0.5)]]
    jsd = 0.5 * (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35))
    jsd += 0.5 * (0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35))
    assert terms.figures == {
        "r_acc": 0.5, "r_distill": 0.5, "zero_variance": 0.0, "tokens": 2.0, "responses": 2.0,
        "divergence": pytest.approx(jsd),
    }  # fmt: skip


@pytest.mark.parametrize(
    ("negatives", "mu", "push"),
    [("truncated", 0.5, 0.4), ("truncated", 0.1, 1.0), ("full", 0.5, 1.0), ("none", 0.5, 0.0)],
)
def test_negatives(negatives: Any, mu: float, push: float) -> None:
    """pi = 0.2 for the wrong answer that was drawn with mu = 0.5: its push is 0.4 of the full one.
    mu = 0.1: never more than the full one. A right answer is never weighed down."""
    student, batch = by_hand(mu)
    terms = dense_terms(student, batch.target_t, student.detach())
    masters(terms, batch, Objective(kl_beta=0.0, negatives=negatives)).rl.backward()
    assert student.grad is not None
    assert student.grad[0, 0].item() == pytest.approx(-0.5)
    assert student.grad[1, 1].item() == pytest.approx(0.5 * push)


def test_a_mu_that_nobody_recorded() -> None:
    """A teacher's response falls back to the teacher's own log-prob (here 0.5); a student's cannot."""
    student, batch = by_hand(math.nan, torch.tensor([0.0, 1.0]))
    teacher = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    terms = dense_terms(student, batch.target_t, teacher)
    masters(terms, batch, Objective(kl_beta=0.0)).rl.backward()
    assert student.grad is not None and student.grad[1, 1].item() == pytest.approx(0.5 * 0.2 / 0.5)
    of_student = dataclasses.replace(batch, teacher_r=torch.tensor([1.0, 0.0]))
    with pytest.raises(TrainingError, match=r"set negatives: full"):
        masters(terms, of_student, Objective(kl_beta=0.0))
    assert masters(terms, of_student, Objective.paper()).total.isfinite()


def test_the_ratio_is_one_with_the_gradient_of_log_pi() -> None:
    """-E[ratio * A] is -E[A], and its gradient that of -E[A * log pi]."""
    it = case(5)
    loss, found = it.gradient(Objective(divergence=0.0, kl_beta=0.0, negatives="full"))
    weights = it.batch.count_r / it.batch.count_r.sum()
    leaf = it.logits.clone().requires_grad_()
    student_tv = leaf.log_softmax(-1)
    group_r, groups = it.batch.group_r, it.batch.groups
    with torch.no_grad():
        divergence = jsd_t(student_tv, it.teacher_tv)
        divergence_r = rewards.response_mean(divergence, it.batch.response_t, it.batch.length_r)
        close = rewards.distill_reward(divergence_r, group_r, groups, 1e-3)
        reward = it.batch.correct_r * (1 + close)
        advantage, _ = rewards.advantages(reward, it.batch.count_r, group_r, groups, 0.1)
    assert loss == pytest.approx(-(weights * advantage).sum().item(), abs=1e-12)
    log_pi = student_tv.gather(-1, it.batch.target_t[:, None])[:, 0]
    mean_r = rewards.response_mean(log_pi, it.batch.response_t, it.batch.length_r)
    (-(weights * advantage * mean_r).sum()).backward()
    torch.testing.assert_close(found, leaf.grad)


def test_without_rl_it_is_the_divergence_alone() -> None:
    it = case(1)
    _, found = it.gradient(PURE)
    leaf = it.logits.clone().requires_grad_()
    divergence = jsd_t(leaf.log_softmax(-1), it.teacher_tv)
    mean_r = rewards.response_mean(divergence, it.batch.response_t, it.batch.length_r)
    ((it.batch.count_r / it.batch.count_r.sum()) * mean_r).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_rewards_carry_no_gradient() -> None:
    """A teacher that wants a gradient gets it from the divergence only: none through R_distill."""
    it = case(2)
    it.teacher_tv = it.teacher_tv.clone().requires_grad_()
    terms = it.terms(Objective(gate=False), it.logits.clone().requires_grad_())
    assert torch.autograd.grad(terms.rl, it.teacher_tv, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(terms.divergence, it.teacher_tv)[0].abs().max() > 0


def test_the_terms_sum_to_the_loss() -> None:
    it = case(3)
    switches = dataclasses.replace(Objective(), likelihood=0.5)
    terms = it.terms(switches, it.logits)
    sum_of_parts = terms.rl + terms.divergence + terms.reference + terms.likelihood
    assert terms.total.item() == pytest.approx(sum_of_parts.item())
    nothing = Objective(rl=0.0, divergence=0.0, kl_beta=0.0)
    parts = [
        dataclasses.replace(nothing, **{name: getattr(switches, name)})
        for name in ("rl", "divergence", "kl_beta", "likelihood")
    ]
    summed = sum(it.gradient(part)[1] for part in parts)
    torch.testing.assert_close(it.gradient(switches)[1], summed)


@EACH
def test_merged_duplicates_are_explicit_duplicates(switches: Objective) -> None:
    """In the loss, in every figure but the tokens computed, and in the gradient."""
    it = case(4)
    wide, place = it.expanded()
    loss, found = it.gradient(switches)
    loss_wide, found_wide = wide.gradient(switches)
    assert loss == pytest.approx(loss_wide, abs=1e-12)
    torch.testing.assert_close(found, torch.zeros_like(found).index_add(0, place, found_wide))
    figures, figures_wide = (one.terms(switches, one.logits).figures for one in (it, wide))
    assert figures.pop("tokens") < figures_wide.pop("tokens")
    assert figures == pytest.approx(figures_wide)


@EACH
@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    split=st.lists(st.integers(0, 3), min_size=6, max_size=6),
)
def test_however_a_batch_is_split(switches: Objective, seed: int, split: list[int]) -> None:
    """Six questions over up to four micro-batches or ranks, some of them empty: with the global
    normaliser loss and gradient of the parts add up to those of the whole."""
    it = case(seed, groups=6)
    loss, found = it.gradient(switches)
    parts = [it.part([g for g in range(6) if split[g] == number]) for number in range(4)]
    total = sum(weight_part(one.batch.count_r, one.batch.length_r, switches) for one, _ in parts)
    joined, summed = torch.zeros_like(found), 0.0
    for one, place in parts:
        value, gradient = one.gradient(switches, weight_total=total)
        summed += value
        joined[place] = gradient
    assert summed == pytest.approx(loss, abs=1e-12)
    torch.testing.assert_close(joined, found)


def test_a_mean_of_means_is_another_gradient() -> None:
    it = case(6, groups=5)
    _, found = it.gradient(Objective())
    halves = [it.part([0, 1])[0], it.part([2, 3, 4])[0]]
    mean_of_means = torch.cat([half.gradient(Objective())[1] / 2 for half in halves])
    assert (mean_of_means - found).abs().max() > 1e-3


def test_figures_of_parts_join_by_their_responses() -> None:
    it = case(8, groups=4)
    whole = it.terms(Objective(), it.logits).figures
    parts = [it.part(groups)[0] for groups in ([0, 1], [2, 3])]
    found = [one.terms(Objective(), one.logits).figures for one in parts]
    for name in ("divergence", "r_acc", "r_distill"):
        joined = sum(one[name] * one["responses"] for one in found) / whole["responses"]
        assert joined == pytest.approx(whole[name])


def test_no_reference_and_no_teacher() -> None:
    it = case(7)
    student = it.logits.log_softmax(-1)
    terms = masters(dense_terms(student, it.batch.target_t, it.teacher_tv), it.batch, Objective(kl_beta=0.0))
    assert terms.reference.item() == 0.0 and terms.total.isfinite()
    alone = dense_terms(student, it.batch.target_t, None)
    with pytest.raises(TrainingError, match="need a teacher"):
        masters(alone, it.batch, Objective(kl_beta=0.0))
    answers_only = Objective(divergence=0.0, distill_weight=0.0, kl_beta=0.0)
    assert not answers_only.needs_teacher and Objective().needs_teacher
    assert masters(alone, it.batch, answers_only).total.isfinite()


@pytest.mark.parametrize("value", [-0.01, math.log(2) + 0.01, math.nan, math.inf])
def test_an_impossible_divergence_stops_the_run(value: float) -> None:
    _, batch = by_hand()
    terms = TokenTerms(torch.zeros(2).double(), torch.tensor([0.1, value]).double())
    with pytest.raises(TrainingError, match=r"wanted 0 to 0\.693"):
        masters(terms, batch, Objective(kl_beta=0.0))


def test_likelihood_needs_to_know_who_drew() -> None:
    student, batch = by_hand()
    with pytest.raises(TrainingError, match="which responses the teacher drew"):
        masters(
            dense_terms(student, batch.target_t, student.detach()),
            batch,
            Objective(likelihood=1.0, kl_beta=0),
        )


@pytest.mark.parametrize(
    "switch",
    [{"normaliser": "words"}, {"negatives": "cut"}, {"policy_tokens": "max"}, {"std_floor": 0.0},
     {"divergence_kind": "jds"}, {"divergence_tokens": "first"}],
)  # fmt: skip
def test_unknown_switches(switch: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(switch))):
        Objective(**switch)


def test_the_plain_tensors_are_log_probs() -> None:
    """`dense_terms` reads the student's and the teacher's log-prob of the target."""
    it = case(9)
    terms = dense_terms(it.logits.log_softmax(-1), it.batch.target_t, it.teacher_tv, it.reference_tv)
    t = 3
    target = it.batch.target_t[t]
    assert terms.log_prob_t[t] == it.logits.log_softmax(-1)[t, target]
    assert terms.teacher_log_prob_t is not None and terms.teacher_log_prob_t[t] == it.teacher_tv[t, target]
    assert objective.dense_terms(it.logits.log_softmax(-1), it.batch.target_t, None).divergence_t is None
