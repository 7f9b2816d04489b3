"""Rewards, advantages and losses of Masters as pure functions (METHOD 4, 5; Sec. 3.3, Eq. 6-11).

Shapes: T response tokens, V vocabulary, R distinct responses, G questions. `count_r` is how often a
response was drawn; a response drawn c times weighs as c equal ones. Everything is in nats.
Not here: where log-probs come from.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Objective:
    """The switches of METHOD 4-5. `Objective.paper()` is Eq. 1-11 exactly; the default is `robust`."""

    rl: float = 1.0  # weight of the GRPO term; 0 is plain distillation on the same pool
    divergence: float = 1.0  # weight of D in L = L_GRPO + D
    kl_beta: float = 0.1  # weight of KL(pi || pi_ref), Eq. 9
    distill_weight: float = 1.0  # weight of R_distill in R
    gate: bool = True  # R_distill counts only where R_acc = 1
    std_floor: float = 0.1  # advantage = (R - mean) / max(std, floor)
    divergence_floor: float = 1e-3  # nats; below it the group's R_distill is constant
    truncate_negatives: bool = True  # negatives weigh sg(clip(pi / mu, 0, 1))

    @classmethod
    def robust(cls) -> Objective:
        """The default."""
        return cls()

    @classmethod
    def paper(cls) -> Objective:
        return cls(gate=False, std_floor=1e-4, truncate_negatives=False)


def jsd_t(student_tv: torch.Tensor, teacher_tv: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of two log-prob tensors (T, V), per token (T,), nats, in [0, ln 2].

    JSD = (KL(p || m) + KL(q || m)) / 2 with m = (p + q) / 2 (Sec. 3.3).
    """
    mean_tv = torch.logaddexp(student_tv, teacher_tv) - math.log(2)
    student_t = (student_tv.exp() * (student_tv - mean_tv)).sum(-1)
    teacher_t = (teacher_tv.exp() * (teacher_tv - mean_tv)).sum(-1)
    return 0.5 * (student_t + teacher_t)


def kl_t(student_tv: torch.Tensor, reference_tv: torch.Tensor) -> torch.Tensor:
    """Exact KL(pi || pi_ref) over the vocabulary, per token (T,), nats (Eq. 9; no sampled estimator)."""
    return (student_tv.exp() * (student_tv - reference_tv)).sum(-1)


def response_mean(values_t: torch.Tensor, response_t: torch.Tensor, length_r: torch.Tensor) -> torch.Tensor:
    """Mean over each response's tokens: (T,) -> (R,). A sum would reward short answers (METHOD 4)."""
    total_r = values_t.new_zeros(len(length_r)).index_add(0, response_t, values_t)
    return total_r / length_r


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


@dataclass(frozen=True)
class Terms:
    """The three parts of the loss, weighted as they are summed, and what to log."""

    rl: torch.Tensor
    divergence: torch.Tensor
    reference: torch.Tensor
    figures: dict[str, float]

    @property
    def total(self) -> torch.Tensor:
        return self.rl + self.divergence + self.reference


@dataclass(frozen=True)
class Batch:
    """What one loss needs beside the student's log-probs. `correct_r` is R_acc; `mu_t` the raw log-prob
    of each response token under the model that drew it; `reference_tv` may be None where kl_beta = 0."""

    target_t: torch.Tensor
    response_t: torch.Tensor
    length_r: torch.Tensor
    group_r: torch.Tensor
    groups: int
    count_r: torch.Tensor
    correct_r: torch.Tensor
    mu_t: torch.Tensor
    teacher_tv: torch.Tensor
    reference_tv: torch.Tensor | None


def masters(student_tv: torch.Tensor, batch: Batch, switches: Objective) -> Terms:
    """L = L_GRPO + D (Eq. 8-11), averaged over sequences as the paper does.

    L_GRPO = -E_j E_t [ratio * A_j - beta * KL(pi || pi_ref)], ratio = pi / sg(pi): value 1 with pi's
    gradient, for one update an iteration. Rewards and advantages carry no gradient.
    """
    weight_r = batch.count_r / batch.count_r.sum()
    weight_t = (weight_r / batch.length_r)[batch.response_t]
    chosen_t = student_tv.gather(-1, batch.target_t[:, None])[:, 0]
    divergence_t = jsd_t(student_tv, batch.teacher_tv)
    with torch.no_grad():
        divergence_r = response_mean(divergence_t, batch.response_t, batch.length_r)
        distill_r = distill_reward(divergence_r, batch.group_r, batch.groups, switches.divergence_floor)
        closeness_r = distill_r * batch.correct_r if switches.gate else distill_r
        reward_r = batch.correct_r + switches.distill_weight * closeness_r
        advantage_r, std_g = advantages(
            reward_r, batch.count_r, batch.group_r, batch.groups, switches.std_floor
        )
        advantage_t = advantage_r[batch.response_t]
        if switches.truncate_negatives:
            weight = (chosen_t - batch.mu_t).exp().clamp(max=1.0)
            advantage_t = torch.where(advantage_t < 0, advantage_t * weight, advantage_t)
    ratio_t = (chosen_t - chosen_t.detach()).exp()
    zero = student_tv.new_zeros(())
    reference = zero
    if switches.kl_beta and batch.reference_tv is not None:
        reference = switches.kl_beta * (weight_t * kl_t(student_tv, batch.reference_tv)).sum()
    divergence = (weight_t * divergence_t).sum()
    figures = {
        "divergence": divergence.item(),
        "r_acc": (weight_r * batch.correct_r).sum().item(),
        "r_distill": (weight_r * distill_r).sum().item(),
        "zero_variance": (std_g < 1e-6).float().mean().item(),
        "tokens": float(len(batch.target_t)),
    }
    return Terms(
        rl=-switches.rl * (weight_t * ratio_t * advantage_t).sum() if switches.rl else zero,
        divergence=switches.divergence * divergence if switches.divergence else zero,
        reference=reference,
        figures=figures,
    )
