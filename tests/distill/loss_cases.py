"""Ragged batches for tests of the loss, and ways to cut and repeat them."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from distill.losses.objective import Batch, Objective, Terms, dense_terms, masters


def log_probs(generator: torch.Generator, tokens: int, vocabulary: int, scale: float = 2.0) -> torch.Tensor:
    drawn = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * scale
    return drawn.log_softmax(-1)


@dataclass
class Case:
    """Logits of the student (T, V), what teacher and reference say, and a batch in which groups, lengths,
    counts and rewards are all ragged."""

    logits: torch.Tensor
    teacher_tv: torch.Tensor
    reference_tv: torch.Tensor
    batch: Batch

    def terms(self, switches: Objective, leaf: torch.Tensor, weight_total: float | None = None) -> Terms:
        """The loss of student logits `leaf`."""
        found = dense_terms(
            leaf.log_softmax(-1), self.batch.target_t, self.teacher_tv, self.reference_tv, switches
        )
        return masters(found, self.batch, switches, weight_total=weight_total)

    def gradient(self, switches: Objective, weight_total: float | None = None) -> tuple[float, torch.Tensor]:
        """Loss and its gradient for the student's logits (T, V)."""
        leaf = self.logits.clone().requires_grad_()
        loss = self.terms(switches, leaf, weight_total).total
        loss.backward()
        assert leaf.grad is not None
        return loss.item(), leaf.grad

    def chosen(self, responses: Sequence[int]) -> tuple[Case, torch.Tensor]:
        """The case of some responses, each as often as it is named; and their token places (t,)."""
        take_r = torch.tensor(responses, dtype=torch.long)
        places = [(self.batch.response_t == r).nonzero()[:, 0] for r in take_r]
        place_t = torch.cat([*places, torch.zeros(0, dtype=torch.long)])
        length_r = self.batch.length_r[take_r]
        old = self.batch.group_r[take_r]
        batch = dataclasses.replace(
            self.batch,
            target_t=self.batch.target_t[place_t],
            response_t=torch.arange(len(take_r)).repeat_interleave(length_r),
            length_r=length_r,
            group_r=old,
            count_r=self.batch.count_r[take_r],
            correct_r=self.batch.correct_r[take_r],
            mu_t=self.batch.mu_t[place_t],
            teacher_r=None if self.batch.teacher_r is None else self.batch.teacher_r[take_r],
        )
        cut = Case(self.logits[place_t], self.teacher_tv[place_t], self.reference_tv[place_t], batch)
        return cut, place_t

    def part(self, groups: Sequence[int]) -> tuple[Case, torch.Tensor]:
        """Some questions alone, as a micro-batch has them."""
        chosen = torch.isin(self.batch.group_r, torch.tensor(groups, dtype=torch.long))
        cut, place_t = self.chosen(chosen.nonzero()[:, 0].tolist())
        numbers = {group: number for number, group in enumerate(groups)}
        group_r = torch.tensor([numbers[g] for g in cut.batch.group_r.tolist()], dtype=torch.long)
        cut.batch = dataclasses.replace(cut.batch, group_r=group_r, groups=len(groups))
        return cut, place_t

    def expanded(self) -> tuple[Case, torch.Tensor]:
        """Every response as often as it was drawn, the teacher's draws first, each with count 1."""
        counts = self.batch.count_r.long().tolist()
        wide, place_t = self.chosen([r for r, count in enumerate(counts) for _ in range(count)])
        assert self.batch.teacher_r is not None
        teacher = [
            float(i < drawn)
            for count, drawn in zip(counts, self.batch.teacher_r.tolist(), strict=True)
            for i in range(count)
        ]
        wide.batch = dataclasses.replace(
            wide.batch,
            count_r=torch.ones_like(wide.batch.count_r),
            teacher_r=torch.tensor(teacher, dtype=torch.float64),
        )
        return wide, place_t


def case(seed: int, groups: int = 3, vocabulary: int = 7, *, counts: tuple[int, int] = (1, 4)) -> Case:
    generator = torch.Generator().manual_seed(seed)

    def integers(low: int, high: int, size: int) -> torch.Tensor:
        return torch.randint(low, high, (size,), generator=generator)

    responses = integers(1, 5, groups)
    group_r = torch.arange(groups).repeat_interleave(responses)
    length_r = integers(1, 5, len(group_r))
    response_t = torch.arange(len(group_r)).repeat_interleave(length_r)
    tokens = len(response_t)
    count_r = integers(*counts, len(group_r))
    batch = Batch(
        target_t=integers(0, vocabulary, tokens),
        response_t=response_t,
        length_r=length_r,
        group_r=group_r,
        groups=groups,
        count_r=count_r.double(),
        correct_r=integers(0, 2, len(group_r)).double(),
        mu_t=-torch.rand(tokens, generator=generator, dtype=torch.float64) * 3,
        teacher_r=(torch.rand(len(group_r), generator=generator) * (count_r + 1)).floor().double(),
    )
    logits = torch.randn(tokens, vocabulary, generator=generator, dtype=torch.float64) * 2
    return Case(
        logits, log_probs(generator, tokens, vocabulary), log_probs(generator, tokens, vocabulary), batch
    )
