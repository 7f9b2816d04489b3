"""Ship, or do not ship: every candidate against every rule of the gate, on every device.

In: `Evidence` and a `Gate`. Out: a `Verdict`. Not here: reading a quantity (`evals/ship/ship_quantities.py`),
words (`evals/ship/ship_words.py`), drawing.

A limit that nobody measured is not kept. A figure inside its limit whose interval reaches outside proves
nothing yet; the check then says how much more data would.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from fnmatch import fnmatchcase

from evals.asking.eval_results import ORIGINAL
from evals.ship import ship_words as words
from evals.ship.ship_evidence import BundleFacts, Evidence
from evals.ship.ship_gate import Gate, Rule
from evals.ship.ship_quantities import Absent, Found, Value, values
from evals.ship.ship_results import Cell, Check, State, Verdict
from runtime.errors import InputError

ORDER: tuple[State, ...] = ("failed", "unproven", "missing", "passed")
"""The worst first."""
NO_DEVICE = ""


def decide(evidence: Evidence, gate: Gate) -> Verdict:
    """Raises InputError when no bundle is a candidate, or a device of the gate is in no file."""
    candidates = _candidates(evidence, gate)
    measured = [one.name for one in evidence.devices]
    devices = list(gate.devices) or measured
    if unknown := [name for name in devices if name not in measured]:
        raise InputError(
            f"gate: device {unknown[0]!r} is in no bench.json that was given "
            f"(devices: {', '.join(measured) or 'none'})"
        )
    checks = [check for bundle in candidates for check in _checks(evidence, gate, bundle, devices)]
    cells = [
        _cell(gate, device, bundle.name, checks) for device in devices or [NO_DEVICE] for bundle in candidates
    ]
    chosen = {device: _choice(evidence, gate, device, cells) for device in devices or [NO_DEVICE]}
    every = all(cell.state == "passed" for cell in cells)
    ship = every if gate.require == "all" else all(chosen.values())
    return Verdict(
        ship=ship,
        headline=words.headline(ship, chosen, gate),
        sentences=tuple(words.sentences(ship, gate, chosen, cells, checks)),
        candidates=tuple(one.name for one in candidates),
        devices=tuple(devices),
        chosen=chosen,
        cells=tuple(cells),
        checks=tuple(checks),
    )


def _candidates(evidence: Evidence, gate: Gate) -> list[BundleFacts]:
    found = [one for one in evidence.bundles if any(fnmatchcase(one.name, p) for p in gate.candidates)]
    for pattern in gate.candidates:
        if not any(fnmatchcase(one.name, pattern) for one in evidence.bundles):
            known = ", ".join(one.name for one in evidence.bundles) or "none"
            raise InputError(
                f"gate: candidate {pattern!r} is no bundle of the files that were given (bundles: {known})"
            )
    return found


def _checks(evidence: Evidence, gate: Gate, bundle: BundleFacts, devices: Sequence[str]) -> list[Check]:
    return [
        _check(gate, number, bundle.name, value)
        for number, rule in enumerate(gate.rules)
        if fnmatchcase(bundle.name, rule.bundle)
        for value in values(evidence, rule, bundle, devices)
    ]


def _check(gate: Gate, number: int, bundle: str, value: Value) -> Check:
    rule, place = gate.rules[number], value.place
    state: State = "missing" if isinstance(value, Absent) else _state(gate, rule, value)
    label = rule.name or rule.kind.label + (f", p{rule.percentile}" if rule.percentile != 50 else "")
    found = value if isinstance(value, Found) else None
    return Check(
        rule=number,
        label=label,
        bundle=bundle,
        task=place.task,
        variant=place.variant,
        device=place.device,
        point=place.point,
        state=state,
        unit=rule.kind.unit,
        value=found.value if found else None,
        low=found.low if found else None,
        high=found.high if found else None,
        min=rule.min,
        max=rule.max,
        basis=found.basis if found else "",
        text=words.text_of(rule, label, value, state),
    )


def _state(gate: Gate, rule: Rule, found: Found) -> State:
    low, high = found.low, found.high
    if gate.evidence == "estimate" or ((low is None or high is None) and not found.too_few):
        low = high = found.value
    elif low is None or high is None:
        return "unproven" if _inside(rule, found.value) else "failed"
    if _inside(rule, low) and _inside(rule, high):
        return "passed"
    outside = (rule.max is not None and low > rule.max) or (rule.min is not None and high < rule.min)
    return "failed" if outside else "unproven"


def _inside(rule: Rule, value: float) -> bool:
    # a limit of 60 MB is kept by 60 MB, however the division rounded
    slack = 1e-9 * max(1.0, abs(value))
    return (rule.max is None or value <= rule.max + slack) and (rule.min is None or value >= rule.min - slack)


# --- cells and choice -------------------------------------------------


def _cell(gate: Gate, device: str, bundle: str, checks: Sequence[Check]) -> Cell:
    own = [one for one in checks if one.bundle == bundle and (one.everywhere or one.device == device)]
    counts = {state: sum(one.state == state for one in own) for state in ORDER}
    deciding = [s for s in ORDER if counts[s] and not (s == "missing" and gate.missing == "ignore")]
    # nothing but passed-over gaps is no reason to ship
    return Cell(device=device, bundle=bundle, state=deciding[0] if deciding else "missing", **counts)


def _choice(evidence: Evidence, gate: Gate, device: str, cells: Sequence[Cell]) -> str | None:
    passing = [one.bundle for one in cells if one.device == device and one.state == "passed"]
    if not passing:
        return None
    order = {name: i for i, name in enumerate(passing)}
    return min(passing, key=lambda name: (*_rank(evidence, gate, device, name), order[name]))


def _rank(evidence: Evidence, gate: Gate, device: str, name: str) -> tuple[float, float, float]:
    """What is preferred first, the others as tie-breaks; smaller is better."""
    bundle = evidence.bundle(name)
    size = bundle.size_bytes if bundle else None
    times = [t.p50("ttft_ms") for t in evidence.timings_of(device, name)]
    speed = max((t for t in times if t is not None), default=None)
    shares = [s.value for t in evidence.tasks if (s := t.summary(name, ORIGINAL))]
    parts = {
        "size": math.inf if size is None else float(size),
        "speed": math.inf if speed is None else speed,
        "accuracy": -sum(shares) / len(shares) if shares else math.inf,
    }
    first = parts.pop(gate.prefer)
    return (first, *parts.values())  # type: ignore[return-value]
