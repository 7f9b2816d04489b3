"""Timings and memory before and after, process by process.

In: two `Evidence`s. Out: `Tested` records, not judged yet; what could not be compared and why.
Not here: judging (`evals/ship/ship_compare.py`), the t test (`evals/ship/ship_change.py`).

Both sides must have been measured alike: device, governor, power mode, threads, picture, question, tokens.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from evals.bench.bench_conditions import Reason
from evals.ship import ship_change
from evals.ship.ship_change import Change, Estimate
from evals.ship.ship_compare_results import Tested
from evals.ship.ship_evidence import DeviceSeen, Evidence, Measure, Timing, unlike
from evals.ship.ship_gate import KINDS, CompareRules
from runtime.errors import InputError

JUDGED = ("load_warm_ms", "ttft_ms", "decode_ms", "end_to_end_ms", "peak_rss_mib")
"""What a user of the device feels."""
SHOWN = ("load_cold_ms", "preprocess_ms", "encode_ms", "prefill_ms")
"""Where it comes from."""
ALIKE_DEVICE = ("cpu", "architecture", "cores", "governor", "power_mode", "power_source")
ALIKE_POINT = ("picture", "picture_sha256", "question", "threads", "decode_tokens")
ONLY_NEW = "only in new"
LABELS: dict[str, str] = {kind.quantity: kind.label for kind in KINDS}


def tests(
    old: Evidence, new: Evidence, matched: Mapping[str, str], rules: CompareRules
) -> tuple[list[Tested], list[Reason]]:
    found: list[Tested] = []
    missing: list[Reason] = []
    before = {one.name: one for one in old.devices}
    now = {one.name: one for one in new.devices}
    missing += [Reason(what=name, why="only in old") for name in before if name not in now]
    for device in new.devices:
        known = before.get(device.name)
        why = _unlike_device(known, device)
        if why is not None:
            missing.append(Reason(what=f"timings on {device.name}", why=why))
            continue
        controls = _controls(old, new, device.name, matched, rules)
        for timing in (one for one in new.timings if one.device == device.name):
            if timing.bundle in rules.control:
                continue
            own, reasons = _timing_tests(old, timing, matched, controls)
            found += own
            missing += reasons
    return found, missing


def _unlike_device(old: DeviceSeen | None, new: DeviceSeen) -> str | None:
    if old is None:
        return ONLY_NEW
    if old.emulated or new.emulated:
        return f"emulated: {new.emulated_why or old.emulated_why}"
    return unlike(old.sheet, new.sheet, ALIKE_DEVICE)


def _timing_tests(
    old: Evidence, new: Timing, matched: Mapping[str, str], controls: Mapping[tuple[str, str], Estimate]
) -> tuple[list[Tested], list[Reason]]:
    was = matched.get(new.bundle)
    before = old.timing(new.device, was, new.point) if was else None
    if was is None:
        return [], []
    place = f"{new.bundle} on {new.device}, {new.point}"
    if before is None:
        return [], [Reason(what=place, why=ONLY_NEW)]
    if why := unlike(before, new, ALIKE_POINT):
        return [], [Reason(what=place, why=why)]
    found, reasons = [], []
    for name in (*JUDGED, *SHOWN):
        a, b = before.measure(name), new.measure(name)
        if a is None or b is None:
            continue
        estimates = _estimates(a, b)
        if isinstance(estimates, str):
            reasons.append(Reason(what=f"{place}: {LABELS[name]}", why=estimates))
            continue
        control = controls.get((name, new.point))
        change = ship_change.ratio(*estimates, control if name.endswith("_ms") else None)
        found.append(_tested(change, name, a, b, new, was))
    return found, reasons


def _estimates(old: Measure, new: Measure) -> tuple[Estimate, Estimate] | str:
    """Both sides' logarithms, or why there are none."""
    fewest = min(len(old.process_p50), len(new.process_p50))
    if fewest < ship_change.LEAST_ROUNDS:
        return f"{fewest} processes; a test needs {ship_change.LEAST_ROUNDS} a side, and ten to see 5 %"
    if min(*old.process_p50, *new.process_p50) <= 0:
        return "a time is 0"
    before, now = (ship_change.of_rounds([[one] for one in m.process_p50]) for m in (old, new))
    return before, now


def _tested(change: Change, name: str, old: Measure, new: Measure, timing: Timing, was: str) -> Tested:
    interval = ship_change.interval_percent(change)
    return Tested(
        family="speed" if name in JUDGED else "stages",
        label=LABELS[name], bundle=timing.bundle, old_bundle=was, device=timing.device,
        point=timing.point, unit="%", old=old.spread.p50, new=new.spread.p50,
        change=100 * math.expm1(change.estimate), low=100 * interval.low, high=100 * interval.high,
        p_worse=change.p_up, p_better=change.p_down, detectable=100 * math.expm1(change.detectable),
        units=change.units, finding="unchanged",
    )  # fmt: skip


def _controls(
    old: Evidence, new: Evidence, device: str, matched: Mapping[str, str], rules: CompareRules
) -> dict[tuple[str, str], Estimate]:
    """(metric, grid point) to what happened to the bundles that did not change."""
    found: dict[tuple[str, str], list[Estimate]] = {}
    for name in rules.control:
        if name not in matched:
            raise InputError(f"gate: control {name!r} is not in both files")
        for timing in new.timings_of(device, name):
            before = old.timing(device, matched[name], timing.point)
            for measure in timing.measures:
                known = before.measure(measure.metric) if before else None
                estimates = _estimates(known, measure) if known else ""
                if not isinstance(estimates, str):
                    found.setdefault((measure.metric, timing.point), []).append(estimates[1] - estimates[0])
    return {key: ship_change.mean_of(several) for key, several in found.items()}
