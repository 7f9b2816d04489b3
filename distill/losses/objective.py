"""Rewards, advantages and losses of Masters as pure functions (METHOD 4, 5; Sec. 3.3, Eq. 6-11).

Shapes: T response tokens, V vocabulary, R distinct responses, G questions. `count_r` is how often a
response was drawn; a response drawn c times weighs as c equal ones. Everything is in nats.
In: per-token terms (`distill/losses/heads.py`, or `dense_terms`). Out: the loss in its parts.
Not here: where log-probs come from, presets by name (`distill/losses/presets.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from distill.losses.divergence import Kind, check_kind, divergence_t, kl_t, most_nats
from distill.losses.rewards import advantages, distill_reward, likelihood_weights, response_mean, response_sum
from runtime.errors import TrainingError

Normaliser = Literal["sequence", "token", "constant"]
Reduction = Literal["mean", "sum"]
Negatives = Literal["truncated", "full", "none"]


@dataclass(frozen=True)
class Objective:
    """The switches of METHOD 4-5. The default is the preset `robust`; `presets.PRESETS` has the others."""

    rl: float = 1.0  # weight of the GRPO term; 0 is plain distillation on the same pool
    divergence: float = 1.0  # weight of D in L = L_GRPO + D
    kl_beta: float = 0.1  # weight of KL(pi || pi_ref), Eq. 9
    likelihood: float = 0.0  # weight of -log pi on the teacher's responses, weighted by softmax(A)
    divergence_kind: Kind = "jsd"
    alpha: float = 0.1  # of the skew and generalised divergences (DistiLLM's alpha, GKD's beta)
    distill_weight: float = 1.0  # weight of R_distill in R
    gate: bool = True  # R_distill counts only where R_acc = 1
    std_floor: float = 0.1  # advantage = (R - mean) / max(std, floor)
    divergence_floor: float = 1e-3  # nats; below it the group's R_distill is constant
    negatives: Negatives = "truncated"  # truncated: sg(clip(pi / mu, 0, 1)); none: they carry no gradient
    normaliser: Normaliser = "sequence"  # what the loss is divided by: `weight_part`
    constant_tokens: float = 512.0  # tokens that a response counts as under `constant`
    divergence_tokens: Reduction = "mean"  # D of a response from its tokens (a sum rewards short answers)
    policy_tokens: Reduction = "mean"  # E_t of Eq. 11 under `sequence`; the other normalisers sum

    def __post_init__(self) -> None:
        check_kind(self.divergence_kind, self.alpha)
        _known("normaliser", self.normaliser, ("sequence", "token", "constant"))
        _known("negatives", self.negatives, ("truncated", "full", "none"))
        _known("divergence_tokens", self.divergence_tokens, ("mean", "sum"))
        _known("policy_tokens", self.policy_tokens, ("mean", "sum"))
        if self.std_floor <= 0 or self.constant_tokens <= 0:
            raise ValueError("std_floor and constant_tokens must be above 0")

    @classmethod
    def robust(cls) -> Objective:
        """The default."""
        return cls()

    @classmethod
    def paper(cls) -> Objective:
        """Eq. 1-11 as they are printed."""
        return cls(gate=False, std_floor=1e-4, negatives="full")

    @property
    def needs_teacher(self) -> bool:
        """Whether any term reads the teacher's distributions."""
        return bool(self.divergence or ((self.rl or self.likelihood) and self.distill_weight))

    @property
    def needs_reference(self) -> bool:
        """Whether KL(pi || pi_ref) is part of the loss."""
        return bool(self.kl_beta)


def _known(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise ValueError(f"{name} {value!r} is unknown; known: {', '.join(known)}")


@dataclass(frozen=True)
class TokenTerms:
    """What the loss needs of every response token, in nats; the first three carry the student's gradient.

    `divergence_t` is None without a teacher, `reference_kl_t` None without a reference model;
    `teacher_log_prob_t` is the teacher's log-prob of the token, without gradient.
    """

    log_prob_t: torch.Tensor
    divergence_t: torch.Tensor | None = None
    reference_kl_t: torch.Tensor | None = None
    teacher_log_prob_t: torch.Tensor | None = None


def dense_terms(
    student_tv: torch.Tensor,
    target_t: torch.Tensor,
    teacher_tv: torch.Tensor | None,
    reference_tv: torch.Tensor | None = None,
    switches: Objective | None = None,
) -> TokenTerms:
    """Token terms from whole log-prob tensors (T, V): for small vocabularies, and to test the chunks."""
    switches = switches or Objective()
    distance_t = teacher_t = None
    if teacher_tv is not None:
        distance_t = divergence_t(student_tv, teacher_tv, switches.divergence_kind, switches.alpha)
        teacher_t = teacher_tv.detach().gather(-1, target_t[:, None])[:, 0]
    return TokenTerms(
        log_prob_t=student_tv.gather(-1, target_t[:, None])[:, 0],
        divergence_t=distance_t,
        reference_kl_t=None if reference_tv is None else kl_t(student_tv, reference_tv),
        teacher_log_prob_t=teacher_t,
    )


@dataclass(frozen=True)
class Batch:
    """What one loss needs beside the token terms.

    `correct_r` is R_acc. `mu_t` is the raw log-prob of each response token under the model that drew it,
    NaN where nobody recorded it. `teacher_r` is how many of `count_r` the teacher drew; None means that
    it is not known, which only `likelihood` and missing values of `mu_t` mind.
    """

    target_t: torch.Tensor
    response_t: torch.Tensor
    length_r: torch.Tensor
    group_r: torch.Tensor
    groups: int
    count_r: torch.Tensor
    correct_r: torch.Tensor
    mu_t: torch.Tensor
    teacher_r: torch.Tensor | None = None


def weight_part(count_r: torch.Tensor, length_r: torch.Tensor, switches: Objective) -> float:
    """What some responses add to the normaliser; `masters` wants the sum over all parts and ranks.

    `sequence`: responses. `token`: response tokens. `constant`: responses times `constant_tokens`.
    Duplicates weigh by their count.
    """
    if switches.normaliser == "token":
        return float((count_r * length_r).sum())
    responses = float(count_r.sum())
    return responses * switches.constant_tokens if switches.normaliser == "constant" else responses


@dataclass(frozen=True)
class Terms:
    """The parts of the loss, weighted as they are summed, and what to log.

    Each part is a scalar with its own graph, so that its share of the gradient norm can be measured.
    `figures` are means over this batch's responses, and two counts: `responses` to weigh the means by
    when batches are joined, and `tokens`.
    """

    rl: torch.Tensor
    divergence: torch.Tensor
    reference: torch.Tensor
    likelihood: torch.Tensor
    figures: dict[str, float]

    @property
    def total(self) -> torch.Tensor:
        return self.rl + self.divergence + self.reference + self.likelihood


def masters(
    terms: TokenTerms, batch: Batch, switches: Objective, *, weight_total: float | None = None
) -> Terms:
    """L = L_GRPO + D (Eq. 8-11).

    L_GRPO = -E_j E_t [ratio * A_j - beta * KL(pi || pi_ref)], ratio = pi / sg(pi): value 1 with pi's
    gradient, for one update an iteration. Rewards and advantages carry no gradient.

    `weight_total` is the sum of `weight_part` over every micro-batch of every rank of the step: losses and
    gradients of the parts then *add up* to those of the whole batch. None: this batch is the whole.
    """
    if weight_total is None:
        weight_total = weight_part(batch.count_r, batch.length_r, switches)
    weight_r = batch.count_r / weight_total
    policy_t = _token_weights(weight_r, batch, switches, switches.policy_tokens)
    log_prob_t = terms.log_prob_t
    zero = (log_prob_t * 0).sum()  # joined to the student: a part without responses still has a graph
    with torch.no_grad():
        rewards = _rewards(terms, batch, switches)
        advantage_t = _signed(rewards.advantage_r[batch.response_t], terms, batch, switches)
    rl = likelihood = reference = divergence = zero
    if switches.rl:
        ratio_t = (log_prob_t - log_prob_t.detach()).exp()
        rl = -switches.rl * (policy_t * ratio_t * advantage_t).sum()
    if switches.kl_beta and terms.reference_kl_t is not None:
        reference = switches.kl_beta * (policy_t * terms.reference_kl_t).sum()
    if switches.likelihood:
        chosen_t = _likelihood_weights(rewards.reward_r, batch, switches)[batch.response_t]
        likelihood = -switches.likelihood * (policy_t * chosen_t * log_prob_t).sum()
    if switches.divergence and terms.divergence_t is not None:
        weight_t = _token_weights(weight_r, batch, switches, switches.divergence_tokens)
        divergence = switches.divergence * (weight_t * terms.divergence_t).sum()
    return Terms(rl, divergence, reference, likelihood, _figures(rewards, batch))


@dataclass(frozen=True)
class _Rewards:
    reward_r: torch.Tensor
    divergence_r: torch.Tensor
    distill_r: torch.Tensor
    advantage_r: torch.Tensor
    std_g: torch.Tensor


def _figures(rewards: _Rewards, batch: Batch) -> dict[str, float]:
    responses = batch.count_r.sum()
    share_r = batch.count_r / responses.clamp(min=1e-12)
    return {
        "divergence": (share_r * rewards.divergence_r).sum().item(),
        "r_acc": (share_r * batch.correct_r).sum().item(),
        "r_distill": (share_r * rewards.distill_r).sum().item(),
        "zero_variance": (rewards.std_g < 1e-6).float().mean().item() if batch.groups else 0.0,
        "responses": responses.item(),
        "tokens": float(len(batch.target_t)),
    }


def _token_weights(
    weight_r: torch.Tensor, batch: Batch, switches: Objective, reduction: Reduction
) -> torch.Tensor:
    """(T,) weight of every token: a response's mean or sum under `sequence`, a sum under the others."""
    if switches.normaliser == "sequence" and reduction == "mean":
        weight_r = weight_r / batch.length_r
    return weight_r[batch.response_t]


def _rewards(terms: TokenTerms, batch: Batch, switches: Objective) -> _Rewards:
    """R = R_acc + w * R_distill and its advantages. Without a teacher, R is R_acc."""
    distill_r = divergence_r = torch.zeros_like(batch.correct_r)
    if terms.divergence_t is not None:
        values_t = terms.divergence_t.detach()
        _check_range(values_t, switches)
        reduce = response_mean if switches.divergence_tokens == "mean" else response_sum
        divergence_r = reduce(values_t, batch.response_t, batch.length_r)
        distill_r = distill_reward(divergence_r, batch.group_r, batch.groups, switches.divergence_floor)
    elif switches.needs_teacher:
        raise TrainingError("objective: these switches need a teacher's distributions, got none")
    closeness_r = distill_r * batch.correct_r if switches.gate else distill_r
    reward_r = batch.correct_r + switches.distill_weight * closeness_r
    advantage_r, std_g = advantages(reward_r, batch.count_r, batch.group_r, batch.groups, switches.std_floor)
    return _Rewards(reward_r, divergence_r, distill_r, advantage_r, std_g)


def _check_range(values_t: torch.Tensor, switches: Objective) -> None:
    """A divergence below 0, above its largest value or not finite is a fault, never a reward."""
    if not len(values_t):
        return
    low, high = values_t.min().item(), values_t.max().item()
    most = most_nats(switches.divergence_kind, switches.alpha)
    if not (low > -1e-4 and high < most + 1e-4):  # fp32 rounding over a large vocabulary stays below 1e-5
        raise TrainingError(
            f"objective: {switches.divergence_kind} of {low:.3g} to {high:.3g} nats, wanted 0 to {most:.3g}; "
            "teacher or student gave log-probs that are not normalised or not finite"
        )


def _signed(advantage_t: torch.Tensor, terms: TokenTerms, batch: Batch, switches: Objective) -> torch.Tensor:
    """Advantages per token, with negatives weighed as the switch says (METHOD 5)."""
    if switches.negatives == "full" or not switches.rl:
        return advantage_t
    if switches.negatives == "none":
        return advantage_t.clamp(min=0)
    weight_t = (terms.log_prob_t.detach() - _behaviour(terms, batch)).exp().clamp(max=1.0)
    return torch.where(advantage_t < 0, advantage_t * weight_t, advantage_t)


def _behaviour(terms: TokenTerms, batch: Batch) -> torch.Tensor:
    """mu (T,), with the teacher's own log-prob where a teacher's response has none recorded (METHOD 5)."""
    missing_t = batch.mu_t.isnan()
    if not missing_t.any():
        return batch.mu_t
    drawn = None if batch.teacher_r is None else (batch.teacher_r > 0)[batch.response_t]
    if terms.teacher_log_prob_t is None or drawn is None or not drawn[missing_t].all():
        raise TrainingError(
            "objective: truncated negatives need the log-probs with which the student drew its responses, "
            "and the pool has none; draw with an engine that records them or set negatives: full"
        )
    return torch.where(missing_t, terms.teacher_log_prob_t, batch.mu_t)


def _likelihood_weights(reward_r: torch.Tensor, batch: Batch, switches: Objective) -> torch.Tensor:
    if batch.teacher_r is None:
        raise TrainingError("objective: likelihood needs to know which responses the teacher drew")
    return likelihood_weights(
        reward_r, batch.teacher_r, batch.count_r, batch.group_r, batch.groups, switches.std_floor
    )
