"""The sections of a recipe, each a strict frozen model with its defaults and the checks within it.

In: parsed YAML. Out: settings. Not here: checks between sections, reading, claiming (`distill/recipe.py`).
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from distill.strict import Count, Positive, Rate, Share, Strict
from runtime.errors import InputError

if TYPE_CHECKING:
    from distill.losses.objective import Objective
    from distill.losses.presets import Preset

Scorer = Literal["exact", "vqa", "anls", "relaxed", "choice", "numeric"]
Weight = Annotated[float, Field(ge=0)]
Above0 = Annotated[float, Field(gt=0)]


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


class MaskRule(Strict):
    """Tensors whose name fits the glob are masked at `scale` times the ratio; null leaves them alone."""

    tensors: str
    scale: Weight | None


class Mask(Strict):
    """The schedule r_max -> 0 in steps of `step` or in `stages` equal stages (METHOD 2, Eq. 3).

    `auto` takes r_max from the gate. Without `restore` the teacher stays at r_max. The first of `rules` that
    fits a tensor's name decides its scale.
    """

    r_max: Literal["auto"] | Share = "auto"
    step: Above0 | None = None
    stages: Positive | None = None
    restore: bool = True
    tensors: Annotated[tuple[Literal["language", "vision", "embeddings"], ...], Field(min_length=1)] = (
        "language",
    )
    rules: tuple[MaskRule, ...] = ()
    gate: Gate | None = Gate()

    @model_validator(mode="after")
    def _check(self) -> Mask:
        if self.step is not None and self.stages is not None:
            raise ValueError("give step or stages, not both")
        if self.restore and self.stages == 1:
            raise ValueError("one stage does not get from r_max to 0; give more, or restore: false")
        if not self.restore and (self.step is not None or (self.stages or 1) > 1):
            raise ValueError("restore: false has one stage; remove step and stages")
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
        """The largest ratio that a stage can have."""
        if self.r_max != "auto":
            return self.r_max
        return max(self.gate.ratios) if self.gate else 0.0

    @property
    def asked(self) -> float:
        """The largest ratio that comes into force, the gate's among them: what memory is kept for."""
        return max([self.largest, *(self.gate.ratios if self.gate else ())])

    @property
    def touches(self) -> list[Any]:
        """JSON-ready: what decides which weights a ratio removes."""
        return [list(self.tensors), [rule.model_dump() for rule in self.rules]]

    def stages_at(self, r_max: float) -> int:
        """How many stages the schedule has from `r_max` (one where the teacher is not masked)."""
        if not r_max or not self.restore:
            return 1
        return math.ceil(r_max / self.step - 1e-9) + 1 if self.step else self.stages or 5


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
    """`together`: how many questions about one image stay side by side, to share its forward; above 1 every
    record is read at the start. `skip_limit`: how many samples may fail before the run ends."""

    together: Positive = 1
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
    """A preset of the objective, and single switches changed from it (METHOD 5).

    `teachers` says how several act: one after the other as they grow, or all at once with `fixed` weights,
    weights by `accuracy`, or `drop`ped at random with probability `drop`. null: as the preset says.
    """

    preset: str = "robust"
    change: dict[str, bool | int | float | str | None] = Field(default_factory=dict)
    teachers: Literal["one", "fixed", "accuracy", "drop"] | None = None
    drop: Share = 0.5

    @model_validator(mode="after")
    def _check(self) -> ObjectiveSettings:
        _ = self.switches
        for name, value in self.change.items():
            wanted = getattr(self._preset.objective, name)
            fits = isinstance(value, type(wanted)) or (type(wanted) is float and type(value) is int)
            if not fits:
                raise ValueError(f"objective.change.{name}: got {value!r}, the preset has {wanted!r}")
        return self

    @property
    def switches(self) -> Objective:
        """The objective itself."""
        from distill.losses import presets

        try:
            return presets.objective(self.preset, dict(self.change))
        except InputError as error:  # only a ValueError is told with its place in the recipe
            raise ValueError(str(error)) from error

    @property
    def together(self) -> str:
        """How several teachers act."""
        return self.teachers or self._preset.teachers

    @property
    def restores(self) -> str:
        """What the preset says of the mask: `stages`, `never` or `unmasked`."""
        return self._preset.restore

    @property
    def _preset(self) -> Preset:
        from distill.losses.presets import PRESETS

        return PRESETS[self.preset]


class SignalSettings(Strict):
    """Teacher distributions: computed at every step, or kept (top-k and tail mass, or hidden states).

    `visual_keep`: the share of visual tokens that the teachers' language models get to see at every step,
    those that the student's attention looks at most (MaskedKD). Below 1 it needs `live`.
    """

    kind: Literal["live", "topk", "hidden"] = "live"
    k: Positive = 64
    visual_keep: Rate = 1.0

    @model_validator(mode="after")
    def _check(self) -> SignalSettings:
        if self.visual_keep < 1 and self.kind != "live":
            raise ValueError(f"visual_keep {self.visual_keep} changes with the student; set kind: live")
        return self


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
    """What `plan` reckons with: tokens a second of each device, generated and trained, and where the data
    is not here to look at, how many questions there are and how long prompts are. `mean_response_tokens`
    null: the longest allowed."""

    teacher_tokens_per_second: Above0 = 1000.0
    student_tokens_per_second: Above0 = 4000.0
    train_tokens_per_second: Above0 = 4000.0
    devices: Positive = 1
    questions: Positive | None = None
    mean_response_tokens: Positive | None = None
    mean_prompt_tokens: Positive = 512
    judge_tokens_per_response: Positive = 160
    images_per_row: Count = 1
    pixels_per_image: Positive = 448 * 448
