"""The report that decides whether to ship: files in, a verdict out, as a page, as JSON and as Markdown.

In: bench.json, eval.json, parity.json (or directories of them), a gate. Out: `index.html`, `report.json` and,
where asked, `report.md` in one directory. Not here: the verdict (`evals/ship/ship_checks.py`), the page
(`evals/ship/ship_page.py`), measuring.
"""

from __future__ import annotations

import datetime
from collections.abc import Sequence
from pathlib import Path

from evals.ship import ship_checks, ship_gate, ship_load, ship_markdown, ship_page, ship_results
from evals.ship.ship_change import LEAST_ROUNDS
from evals.ship.ship_evidence import Evidence
from evals.ship.ship_gate import Gate
from evals.ship.ship_results import Report
from runtime import files

PAGE, DATA, MARKDOWN = "index.html", "report.json", "report.md"
BUSY = 0.10
"""Share of the machine that others used, from which a caveat tells of it."""
COSTLY = 0.02


def make(paths: Sequence[Path], gate: Gate | None = None, *, version: str = "") -> Report:
    """The report of these files; a report.json gives its own evidence, and its gate where none is given.

    Raises InputError for files that cannot be read, contradict each other or do not fit the gate.
    """
    if len(paths) == 1 and paths[0].is_file() and ship_load.schema_of(paths[0]) == ship_results.SCHEMA:
        before = ship_results.read(paths[0])
        evidence, given = before.evidence, gate is not None or before.gate_given
        gate = gate or before.gate
    else:
        evidence, given = ship_load.load(paths), gate is not None
    gate = gate or ship_gate.DEFAULT
    return Report(
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        version=version,
        gate=gate,
        gate_given=given,
        verdict=ship_checks.decide(evidence, gate),
        evidence=evidence,
        caveats=tuple(caveats(evidence)),
    )


def write(report: Report, out: Path, *, markdown: bool = False) -> Path:
    """Write report.json and index.html (and report.md), each whole or not at all; the page's path.

    Raises MissingExtra without matplotlib or jinja2, before anything is written.
    """
    page = ship_page.render(report)
    files.make_directory(out)
    ship_results.write(report, out / DATA)
    if markdown:
        files.write_text(out / MARKDOWN, ship_markdown.report(report))
    files.write_text(out / PAGE, page)
    return out / PAGE


def caveats(evidence: Evidence) -> list[str]:
    """What the evidence itself says against its figures."""
    found = []
    busy = [one for one in evidence.timings if (one.other_share or 0) > BUSY]
    if busy:
        worst = max(busy, key=lambda one: one.other_share or 0)
        found.append(
            f"Others used up to {100 * (worst.other_share or 0):.0f} % of {worst.device} while "
            f"{worst.bundle} was timed: its times are too long or too uneven."
        )
    costly = [one for one in evidence.timings if (one.harness_share or 0) > COSTLY]
    if costly:
        worst = max(costly, key=lambda one: one.harness_share or 0)
        found.append(
            f"The timing itself took {100 * (worst.harness_share or 0):.1f} % of what it timed for "
            f"{worst.bundle} on {worst.device}."
        )
    few = {t.device for t in evidence.timings for m in t.measures if len(m.process_p50) < LEAST_ROUNDS}
    if few:
        found.append(
            f"On {', '.join(sorted(few))} fewer than {LEAST_ROUNDS} processes were timed: no interval, and "
            "no comparison with another session."
        )
    machines = [one.name for one in evidence.devices if one.sheet.virtual_machine or one.sheet.container]
    if machines:
        found.append(
            f"{', '.join(machines)}: a virtual machine or container; times carry other people's load."
        )
    return found
