"""The questions of every phase with their responses from both sources, and whether those are right.

In: phases, data, engines, a judge. Out: pools on disk, and per phase the scored questions that training
takes. Every question belongs to one phase, and only that phase's teacher answers it (METHOD 2, 3).
Not here: which questions there are (`inputs/questions.py`), drawing itself (`answers/shards.py`), what a
step learns (`distill/training/steps.py`).
"""

from __future__ import annotations

import contextlib
import itertools
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedModel

from distill.account import Account, size
from distill.answers import judging, pool_statistics, responses
from distill.answers.answering import Answering, Judging
from distill.answers.judging import Rule, correct_pool
from distill.answers.responses import Pool, Reference
from distill.forward.sampling import Sampling
from distill.forward.sharing import Shape
from distill.inputs import questions
from distill.inputs.data import Dataset, Sample, SampleError, Skips
from distill.masks.teachers import ALL_TEACHERS, Phase
from distill.models import Models
from distill.recipe import Recipe, RuleJudge
from distill.training import processes
from distill.training.batches import Question, Scored
from evals import judge_rows
from runtime import files
from runtime.errors import StateError, TrainingError

Progress = Callable[[int, int], None]
Bar = Callable[[str], Progress]
"""Opens a progress bar with a title."""
TEACHER, STUDENT = "teacher", "student"
SKIPPED, AUDIT = "skipped.jsonl", "judge-audit.jsonl"


@dataclass(frozen=True)
class Drawing:
    """Responses to draw: `count` of a teacher at a ratio to some questions, kept in a directory."""

    teacher: int
    ratio: float
    count: int
    indices: tuple[int, ...]
    directory: Path


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
        order: Sequence[int],
        r_max: Sequence[float],
        models: Models,
        answering: Answering,
        judges: Judging,
        accelerator: Accelerator,
        account: Account,
        bar: Bar,
    ) -> None:
        self.plan, self.out, self.work, self.shared = plan, out, out / "work", shared
        self.dataset = dataset
        by_rule = isinstance(plan.judge, RuleJudge)
        self.checked = questions.Checked(dataset, models.readers(), by_rule=by_rule)
        self.phases, self.models, self.answering, self.judges = list(phases), models, answering, judges
        self.r_max, self.accelerator, self.account, self.bar = list(r_max), accelerator, account, bar
        self.skips = Skips(plan.data.skip_limit)
        cuts = np.cumsum([0, *(phase.questions for phase in phases)]).tolist()
        self.indices = [tuple(order[a:b]) for a, b in itertools.pairwise(cuts)]
        self.skipped: dict[int, str] = {}
        self._without_label: dict[int, tuple[int, ...]] = {}

    # --- teachers -----------------------------------------------------

    def draw_teachers(self) -> None:
        """Every phase's questions to its masked teacher, one teacher and ratio after the other; the full
        teacher's votes on questions without a label. Questions that cannot be asked are found here."""
        if not self.plan.pool.teacher_responses:
            return self._look_through()
        with self.account.stage("pool", self._teachers_made):
            for phase in range(len(self.phases)):
                for one in self._asked(phase):
                    self._draw_teacher(one, f"phase {phase + 1}/{len(self.phases)}")
            for phase in range(len(self.phases)):
                for one in self._voted(phase):
                    self._draw_teacher(one, f"pseudo labels, phase {phase + 1}/{len(self.phases)}")
        return None

    def _look_through(self) -> None:
        directory = self.work / "looked-through"
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        order = [index for indices in self.indices for index in indices]
        with self.account.stage("look"):
            bar = self.bar("looking through the questions")
            questions.look_through(self.checked, order, directory, rank=rank, world=world, progress=bar)
            self.accelerator.wait_for_everyone()
        self._settle(directory)

    def _asked(self, phase: int) -> list[Drawing]:
        """What a phase's teachers are asked; several at once share the number of responses."""
        one, total = self.phases[phase], self.plan.pool.teacher_responses
        together = one.teacher == ALL_TEACHERS
        numbers = list(range(len(self.plan.teachers))) if together else [one.teacher]
        found = []
        for place, number in enumerate(numbers):
            count = total // len(numbers) + (place < total % len(numbers))
            ratio = self.r_max[number] if together else one.ratio
            if count:
                found.append(self._drawing(phase, number, ratio, count, self.indices[phase]))
        return found

    def _voted(self, phase: int) -> list[Drawing]:
        """What the full teacher is asked for questions without a label, where it is not asked anyway."""
        asked = self._asked(phase)
        if not asked or any(not one.ratio for one in asked) or not self._unlabelled(phase):
            return []
        count = self.plan.pool.teacher_responses
        return [self._drawing(phase, asked[-1].teacher, 0.0, count, self._unlabelled(phase))]

    def _drawing(self, phase: int, teacher: int, ratio: float, count: int, indices: Sequence[int]) -> Drawing:
        """A drawing with its directory, which is named by all that decides the answers."""
        settings, mask = self.plan.pool, self.plan.teachers[teacher].mask
        facts = {
            "teacher": self.models.identity(teacher),
            "mask": [ratio, mask.touches] if ratio and mask else None,
            "data": [source.model_dump(mode="json") for source in self.plan.data.train],
            "questions": [*map(int, indices)],
            "limits": [self.plan.data.max_pixels, self.plan.data.max_prompt_tokens],
            "sampling": settings.sampling.model_dump(),
            "engine": settings.engine.kind,
            "count": count,
            "seed": self.plan.seed,
            "shard": settings.shard,
        }
        name = f"{phase + 1}-{teacher}-{ratio:g}-{files.sha256_json(facts)[:16]}"
        return Drawing(teacher, ratio, count, tuple(indices), self.shared / "pool" / name)

    def _draw_teacher(self, one: Drawing, where: str) -> None:
        if not self._all_sealed(one.directory, len(one.indices)):
            title = f"teacher {one.teacher} at r {one.ratio:g}, {where}"
            with self.answering.teacher(one.teacher, one.ratio) as engine:
                seed = [5, one.teacher, round(one.ratio * 1e4)]
                self._draw(engine, one.indices, one.count, TEACHER, one.directory, title, seed)
        self._settle(one.directory)

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
                self.checked,
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

    def _all_sealed(self, directory: Path, count: int) -> bool:
        """Whether nothing is left to draw, by the same answer in every process: none begins before all have
        looked."""
        shards = -(-count // self.plan.pool.shard)
        missing = sum(not (directory / f"{number:05d}.jsonl").exists() for number in range(shards))
        return not processes.largest(self.accelerator, missing)

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

    def _teachers_made(self) -> dict[str, float]:
        """Tokens that teachers have generated, and what they take on disk."""
        every = [
            one for phase in range(len(self.phases)) for one in (*self._asked(phase), *self._voted(phase))
        ]
        pools = [responses.load(one.directory) for one in every]
        tokens = sum(r.count * len(r.ids) for pool in pools for some in pool.values() for r in some)
        return {"tokens": tokens, "bytes": size(*(one.directory for one in every))}

    # --- what training takes ------------------------------------------

    def planned(self) -> list[Phase]:
        """The phases with the questions that can be asked. Call after `draw_teachers`."""
        if self.accelerator.is_main_process and self.skipped:
            rows = [{"index": index, "why": why} for index, why in sorted(self.skipped.items())]
            files.write_text(self.out / SKIPPED, "".join(json.dumps(row) + "\n" for row in rows))
        kept = [len(self._kept(phase)) for phase in range(len(self.phases))]
        found = [replace(phase, questions=count) for phase, count in zip(self.phases, kept, strict=True)]
        empty = [phase.name for phase in found if not phase.questions]
        if empty:
            raise TrainingError(f"phase {empty[0]}: none of its questions could be asked; mend the data")
        return found

    def shape(self) -> Shape | None:
        """What a question looks like to a model, by the first shards of the teachers' answers; the student's
        half is taken to be alike. None where no teacher answers."""
        probe, settings = self.models.probe, self.plan.pool
        if probe is None or not settings.teacher_responses:
            return None
        pool = responses.load(self._asked(0)[0].directory)
        lengths = [len(response.ids) for some in pool.values() for response in some]
        distinct = len(lengths) / len(pool) * (1 + settings.student_responses / settings.teacher_responses)
        return Shape(len(self.models.encoder.encode(probe).ids), distinct, sum(lengths) / len(lengths))

    def load(self, phase: int, student: PreTrainedModel, mode: str) -> list[Question]:
        """A phase's scored questions. What the student has not yet answered it answers now, as it is."""
        refresh = self.plan.pool.student_refresh == "stage"
        if self.plan.pool.student_responses:
            for number in [phase] if refresh else range(len(self.phases)):
                self._draw_student(number, student, mode)
        samples = [self.dataset[index] for index in self._kept(phase)]
        pool, full = self._pools(phase)
        text = self.models.encoder.text
        references = {
            sample.id: responses.reference(sample, full.get(sample.id, ()), text) for sample in samples
        }
        mute = [sample for sample in samples if not pool.get(sample.id)]
        if mute:
            raise TrainingError(
                f"{mute[0].source}[{mute[0].index}] and {len(mute) - 1} more have no responses: the server "
                "refused them; see its log, and run again"
            )
        correct = self._correct(phase, samples, pool, references, student, mode)
        self._keep_statistics(phase, pool, correct, references)
        return [
            Question(sample, tuple(map(_scored, pool[sample.id], correct[sample.id]))) for sample in samples
        ]

    def _kept(self, phase: int) -> list[int]:
        return [index for index in self.indices[phase] if index not in self.skipped]

    def _unlabelled(self, phase: int) -> tuple[int, ...]:
        """A phase's questions that need the full teacher's vote. Call when all are drawn by its teacher."""
        if phase not in self._without_label:
            found = tuple(i for i in self._kept(phase) if self.dataset[i].answer is None)
            self._without_label[phase] = found
        return self._without_label[phase]

    def _student_directory(self, phase: int) -> Path:
        return self.work / "student" / f"phase-{phase + 1}"

    def _draw_student(self, phase: int, student: PreTrainedModel, mode: str) -> None:
        directory, indices = self._student_directory(phase), self._kept(phase)
        if self._all_sealed(directory, len(indices)):
            return
        count, name = self.plan.pool.student_responses, f"student {phase + 1}"
        with (
            self.account.stage(name, lambda: self._student_made(directory)),
            self.answering.student(student, mode, name.replace(" ", "-")) as engine,
        ):
            title = f"student, phase {phase + 1}/{len(self.phases)}"
            self._draw(engine, indices, count, STUDENT, directory, title, seed=[6, phase])

    def _student_made(self, directory: Path) -> dict[str, float]:
        pool = responses.load(directory)
        tokens = sum(r.count * len(r.ids) for some in pool.values() for r in some)
        return {"tokens": tokens, "bytes": size(directory)}

    def _pools(self, phase: int) -> tuple[Pool, Pool]:
        """The phase's merged pool; the full teacher's answers."""
        pool: Pool = {}
        full: Pool = {}
        for one in self._asked(phase):
            found = responses.load(one.directory)
            pool = responses.merge_pools(pool, found)
            full = full if one.ratio else found
        for one in self._voted(phase):
            full = responses.load(one.directory)
        if self.plan.pool.student_responses:
            pool = responses.merge_pools(pool, responses.load(self._student_directory(phase)))
        return pool, full

    # --- judging ------------------------------------------------------

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
        one = self.phases[phase]
        number = len(self.plan.teachers) - 1 if one.teacher == ALL_TEACHERS else one.teacher
        options: dict[str, Any] = {"references": references, "text": self.models.encoder.text}
        known = self.judges.known(number, one.ratio)
        if isinstance(known, Rule):
            return correct_pool(samples, pool, known, **options)
        missing = 1
        with contextlib.suppress(StateError):
            correct_pool(samples, pool, known, **options)
            missing = 0
        if processes.largest(self.accelerator, missing):  # none asks before all have looked
            title = f"judging phase {phase + 1}/{len(self.phases)}"
            with (
                self.account.stage(f"judge {phase + 1}"),
                self.judges.by(number, one.ratio, student, mode) as asked,
            ):
                if asked is not None:  # each process its share; what it finds is kept in files that all read
                    share = samples[self.judges.rank :: self.judges.world]
                    correct_pool(share, pool, asked, progress=self.bar(title), **options)
                self.accelerator.wait_for_everyone()
        known = self.judges.known(number, one.ratio)
        found = correct_pool(samples, pool, known, **options)
        if self.accelerator.is_main_process and not isinstance(known, Rule):
            self._audit(phase, samples, pool, known)
        return found

    def _audit(self, phase: int, samples: Sequence[Sample], pool: Pool, judges: Any) -> None:
        """Verdicts beside what the rules say of labelled questions, for `pocketvlm judge-audit`."""
        closed = [sample for sample in samples if sample.answer is not None and _suits(sample)]
        rows = judging.audit_pool(closed, pool, judges, text=self.models.encoder.text)
        judge_rows.write(self.work / "audit" / f"phase-{phase + 1}.jsonl", rows)
        every = [self.work / "audit" / f"phase-{number + 1}.jsonl" for number in range(len(self.phases))]
        judge_rows.write(
            self.out / AUDIT, [row for path in every if path.exists() for row in judge_rows.read(path)]
        )

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
            pool_statistics.write(self.work / "statistics" / f"phase-{phase + 1}.json", lines)


def statistics(out: Path) -> list[pool_statistics.Line]:
    """Pool statistics of every phase, in order."""
    paths = sorted(
        (out / "work" / "statistics").glob("phase-*.json"), key=lambda p: int(p.stem.split("-")[1])
    )
    return [pool_statistics.Line(**line) for path in paths for line in files.read_json(path)]


def _suits(sample: Sample) -> bool:
    """Whether the sample's rule can use its label."""
    try:
        judging.check(sample)
    except SampleError:
        return False
    return True


def _scored(response: responses.Response, right: float) -> Scored:
    return Scored(response.ids, response.count, right, response.mu, response.counts.get(TEACHER, 0))
