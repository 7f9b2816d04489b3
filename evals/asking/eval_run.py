"""`pocketvlm eval --task`: ask models every question of a task, score the answers, write eval.json.

In: models, a task, variants. Out: `EvalResults`, in files that other tools read too.
Not here: reading tasks (`evals/tasks/`), summing up (`evals/asking/eval_summary.py`), judges
(`evals/asking/eval_judge.py`), the harnesses' layouts (`evals/asking/eval_layouts.py`).

One model is open at a time. Answers are kept in sealed shards of CHUNK questions, under a key of the model,
what runs it and everything that was asked: a run that was killed goes on after the last shard, and a question
that changed is asked again. Scores are not kept but computed, so that another scorer asks nobody again.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Literal, Protocol

from evals.asking import eval_judge, eval_results, eval_summary
from evals.asking.eval_results import ORIGINAL, EvalResults, Given, Subject, TaskInfo, Variant
from evals.asking.subjects import Model
from evals.parity.parity_run import backend_of, emulated_why
from evals.results import Missing
from evals.tasks import scoring
from evals.tasks.question import Question, Task, given, image_hashes, picture_sha256
from runtime import files
from runtime.errors import InputError
from runtime.installation import ONNXRUNTIMES, installed, program_version

CHUNK = 64
"""Questions in a shard: what a kill can lose."""
ANSWERS_VERSION = 1
"""Raise it with any change of what a shard holds or how a question is asked."""
PACKAGES = (*("torch", "transformers", *ONNXRUNTIMES, "llama-cpp-python", "coremltools", "numpy", "pillow"),)
RUNS_ON = {
    "onnx": ONNXRUNTIMES,
    "gguf": ("llama-cpp-python",),
    "coreml": ("coremltools",),
    "safetensors": ("torch", "transformers"),
}
"""By a model's format: the packages whose versions an answer may depend on, beside EVERYWHERE."""
EVERYWHERE = ("numpy", "pillow", "tokenizers")
FACTS = "session.json"
"""In a model's folder: what ran it."""
PLAIN = Variant(name=ORIGINAL, family="original", description="the questions as the task has them")
Row = dict[str, Any]


class Progress(Protocol):
    """Told of every answer: what is asked, how many answers there are, of how many."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Settings:
    """`teachers`: names of the models that are teachers. `judge` scores what rules cannot read."""

    teachers: frozenset[str] = frozenset()
    judge: eval_judge.Settings | None = None
    threads: int | None = None
    examples: int = eval_summary.EXAMPLES
    missing: tuple[Missing, ...] = field(default=())


def run(
    models: Sequence[Model],
    task: Task,
    out: Path,
    *,
    variants: Sequence[tuple[Variant, Task]] = (),
    settings: Settings | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> EvalResults:
    """Ask every model the task and its variants, and write `out`/eval.json; the same call resumes.

    `variants`: each with the task as it has it. The first model is the reference of all comparisons. Raises
    InputError without models or questions, when a picture cannot be read, and when a model could not be asked
    anything; StateError when another run uses `out`; what opening a model raises.
    """
    options = settings or Settings()
    if not models or not task.questions:
        raise InputError("eval: wanted at least one model and one question")
    every = [(PLAIN, task), *((v, changed) for v, changed in variants if v.name != ORIGINAL)]
    eval_judge.check(task, options.judge)
    start = time.monotonic()
    with files.lock(out):
        files.remove_stale(out)
        asked = _Asked(out / "work", every, progress)
        answers = [asked.all_of(model, options.threads) for model in models]
        judge = eval_judge.open_judge(options.judge, out / "judge")
        try:
            subjects = [
                _subject(model, options, asked.facts(model), _scored(every, rows, task, judge))
                for model, rows in zip(models, answers, strict=True)
            ]
        finally:
            judge.close()
        results = _results(task, [variant for variant, _ in every], subjects, options, command, start)
        eval_results.write(results, out / "eval.json")
    return results


class _Asked:
    """The run's own directory: answers by model and by what was asked."""

    def __init__(self, root: Path, every: Sequence[tuple[Variant, Task]], progress: Progress | None) -> None:
        self.root, self.progress = root, progress
        pictures = {one.id: image_hashes(one) for one in every[0][1].questions}
        self.chunks = [chunk for variant, task in every for chunk in _chunks(variant, task, pictures)]
        self.total = sum(len(chunk.questions) for chunk in self.chunks)

    def all_of(self, model: Model, threads: int | None) -> dict[tuple[str, str], Row]:
        """Rows by (variant, question), asked where they lack."""
        folder = self._folder(model)
        lacking = [chunk for chunk in self.chunks if not (folder / chunk.name).exists()]
        if lacking:
            self._ask(model, threads, folder, lacking)
            gc.collect()
        found: dict[tuple[str, str], Row] = {}
        for chunk in self.chunks:
            rows = files.read_shard(folder / chunk.name)
            found |= {(chunk.variant, one.id): row for one, row in zip(chunk.questions, rows, strict=True)}
        if all(row["finish"] == "failed" for row in found.values()):
            first = next(iter(found.values()))
            raise InputError(f"{model.path}: no question could be asked; the first: {first['error']}")
        return found

    def _ask(self, model: Model, threads: int | None, folder: Path, lacking: Sequence[_Chunk]) -> None:
        done = self.total - sum(len(chunk.questions) for chunk in lacking)
        with model.open(threads=threads) as session:
            facts = {"backend": backend_of(session, model), "emulated": emulated_why(session)}
            files.write_json(folder / FACTS, facts)
            asker = Asker(session)
            for chunk in lacking:
                rows = []
                for question in chunk.questions:
                    rows.append(asker.ask(question, chunk.max_new_tokens))
                    done += 1
                    if self.progress:
                        self.progress(model.name, done, self.total)
                files.write_shard(folder / chunk.name, rows)

    def facts(self, model: Model) -> dict[str, str]:
        """What ran the model, as of its last sitting."""
        return dict(files.read_json(self._folder(model) / FACTS))

    def _folder(self, model: Model) -> Path:
        """Of a model's answers by these versions of what runs it: eval.json names no others."""
        versions = {name: installed(name) for name in (*RUNS_ON.get(model.format, ()), *EVERYWHERE)}
        return self.root / files.sha256_json([model.sha256, versions])[:16]


@dataclass(frozen=True)
class _Chunk:
    variant: str
    questions: tuple[Question, ...]
    max_new_tokens: int
    name: str


def _chunks(variant: Variant, task: Task, pictures: dict[str, list[str]]) -> Iterator[_Chunk]:
    """The task in pieces whose names follow from what is asked. `pictures`: hashes of the unchanged ones;
    what a variant makes of them follows from its name and description."""
    how = [ANSWERS_VERSION, variant.name, variant.description, task.max_new_tokens]
    for first in range(0, len(task.questions), CHUNK):
        part = task.questions[first : first + CHUNK]
        key = files.sha256_json([*how, [[one.id, one.prompt, pictures[one.id]] for one in part]])
        yield _Chunk(variant.name, part, task.max_new_tokens, f"{key[:24]}.jsonl")


class Asker:
    """A session that is asked questions one after the other; pictures of the last one are kept encoded.

    Every answer starts a fresh sequence, so it does not depend on what was asked before.
    """

    def __init__(self, session: Any) -> None:
        self.session = session
        self._seen: dict[str, Any] = {}

    def ask(self, question: Question, max_new_tokens: int) -> Row:
        """The answer as a shard keeps it. A question that the model cannot take (too long, too many pictures)
        is one with an error; a picture that cannot be read raises InputError."""
        from runtime.generation import GenerationOptions

        options = GenerationOptions(max_new_tokens=max_new_tokens)
        sources = [given(picture) for picture in question.images]
        keys = [picture_sha256(source) for source in sources]
        try:
            pictures = {
                key: self._seen.get(key) or _Encoded(self.session, source)
                for key, source in zip(keys, sources, strict=True)
            }
            self._seen = pictures
            prepared = [pictures[key].prepared for key in keys]
            ids = self.session.prompt_ids(question.prompt, prepared)
            self.session.check_length(ids, 1)
            answer = self.session.complete(ids, [pictures[key].features for key in keys], options)
        except InputError as error:
            return {"answer": "", "finish": "failed", "error": str(error)}
        return {
            "answer": answer.text,
            "finish": answer.finish_reason,
            "tokens": [int(token) for token in answer.token_ids],
        }


class _Encoded:
    """A picture as the session sees it; encoded at first use, after the question was found to fit."""

    def __init__(self, session: Any, source: Any) -> None:
        self.prepared = session.prepare(source)
        self._session, self._features = session, None

    @property
    def features(self) -> Any:
        if self._features is None:
            self._features = self._session.encode_image(self.prepared)
        return self._features


# --- scores -----------------------------------------------------------


def _scored(
    every: Sequence[tuple[Variant, Task]],
    rows: dict[tuple[str, str], Row],
    task: Task,
    judge: eval_judge.Judging,
) -> list[Given]:
    """Every answer with its score, by rule and then by the judge where it is asked."""
    prompts = {one.id: one.prompt for one in task.questions}
    pairs = [(variant.name, one) for variant, changed in every for one in changed.questions]
    texts = [rows[variant, one.id]["answer"] for variant, one in pairs]
    questions = [one for _, one in pairs]
    scored = judge.scores(task.scorer, questions, texts)
    found = []
    for (variant, one), value in zip(pairs, scored, strict=True):
        row = rows[variant, one.id]
        failed = row["finish"] == "failed"
        found.append(
            Given(
                id=one.id,
                variant=variant,
                asked=one.prompt if one.prompt != prompts[one.id] else None,
                answer=row["answer"],
                read=value.read,
                score=0.0 if failed else value.score,
                finish=row["finish"],
                new_tokens=len(row["tokens"]) if "tokens" in row else None,
                error=row.get("error"),
            )
        )
    return found


def _subject(model: Model, options: Settings, facts: dict[str, str], answers: list[Given]) -> Subject:
    kind: Literal["checkpoint", "teacher", "bundle"] = "checkpoint"
    if model.is_bundle or model.name in options.teachers:
        kind = "bundle" if model.is_bundle else "teacher"
    return Subject(
        name=model.name,
        kind=kind,
        path=str(model.path),
        format=model.format,
        precision=model.precision,
        sha256=model.sha256,
        bytes=model.bytes,
        backend=facts["backend"],
        emulated=facts["emulated"],
        answers=answers,
    )


def _results(
    task: Task,
    variants: Sequence[Variant],
    subjects: list[Subject],
    options: Settings,
    command: str,
    start: float,
) -> EvalResults:
    questions = [_question(one) for one in task.questions]
    info = TaskInfo(
        name=task.name,
        format=task.format,
        split=task.split,
        source=task.source,
        data_sha256=task.sha256,
        questions=len(questions),
        available=max(task.available, len(questions)),
        groups=len({one.group for one in questions}),
        scorer=task.scorer,
        rules=scoring.rules_of(task.scorer),
        right_from=scoring.right_from(task.scorer),
        circular=task.circular,
        prompt=task.prompt,
        max_new_tokens=task.max_new_tokens,
        judge=options.judge.model if options.judge else "",
    )
    bare = EvalResults(
        schema=eval_results.SCHEMA,
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        version=program_version(),
        command=command,
        seconds=time.monotonic() - start,
        packages={name: version for name in PACKAGES if (version := installed(name))},
        task=info,
        variants=list(variants),
        questions=questions,
        subjects=subjects,
        summaries=[],
        missing=[*options.missing, *eval_summary.missing(subjects)],
    )
    return bare.model_copy(
        update={
            "summaries": eval_summary.summaries(bare),
            "changes": eval_summary.changes(bare),
            "examples": eval_summary.examples(bare, task, options.examples),
        }
    )


def _question(one: Question) -> eval_results.Question:
    return eval_results.Question(
        id=one.id,
        unit=one.unit,
        group=one.group,
        question=one.question,
        prompt=one.prompt,
        options=list(one.options),
        references=list(one.references),
        category=one.category,
        images=image_hashes(one),
    )
