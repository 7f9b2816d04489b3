"""What to do, as data: a YAML file read strictly into frozen models.

In: a YAML file. Out: a `Recipe` and its hash. Not here: doing it.
An unknown key is an error that names the key and the nearest right one.
"""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from runtime import files
from runtime.errors import InputError, StateError

RECIPES = Path(__file__).parent / "recipes"
Positive = Annotated[int, Field(gt=0)]
Rate = Annotated[float, Field(gt=0, le=1)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Data(_Strict):
    """How many images validate and how many questions carry labels; the rest is unlabelled."""

    validation_images: Positive
    labelled_questions: Positive


class Tokens(_Strict):
    vocab_size: Positive
    special: dict[str, str]


class LabelTraining(_Strict):
    """Supervised training: `images` x `questions` a step, learning rate `lr` of AdamW at its peak."""

    steps: Positive
    images: Positive
    questions: Positive
    lr: Rate


class Teacher(_Strict):
    sizes: dict[str, dict[str, int]]
    train: LabelTraining


class Masks(_Strict):
    """Ratios of the curve, validation images it is measured on, and stages of the restoration."""

    ratios: list[Annotated[float, Field(ge=0, lt=1)]]
    images: Positive
    stages: Annotated[int, Field(ge=2)]


class Pool(_Strict):
    """Responses a question and how questions are grouped; `limit_rows` shortens a trial."""

    teacher_responses: Positive
    student_responses: Annotated[int, Field(ge=0)]
    questions_per_row: Positive
    passes: Positive
    limit_rows: Positive | None = None


class Student(_Strict):
    label: str
    sizes: dict[str, dict[str, int]]
    warmup: LabelTraining
    rows_per_step: Positive
    rates: Annotated[list[Rate], Field(min_length=1)]


class Switches(_Strict):
    """A preset of the objective, and single switches changed from it."""

    preset: Literal["robust", "paper"] = "robust"
    change: dict[str, float | bool] = Field(default_factory=dict)


class Export(_Strict):
    precisions: Annotated[list[str], Field(min_length=1)]


class Measure(_Strict):
    """Questions that checkpoint and bundles both answer, timing repeats; `test_images` shortens a trial."""

    test_images: Positive | None = None
    answers: Positive
    latency_rounds: Positive
    latency_repeats: Positive


class Recipe(_Strict):
    name: str
    seed: int
    data: Data
    tokenizer: Tokens
    chat_template: str
    processor: dict[str, Any]
    init: list[tuple[str, float]]
    architecture: dict[str, Any]
    teacher: Teacher
    masks: Masks
    pool: Pool
    students: Annotated[dict[str, Student], Field(min_length=1)]
    objective: Switches
    export: Export
    measure: Measure

    @property
    def sha256(self) -> str:
        return files.sha256_json(self.model_dump(mode="json"))

    def config(self, sizes: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
        """The Hugging Face configuration of a model of these sizes."""
        return merged(self.architecture, sizes)


def merged(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`base` with `over` laid on top, mappings merged at every depth."""
    out = dict(base)
    for key, value in over.items():
        inner = out.get(key)
        out[key] = (
            merged(inner, value) if isinstance(inner, Mapping) and isinstance(value, Mapping) else value
        )
    return out


def read(path: Path, *, smoke: bool = False, seed: int | None = None) -> Recipe:
    """Read a recipe; `smoke` lays its own `smoke:` section on top. Raises InputError."""
    try:
        raw = yaml.safe_load(path.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{path}: cannot be read as YAML ({' '.join(str(error).split())})") from error
    if not isinstance(raw, dict):
        raise InputError(f"{path}: wanted a mapping of recipe keys, got {type(raw).__name__}")
    over = raw.pop("smoke", {})
    if smoke:
        raw = merged(raw, over)
    if seed is not None:
        raw["seed"] = seed
    try:
        return Recipe.model_validate(raw)
    except ValidationError as error:
        raise InputError(f"{path}: {_explain(error)}") from error


def _explain(error: ValidationError) -> str:
    """The first fault in one line, with the nearest right key for an unknown one."""
    fault = error.errors(include_url=False)[0]
    where = ".".join(map(str, fault["loc"]))
    if fault["type"] != "extra_forbidden":
        return f"{where}: {fault['msg']}, got {fault['input']!r}"
    known = sorted({name for model in _Strict.__subclasses__() for name in model.model_fields})
    near = difflib.get_close_matches(str(fault["loc"][-1]), known, n=1)
    return f"{where}: unknown key" + (f"; did you mean {near[0]}?" if near else "; remove it")


def claim(out: Path, recipe: Recipe) -> None:
    """Mark `out` as this recipe's, or check that it is. Raises StateError with the difference."""
    path = out / "recipe.json"
    wanted = recipe.model_dump(mode="json")
    if not path.exists():
        files.write_json(path, wanted)
        return
    found = files.read_json(path)
    if found != wanted:
        raise StateError(
            f"{out}: holds the state of another recipe ({'; '.join(_differences(found, wanted))}); "
            "run with the same options, or choose another --out"
        )


def _differences(found: Any, wanted: Any, where: str = "") -> list[str]:
    if isinstance(found, dict) and isinstance(wanted, dict):
        keys = sorted(found.keys() | wanted.keys())
        return [
            line
            for key in keys
            for line in _differences(found.get(key), wanted.get(key), f"{where}.{key}" if where else key)
        ]
    return [] if found == wanted else [f"{where}: there {found!r}, now {wanted!r}"]
