"""LM head, log-probs and divergences in chunks: never a [tokens, vocabulary] pair in memory (METHOD 5).

In: the student's hidden states with gradient, its head, a teacher's signal. Out: per-token terms with the
student's gradient. Not here: rewards, the loss, where signals come from.

A chunk's logits are computed, reduced to a few numbers a token, and dropped; the backward pass computes
them once more (twice each head, in all). The gradient for the logits is written out by hand
(`divergence.flow_tv`) rather than left to autograd, which would keep some ten tensors of a chunk's size.
Where one chunk holds all tokens its log-probs are kept, and no head runs twice.
A head that is no plain linear layer (LoRA, quantised, sharded, partitioned) is called as a module under
`torch.utils.checkpoint`, with autograd inside the chunk: the same values, more memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from distill.losses.divergence import check_kind, divergence_t, flow_tv, kl_t
from distill.losses.lm_head import Head, log_softmax_, row_blocks, working_dtype
from distill.losses.objective import TokenTerms
from distill.losses.signal import Signal, parts
from runtime.errors import TrainingError

SMALL_ELEMENTS = 1 << 23
"""Up to this many log-probs in one chunk autograd is left to itself: it keeps more and computes less."""


def token_terms(
    hidden_th: torch.Tensor,
    head: Head | nn.Module,
    target_t: torch.Tensor,
    teacher: Signal | None,
    reference: Signal | None = None,
    kind: str = "jsd",
    alpha: float = 0.1,
    *,
    chunk_tokens: int = 1024,
    vocab: int | None = None,
) -> TokenTerms:
    """Log-prob of each target, divergence from the teacher, KL to the reference: (T,) each, nats, fp32.

    `hidden_th` (T, H) are the student's hidden states at the predicting places, final norm applied.
    `vocab`: how many token ids count; None is the shared part of all vocabularies. Everything is sliced
    to it before the softmax. Raises TrainingError where signals and tokens do not match.
    """
    check_kind(kind, alpha)
    head = head if isinstance(head, Head) else Head(head)
    signals = [signal for signal in (teacher, reference) if signal is not None]
    vocab = min([vocab or head.vocab, head.vocab, *(signal.vocab for signal in signals)])
    for signal in signals:
        if signal.tokens != len(hidden_th):
            raise TrainingError(f"signal: {signal.tokens} places, the student has {len(hidden_th)}")
    plan = _Plan(head, target_t, teacher, reference, kind, alpha, vocab, chunk_tokens)
    linear = head.linear
    small = len(hidden_th) <= chunk_tokens and len(hidden_th) * vocab <= SMALL_ELEMENTS
    if linear is None or small:
        values = _by_module(plan, hidden_th)
    else:
        values = _Chunked.apply(hidden_th, linear.weight, linear.bias, plan)
    log_prob_t, divergence, reference_kl, teacher_t = values
    return TokenTerms(
        log_prob_t=log_prob_t,
        divergence_t=None if teacher is None else divergence,
        reference_kl_t=None if reference is None else reference_kl,
        teacher_log_prob_t=None if teacher is None else teacher_t,
    )


@dataclass(frozen=True)
class _Plan:
    """What stays the same from chunk to chunk, forward and backward."""

    head: Head
    target_t: torch.Tensor
    teacher: Signal | None
    reference: Signal | None
    kind: str
    alpha: float
    vocab: int
    chunk_tokens: int

    def spans(self) -> list[tuple[int, int]]:
        """Start and stop of every chunk; an empty one where there are no tokens."""
        total = len(self.target_t)
        return [(a, min(a + self.chunk_tokens, total)) for a in range(0, max(1, total), self.chunk_tokens)]

    def signals(self, start: int, stop: int) -> _Said:
        """Everything the other models say about a chunk."""
        teachers = []
        if self.teacher is not None:
            for weight_t, signal in parts(self.teacher):
                weight = None if weight_t is None else weight_t[start:stop]
                teachers.append((weight, signal.chunk(start, stop, self.vocab)))
        reference = None if self.reference is None else self.reference.chunk(start, stop, self.vocab)
        return _Said(teachers, reference)


@dataclass
class _Said:
    """Log-probs of a chunk (n, V): of each teacher with its weights (n,), and of the reference model."""

    teachers: list[tuple[torch.Tensor | None, torch.Tensor]]
    reference: torch.Tensor | None

    def rows(self, rows: slice) -> _Said:
        """The same for some of the tokens."""
        teachers = [(None if w is None else w[rows], log_p[rows]) for w, log_p in self.teachers]
        return _Said(teachers, None if self.reference is None else self.reference[rows])

    def terms(self, log_q: torch.Tensor, target_n: torch.Tensor, plan: _Plan) -> tuple[torch.Tensor, ...]:
        """The four per-token values of a chunk from the student's log-probs (n, V)."""
        chosen = log_q.gather(-1, target_n[:, None])[:, 0]
        zero = torch.zeros_like(chosen)
        divergence, drawn = zero, zero.detach()
        for weight_n, log_p in self.teachers:
            weight = 1.0 if weight_n is None else weight_n.to(chosen)
            divergence = divergence + weight * divergence_t(log_q, log_p, plan.kind, plan.alpha)
            drawn = drawn + weight * log_p.gather(-1, target_n[:, None])[:, 0].exp()
        reference = zero if self.reference is None else kl_t(log_q, self.reference)
        return chosen, divergence, reference, drawn.log()


def _blocks(
    log_q: torch.Tensor, said: _Said, target_n: torch.Tensor, plan: _Plan
) -> Iterator[tuple[torch.Tensor, ...]]:
    """The values of a chunk, a block of rows at a time."""
    for rows in row_blocks(*log_q.shape):
        yield said.rows(rows).terms(log_q[rows], target_n[rows], plan)


def _by_module(plan: _Plan, hidden_th: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """Any head: each chunk under activation checkpointing, one chunk without."""

    def run(hidden_nh: torch.Tensor, start: int, stop: int) -> tuple[torch.Tensor, ...]:
        log_q = plan.head.logits(hidden_nh, plan.vocab).log_softmax(-1)
        return plan.signals(start, stop).terms(log_q, plan.target_t[start:stop], plan)

    spans = plan.spans()
    if len(spans) == 1:
        return run(hidden_th, *spans[0])
    found = [
        checkpoint(run, hidden_th[a:b], a, b, use_reentrant=False, preserve_rng_state=False) for a, b in spans
    ]
    return tuple(torch.cat(values) for values in zip(*found, strict=True))


class _Chunked(torch.autograd.Function):
    """The fast way for a linear head: hidden (T, H), weight (V, H), bias (V,) -> four values (T,)."""

    @staticmethod
    def forward(
        ctx: Any, hidden_th: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, plan: _Plan
    ) -> tuple[torch.Tensor, ...]:
        device = hidden_th.device.type
        ctx.plan, ctx.kept = plan, None
        ctx.matmul_dtype = (
            torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight.dtype
        )
        ctx.save_for_backward(hidden_th, weight, bias)
        with torch.autocast(device, enabled=False):
            linear = _Linear(weight, bias, plan, ctx.matmul_dtype)
            spans = plan.spans()
            found: list[tuple[torch.Tensor, ...]] = []
            for start, stop in spans:
                log_q, bend = linear.log_probs(hidden_th[start:stop])
                said = plan.signals(start, stop)
                found.extend(_blocks(log_q, said, plan.target_t[start:stop], plan))
                if len(spans) == 1 and any(ctx.needs_input_grad):
                    ctx.kept = (log_q, bend, said)
                del log_q, bend, said
            values = tuple(torch.cat(column) for column in zip(*found, strict=True))
        ctx.mark_non_differentiable(values[3])
        ctx.set_materialize_grads(False)
        return values

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor | None) -> tuple[Any, ...]:
        hidden_th, weight, bias = ctx.saved_tensors
        plan: _Plan = ctx.plan
        with torch.autocast(hidden_th.device.type, enabled=False):
            linear = _Linear(weight, bias, plan, ctx.matmul_dtype)
            sums = _Gradients(hidden_th, weight, bias, ctx.needs_input_grad)
            for start, stop in plan.spans():
                part = [None if grad is None else grad[start:stop] for grad in grads[:3]]
                if ctx.kept is None:
                    log_q, bend = linear.log_probs(hidden_th[start:stop])
                    said = plan.signals(start, stop)
                else:
                    log_q, bend, said = ctx.kept
                slope = log_q if ctx.kept is None else torch.empty_like(log_q)
                for rows in row_blocks(*log_q.shape):
                    given = [None if grad is None else grad[rows] for grad in part]
                    target_n = plan.target_t[start:stop][rows]
                    slope[rows] = _logits_gradient(log_q[rows], said.rows(rows), given, target_n, plan)
                del log_q, said
                if bend is not None:
                    slope.mul_(bend)
                sums.add(slope.mul_(plan.head.scale), linear, start, stop)
        return *sums.result(), None


class _Linear:
    """The head's weight, sliced to the shared vocabulary, in the type of the matrix product."""

    def __init__(
        self, weight: torch.Tensor, bias: torch.Tensor | None, plan: _Plan, dtype: torch.dtype
    ) -> None:
        self.weight = weight[: plan.vocab].to(dtype)
        self.bias = None if bias is None else bias[: plan.vocab].to(dtype)
        self.head = plan.head

    def log_probs(self, hidden_nh: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """log q (n, V), and the soft cap's derivative (n, V) where the head has one."""
        logits = nn.functional.linear(hidden_nh.to(self.weight.dtype), self.weight, self.bias)
        logits = self.head.finish(logits.to(working_dtype(logits.dtype)))
        bend = None if self.head.softcap is None else 1 - (logits / self.head.softcap) ** 2
        return log_softmax_(logits), bend


def _logits_gradient(
    log_q: torch.Tensor,
    said: _Said,
    grads: list[torch.Tensor | None],
    target_n: torch.Tensor,
    plan: _Plan,
) -> torch.Tensor:
    """Gradient (n, V) for the logits that enter the softmax, from the gradients (n,) of the three values.

    Every term is a - q * sum(a) with its own a = d term / d log q, so the a are summed first.
    """
    of_target, of_divergence, of_reference = grads
    flow = torch.zeros_like(log_q)
    if of_divergence is not None:
        for weight_n, log_p in said.teachers:
            scale = of_divergence if weight_n is None else of_divergence * weight_n.to(of_divergence)
            flow.addcmul_(flow_tv(log_q, log_p, plan.kind, plan.alpha), scale[:, None])
    if of_reference is not None and said.reference is not None:
        away = flow_tv(log_q, said.reference, "reverse_kl", 0.0)
        flow.addcmul_(away, of_reference[:, None])
        del away
    if of_target is not None:
        flow.scatter_add_(1, target_n[:, None], of_target[:, None].to(flow))
    return flow.sub_(log_q.exp().mul_(flow.sum(-1, keepdim=True)))


class _Gradients:
    """Sums of the chunks' gradients for hidden states, weight and bias; half types are summed in fp32."""

    def __init__(
        self,
        hidden_th: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        needed: tuple[bool, ...],
    ) -> None:
        self.inputs = (hidden_th, weight, bias)
        self.hidden = torch.zeros_like(hidden_th) if needed[0] else None
        wide = working_dtype(weight.dtype)
        self.weight = torch.zeros_like(weight, dtype=wide) if needed[1] else None
        self.bias = torch.zeros_like(bias, dtype=wide) if bias is not None and needed[2] else None

    def add(self, slope: torch.Tensor, linear: _Linear, start: int, stop: int) -> None:
        """Add a chunk's, from the gradient (n, V) of its raw logits."""
        vocab = slope.shape[1]
        if self.bias is not None:
            self.bias[:vocab] += slope.sum(0)
        slope = slope.to(linear.weight.dtype)
        if self.hidden is not None:
            self.hidden[start:stop] = slope @ linear.weight
        if self.weight is not None:
            hidden = self.inputs[0][start:stop].to(slope.dtype)
            rows = self.weight[:vocab]
            if rows.dtype == slope.dtype:
                rows.addmm_(slope.T, hidden)
            else:
                rows += slope.T @ hidden

    def result(self) -> list[torch.Tensor | None]:
        sums = (self.hidden, self.weight, self.bias)
        return [
            None if total is None or given is None else total.to(given.dtype)
            for total, given in zip(sums, self.inputs, strict=True)
        ]
