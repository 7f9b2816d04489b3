"""`pocketvlm eval --parity`: bundles against their checkpoint, preprocessing first.

In: a reference, candidates, questions. Out: `ParityResults`, also written to parity.json.
Not here: one case (`parity_side.py`), the figures (`parity_figures.py`), tasks (`evals/tasks/`).

One model is open at a time. The reference's logits are kept on disk until every candidate was held against
them (a float32 per vocabulary entry and forced token); a candidate's rows are a few numbers a position. A run
that was killed goes on with the next case: rows are sealed one by one, under a key of everything they
depend on.
"""

from __future__ import annotations

import gc
import itertools
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

from evals.asking.subjects import Model
from evals.bench import emulation
from evals.parity import parity_figures, parity_results
from evals.parity.parity_results import Asked, Candidate, Forced, Numerics, ParityResults, Reference
from evals.parity.parity_side import Kept, Row, Seen, hold, keep
from evals.results import Missing
from evals.tasks.question import Question, Task
from runtime import files
from runtime.errors import BundleError, InputError, PocketError
from runtime.installation import ONNXRUNTIMES, installed, onnxruntime_package, program_version
from runtime.providers import EVALUATOR

ROWS_VERSION = 1
"""Raise it with any change of what a row or a kept file holds."""
MAX_TOKENS = 32
PACKAGES = (*("torch", "transformers", *ONNXRUNTIMES, "llama-cpp-python", "coremltools", "numpy", "pillow"),)


class Progress(Protocol):
    """Told of every case: the model, how many cases it has done, of how many."""

    def __call__(self, what: str, done: int, total: int) -> None: ...


@dataclass(frozen=True)
class Settings:
    """What is asked: at most `max_tokens` forced tokens a text, `labels` or only the reference's answers."""

    max_tokens: int = MAX_TOKENS
    labels: bool = True
    threads: int | None = None


def run(
    reference: Model,
    candidates: Sequence[Model],
    task: Task,
    out: Path,
    *,
    settings: Settings | None = None,
    command: str = "",
    progress: Progress | None = None,
) -> ParityResults:
    """Hold every candidate against the reference and write `out`; the same call resumes.

    A candidate that cannot be measured is in the file with its error; the others go on. Raises InputError
    without questions or without a candidate beside the reference, and what opening the reference raises.
    """
    options = settings or Settings()
    candidates = [one for one in candidates if one.path.resolve() != reference.path.resolve()]
    if not task.questions:
        raise InputError(f"{task.name}: has no questions; give a task with some")
    if not candidates:
        raise InputError(f"--parity: only {reference.path} was given; name a bundle to compare with it")
    work = _Work(out, reference, task, options, progress)
    with files.lock(work.root):
        files.remove_stale(work.root)
        backend = work.ask_reference(candidates)
        found = [work.candidate(one) for one in candidates]
        results = ParityResults(
            schema=parity_results.SCHEMA,
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            version=program_version(),
            command=command,
            packages=_packages(),
            reference=_reference(reference, backend),
            asked=Asked(
                source=f"{task.name}, {task.split}",
                data_sha256=task.sha256,
                cases=len(task.questions),
                groups=len({one.group for one in task.questions}),
                max_tokens=options.max_tokens,
            ),
            candidates=found,
            missing=_missing(found, options),
        )
        parity_results.write(results, out)
        work.forget_reference()
    return results


def spread(task: Task, most: int) -> Task:
    """At most `most` questions over as many images as can be: one of each image, evenly, then the next."""
    groups: dict[str, list[int]] = {}
    for place, one in enumerate(task.questions):
        groups.setdefault(one.group, []).append(place)
    kept: list[int] = []
    for turn in itertools.zip_longest(*groups.values()):
        row = [place for place in turn if place is not None]
        room = most - len(kept)
        kept += row if len(row) <= room else [row[i * len(row) // room] for i in range(room)]
    return replace(task, questions=tuple(task.questions[place] for place in sorted(kept)))


class _Work:
    """The run's own directory beside its result: what the reference did, and a row per candidate and case."""

    def __init__(
        self, out: Path, reference: Model, task: Task, options: Settings, progress: Progress | None
    ) -> None:
        asked = [task.sha256, options.max_tokens, options.labels]
        key = files.sha256_json([ROWS_VERSION, reference.sha256, *asked, _packages()])
        self.root = out.parent / f"{out.stem}.work"
        self.here = self.root / key[:16]
        self.reference, self.task, self.options, self.progress = reference, task, options, progress

    @property
    def kept(self) -> Path:
        return self.here / "reference"

    def ask_reference(self, candidates: Sequence[Model]) -> str:
        """The reference on every case that some candidate has not been held against; what it ran on."""
        told = self.here / "backend.json"
        lacking = [
            (number, one)
            for number, one in enumerate(self.task.questions)
            if not self._kept(number).exists()
            and any(not self._row(model, number).exists() for model in candidates)
        ]
        if not lacking and told.exists():
            return str(files.read_json(told))
        with self.reference.open(threads=self.options.threads) as session:
            seen, backend = Seen(session), backend_of(session, self.reference)
            files.write_json(told, backend)
            for done, (number, question) in enumerate(lacking, 1):
                try:
                    kept = keep(
                        seen, question, self.kept, most=self.options.max_tokens, label=self.options.labels
                    )
                except InputError as error:
                    kept = Kept.refused(f"the reference cannot be asked: {error}")
                kept.write(self._kept(number))
                self._tell(self.reference.name, done, len(lacking))
        del session, seen
        gc.collect()
        return backend

    def candidate(self, model: Model) -> Candidate:
        """All its rows, made where they lack, and their figures."""
        lacking = [n for n in range(len(self.task.questions)) if not self._row(model, n).exists()]
        told = self.here / model.sha256[:16] / "backend.json"
        try:
            if lacking or not told.exists():
                self._hold(model, lacking, told)
            every = [files.read_shard(self._row(model, n))[0] for n in range(len(self.task.questions))]
            rows = [row for row in every if "failed" not in row]
            if not rows:
                raise InputError(f"question {every[0]['id']}: {every[0]['failed']}")
            facts, figures = files.read_json(told), self._figures(rows)
            figures["failed"] = len(every) - len(rows)
        except PocketError as error:
            return _candidate(model, self.reference, {"backend": "not run"}, error=str(error))
        return _candidate(model, self.reference, facts, **figures)

    def forget_reference(self) -> None:
        """Delete the logits and pixels: everything was held against them."""
        shutil.rmtree(self.kept, ignore_errors=True)

    def _hold(self, model: Model, lacking: Sequence[int], told: Path) -> None:
        with model.open(threads=self.options.threads) as session:
            seen = Seen(session)
            facts = {"backend": backend_of(session, model), "emulated": emulated_why(session)}
            files.write_json(told, facts)
            for done, number in enumerate(lacking, 1):
                kept = Kept.read(self._kept(number))
                row = _held(seen, self.task.questions[number], kept, self.kept)
                files.write_shard(self._row(model, number), [row])
                self._tell(model.name, done, len(lacking))
        gc.collect()

    def _figures(self, rows: Sequence[Row]) -> dict[str, Any]:
        found: list[Numerics] = []
        names: tuple[Forced, ...] = ("reference-greedy", "label")
        for name in names:
            if having := [row for row in rows if name in row["forced"]]:
                groups = [row["group"] for row in having]
                found.append(parity_figures.numerics(name, [row["forced"][name] for row in having], groups))
        same = [row for row in rows if "same_inputs" in row]
        groups = [row["group"] for row in rows]
        answers = [row["forced"]["reference-greedy"] for row in rows]
        asked = {one.id: one.prompt for one in self.task.questions}
        return {
            "preprocessing": parity_figures.preprocessing(rows),
            "numerics": found,
            "same_inputs": parity_figures.numerics(
                "reference-greedy", [row["same_inputs"] for row in same], [row["group"] for row in same]
            )
            if same
            else None,
            "greedy": parity_figures.greedy(answers, groups),
            "worst": parity_figures.worst(
                [(row["id"], asked[row["id"]], row["forced"]["reference-greedy"]) for row in rows]
            ),
        }

    def _tell(self, name: str, done: int, total: int) -> None:
        if self.progress is not None:
            self.progress(f"parity: {name}", done, total)

    def _kept(self, number: int) -> Path:
        return self.kept / f"{number:06d}.npz"

    def _row(self, model: Model, number: int) -> Path:
        return self.here / model.sha256[:16] / f"{number:06d}.jsonl"


def _held(seen: Seen, question: Question, kept: Kept, pictures: Path) -> Row:
    """The row of a case; `failed` where the model cannot be asked the question.

    Every backend has errors of its own: with another one the model cannot go on.
    """
    try:
        if kept.failed:
            raise InputError(kept.failed)
        return hold(seen, question, kept, pictures)
    except InputError as error:
        return {"id": question.id, "group": question.group, "failed": str(error)}
    except PocketError:
        raise
    except Exception as error:
        first = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise BundleError(f"question {question.id}: {type(error).__name__}: {first}") from error


def backend_of(session: Any, model: Model) -> str:
    """Library, version and execution providers that run a session, as one text."""
    if not model.is_bundle:
        return f"transformers {installed('transformers')}, torch {installed('torch')}, CPU float32"
    used = [report.name for report in session.providers if report.used]
    if EVALUATOR in used:
        return f"pocketvlm's evaluator, numpy {installed('numpy')}"
    library = {"onnx": onnxruntime_package(), "gguf": "llama-cpp-python", "coreml": "coremltools"}[
        model.format
    ]
    return ", ".join([f"{library} {installed(library)}", *used])


def emulated_why(session: Any) -> str:
    """Why the numbers are not those of the device that the format is for; empty when they are."""
    reports = (one for one in getattr(session, "providers", ()) if one.used and one.name == EVALUATOR)
    return next((one.reason for one in reports), "") or emulation.emulated_why() or ""


def _reference(model: Model, backend: str) -> Reference:
    return Reference(
        name=model.name,
        kind="bundle" if model.is_bundle else "checkpoint",
        path=str(model.path),
        format=model.format,
        precision=model.precision,
        sha256=model.sha256,
        backend=backend,
    )


def _candidate(model: Model, reference: Model, facts: dict[str, str], **figures: Any) -> Candidate:
    reason = facts.get("emulated", "")
    return Candidate(
        name=model.name,
        kind="bundle" if model.is_bundle else "checkpoint",
        path=str(model.path),
        format=model.format,
        precision=model.precision,
        backend=facts["backend"],
        sha256=model.sha256,
        same_source=model.source_sha256 == reference.source_sha256,
        emulated=bool(reason),
        emulated_reason=reason,
        **figures,
    )


def _packages() -> dict[str, str]:
    """What computes, with its version: rows of another version are not taken."""
    return {name: version for name in PACKAGES if (version := installed(name))}


def _missing(found: Sequence[Candidate], options: Settings) -> list[Missing]:
    """What a reader may look for and does not find."""
    rows = [Missing(what=one.name, why=one.error) for one in found if one.error]
    rows += [
        Missing(what=f"{one.name}: pixels of some pictures", why=one.preprocessing.why_not_compared)
        for one in found
        if one.preprocessing and one.preprocessing.why_not_compared
    ]
    rows += [
        Missing(what=f"{one.name}: {one.failed} questions", why="could not be asked; they are in no figure")
        for one in found
        if one.failed
    ]
    if not options.labels:
        rows.append(Missing(what="perplexity of the labels", why="only the reference's answers were forced"))
    return rows
