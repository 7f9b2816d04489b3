"""Divergences between the student's and the teacher's token distributions, and their slopes.

In: two log-prob tensors (T, V), student q and teacher p. Out: nats per token, and the gradient that
`distill/losses/heads.py` uses instead of autograd. Not here: chunks, the LM head, token reductions.

| kind | formula | source |
|---|---|---|
| jsd | (KL(p, m) + KL(q, m)) / 2, m = (p + q) / 2 | Masters, Sec. 3.3 |
| forward_kl | KL(p, q) | Hinton et al. 2015 |
| reverse_kl | KL(q, p) | MiniLLM, arXiv 2306.08543 |
| skew_kl | KL(p, m), m = a p + (1 - a) q | DistiLLM, arXiv 2402.03898 |
| skew_rkl | KL(q, m), m = (1 - a) p + a q | DistiLLM, arXiv 2402.03898 |
| gjsd | a KL(p, m) + (1 - a) KL(q, m), m = a p + (1 - a) q | GKD, arXiv 2306.13649 |

`a` is `alpha`: 0.1 in DistiLLM; GKD calls it beta, and at 0.5 it is the jsd.
"""

from __future__ import annotations

import math
from typing import Literal, get_args

import torch

Kind = Literal["jsd", "forward_kl", "reverse_kl", "skew_kl", "skew_rkl", "gjsd"]
KINDS: tuple[str, ...] = get_args(Kind)
LN2 = math.log(2)


def check_kind(kind: str, alpha: float) -> None:
    """Raises ValueError for an unknown kind, or an `alpha` outside (0, 1) where the kind uses it."""
    if kind not in KINDS:
        raise ValueError(f"divergence_kind {kind!r} is unknown; known: {', '.join(KINDS)}")
    if kind in ("skew_kl", "skew_rkl", "gjsd") and not 0 < alpha < 1:
        raise ValueError(f"alpha {alpha} of divergence_kind {kind!r} must be above 0 and below 1")


def most_nats(kind: str, alpha: float) -> float:
    """The largest value that a kind can take: ln 2 for the jsd, infinity for a plain KL."""
    if kind == "jsd":
        return LN2
    if kind in ("skew_kl", "skew_rkl"):
        return -math.log(alpha)
    if kind == "gjsd":  # disjoint p and q: the entropy of (alpha, 1 - alpha)
        return -alpha * math.log(alpha) - (1 - alpha) * math.log(1 - alpha)
    return math.inf


def divergence_t(
    student_tv: torch.Tensor, teacher_tv: torch.Tensor, kind: str = "jsd", alpha: float = 0.1
) -> torch.Tensor:
    """A divergence of two log-prob tensors (T, V), per token (T,), nats; differentiable by autograd."""
    if kind == "forward_kl":
        return kl_t(teacher_tv, student_tv)
    if kind == "reverse_kl":
        return kl_t(student_tv, teacher_tv)
    mean_tv = _mixture(student_tv, teacher_tv, kind, alpha)
    if kind == "skew_kl":
        return kl_t(teacher_tv, mean_tv)
    if kind == "skew_rkl":
        return kl_t(student_tv, mean_tv)
    share = _teacher_share(kind, alpha)
    return share * kl_t(teacher_tv, mean_tv) + (1 - share) * kl_t(student_tv, mean_tv)


def jsd_t(student_tv: torch.Tensor, teacher_tv: torch.Tensor) -> torch.Tensor:
    """Jensen-Shannon divergence of two log-prob tensors (T, V), per token (T,), nats, in [0, ln 2]."""
    return divergence_t(student_tv, teacher_tv, "jsd")


def kl_t(first_tv: torch.Tensor, second_tv: torch.Tensor) -> torch.Tensor:
    """Exact KL(first, second) over the vocabulary, per token (T,), nats (Eq. 9; no sampled estimator)."""
    return (first_tv.exp() * (first_tv - second_tv)).sum(-1)


def flow_tv(student_tv: torch.Tensor, teacher_tv: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    """dD / d log q, (T, V), up to a multiple of q that the softmax's gradient removes.

    With a = flow, the gradient for the student's logits is `a - q * sum(a)`. No autograd graph is made.
    """
    if kind == "forward_kl":
        return teacher_tv.exp().neg_()
    student_exp = student_tv.exp()
    if kind == "reverse_kl":
        return (student_tv - teacher_tv).mul_(student_exp)
    mean_tv = _mixture(student_tv, teacher_tv, kind, alpha)
    if kind == "skew_kl":
        return (teacher_tv - mean_tv).add_(student_tv).exp_().mul_(alpha - 1)
    if kind == "skew_rkl":
        ratio_tv = student_tv - mean_tv
        return ratio_tv.sub_(ratio_tv.exp(), alpha=alpha).mul_(student_exp)
    return (student_tv - mean_tv).mul_(student_exp).mul_(1 - _teacher_share(kind, alpha))


def _teacher_share(kind: str, alpha: float) -> float:
    """The teacher's share in the mixture m."""
    return {"jsd": 0.5, "skew_rkl": 1 - alpha}.get(kind, alpha)


def _mixture(student_tv: torch.Tensor, teacher_tv: torch.Tensor, kind: str, alpha: float) -> torch.Tensor:
    """log m."""
    share = _teacher_share(kind, alpha)
    if share == 0.5:
        return torch.logaddexp(student_tv, teacher_tv) - LN2
    return torch.logaddexp(student_tv + math.log(1 - share), teacher_tv + math.log(share))
