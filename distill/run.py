"""One distillation from recipe to checkpoint: `pocketvlm distill`, and every arm of `pocketvlm ablate`.

In: a recipe, an output directory; Accelerate's environment where several processes run it. Out:

    student/        the distilled checkpoint: for AutoModelForImageTextToText and AutoProcessor
    metrics.json    what was chosen, drawn, learned and measured
    work/           gate, pools, verdicts, training states: what resuming needs
    ledger.jsonl    seconds and peak memory of every stage

    check -> gate -> pool -> train (each phase: student answers, judge, steps) -> write

Not here: the stages themselves. Run again after any interruption: what was finished is not repeated.
"""

from __future__ import annotations

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import transformers
from accelerate import Accelerator
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
)
from transformers import PreTrainedModel

from distill import (
    checkpoints,
    checks,
    loop,
    models,
    pool_statistics,
    pooling,
    processes,
    recipe,
    teachers,
    warnings,
)
from distill.answering import Answering, Judging
from distill.batches import Question
from distill.data import open_data
from distill.encoding import Prompt
from distill.engines import HfEngine
from distill.feature_store import FeatureStore
from distill.judging import Rule, correct
from distill.learner import Learner
from distill.models import Models
from distill.optim import Optimizing
from distill.parts import Context, FrozenModel
from distill.pooling import Pooling
from distill.recipe import Recipe
from distill.responses import Reference, Response
from distill.sampling import Sampling
from distill.steps import PoolSteps
from distill.teachers import ALL_TEACHERS, Gated, Phase
from runtime import files
from runtime.errors import InputError

STUDENT, METRICS, WORK = "student", "metrics.json", "work"
NORMS_EVERY = 50
"""Steps between two measurements of each term's gradient norm; one costs a backward pass a term."""


def run(
    plan: Recipe,
    out: Path,
    *,
    console: Console | None = None,
    limit: int | None = None,
    shared: Path | None = None,
    until: str | None = None,
) -> Path:
    """Distil as the recipe says; the checkpoint's directory. Resumes after any interruption.

    `limit` cuts the training questions for a dry run. `shared` is where teachers' pools and gates are kept,
    for several runs if need be (default: below `out`). `until="pool"` stops when the teachers have answered.
    """
    accelerator = processes.accelerator(plan.train.precision, trackers=plan.train.trackers, directory=out)
    main = accelerator.is_main_process
    transformers.utils.logging.disable_progress_bar()  # this run shows bars of its own
    console = console if main and console is not None else Console(stderr=True, quiet=not main)
    with contextlib.ExitStack() as stack:
        if main:
            stack.enter_context(files.lock(out))
            recipe.claim(out, plan, limit=limit)
            files.remove_stale(out)
        accelerator.wait_for_everyone()
        if (out / STUDENT).exists() and until is None:
            console.print(f"[dim]{out / STUDENT} is there: nothing to do[/dim]")
            return out / STUDENT
        job = _Job(plan, out, shared or out / WORK, accelerator, console, limit)
        found = job.run(until)
        accelerator.end_training()
        return found


class _Job:
    """One call of `run` in one process."""

    def __init__(
        self,
        plan: Recipe,
        out: Path,
        shared: Path,
        accelerator: Accelerator,
        console: Console,
        limit: int | None,
    ) -> None:
        self.plan, self.out, self.shared, self.accelerator, self.console = (
            plan,
            out,
            shared,
            accelerator,
            console,
        )
        self.main = accelerator.is_main_process
        self.ledger = files.Ledger(out / "ledger.jsonl")
        checks.check(plan)
        self.train = open_data(plan.data.train, seed=plan.seed)
        held_out = plan.data.validation
        self.validation = open_data(held_out, name="validation", seed=plan.seed) if held_out else None
        self.order = pooling.order(self.train, plan.seed, plan.data.together, limit)
        self.models = Models(plan, accelerator, self._probe())
        self.answering = Answering(plan, self.models, accelerator, out / WORK, self.say)
        self.judging = Judging(plan, self.models, self.answering, accelerator)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _probe(self) -> Prompt | None:
        """A prompt with an image, to try how a model shares prefixes; the first one that can be read."""
        encoder = models.reader(self.plan, self.plan.student)
        for index in self.order[: 1 + self.plan.data.skip_limit]:
            with contextlib.suppress(InputError):
                return encoder.encode(self.train[index])
        return None

    # --- stages -------------------------------------------------------

    def run(self, until: str | None) -> Path:
        with self.stage("gate"):
            gated = [self.gate(number) for number in range(len(self.plan.teachers))]
        r_max = [each.r_max for each in gated]
        together = self.plan.objective.together != "one"
        phases = teachers.phases(self.plan.teachers, r_max, len(self.order), together=together)
        pooled = Pooling(
            self.plan,
            self.out,
            self.shared,
            self.train,
            phases,
            self.order,
            r_max,
            self.models,
            self.answering,
            self.judging,
            self.accelerator,
            self.bar,
        )
        if self.plan.pool.teacher_responses:
            with self.stage("pool"):
                pooled.draw_teachers()
        if until == "pool":
            return self.out
        with self.stage("train"):
            self.learn(pooled, gated)
        return self.out / STUDENT

    @contextlib.contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Time a stage and keep it in the ledger; a run that goes on adds a line of its own."""
        started = time.monotonic()
        yield
        if self.main:
            peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (
                2**10 if sys.platform != "darwin" else 2**20
            )
            seconds = time.monotonic() - started
            self.ledger.add({"stage": name, "seconds": round(seconds, 2), "peak_rss_mib": round(peak, 1)})
            self.console.print(f"[green]{name:6}[/green] [dim]{seconds:.0f} s[/dim]")

    def bar(self, title: str) -> Callable[[int, int], None]:
        """A line that tells how far a long stage is: (done, total)."""
        return _Bar(self.console, title)

    # --- gate ---------------------------------------------------------

    def gate(self, number: int) -> Gated:
        """How far a teacher may be masked, measured on held-out questions (METHOD 2)."""
        settings = self.plan.teachers[number]
        name = Path(settings.checkpoint).name
        mask = settings.mask
        if mask is None or mask.gate is None:
            return Gated(name, 0.0 if mask is None else mask.largest)
        assert self.validation is not None
        count = min(mask.gate.samples, len(self.validation))
        draw = np.random.default_rng([self.plan.seed, 8]).permutation(len(self.validation))[:count]
        samples = [self.validation[int(index)] for index in sorted(draw)]
        identity: dict[str, Any] = {
            "teacher": self.models.identity(number),
            "questions": files.sha256_json([sample.id for sample in samples]),
            "max_new_tokens": self.plan.pool.sampling.max_new_tokens,
        }

        def answer(ratio: float) -> tuple[list[float], float]:
            with self.answering.teacher(number, ratio) as engine:
                scores = self.scores(engine, samples)
            masker = self.models.whole(number).masker if ratio else None
            return scores, masker.sparsity if masker is not None else 0.0

        record = self.shared / "gate" / f"{identity['teacher'][:16]}-{identity['questions'][:8]}.json"
        found = teachers.gate(name, answer, mask, record, identity, progress=self.say)
        if self.main:
            self.console.print(found.table())
        return found

    def scores(self, engine: Any, samples: list[Any]) -> list[float]:
        """What the samples' own rules give for greedy answers; every process asks for its share."""
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        if engine is None or not engine.repeatable:
            rank, world = 0, 1
        found = (
            {} if engine is None else _greedy(engine, samples[rank::world], self.models.encoder, self.plan)
        )
        return _gathered(self.accelerator, [sample.id for sample in samples], found)

    # --- training -----------------------------------------------------

    def learn(self, pooled: Pooling, gated: list[Gated]) -> None:
        train, switches = self.plan.train, self.plan.objective.switches
        student = self.models.student()
        mode = self.models.student_mode(student)
        for line in self.models.fallbacks():
            self.say(f"no shared tree for {line}")
        frozen_vision = "vision" in train.freeze
        context = Context(
            self.models.encoder,
            switches,
            sharing=mode,
            chunk_tokens=train.chunk_tokens,
            reference=self.models.reference(mode),
            lora=train.lora is not None,
            cache=FeatureStore(self.out / WORK / "features") if frozen_vision else None,
        )
        phases = pooled.planned()

        def load(phase: int, model: PreTrainedModel) -> list[Question]:
            return pooled.load(phase, model, mode)

        steps = PoolSteps(
            phases,
            load,
            lambda phase: self.enter(phases[phase], gated),
            context,
            self.out / WORK / "train",
            questions_per_step=train.questions_per_step,
            tokens_per_device=train.tokens_per_device,
            passes=train.passes,
            seed=self.plan.seed,
            accelerator=self.accelerator,
        )
        log = self.fit(student, steps)
        self.finish(student, log, pooled, gated, phases)

    def enter(self, phase: Phase, gated: list[Gated]) -> list[FrozenModel]:
        """The teachers of a phase under their masks; none where no term of the loss reads them."""
        if not self.plan.objective.switches.needs_teacher:
            return []
        if phase.teacher != ALL_TEACHERS:
            return [self.models.frozen(phase.teacher, phase.ratio)]
        return [self.models.frozen(number, each.r_max) for number, each in enumerate(gated)]

    def fit(self, student: Any, steps: PoolSteps) -> loop.Log:
        train = self.plan.train
        settings = Optimizing(
            lr=train.lr,
            optimizer=train.optimizer,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            weight_decay=train.weight_decay,
            clip=train.clip,
        )
        if self.plan.train.trackers:
            self.accelerator.init_trackers(self.plan.name, config={"recipe": self.plan.sha256})
        bar = _Bar(self.console, "train")
        return loop.fit(
            student,
            steps,
            settings,
            self.out / WORK / "train",
            accelerator=self.accelerator,
            save_every=train.save_every,
            validate=self.validate if self.validation is not None else None,
            validate_every=train.validate_every,
            patience=train.patience,
            processor=self.models.encoder.processor,
            norms_every=NORMS_EVERY,
            seed=self.plan.seed,
            progress=bar.figures,
            warn=lambda sign: self.say(f"warning: {sign}"),
        )

    def validate(self, student: PreTrainedModel, step: int) -> float:
        """Share of validation questions answered right by the samples' own rules, greedily."""
        assert self.validation is not None
        engine = HfEngine(student, self.models.encoder, rows_per_batch=16)
        scores = self.scores(engine, list(self.validation))
        return sum(scores) / len(scores)

    # --- the end ------------------------------------------------------

    def finish(
        self, student: Any, log: loop.Log, pooled: Pooling, gated: list[Gated], phases: list[Phase]
    ) -> None:
        """Write metrics, then the checkpoint: the best one on validation, or the last without validation."""
        if self.main:
            files.write_json(self.out / METRICS, self.metrics(student, log, pooled, gated, phases))
        if checkpoints.validations(log):
            if self.main:
                (self.out / WORK / "train" / loop.BEST).replace(self.out / STUDENT)
        else:
            processor = self.models.encoder.processor
            checkpoints.write_model(self.out / STUDENT, self.accelerator, Learner(student), processor)
        self.accelerator.wait_for_everyone()
        if self.main:
            checkpoints.forget(self.out / WORK / "train")
            self.console.print(pool_statistics.table(_lines(self.out)))

    def metrics(
        self, student: Any, log: loop.Log, pooled: Pooling, gated: list[Gated], phases: list[Phase]
    ) -> dict[str, Any]:
        """What a reader of the run wants to know, JSON-ready."""
        values = checkpoints.validations(log)
        step, value = max(values, key=lambda pair: (pair[1], -pair[0])) if values else (len(log) - 1, None)
        return {
            "name": self.plan.name,
            "recipe_sha256": self.plan.sha256,
            "processes": self.accelerator.num_processes,
            "parameters": sum(p.numel() for p in student.parameters()),
            "phases": [asdict(phase) for phase in phases],
            "gates": [
                {
                    "teacher": each.teacher,
                    "r_max": each.r_max,
                    "inert": each.inert,
                    "curve": [[p.ratio, p.accuracy, p.sparsity] for p in each.curve],
                }
                for each in gated
            ],
            "sharing": self.models.reasons,
            "skipped": pooled.skipped,
            "validation": {"step": step, "accuracy": value, "all": values},
            "tokens": sum(entry["tokens"] for entry in log),
            "pool": [asdict(line) for line in _lines(self.out)],
            "warnings": [asdict(sign) for sign in warnings.Watch().new(log)],
            "log": log,
        }


class _Bar:
    """A progress bar of its own for one long stage; without a terminal, a line now and then."""

    SECONDS = 30.0

    def __init__(self, console: Console, title: str) -> None:
        self.console, self.title = console, title
        self._progress: Progress | None = None
        self._task: Any = None
        self._quiet_until = time.monotonic() + self.SECONDS

    def __call__(self, done: int, total: int, shown: str = "") -> None:
        if not self.console.is_terminal:
            if time.monotonic() > self._quiet_until or done == total:
                self._quiet_until = time.monotonic() + self.SECONDS
                self.console.print(f"  {self.title} {done}/{total}  {shown}", highlight=False)
            return
        if self._progress is None:
            self._progress = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("[dim]{task.fields[figures]}[/dim]"),
                console=self.console,
                transient=True,
            )
            self._progress.start()
            self._task = self._progress.add_task(self.title, total=total, figures="")
        self._progress.update(self._task, completed=done, total=total, figures=shown)
        if done >= total:
            self._progress.stop()

    def figures(self, done: int, total: int, entry: dict[str, float]) -> None:
        """For training: a step's figures beside the bar."""
        wanted = ("loss", "r_acc", "divergence", "validation", "tokens_per_second", "mfu")
        self(done, total, "  ".join(f"{name} {entry[name]:.4g}" for name in wanted if name in entry))


def _greedy(engine: Any, samples: list[Any], encoder: Any, plan: Recipe) -> dict[str, float]:
    """Sample id -> score of the greedy answer by the sample's rule; a refused sample scores 0."""
    sampling = Sampling(max_new_tokens=plan.pool.sampling.max_new_tokens, greedy=True)
    drawn = engine.draw(samples, 1, sampling, 0, refuse=lambda place, error: None)
    asked = [(sample, some[0]) for sample, some in zip(samples, drawn, strict=True) if some]
    references = {sample.id: Reference(sample.answer or "", False, 1.0) for sample in samples}
    answered = [Response(one.ids, {"greedy": 1}, None) for _, one in asked]
    right = correct([s for s, _ in asked], answered, Rule(), references=references, text=encoder.text)
    return {sample.id: 0.0 for sample in samples} | {s.id: r for (s, _), r in zip(asked, right, strict=True)}


def _gathered(accelerator: Accelerator, ids: list[str], found: dict[str, float]) -> list[float]:
    """Every process's scores, in the order of `ids`."""
    if accelerator.num_processes == 1:
        return [found[key] for key in ids]
    values = processes.sums(accelerator, {f"{n:08d}": found.get(key, 0.0) for n, key in enumerate(ids)})
    return [values[f"{n:08d}"] for n in range(len(ids))]


def _lines(out: Path) -> list[pool_statistics.Line]:
    """Pool statistics of every phase, in order."""
    paths = sorted((out / WORK / "statistics").glob("phase-*.json"), key=lambda p: int(p.stem.split("-")[1]))
    return [pool_statistics.Line(**line) for path in paths for line in files.read_json(path)]
