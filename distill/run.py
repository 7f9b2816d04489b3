"""One distillation from recipe to checkpoint: `pocketvlm distill`, and every arm of `pocketvlm ablate`.

In: a recipe, an output directory; Accelerate's environment where several processes run it. Out:

    student/            the distilled checkpoint: for AutoModelForImageTextToText and AutoProcessor
    metrics.json        what was chosen, drawn, learned and measured, and what each stage cost
    skipped.jsonl       the training samples that could not be used, and why
    judge-audit.jsonl   where a model judges: its verdicts on labelled questions, for `pocketvlm judge-audit`
    ledger.jsonl        seconds, tokens, bytes and peak memory of every stage
    work/               gate, pools, verdicts, training states: what resuming needs

    check -> gate -> pool -> train (each phase: student answers, judge, teacher signal, steps) -> write

Not here: the stages themselves. Run again after any interruption: what was finished is not repeated.
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import transformers
from accelerate import Accelerator
from rich.console import Console
from transformers import PreTrainedModel

from distill import checks, metrics, recipe
from distill.account import Account
from distill.answers import pool_statistics, pooling
from distill.answers.answering import Answering, Judging
from distill.answers.pooling import Pooling
from distill.forward.feature_store import FeatureStore
from distill.gating import Gating
from distill.inputs import questions
from distill.inputs.data import open_data
from distill.losses.kept_signal import KeptTeachers
from distill.losses.signals import Signals
from distill.masks import teachers
from distill.masks.teachers import ALL_TEACHERS, Gated, Phase
from distill.models import Models
from distill.recipe import Recipe
from distill.training import checkpoints, loop, processes
from distill.training.batches import Question
from distill.training.learner import Learner
from distill.training.optim import Optimizing
from distill.training.parts import Context, FrozenModel
from distill.training.steps import PoolSteps
from evals.stage_bar import StageBar
from runtime import files

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
        finished = (out / STUDENT).exists()
        accelerator.wait_for_everyone()
        if finished and until is None:
            if main:
                _tidy(out)
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
        self.plan, self.out, self.work, self.shared = plan, out, out / WORK, shared
        self.accelerator, self.console, self.main = accelerator, console, accelerator.is_main_process
        self.account = Account(out / "ledger.jsonl", main=self.main, say=self._tell_stage)
        checks.check(plan)
        self.train = open_data(plan.data.train, seed=plan.seed)
        held_out = plan.data.validation
        self.validation = open_data(held_out, name="validation", seed=plan.seed) if held_out else None
        self.order = questions.order(self.train, plan.seed, plan.data.together, limit)
        self.models = Models(plan, accelerator, questions.example(self.train, self.order))
        self.answering = Answering(plan, self.models, accelerator, self.work, self.say)
        self.judging = Judging(plan, self.models, self.answering, accelerator)
        self.gating = Gating(
            plan, shared, self.validation, self.models, self.answering, accelerator, self.say
        )
        self.signals = Signals(plan, self.models, accelerator, self.account, self.work / "signal", self.bar)

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def _tell_stage(self, name: str, seconds: float) -> None:
        self.console.print(f"[green]{name:10}[/green] [dim]{seconds:.0f} s[/dim]", highlight=False)

    def bar(self, title: str) -> StageBar:
        """A line that tells how far a long stage is: (done, total)."""
        return StageBar(self.console, title)

    # --- stages -------------------------------------------------------

    def run(self, until: str | None) -> Path:
        with self.account.stage("gate"):
            gated = [self.gating.gate(number) for number in range(len(self.plan.teachers))]
        for each in gated if self.main else ():
            if each.curve:
                self.console.print(each.table())
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
            self.account,
            self.bar,
        )
        pooled.draw_teachers()
        if until == "pool":
            return self.out
        if self.main:
            self.answering.forget_served()
        planned = pooled.planned()
        if pooled.skipped:
            self.say(f"{len(pooled.skipped)} samples are skipped: {self.out / pooling.SKIPPED}")
        student = self.models.student()
        with self.account.stage("train", lambda: {"tokens": sum(entry["tokens"] for entry in self.log)}):
            self.log = self.learn(student, pooled, gated, planned)
        self.finish(student, pooled, gated, planned)
        return self.out / STUDENT

    log: loop.Log

    def learn(self, student: Any, pooled: Pooling, gated: list[Gated], phases: list[Phase]) -> loop.Log:
        """Train over all phases."""
        train, switches = self.plan.train, self.plan.objective.switches
        if self.plan.signal.visual_keep == 1:  # else a tree is needed, whatever it costs
            self.models.shape = pooled.shape()
        mode = self.models.student_mode(student)
        for line in self.models.fallbacks():
            self.say(f"no shared tree for {line}")
        context = Context(
            self.models.encoder,
            switches,
            sharing=mode,
            chunk_tokens=train.chunk_tokens,
            reference=self.models.reference(mode),
            lora=train.lora is not None,
            cache=FeatureStore(self.work / "features") if "vision" in train.freeze else None,
            visual_keep=self.plan.signal.visual_keep,
        )
        asked: list[Question] = []

        def load(phase: int, model: PreTrainedModel) -> list[Question]:
            asked[:] = pooled.load(phase, model, mode)
            return list(asked)

        def enter(phase: int) -> list[FrozenModel] | KeptTeachers:
            return self.enter(phase, phases[phase], gated, asked)

        steps = PoolSteps(
            phases,
            load,
            enter,
            context,
            self.work / "train",
            questions_per_step=train.questions_per_step,
            tokens_per_device=train.tokens_per_device,
            passes=train.passes,
            seed=self.plan.seed,
            teacher_weights=self.gating.weights(gated, self.plan.seed),
            accelerator=self.accelerator,
        )
        return self.fit(student, steps, mode)

    def enter(
        self, number: int, phase: Phase, gated: list[Gated], asked: list[Question]
    ) -> list[FrozenModel] | KeptTeachers:
        """The teachers of a phase under their masks, or their signal; none where no term of the loss reads
        them."""
        if not self.plan.objective.switches.needs_teacher:
            return []
        taught = [(phase.teacher, phase.ratio)]
        if phase.teacher == ALL_TEACHERS:
            taught = [(number, each.r_max) for number, each in enumerate(gated)]
        if self.plan.signal.kind == "live":
            return [self.models.frozen(teacher, ratio) for teacher, ratio in taught]
        return self.signals.of(number, taught, asked)

    def fit(self, student: Any, steps: PoolSteps, mode: str) -> loop.Log:
        train = self.plan.train
        settings = Optimizing(
            lr=train.lr,
            optimizer=train.optimizer,
            schedule=train.schedule,
            warmup_steps=train.warmup_steps,
            weight_decay=train.weight_decay,
            clip=train.clip,
        )
        if train.trackers:
            self.accelerator.init_trackers(self.plan.name, config={"recipe": self.plan.sha256})
        validate: Callable[[PreTrainedModel, int], float] | None = None
        if self.validation is not None:
            validate = lambda model, step: self.gating.validate(model, mode)  # noqa: E731
        return loop.fit(
            student,
            steps,
            settings,
            self.work / "train",
            accelerator=self.accelerator,
            save_every=train.save_every,
            validate=validate,
            validate_every=train.validate_every,
            patience=train.patience,
            processor=self.models.encoder.processor,
            norms_every=NORMS_EVERY,
            seed=self.plan.seed,
            console=self.console,
        )

    # --- the end ------------------------------------------------------

    def finish(self, student: Any, pooled: Pooling, gated: list[Gated], phases: list[Phase]) -> None:
        """Write metrics, then the checkpoint: the best one on validation, or the last without validation."""
        if self.main:
            facts = metrics.collect(
                self.plan,
                self.log,
                phases,
                gated,
                processes=self.accelerator.num_processes,
                parameters=sum(p.numel() for p in student.parameters()),
                sharing=self.models.reasons,
                skipped=pooled.skipped,
                pool=pooling.statistics(self.out),
                signal=self.signals.report(self.log),
                stages=self.account.sums(),
            )
            files.write_json(self.out / METRICS, facts)
        if checkpoints.validations(self.log):
            if self.main:
                (self.work / "train" / loop.BEST).replace(self.out / STUDENT)
        else:
            processor = self.models.encoder.processor
            checkpoints.write_model(self.out / STUDENT, self.accelerator, Learner(student), processor)
        self.accelerator.wait_for_everyone()
        if self.main:
            _tidy(self.out)
            self.console.print(pool_statistics.table(pooling.statistics(self.out)))


def _tidy(out: Path) -> None:
    """What only a run that goes on needs, and is large: training states, features, teacher signal."""
    checkpoints.forget(out / WORK / "train")
    for name in ("features", "signal"):
        shutil.rmtree(out / WORK / name, ignore_errors=True)
