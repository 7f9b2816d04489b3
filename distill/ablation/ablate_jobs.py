"""The jobs of an ablation, as worker processes run them: a model, a seed's pools, an arm.

In: the ablation's place (directory, recipe, settings). Out: files; a job whose result is there does nothing.
Not here: which jobs and in which order (`distill/ablation/ablate.py`), one run (`distill/run.py`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from distill import jobs, strict
from distill.ablation.ablate_arms import LABELS, Arm, Settings, arms, recipe_of
from distill.recipe import Recipe, Source
from runtime import files

RESULT, DRAWN = "result.json", "drawn.json"
ROWS = 40
"""Pictures that are answered at a time."""


@dataclass(frozen=True)
class Place:
    """Where an ablation lives, and what its jobs need of it."""

    out: Path
    plan: Recipe
    settings: Settings

    def models(self, seed: int) -> dict[str, Path]:
        """Checkpoint of every made model, by name."""
        made = self.settings.made
        return (
            {}
            if made is None
            else {
                name: self.out / "models" / (f"{name}-{seed}" if model.per_seed else name)
                for name, model in made.models.items()
            }
        )

    def recipe(self, arm: Arm, seed: int, rate: float | None) -> Recipe:
        """The recipe of one run: the arm's changes, its seed, its checkpoints."""
        return recipe_of(self.with_models(seed), arm, seed, rate=rate)

    def with_models(self, seed: int) -> Recipe:
        """The recipe with made models in the places of its checkpoints."""
        made, paths = self.settings.made, self.models(seed)
        if made is None:
            return self.plan
        changes = [f"student.checkpoint={paths[made.student]}"]
        changes += [f"teachers.{i}.checkpoint={paths[name]}" for i, name in enumerate(made.teachers)]
        raw = strict.override(self.plan.model_dump(mode="json"), changes)
        return strict.validate(Recipe, raw, "made models")

    @property
    def test(self) -> tuple[Source, ...]:
        return self.settings.test or self.plan.data.validation


def write_processor(place: Place) -> None:
    """Tokenizer and processor of the models that are made here."""
    from distill.ablation import made

    assert place.settings.made is not None
    made.write_processor(place.settings.made, place.out / "models" / made.PROCESSOR)


def make_model(place: Place, name: str, seed: int) -> None:
    """A made model of a seed, and its accuracy on the test questions."""
    from distill.ablation import made

    assert place.settings.made is not None
    target = place.models(seed)[name]
    made.make(place.settings.made, name, seed, place.out / "models" / made.PROCESSOR, target)
    measure(place, target, target.parent / f"{target.name}.json")


def measure(place: Place, checkpoint: Path | str, target: Path) -> None:
    """A checkpoint's accuracy on the test questions, kept in `target`."""
    if not target.exists():
        started = time.process_time()
        right, count = tested(str(checkpoint), place.plan, place.test)
        seconds = time.process_time() - started
        files.write_json(target, {"right": right, "count": count, "cpu_seconds": seconds})
    found = files.read_json(target)
    jobs.report(1, 1, {"accuracy": found["right"] / found["count"]})


def tested(checkpoint: str, plan: Recipe, sources: Sequence[Source]) -> tuple[float, int]:
    """Greedy answers by the questions' own rules: (sum of scores, questions)."""
    from distill import models, recipe
    from distill.answers.engines import HfEngine
    from distill.forward import sharing
    from distill.forward.sampling import Sampling
    from distill.forward.tree import Group
    from distill.inputs.data import open_data
    from distill.inputs.encoding import Encoder
    from evals import scorers

    model = models.load(recipe.Model(checkpoint=checkpoint), "float32").requires_grad_(False)
    encoder = Encoder.load(checkpoint)
    samples = list(open_data(sources, name="test"))
    sampling = Sampling(max_new_tokens=plan.pool.sampling.max_new_tokens, greedy=True)
    mode, _ = sharing.choose(model, encoder, [Group(encoder.encode(samples[0]))], gradients=False)
    drawn = HfEngine(model, encoder, rows_per_batch=ROWS, sharing=mode).draw(samples, 1, sampling, 0)
    return sum(
        scorers.score(sample.scorer, encoder.text(answers[0].ids), sample.answer or "", sample.choices)
        for sample, answers in zip(samples, drawn, strict=True)
    ), len(samples)


def draw_pools(place: Place, names: Sequence[str], seed: int) -> None:
    """The teachers' pools of a seed's arms, one after the other, before arms side by side need them."""
    from distill import run

    known = arms(place.plan, place.settings)
    for done, name in enumerate(names):
        directory = place.out / f"seed-{seed}"
        plan = place.recipe(known[name], seed, None)
        run.run(plan, directory / "pools" / name, console=_quiet(), shared=directory / "shared", until="pool")
        files.write_json(directory / "pools" / name / DRAWN, {"arm": name})
        jobs.report(done + 1, len(names))


def run_arm(place: Place, name: str, seed: int, rate: float | None, directory: Path) -> None:
    """One run: from the recipe to its accuracy on the test questions, in `directory/result.json`."""
    result = directory / RESULT
    if not result.exists():
        files.write_json(result, _run(place, name, seed, rate, directory))
    found = files.read_json(result)
    jobs.report(1, 1, {"accuracy": found["right"] / found["count"]})


def _run(place: Place, name: str, seed: int, rate: float | None, directory: Path) -> dict[str, Any]:
    from distill import run

    started = time.process_time()
    if name == LABELS:
        learned = _labels_only(place, seed, rate, directory)
        checkpoint = directory / run.STUDENT
    else:
        arm = arms(place.plan, place.settings)[name]
        shared = place.out / f"seed-{seed}" / "shared"
        checkpoint = run.run(place.recipe(arm, seed, rate), directory, console=_quiet(), shared=shared)
        learned = _learned(files.read_json(directory / run.METRICS))
    right, count = tested(str(checkpoint), place.plan, place.test)
    return {
        "arm": name,
        "seed": seed,
        "rate": place.plan.train.lr if rate is None else rate,
        "right": right,
        "count": count,
        "cpu_seconds": time.process_time() - started,
        **learned,
    }


def _labels_only(place: Place, seed: int, rate: float | None, directory: Path) -> dict[str, Any]:
    from distill import run
    from distill.ablation import made

    settings = place.settings
    assert settings.made is not None and settings.labels_only is not None
    train = settings.labels_only.model_copy(update={} if rate is None else {"lr": rate})
    source = settings.made.models[settings.made.student].labels
    start, out = place.models(seed)[settings.made.student], directory / run.STUDENT
    found = made.fit_labels(source, train, start, seed + 1, out, directory / "work")
    right, count = tested(str(out), place.plan, place.plan.data.validation)
    return {"tokens": found["tokens"], "steps": train.steps, "validation": right / count}


WATCHED = ("divergence", "r_acc", "r_distill", "zero_variance", "grad_norm")


def _learned(metrics: dict[str, Any]) -> dict[str, Any]:
    """What the report tells of a run: its validation, tokens, means of what it logged, its pool."""
    log = metrics["log"]
    shares = sorted({key for entry in log for key in entry if key.startswith("grad_share")})
    means = {}
    for key in (*WATCHED, *shares):
        values = [entry[key] for entry in log if key in entry]
        if values:
            means[key] = sum(values) / len(values)
    return {
        "tokens": metrics["tokens"],
        "steps": len(log),
        "validation": metrics["validation"]["accuracy"],
        "means": means,
        "gates": metrics["gates"],
        "phases": metrics["phases"],
        "pool": metrics["pool"],
        "warnings": metrics["warnings"],
        "parameters": metrics["parameters"],
    }


def _quiet() -> Console:
    return Console(stderr=True, quiet=True)
