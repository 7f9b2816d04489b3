"""`compare.json`: what changed between two reports; published as docs/compare.schema.json.

In: what `evals/ship/ship_compare.py` found. Out: one validated `Comparison`, written as JSON.
`python -m evals.ship.ship_compare_results` prints the JSON Schema. Not here: testing.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import ConfigDict, Field

from evals.bench.bench_conditions import Reason
from evals.records import Count, Record, Share
from evals.ship.ship_evidence import Source
from evals.ship.ship_gate import CompareRules
from runtime import files

SCHEMA: Literal["pocketvlm.compare@1"] = "pocketvlm.compare@1"
Family = Literal["accuracy", "robustness", "speed", "stages"]
Finding = Literal["worse", "better", "tolerated", "unchanged", "shown"]
"""tolerated: worse beyond chance, and within the gate's tolerance. unchanged: not beyond chance.
shown: not judged, because it is a part of something that is."""


class Tested(Record):
    """One quantity before and after. change, low, high, detectable: points of accuracy, or percent of the
    old value; low and high are a 95 % interval of this change alone.

    p_worse: one-sided, of no worsening; adjusted: Holm's, over the family. detectable: the true worsening
    that such data show in 90 % of cases, if it were the only test.
    """

    family: Family
    label: str
    bundle: str
    old_bundle: str
    task: str = ""
    variant: str = ""
    device: str = ""
    point: str = ""
    unit: Literal["points", "%"]
    old: float
    new: float
    change: float
    low: float
    high: float
    p_worse: Share
    p_worse_adjusted: Share | None = None
    p_better: Share
    p_better_adjusted: Share | None = None
    detectable: Annotated[float, Field(ge=0)]
    units: Count = Field(description="independent units: pictures, or processes of the smaller side")
    finding: Finding


class Fact(Record):
    """Something counted, or a figure whose intervals are laid side by side; no test."""

    label: str
    bundle: str
    place: str = ""
    old: str
    new: str
    finding: Literal["worse", "better", "unchanged", "tolerated"]
    why: str = ""


class TestedFamily(Record):
    """level: the chance, at most, that this family calls anything worse when nothing is."""

    family: Family
    tests: Count
    level: Share


class Comparison(Record):
    """The whole file. regressed: something is worse beyond chance and tolerance."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, title=SCHEMA
    )

    schema_name: Literal["pocketvlm.compare@1"] = Field(default=SCHEMA, alias="schema")
    created: str = Field(description="ISO 8601, UTC")
    version: str = Field(description="of pocketvlm")
    old: tuple[Source, ...]
    new: tuple[Source, ...]
    rules: CompareRules
    regressed: bool
    headline: str
    sentences: tuple[str, ...]
    families: tuple[TestedFamily, ...]
    tests: tuple[Tested, ...]
    facts: tuple[Fact, ...] = ()
    not_compared: tuple[Reason, ...] = ()
    caveats: tuple[str, ...] = ()


def write(found: Comparison, path: Path) -> Path:
    """Write compare.json whole or not at all."""
    files.write_text(path, found.model_dump_json(by_alias=True, indent=1) + "\n")
    return path


def json_schema() -> str:
    """The JSON Schema of compare.json as published in docs/compare.schema.json."""
    return json.dumps(Comparison.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
