"""What teachers and student score on held-out questions by the samples' own rules, asked greedily.

In: validation data, engines. Out: the gate's curve of every teacher (METHOD 2) and accuracies to weigh
teachers by; the student's validation accuracy. Not here: what the curve decides (`masks/teachers.py`).

A gate's answers are kept in sealed shards like a pool's: a run that goes on asks nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel

from distill.answers import responses
from distill.answers.answering import Answering
from distill.answers.engines import HfEngine
from distill.answers.judging import Rule, correct
from distill.answers.responses import Reference, Response
from distill.forward.sampling import Sampling
from distill.inputs import questions
from distill.inputs.data import Dataset, Sample, SampleError, Skips
from distill.inputs.encoding import Encoder
from distill.losses.signal import kept_teachers
from distill.masks import teachers
from distill.masks.teachers import Gated
from distill.models import Models
from distill.recipe import Gate, Mask, Recipe
from distill.training import processes
from runtime import files
from runtime.errors import InputError, TrainingError

ROWS = 16
"""Images that the student answers about at a time in a validation."""


class Gating:
    """Asks teachers `plan.teachers[i].mask.gate.samples` of the validation questions."""

    def __init__(
        self,
        plan: Recipe,
        shared: Path,
        validation: Dataset | None,
        models: Models,
        answering: Answering,
        accelerator: Accelerator,
        say: Callable[[str], None],
    ) -> None:
        self.plan, self.directory, self.validation = plan, shared / "gate", validation
        self.models, self.answering, self.accelerator, self.say = models, answering, accelerator, say

    def gate(self, number: int) -> Gated:
        """How far a teacher may be masked, measured on held-out questions (METHOD 2)."""
        settings = self.plan.teachers[number]
        name, mask = Path(settings.checkpoint).name, settings.mask
        if self.plan.objective.together == "accuracy":
            mask = _measured(mask)
        if mask is None or mask.gate is None:
            return Gated(name, 0.0 if mask is None else mask.largest)
        if self.validation is None:
            raise InputError(
                "objective.teachers: accuracy is measured on data.validation, which is empty; "
                "give validation data, or set objective.teachers: fixed"
            )
        asked = self._questions(mask.gate.samples)
        identity: dict[str, Any] = {
            "teacher": self.models.identity(number),
            "questions": files.sha256_json([self._fingerprint, asked]),
            "max_new_tokens": self.plan.pool.sampling.max_new_tokens,
        }
        place = self.directory / files.sha256_json([identity, mask.touches])[:16]

        def answer(ratio: float) -> tuple[list[float], float]:
            return self._answer(number, ratio, asked, place / f"{ratio:g}")

        return teachers.gate(name, answer, mask, place / "curve.json", identity, progress=self.say)

    @property
    def _fingerprint(self) -> list[Any]:
        return [source.model_dump(mode="json") for source in self.plan.data.validation]

    def _questions(self, count: int) -> list[int]:
        assert self.validation is not None
        draw = np.random.default_rng([self.plan.seed, 8]).permutation(len(self.validation))
        return sorted(map(int, draw[:count]))

    def _answer(
        self, number: int, ratio: float, asked: Sequence[int], directory: Path
    ) -> tuple[list[float], float]:
        """Scores of a masked teacher's answers, and its zeros as the main process measured them."""
        assert self.validation is not None
        shard, facts = self.plan.pool.shard, directory / "sparsity.json"
        shards = [directory / f"{n:05d}.jsonl" for n in range(-(-len(asked) // shard))]
        if processes.largest(self.accelerator, sum(not path.exists() for path in shards)):
            with self.answering.teacher(number, ratio) as engine:
                if self.accelerator.is_main_process:
                    files.write_json(facts, self.answering.sparsity)
                if engine is not None:
                    rank, world = self.accelerator.process_index, self.accelerator.num_processes
                    responses.draw(
                        engine,
                        questions.Checked(self.validation, self.models.readers(), by_rule=True),
                        asked,
                        1,
                        "teacher",
                        directory,
                        sampling=self._greedy,
                        seed=0,
                        shard_size=shard,
                        rank=rank if engine.repeatable else 0,
                        world=world if engine.repeatable else 1,
                        skips=Skips(self.plan.data.skip_limit),
                    )
                self.accelerator.wait_for_everyone()
        pool = responses.load(directory)
        samples = [self.validation[i] for i in asked if i not in responses.skipped(directory)]
        answered = [pool[sample.id][0] for sample in samples]
        return _scored(samples, answered, self.models.encoder), float(files.read_json(facts))

    @property
    def _greedy(self) -> Sampling:
        return Sampling(max_new_tokens=self.plan.pool.sampling.max_new_tokens, greedy=True)

    # --- the student --------------------------------------------------

    def validate(self, student: PreTrainedModel, sharing: str) -> float:
        """Share of the validation questions that the student answers right; every process asks for its part.
        Questions that cannot be asked are left out. Raises TrainingError past `data.skip_limit` of them."""
        assert self.validation is not None
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        samples, refused = [], []
        for index in range(rank, len(self.validation), world):
            try:
                samples.append(self.validation[index])
            except SampleError as error:
                refused.append(str(error))
        engine = HfEngine(student, self.models.encoder, rows_per_batch=ROWS, sharing=sharing)

        def refuse(place: int, error: InputError) -> None:
            refused.append(f"{samples[place].source}[{samples[place].index}]: {error}")

        drawn = engine.draw(samples, 1, self._greedy, 0, refuse=refuse)
        pairs = [(sample, some[0]) for sample, some in zip(samples, drawn, strict=True) if some]
        answered = [Response(one.ids, {"student": 1}, None) for _, one in pairs]
        scores = _scored([sample for sample, _ in pairs], answered, self.models.encoder)
        mine = {"right": sum(scores), "asked": float(len(scores)), "refused": float(len(refused))}
        found = processes.sums(self.accelerator, mine)
        if found["refused"] > self.plan.data.skip_limit or not found["asked"]:
            raise TrainingError(
                f"data.validation: {found['refused']:.0f} of {len(self.validation)} samples cannot be asked "
                f"({'; '.join(refused[:3]) or 'see the other processes'}); data.skip_limit is "
                f"{self.plan.data.skip_limit}; mend the data or raise the limit"
            )
        return found["right"] / found["asked"]

    # --- several teachers at once -------------------------------------

    def weights(self, gated: Sequence[Gated], seed: int) -> Callable[[int], Sequence[float]] | None:
        """How much each of several teachers counts at a step; None where one acts at a time."""
        how, drop = self.plan.objective.together, self.plan.objective.drop
        fixed = [teacher.weight for teacher in self.plan.teachers]
        if how == "one":
            return None
        if how == "drop":
            return lambda step: kept_teachers(fixed, drop, [seed, 12, step])
        if how == "accuracy":
            right = [next(p.accuracy for p in each.curve if p.ratio == each.r_max) for each in gated]
            fixed = [weight * share for weight, share in zip(fixed, right, strict=True)]
        return lambda step: fixed


def _measured(mask: Mask | None) -> Mask:
    """The same mask with a gate, so that the teacher's accuracy under it is known."""
    if mask is not None and mask.gate is not None:
        return mask
    alone = Gate(ratios=(0.0,), most_lost=0.999)
    if mask is None:
        return Mask(r_max=0.0, restore=False, gate=alone)
    return mask.model_copy(update={"gate": alone})


def _scored(samples: Sequence[Sample], answered: Sequence[Response], encoder: Encoder) -> list[float]:
    references = {sample.id: Reference(sample.answer or "", False, 1.0) for sample in samples}
    return correct(samples, answered, Rule(), references=references, text=encoder.text)
