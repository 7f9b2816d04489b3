"""What the verb `eval` does: task, models, variants and parity from the command line's words.

In: paths and names. Out: the files written. Not here: options (`pocketvlm.py`), asking (`eval_run.py`),
parity (`evals/parity/parity_run.py`), variants (`evals/variants/variants.py`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from evals.asking import eval_judge, eval_layouts, eval_run, subjects
from evals.asking.eval_results import EvalResults
from evals.asking.subjects import Model
from evals.parity import parity_run
from evals.parity.parity_results import ParityResults
from evals.stage_bar import StageBar
from evals.tasks.catalogue import open_task
from evals.tasks.question import Task
from evals.variants import brittleness, variants
from runtime.errors import InputError

PARITY_QUESTIONS = 100
"""Parity keeps a vocabulary's logits for every token, so it takes fewer questions unless told otherwise."""


@dataclass(frozen=True)
class Request:
    """The verb's options; None is its default."""

    models: Sequence[Path]
    task: str
    teachers: Sequence[Path] = ()
    split: str | None = None
    kind: str | None = None
    limit: int | None = None
    scorer: str | None = None
    max_new_tokens: int | None = None
    images: Path | None = None
    variants: str | None = None
    parity: bool = False
    judge: str | None = None
    judge_model: str | None = None
    threads: int | None = None
    command: str = ""


@dataclass(frozen=True)
class Done:
    """What was found, and the files that hold it."""

    evaluation: EvalResults
    parity: ParityResults | None
    files: list[Path]

    @property
    def printed(self) -> list[Path]:
        """eval.json, and parity.json where it was asked for."""
        return [path for path in self.files if path.name in ("eval.json", "parity.json")]


def summary(done: Done) -> dict[str, Any]:
    """What `--json` prints: scores, changes, losses under variants, parity, what is missing, the files."""
    found = done.evaluation
    return {
        "files": [str(path) for path in done.files],
        "task": found.task.model_dump(mode="json"),
        "summaries": [one.model_dump(mode="json") for one in found.summaries],
        "changes": [one.model_dump(mode="json") for one in found.changes],
        "losses": [dataclasses.asdict(one) for one in brittleness.losses(found)],
        "parity": [one.model_dump(mode="json") for one in done.parity.candidates] if done.parity else [],
        "missing": [one.model_dump(mode="json") for one in found.missing],
    }


def run(request: Request, out: Path | None, console: Console, require: Callable[[Model], None]) -> Done:
    """Ask, score, compare, and write everything under `out` (default `eval-TASK`).

    `require` complains about a model whose library is not installed, before anything runs. Raises
    InputError and what `eval_run.run` and `parity_run.run` raise.
    """
    judge = _judge(request)
    if request.parity and len(request.models) < 2:
        raise InputError("--parity: wanted a checkpoint and what to hold against it; name a bundle, too")
    models = subjects.describe_all([*request.models, *request.teachers])
    for model in models:
        require(model)
    task = open_task(
        request.task,
        split=request.split,
        kind=request.kind,
        limit=request.limit,
        scorer=request.scorer,
        max_new_tokens=request.max_new_tokens,
        images=request.images,
    )
    folder = out or Path(f"eval-{task.name}")
    chosen = variants.parse(request.variants, task) if request.variants else []
    found = eval_run.run(
        models,
        task,
        folder,
        variants=[(variant, variants.apply(task, variant)) for variant in chosen],
        settings=eval_run.Settings(
            teachers=frozenset(model.name for model in models[len(request.models) :]),
            judge=judge,
            threads=request.threads,
            missing=tuple(variants.missing(task)) if request.variants else (),
        ),
        command=request.command,
        progress=_Bars(console),
    )
    written = [folder / "eval.json", *eval_layouts.write(found, task, folder)]
    parity = _parity(request, models, task, folder, console) if request.parity else None
    if parity is not None:
        written.insert(1, folder / "parity.json")
    return Done(found, parity, written)


def _judge(request: Request) -> eval_judge.Settings | None:
    if (request.judge is None) != (request.judge_model is None):
        raise InputError("--judge and --judge-model: wanted both, the server's address and its model's name")
    if request.judge is None or request.judge_model is None:
        return None
    return eval_judge.Settings(request.judge, request.judge_model)


def _parity(
    request: Request, models: Sequence[Model], task: Task, folder: Path, console: Console
) -> ParityResults:
    """The given models against the first of them; teachers are other models and stay out."""
    own = models[: len(request.models)]
    asked = task if request.limit else parity_run.spread(task, PARITY_QUESTIONS)
    console.print(f"eval: parity over {len(asked.questions)} questions", highlight=False)
    return parity_run.run(
        own[0],
        own[1:],
        asked,
        folder / "parity.json",
        settings=parity_run.Settings(threads=request.threads),
        command=request.command,
        progress=_Bars(console),
    )


class _Bars:
    """A bar for each model."""

    def __init__(self, console: Console) -> None:
        self._console, self._name = console, ""
        self._bar: StageBar | None = None

    def __call__(self, what: str, done: int, total: int) -> None:
        if what != self._name or self._bar is None:
            self._name, self._bar = what, StageBar(self._console, f"eval: {what}")
        self._bar(done, total)
