"""What `pocketvlm eval` found: the contract of `eval.json`, published as `docs/eval.schema.json`.

In: answers with scores. Out: one validated `EvalResults`, written and read as JSON.
Not here: asking (`evals/asking/eval_run.py`), summing up (`evals/asking/eval_summary.py`), drawing.
`python -m evals.asking.eval_results` prints the JSON Schema.

Shares and scores are 0..1, never percent. Texts are as generated. A question is stored once; every answer
names its question, its variant and what was asked where the variant changed the wording.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from evals.records import Amount, Count, Record, Share, read_record
from evals.results import Missing
from runtime import files
from runtime.errors import StateError

SCHEMA: Literal["pocketvlm.eval@1"] = "pocketvlm.eval@1"
ORIGINAL = "original"
"""The variant of a question as its task has it."""

Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TaskInfo(Record):
    """What was asked. `data_sha256` is over ids, questions, options, references and image bytes, in order."""

    name: str
    format: str = Field(description="vlmevalkit-tsv, lmms-jsonl, easy-vqa, digits")
    split: str
    source: str = Field(description="file or package that the data came from")
    data_sha256: Sha256
    questions: Annotated[int, Field(ge=1)]
    available: Annotated[int, Field(ge=1)] = Field(description="questions of the whole split, before a limit")
    groups: Annotated[int, Field(ge=1)] = Field(description="different images")
    scorer: str
    rules: Literal["pocketvlm", "vlmevalkit", "lmms-eval"] = Field(
        description="whose scoring rules; the harnesses' give the score that the harness gives"
    )
    right_from: Share = Field(description="a unit's score from which it counts as right")
    circular: bool = Field(
        False, description="a unit is right when it is right in every order of its options"
    )
    prompt: str = Field(description="whose prompt: raw, vlmevalkit, lmms-eval")
    max_new_tokens: Annotated[int, Field(ge=1)]
    judge: str = Field("", description="the judging model where a judge scored, else empty")


class Question(Record):
    """One question. Those with the same `unit` count together; those of one `group` share their image."""

    id: str
    unit: str
    group: str
    question: str = Field(description="without options and instructions")
    prompt: str = Field(description="the text that the model was given")
    options: list[str] = Field(default_factory=list)
    references: list[str]
    category: str = ""
    images: list[Sha256] = Field(default_factory=list, description="SHA-256 of each image file's bytes")


class Given(Record):
    """One answer. `read`: what the scorer took from it (a letter, a number), null when that is the text."""

    id: str = Field(description="the question's")
    variant: str = ORIGINAL
    asked: str | None = Field(None, description="the prompt, where the variant changed it")
    answer: str
    read: str | None = None
    score: Share
    finish: Literal["stop", "length", "context", "cancelled", "failed", "unknown"]
    new_tokens: Count | None = None
    error: str | None = Field(None, description="why the question could not be asked; its score is 0")


class Subject(Record):
    """A model that answered. The first subject is the reference of all comparisons."""

    name: str
    kind: Literal["checkpoint", "teacher", "bundle"]
    path: str = Field(description="as given; where it lay means nothing elsewhere")
    format: str = Field(description="safetensors, onnx, gguf, coreml")
    precision: str
    sha256: Sha256 | None = Field(None, description="of manifest.json, or of all weight files in order")
    bytes: Count | None = None
    backend: str = Field("", description="library, version and execution providers that ran it")
    emulated: str = Field("", description="why its arithmetic is not the device's own; empty: it is")
    answers: list[Given]


class Variant(Record):
    """A change of all questions: `original`, a held-out wording, an image corruption of a severity 1..5."""

    name: str
    family: str = Field(description="original, wording, blur, noise, jpeg, contrast, rotation, size, ...")
    severity: Annotated[int, Field(ge=1, le=5)] | None = None
    description: str = ""


class Summary(Record):
    """The mean score of a subject's units with a 95 % interval. `category` empty: all of them.

    wilson: 0/1 scores, each unit with an image of its own. bootstrap: whole images resampled (percentile);
    for 0/1 scores never inside Wilson's interval.
    """

    subject: str
    variant: str = ORIGINAL
    category: str = ""
    units: Annotated[int, Field(ge=1)]
    groups: Annotated[int, Field(ge=1)]
    value: Share
    low: Share
    high: Share
    interval: Literal["wilson", "bootstrap"]
    right: Count = Field(description="units with a score of at least the task's right_from")
    macro: Share | None = Field(None, description="mean of the categories' means, where there are several")
    failed: Count = Field(0, description="questions that could not be asked")
    cut: Count = Field(0, description="answers that reached max_new_tokens or the end of the context")


class Change(Record):
    """Candidate against reference over the same units; `difference` is candidate minus reference.

    low and high: 95 % bootstrap over whole images. p_value: exact McNemar on the flips, two-sided.
    `same_text` counts questions whose answers are equal letter for letter.
    """

    reference: str
    candidate: str
    reference_variant: str = ORIGINAL
    variant: str = ORIGINAL
    units: Annotated[int, Field(ge=1)]
    right_to_wrong: Count
    wrong_to_right: Count
    both_right: Count
    same_text: Count
    difference: Annotated[float, Field(ge=-1, le=1)]
    low: Annotated[float, Field(ge=-1, le=1)]
    high: Annotated[float, Field(ge=-1, le=1)]
    p_value: Share


class Example(Record):
    """A question worth looking at: `images` are data URIs, at most 128 pixels on their longest side."""

    id: str
    variant: str = ORIGINAL
    why: Literal["flip", "wrong", "random"]
    images: list[Annotated[str, Field(pattern=r"^data:image/(png|jpeg|webp);base64,[A-Za-z0-9+/=]+$")]]


class EvalResults(Record):
    """The whole file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, title="pocketvlm.eval@1"
    )

    schema_name: Literal["pocketvlm.eval@1"] = Field(SCHEMA, alias="schema")
    created: str = Field(description="ISO 8601, UTC")
    version: str = Field(description="of pocketvlm")
    command: str = ""
    seconds: Amount | None = Field(None, description="wall time of all sittings; no measurement of speed")
    packages: dict[str, str] = Field(default_factory=dict)
    task: TaskInfo
    variants: Annotated[list[Variant], Field(min_length=1)]
    questions: Annotated[list[Question], Field(min_length=1)]
    subjects: Annotated[list[Subject], Field(min_length=1)]
    summaries: list[Summary]
    changes: list[Change] = Field(default_factory=list)
    examples: list[Example] = Field(default_factory=list)
    missing: list[Missing] = Field(default_factory=list)

    @model_validator(mode="after")
    def _refers(self) -> EvalResults:
        for what, names in (
            ("question", [one.id for one in self.questions]),
            ("subject", [one.name for one in self.subjects]),
            ("variant", [one.name for one in self.variants]),
        ):
            if len(set(names)) != len(names):
                twice = next(name for name, times in Counter(names).items() if times > 1)
                raise ValueError(f"{what} {twice!r} is there twice")
        ids, variants = {one.id for one in self.questions}, {one.name for one in self.variants}
        for subject in self.subjects:
            keys = [(one.id, one.variant) for one in subject.answers]
            if len(set(keys)) != len(keys):
                raise ValueError(f"subject {subject.name!r} answers a question twice")
            for id_, variant in keys:
                if id_ not in ids or variant not in variants:
                    raise ValueError(f"subject {subject.name!r} answers unknown {(id_, variant)}")
        return self

    def subject(self, name: str) -> Subject:
        """Raises KeyError."""
        for one in self.subjects:
            if one.name == name:
                return one
        raise KeyError(name)

    def summary(self, subject: str, variant: str = ORIGINAL, category: str = "") -> Summary | None:
        wanted = (subject, variant, category)
        return next((s for s in self.summaries if (s.subject, s.variant, s.category) == wanted), None)

    def unit_scores(self, subject: str, variant: str = ORIGINAL) -> dict[str, float]:
        """Score of every unit, in the order of the questions; a unit's is the lowest of its questions'."""
        given = {one.id: one.score for one in self.subject(subject).answers if one.variant == variant}
        found: dict[str, float] = {}
        for question in self.questions:
            if question.id in given:
                found[question.unit] = min(found.get(question.unit, 1.0), given[question.id])
        return found

    def groups(self) -> dict[str, str]:
        """The image of every unit."""
        return {question.unit: question.group for question in self.questions}

    def differing(
        self, reference: str, candidate: str, variant: str = ORIGINAL
    ) -> Iterator[tuple[Given, Given]]:
        """Pairs of answers to one question whose texts differ."""
        before = {one.id: one for one in self.subject(reference).answers if one.variant == variant}
        for after in self.subject(candidate).answers:
            if after.variant == variant and after.id in before and before[after.id].answer != after.answer:
                yield before[after.id], after


def write(results: EvalResults, path: Path) -> Path:
    """Write eval.json whole or not at all."""
    files.write_text(path, results.model_dump_json(by_alias=True, exclude_defaults=False) + "\n")
    return path


def read(path: Path) -> EvalResults:
    """Read eval.json. Raises StateError naming the file and the first fault."""
    return read_record(
        path,
        EvalResults,
        StateError,
        f"wanted {SCHEMA} (docs/eval.schema.json)",
        "run `pocketvlm eval` again",
    )


def json_schema() -> str:
    """The JSON Schema of `eval.json` as published in docs/eval.schema.json."""
    return json.dumps(EvalResults.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
