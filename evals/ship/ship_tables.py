"""Rows of the ship report's tables: numbers as text, for the page and for Markdown alike.

In: a `Report` or parts of its evidence. Out: dictionaries of text and small records. Not here: markup.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from evals import formatting as fmt
from evals.asking.eval_results import ORIGINAL
from evals.ship import ship_words as words
from evals.ship.ship_change import Change
from evals.ship.ship_evidence import BundleFacts, DeviceSeen, Evidence, ParitySeen, SubjectSeen, Task, Timing
from evals.ship.ship_flips import reference_of
from evals.ship.ship_quantities import difference
from evals.ship.ship_results import Cell, Report
from evals.stats import flips

STATES = {"passed": "passes", "failed": "not kept", "unproven": "unproven", "missing": "not measured"}


def tiles(report: Report) -> list[dict[str, str]]:
    """At most four figures for the top: of the chosen bundle, or how far the candidates came."""
    verdict, evidence = report.verdict, report.evidence
    chosen = next((name for name in verdict.chosen.values() if name), None)
    bundle = evidence.bundle(chosen) if verdict.ship and chosen else None
    if bundle is None:
        counts = {state: sum(one.state == state for one in verdict.checks) for state in STATES}
        candidates, devices = len(verdict.candidates), len(verdict.devices)
        on = f"on {devices} device{'s' if devices > 1 else ''}" if devices else "no device was measured"
        return [
            {"name": "Candidates", "value": str(candidates), "note": on},
            {"name": "Limits not kept", "value": str(counts["failed"]), "note": "beyond doubt"},
            {"name": "Unproven", "value": str(counts["unproven"]), "note": "the interval crosses the limit"},
            {"name": "Not measured", "value": str(counts["missing"]), "note": "asked for by the gate"},
        ]
    found = []
    for task in evidence.tasks[:1]:
        summary, change = task.summary(bundle.name, ORIGINAL), against(evidence, task, bundle.name, ORIGINAL)
        if summary is not None:
            note = f"{task.name}" + (f", {points(change)} against its checkpoint" if change else "")
            found.append({"name": "Accuracy", "value": fmt.percent(summary.value), "note": note})
    real = [one.name for one in evidence.devices if not one.emulated]
    own = [t for device in real for t in evidence.timings_of(device, bundle.name)]
    timing = next((t for t in own if t.p50("ttft_ms")), None)
    if timing is not None:
        speed = f"; {fmt.significant(timing.decode_tok_s)} tok/s after" if timing.decode_tok_s else ""
        value = fmt.milliseconds(timing.p50("ttft_ms"))
        found.append({"name": "Time to first text", "value": value, "note": f"{timing.device}, p50{speed}"})
        memory = timing.measure("peak_rss_mib")
        if memory is not None:
            value = fmt.mib(memory.spread.most)
            found.append({"name": "Peak memory", "value": value, "note": f"{timing.device}, whole process"})
    size = fmt.size(bundle.size_bytes)
    found.append({"name": "Download", "value": size, "note": f"{bundle.format}, {bundle.precision}"})
    return found


def fleet_row(report: Report, bundle: str) -> dict[str, Any]:
    """One candidate: a cell for each device, in their order."""
    cells = []
    emulated = {one.name for one in report.evidence.devices if one.emulated}
    for device in report.verdict.devices:
        cell = report.verdict.cell(device, bundle)
        timings = [] if device in emulated else report.evidence.timings_of(device, bundle)
        timing = timings[0] if timings else None
        chosen = report.verdict.chosen.get(device) == bundle
        cells.append(
            {"cell": cell, "words": cell_words(cell) if cell else "", "timing": timing, "chosen": chosen}
        )
    return {"bundle": bundle, "cells": cells}


def cell_words(cell: Cell) -> str:
    """The state of a candidate on a device, in words that need no colour."""
    counts = {"failed": cell.failed, "unproven": cell.unproven, "missing": cell.missing}
    return STATES[cell.state] if cell.state == "passed" else f"{counts[cell.state]} {STATES[cell.state]}"


def bundle_row(report: Report, bundle: BundleFacts, number: int) -> dict[str, Any]:
    parts = [
        f"{part.role} {fmt.size(part.bytes)}" + (f" at {part.bits:.3g} bits" if part.bits else "")
        for part in bundle.parts
    ]
    too_large = [one.name for one in bundle.ceilings if not one.fits]
    fits = f"fits all {len(bundle.ceilings)}" if bundle.ceilings else fmt.DASH
    return {
        "number": number,
        "bundle": bundle,
        "parts": "; ".join(parts),
        "too_large": "; ".join(too_large),
        "fits": fits,
    }


def ceilings(evidence: Evidence) -> list[dict[str, str]]:
    """Limits of stores and browsers that the bundles were held against, each once."""
    found = {one.name: one for bundle in evidence.bundles for one in bundle.ceilings}
    return [
        {"name": one.name, "limit": fmt.size(one.limit_bytes), "source": one.source, "note": one.note}
        for one in found.values()
    ]


# --- accuracy ---------------------------------------------------------


def against(evidence: Evidence, task: Task, name: str, variant: str) -> Change | None:
    """A subject's change against the checkpoint; None for the checkpoint itself and where there is none."""
    reference = reference_of(task.subjects, evidence.bundle(name))
    return None if reference in (None, name) else difference(task, str(reference), name, variant)


def points(change: Change | None) -> str:
    return fmt.DASH if change is None else f"{fmt.points(change.estimate, 2)} points"


def task_rows(evidence: Evidence, task: Task) -> dict[str, Any]:
    """Every subject's score, and its change against the checkpoint."""
    return {"task": task, "rows": [_subject_row(evidence, task, one) for one in task.subjects]}


def _subject_row(evidence: Evidence, task: Task, subject: SubjectSeen) -> dict[str, Any]:
    change = against(evidence, task, subject.name, ORIGINAL)
    lost = gained = None
    reference = reference_of(task.subjects, evidence.bundle(subject.name))
    before = task.scores(reference, ORIGINAL) if reference and change else None
    after = task.scores(subject.name, ORIGINAL)
    if before is not None and after is not None:
        level = task.info.right_from
        pairs = [(a, b) for a, b in zip(before, after, strict=True) if a is not None and b is not None]
        counted = flips([a >= level for a, _ in pairs], [b >= level for _, b in pairs])
        lost, gained = counted.right_to_wrong, counted.wrong_to_right
    return {
        "subject": subject,
        "summary": task.summary(subject.name, ORIGINAL),
        "change": change,
        "reference": reference,
        "lost": lost,
        "gained": gained,
        "p": None if change is None else min(1.0, 2 * min(change.p_up, change.p_down)),
    }


def variant_rows(evidence: Evidence, task: Task) -> list[dict[str, Any]]:
    """One row a variant: every subject's share, and whether a bundle lost more than its checkpoint."""
    found = []
    for variant in task.variants:
        cells = []
        for subject in task.subjects:
            summary = task.summary(subject.name, variant.name)
            change = against(evidence, task, subject.name, variant.name) if subject.kind == "bundle" else None
            worse = change is not None and 2 * change.p_down < 0.05
            cells.append({"summary": summary, "change": change, "worse": worse})
        found.append({"variant": variant, "cells": cells})
    return found


# --- devices ----------------------------------------------------------


def device_facts(seen: DeviceSeen) -> list[tuple[str, str]]:
    """The device sheet as pairs; what is not known is left out but for what decides a timing."""
    sheet = seen.sheet
    cores = f"{sheet.cores} cores" + (f", {sheet.cpus} threads" if sheet.cpus else "")
    clusters = "; ".join(
        f"cpu {', '.join(map(str, one.cpus))}"
        + (f" up to {one.max_mhz:.0f} MHz" if one.max_mhz else "")
        + (f", {one.governor}" if one.governor else "")
        for one in sheet.clusters
    )
    battery = "" if sheet.battery_share is None else f", battery at {fmt.percent(sheet.battery_share, 0)}"
    source = sheet.power_source or "source not known"
    warm = ", ".join(f"{one.zone} {one.celsius:.0f} °C" for one in sheet.temperatures)
    facts: list[tuple[str, str | None]] = [
        ("Kind", " ".join(part for part in (sheet.kind, sheet.model) if part)),
        ("Processor", f"{sheet.cpu}, {sheet.architecture}, {cores}"),
        ("Core clusters", clusters),
        ("Limit of the container", f"{sheet.quota_cpus:g} processors" if sheet.quota_cpus else None),
        ("Instructions", ", ".join(sheet.features)),
        ("Accelerators", ", ".join(sheet.accelerators)),
        ("Providers", ", ".join(sheet.providers)),
        ("Memory", fmt.mib(sheet.memory_mib)),
        ("Swap", fmt.mib(sheet.swap_mib) if sheet.swap_mib else None),
        ("Last cache", fmt.size(sheet.last_cache_bytes) if sheet.last_cache_bytes else None),
        ("Memory bandwidth", _bandwidth(seen)),
        ("System", ", ".join(part for part in (sheet.os, sheet.kernel) if part)),
        ("Virtual machine, container", ", ".join(p for p in (sheet.virtual_machine, sheet.container) if p)),
        ("Frequency governor", sheet.governor or "not readable"),
        ("Power", f"{sheet.power_mode or 'mode not known'}, {source}{battery}"),
        ("Temperature", warm or "not readable"),
        ("Thermal state", sheet.thermal_state),
        ("Software", ", ".join(f"{name} {found}" for name, found in sheet.packages.items())),
        ("Language runtime", sheet.language),
        ("Measured by", f"{seen.tool}, {seen.origin}, {seen.created[:10]}"),
        *sheet.extra.items(),
        *((f"Note {i}", note) for i, note in enumerate(seen.notes, 1)),
    ]  # fmt: skip
    return [(name, text) for name, text in facts if text]


def _bandwidth(seen: DeviceSeen) -> str | None:
    found = seen.bandwidth
    if found is None:
        return None
    return f"{found.read_gb_s:.1f} GB/s measured ({found.loop}, {found.threads} threads)"


def sustained_rows(evidence: Evidence, device: str) -> list[dict[str, str]]:
    found = []
    for timing in evidence.timings:
        long = timing.sustained
        if timing.device != device or long is None:
            continue
        ratio = fmt.DASH
        if long.ratio is not None and long.low is not None and long.high is not None:
            ratio = f"{long.ratio:.3f} ({long.low:.3f} to {long.high:.3f})"
        throttled = {True: "throttled", False: "steady", None: "too short to tell"}[long.throttled]
        found.append(
            {
                "bundle": timing.bundle, "minutes": f"{long.measured_s / 60:.1f}", "ratio": ratio,
                "answers": fmt.count(long.answers or len(long.answer_ms)), "reading": throttled,
                "why": long.throttle_evidence or "",
            }
        )  # fmt: skip
    return found


def energy_words(timing: Timing) -> str:
    """Energy of an answer, or a dash."""
    energy = timing.energy
    if energy is None or energy.joule_per_answer is None:
        return fmt.DASH
    text = f"{fmt.significant(energy.joule_per_answer)} J an answer"
    if energy.millijoule_per_token:
        text += f", {fmt.significant(energy.millijoule_per_token)} mJ a token"
    return f"{text} ({energy.source}{', ' + energy.scope if energy.scope else ''})"


def energy_reasons(timings: Sequence[Timing]) -> list[str]:
    """Why there is none, each reason once."""
    reasons = [one.energy.why_not for one in timings if one.energy and one.energy.why_not]
    return list(dict.fromkeys(reasons))


# --- parity -----------------------------------------------------------


def parity_row(one: ParitySeen) -> dict[str, Any]:
    """Texts of one bundle's parity; a dash where something was not measured."""
    pre, main = one.preprocessing, one.main
    pixels = ids = fmt.DASH
    if pre is not None:
        compared = f"{fmt.count(pre.images_equal)} of {fmt.count(pre.images_compared)}"
        pixels = compared if pre.images_compared else "not comparable"
        ids = f"{fmt.count(pre.prompts_equal)} of {fmt.count(pre.prompts)}"
    figures = {
        name: fmt.DASH if main is None else fmt.significant(getattr(main, name), 2)
        for name in ("kl_median", "kl_p99")
    }
    notes = [n for n in (pre.first_pixels, pre.first_ids, pre.why_not_compared) if n] if pre else []
    if one.emulated:
        notes.append(f"emulated: {one.emulated_why}")
    if one.error:
        notes.append(one.error)
    return {
        "one": one,
        "pixels": pixels,
        "ids": ids,
        "kl": fmt.DASH if main is None else words.estimate(main.kl_mean),
        "top1": fmt.DASH if main is None else fmt.percent(main.top1_agreement.value, 2),
        "perplexity": fmt.DASH if main is None else words.estimate(main.perplexity_ratio, 4),
        "prefix": fmt.DASH if one.greedy is None else fmt.percent(one.greedy.prefix_share.value),
        "notes": notes,
        **figures,
    }
