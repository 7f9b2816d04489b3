"""The demo's recipe, as data: models trained from nothing, arms, exports.

In: a YAML file. Out: a `Recipe` and its hash. Not here: doing it; the recipe of a real distillation
(`distill/recipe.py`); how a file is read strictly (`distill/strict.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from distill import strict
from distill.strict import Count, Positive, Rate, Share, Strict
from runtime import files

RECIPES = Path(__file__).parents[1] / "recipes"


class Data(Strict):
    """How many images validate and how many questions carry labels; the rest is unlabelled."""

    validation_images: Positive
    labelled_questions: Positive


class Tokens(Strict):
    vocab_size: Positive
    special: dict[str, str]


class LabelTraining(Strict):
    """Supervised training: `images` x `questions` a step, learning rate `lr` of AdamW at its peak."""

    steps: Positive
    images: Positive
    questions: Positive
    lr: Rate


class Teacher(Strict):
    sizes: dict[str, dict[str, int]]
    train: LabelTraining


class Masks(Strict):
    """Ratios of the curve, validation images it is measured on, and stages of the restoration."""

    ratios: list[Share]
    images: Positive
    stages: Annotated[int, Field(ge=2)]


class Pool(Strict):
    """Responses a question and how questions are grouped; `limit_rows` shortens a trial."""

    teacher_responses: Positive
    student_responses: Count
    questions_per_row: Positive
    passes: Positive
    limit_rows: Positive | None = None


class Student(Strict):
    label: str
    sizes: dict[str, dict[str, int]]
    warmup: LabelTraining
    rows_per_step: Positive
    rates: Annotated[list[Rate], Field(min_length=1)]


class Switches(Strict):
    """A preset of the objective, and single switches changed from it."""

    preset: Literal["robust", "paper"] = "robust"
    change: dict[str, float | bool] = Field(default_factory=dict)


class Export(Strict):
    """ONNX precisions of every student; of the first one GGUF types, where llama.cpp is installed, and
    precisions of Core ML, where coremltools is."""

    precisions: Annotated[list[str], Field(min_length=1)]
    gguf: list[str] = Field(default_factory=list)
    coreml: list[str] = Field(default_factory=list)


class Measure(Strict):
    """Questions that checkpoint and bundles both answer, timing repeats; `test_images` shortens a trial."""

    test_images: Positive | None = None
    answers: Positive
    latency_rounds: Positive
    latency_repeats: Positive


class Recipe(Strict):
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
    raw = strict.load_yaml(path)
    over = raw.pop("smoke", {})
    if smoke:
        raw = merged(raw, over)
    if seed is not None:
        raw["seed"] = seed
    return strict.validate(Recipe, raw, path)


def claim(out: Path, recipe: Recipe) -> None:
    """Mark `out` as this recipe's, or check that it is. Raises StateError with the difference."""
    strict.claim(out, recipe.model_dump(mode="json"))
