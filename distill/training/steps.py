"""What every step learns: the pool's questions phase by phase (Masters and its neighbours), or labels.

In: phases, a way to load a phase's scored responses, teachers. Out: the micro-batches of step i for this
process, the same whenever they are asked for. Not here: losses (`distill/training/learner.py`), how a step is
divided (`distill/training/batches.py`), drawing and judging.

A global step is `questions_per_step` questions, in an order that (seed, phase, pass) decides. Questions
about one image come together and share a row; rows are dealt to processes, each makes micro-batches of them
by a token budget. The loss is divided by the step's normaliser, which counts and lengths of all its
responses decide, and every process knows: how a step is divided changes no gradient beyond rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from accelerate import Accelerator
from transformers import PreTrainedModel

from distill.forward import tree
from distill.losses import objective
from distill.masks.teachers import Phase
from distill.training import batches, processes
from distill.training.batches import Item, Question, Scored
from distill.training.learner import Context, FrozenModel
from distill.training.mu import stage_start_mu
from distill.training.parts import Kept, LabelPart, PoolPart, Totals
from runtime.errors import InputError

__all__ = ["LabelSteps", "Phase", "PoolSteps", "Question", "Scored"]
Load = Callable[[int, PreTrainedModel], Sequence[Question]]
Enter = Callable[[int], "FrozenModel | Sequence[FrozenModel] | Kept | None"]


class Labelled(Protocol):
    """Samples by position: `data.Dataset`."""

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Any: ...


class _Schedule:
    """Steps, their questions, and this process's micro-batches; the loss is the subclass's."""

    def __init__(
        self,
        phases: Sequence[Phase],
        context: Context,
        *,
        questions_per_step: int,
        tokens_per_device: int,
        passes: int,
        seed: int,
        accelerator: Accelerator | None,
    ) -> None:
        if not phases or any(not phase.questions for phase in phases):
            raise InputError("training: a phase has no questions; check data.train and its limits")
        self.phases, self.context = list(phases), context
        self.questions_per_step, self.tokens_per_device = questions_per_step, tokens_per_device
        self.seed, self.accelerator = seed, accelerator
        self.rank = accelerator.process_index if accelerator else 0
        self.world = accelerator.num_processes if accelerator else 1
        self.per_pass = [-(-phase.questions // questions_per_step) for phase in phases]
        counts = [passes * steps for steps in self.per_pass]
        self.starts: list[int] = np.concatenate([[0], np.cumsum(counts)]).tolist()
        self.steps: int = self.starts[-1]
        self.phase = -1
        self.questions: Sequence[Question] = ()
        self.teachers: tuple[FrozenModel, ...] = ()
        self._keys: list[Hashable] = []
        self._orders: dict[tuple[int, int], list[int]] = {}
        self._anchor: int | None = None
        self._reader = ThreadPoolExecutor(1)
        self._next: tuple[int, Future[list[list[Item]]]] | None = None

    def is_boundary(self, step: int) -> bool:
        """Whether a phase starts here."""
        return step in self.starts

    def figures(self, step: int) -> dict[str, float]:
        phase = self.phases[self.phase]
        place = {"phase": float(self.phase), "teacher": float(phase.teacher), "mask_ratio": phase.ratio}
        return {**place, "rl_weight": self.context.switches.rl}

    def enter(self, phase: int, questions: Sequence[Question]) -> None:
        """Make a phase's questions the ones that steps are made of."""
        if len(questions) != self.phases[phase].questions:
            raise InputError(
                f"phase {self.phases[phase].name}: {len(questions)} questions, the plan says "
                f"{self.phases[phase].questions}; the pool is not this recipe's"
            )
        self.phase, self.questions, self._next = phase, questions, None
        self._orders.clear()
        samples = [question.sample for question in questions]
        self._keys = [batches.image_key(sample) for sample in samples]
        pictured = [index for index, sample in enumerate(samples) if sample.images]
        mixed = bool(pictured) and len(pictured) < len(samples)
        # every process must run a trained vision part as often as the others
        self._anchor = pictured[0] if mixed and self.world > 1 and self.context.cache is None else None

    def phase_of(self, step: int) -> int:
        return int(np.searchsorted(self.starts, step, side="right")) - 1

    def indices(self, step: int) -> list[int]:
        """Positions, in the phase's questions, of a step's questions."""
        phase = self.phase_of(step)
        number, place = divmod(step - self.starts[phase], self.per_pass[phase])
        if (phase, number) not in self._orders:
            self._orders = {(phase, number): batches.order(self._keys, [self.seed, 11, phase, number])}
        first = place * self.questions_per_step
        return self._orders[phase, number][first : first + self.questions_per_step]

    def totals(self, step: int) -> Totals:
        """The step's sums: the same in every process, from counts and lengths alone."""
        responses = [r for index in self.indices(step) for r in self.questions[index].responses]
        count_r = torch.tensor([r.count for r in responses], dtype=torch.float64)
        length_r = torch.tensor([len(r.ids) for r in responses], dtype=torch.float64)
        return Totals(
            weight=objective.weight_part(count_r, length_r, self.context.switches),
            responses=float(count_r.sum()),
            tokens=float((count_r * length_r).sum()),
            groups=len(self.indices(step)),
        )

    def micro_batches(self, step: int) -> list[list[list[Item]]]:
        """This process's micro-batches of a step, as many as in every other process: what is missing is made
        up by one question of weight 0."""
        rows = self._rows(step)
        if step + 1 < self.steps and not self.is_boundary(step + 1):
            self._next = (step + 1, self._reader.submit(self._encoded, step + 1))
        found = batches.micro_batches(rows, self.tokens_per_device, self.context.sharing)
        if self.world > 1:
            assert self.accelerator is not None
            most = processes.largest(self.accelerator, len(found))
            spare = self.indices(step)[0] if self._anchor is None else self._anchor
            while len(found) < most:
                found.append([[self._idle(spare)]])
        if self._anchor is not None:
            for micro in found:
                if not any(row[0].prompts[0].key for row in micro):
                    micro.append([self._idle(self._anchor)])
        return found

    def _rows(self, step: int) -> list[list[Item]]:
        if self._next is not None and self._next[0] == step:
            return self._next[1].result()
        return self._encoded(step)

    def _encoded(self, step: int) -> list[list[Item]]:
        """This process's rows of a step, prompts encoded."""
        indices = self.indices(step)
        most = -(-len(indices) // self.world)
        runs = batches.runs(indices, lambda index: self._keys[index], most)
        asked = [[self.questions[index] for index in run] for run in runs]
        found = []
        for number in batches.deal(asked, self.world)[self.rank]:
            items = [self.item(index) for index in runs[number]]
            found += self._sharing_rows(items)
        return found

    def _sharing_rows(self, items: Sequence[Item]) -> list[list[Item]]:
        """Items of one image whose prompts may share a row in every model."""
        keys: dict[Hashable, list[Item]] = {}
        for item in items:
            keys.setdefault(tuple(map(self._row_key, item.prompts)), []).append(item)
        return list(keys.values())

    def _row_key(self, prompt: Any) -> Hashable:
        return tree.row_key(self.student, prompt)

    student: PreTrainedModel
    """The student's configuration and tokens; its weights are not read."""

    def item(self, index: int) -> Item:
        """A question with every model's prompt."""
        question = self.questions[index]
        own = self.context.encoder.encode(question.sample)
        prompts = [own]
        for teacher in self.teachers:
            prompts.append(own if teacher.encoder is None else teacher.encoder.encode(question.sample))
        return Item(question, tuple(prompts), self.mu(index))

    def mu(self, index: int) -> tuple[tuple[float, ...] | None, ...]:
        return tuple(response.mu for response in self.questions[index].responses)

    def _idle(self, index: int) -> Item:
        """A question that takes part and counts nothing: its shortest response, weight 0."""
        item = self.item(index)
        shortest = min(item.question.responses, key=lambda response: len(response.ids))
        alone = replace(item.question, responses=(shortest,))
        return replace(item, question=alone, mu=((0.0,) * len(shortest.ids),), weight=0.0)


class PoolSteps(_Schedule):
    """Masters on the pool (METHOD 2-5), and with other switches its neighbours.

    `load(phase, student)` gives a phase's questions with scored responses, in an order of its own that is the
    same everywhere; it may draw from the student, which is the phase's starting one when it is first called;
    what it draws must be on disk when it returns. It is called in every process. `enter(phase)` gives the
    teacher (or several that act at once) under the phase's mask, their signal on disk, or None where no term
    needs one.
    `teacher_weights(step)` weighs several teachers; default, their own weights.
    `directory` keeps log-probs (mu) that responses came without: recomputed once by the stage-start student.
    """

    def __init__(
        self,
        phases: Sequence[Phase],
        load: Load,
        enter: Enter,
        context: Context,
        directory: Path,
        *,
        questions_per_step: int,
        tokens_per_device: int,
        passes: int = 1,
        seed: int = 0,
        teacher_weights: Callable[[int], Sequence[float]] | None = None,
        accelerator: Accelerator | None = None,
    ) -> None:
        super().__init__(
            phases,
            context,
            questions_per_step=questions_per_step,
            tokens_per_device=tokens_per_device,
            passes=passes,
            seed=seed,
            accelerator=accelerator,
        )
        self.load, self.enter_teacher, self.directory = load, enter, directory
        self.teacher_weights = teacher_weights
        self.kept: Kept | None = None
        self._mu: dict[tuple[int, int], tuple[float, ...]] = {}

    def prepare(self, student: PreTrainedModel, step: int) -> None:
        """On a phase's first step, or where a run goes on: load its questions, set its mask, complete mu."""
        number = self.phase_of(step)
        self.student = student
        if number == self.phase:
            return
        self.teachers, self.kept, self._next = (), None, None  # the last phase's models may go
        questions = self.load(number, student)
        entered = self.enter_teacher(number)
        if entered is None or isinstance(entered, (FrozenModel, Sequence)):
            self.teachers = _listed(entered)
        else:
            self.kept = entered
        for teacher in self.teachers:
            teacher.held.reshard()
        self.enter(number, questions)
        self._mu = {}
        switches = self.context.switches
        if switches.rl and switches.negatives == "truncated":
            self._mu = stage_start_mu(
                student,
                self.context,
                questions,
                self.directory / f"mu-{number}",
                rank=self.rank,
                world=self.world,
                wait=self.accelerator.wait_for_everyone if self.accelerator else lambda: None,
            )

    def mu(self, index: int) -> tuple[tuple[float, ...] | None, ...]:
        known = super().mu(index)
        return tuple(self._mu.get((index, n)) if mu is None else mu for n, mu in enumerate(known))

    def parts(self, step: int) -> Sequence[PoolPart]:
        totals = self.totals(step)
        weights = [teacher.weight for teacher in self.teachers]
        if self.kept is not None:
            weights = list(self.kept.weights)
        if self.teacher_weights is not None:
            weights = list(self.teacher_weights(step))
        return [
            PoolPart(self.context, rows, self.teachers, weights, totals, self.kept)
            for rows in self.micro_batches(step)
        ]


class LabelSteps(_Schedule):
    """Cross-entropy on labels with the same machinery: SFT, or a warm-up.

    `target(sample)` is the response text; default, the sample's answer. Samples without one must not be in
    `dataset`. `steps` limits the number of steps (default: `passes` passes).
    """

    def __init__(
        self,
        dataset: Labelled,
        context: Context,
        *,
        target: Callable[[Any], str | None] = lambda sample: sample.answer,
        questions_per_step: int,
        tokens_per_device: int,
        passes: int = 1,
        steps: int | None = None,
        seed: int = 0,
        accelerator: Accelerator | None = None,
    ) -> None:
        super().__init__(
            [Phase("labels", -1, 0.0, len(dataset))],
            context,
            questions_per_step=questions_per_step,
            tokens_per_device=tokens_per_device,
            passes=passes,
            seed=seed,
            accelerator=accelerator,
        )
        self.dataset, self.target = dataset, target
        self.steps = min(self.steps, steps or self.steps)

    def prepare(self, student: PreTrainedModel, step: int) -> None:
        self.student = student
        if self.phase < 0:
            self.enter(0, [self._question(self.dataset[index]) for index in range(len(self.dataset))])

    def _question(self, sample: Any) -> Question:
        text = self.target(sample)
        if not text:
            raise InputError(f"sample {sample.id}: no label to learn; leave it out of the labelled data")
        ids = self.context.encoder.response_ids(text)
        return Question(sample, (Scored(ids, 1.0, 1.0, (0.0,) * len(ids)),))

    def figures(self, step: int) -> dict[str, float]:
        return {}

    def is_boundary(self, step: int) -> bool:
        return False

    def parts(self, step: int) -> Sequence[LabelPart]:
        totals = self.totals(step)
        return [LabelPart(self.context, rows, totals) for rows in self.micro_batches(step)]


def _listed(entered: FrozenModel | Sequence[FrozenModel] | None) -> tuple[FrozenModel, ...]:
    if entered is None:
        return ()
    return (entered,) if isinstance(entered, FrozenModel) else tuple(entered)
