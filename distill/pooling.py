"""The questions of every phase with their responses from both sources, and whether those are right.

In: phases, data, engines, a judge. Out: pools on disk, and per phase the scored questions that training
takes. Every question belongs to one phase, and only that phase's teacher answers it (METHOD 2, 3).
Not here: drawing itself (`distill/shards.py`), what a step learns (`distill/steps.py`).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel

from distill import batches, judging, pool_statistics, responses
from distill.answering import Answering, Judging
from distill.batches import Question, Scored
from distill.data import Dataset, Sample, Skips
from distill.judging import correct_pool
from distill.models import Models
from distill.recipe import Recipe, RuleJudge
from distill.responses import Pool, Reference
from distill.sampling import Sampling
from distill.teachers import ALL_TEACHERS, Phase
from runtime import files
from runtime.errors import TrainingError

Progress = Callable[[int, int], None]
Bar = Callable[[str], Progress]
"""Opens a progress bar with a title."""
TEACHER, STUDENT = "teacher", "student"


def order(dataset: Dataset, seed: int, together: int = 1, limit: int | None = None) -> list[int]:
    """Question indices in the order in which phases take them: shuffled, `together` questions about one
    image side by side (they then share its forward). Above 1 every record is read once, for its image."""
    count = len(dataset)
    draw = np.random.default_rng([seed, 4])
    if together == 1:
        return draw.permutation(count).tolist()[:limit]
    units: dict[Any, list[int]] = {}
    for index in range(count):
        try:
            key = batches.image_key(dataset[index])
        except Exception:  # reported where the sample is asked
            key = index
        units.setdefault(key, []).append(index)
    visits = []
    for unit in units.values():
        asked = draw.permutation(unit).tolist()
        visits += [asked[i : i + together] for i in range(0, len(asked), together)]
    return [index for visit in draw.permutation(len(visits)) for index in visits[visit]][:limit]


class Checked:
    """A data set whose labels are known to suit their rules: a label that no answer could equal is a fault of
    the sample, found before anything is drawn for it."""

    def __init__(self, dataset: Dataset) -> None:
        self.dataset, self.name = dataset, dataset.name

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Sample:
        sample = self.dataset[index]
        judging.check(sample)
        return sample


@dataclass(frozen=True)
class _Asked:
    """Pool directories of one phase: a pool of each of its teachers, and the full teacher's answers to
    questions without a label (None where the phase's own teacher is the full one)."""

    teachers: tuple[tuple[int, float, int, Path], ...]  # teacher, ratio, responses, directory
    full: tuple[tuple[int, float, int, Path], ...]


class Pooling:
    """Draws and scores. `shared` holds the teachers' pools, named by what decides them, so that runs which
    differ elsewhere (an ablation's arms) draw them once; the student's are below `out`."""

    def __init__(
        self,
        plan: Recipe,
        out: Path,
        shared: Path,
        dataset: Dataset,
        phases: Sequence[Phase],
        questions: Sequence[int],
        r_max: Sequence[float],
        models: Models,
        answering: Answering,
        judges: Judging,
        accelerator: Accelerator,
        bar: Bar,
    ) -> None:
        self.plan, self.out, self.shared = plan, out, shared
        self.dataset = Checked(dataset) if isinstance(plan.judge, RuleJudge) else dataset
        self.phases, self.models, self.answering, self.judges = list(phases), models, answering, judges
        self.r_max, self.accelerator, self.bar = list(r_max), accelerator, bar
        self.skips = Skips(plan.data.skip_limit)
        cuts = np.cumsum([0, *(phase.questions for phase in phases)]).tolist()
        self.indices = [list(questions[a:b]) for a, b in itertools.pairwise(cuts)]
        self.skipped: dict[int, str] = {}

    # --- teachers -----------------------------------------------------

    def draw_teachers(self) -> None:
        """Every phase's questions to its masked teacher, one teacher and ratio after the other."""
        for phase, indices in enumerate(self.indices):
            for teacher, ratio, count, directory in self._asked(phase).teachers:
                title = f"teacher {teacher} at r {ratio:g}, phase {phase + 1}/{len(self.phases)}"
                self._draw_teacher(teacher, ratio, indices, count, directory, title)
        for phase in range(len(self.phases)):
            unlabelled = self._unlabelled(phase)
            for teacher, ratio, count, directory in self._asked(phase).full if unlabelled else ():
                title = f"full teacher {teacher} for pseudo labels, phase {phase + 1}/{len(self.phases)}"
                self._draw_teacher(teacher, ratio, unlabelled, count, directory, title)

    def _asked(self, phase: int) -> _Asked:
        settings, one = self.plan.pool, self.phases[phase]
        together = one.teacher == ALL_TEACHERS
        numbers = list(range(len(self.plan.teachers))) if together else [one.teacher]
        counts = [
            settings.teacher_responses // len(numbers) + (i < settings.teacher_responses % len(numbers))
            for i in range(len(numbers))
        ]
        asked = []
        for number, count in zip(numbers, counts, strict=True):
            ratio = self.r_max[number] if together else one.ratio
            if count:
                asked.append((number, ratio, count, self._directory(phase, number, ratio, count)))
        full = []
        if asked and all(ratio for _, ratio, *_ in asked):
            number = numbers[-1]
            count = max(1, settings.teacher_responses)
            full.append((number, 0.0, count, self._directory(phase, number, 0.0, count)))
        return _Asked(tuple(asked), tuple(full))

    def _directory(self, phase: int, teacher: int, ratio: float, count: int) -> Path:
        """Where a teacher's answers to a phase's questions are kept, named by all that decides them."""
        settings = self.plan.pool
        facts = {
            "teacher": self.models.identity(teacher),
            "mask": None if not ratio else [ratio, list(self._tensors(teacher))],
            "questions": files.sha256_json([self._fingerprint, self.indices[phase]]),
            "limits": [self.plan.data.max_pixels, self.plan.data.max_prompt_tokens],
            "sampling": settings.sampling.model_dump(),
            "engine": settings.engine.kind,
            "count": count,
            "seed": self.plan.seed,
            "shard": settings.shard,
        }
        return self.shared / "pool" / f"{phase + 1}-{teacher}-{ratio:g}-{files.sha256_json(facts)[:16]}"

    @property
    def _fingerprint(self) -> list[Any]:
        return [source.model_dump(mode="json") for source in self.plan.data.train]

    def _tensors(self, teacher: int) -> Sequence[str]:
        mask = self.plan.teachers[teacher].mask
        return mask.tensors if mask else ()

    def _draw_teacher(
        self, number: int, ratio: float, indices: Sequence[int], count: int, directory: Path, title: str
    ) -> None:
        if not self._all_sealed(directory, len(indices)):
            with self.answering.teacher(number, ratio) as engine:
                self._draw(
                    engine, indices, count, TEACHER, directory, title, seed=[5, number, round(ratio * 1e4)]
                )
        self._settle(directory)

    def _draw(
        self,
        engine: Any,
        indices: Sequence[int],
        count: int,
        source: str,
        directory: Path,
        title: str,
        seed: Sequence[int],
    ) -> None:
        """This process's shards: all of them with a server, whose one client is the main process."""
        if engine is not None:
            alone = not engine.repeatable
            settings = self.plan.pool
            responses.draw(
                engine,
                self.dataset,
                indices,
                count,
                source,
                directory,
                sampling=Sampling(**settings.sampling.model_dump()),
                seed=int(np.random.SeedSequence([self.plan.seed, *seed]).generate_state(1)[0] >> 1),
                shard_size=settings.shard,
                rank=0 if alone else self.accelerator.process_index,
                world=1 if alone else self.accelerator.num_processes,
                skips=self.skips,
                progress=self.bar(title),
            )
        self.accelerator.wait_for_everyone()

    def _all_sealed(self, directory: Path, questions: int) -> bool:
        shards = -(-questions // self.plan.pool.shard)
        return all((directory / f"{number:05d}.jsonl").exists() for number in range(shards))

    def _settle(self, directory: Path) -> None:
        """Count what other processes and earlier runs skipped. Raises TrainingError past the limit."""
        for index, why in responses.skipped(directory).items():
            self.skipped.setdefault(index, why)
        limit = self.plan.data.skip_limit
        if len(self.skipped) > limit:
            first = "; ".join(list(self.skipped.values())[:3])
            raise TrainingError(
                f"{len(self.skipped)} samples cannot be used, data.skip_limit is {limit}: {first}; mend the "
                "data or raise the limit, and run again: what is drawn is kept"
            )

    # --- what training takes ------------------------------------------

    def planned(self) -> list[Phase]:
        """The phases with the questions that can be asked. Call after `draw_teachers`."""
        kept = [sum(index not in self.skipped for index in indices) for indices in self.indices]
        found = [replace(phase, questions=count) for phase, count in zip(self.phases, kept, strict=True)]
        empty = [phase.name for phase in found if not phase.questions]
        if empty:
            raise TrainingError(f"phase {empty[0]}: none of its questions could be asked; mend the data")
        return found

    def load(self, phase: int, student: PreTrainedModel, mode: str) -> list[Question]:
        """A phase's scored questions. What the student has not yet answered it answers now, as it is."""
        counts = self.plan.pool.student_responses
        if counts and self.plan.pool.student_refresh == "never":
            for number in range(len(self.phases)):
                self._draw_student(number, student, mode)
        elif counts:
            self._draw_student(phase, student, mode)
        samples = {index: self.dataset[index] for index in self._kept(phase)}
        pool, full = self._pools(phase)
        text = self.models.encoder.text
        references = {
            sample.id: responses.reference(sample, full.get(sample.id, ()), text)
            for sample in samples.values()
        }
        correct = self._correct(phase, list(samples.values()), pool, references, student, mode)
        self._keep_statistics(phase, pool, correct, references)
        return [
            Question(
                sample,
                tuple(
                    _scored(r, right) for r, right in zip(pool[sample.id], correct[sample.id], strict=True)
                ),
            )
            for sample in samples.values()
        ]

    def _kept(self, phase: int) -> list[int]:
        return [index for index in self.indices[phase] if index not in self.skipped]

    def _unlabelled(self, phase: int) -> list[int]:
        """Questions that need the full teacher's vote."""
        sources = self.plan.data.train
        return [i for i in self._kept(phase) if self.dataset[i].answer is None] if sources else []

    def _draw_student(self, phase: int, student: PreTrainedModel, mode: str) -> None:
        directory, indices = self.out / "work" / "student" / f"phase-{phase + 1}", self._kept(phase)
        if not self._all_sealed(directory, len(indices)):
            with self.answering.student(student, mode, f"student-{phase + 1}") as engine:
                count = self.plan.pool.student_responses
                title = f"student, phase {phase + 1}/{len(self.phases)}"
                self._draw(engine, indices, count, STUDENT, directory, title, seed=[6, phase])

    def _pools(self, phase: int) -> tuple[Pool, Pool]:
        """The phase's merged pool; the full teacher's answers."""
        asked = self._asked(phase)
        pool: Pool = {}
        for *_, directory in asked.teachers:
            pool = responses.merge_pools(pool, responses.load(directory))
        full = pool
        if asked.full and self._unlabelled(phase):
            full = responses.load(asked.full[0][-1])
        if self.plan.pool.student_responses:
            student = responses.load(self.out / "work" / "student" / f"phase-{phase + 1}")
            pool = responses.merge_pools(pool, student)
        return pool, full

    def _correct(
        self,
        phase: int,
        samples: Sequence[Sample],
        pool: Pool,
        references: Mapping[str, Reference],
        student: PreTrainedModel,
        mode: str,
    ) -> dict[str, list[float]]:
        """R_acc of every response, the same in every process."""
        title = f"judging phase {phase + 1}/{len(self.phases)}"
        one = self.phases[phase]
        number = len(self.plan.teachers) - 1 if one.teacher == ALL_TEACHERS else one.teacher
        options = {"references": references, "text": self.models.encoder.text}
        with self.judges.by(number, one.ratio, student, mode) as asked:
            if asked is not None:  # each process its share; what it finds is kept in files that all read
                share = samples[self.judges.rank :: self.judges.world]
                correct_pool(share, pool, asked, progress=self.bar(title), **options)
        self.accelerator.wait_for_everyone()
        return correct_pool(samples, pool, self.judges.known(number, one.ratio), **options)

    def _keep_statistics(
        self,
        phase: int,
        pool: Pool,
        correct: Mapping[str, Sequence[float]],
        references: Mapping[str, Reference],
    ) -> None:
        if self.accelerator.is_main_process:
            one = self.phases[phase]
            pseudo = {key for key, reference in references.items() if reference.pseudo}
            lines = pool_statistics.statistics(
                [pool_statistics.Part(one.name, one.ratio, pool, correct, pseudo)]
            )
            pool_statistics.write(self.out / "work" / "statistics" / f"phase-{phase + 1}.json", lines)


def _scored(response: responses.Response, right: float) -> Scored:
    return Scored(response.ids, response.count, right, response.mu, response.counts.get(TEACHER, 0))
