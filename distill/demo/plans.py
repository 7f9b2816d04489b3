"""What a step learns: labels (teacher, warm-up, SFT) or the pool (Masters and its control without RL).

In: data, rows of questions, a teacher and its pool. Out: the loss of step i, always the same for the
same weights. Not here: the loop, the formulas (`distill/losses/objective.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from distill.demo import pool
from distill.demo.pool import Response, Row
from distill.demo.vqa import VqaData, shifted
from distill.forward import tree
from distill.forward.features import Features
from distill.losses import objective
from distill.losses.objective import Objective
from distill.masks.masking import LANGUAGE, Masker
from evals import scorers

NORMS_EVERY = 40
"""Steps between two measurements of each term's gradient norm; one costs three backward passes."""


class LabelPlan:
    """Cross-entropy on target responses. A step takes some images and some questions about each."""

    def __init__(
        self,
        data: VqaData,
        images: Sequence[int],
        target: Callable[[int], str],
        *,
        steps: int,
        images_per_step: int,
        questions_per_image: int,
        seed: int,
    ) -> None:
        self.data, self.images, self.target, self.steps = data, list(images), target, steps
        self.images_per_step, self.questions_per_image, self.seed = images_per_step, questions_per_image, seed

    def prepare(self, model: PreTrainedModel, step: int) -> None:
        """Nothing to make before a step."""

    def is_boundary(self, step: int) -> bool:
        return False

    def loss(self, model: PreTrainedModel, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        """Mean over response tokens of -log p(token), nats."""
        draw = np.random.default_rng([self.seed, 2, step])
        count = min(self.images_per_step, len(self.images))
        images = [self.images[i] for i in draw.choice(len(self.images), count, replace=False)]
        rows = []
        for image in images:
            asked = self.data.by_image[image]
            chosen = draw.choice(len(asked), min(self.questions_per_image, len(asked)), replace=False)
            answers = {asked[i].id: self.data.response(self.target(asked[i].id)) for i in chosen}
            rows.append([self.data.group(question, [answer]) for question, answer in answers.items()])
        batch = tree.pack(model, rows, self.data.tokenizer.pad_token_id)
        generator = torch.Generator().manual_seed(int(draw.integers(2**31)))
        features = self.data.encode(model, images, shifted(self.data.pixels(images), generator))
        log_probs_tv = tree.log_probs(model, batch, features)
        loss = torch.nn.functional.nll_loss(log_probs_tv, batch.target_t)
        return loss, {"tokens": float(len(batch.target_t))}


@dataclass(frozen=True)
class Stage:
    """One masked teacher's part: its ratio, its rows, the responses it drew for them."""

    ratio: float
    rows: tuple[Row, ...]
    pool: Path


class PoolPlan:
    """Masters, and with `rl = 0` its control: the same pool and divergence without RL (METHOD 3-5).

    A step takes `rows_per_step` rows of the running stage. At the start of each stage the student answers
    the stage's questions; those responses join the teacher's. The teacher's image features are computed
    once, or for every stage where the mask touches more than the language model; its log-probs are
    recomputed at every step under the stage's mask.
    """

    def __init__(
        self,
        data: VqaData,
        stages: Sequence[Stage],
        teacher: PreTrainedModel,
        masker: Masker,
        initial: PreTrainedModel,
        reference: dict[int, str],
        switches: Objective,
        directory: Path,
        *,
        rows_per_step: int,
        student_responses: int,
        seed: int,
        norms_every: int = NORMS_EVERY,
    ) -> None:
        self.data, self.stages, self.teacher, self.masker = data, list(stages), teacher, masker
        self.initial, self.reference, self.switches, self.directory = initial, reference, switches, directory
        self.rows_per_step, self.student_responses = rows_per_step, student_responses
        self.seed, self.norms_every = seed, norms_every
        counts = [-(-len(stage.rows) // rows_per_step) for stage in stages]
        self.starts = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self.steps = self.starts[-1]
        self._stage = -1
        self._responses: pool.Responses = {}
        images = sorted({row.image for stage in stages for row in stage.rows})
        self._place = {image: i for i, image in enumerate(images)}
        self._images = images
        self._teacher_features = _all_features(teacher, data, images)
        self._initial_features = _all_features(initial, data, images) if switches.kl_beta else None

    def is_boundary(self, step: int) -> bool:
        """Whether a stage starts here: the loop saves its state first, so that the draw can be repeated."""
        return step in self.starts

    def prepare(self, model: PreTrainedModel, step: int) -> None:
        """On a stage's first step: set the mask, let the student answer, merge both sources."""
        number = int(np.searchsorted(self.starts, step, side="right")) - 1
        if number == self._stage:
            return
        stage = self.stages[number]
        self.masker.set(stage.ratio)
        if set(self.masker.kinds) != {LANGUAGE}:
            self._teacher_features = _all_features(self.teacher, self.data, self._images)
        self._responses = pool.load(stage.pool, "teacher")
        if self.student_responses:
            model.eval()
            seed = int(np.random.SeedSequence([self.seed, 3, number]).generate_state(1)[0])
            drawn = pool.draw(
                model,
                self.data,
                stage.rows,
                self.student_responses,
                "student",
                self.directory / f"responses-{number}",
                seed=seed,
            )
            model.train()
            self._responses = {q: pool.merge(self._responses[q], drawn[q]) for q in drawn}
        self._stage = number

    def loss(self, model: PreTrainedModel, step: int) -> tuple[torch.Tensor, dict[str, float]]:
        stage = self.stages[self._stage]
        first = (step - self.starts[self._stage]) * self.rows_per_step
        rows = stage.rows[first : first + self.rows_per_step]
        packed, responses = self._pack(rows)
        images = [row.image for row in rows]
        place = [self._place[image] for image in images]
        with torch.no_grad():
            teacher_tv = tree.log_probs(self.teacher, packed, self._teacher_features.select(place))
            reference_tv = None
            if self._initial_features is not None:
                reference_tv = tree.log_probs(self.initial, packed, self._initial_features.select(place))
        student_tv = tree.log_probs(model, packed, self.data.encode(model, images))
        batch = self._batch(packed, rows, responses)
        found = objective.dense_terms(student_tv, packed.target_t, teacher_tv, reference_tv, self.switches)
        terms = objective.masters(found, batch, self.switches)
        figures = dict(terms.figures, mask_ratio=stage.ratio, rl_weight=self.switches.rl)
        if step % self.norms_every == 0:
            figures.update(_norm_shares(model, terms))
        return terms.total, figures

    def _pack(self, rows: Sequence[Row]) -> tuple[tree.Batch, list[Response]]:
        groups, flat = [], []
        for row in rows:
            found = [self._responses[q] for q in row.questions]
            groups.append(
                [
                    self.data.group(q, [response.ids for response in responses])
                    for q, responses in zip(row.questions, found, strict=True)
                ]
            )
            flat += [response for responses in found for response in responses]
        return tree.pack(self.teacher, groups, self.data.tokenizer.pad_token_id), flat

    def _batch(
        self,
        packed: tree.Batch,
        rows: Sequence[Row],
        responses: Sequence[Response],
    ) -> objective.Batch:
        asked = [q for row in rows for q in row.questions for _ in self._responses[q]]
        correct = [self._right(q, response) for q, response in zip(asked, responses, strict=True)]
        return objective.Batch(
            target_t=packed.target_t,
            response_t=packed.response_t,
            length_r=packed.length_r,
            group_r=packed.group_r,
            groups=sum(len(row.questions) for row in rows),
            count_r=torch.tensor([float(response.count) for response in responses]),
            correct_r=torch.tensor(correct, dtype=torch.float32),
            mu_t=torch.tensor([value for response in responses for value in response.mu]),
            teacher_r=torch.tensor([float(response.teacher) for response in responses]),
        )

    def _right(self, question: int, response: Response) -> int:
        """R_acc. Where no reference answer is known ("": the teacher said nothing) none is right."""
        reference = self.reference[question]
        return scorers.exact(self.data.text(response.ids), reference) if reference else 0


@torch.no_grad()
def _all_features(model: PreTrainedModel, data: VqaData, images: Sequence[int]) -> Features:
    model.eval()
    parts = [images[start : start + 200] for start in range(0, len(images), 200)]
    return Features.join([data.encode(model, part) for part in parts])


def _norm_shares(model: PreTrainedModel, terms: objective.Terms) -> dict[str, float]:
    """Each term's share of the sum of the terms' gradient norms."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    norms = {}
    for field in dataclasses.fields(terms):
        term = getattr(terms, field.name)
        if isinstance(term, torch.Tensor):
            norms[field.name] = _norm(term, parameters) if term.requires_grad else 0.0
    total = sum(norms.values()) or 1.0
    return {f"grad_share_{name}": norm / total for name, norm in norms.items()}


def _norm(term: torch.Tensor, parameters: Sequence[torch.Tensor]) -> float:
    gradients = torch.autograd.grad(term, parameters, retain_graph=True, allow_unused=True)
    return float(torch.stack([g.square().sum() for g in gradients if g is not None]).sum().sqrt())
