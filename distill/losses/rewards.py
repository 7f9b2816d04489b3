"""Rewards and advantages of Masters as pure functions (METHOD 4; Sec. 3.3, Eq. 6-8).

Shapes: T response tokens, R distinct responses, G questions. `count_r` is how often a response was drawn;
a response drawn c times weighs as c equal ones. Everything is in nats. No gradient is meant to flow here.
Not here: where divergences come from, the loss.
"""

from __future__ import annotations

import math

import torch


def response_mean(values_t: torch.Tensor, response_t: torch.Tensor, length_r: torch.Tensor) -> torch.Tensor:
    """Mean over each response's tokens: (T,) -> (R,). A sum would reward short answers (METHOD 4)."""
    return response_sum(values_t, response_t, length_r) / length_r


def response_sum(values_t: torch.Tensor, response_t: torch.Tensor, length_r: torch.Tensor) -> torch.Tensor:
    """Sum over each response's tokens: (T,) -> (R,)."""
    return values_t.new_zeros(len(length_r)).index_add(0, response_t, values_t)


def distill_reward(
    divergence_r: torch.Tensor, group_r: torch.Tensor, groups: int, floor: float
) -> torch.Tensor:
    """R_distill = (D_max - D) / (D_max - D_min) within a question (Eq. 7), in [0, 1].

    Where D_max - D_min < floor nats the question's responses all get 0.5: a constant, no signal.
    """
    largest_g = divergence_r.new_full((groups,), -math.inf).scatter_reduce(0, group_r, divergence_r, "amax")
    smallest_g = divergence_r.new_full((groups,), math.inf).scatter_reduce(0, group_r, divergence_r, "amin")
    span_r = (largest_g - smallest_g)[group_r]
    reward_r = (largest_g[group_r] - divergence_r) / span_r.clamp(min=1e-12)
    return torch.where(span_r < floor, 0.5, reward_r)


def advantages(
    reward_r: torch.Tensor, count_r: torch.Tensor, group_r: torch.Tensor, groups: int, std_floor: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """A = (R - mean) / max(std, floor) within a question (Eq. 8), population std, counts as weights.

    Returns advantages (R,) and the standard deviation of each question (G,).
    """

    def mean(values_r: torch.Tensor) -> torch.Tensor:
        return values_r.new_zeros(groups).index_add(0, group_r, count_r * values_r) / weight_g

    weight_g = count_r.new_zeros(groups).index_add(0, group_r, count_r).clamp(min=1e-12)
    centred_r = reward_r - mean(reward_r)[group_r]
    std_g = mean(centred_r**2).sqrt()
    return centred_r / std_g.clamp(min=std_floor)[group_r], std_g


def likelihood_weights(
    reward_r: torch.Tensor,
    teacher_r: torch.Tensor,
    count_r: torch.Tensor,
    group_r: torch.Tensor,
    groups: int,
    std_floor: float,
) -> torch.Tensor:
    """(R,) weights of the teacher's responses for reward-weighted likelihood: n * softmax(A) in a question.

    A is the advantage among the question's n teacher responses, so that equal rewards give every one
    weight 1; the student's responses weigh 0. Of a draw by both only the teacher's share counts.
    """
    drawn_r = teacher_r.to(reward_r.dtype)
    advantage_r, _ = advantages(reward_r, drawn_r, group_r, groups, std_floor)
    raised_r = torch.where(drawn_r > 0, advantage_r, -math.inf).exp()  # |A| is at most sqrt(n)
    none_g = raised_r.new_zeros(groups)
    number_g = none_g.index_add(0, group_r, drawn_r)
    total_g = none_g.index_add(0, group_r, drawn_r * raised_r).clamp(min=1e-12)
    share_r = drawn_r / count_r.clamp(min=1e-12)  # the loss multiplies by count
    return share_r * raised_r * (number_g / total_g)[group_r]
