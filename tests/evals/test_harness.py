"""Our prompts and scores against VLMEvalKit's and lmms-eval's own, on fixtures that their code made.

The fixtures come from VLMEvalKit e8e78f0 (2026-08-18) and lmms-eval 0.7.3 by
`benchmarks/against/harness_scores.py`; docs/tasks.md says how to make them again.
"""

from __future__ import annotations

import functools
import json
import subprocess
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from evals.tasks import prompts, scoring
from evals.tasks.catalogue import open_task
from evals.tasks.formats import listed
from evals.tasks.question import Question
from tests.evals.task_files import write_tsv

ROOT = Path(__file__).parent.parent.parent
FIXTURES = Path(__file__).parent / "fixtures" / "harness.jsonl"
HARNESS_RULES = sorted(name for name in scoring.RULES if "." in name)
HARNESS_PROMPTS = sorted(name for name in prompts.PROMPTS if "." in name)


@functools.cache
def rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in FIXTURES.read_text().splitlines()]


def of(rule: str) -> list[dict[str, Any]]:
    return [row for row in rows() if row["rule"] == rule]


def question(row: dict[str, Any]) -> Question:
    own, options = row.get("row", {}), list(row.get("options", {}).values())
    if "references" in row:
        references = row["references"]
    elif row["rule"].startswith("vlmevalkit") and not options and "answer" in row:
        references = listed(row["answer"])
    else:
        references = [row.get("answer", own.get("answer"))]
    return Question(
        id="1",
        group="1",
        question="q",
        prompt="q",
        images=(),
        references=tuple(references),
        options=tuple(options or listed(own.get("choices", []))),
        row=own,
    )


def differing(cases: Iterable[dict[str, Any]]) -> list[tuple[Any, ...]]:
    """Cases in which our score is not the harness's."""
    return [
        (row["rule"], row["response"], row.get("options"), row["score"], found)
        for row in cases
        if abs((found := scoring.score(row["rule"], question(row), row["response"])).score - row["score"])
        > 1e-9
    ]


@pytest.mark.parametrize("rule", HARNESS_RULES)
def test_a_score_is_the_harness_s(rule: str) -> None:
    cases = of(rule)
    assert len(cases) >= 50
    assert {0.0} < {row["score"] for row in cases}, "cases of both outcomes"
    assert differing(cases) == []


@pytest.mark.slow
def test_other_draws_score_as_in_the_harnesses() -> None:
    """The harnesses themselves, where docs/tasks.md's environment exists, on responses of another seed."""
    python = ROOT / "benchmarks" / ".venv-harness" / "bin" / "python"
    if not python.exists():
        pytest.skip("no benchmarks/.venv-harness: docs/tasks.md says how to make it")
    script = ROOT / "benchmarks" / "against" / "harness_scores.py"
    done = subprocess.run([python, script, "11"], capture_output=True, text=True, check=True)
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) > 2000
    assert differing(row for row in found if row["rule"] in scoring.RULES) == []


@pytest.mark.parametrize("name", HARNESS_PROMPTS)
def test_a_prompt_is_the_harness_s(name: str) -> None:
    cases = [row for row in of("prompt") if row["prompt"] == name]
    assert len(cases) >= 4
    for case in cases:
        row = case["row"]
        options = case.get("options", [row[letter] for letter in "ABCDE" if letter in row])
        asked = prompts.Asked(row["question"], options, row.get("hint") or "", row)
        assert prompts.PROMPTS[name](asked) == case["text"]


@pytest.mark.parametrize(("rule", "name"), [("circular", "MMBench_DEV_EN"), ("mmmu", "MMMU_DEV_VAL")])
def test_a_file_scores_as_in_vlmevalkit(rule: str, name: str, tmp_path: Path) -> None:
    """From the TSV to the units: MMBench's groups of orders, MMMU's open questions."""
    (case,) = of(rule)
    path = write_tsv(tmp_path / f"{name}.tsv", case["rows"])
    task = open_task(str(path))
    assert task.circular == (rule == "circular")
    predictions = {str(row["index"]): row["prediction"] for row in case["rows"]}
    units: dict[str, float] = {}
    for one in task.questions:
        score = scoring.score(task.scorer, one, predictions[one.id]).score
        units[one.unit] = min(units.get(one.unit, 1.0), score)
    assert units == case["hits"]
    assert Counter(units.values()).keys() == {0.0, 1.0}
