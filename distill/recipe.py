"""The recipe of a distillation, as data: models, data, pool, judge, objective, training.

In: a YAML file and `key=value` overrides. Out: a `Recipe`, its hash, and the claim of an output directory.
Not here: the sections (`distill/settings.py`); doing it; the demo's recipe (`demo/demo_recipe.py`); what a
checkpoint on disk really is (`distill/checks.py`). Paths are relative to the directory a command runs in.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, model_validator

from distill import strict
from distill.settings import (
    Data,
    Engine,
    Gate,
    Hf,
    Judge,
    Lora,
    Mask,
    Model,
    ModelJudge,
    ObjectiveSettings,
    OpenAI,
    Pool,
    RuleJudge,
    SamplingSettings,
    Served,
    SignalSettings,
    Source,
    Student,
    Teacher,
    Throughput,
    Train,
)
from distill.strict import Count, Strict
from runtime import files
from runtime.errors import InputError

__all__ = [
    "MAY_CHANGE",
    "RECIPES",
    "Data",
    "Engine",
    "Gate",
    "Hf",
    "Judge",
    "Lora",
    "Mask",
    "Model",
    "ModelJudge",
    "ObjectiveSettings",
    "OpenAI",
    "Pool",
    "Recipe",
    "RuleJudge",
    "SamplingSettings",
    "Served",
    "SignalSettings",
    "Source",
    "Student",
    "Teacher",
    "Throughput",
    "Train",
    "claim",
    "read",
]

RECIPES = Path(__file__).parent / "recipes"
MAY_CHANGE = (
    "train.trackers",
    "train.save_every",
    "train.validate_every",
    "train.tokens_per_device",
    "train.chunk_tokens",
    "train.gradient_checkpointing",
    "throughput",
    *(
        f"{engine}.{key}"
        for engine in ("pool.engine", "pool.student_engine", "judge")
        for key in ("concurrency", "timeout_seconds", "retries", "url")
    ),
)
"""What a resumed run may set anew: how often to save, what fits into memory, how hard to try a server.
None of it changes what is learned beyond the rounding of a sum."""


class Recipe(Strict):
    name: Annotated[str, Field(pattern=r"^[\w.+-]+$")]
    seed: Count = 0
    student: Student
    teachers: Annotated[tuple[Teacher, ...], Field(min_length=1)]
    data: Data
    pool: Pool = Pool()
    judge: Judge = RuleJudge()
    objective: ObjectiveSettings = Field(default_factory=ObjectiveSettings)
    signal: SignalSettings = SignalSettings()
    train: Train = Train()
    throughput: Throughput = Throughput()

    @model_validator(mode="after")
    def _check(self) -> Recipe:
        _check_teachers(self)
        _check_responses(self)
        _check_servers(self)
        _check_validation(self)
        return self

    @property
    def sha256(self) -> str:
        """Hash of everything that decides what is learned: without the keys that a resumed run may change."""
        return files.sha256_json(strict.without(self.model_dump(mode="json"), MAY_CHANGE))


def _check_teachers(recipe: Recipe) -> None:
    masks = [(i, teacher.mask) for i, teacher in enumerate(recipe.teachers) if teacher.mask is not None]
    settings = recipe.objective
    if settings.restores == "never" and not (masks and all(not mask.restore for _, mask in masks)):
        raise ValueError(
            f"objective.preset: {settings.preset} has a pruned teacher that is never restored; give every "
            "teacher mask: {r_max: ..., restore: false}"
        )
    if settings.together != "one" and len(recipe.teachers) < 2:
        raise ValueError(
            f"objective: several teachers act at once ({settings.together}), the recipe has one; "
            "add a teacher or set objective.teachers: one"
        )
    if settings.together != "one" and not sum(teacher.weight for teacher in recipe.teachers):
        raise ValueError("teachers: every weight is 0; one must be above 0")
    if settings.together != "one" and any(mask.restore for _, mask in masks):
        raise ValueError(
            f"teachers.{masks[0][0]}.mask: teachers that act at once have no growth order to restore them "
            "in; set mask: null, or restore: false"
        )


def _check_responses(recipe: Recipe) -> None:
    pool, switches = recipe.pool, recipe.objective.switches
    total = pool.teacher_responses + pool.student_responses
    if total == 0:
        raise ValueError(
            "pool: teacher_responses and student_responses are both 0: there is nothing to learn"
        )
    if switches.rl and total < 2:
        raise ValueError(
            "pool: one response a question has no advantage (METHOD 5: R minus the mean of its group); "
            "raise teacher_responses or student_responses, or set objective.change.rl: 0"
        )
    unlabelled = [source.name for source in recipe.data.train if source.labels != "all"]
    if unlabelled and not pool.teacher_responses:
        raise ValueError(
            f"data: {unlabelled[0]} hides labels, and the pseudo label is the teacher's majority answer; "
            "set pool.teacher_responses above 0 or labels: all"
        )


def _check_servers(recipe: Recipe) -> None:
    pool = recipe.pool
    if isinstance(pool.engine, OpenAI) and pool.engine.url:
        if any(teacher.mask for teacher in recipe.teachers) and pool.teacher_responses:
            raise ValueError(
                "pool.engine: the server at url has one fixed set of weights, a masked teacher has one "
                "for each ratio; give command instead of url, or mask: null"
            )
        if len(recipe.teachers) > 1 and pool.teacher_responses:
            raise ValueError(
                "pool.engine: one url cannot serve several teachers; give command instead of url"
            )
        if pool.student_engine is None and pool.student_responses:
            raise ValueError(
                "pool.engine: url serves the teacher; give the student a student_engine of its own"
            )
    student = pool.engine_of_student
    fixed = isinstance(student, OpenAI) and student.url is not None
    if fixed and pool.student_responses and pool.student_refresh == "stage":
        raise ValueError(
            "pool.student_engine: the server at url keeps the weights it has, the student's change with "
            "every stage; give command, or student_refresh: never"
        )


def _check_validation(recipe: Recipe) -> None:
    if recipe.data.validation:
        return
    gated = [i for i, teacher in enumerate(recipe.teachers) if teacher.mask and teacher.mask.gate]
    if gated:
        raise ValueError(
            f"teachers.{gated[0]}.mask.gate: a gate answers validation questions and data.validation "
            "is empty; give validation data, or gate: null with r_max as a number"
        )
    if recipe.train.patience is not None:
        raise ValueError("train.patience: an early stop needs data.validation")


def read(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read a recipe; `overrides` are `key.path=value` settings on top of it.

    A name without a directory that is no file is looked up among the recipes that ship with the package.
    Raises InputError, one line, naming the file and the key.
    """
    shipped = {each.stem: each for each in sorted(RECIPES.glob("*.yaml")) if each.stem != "demo"}
    if not path.is_file() and str(path) in shipped:
        path = shipped[str(path)]
    if not path.is_file():
        raise InputError(f"{path}: there is no such recipe file; those that ship: {', '.join(shipped)}")
    raw: dict[str, Any] = strict.override(strict.load_yaml(path), overrides)
    return strict.validate(Recipe, raw, path)


def claim(out: Path, recipe: Recipe, *, limit: int | None = None) -> None:
    """Mark `out` as this recipe's (and of a run cut to `limit` questions), or check that it is.

    Raises StateError with the differences; keys in MAY_CHANGE may differ and are written anew.
    """
    claimed = recipe.model_dump(mode="json")
    if limit is not None:
        claimed["limit"] = limit
    strict.claim(out, claimed, MAY_CHANGE)
