"""Rewards, advantages and losses: values by hand, properties, and a slow reference of Eq. 6-11."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill import objective
from distill.objective import Batch, Objective, masters

LN2 = math.log(2)
SEEDS = st.integers(0, 2**31 - 1)
PURE = Objective(rl=0.0, kl_beta=0.0)


def log_probs(generator: torch.Generator, tokens: int, vocabulary: int, scale: float = 2.0) -> torch.Tensor:
    drawn = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    return drawn.log_softmax(-1)


@dataclass
class Case:
    """Logits of the student, and a batch whose groups, lengths, counts and rewards are all ragged."""

    logits: torch.Tensor
    batch: Batch


def case(seed: int, groups: int = 3, vocabulary: int = 7, *, counts: tuple[int, int] = (1, 4)) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    responses = integers(1, 5, groups)
    group_r = torch.arange(groups).repeat_interleave(responses)
    length_r = integers(1, 5, len(group_r))
    response_t = torch.arange(len(group_r)).repeat_interleave(length_r)
    tokens = len(response_t)
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    batch = Batch(
        target_t=integers(0, vocabulary, tokens),
        response_t=response_t,
        length_r=length_r,
        group_r=group_r,
        groups=groups,
        count_r=integers(*counts, len(group_r)).double(),
        correct_r=integers(0, 2, len(group_r)).double(),
        mu_t=-torch.rand(tokens, generator=generator, dtype=torch.float64) * 3,
        teacher_tv=log_probs(generator, tokens, vocabulary),
        reference_tv=log_probs(generator, tokens, vocabulary),
    )
    return Case(logits, batch)


def gradient(logits: torch.Tensor, batch: Batch, switches: Objective) -> tuple[float, torch.Tensor]:
    """Loss and its gradient for the student's logits (T, V)."""
    leaf = logits.clone().requires_grad_()
    loss = masters(leaf.log_softmax(-1), batch, switches).total
    loss.backward()
    assert leaf.grad is not None
    return loss.item(), leaf.grad


# --- divergences ------------------------------------------------------


def test_jsd_by_hand() -> None:
    """p = (1/2, 1/2), q = (1/4, 3/4): m = (3/8, 5/8)."""
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    kl_p = 0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)
    kl_q = 0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)
    assert objective.jsd_t(p, q).item() == pytest.approx((kl_p + kl_q) / 2, abs=1e-7)


def test_jsd_of_disjoint_distributions_is_ln_2() -> None:
    one, other = torch.tensor([[60.0, -60.0]]).log_softmax(-1), torch.tensor([[-60.0, 60.0]]).log_softmax(-1)
    assert objective.jsd_t(one, other).item() == pytest.approx(LN2, abs=1e-6)


@settings(max_examples=40, deadline=None)
@given(SEEDS, st.floats(0.01, 40))
def test_jsd_is_bounded_symmetric_and_zero_only_at_equality(seed: int, scale: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (log_probs(generator, 5, 9, scale) for _ in range(2))
    for first, second in ((p, q), (p.float(), q.float())):
        found = objective.jsd_t(first, second)
        assert (found > -1e-6).all() and (found < LN2 + 1e-6).all()
        torch.testing.assert_close(found, objective.jsd_t(second, first))
        assert objective.jsd_t(first, first).abs().max() < 1e-6
    assert (objective.jsd_t(p, q) > 0).all()


def test_jsd_pulls_nowhere_at_equality() -> None:
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    objective.jsd_t(logits.log_softmax(-1), logits.detach().log_softmax(-1)).sum().backward()
    assert logits.grad is not None and logits.grad.abs().max() < 1e-12


def test_kl_by_hand() -> None:
    p, q = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.25, 0.75]]).log()
    exact = 0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75)
    assert objective.kl_t(p, q).item() == pytest.approx(exact, abs=1e-7)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_kl_is_never_negative(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    p, q = (log_probs(generator, 5, 9) for _ in range(2))
    assert (objective.kl_t(p, q) > 0).all() and objective.kl_t(p, p).abs().max() < 1e-12


def test_response_mean() -> None:
    """A long response weighs as a short one: means 2 and 5, not sums 6 and 5."""
    values = torch.tensor([1.0, 2.0, 3.0, 5.0])
    found = objective.response_mean(values, torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1]))
    assert found.tolist() == [2.0, 5.0]


# --- rewards and advantages -------------------------------------------


def test_distill_reward_by_hand() -> None:
    """Within a question: the closest gets 1, the farthest 0, the others in proportion."""
    divergence = torch.tensor([0.1, 0.5, 0.2, 0.3, 0.3005])
    found = objective.distill_reward(divergence, torch.tensor([0, 0, 0, 1, 1]), 2, 1e-3)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.75, 0.5, 0.5])


def test_distill_reward_floor() -> None:
    """A span just above the floor counts, below it and in a group of one the reward is constant."""
    groups = torch.tensor([0, 0, 1, 1, 3])  # question 2 has no response
    divergence = torch.tensor([0.2, 0.2011, 0.2, 0.2009, 0.4])
    found = objective.distill_reward(divergence, groups, 4, 1e-3)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5, 0.5], abs=1e-4)
    unguarded = objective.distill_reward(torch.tensor([0.2, 0.2]), torch.tensor([0, 0]), 1, 0.0)
    assert unguarded.isfinite().all()


def test_advantages_by_hand() -> None:
    """Rewards 0, 1, 1, 2: mean 1, population std sqrt(1/2). A constant group has advantage 0."""
    reward = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.5, 1.5])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    found, std = objective.advantages(reward, torch.ones(6), group, 2, 0.1)
    root = math.sqrt(0.5)
    assert found.tolist() == pytest.approx([-1 / root, 0, 0, 1 / root, 0, 0])
    assert std.tolist() == pytest.approx([root, 0])


def test_std_floor() -> None:
    """Below the floor differences are divided by the floor, so noise is not blown up to +-1."""
    reward, group = torch.tensor([1.0, 1.02]), torch.tensor([0, 0])
    floored, std = objective.advantages(reward, torch.ones(2), group, 1, 0.1)
    exact, _ = objective.advantages(reward, torch.ones(2), group, 1, 1e-4)
    assert std.tolist() == pytest.approx([0.01], abs=1e-6)
    assert floored.tolist() == pytest.approx([-0.1, 0.1], abs=1e-5)
    assert exact.tolist() == pytest.approx([-1, 1], abs=1e-4)


@settings(max_examples=40, deadline=None)
@given(SEEDS)
def test_counts_are_expanded_duplicates(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size, groups = 9, 3
    reward = torch.rand(size, generator=generator, dtype=torch.float64)
    group = torch.randint(0, groups, (size,), generator=generator)
    count = torch.randint(1, 5, (size,), generator=generator)
    merged, std = objective.advantages(reward, count.double(), group, groups, 0.05)
    copies = torch.arange(size).repeat_interleave(count)
    ones = torch.ones(len(copies), dtype=torch.float64)
    expanded, std_expanded = objective.advantages(reward[copies], ones, group[copies], groups, 0.05)
    torch.testing.assert_close(merged[copies], expanded)
    torch.testing.assert_close(std, std_expanded)


def test_a_question_without_responses() -> None:
    found, std = objective.advantages(torch.tensor([1.0]), torch.ones(1), torch.tensor([1]), 3, 0.1)
    assert found.tolist() == [0.0] and std.tolist() == [0.0, 0.0, 0.0]


# --- the loss ---------------------------------------------------------


def slow_masters(logits: torch.Tensor, batch: Batch, switches: Objective) -> torch.Tensor:
    """Eq. 6-11 as they are written: one response at a time, every duplicate as a response of its own."""
    student_tv = logits.log_softmax(-1)
    spans, start = [], 0
    for length in batch.length_r.tolist():
        spans.append(range(start, start + length))
        start += length
    divergence = []
    for span in spans:
        tokens = []
        for t in span:
            p, q = student_tv[t].exp(), batch.teacher_tv[t].exp()
            m = (p + q) / 2
            tokens.append(((p * (p / m).log()).sum() + (q * (q / m).log()).sum()) / 2)
        divergence.append(sum(tokens) / len(tokens))
    losses = []
    for group in range(batch.groups):
        members = [
            r
            for r in range(len(spans))
            if batch.group_r[r] == group
            for _ in range(int(batch.count_r[r]))
        ]  # fmt: skip
        if not members:
            continue
        distances = [divergence[r].item() for r in members]
        span_nats = max(distances) - min(distances)
        rewards = []
        for r, distance in zip(members, distances, strict=True):
            close = 0.5 if span_nats < switches.divergence_floor else (max(distances) - distance) / span_nats
            right = batch.correct_r[r].item()
            rewards.append(right + switches.distill_weight * (close * right if switches.gate else close))
        mean = sum(rewards) / len(rewards)
        std = math.sqrt(sum((reward - mean) ** 2 for reward in rewards) / len(rewards))
        for r, reward in zip(members, rewards, strict=True):
            advantage = (reward - mean) / max(std, switches.std_floor)
            terms = []
            for t in spans[r]:
                log_pi = student_tv[t, batch.target_t[t]]
                weight = 1.0
                if switches.truncate_negatives and advantage < 0:
                    weight = min(1.0, math.exp(log_pi.item() - batch.mu_t[t].item()))
                ratio = log_pi.exp() / log_pi.exp().detach()
                assert batch.reference_tv is not None
                kl = (student_tv[t].exp() * (student_tv[t] - batch.reference_tv[t])).sum()
                terms.append(switches.rl * ratio * advantage * weight - switches.kl_beta * kl)
            losses.append(-sum(terms) / len(terms) + switches.divergence * divergence[r])
    return sum(losses) / len(losses)


@pytest.mark.parametrize(
    "switches",
    [
        Objective.paper(),
        Objective(),
        Objective(rl=0.3, divergence=2.0, kl_beta=0.05, distill_weight=0.5, gate=False, std_floor=0.3),
    ],
    ids=["paper", "robust", "other"],
)
@pytest.mark.parametrize("seed", range(4))
def test_equal_to_the_slow_reference(switches: Objective, seed: int) -> None:
    it = case(seed)
    leaf = it.logits.clone().requires_grad_()
    expected = slow_masters(leaf, it.batch, switches)
    expected.backward()
    loss, found = gradient(it.logits, it.batch, switches)
    assert loss == pytest.approx(expected.item(), abs=1e-9)
    torch.testing.assert_close(found, leaf.grad, atol=1e-10, rtol=1e-8)


def test_presets() -> None:
    """METHOD 5: `paper` has no gate, no floor that matters, no truncation; beta 0.1 in both."""
    paper, robust = Objective.paper(), Objective()
    assert (paper.gate, paper.truncate_negatives, paper.kl_beta) == (False, False, 0.1)
    assert paper.std_floor <= 1e-3
    assert (robust.gate, robust.truncate_negatives, robust.std_floor, robust.kl_beta) == (
        True,
        True,
        0.1,
        0.1,
    )


def test_one_group_by_hand() -> None:
    """Two one-token answers over two words; the student says 0.8 / 0.2, the teacher 0.5 / 0.5.

    Both responses have the same JSD, so R_distill is 0.5 for both; the right one gets R = 1.5, the wrong
    one 0: A = +-1. The gradient of -mean(ratio * A) for log pi is -1/2 and +1/2.
    """
    student = torch.tensor([[0.8, 0.2]] * 2, dtype=torch.float64).log().requires_grad_()
    teacher = torch.full((2, 2), 0.5, dtype=torch.float64).log()
    batch = Batch(
        target_t=torch.tensor([0, 1]), response_t=torch.tensor([0, 1]), length_r=torch.tensor([1, 1]),
        group_r=torch.tensor([0, 0]), groups=1, count_r=torch.ones(2).double(),
        correct_r=torch.tensor([1.0, 0.0]).double(), mu_t=torch.tensor([0.5, 0.1]).double().log(),
        teacher_tv=teacher, reference_tv=None,
    )  # fmt: skip
    terms = masters(student, batch, Objective(kl_beta=0.0, truncate_negatives=False))
    assert terms.rl.item() == pytest.approx(0.0, abs=1e-12)
    terms.rl.backward()
    assert student.grad is not None
    assert student.grad.tolist() == [[pytest.approx(-0.5), 0.0], [0.0, pytest.approx(0.5)]]
    assert terms.figures["r_acc"] == 0.5 and terms.figures["r_distill"] == 0.5
    assert terms.figures["zero_variance"] == 0.0 and terms.figures["tokens"] == 2.0
    jsd = 0.5 * (0.8 * math.log(0.8 / 0.65) + 0.2 * math.log(0.2 / 0.35))
    jsd += 0.5 * (0.5 * math.log(0.5 / 0.65) + 0.5 * math.log(0.5 / 0.35))
    assert terms.figures["divergence"] == pytest.approx(jsd)


def test_truncated_negatives() -> None:
    """pi = 0.2 for the wrong answer that was drawn with mu = 0.5: its push is 0.4 of the full one.
    mu = 0.1: never more than the full one. A right answer is never weighed down."""
    for mu, weight in ((0.5, 0.4), (0.1, 1.0)):
        student = torch.tensor([[0.8, 0.2]] * 2, dtype=torch.float64).log().requires_grad_()
        batch = dataclasses.replace(
            case(0).batch,
            target_t=torch.tensor([0, 1]), response_t=torch.tensor([0, 1]), length_r=torch.tensor([1, 1]),
            group_r=torch.tensor([0, 0]), groups=1, count_r=torch.ones(2).double(),
            correct_r=torch.tensor([1.0, 0.0]).double(),
            mu_t=torch.tensor([0.99, mu]).double().log(),
            teacher_tv=student.detach(), reference_tv=None,
        )  # fmt: skip
        masters(student, batch, Objective(kl_beta=0.0)).rl.backward()
        assert student.grad is not None
        assert student.grad[0, 0].item() == pytest.approx(-0.5)
        assert student.grad[1, 1].item() == pytest.approx(0.5 * weight)


def test_the_ratio_is_one_with_the_gradient_of_log_pi() -> None:
    """-E[ratio * A] is -E[A], and its gradient that of -E[A * log pi]."""
    it = case(5)
    switches = Objective(divergence=0.0, kl_beta=0.0, truncate_negatives=False)
    loss, found = gradient(it.logits, it.batch, switches)
    weights = it.batch.count_r / it.batch.count_r.sum()
    leaf = it.logits.clone().requires_grad_()
    student_tv = leaf.log_softmax(-1)
    with torch.no_grad():
        divergence = objective.jsd_t(student_tv, it.batch.teacher_tv)
        divergence_r = objective.response_mean(divergence, it.batch.response_t, it.batch.length_r)
        close = objective.distill_reward(divergence_r, it.batch.group_r, it.batch.groups, 1e-3)
        reward = it.batch.correct_r * (1 + close)
        advantage, _ = objective.advantages(reward, it.batch.count_r, it.batch.group_r, it.batch.groups, 0.1)
    assert loss == pytest.approx(-(weights * advantage).sum().item(), abs=1e-12)
    log_pi = student_tv.gather(-1, it.batch.target_t[:, None])[:, 0]
    mean_r = objective.response_mean(log_pi, it.batch.response_t, it.batch.length_r)
    (-(weights * advantage * mean_r).sum()).backward()
    torch.testing.assert_close(found, leaf.grad)


def test_without_rl_it_is_the_divergence_alone() -> None:
    it = case(1)
    _, found = gradient(it.logits, it.batch, PURE)
    leaf = it.logits.clone().requires_grad_()
    divergence = objective.jsd_t(leaf.log_softmax(-1), it.batch.teacher_tv)
    mean_r = objective.response_mean(divergence, it.batch.response_t, it.batch.length_r)
    ((it.batch.count_r / it.batch.count_r.sum()) * mean_r).sum().backward()
    torch.testing.assert_close(found, leaf.grad)


def test_rewards_carry_no_gradient() -> None:
    """A teacher that wants a gradient gets it from the divergence only: none through R_distill."""
    it = case(2)
    teacher = it.batch.teacher_tv.clone().requires_grad_()
    batch = dataclasses.replace(it.batch, teacher_tv=teacher)
    student = it.logits.clone().requires_grad_()
    terms = masters(student.log_softmax(-1), batch, Objective.paper())
    assert torch.autograd.grad(terms.rl, teacher, retain_graph=True, allow_unused=True)[0] is None
    assert torch.autograd.grad(terms.divergence, teacher)[0].abs().max() > 0


def test_the_terms_sum_to_the_loss() -> None:
    it = case(3)
    terms = masters(it.logits.log_softmax(-1), it.batch, Objective.paper())
    assert terms.total.item() == pytest.approx((terms.rl + terms.divergence + terms.reference).item())
    parts = [Objective(divergence=0.0, kl_beta=0.0), PURE, Objective(rl=0.0, divergence=0.0)]
    summed = sum(gradient(it.logits, it.batch, part)[1] for part in parts)
    torch.testing.assert_close(gradient(it.logits, it.batch, Objective())[1], summed)


def expand(it: Case) -> Case:
    """Every response as often as it was drawn, each with count 1."""
    copies_r = torch.arange(len(it.batch.count_r)).repeat_interleave(it.batch.count_r.long())
    place_t = torch.cat([(it.batch.response_t == r).nonzero()[:, 0] for r in copies_r])
    length_r = it.batch.length_r[copies_r]
    assert it.batch.reference_tv is not None
    return Case(
        it.logits[place_t],
        Batch(
            target_t=it.batch.target_t[place_t],
            response_t=torch.arange(len(copies_r)).repeat_interleave(length_r),
            length_r=length_r,
            group_r=it.batch.group_r[copies_r],
            groups=it.batch.groups,
            count_r=torch.ones(len(copies_r), dtype=torch.float64),
            correct_r=it.batch.correct_r[copies_r],
            mu_t=it.batch.mu_t[place_t],
            teacher_tv=it.batch.teacher_tv[place_t],
            reference_tv=it.batch.reference_tv[place_t],
        ),
    )


@pytest.mark.parametrize("switches", [Objective.paper(), Objective()], ids=["paper", "robust"])
def test_merged_duplicates_are_explicit_duplicates(switches: Objective) -> None:
    """In the loss, in every figure but the tokens computed, and in the gradient."""
    it = case(4)
    wide = expand(it)
    loss, found = gradient(it.logits, it.batch, switches)
    loss_wide, found_wide = gradient(wide.logits, wide.batch, switches)
    assert loss == pytest.approx(loss_wide, abs=1e-12)
    copies = torch.arange(len(it.batch.count_r)).repeat_interleave(it.batch.count_r.long())
    place = torch.cat([(it.batch.response_t == r).nonzero()[:, 0] for r in copies])
    torch.testing.assert_close(found, torch.zeros_like(found).index_add(0, place, found_wide))
    figures, figures_wide = (
        masters(one.logits.log_softmax(-1), one.batch, switches).figures for one in (it, wide)
    )
    assert figures.pop("tokens") < figures_wide.pop("tokens")
    assert figures == pytest.approx(figures_wide)


def part(it: Case, groups: list[int]) -> Case:
    """The batch of some groups alone."""
    chosen_r = torch.isin(it.batch.group_r, torch.tensor(groups))
    chosen_t = chosen_r[it.batch.response_t]
    renumbered = {group: number for number, group in enumerate(groups)}
    length_r = it.batch.length_r[chosen_r]
    assert it.batch.reference_tv is not None
    return Case(
        it.logits[chosen_t],
        Batch(
            target_t=it.batch.target_t[chosen_t],
            response_t=torch.arange(len(length_r)).repeat_interleave(length_r),
            length_r=length_r,
            group_r=torch.tensor([renumbered[g] for g in it.batch.group_r[chosen_r].tolist()]),
            groups=len(groups),
            count_r=it.batch.count_r[chosen_r],
            correct_r=it.batch.correct_r[chosen_r],
            mu_t=it.batch.mu_t[chosen_t],
            teacher_tv=it.batch.teacher_tv[chosen_t],
            reference_tv=it.batch.reference_tv[chosen_t],
        ),
    )


@pytest.mark.parametrize("switches", [Objective.paper(), Objective()], ids=["paper", "robust"])
def test_splitting_groups_over_batches(switches: Objective) -> None:
    """Each batch averages over its own sequences; weighted by their share of all sequences the parts add
    up to the whole, in loss and gradient. Weighted equally (a mean of means) they do not."""
    it = case(6, groups=5)
    loss, found = gradient(it.logits, it.batch, switches)
    halves = [part(it, [0, 1]), part(it, [2, 3, 4])]
    shares = [float(half.batch.count_r.sum() / it.batch.count_r.sum()) for half in halves]
    assert shares[0] != pytest.approx(0.5, abs=0.01)
    results = [gradient(half.logits, half.batch, switches) for half in halves]
    assert loss == pytest.approx(sum(s * one for s, (one, _) in zip(shares, results, strict=True)), abs=1e-12)
    joined = torch.cat([s * g for s, (_, g) in zip(shares, results, strict=True)])
    torch.testing.assert_close(found, joined)
    mean_of_means = torch.cat([g / 2 for _, g in results])
    assert (mean_of_means - found).abs().max() > 1e-3


def test_no_reference_model_is_needed_at_beta_zero() -> None:
    batch = dataclasses.replace(case(7).batch, reference_tv=None)
    terms = masters(case(7).logits.log_softmax(-1), batch, Objective(kl_beta=0.0))
    assert terms.reference.item() == 0.0 and terms.total.isfinite()
