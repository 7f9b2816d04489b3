"""The ship report and a comparison as Markdown, short enough for a pull request.

In: a `Report` or a `Comparison`. Out: text. Not here: the page (`evals/ship/ship_page.py`).

Names from data are escaped: a bundle called `a|b` must not break a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from evals import formatting as fmt
from evals.asking.eval_results import ORIGINAL
from evals.ship import ship_compare_words, ship_tables
from evals.ship.ship_compare_results import Comparison
from evals.ship.ship_results import Report

MOST_ROWS = 40


def report(found: Report) -> str:
    """Verdict, reasons, fleet, bundles, what was not measured."""
    verdict, evidence = found.verdict, found.evidence
    lines = [f"## {'✅' if verdict.ship else '❌'} {escape(verdict.headline)}", ""]
    lines += [f"- {escape(sentence)}" for sentence in verdict.sentences]
    if not found.gate_given:
        lines += ["", "No gate.yaml was given; the default rules know nothing of the product."]
    if verdict.devices:
        rows = [
            [name, *map(_cell, ship_tables.fleet_row(found, name)["cells"])] for name in verdict.candidates
        ]
        lines += ["", "### Devices and bundles (time to first text, p50)", ""]
        lines += table(["bundle", *verdict.devices], rows)
    lines += ["", "### Bundles", "", *_bundles(found)]
    unmet = [one for one in verdict.checks if one.state != "passed"]
    if unmet:
        lines += ["", f"<details><summary>{len(unmet)} limits not kept or not proven</summary>", ""]
        lines += [f"- {escape(one.bundle)}: {escape(one.text)}" for one in unmet[:MOST_ROWS]]
        lines += [f"- and {len(unmet) - MOST_ROWS} more"] if len(unmet) > MOST_ROWS else []
        lines += ["", "</details>"]
    if evidence.missing or found.caveats:
        lines += ["", "<details><summary>Not measured, and caveats</summary>", ""]
        lines += [f"- {escape(one.what)}: {escape(one.why)}" for one in evidence.missing[:MOST_ROWS]]
        lines += [f"- {escape(one)}" for one in found.caveats]
        lines += ["", "</details>"]
    return "\n".join(lines) + "\n"


def _cell(cell: Mapping[str, Any]) -> str:
    time = f", {fmt.milliseconds(cell['timing'].p50('ttft_ms'))}" if cell["timing"] else ""
    return f"{cell['words']}{time}{' **chosen**' if cell['chosen'] else ''}"


def _bundles(found: Report) -> list[str]:
    evidence = found.evidence
    heads = ["bundle", "download"]
    for task in evidence.tasks:
        heads += [f"{task.name}, 95 %", "against checkpoint"]
    rows = []
    for bundle in evidence.bundles:
        row = [bundle.name, fmt.size(bundle.size_bytes)]
        for task in evidence.tasks:
            summary = task.summary(bundle.name, ORIGINAL)
            change = ship_tables.against(evidence, task, bundle.name, ORIGINAL)
            right = fmt.DASH
            if summary:
                right = f"{fmt.percent(summary.value)} ({fmt.interval(summary.low, summary.high)})"
            row += [right, ship_tables.points(change)]
        rows.append(row)
    return table(heads, rows)


def comparison(found: Comparison) -> str:
    """Headline, regressions, every test."""
    lines = [f"## {'❌' if found.regressed else '✅'} {escape(found.headline)}", ""]
    lines += [f"- {escape(sentence)}" for sentence in found.sentences]
    rows = [
        [
            one.bundle, one.label, ship_compare_words.place_words(one), ship_compare_words.change_words(one),
            fmt.DASH if one.p_worse_adjusted is None else fmt.p_value(one.p_worse_adjusted), one.finding,
        ]
        for one in found.tests
    ]  # fmt: skip
    if rows:
        heads = ["bundle", "figure", "where", "change, 95 %", "p of no worsening, adjusted", "finding"]
        lines += ["", "<details><summary>Every test</summary>", "", *table(heads, rows), "", "</details>"]
    if found.facts:
        facts = [[one.bundle, one.label, one.place, one.old, one.new, one.finding] for one in found.facts]
        heads = ["bundle", "figure", "where", "before", "now", "finding"]
        lines += [
            "",
            "<details><summary>Bytes and parity</summary>",
            "",
            *table(heads, facts),
            "",
            "</details>",
        ]
    if found.not_compared:
        lines += ["", "Not compared:", ""]
        lines += [f"- {escape(one.what)}: {escape(one.why)}" for one in found.not_compared]
    lines += ["", *(f"_{escape(one)}_" for one in found.caveats)] if found.caveats else []
    return "\n".join(lines) + "\n"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Lines of a table."""
    lines = [heads, ["---"] * len(heads), *rows]
    return [f"| {' | '.join(cell if cell == '---' else escape(cell) for cell in line)} |" for line in lines]


def escape(text: str) -> str:
    """Text that Markdown shows as it is; `**` of our own stays."""
    for sign in ("\\", "`", "|", "<", "_", "["):
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())
