"""What `report --compare` found, in words.

In: tested quantities and facts. Out: sentences, computed. Not here: testing and judging.
"""

from __future__ import annotations

from collections.abc import Sequence

from evals import formatting as fmt
from evals.ship.ship_compare_results import Fact, Tested
from evals.ship.ship_gate import CompareRules


def change_words(one: Tested) -> str:
    """`-1.02 points (-1.4 to -0.6)`, `+5.1 % (4.0 to 6.2)`."""

    def signed(value: float) -> str:
        text = f"{value:+.2f}"
        return "0.00" if float(text) == 0 else text.replace("-", fmt.MINUS)

    unit = " points" if one.unit == "points" else f"{fmt.THIN}%"
    return f"{signed(one.change)}{unit} ({signed(one.low)} to {signed(one.high)})"


def place_words(one: Tested) -> str:
    return ", ".join(part for part in (one.task, one.variant, one.device, one.point) if part)


def headline(findings: Sequence[str], gone: int, *, strict: bool = False) -> str:
    """gone: how much of what the old side measured could not be compared; strict: that counts."""
    worse, better = findings.count("worse"), findings.count("better")
    if gone and strict and not worse:
        return f"Incomplete, {gone} not compared"
    text = f"{worse} regression{'s' if worse > 1 else ''}" if worse else "No regression"
    if better and not worse:
        text += f", {better} improvement{'s' if better > 1 else ''}"
    return f"{text}, {gone} not compared" if gone else text


def sentences(tests: Sequence[Tested], facts: Sequence[Fact]) -> list[str]:
    """Every regression, then what the tests that show nothing could not have seen."""
    told = [
        f"{one.bundle}: {one.label} on {place_words(one)} {change_words(one)}, "
        f"{fmt.p_value(one.p_worse_adjusted or 0.0)} adjusted."
        for one in tests
        if one.finding == "worse"
    ]
    told += [
        f"{one.bundle}: {one.label} {one.old} before, {one.new} now."
        for one in facts
        if one.finding == "worse"
    ]
    for unit, what in (("points", "accuracy"), ("%", "timings and memory")):
        still = [one for one in tests if one.unit == unit and one.finding == "unchanged"]
        if still:
            blind = max(still, key=lambda one: one.detectable)
            size = f"{blind.detectable:.2f}{fmt.THIN}%" if unit == "%" else f"{blind.detectable:.2f} points"
            figures = f"{len(still)} figure{'s' if len(still) > 1 else ''}"
            told.append(
                f"Of {what}, {figures} did not change beyond chance; the least sensitive one "
                f"({blind.label} of {blind.bundle}) would have shown a loss of {size} in 9 of 10 cases."
            )
    return told


def caveats(tests: Sequence[Tested], rules: CompareRules) -> list[str]:
    found = []
    if any(one.unit == "%" for one in tests) and not rules.control:
        found.append(
            "Both sides were timed in sessions of their own. What the machine itself did in between looks "
            "like a change of the bundle; measure both in one session, or name a bundle that did not change "
            "as compare.control in gate.yaml."
        )
    if rules.control:
        found.append(
            f"Timings are relative to the control ({', '.join(rules.control)}), taken as unchanged; so is "
            "whatever a new runtime did to all bundles alike."
        )
    return found
