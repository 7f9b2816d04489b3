"""Who answers and who judges in a stage: a model of this process, or a server as long as the stage lasts.

In: models, a recipe's engine. Out: an `Engine` for a teacher under its mask, or for the student as it is.
A server serves a directory: a masked teacher (from the CPU) or the student of a stage is written for it and
deleted after it; no teacher is on a device of this process meanwhile. With a server only the main process
asks; the others get None and wait.
Not here: keeping what is answered (`distill/answers/shards.py`), what a judge is asked (`evals/judge.py`).
"""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedModel

from distill.answers import probe
from distill.answers.engines import Engine, HfEngine, OpenAIEngine
from distill.answers.judging import Judges, Rule, in_process, served
from distill.answers.server import Server
from distill.inputs.encoding import Encoder
from distill.masks.materialised import materialised
from distill.models import Models, Whole
from distill.recipe import ModelJudge, OpenAI, Recipe, Served
from distill.training import checkpoints
from evals.client import Client
from evals.judge import Judge, Messages
from runtime import files
from runtime.errors import InputError, StateError

Say = Callable[[str], None]
SERVED = "served-"


class Answering:
    """Opens engines as the recipe says. `directory` holds server logs and weights written for servers."""

    def __init__(
        self, plan: Recipe, models: Models, accelerator: Accelerator, directory: Path, say: Say
    ) -> None:
        self.plan, self.models, self.accelerator = plan, models, accelerator
        self.directory, self.say = directory, say

    sparsity = 0.0
    """Zeros measured in the teacher that was opened last; known to the main process."""

    @contextlib.contextmanager
    def teacher(self, number: int, ratio: float) -> Iterator[Engine | None]:
        """Teacher `number` under a mask of `ratio`."""
        settings = self.plan.pool.engine
        if not isinstance(settings, OpenAI):
            whole = self.models.whole(number)
            model = whole.at(ratio)
            self.sparsity = _sparsity(whole, ratio)
            yield HfEngine(model, whole.encoder, rows_per_batch=settings.rows, sharing=whole.sharing)
            return
        self.models.free_devices()
        if not self.accelerator.is_main_process:
            yield None
            return
        teacher, name, proof = self.plan.teachers[number], f"teacher-{number}-{ratio:g}", None
        checkpoint, self.sparsity = teacher.checkpoint, 0.0
        with contextlib.ExitStack() as stack:
            if ratio and settings.command is not None:
                whole = self.models.whole(number, on_cpu=True)
                whole.at(ratio)
                self.sparsity = _sparsity(whole, ratio)
                checkpoint = str(stack.enter_context(self._masked(whole, ratio, name)))
                proof = Proof(whole.model, whole.encoder)
            client = stack.enter_context(self.served(settings, checkpoint, name, proof))
            yield OpenAIEngine(client, self.models.reader(teacher))

    @contextlib.contextmanager
    def _masked(self, whole: Whole, ratio: float, name: str) -> Iterator[Path]:
        """A masked teacher as a checkpoint directory, for as long as it is served."""
        assert whole.masker is not None
        self.say(f"writing teacher {whole.number} at mask ratio {ratio:g} for its server")
        teacher = self.plan.teachers[whole.number]
        touches = teacher.mask.touches if teacher.mask else []
        source = f"{teacher.checkpoint} {self.models.identity(whole.number)} {touches}"
        directory = self.directory / f"{SERVED}{name}"
        with materialised(whole.masker, whole.encoder.processor, directory, source, alone=True) as found:
            yield found.path

    @contextlib.contextmanager
    def student(self, model: PreTrainedModel, mode: str, name: str) -> Iterator[Engine | None]:
        """The student with the weights it has now (whole, in this process)."""
        settings = self.plan.pool.engine_of_student
        encoder = self.models.encoder
        if not isinstance(settings, OpenAI):
            yield HfEngine(model, encoder, rows_per_batch=settings.rows, sharing=mode)
            return
        self.models.free_devices()
        if not self.accelerator.is_main_process:
            yield None
            return
        with contextlib.ExitStack() as stack:
            checkpoint = self.plan.student.checkpoint
            if settings.command is not None:
                checkpoint = str(stack.enter_context(self._written(model, encoder, name)))
            client = stack.enter_context(self.served(settings, checkpoint, name, Proof(model, encoder)))
            yield OpenAIEngine(client, encoder)

    @contextlib.contextmanager
    def _written(self, model: PreTrainedModel, encoder: Encoder, name: str) -> Iterator[Path]:
        """The student as a checkpoint directory, for as long as it is served."""
        directory = self.directory / f"{SERVED}{name}"
        with files.new_directory(directory) as temporary:
            checkpoints.without_adapters(model).save_pretrained(temporary)
            encoder.processor.save_pretrained(temporary)
        try:
            yield directory
        finally:
            shutil.rmtree(directory, ignore_errors=True)

    def forget_served(self) -> None:
        """Delete weights that a killed run had written for a server."""
        for left in self.directory.glob(f"{SERVED}*"):
            shutil.rmtree(left, ignore_errors=True)

    @contextlib.contextmanager
    def served(
        self, settings: Served, checkpoint: str, name: str, proof: Proof | None = None, *, images: bool = True
    ) -> Iterator[Client]:
        """A client of a server of `checkpoint`: started here and stopped at the end, or one that runs at
        `url`; after a proof that it serves what it should (`distill/answers/probe.py`)."""
        options: dict[str, Any] = {
            "timeout_seconds": settings.timeout_seconds,
            "retries": settings.retries,
            "concurrency": settings.concurrency,
        }
        with contextlib.ExitStack() as stack:
            if settings.command is None:
                client = Client(settings.url or "", settings.model or checkpoint, **options)
                stack.enter_context(client)
            else:
                log = self.directory / f"server-{name}.log"
                server = Server(settings.command, checkpoint, log, model=settings.model, say=self.say)
                stack.enter_context(server)
                client = stack.enter_context(server.client(**options))
                self.say(f"serving {name} at {server.base_url}, log {log}")
            model, processor = (None, None) if proof is None else (proof.model, proof.encoder.processor)
            record = self.directory / f"probe-{name}.json"
            probe.prove(client, model, processor, record=record, checkpoint=checkpoint, images=images)
            yield client


@dataclass(frozen=True)
class Proof:
    """A model of this process whose weights a server must serve, and how it reads prompts."""

    model: PreTrainedModel
    encoder: Encoder


def _sparsity(whole: Whole, ratio: float) -> float:
    return whole.masker.sparsity if ratio and whole.masker is not None else 0.0


class Judging:
    """Opens the judges of R_acc as the recipe says (METHOD 4): a rule, the full teacher, whatever model
    generated a response, or a server. Verdicts of models are kept in one file and never asked for twice."""

    def __init__(self, plan: Recipe, models: Models, answering: Answering, accelerator: Accelerator) -> None:
        self.plan, self.models, self.answering, self.accelerator = plan, models, answering, accelerator
        self.settings = plan.judge
        self.cache = answering.directory / "verdicts"
        in_here = isinstance(self.settings, ModelJudge) and not self.is_served
        if in_here and accelerator.is_fsdp2:
            raise InputError(
                "judge: a sharded model (FSDP2) cannot judge in its process; give judge.command or "
                "judge.url, or launch with DDP"
            )
        self.rank = accelerator.process_index if in_here else 0
        self.world = accelerator.num_processes if in_here else 1

    @property
    def is_served(self) -> bool:
        """Whether a server judges: one of its own, or the full teacher behind `judge.command`."""
        settings = self.settings
        return isinstance(settings, ModelJudge) and settings.by != "generator" and settings.given

    @contextlib.contextmanager
    def by(self, teacher: int, ratio: float, student: PreTrainedModel, mode: str) -> Iterator[Judges | None]:
        """Judges that may be asked; None where this process has nothing to ask."""
        settings = self.settings
        if not isinstance(settings, ModelJudge):
            yield None
        elif self.is_served:
            self.models.free_devices()
            if not self.accelerator.is_main_process:
                yield None
                return
            by_teacher = settings.by == "teacher"
            checkpoint = self.plan.teachers[teacher].checkpoint if by_teacher else settings.model or ""
            name = f"judge-{teacher}" if by_teacher else "judge"
            with self.answering.served(settings, checkpoint, name, images=False) as client:
                yield self._judge(served(client), self._name(teacher, ratio)[0])
        elif settings.by == "teacher":
            whole = self.models.whole(teacher)
            engine = self._engine(whole.at(0.0), whole.encoder, whole.sharing)
            yield self._judge(in_process(engine, whole.encoder), self._name(teacher, ratio)[0])
        else:
            whole, own = self.models.whole(teacher), self.models.encoder
            names = self._name(teacher, ratio)
            judge = in_process(self._engine(whole.at(ratio), whole.encoder, whole.sharing), whole.encoder)
            itself = in_process(self._engine(student, own, mode), own)
            yield {"teacher": self._judge(judge, names[0]), "student": self._judge(itself, names[1])}

    def known(self, teacher: int, ratio: float) -> Rule | Judges:
        """The same judges after all processes have asked: they read what was found."""
        settings = self.settings
        if not isinstance(settings, ModelJudge):
            return Rule()
        names = self._name(teacher, ratio)
        if settings.by == "generator":
            return {
                "teacher": self._judge(_ask_nothing, names[0]),
                "student": self._judge(_ask_nothing, names[1]),
            }
        return self._judge(_ask_nothing, names[0])

    def _name(self, teacher: int, ratio: float) -> tuple[str, str]:
        """What identifies the judge of teacher's and of student's responses. The student that judges itself
        is another one in every phase; its responses are other ones too."""
        settings = self.settings
        assert isinstance(settings, ModelJudge)
        if settings.by == "server":
            name = settings.model or settings.url or ""  # an address may change, the model may not
            return name, name
        own = f"{self.models.identity(teacher)} r {ratio if settings.by == 'generator' else 0:g}"
        return own, f"student of teacher {teacher} r {ratio:g}" if settings.by == "generator" else own

    def _engine(self, model: PreTrainedModel, encoder: Encoder, mode: str) -> Engine:
        engine = self.plan.pool.engine
        rows = 8 if isinstance(engine, OpenAI) else engine.rows
        return HfEngine(model, encoder, rows_per_batch=rows, sharing=mode)

    def _judge(self, generate: Callable[[list[Messages]], list[str]], name: str) -> Judge:
        return Judge(generate, self.cache, model=name, writer=str(self.accelerator.process_index))


def _ask_nothing(chats: list[Messages]) -> list[str]:
    raise StateError(f"{len(chats)} verdicts are missing although every process has judged; run again")
