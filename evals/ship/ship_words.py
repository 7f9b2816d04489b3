"""The verdict in words: what a check found, why a candidate ships or does not, what would settle a doubt.

In: rules, values, cells and checks. Out: sentences, computed, never written by hand. Not here: deciding
(`evals/ship/ship_checks.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from evals import formatting as fmt
from evals.asking.eval_results import ORIGINAL
from evals.parity.parity_results import Estimate
from evals.ship.ship_gate import Gate, Rule
from evals.ship.ship_quantities import Absent, Found, Place, Value
from evals.ship.ship_results import Cell, Check, State

TOLD = 4
"""Reasons that the verdict's sentences tell of one candidate; the page has all."""


def number(value: float, unit: str) -> str:
    """A value of a check with its unit, as the page and Markdown write it."""
    value = value or 0.0  # minus zero
    text = f"{value:,.0f}" if unit == "" and value.is_integer() else fmt.significant(value)
    if unit in ("%", "points"):
        text = f"{value:.2f}".replace("-0.00", "0.00").replace("-", fmt.MINUS)
    return f"{text}{fmt.THIN}{unit}" if unit else text


def interval(low: float, high: float, unit: str) -> str:
    """`1.40 to 4.30 points`: the unit once."""
    bare = number(low, unit).removesuffix(f"{fmt.THIN}{unit}")
    return f"{bare} to {number(high, unit)}"


def limit(rule_min: float | None, rule_max: float | None, unit: str) -> str:
    """`at most 500 ms`, `at least 97 %`, `3 to 5`."""
    low, high = (None if x is None else f"{x:g}".replace("-", fmt.MINUS) for x in (rule_min, rule_max))
    if unit == "points" and (high or low) == "1":
        unit = "point"
    space = f"{fmt.THIN}{unit}" if unit else ""
    if low is None:
        return f"at most {high}{space}"
    return f"at least {low}{space}" if high is None else f"{low} to {high}{space}"


def estimate(found: Estimate, digits: int = 2) -> str:
    """`0.0020 (0.0016 to 0.0024)`."""
    value, low, high = (fmt.significant(one, digits) for one in (found.value, found.low, found.high))
    return f"{value} ({low} to {high})"


def place_words(place: Place | Check) -> str:
    """Where a value holds: ` on easy-vqa, blur-3` or ` on Pixel 8, 512px`."""
    variant = "" if place.variant in ("", ORIGINAL) else place.variant
    parts = [part for part in (place.task, variant, place.device, place.point) if part]
    return f" on {', '.join(parts)}" if parts else ""


def text_of(rule: Rule, label: str, value: Value, state: State) -> str:
    wanted = limit(rule.min, rule.max, rule.kind.unit)
    what = f"{label}{place_words(value.place)}"
    if isinstance(value, Absent):
        return f"{what}: not measured ({value.why}); wanted {wanted}"
    got = number(value.value, rule.kind.unit)
    if value.low is not None and value.high is not None and not value.exact:
        got += f" ({interval(value.low, value.high, rule.kind.unit)})"
    return f"{what}: {got}, wanted {wanted}" + (_more(rule, value) if state == "unproven" else "")


def _more(rule: Rule, found: Found) -> str:
    """What would settle it, if the figure stays as it is."""
    if found.too_few:
        return f"; {found.basis}"
    if found.low is None or found.high is None or found.n == 0:
        return ""
    gaps = [abs(found.value - bound) for bound in (rule.min, rule.max) if bound is not None]
    reach = max(found.high - found.value, found.value - found.low)
    gap = min(gaps)
    if gap <= reach / 30:
        return "; the figure is at its limit, more data will hardly decide"
    growth = (reach / gap) ** 2
    if rule.quantity == "accuracy_drop_points" and found.value == 0 and found.low == -found.high:
        # no flip at all: the bound is Wilson's for 0 of n, which falls as 1 / n
        growth = (100 / gap - 1) / (100 / reach - 1)
    needed = math.ceil(found.n * growth)
    things = "processes" if rule.kind.scope == "device" else "questions"
    return f"; the interval reaches across the limit, about {needed:,} {things} would decide"


def headline(ship: bool, chosen: Mapping[str, str | None], gate: Gate) -> str:
    if not ship:
        return "Do not ship"
    names = list(dict.fromkeys(name for name in chosen.values() if name))
    if gate.require == "all":
        return "Ship: every candidate passes"
    return f"Ship {names[0]}" if len(names) == 1 else f"Ship {', '.join(names[:-1])} and {names[-1]}"


def sentences(
    ship: bool, gate: Gate, chosen: Mapping[str, str | None], cells: Sequence[Cell], checks: Sequence[Check]
) -> list[str]:
    found = []
    for device, name in chosen.items():
        own = [one for one in cells if one.device == device]
        on = f"On {device}, " if device else ""
        passing = sum(one.state == "passed" for one in own)
        if name is not None:
            cell = next(one for one in own if one.bundle == name)
            words = {"size": "the smallest", "speed": "the fastest", "accuracy": "the most accurate"}
            among = f"; it is {words[gate.prefer]} of {passing} that do" if passing > 1 else ""
            over = f" ({cell.missing} were not measured)" if cell.missing else ""
            text = f"{name} keeps all {cell.passed} limits{over}{among}."
        else:
            text = f"no candidate of {len(own)} keeps every limit."
        found.append(on + text if on else text[0].upper() + text[1:] if name is None else text)
    if not ship:
        found += _reasons(gate, chosen, cells, checks)
    return found


def _reasons(
    gate: Gate, chosen: Mapping[str, str | None], cells: Sequence[Cell], checks: Sequence[Check]
) -> list[str]:
    """Of every device that is not served, what keeps the nearest candidate back; all of them for `all`.

    One that was measured there is nearer than one that was not, which has broken no limit for that alone.
    """
    behind: list[Cell] = []
    for device in chosen:
        own = [one for one in cells if one.device == device and one.state != "passed"]
        if gate.require == "all":
            behind += own
        elif chosen[device] is None:
            there = {one.bundle for one in checks if one.device == device and one.state != "missing"}
            behind.append(
                min(own, key=lambda one: (one.bundle not in there, one.failed, one.unproven, one.missing))
            )
    devices: dict[str, set[str]] = {}
    for cell in behind:
        devices.setdefault(cell.bundle, set()).add(cell.device)
    return [_reason(gate, bundle, where, checks) for bundle, where in devices.items()]


def _reason(gate: Gate, bundle: str, devices: set[str], checks: Sequence[Check]) -> str:
    """What one candidate does not keep; what was not measured is told once for a quantity."""
    own = [one for one in checks if one.bundle == bundle and (one.everywhere or one.device in devices)]
    unmet = [one for state in ("failed", "unproven") for one in own if one.state == state]
    parts = [one.text for one in unmet[:TOLD]]
    if len(unmet) > TOLD:
        parts.append(f"and {len(unmet) - TOLD} more")
    absent: dict[str, list[str]] = {}
    for one in own:
        if one.state == "missing" and gate.missing == "fail":
            absent.setdefault(one.label, []).append(place_words(one).removeprefix(" on "))
    if absent:
        places = {label: "; ".join(filter(None, where)) for label, where in absent.items()}
        told = [f"{label} ({where})" if where else label for label, where in places.items()]
        parts.append(f"not measured: {', '.join(told)}")
    return f"{bundle}: {'; '.join(parts) or 'no rule had anything to judge'}."
