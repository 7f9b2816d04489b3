"""Micro-batches: each is its share of a step's loss, so that the parts of all processes add up.

In: rows of questions with prompts and scored responses, what a run shares. Out: loss and figures of a part.
Not here: which rows (`distill/training/steps.py`), formulas (`distill/losses/objective.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from distill.forward import tree, visual_drop
from distill.losses import heads, objective
from distill.losses.signal import Mixture, Signal, even_weights
from distill.training import throughput
from distill.training.batches import Item
from distill.training.learner import Context, FrozenModel


class Kept(Protocol):
    """Teachers whose signal was computed before (`distill/losses/kept_signal.py`)."""

    @property
    def weights(self) -> Sequence[float]: ...

    def signal(self, items: Sequence[Item], weights: Sequence[float], device: torch.device) -> Signal: ...


class PoolPart:
    """A micro-batch of the pool: `part(student)` is its share of Masters' loss (METHOD 5).

    `totals` are the whole step's: `weight` the objective's normaliser, `responses` and `groups` what figures
    are means over. Every figure adds up over the parts of all processes. `kept` stands for the teachers where
    their signal is on disk; a teacher of weight 0 is not run.
    """

    terms: tuple[str, ...] = ("rl", "divergence", "reference", "likelihood")

    def __init__(
        self,
        context: Context,
        rows: Sequence[Sequence[Item]],
        teachers: Sequence[FrozenModel],
        weights: Sequence[float],
        totals: Totals,
        kept: Kept | None = None,
    ) -> None:
        self.context, self.rows, self.teachers, self.totals = context, rows, teachers, totals
        self.weights, self.kept = weights, kept
        self.items = [item for row in rows for item in row]

    def __call__(self, student: PreTrainedModel, only: str | None = None) -> tuple[torch.Tensor, Any]:
        context = self.context
        rows = rows_for(self.rows, 0)
        batch = tree.pack(student, rows, context.encoder.pad_id)
        reference = context.reference_signal(student, rows, batch)
        hidden_th, kept = self._student(student, rows, batch)
        teacher = self._teacher(student.device, len(batch.target_t), kept)
        switches = context.switches
        terms = heads.token_terms(
            hidden_th,
            context.head(student),
            batch.target_t,
            teacher,
            reference,
            switches.divergence_kind,
            switches.alpha,
            chunk_tokens=context.chunk_tokens,
        )
        found = objective.masters(terms, self._batch(batch), switches, weight_total=self.totals.weight or 1.0)
        if only is not None:
            return getattr(found, only), {}
        return found.total, self._figures(found, student, batch)

    def _student(
        self, student: PreTrainedModel, rows: Sequence[tree.Row], batch: tree.Batch
    ) -> tuple[torch.Tensor, list[torch.Tensor] | None]:
        """(T, hidden) with gradients, and the visual tokens that its attention leaves to the teachers."""
        keep = self.context.visual_keep
        if keep == 1:
            return self.context.hidden(student, rows, batch), None
        with visual_drop.watch(student) as seen:
            hidden_th = self.context.hidden(student, rows, batch)
        return hidden_th, visual_drop.choose(visual_drop.scores(seen, student, batch), keep)

    def _teacher(
        self, device: torch.device, tokens: int, kept: Sequence[torch.Tensor] | None
    ) -> Signal | None:
        if not self.context.switches.needs_teacher:
            return None
        if self.kept is not None:
            return self.kept.signal(self.items, self.weights, device)
        taught = [n for n, weight in enumerate(self.weights) if weight or len(self.teachers) == 1]
        pad_id = self.context.encoder.pad_id
        signals = tuple(self.teachers[n].signal(rows_for(self.rows, n + 1), pad_id, kept) for n in taught)
        if len(signals) < 2:
            return signals[0] if signals else None
        return Mixture(signals, even_weights([self.weights[n] for n in taught], tokens).to(device))

    def _batch(self, packed: tree.Batch) -> objective.Batch:
        """Rewards and counts, in the order of the packed responses."""
        responses = [(item, n) for item in self.items for n in range(len(item.question.responses))]
        scored = [(item.weight, item.question.responses[n], item.mu[n]) for item, n in responses]
        device = packed.target_t.device

        def column(values: Sequence[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        mu = [(float("nan"),) * len(r.ids) if mu is None else mu for _, r, mu in scored]
        return objective.Batch(
            target_t=packed.target_t,
            response_t=packed.response_t,
            length_r=packed.length_r,
            group_r=packed.group_r,
            groups=packed.groups,
            count_r=column([weight * response.count for weight, response, _ in scored]),
            correct_r=column([response.correct for _, response, _ in scored]),
            mu_t=column([value for values in mu for value in values]),
            teacher_r=column([response.teacher for _, response, _ in scored]),
        )

    def _figures(
        self, found: objective.Terms, student: PreTrainedModel, batch: tree.Batch
    ) -> dict[str, float]:
        """Means over the step's responses and questions as sums; a question of weight 0 counts nowhere."""
        own = found.figures
        share = own["responses"] / (self.totals.responses or 1.0)
        beside = sum(1 for item in self.items if not item.weight)
        flat = own["zero_variance"] * batch.groups - beside  # those of weight 0 have no variance
        losses = {f"loss_{name}": float(getattr(found, name).detach()) for name in self.terms}
        return {
            **{name: own[name] * share for name in ("divergence", "r_acc", "r_distill")},
            "zero_variance": flat / (self.totals.groups or 1.0),
            **losses,
            **work(self.context, student, self.rows, batch, self.teachers),
        }


@torch.no_grad()
def work(
    context: Context,
    student: PreTrainedModel,
    rows: Sequence[Sequence[Item]],
    batch: tree.Batch,
    teachers: Sequence[FrozenModel] = (),
) -> dict[str, float]:
    """What a micro-batch computes: predicted tokens, tokens fed to the student, operations of all models.
    A micro-batch of weight 0 computes nothing that counts."""
    if not any(item.weight for row in rows for item in row):
        return {"tokens": 0.0, "input_tokens": 0.0, "flops": 0.0}
    fed, predicted = int((batch.question_bl != tree.PADDING).sum()), len(batch.target_t)
    sizes = {"tokens": fed, "predicted": predicted}
    prompts = [row[0].prompts[0] for row in rows]
    operations = throughput.flops(
        throughput.weights(student), prompts, **sizes, cached=context.cache is not None, backward=True
    )
    beside = [(teacher, number + 1) for number, teacher in enumerate(teachers)]
    beside += [(context.reference, 0)] if context.reference and context.switches.needs_reference else []
    for frozen, number in beside:
        prompts = [row[0].prompts[number] for row in rows]
        operations += throughput.flops(
            throughput.weights(frozen.model),
            prompts,
            **sizes,
            cached=frozen.cache is not None,
            backward=False,
        )
    if context.lora and context.switches.needs_reference:
        operations += throughput.flops(
            throughput.weights(student), prompts, **sizes, cached=True, backward=False
        )
    counted = sum(len(r.ids) for row in rows for i in row if i.weight for r in i.question.responses)
    return {"tokens": float(counted), "input_tokens": float(fed), "flops": operations}


class LabelPart:
    """A micro-batch of labels: cross-entropy, nats, the mean over the whole step's label tokens."""

    terms: tuple[str, ...] = ()

    def __init__(self, context: Context, rows: Sequence[Sequence[Item]], totals: Totals) -> None:
        self.context, self.rows, self.totals = context, rows, totals

    def __call__(self, student: PreTrainedModel, only: str | None = None) -> tuple[torch.Tensor, Any]:
        context = self.context
        rows = rows_for(self.rows, 0)
        batch = tree.pack(student, rows, context.encoder.pad_id)
        hidden_th = context.hidden(student, rows, batch)
        head = context.head(student)
        terms = heads.token_terms(
            hidden_th, head, batch.target_t, None, None, chunk_tokens=context.chunk_tokens
        )
        flat = [item for row in self.rows for item in row]
        weight_r = [item.weight * r.count for item in flat for r in item.question.responses]
        weight_t = torch.tensor(weight_r, device=terms.log_prob_t.device)[batch.response_t]
        loss = -(weight_t * terms.log_prob_t).sum() / (self.totals.tokens or 1.0)
        return loss, work(context, student, self.rows, batch)


@dataclass(frozen=True)
class Totals:
    """Sums over all parts of a step in all processes, duplicates by their count."""

    weight: float
    responses: float
    tokens: float
    groups: int


def rows_for(rows: Sequence[Sequence[Item]], model: int) -> list[tree.Row]:
    """Rows of groups as model number `model` reads them (0: the student)."""
    return [
        [tree.Group(item.prompts[model], tuple(r.ids for r in item.question.responses)) for item in row]
        for row in rows
    ]
