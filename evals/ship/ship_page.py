"""The ship report as one self-contained HTML page: the verdict first, then everything that it rests on.

In: a `Report`. Out: HTML text; no network, no script. Not here: the sentences (`ship/ship_words.py`), the
pictures (`ship/ship_charts.py`), the tables' rows (`ship/ship_tables.py`), files (`ship/ship_report.py`).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evals import formatting as fmt
from evals.asking.eval_results import ORIGINAL
from evals.chart_stages import StageRow, stage_bars
from evals.ship import ship_charts as charts
from evals.ship import ship_tables as tables
from evals.ship import ship_words as words
from evals.ship.ship_evidence import Evidence, Task
from evals.ship.ship_results import Check, Report
from evals.svg import Chart
from runtime.errors import MissingExtra

SECTIONS = (
    ("limits", "Limits"),
    ("fleet", "Devices and bundles"),
    ("tradeoff", "Trade-off"),
    ("accuracy", "Accuracy"),
    ("robustness", "Changed questions"),
    ("flips", "Flips"),
    ("speed", "Speed and memory"),
    ("parity", "Parity"),
    ("devices", "Device sheets"),
    ("method", "Method"),
    ("missing", "Not measured"),
)
MOST_PICTURE_BYTES = 2_500_000
"""Of all pictures of flips together; the page stays below 5 MB."""


def render(report: Report) -> str:
    """The page. Raises MissingExtra without jinja2 or matplotlib."""
    return template("ship.html", _context(report))


def template(name: str, context: dict[str, Any]) -> str:
    """A template beside this file, filled; every value from data is escaped."""
    try:
        import jinja2
    except ImportError:
        raise MissingExtra("jinja2", "report") from None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader([Path(__file__).parent, Path(__file__).parents[1]]),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals["fmt"] = fmt
    return environment.get_template(name).render(**context)


def top(version: str, created: str, headline: str, sentences: Sequence[str]) -> dict[str, Any]:
    """What the head of a page takes from its record."""
    return {"version": version, "created": created, "headline": headline, "sentences": sentences}


def _context(report: Report) -> dict[str, Any]:
    evidence, verdict = report.evidence, report.verdict
    numbers = {one.name: i for i, one in enumerate(evidence.bundles, 1)}
    seen = sorted(evidence.devices, key=lambda one: one.emulated)
    devices = [_device(report, one.name, numbers) for one in seen]
    drawn = [_tradeoff(report, name, numbers, i == 0) for i, name in enumerate(_device_names(evidence))]
    tradeoffs = [one for one in drawn if one is not None]
    robust = [r for task in evidence.tasks if (r := _robustness(report, task)) is not None]
    flips = _flips(report)
    present = {
        "fleet": bool(verdict.devices),
        "tradeoff": bool(tradeoffs),
        "accuracy": bool(evidence.tasks),
        "robustness": bool(robust),
        "flips": bool(flips),
        "speed": bool(evidence.timings),
        "parity": bool(evidence.parity),
        "devices": bool(evidence.devices),
        "missing": bool(evidence.missing),
    }
    return {
        "top": {
            "kind": "report",
            "first": "limits",
            "good": verdict.ship,
            "verdict": "Ship" if verdict.ship else "Do not ship",
            "about": report.gate.name or "gate.yaml",
            **top(report.version, report.created, verdict.headline, verdict.sentences),
        },
        "r": report,
        "v": verdict,
        "e": evidence,
        "numbers": numbers,
        "sections": [(id, title) for id, title in SECTIONS if present.get(id, True)],
        "tiles": tables.tiles(report),
        "groups": [_group(report, name) for name in _nearest_first(report)],
        "fleet": [tables.fleet_row(report, name) for name in verdict.candidates] if verdict.devices else [],
        "tradeoffs": tradeoffs,
        "bundles": [tables.bundle_row(report, one, numbers[one.name]) for one in evidence.bundles],
        "tasks": [tables.task_rows(evidence, task) for task in evidence.tasks],
        "robust": robust,
        "flips": flips,
        "devices": devices,
        "parity": [tables.parity_row(one) for one in evidence.parity],
        "energy": tables.energy_words,
        "ceilings": tables.ceilings(evidence),
    }


def _device_names(evidence: Evidence) -> list[str]:
    """Devices whose times count; one empty name where there is none, for the picture of size alone."""
    return [one.name for one in evidence.devices if not one.emulated] or [""]


def _nearest_first(report: Report) -> list[str]:
    """Candidates: what is chosen, then by how little they miss."""
    chosen = [name for name in report.verdict.chosen.values() if name]
    misses: dict[str, list[int]] = defaultdict(lambda: [0, 0, 0])
    for cell in report.verdict.cells:
        for i, count in enumerate((cell.failed, cell.unproven, cell.missing)):
            misses[cell.bundle][i] += count
    return sorted(report.verdict.candidates, key=lambda name: (name not in chosen, misses[name]))


def _group(report: Report, bundle: str) -> dict[str, Any]:
    """A candidate's checks, what is not kept first."""
    own = [one for one in report.verdict.checks if one.bundle == bundle]
    order = {"failed": 0, "unproven": 1, "missing": 2, "passed": 3}
    counts = {state: sum(one.state == state for one in own) for state in order}
    cells = [one for one in report.verdict.cells if one.bundle == bundle]
    return {
        "bundle": bundle,
        "checks": _folded([_check_row(one) for one in sorted(own, key=lambda one: order[one.state])]),
        "counts": counts,
        "chosen": bundle in report.verdict.chosen.values(),
        "passes": bool(cells) and all(one.state == "passed" for one in cells),
    }


def _folded(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one limit that was not measured in several places become one: a bundle for phones has nothing
    to say of the fleet's boards, and says it once."""
    found: list[dict[str, Any]] = []
    absent: dict[tuple[str, ...], dict[str, Any]] = {}
    for row in rows:
        key = tuple(row[name] for name in ("what", "wanted", "why"))
        if row["check"].state == "missing" and key in absent:
            absent[key]["where"] += f"; {row['where']}"
            continue
        if row["check"].state == "missing":
            absent[key] = row
        found.append(row)
    return found


def _check_row(one: Check) -> dict[str, Any]:
    interval = ""
    if one.low is not None and one.high is not None and one.low != one.high:
        interval = words.interval(one.low, one.high, one.unit)
    more = one.text.partition("; ")[2] if one.state == "unproven" else ""
    return {
        "check": one,
        "what": one.label,
        "where": words.place_words(one).removeprefix(" on "),
        "got": fmt.DASH if one.value is None else words.number(one.value, one.unit),
        "interval": interval,
        "wanted": words.limit(one.min, one.max, one.unit),
        "more": "" if more == one.basis else more,
        "why": one.text.partition("not measured (")[2].partition("); wanted")[0],
    }


def _tradeoff(report: Report, device: str, numbers: dict[str, int], first: bool) -> dict[str, Any] | None:
    """A picture for one device; times are those of the first grid point. Sizes go with the first device."""
    evidence = report.evidence
    candidates = []
    for bundle in evidence.bundles:
        timing = next(iter(evidence.timings_of(device, bundle.name)), None)
        shares = [s for task in evidence.tasks if (s := task.summary(bundle.name, ORIGINAL)) is not None]
        one = shares[0] if len(shares) == 1 else None
        cell = report.verdict.cell(device, bundle.name)
        candidates.append(
            charts.Candidate(
                number=numbers[bundle.name],
                name=bundle.name,
                state=cell.state if cell else "missing",
                size_mb=None if bundle.size_bytes is None else bundle.size_bytes / 1e6,
                ttft_ms=timing.p50("ttft_ms") if timing else None,
                accuracy=100 * sum(s.value for s in shares) / len(shares) if shares else None,
                low=100 * one.low if one else None,
                high=100 * one.high if one else None,
            )
        )
    chart = charts.tradeoff(candidates, device, sizes=first)
    if chart is None:
        return None
    best = charts.front(candidates)
    unbeaten = [f"{one.number} {one.name}" for one in candidates if one.number in best]
    return {"device": device, "chart": chart, "unbeaten": unbeaten, "tasks": len(evidence.tasks)}


def _robustness(report: Report, task: Task) -> dict[str, Any] | None:
    """None where only the questions as they are were asked."""
    if len(task.variants) < 2:
        return None
    chosen = set(report.verdict.chosen.values())
    named = [one.name for one in task.subjects if one.kind != "bundle" or one.name in chosen]
    strong = {name: i for i, name in enumerate(named)}
    families: dict[str, list[Any]] = defaultdict(list)
    for variant in task.variants:
        if variant.severity is not None:
            families[variant.family].append(variant)
    panels = []
    for family, variants in families.items():
        variants.sort(key=lambda one: one.severity)
        lines = [
            charts.Line(subject.name, strong.get(subject.name), (0, *(v.severity for v in variants)), percent)
            for subject in task.subjects
            if (percent := _percents(task, subject.name, [ORIGINAL, *(v.name for v in variants)]))
        ]
        panels.append((family, lines))
    colours = ("kd", "masters", "ink")
    return {
        "task": task.name,
        "chart": charts.robustness(panels),
        "legend": [(name, colours[i % 3]) for name, i in strong.items()],
        "rows": tables.variant_rows(report.evidence, task),
        "subjects": [one.name for one in task.subjects],
    }


def _percents(task: Task, subject: str, variants: list[str]) -> tuple[float, ...] | None:
    found = [task.summary(subject, variant) for variant in variants]
    known = [100 * one.value for one in found if one is not None]
    return tuple(known) if len(known) == len(variants) else None


def _flips(report: Report) -> list[dict[str, Any]]:
    """By bundle; pictures until their room is used up."""
    room = MOST_PICTURE_BYTES
    found: dict[str, list[Any]] = defaultdict(list)
    for flip in report.evidence.flips:
        room -= len(flip.picture or "")
        found[flip.bundle].append({"flip": flip, "picture": flip.picture if room > 0 else None})
    chosen = set(report.verdict.chosen.values())
    ordered = sorted(found, key=lambda name: name not in chosen)
    return [{"bundle": name, "flips": found[name]} for name in ordered]


def _device(report: Report, name: str, numbers: dict[str, int]) -> dict[str, Any]:
    evidence = report.evidence
    seen = next(one for one in evidence.devices if one.name == name)
    points = list(dict.fromkeys(one.point for one in evidence.timings if one.device == name))
    return {
        "seen": seen,
        "points": [_point(evidence, name, point, numbers) for point in points],
        "facts": tables.device_facts(seen),
        "sustained": _sustained(evidence, name),
        "long": tables.sustained_rows(evidence, name),
    }


def _point(evidence: Evidence, device: str, point: str, numbers: dict[str, int]) -> dict[str, Any]:
    timings = [one for one in evidence.timings if (one.device, one.point) == (device, point)]
    rows = [
        StageRow(
            f"{one.bundle} on {device}, {point}", f"{numbers[one.bundle]}  {one.bundle}",
            *(one.p50(name) for name in ("preprocess_ms", "encode_ms", "prefill_ms", "ttft_ms")),
        )
        for one in timings
    ]  # fmt: skip
    drawn = [row for row in rows if row.ttft_ms is not None or row.prefill_ms is not None]
    return {
        "timings": [(numbers[one.bundle], one) for one in timings],
        "first": timings[0],
        "chart": stage_bars(drawn) if drawn else None,
        "no_energy": tables.energy_reasons(timings),
        "conditions": list(dict.fromkeys(one.conditions for one in timings)),
    }


def _sustained(evidence: Evidence, device: str) -> Chart | None:
    runs = []
    for timing in (one for one in evidence.timings if one.device == device and one.sustained):
        windows = [w for w in timing.sustained.windows if w.end_to_end_ms] if timing.sustained else []
        runs.append(
            charts.Run(
                timing.bundle,
                tuple((w.start_s + w.end_s) / 120 for w in windows),
                tuple(w.end_to_end_ms or 0.0 for w in windows),
            )
        )
    return charts.sustained(runs)
