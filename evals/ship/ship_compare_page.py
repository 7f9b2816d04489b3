"""A comparison of two reports as one self-contained HTML page, as JSON and as Markdown.

In: a `Comparison`. Out: `index.html`, `compare.json` and, where asked, `compare.md`. Not here: testing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evals import formatting as fmt
from evals.ship import ship_compare_results as contract
from evals.ship import ship_compare_words as words
from evals.ship import ship_markdown, ship_page
from evals.ship.ship_compare_results import Comparison, Family, Tested
from runtime import files

PAGE, DATA, MARKDOWN = "index.html", "compare.json", "compare.md"
TITLES: dict[Family, str] = {
    "accuracy": "Accuracy",
    "robustness": "Changed questions",
    "speed": "Speed and memory",
    "stages": "Stages",
}
NOTHING = "Nothing became worse beyond chance"
ORDER = {"worse": 0, "tolerated": 1, "better": 2, "unchanged": 3, "shown": 4}
FINDINGS = {
    "worse": "worse", "tolerated": "worse, tolerated", "better": "better",
    "unchanged": "no change seen", "shown": "not judged",
}  # fmt: skip


def write(found: Comparison, out: Path, *, markdown: bool = False) -> list[Path]:
    """The page first, then what else was written. Raises MissingExtra without jinja2."""
    page = render(found)
    files.make_directory(out)
    contract.write(found, out / DATA)
    if markdown:
        files.write_text(out / MARKDOWN, ship_markdown.comparison(found))
    files.write_text(out / PAGE, page)
    return [out / PAGE, *([out / MARKDOWN] if markdown else [])]


def render(found: Comparison) -> str:
    """The page as text."""
    levels = {one.family: one for one in found.families}
    groups = [
        {
            "family": family,
            "title": title,
            "level": levels.get(family),
            "rows": [_row(one) for one in sorted(own, key=lambda one: ORDER[one.finding])],
        }
        for family, title in TITLES.items()
        if (own := [one for one in found.tests if one.family == family])
    ]
    worse = "worse" in [one.finding for one in found.tests] + [one.finding for one in found.facts]
    verdict = "Regressed" if worse else "Incomplete" if found.regressed else NOTHING
    head = {
        "kind": "compare",
        "first": "tests",
        "good": not found.regressed,
        "verdict": verdict,
        "about": "old against new",
        **ship_page.top(found.version, found.created, found.headline, found.sentences),
    }
    context = {"top": head, "c": found, "groups": groups, "findings": FINDINGS, "tiles": _tiles(found)}
    return ship_page.template("ship_compare.html", context)


def tested_words(one: Tested) -> str:
    """`student-int8: one token on Board A, small +5.1 % (4.0 to 6.2)`."""
    return f"{one.bundle}: {one.label} on {words.place_words(one)} {words.change_words(one)}"


def _row(one: Tested) -> dict[str, Any]:
    def value(number: float) -> str:
        if one.unit == "points":
            return f"{number:.2f}{fmt.THIN}%"
        memory = "memory" in one.label
        return fmt.mib(number) if memory else fmt.milliseconds(number)

    return {
        "test": one,
        "where": words.place_words(one),
        "old": value(one.old),
        "new": value(one.new),
        "change": words.change_words(one).partition(" (")[0],
        "interval": words.change_words(one).partition(" (")[2].rstrip(")"),
        "detectable": f"{one.detectable:.2f}{' points' if one.unit == 'points' else fmt.THIN + '%'}",
        "state": {"worse": "failed", "better": "passed", "tolerated": "unproven"}.get(one.finding, "missing"),
    }


def _tiles(found: Comparison) -> list[dict[str, str]]:
    findings = [one.finding for one in found.tests] + [one.finding for one in found.facts]
    judged = [one for one in found.tests if one.finding != "shown"]
    return [
        {"name": "Worse", "value": str(findings.count("worse")), "note": "beyond chance and tolerance"},
        {"name": "Better", "value": str(findings.count("better")), "note": "beyond chance"},
        {"name": "Tested", "value": str(len(judged)), "note": "figures, adjusted together"},
        {"name": "Not compared", "value": str(len(found.not_compared)), "note": "reasons below"},
    ]
