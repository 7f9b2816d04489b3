"""What `pocketvlm report` does: the page of a run, the ship report, or a comparison.

In: paths and options. Out: an `Outcome`: what to print and the exit code. Not here: any measuring.

Exit code 0: ship, or no regression. 1: do not ship, or a regression. (2 is an error's.)
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from evals.ship import (
    ship_compare,
    ship_compare_page,
    ship_gate,
    ship_load,
    ship_markdown,
    ship_report,
    ship_results,
)
from evals.ship.ship_compare_results import Comparison
from evals.ship.ship_evidence import Evidence
from runtime.errors import InputError

RUN = "results.json"
DEFAULT_OUT = Path("report")


@dataclass(frozen=True)
class Outcome:
    """`lines` go to stdout, `said` to stderr."""

    code: int
    lines: list[str] = field(default_factory=list)
    said: list[str] = field(default_factory=list)


def of_a_run(paths: Sequence[Path]) -> Path | None:
    """The results.json of a demo or ablation run, where that is what was given; else None."""
    if len(paths) != 1:
        return None
    given = paths[0]
    path = given / RUN if given.is_dir() else given
    if given.is_dir() and not path.is_file():
        return None
    return path if path.is_file() and path.name == RUN and ship_load.schema_of(path) is None else None


def ship(
    paths: Sequence[Path], gate: Path | None, out: Path | None, *, markdown: bool, as_json: bool, version: str
) -> Outcome:
    """Write the ship report. Errors as `ship_report.make` and `ship_report.write`."""
    found = ship_report.make(paths, ship_gate.read(gate) if gate else None, version=version)
    if out is None:
        out = paths[0] / DEFAULT_OUT.name if len(paths) == 1 and paths[0].is_dir() else DEFAULT_OUT
    page = ship_report.write(found, out, markdown=markdown)
    verdict = found.verdict
    code = 0 if verdict.ship else 1
    if as_json:
        told = {"ship": verdict.ship, "report": str(page), "verdict": verdict.model_dump(mode="json")}
        return Outcome(code, [json.dumps(told)])
    lines = [str(page), *([str(out / ship_report.MARKDOWN)] if markdown else [])]
    return Outcome(code, lines, [verdict.headline, *verdict.sentences])


def compare(
    paths: Sequence[Path],
    gate: Path | None,
    out: Path | None,
    *,
    pairs: Sequence[str] = (),
    markdown: bool,
    as_json: bool,
    version: str,
) -> Outcome:
    """Compare two reports (or the files they are made of). Raises InputError for anything but two paths."""
    if len(paths) != 2:
        raise InputError(f"--compare: got {len(paths)} paths; wanted two, the old and the new")
    rules = ship_gate.read(gate).compare if gate else None
    old, new = map(_evidence, paths)
    found = ship_compare.compare(old, new, rules, pairs=_pairs(pairs), version=version)
    code = 1 if found.regressed else 0
    if out is not None:
        written = ship_compare_page.write(found, out, markdown=markdown)
        return Outcome(code, list(map(str, written)), [found.headline, *found.sentences])
    if as_json:
        return Outcome(code, [found.model_dump_json(by_alias=True, indent=1)])
    return Outcome(code, (ship_markdown.comparison(found) if markdown else _plain(found)).splitlines())


def _evidence(path: Path) -> Evidence:
    if path.is_file() and ship_load.schema_of(path) == ship_results.SCHEMA:
        return ship_results.read(path).evidence
    inside = path / ship_report.DATA
    if inside.is_file() and ship_load.schema_of(inside) == ship_results.SCHEMA:
        return ship_results.read(inside).evidence
    return ship_load.load([path])


def _pairs(given: Sequence[str]) -> dict[str, str]:
    found = {}
    for text in given:
        old, equals, new = text.partition("=")
        if not (old and equals and new):
            raise InputError(f"--pair {text}: wanted OLD=NEW, two names of bundles or checkpoints")
        found[old] = new
    return found


def _plain(found: Comparison) -> str:
    """For a terminal: the headline, what is told of it, what was not compared."""
    lines = [found.headline, *(f"  {one}" for one in found.sentences)]
    for finding in ("tolerated", "better"):
        same = [one for one in found.tests if one.finding == finding]
        lines += [f"  {finding}: {ship_compare_page.tested_words(one)}" for one in same]
    lines += [f"not compared: {one.what}: {one.why}" for one in found.not_compared]
    return "\n".join([*lines, *(f"note: {one}" for one in found.caveats)])
