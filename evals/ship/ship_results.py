"""`report.json`: the verdict, every check behind it, and the evidence; published as docs/report.schema.json.

In: what `evals/ship/ship_checks.py` decided. Out: one validated `Report`, written and read as JSON.
Not here: deciding, drawing. `python -m evals.ship.ship_results` prints the JSON Schema.

A report is also what `pocketvlm report --compare` takes: its evidence holds every unit's score and every
process's percentiles.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

from pydantic import ConfigDict, Field

from evals.records import Count, Record, read_record
from evals.ship.ship_evidence import Evidence
from evals.ship.ship_gate import Gate
from runtime import files
from runtime.errors import InputError

SCHEMA: Literal["pocketvlm.report@1"] = "pocketvlm.report@1"
State = Literal["passed", "failed", "unproven", "missing"]
"""unproven: the figure keeps the limit and its interval does not, or it has none yet, or the other way round.
missing: not measured."""


class Check(Record):
    """One rule for one candidate at one place. `text` says it in words; low, high: 95 % interval."""

    rule: Count = Field(description="its place in the gate's rules, from 0")
    label: str
    bundle: str
    task: str = ""
    variant: str = ""
    device: str = ""
    point: str = ""
    state: State
    unit: str
    value: float | None = None
    low: float | None = None
    high: float | None = None
    min: float | None = None
    max: float | None = None
    basis: str = ""
    text: str

    @property
    def everywhere(self) -> bool:
        """Whether it holds for all devices."""
        return not self.device


class Cell(Record):
    """A candidate on a device (empty: no device was measured): the worst of its checks, and how many of each.

    A check that was missing under a gate that ignores it counts in `missing` and does not make the state.
    """

    device: str
    bundle: str
    state: State
    passed: Count
    failed: Count
    unproven: Count
    missing: Count


class Verdict(Record):
    """chosen: device to the candidate to ship there; None where there is none."""

    ship: bool
    headline: str
    sentences: tuple[str, ...]
    candidates: tuple[str, ...]
    devices: tuple[str, ...]
    chosen: dict[str, str | None]
    cells: tuple[Cell, ...]
    checks: tuple[Check, ...]

    def cell(self, device: str, bundle: str) -> Cell | None:
        return next((one for one in self.cells if (one.device, one.bundle) == (device, bundle)), None)


class Report(Record):
    """The whole file. gate_given: False when the default rules were used for want of a gate.yaml."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, allow_inf_nan=False, populate_by_name=True, title=SCHEMA
    )

    schema_name: Literal["pocketvlm.report@1"] = Field(default=SCHEMA, alias="schema")
    created: str = Field(description="ISO 8601, UTC")
    version: str = Field(description="of pocketvlm")
    gate: Gate
    gate_given: bool
    verdict: Verdict
    evidence: Evidence
    caveats: tuple[str, ...] = ()


def write(report: Report, path: Path) -> Path:
    """Write report.json whole or not at all."""
    files.write_text(path, report.model_dump_json(by_alias=True) + "\n")
    return path


def read(path: Path) -> Report:
    """Read report.json. Raises InputError naming the file and the first fault."""
    return read_record(
        path,
        Report,
        InputError,
        f"wanted {SCHEMA} (docs/report.schema.json)",
        "make the report again from its files",
    )


def json_schema() -> str:
    """The JSON Schema of report.json as published in docs/report.schema.json."""
    return json.dumps(Report.model_json_schema(by_alias=True), indent=2) + "\n"


if __name__ == "__main__":
    print(json_schema(), end="")
