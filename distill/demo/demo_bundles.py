"""The demo's bundles: which there are, what they and their checkpoints answer, how long they take.

In: a finished run's checkpoints and bundles. Out: `work/answers/`, `work/latency.json`.
Not here: exporting (`demo_run.py` is handed the exporter), the report (`demo_report.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

import runtime
from distill import jobs
from distill.demo.demo_recipe import Recipe
from distill.jobs import Job
from evals import accuracy, easy_vqa
from evals.accuracy import AccuracyResult
from evals.bench import latency
from evals.command import require
from evals.easy_vqa import Question
from evals.results import Missing
from runtime import files
from runtime.errors import MissingExtra

GGUF, COREML = "gguf", "coreml"
"""Formats beside ONNX, as `export_all` calls them; each needs an extra of that name."""


def asked(plan: Recipe) -> list[Question]:
    """The test questions that checkpoint and bundles both answer: whole images drawn at random."""
    questions = easy_vqa.load("test")
    order = np.random.default_rng([plan.seed, 6]).permutation(len({q.image_id for q in questions})).tolist()
    rank = {image: place for place, image in enumerate(order)}
    return sorted(questions, key=lambda q: (rank[q.image_id], q.id))[: plan.measure.answers]


def bundle_directories(out: Path, plan: Recipe) -> dict[Path, str]:
    """Every bundle with the student it was made from; of GGUF and Core ML bundles those that are there."""
    found = {
        out / "bundles" / f"{student}-onnx-{precision}": student
        for student in plan.students
        for precision in plan.export.precisions
    }
    more = [*((GGUF, kind) for kind in plan.export.gguf), *((COREML, kind) for kind in plan.export.coreml)]
    return found | {
        path: student
        for student in plan.students
        for to, kind in more
        if (path := out / "bundles" / f"{student}-{to}-{kind}").exists()
    }


def no_gguf() -> str:
    """Why no GGUF bundles can be made here; nothing if they can."""
    return _lacking(GGUF, "gguf", "llama_cpp")


def no_coreml() -> str:
    """Why no Core ML bundles can be made here; nothing if they can."""
    return _lacking(COREML, "coremltools")


def _lacking(extra: str, *modules: str) -> str:
    try:
        require(extra, modules)
    except MissingExtra as error:
        return str(error)
    return ""


def missing(plan: Recipe) -> list[Missing]:
    """Bundles that could not be made, and what is not known of those that were."""
    found = []
    if plan.export.gguf and no_gguf():
        found.append(Missing(what="GGUF bundles", why=no_gguf()))
    if plan.export.coreml and no_coreml():
        found.append(Missing(what="Core ML bundles", why=no_coreml()))
    elif plan.export.coreml:
        why = "their programs were evaluated with numpy: numerics only"
        found.append(Missing(what="Speed of Core ML bundles", why=why))
    return found


def answer_jobs(out: Path, plan: Recipe) -> list[Job]:
    """The chosen students' own `generate`, and their bundles without torch, on the same questions."""
    named = {student: out / student for student in plan.students}
    named.update({directory.name: directory for directory in bundle_directories(out, plan)})
    return [
        Job(name, answer, {"out": out, "plan": plan, "name": name, "directory": directory})
        for name, directory in named.items()
    ]


def answer(out: Path, plan: Recipe, name: str, directory: Path) -> None:
    """Free answers of one checkpoint or bundle, kept in `work/answers/NAME.json`."""
    target = out / "work" / "answers" / f"{name}.json"
    if target.exists():
        return
    with _session(directory) as session:
        accuracy.evaluate(session, asked(plan), progress=jobs.report).write(target)


def agree(out: Path, plan: Recipe, bundle: str, student: str) -> None:
    """A bundle's answers against its checkpoint's; near ties found by replaying what differs."""
    reference = AccuracyResult.read(out / "work" / "answers" / f"{student}.json")
    candidate = AccuracyResult.read(out / "work" / "answers" / f"{bundle}.json")
    with _session(out / student) as session:
        margins = accuracy.split_margins(session, asked(plan), reference, candidate)
    found = accuracy.compare_answers(reference, candidate, margins=margins)
    files.write_text(
        out / "work" / "answers" / f"{bundle}.agreement.json", found.model_dump_json(indent=1) + "\n"
    )


def _session(directory: Path) -> Any:
    if (directory / "manifest.json").exists():
        return runtime.open_bundle(directory, threads=1)
    from evals.torch_session import TorchSession

    return TorchSession(directory)


def measure(out: Path, plan: Recipe) -> None:
    """Time every bundle in fresh processes, interleaved; kept in `work/latency.json`.

    Not Core ML's: here they are evaluated, which says nothing about a device.
    """
    question = asked(plan)[0]
    found = latency.measure_all(
        [path for path in bundle_directories(out, plan) if f"-{COREML}-" not in path.name],
        question.image_path,
        question.question,
        rounds=plan.measure.latency_rounds,
        repeats=plan.measure.latency_repeats,
    )
    files.write_json(out / "work" / "latency.json", [one.model_dump(mode="json") for one in found])
