"""What a teacher says at every predicting place, live or from a cache, behind one small protocol.

In: hidden states and an LM head, or what a store kept (`losses/signal_store.py`). Out: fp32 log-probs of a
few tokens at a time; several teachers with their weights. Not here: divergences, the student, files.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import nn

from distill.losses.divergence import jsd_t
from distill.losses.lm_head import Head, log_softmax_
from runtime.errors import TrainingError


class Signal(Protocol):
    """A teacher's distributions at T predicting places."""

    @property
    def tokens(self) -> int:
        """T."""

    @property
    def vocab(self) -> int:
        """How many token ids it gives a probability."""

    def chunk(self, start: int, stop: int, vocab: int | None = None) -> torch.Tensor:
        """Log-probs (stop - start, vocab) of places start..stop, fp32, without gradient.

        `vocab` keeps the first ids only, *before* the softmax: models of one family pad their
        vocabularies differently (METHOD 5).
        """


class LiveSignal:
    """The teacher's hidden states (T, H), final norm applied, and its head: the exact distributions."""

    def __init__(self, hidden_th: torch.Tensor, head: Head | nn.Module) -> None:
        self.hidden_th = hidden_th.detach()
        self.head = head if isinstance(head, Head) else Head(head)

    @property
    def tokens(self) -> int:
        return len(self.hidden_th)

    @property
    def vocab(self) -> int:
        return self.head.vocab

    @torch.no_grad()
    def chunk(self, start: int, stop: int, vocab: int | None = None) -> torch.Tensor:
        return log_softmax_(self.head.logits(self.hidden_th[start:stop], vocab))


class DenseSignal:
    """Log-probs (T, V) that are there already; for small vocabularies and tests."""

    def __init__(self, log_probs_tv: torch.Tensor) -> None:
        self.log_probs_tv = log_probs_tv.detach()

    @property
    def tokens(self) -> int:
        return len(self.log_probs_tv)

    @property
    def vocab(self) -> int:
        return self.log_probs_tv.shape[1]

    @torch.no_grad()
    def chunk(self, start: int, stop: int, vocab: int | None = None) -> torch.Tensor:
        part = self.log_probs_tv[start:stop]
        return part if vocab is None or vocab == self.vocab else part[:, :vocab].log_softmax(-1)


TAIL_FLOOR = 1e-9
"""The least mass that a tail is given: a probability of 0 would make a divergence infinite."""


class TopKSignal:
    """The k largest log-probs of each token; the rest of the mass lies evenly on all other ids.

    `ids_tk` (T, k) int, `log_prob_tk` (T, k). What is not among the k is lost: `approximation` measures it.
    """

    def __init__(self, ids_tk: torch.Tensor, log_prob_tk: torch.Tensor, vocab: int) -> None:
        self.ids_tk, self.log_prob_tk, self._vocab = ids_tk, log_prob_tk, vocab

    @classmethod
    def of(cls, log_probs_tv: torch.Tensor, k: int) -> TopKSignal:
        """Keep the k most likely ids of whole distributions (T, V), as a store does: fp16 and int32."""
        found = log_probs_tv.topk(min(k, log_probs_tv.shape[-1]), -1)
        values = found.values.clamp(min=-6e4).half()  # fp16 ends at -65,504
        return cls(found.indices.int(), values, log_probs_tv.shape[-1])

    @property
    def tokens(self) -> int:
        return len(self.ids_tk)

    @property
    def vocab(self) -> int:
        return self._vocab

    def chunk(self, start: int, stop: int, vocab: int | None = None) -> torch.Tensor:
        ids = self.ids_tk[start:stop].long()
        known = self.log_prob_tk[start:stop].float()
        rest = self._vocab - ids.shape[1]
        if rest:
            tail = (1 - known.exp().sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR)
            filled = (tail / rest).log().expand(-1, self._vocab).clone()
        else:
            filled = known.new_full((len(ids), self._vocab), -math.inf)
        filled.scatter_(1, ids, known)
        if vocab is not None:
            filled = filled[:, :vocab]
        return log_softmax_(filled)  # rounding to fp16, and a vocabulary cut off


@dataclass(frozen=True)
class Approximation:
    """How far kept distributions p' are from the teacher's p, summed over tokens; parts add up.

    `tail_mass`: what lies outside the top k. `jsd` (nats): JSD(p, p'). `variation`: half of sum |p - p'|,
    so that the gradient of the forward KL for the logits is off by 2 * variation in the 1-norm.
    """

    tokens: int = 0
    tail_mass: float = 0.0
    jsd: float = 0.0
    variation: float = 0.0
    largest_jsd: float = 0.0
    largest_tail_mass: float = 0.0

    def __add__(self, other: Approximation) -> Approximation:
        return Approximation(
            self.tokens + other.tokens,
            self.tail_mass + other.tail_mass,
            self.jsd + other.jsd,
            self.variation + other.variation,
            max(self.largest_jsd, other.largest_jsd),
            max(self.largest_tail_mass, other.largest_tail_mass),
        )

    def bound(self, divergence: float) -> float:
        """Largest error (nats) of a mean JSD that was measured as `divergence` against p'.

        sqrt(JSD) is a metric (Endres & Schindelin 2003), so |JSD(p, q) - JSD(p', q)| is at most
        2 sqrt(JSD(p', q) j) + j with j = JSD(p, p'), whatever the student q is; by Cauchy-Schwarz the same
        holds for means over tokens. The KL kinds have no such bound: a tail can weigh without limit there.
        """
        mean = self.jsd / max(1, self.tokens)
        return 2 * math.sqrt(max(0.0, divergence) * mean) + mean

    @property
    def means(self) -> dict[str, float]:
        """Per token, for a report."""
        count = max(1, self.tokens)
        return {
            "tail_mass": self.tail_mass / count,
            "jsd_nats": self.jsd / count,
            "variation": self.variation / count,
            "largest_jsd_nats": self.largest_jsd,
            "largest_tail_mass": self.largest_tail_mass,
            "largest_error_nats": self.bound(math.log(2)),
        }


def approximation(exact: torch.Tensor, kept: torch.Tensor, k: int | None = None) -> Approximation:
    """Compare log-probs (T, V) with what was kept of them; `k` tells what the tail is."""
    if not len(exact):
        return Approximation()
    jsd = jsd_t(exact, kept).clamp(min=0)
    tail = torch.zeros(1) if k is None else 1 - exact.topk(min(k, exact.shape[-1]), -1).values.exp().sum(-1)
    tail = tail.clamp(min=0)
    variation = (exact.exp() - kept.exp()).abs().sum(-1) / 2
    return Approximation(
        len(exact), tail.sum().item(), jsd.sum().item(), variation.sum().item(),
        jsd.max().item(), tail.max().item(),
    )  # fmt: skip


@dataclass(frozen=True)
class Mixture:
    """Several teachers at once. `weight_st` (S, T) sums to 1 over the S teachers at every place.

    The divergence from a mixture is the weighted sum of the divergences from its teachers, as MT-BERT,
    MTKD-RL and DGKD sum their losses (`losses/heads.py`); `chunk` is the mixture of the distributions.
    """

    signals: tuple[Signal, ...]
    weight_st: torch.Tensor

    @property
    def tokens(self) -> int:
        return self.signals[0].tokens

    @property
    def vocab(self) -> int:
        return min(signal.vocab for signal in self.signals)

    def chunk(self, start: int, stop: int, vocab: int | None = None) -> torch.Tensor:
        mixed: torch.Tensor | None = None
        for signal, weight_t in zip(self.signals, self.weight_st, strict=True):
            part = signal.chunk(start, stop, vocab or self.vocab)
            part = part + weight_t[start:stop, None].to(part).log()
            mixed = part if mixed is None else torch.logaddexp(mixed, part)
        assert mixed is not None
        return mixed


def parts(signal: Signal) -> Sequence[tuple[torch.Tensor | None, Signal]]:
    """A mixture's teachers with their weights (T,); any other signal alone, with None for weight 1."""
    if isinstance(signal, Mixture):
        return list(zip(signal.weight_st, signal.signals, strict=True))
    return [(None, signal)]


def even_weights(weights: Sequence[float], tokens: int) -> torch.Tensor:
    """(S, T): the same weights at every token, scaled to sum to 1 (fixed weights, or accuracies)."""
    total = sum(weights)
    if not weights or min(weights) < 0 or total <= 0:
        raise TrainingError(f"teachers: weights {list(weights)} must be at least 0, and not all 0")
    return torch.tensor([[weight / total] for weight in weights]).expand(-1, tokens)


def kept_teachers(weights: Sequence[float], drop: float, seed: Sequence[int]) -> list[float]:
    """DGKD's stochastic teaching: each teacher is left out with probability `drop`, never all of them.

    The weights of those that are left are scaled to the old sum, so that the loss keeps its size (the paper
    leaves the sum as it falls). The same `seed` (run, step) keeps the same teachers in every process.
    """
    if not 0 <= drop < 1:
        raise TrainingError(f"teachers: drop {drop} must be at least 0 and below 1")
    generator = np.random.default_rng(list(seed))
    taught = [s for s, weight in enumerate(weights) if weight > 0]
    kept = {s for s, stays in zip(taught, generator.random(len(taught)) >= drop, strict=True) if stays}
    kept = kept or {int(generator.choice(taught))}
    left = sum(weights[s] for s in kept)
    return [weight * sum(weights) / left if s in kept else 0.0 for s, weight in enumerate(weights)]
