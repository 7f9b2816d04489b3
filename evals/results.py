"""Everything a report shows: the contract of `report/results.json`.

In: plain values from the stages. Out: one validated `Results`, written and read as JSON.
Not here: measuring (`evals/accuracy.py`, `bench/latency.py`) and drawing (`evals/charts.py`, `report.py`).

Shares are 0..1, never percent. Units are in the names. A field that is None was not measured; `missing`
says why. Unknown keys are refused, and so is a number that is not finite, except in training curves,
where it becomes None.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, model_validator

from evals.records import (
    Agreement,
    Amount,
    Comparison,
    Count,
    Device,
    Flip,
    Latency,
    LatencyRatio,
    Parity,
    Percentiles,
    Record,
    Score,
    Share,
    read_record,
)
from runtime import files
from runtime.errors import StateError

__all__ = [
    "Agreement", "Bundle", "Comparison", "Data", "Device", "Example", "ExampleAnswer", "Flip", "GridPoint",
    "Latency", "LatencyRatio", "LedgerRow", "MaskCurve", "MaskPoint", "Method", "Missing", "Model", "Parity",
    "Part", "Percentiles", "Pool", "PoolPart", "Record", "Results", "Run", "Score", "Split", "TrainingCurve",
    "read", "write",
]  # fmt: skip


def _finite_or_none(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value


Curve = list[Annotated[float | None, BeforeValidator(_finite_or_none)]]


class Run(Record):
    """What was run. `seconds` is the wall time of all stages, `peak_rss_mib` the largest process."""

    name: str
    version: str
    created: str = Field(description="ISO 8601, UTC")
    seed: int
    smoke: bool
    recipe_sha256: str
    command: str
    seconds: Amount
    peak_rss_mib: Amount | None = None


class Split(Record):
    """One part of the data: its use in plain words, and whether labels were read from it."""

    name: str
    images: Count
    questions: Count
    labelled: bool
    use: str


class Data(Record):
    name: str
    source: str
    splits: list[Split]
    note: str = ""


class Model(Record):
    """A checkpoint directory. `ratio` is the teacher's parameters over this model's (1 for the teacher)."""

    name: str
    role: Literal["teacher", "student"]
    path: str
    parameters: Count
    bytes: Count
    ratio: Annotated[float, Field(gt=0)]
    architecture: str = ""
    test: Score | None = Field(None, description="the teacher's own accuracy; students: see methods")


class GridPoint(Record):
    """One learning rate that was tried; validation None means the run diverged or was stopped."""

    learning_rate: Annotated[float, Field(gt=0)]
    validation: Score | None


class Method(Record):
    """One student trained one way. `grid` is every learning rate tried; the best on validation was kept."""

    student: str
    method: Literal["warmup", "sft", "kd", "masters"]
    label: str
    description: str
    test: Score
    validation: Score | None = None
    learning_rate: Annotated[float, Field(gt=0)] | None = None
    grid: list[GridPoint] = Field(default_factory=list)
    student_tokens: Count
    seconds: Amount


class MaskPoint(Record):
    ratio: Share = Field(description="asked share of masked weights, r")
    sparsity: Share = Field(description="measured share of zero weights in the masked tensors")
    score: Score


class MaskCurve(Record):
    """The masked teacher's accuracy against r, and the r_max that the rule chose from it."""

    split: str
    points: Annotated[list[MaskPoint], Field(min_length=1)]
    r_max: Share
    rule: str
    inert: bool = Field(description="every r up to 0.5 lost less than 1 point")
    note: str = ""


class TrainingCurve(Record):
    """One arm's training, one value per logged step. A list is None when the arm has no such term."""

    student: str
    method: str
    steps: Annotated[list[int], Field(min_length=1)]
    loss: Curve
    divergence_nats: Curve | None = None
    r_acc: Curve | None = None
    r_distill: Curve | None = None
    zero_variance_share: Curve | None = None
    grad_share_rl: Curve | None = None
    grad_share_divergence: Curve | None = None
    grad_share_reference_kl: Curve | None = None
    mask_ratio: Curve | None = None

    @model_validator(mode="after")
    def _aligned(self) -> TrainingCurve:
        for name in type(self).model_fields:
            value = getattr(self, name)
            if isinstance(value, list) and len(value) != len(self.steps):
                raise ValueError(f"{name}: {len(value)} values for {len(self.steps)} steps")
        return self


class PoolPart(Record):
    """Responses of one source: the masked teacher at `ratio`, or the student named `student` (ratio None)."""

    source: Literal["teacher", "student"]
    student: str = ""
    ratio: Share | None
    questions: Count
    responses: Count
    distinct_per_question: Amount
    tokens: Count
    score: Score | None = Field(None, description="R_acc of the responses")


class Pool(Record):
    questions: Count
    responses: Count
    distinct_per_question: Amount
    tokens: Count
    seconds: Amount
    pseudo_labelled: Count = Field(0, description="questions with the teacher's majority as reference")
    parts: list[PoolPart] = Field(default_factory=list)


class Part(Record):
    name: str
    bits: Amount
    bytes: Count


class Bundle(Record):
    """One exported bundle of one checkpoint. `ratios` compare its latency to the first bundle's."""

    name: str
    path: str
    format: str = "onnx"
    precision: str
    student: str
    method: str
    bytes: Count
    parts: list[Part] = Field(default_factory=list)
    parity: Parity | None = None
    test: Score | None = None
    agreement: Agreement | None = None
    latency: Latency | None = None
    ratios: list[LatencyRatio] = Field(default_factory=list)


class ExampleAnswer(Record):
    by: str
    text: str
    right: bool


class Example(Record):
    """One test question. `image` is a data URI (`data:image/png;base64,...`)."""

    id: str
    image: Annotated[str, Field(pattern=r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$")]
    question: str
    reference: str
    answers: list[ExampleAnswer]
    note: str = ""


class LedgerRow(Record):
    stage: str
    seconds: Amount
    peak_rss_mib: Amount | None = None
    resumed: bool = Field(False, description="finished by an earlier, interrupted run")
    note: str = ""


class Missing(Record):
    """Something a reader may look for that was not measured, and why."""

    what: str
    why: str


class Results(Record):
    """The whole report. The first student is the one that was shipped; its `masters` row is the headline.

    `verdict` is written by `evals.report.write_report`.
    """

    schema_version: Literal[1] = 1
    run: Run
    data: Data
    models: Annotated[list[Model], Field(min_length=1)]
    methods: list[Method] = Field(default_factory=list)
    comparisons: list[Comparison] = Field(default_factory=list)
    mask_curve: MaskCurve | None = None
    training: list[TrainingCurve] = Field(default_factory=list)
    pool: Pool | None = None
    bundles: list[Bundle] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    ledger: list[LedgerRow] = Field(default_factory=list)
    device: Device
    missing: list[Missing] = Field(default_factory=list)
    caveats: list[str] = Field(default_factory=list)
    verdict: list[str] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names(self) -> Results:
        if sum(model.role == "teacher" for model in self.models) != 1:
            raise ValueError("models: wanted exactly one teacher")
        students = {model.name for model in self.students}
        rows: list[Method | TrainingCurve | Comparison | Bundle] = [
            *self.methods,
            *self.training,
            *self.comparisons,
            *self.bundles,
        ]
        for row in rows:
            if row.student not in students:
                raise ValueError(f"student {row.student!r} is not in models ({sorted(students)})")
        return self

    @property
    def teacher(self) -> Model:
        return next(model for model in self.models if model.role == "teacher")

    @property
    def students(self) -> list[Model]:
        return [model for model in self.models if model.role == "student"]

    def method(self, student: str, method: str) -> Method | None:
        """The row of one arm, or None."""
        return next((m for m in self.methods if (m.student, m.method) == (student, method)), None)

    def comparison(self, student: str, reference: str, candidate: str) -> Comparison | None:
        wanted = (student, reference, candidate)
        return next((c for c in self.comparisons if (c.student, c.reference, c.candidate) == wanted), None)


def write(results: Results, path: Path) -> Path:
    """Write results.json whole or not at all."""
    files.write_text(path, results.model_dump_json(indent=1) + "\n")
    return path


def read(path: Path) -> Results:
    """Read results.json. Raises StateError naming the file and the first fault."""
    return read_record(
        path, Results, StateError, "it was written by another version", "run the measuring stage again"
    )
