"""Rewards and advantages: values by hand and properties."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from distill.losses.rewards import advantages, distill_reward, likelihood_weights, response_mean, response_sum

SEEDS = st.integers(0, 2**31 - 1)


def test_response_mean() -> None:
    """A long response weighs as a short one: means 2 and 5, not sums 6 and 5."""
    values = torch.tensor([1.0, 2.0, 3.0, 5.0])
    found = response_mean(values, torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1]))
    assert found.tolist() == [2.0, 5.0]
    assert response_sum(values, torch.tensor([0, 0, 0, 1]), torch.tensor([3, 1])).tolist() == [6.0, 5.0]


def test_distill_reward_by_hand() -> None:
    """Within a question: the closest gets 1, the farthest 0, the others in proportion."""
    divergence = torch.tensor([0.1, 0.5, 0.2, 0.3, 0.3005])
    found = distill_reward(divergence, torch.tensor([0, 0, 0, 1, 1]), 2, 1e-3)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.75, 0.5, 0.5])


def test_distill_reward_floor() -> None:
    """A span just above the floor counts, below it and in a group of one the reward is constant."""
    groups = torch.tensor([0, 0, 1, 1, 3])  # question 2 has no response
    divergence = torch.tensor([0.2, 0.2011, 0.2, 0.2009, 0.4])
    found = distill_reward(divergence, groups, 4, 1e-3)
    assert found.tolist() == pytest.approx([1.0, 0.0, 0.5, 0.5, 0.5], abs=1e-4)
    unguarded = distill_reward(torch.tensor([0.2, 0.2]), torch.tensor([0, 0]), 1, 0.0)
    assert unguarded.isfinite().all()


def test_advantages_by_hand() -> None:
    """Rewards 0, 1, 1, 2: mean 1, population std sqrt(1/2). A constant group has advantage 0."""
    reward = torch.tensor([0.0, 1.0, 1.0, 2.0, 1.5, 1.5])
    group = torch.tensor([0, 0, 0, 0, 1, 1])
    found, std = advantages(reward, torch.ones(6), group, 2, 0.1)
    root = math.sqrt(0.5)
    assert found.tolist() == pytest.approx([-1 / root, 0, 0, 1 / root, 0, 0])
    assert std.tolist() == pytest.approx([root, 0])


def test_std_floor() -> None:
    """Below the floor differences are divided by the floor, so noise is not blown up to +-1."""
    reward, group = torch.tensor([1.0, 1.02]), torch.tensor([0, 0])
    floored, std = advantages(reward, torch.ones(2), group, 1, 0.1)
    exact, _ = advantages(reward, torch.ones(2), group, 1, 1e-4)
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
    merged, std = advantages(reward, count.double(), group, groups, 0.05)
    copies = torch.arange(size).repeat_interleave(count)
    ones = torch.ones(len(copies), dtype=torch.float64)
    expanded, std_expanded = advantages(reward[copies], ones, group[copies], groups, 0.05)
    torch.testing.assert_close(merged[copies], expanded)
    torch.testing.assert_close(std, std_expanded)


def test_a_question_without_responses() -> None:
    found, std = advantages(torch.tensor([1.0]), torch.ones(1), torch.tensor([1]), 3, 0.1)
    assert found.tolist() == [0.0] and std.tolist() == [0.0, 0.0, 0.0]


def test_likelihood_weights_by_hand() -> None:
    """Teacher responses with rewards 1, 0, 0 (the second drawn twice): A = +sqrt(3), -1/sqrt(3)."""
    reward = torch.tensor([1.0, 0.0, 1.0])
    teacher, count = torch.tensor([1.0, 3.0, 0.0]), torch.tensor([1.0, 3.0, 2.0])
    found = likelihood_weights(reward, teacher, count, torch.zeros(3, dtype=torch.long), 1, 1e-4)
    best, worst = math.exp(math.sqrt(3)), math.exp(-1 / math.sqrt(3))
    total = best + 3 * worst
    assert found.tolist() == pytest.approx([4 * best / total, 4 * worst / total, 0.0], rel=1e-5)
    assert (found * count).sum().item() == pytest.approx(4.0), "weights of n draws sum to n"


def test_likelihood_weights_of_equal_rewards_and_shared_draws() -> None:
    """Equal rewards: plain likelihood. A response drawn once by each model counts half of its two draws."""
    reward, group = torch.ones(3), torch.tensor([0, 0, 1])
    found = likelihood_weights(
        reward, torch.tensor([1.0, 1.0, 0.0]), torch.tensor([2.0, 1.0, 3.0]), group, 2, 0.1
    )
    assert found.tolist() == [0.5, 1.0, 0.0]
