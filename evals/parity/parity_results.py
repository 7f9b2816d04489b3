"""How close bundles are to their checkpoint: the contract of `parity.json`, docs/parity.schema.json.

In: figures. Out: one validated `ParityResults`, written and read as JSON. Not here: measuring
(`evals/parity/parity_run.py`). `python -m evals.parity.parity_results` prints the JSON Schema.

Every position is one next token, after a picture, a question and the same tokens forced on both sides.
KL is KL(reference || candidate) over the whole vocabulary, in nats. Shares are 0..1. low and high: 95 %
percentile bootstrap over whole images; where no image differs at all, Wilson for 0 of the images.
null: not measured, and `missing` says why.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field, model_validator

from evals.asking.eval_results import Sha256
from evals.records import Amount, Count, Record, Share, read_record
from evals.results import Missing
from runtime import files
from runtime.errors import StateError

SCHEMA: Literal["pocketvlm.parity@1"] = "pocketvlm.parity@1"

Forced = Literal["reference-greedy", "label"]
Some = Annotated[int, Field(ge=1)]


class Estimate(Record):
    """A value with its 95 % interval."""

    value: float
    low: float
    high: float


class Reference(Record):
    """What the candidates are compared with; float32 by transformers where `kind` is checkpoint."""

    name: str
    kind: Literal["checkpoint", "bundle"]
    path: str = Field(description="as given; where it lay means nothing elsewhere")
    format: str
    precision: str
    sha256: Sha256
    backend: str = Field(description="library and version that ran it")


class Asked(Record):
    """The questions, and the tokens that were forced after each."""

    source: str = Field(description="the task and its split")
    data_sha256: Sha256 = Field(description="over ids, questions, references and image bytes, in order")
    cases: Some
    groups: Some = Field(description="different images")
    max_tokens: Some = Field(description="longest answer that was forced")


class Preprocessing(Record):
    """Pixels and token ids, before any arithmetic. Pixel values are those the vision part takes, after
    normalisation; where a format takes bytes, the reference's were turned back into bytes."""

    images: Count
    images_compared: Count = Field(description="pictures whose pixels could be laid side by side")
    images_equal: Count
    pixel_unit: Literal["normalised", "byte"] = "normalised"
    pixel_max_diff: Amount | None = None
    pixel_mean_diff: Amount | None = Field(None, description="mean |difference| of the worst picture")
    pixel_share: Share | None = Field(None, description="share of values that differ, in the worst picture")
    shapes_equal: Count = Field(description="pictures with as many values on both sides")
    image_tokens_equal: Count = Field(description="pictures that become as many tokens on both sides")
    prompts: Count
    prompts_equal: Count = Field(description="prompts with the same ids, image tokens included")
    first_pixels: str | None = Field(None, description="the first picture that differs, and how")
    first_ids: str | None = Field(None, description="the first prompt that differs, and where")
    why_not_compared: str | None = None


class Numerics(Record):
    """The candidate's next-token distributions against the reference's at the same positions.

    `forced`: the tokens after the prompt; reference-greedy: the reference's own greedy answer with its end;
    label: the task's first reference answer, as the checkpoint's chat template writes it.
    perplexity: exp of the mean negative log-likelihood of the forced tokens.
    """

    forced: Forced
    cases: Some
    positions: Some
    kl_mean: Estimate
    kl_median: Amount
    kl_p90: Amount
    kl_p99: Amount
    kl_max: Amount
    top1_agreement: Estimate
    top1_differ: Count
    near_ties: Count = Field(
        description="of these, positions whose two best reference logits differ by less than 1e-4"
    )
    perplexity_reference: Amount
    perplexity: Amount
    perplexity_ratio: Estimate = Field(description="candidate over reference")
    not_finite: Count = Field(0, description="positions left out of all figures: a logit was no number")


class Greedy(Record):
    """How far the candidate's greedy answer is the reference's, token for token.

    Exact, from the same forced pass: along the reference's greedy answer the candidate's own is the same up
    to the first position where its best token is another.
    """

    answers: Some
    tokens_mean: Amount = Field(description="length of the reference's answers, their end included")
    prefix_mean: Estimate = Field(description="equal leading tokens")
    prefix_median: Amount
    prefix_share: Estimate = Field(description="equal leading tokens over the answer's length, mean")
    whole_equal: Estimate = Field(description="share of answers equal to their end")


class Position(Record):
    """One position worth looking at; tokens as text."""

    case: str
    question: str
    position: Count = Field(description="0: the first token of the answer")
    before: str = Field(description="the forced text so far")
    kl: Amount
    reference_token: str
    reference_probability: Share
    candidate_token: str
    candidate_probability: Share


class Candidate(Record):
    """One bundle (or another checkpoint) against the reference."""

    name: str
    kind: Literal["checkpoint", "bundle"]
    path: str
    format: str
    precision: str
    backend: str
    sha256: Sha256
    same_source: bool = Field(description="made from exactly the reference's files")
    emulated: bool = Field(False, description="run by an evaluator: numerics only, not the device's own")
    emulated_reason: str = ""
    failed: Count = Field(0, description="questions that could not be asked; in none of the figures")
    preprocessing: Preprocessing | None = None
    numerics: list[Numerics] = Field(default_factory=list, description="each side on its own pixels and ids")
    same_inputs: Numerics | None = Field(
        None, description="where pixels differ: the candidate on the reference's pixels, so arithmetic alone"
    )
    greedy: Greedy | None = None
    worst: list[Position] = Field(default_factory=list)
    error: str | None = Field(None, description="why it could not be measured")

    def on(self, forced: Forced) -> Numerics | None:
        return next((one for one in self.numerics if one.forced == forced), None)


class ParityResults(Record):
    """The whole file."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, title="pocketvlm.parity@1"
    )

    schema_name: Literal["pocketvlm.parity@1"] = Field(SCHEMA, alias="schema")
    created: str = Field(description="ISO 8601, UTC")
    version: str = Field(description="of pocketvlm")
    command: str = ""
    packages: dict[str, str] = Field(default_factory=dict)
    reference: Reference
    asked: Asked
    candidates: list[Candidate]
    missing: list[Missing] = Field(default_factory=list)

    @model_validator(mode="after")
    def _names(self) -> ParityResults:
        names = [one.name for one in self.candidates]
        if len(set(names)) != len(names):
            raise ValueError(f"candidates: a name is there twice in {names}")
        return self

    def candidate(self, name: str) -> Candidate | None:
        return next((one for one in self.candidates if one.name == name), None)


def write(results: ParityResults, path: Path) -> Path:
    """Write parity.json whole or not at all."""
    files.write_text(path, results.model_dump_json(by_alias=True, indent=1) + "\n")
    return path


def read(path: Path) -> ParityResults:
    """Read parity.json. Raises StateError naming the file and the first fault."""
    return read_record(
        path,
        ParityResults,
        StateError,
        f"wanted {SCHEMA} (docs/parity.schema.json)",
        "run `pocketvlm eval --parity` again",
    )


def json_schema() -> str:
    """The JSON Schema of `parity.json` as published in docs/parity.schema.json."""
    return json.dumps(ParityResults.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
