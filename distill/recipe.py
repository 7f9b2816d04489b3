"""The recipe of a distillation, as data: models, data, pool, judge, objective, training.

In: a YAML file and `key=value` overrides. Out: a `Recipe`, its hash, and the claim of an output directory.
Not here: doing it; the demo's recipe (`distill/demo_recipe.py`); what a checkpoint on disk really is
(`distill/checks.py`). Paths in a recipe are relative to the directory a command runs in.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distill import strict
from distill.strict import Count, Positive, Rate, Share, Strict
from runtime import files

if TYPE_CHECKING:
    from distill.objective import Objective

RECIPES = Path(__file__).parent / "recipes"
Scorer = Literal["exact", "vqa", "anls", "relaxed", "choice", "numeric"]
Weight = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]
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


# --- models -----------------------------------------------------------


class Gate(Strict):
    """Ratios at which a masked teacher answers `samples` validation questions (METHOD 2)."""

    ratios: Annotated[tuple[Share, ...], Field(min_length=1)] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5)
    samples: Positive = 200
    most_lost: Share = 0.03

    @model_validator(mode="after")
    def _check(self) -> Gate:
        if self.ratios[0] != 0 or list(self.ratios) != sorted(set(self.ratios)):
            raise ValueError(f"ratios must rise and begin with 0, got {list(self.ratios)}")
        return self


class Mask(Strict):
    """The schedule r_max -> 0 in steps of `step` or in `stages` equal stages (METHOD 2, Eq. 3).

    `auto` takes r_max from the gate. `stages: 1` never restores the teacher: it stays at r_max.
    """

    r_max: Literal["auto"] | Share = "auto"
    step: Share | None = None
    stages: Positive | None = None
    tensors: Annotated[tuple[Literal["language", "vision", "embeddings"], ...], Field(min_length=1)] = (
        "language",
    )
    gate: Gate | None = Gate()

    @model_validator(mode="after")
    def _check(self) -> Mask:
        if self.step is not None and self.stages is not None:
            raise ValueError("give step or stages, not both")
        if self.step == 0:
            raise ValueError("step must be above 0")
        if self.r_max == "auto" and self.gate is None:
            raise ValueError("r_max auto is chosen by the gate; give a gate, or r_max as a number")
        if self.step is not None and self.r_max != "auto":
            stages = self.r_max / self.step
            if not math.isclose(stages, round(stages), abs_tol=1e-6):
                raise ValueError(
                    f"r_max {self.r_max} is no multiple of step {self.step}: r would not reach 0"
                )
        return self

    @property
    def largest(self) -> float:
        """The largest ratio that can come into force: what memory for the mask has to be kept for."""
        if self.r_max != "auto":
            return self.r_max
        return max(self.gate.ratios) if self.gate else 0.0

    def stages_at(self, r_max: float) -> int:
        """How many stages the schedule has from `r_max` (one where the teacher is not masked)."""
        if not r_max:
            return 1
        return round(r_max / self.step) + 1 if self.step else self.stages or 5


class Model(Strict):
    """A Hugging Face repository, or a local directory in its format."""

    checkpoint: str
    revision: str | None = None
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = "auto"


class Student(Model):
    """The student; its weights are trained in float32 whatever the checkpoint's type."""

    dtype: Literal["auto", "float32"] = "auto"


class Teacher(Model):
    """A teacher: its share of the questions, its mask (null: never masked), its weight beside others."""

    share: Above0 = 1.0
    mask: Mask | None = Mask()
    weight: Weight = 1.0


# --- data -------------------------------------------------------------


class Source(Strict):
    """One data set: records `start` up to `start + limit` of a file, a directory or a built-in task."""

    format: Literal["conversations", "llava", "tsv", "easy-vqa", "digits"]
    path: str | None = None
    split: str | None = None
    images: str | None = None
    scorer: Scorer | None = None
    start: Count = 0
    limit: Positive | None = None
    labels: Literal["all", "none"] | Count = "all"

    @model_validator(mode="after")
    def _check(self) -> Source:
        built_in = self.format in ("easy-vqa", "digits")
        if built_in and (self.path or self.images):
            raise ValueError(f"{self.format} ships with a package; remove path and images")
        if built_in and not self.split:
            raise ValueError(f"{self.format} needs a split: train or test")
        if not built_in and not self.path:
            raise ValueError(f"format {self.format} needs a path")
        return self

    @property
    def name(self) -> str:
        return Path(self.path).stem if self.path else f"{self.format}-{self.split}"


class Data(Strict):
    train: Annotated[tuple[Source, ...], Field(min_length=1)]
    validation: tuple[Source, ...] = ()
    skip_limit: Count = 10
    max_prompt_tokens: Positive | None = None
    max_pixels: Positive | None = None


# --- pool and judge ---------------------------------------------------


class SamplingSettings(Strict):
    """How responses are drawn (METHOD 3; Sec. 4.1)."""

    max_new_tokens: Positive = 512
    temperature: Above0 = 1.0
    top_p: Rate = 0.9
    top_k: Count = 50
    repetition_penalty: Above0 = 1.05


class Hf(Strict):
    """Generation in this process, `rows` images at a time."""

    kind: Literal["hf"] = "hf"
    rows: Positive = 8


class Served(Strict):
    """An OpenAI-compatible server: `command` starts it and the stage stops it, or it runs at `url`."""

    command: str | None = None
    url: str | None = None
    model: str | None = None
    concurrency: Positive = 32
    timeout_seconds: Above0 = 600.0
    retries: Count = 5

    @model_validator(mode="after")
    def _check(self) -> Served:
        if self.command is not None and self.url is not None:
            raise ValueError("give command (a server that is started for each stage) or url, not both")
        missing = [x for x in ("{checkpoint}", "{port}") if self.command and x not in self.command]
        if missing:
            raise ValueError(f"command must contain {' and '.join(missing)}, got {self.command!r}")
        return self

    @property
    def given(self) -> bool:
        return self.command is not None or self.url is not None


class OpenAI(Served):
    kind: Literal["openai"]

    @model_validator(mode="after")
    def _has_server(self) -> OpenAI:
        if not self.given:
            raise ValueError("kind openai needs command or url")
        return self


Engine = Annotated[Hf | OpenAI, Field(discriminator="kind")]


class Pool(Strict):
    """Responses a question, and who draws them (METHOD 3)."""

    teacher_responses: Count = 4
    student_responses: Count = 4
    student_refresh: Literal["stage", "never"] = "stage"
    sampling: SamplingSettings = SamplingSettings()
    engine: Engine = Hf()
    student_engine: Engine | None = None
    shard: Positive = 64

    @property
    def engine_of_student(self) -> Hf | OpenAI:
        return self.student_engine or self.engine


class RuleJudge(Strict):
    """R_acc by each sample's scorer."""

    kind: Literal["rule"] = "rule"


class ModelJudge(Served):
    """R_acc by a model in two calls (METHOD 4): the full teacher, the paper's generator, or a server."""

    kind: Literal["model"]
    by: Literal["teacher", "generator", "server"] = "teacher"

    @model_validator(mode="after")
    def _has_server(self) -> ModelJudge:
        if self.by == "server" and not self.given:
            raise ValueError("by server needs command (with model: the checkpoint to serve) or url")
        if self.by == "server" and self.command and not self.model:
            raise ValueError("command needs model: the checkpoint that the judge's server is to serve")
        return self


Judge = Annotated[RuleJudge | ModelJudge, Field(discriminator="kind")]


# --- training ---------------------------------------------------------


class ObjectiveSettings(Strict):
    """A preset of the objective, and single switches changed from it (METHOD 5)."""

    preset: str = "robust"
    change: dict[str, bool | int | float | str | None] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        _ = self.switches
        return self

    @property
    def switches(self) -> Objective:
        """The objective itself. Raises ValueError for an unknown preset or switch."""
        from distill.objective import Objective

        strict.known(self.preset, ("robust", "paper"), "preset")
        base: Objective = getattr(Objective, self.preset)()
        names = [field.name for field in fields(base)]
        for name, value in self.change.items():
            strict.known(name, names, "switch")
            wanted = getattr(base, name)
            if isinstance(wanted, (bool, str)) and type(value) is not type(wanted):
                raise ValueError(f"change.{name}: wanted {type(wanted).__name__}, got {value!r}")
            if isinstance(wanted, (int, float)) and isinstance(value, str):
                raise ValueError(f"change.{name}: wanted a number, got {value!r}")
        return replace(base, **self.change)  # type: ignore[arg-type]


class SignalSettings(Strict):
    """Teacher distributions: computed at every step, or kept (top-k and tail mass, or hidden states)."""

    kind: Literal["live", "topk", "hidden"] = "live"
    k: Positive = 64


class Lora(Strict):
    rank: Positive = 64
    alpha: Above0 = 128.0
    targets: str | tuple[str, ...] = "all-linear"


class Train(Strict):
    """fp32 master weights whatever `precision`; the paper's rate is a fixed 1e-6 of AdamW (METHOD 6)."""

    optimizer: Literal["adamw", "muon"] = "adamw"
    lr: Rate = 1e-6
    schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: Count = 0
    weight_decay: Weight = 0.0
    clip: Above0 = 1.0
    questions_per_step: Positive = 64
    tokens_per_device: Positive = 8192
    passes: Positive = 1
    precision: Literal["float32", "bf16"] = "bf16"
    gradient_checkpointing: bool = False
    freeze: tuple[str, ...] = ()
    lora: Lora | None = None
    sharing: Literal["auto", "tree", "prefix", "naive"] = "auto"
    chunk_tokens: Positive = 1024
    save_every: Positive = 200
    validate_every: Positive = 200
    patience: Positive | None = None
    trackers: tuple[str, ...] = ()


class Throughput(Strict):
    """What `plan` reckons with, per device: tokens generated (each model alone), tokens trained a second,
    and how many tokens a response and a prompt have on average (null: the longest allowed)."""

    teacher_tokens_per_second: Above0 = 1000.0
    student_tokens_per_second: Above0 = 4000.0
    train_tokens_per_second: Above0 = 4000.0
    devices: Positive = 8
    mean_response_tokens: Positive | None = None
    mean_prompt_tokens: Positive = 512
    images_per_row: Positive = 1
    pixels_per_image: Positive = 448 * 448


# --- the whole --------------------------------------------------------


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
        _check_responses(self)
        _check_servers(self)
        _check_validation(self)
        return self

    @property
    def sha256(self) -> str:
        """Hash of everything that decides what is learned: without the keys that a resumed run may change."""
        return files.sha256_json(strict.without(self.model_dump(mode="json"), MAY_CHANGE))


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
    if not path.exists() and path.parent == Path() and (RECIPES / path.with_suffix(".yaml")).exists():
        path = RECIPES / path.with_suffix(".yaml")
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
