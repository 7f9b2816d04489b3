"""The audit on simulated judges: what it must find, what it must not, and the figures by hand."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console
from sklearn.metrics import cohen_kappa_score

from evals import agreement, judge_audit
from evals.judge_audit import AuditResult, Row, audit
from runtime import files
from runtime.errors import InputError

SEEDS = 400


def simulated(
    seed: int,
    *,
    bias: str = "",
    rows: int = 500,
    right: float = 0.5,
    accuracy: float = 0.9,
    responses: int = 1,
    together: float = 0.0,
    wrong_when_long: float = 0.0,
) -> list[Row]:
    """Verdicts of a judge that is right with probability `accuracy`, but for what `bias` plants.

    The teacher's responses are longer by half. `responses` a question share, with probability `together`,
    the same luck; with `wrong_when_long` long responses are wrong more often.
    """
    rng = np.random.default_rng([seed, 7])
    teacher = rng.random(rows) < 0.5
    length = rng.lognormal(4, 0.8, rows) * np.where(teacher, 1.5, 1)
    odds = np.log(right / (1 - right)) - wrong_when_long * (np.log(length) - 4)
    label = (rng.random(rows) < 1 / (1 + np.exp(-odds))).astype(int)
    option = rng.integers(0, 4, rows)
    passes = np.where(label == 1, accuracy, 1 - accuracy)
    rank = length.argsort().argsort() / max(rows - 1, 1)
    if bias == "length":  # a wrong response passes in 10 % of the cases if short, 70 % if long
        passes = np.where(label == 0, 0.1 + 0.6 * rank, passes)
    elif bias == "option":  # A passes more easily
        passes = np.where(option == 0, np.where(label == 1, 0.97, 0.6), passes)
    elif bias == "source":  # the teacher passes more easily
        passes = np.where(teacher, np.where(label == 1, 0.97, 0.45), passes)
    elif bias == "noise":
        passes = np.full(rows, 0.5)
    question = np.arange(rows) // responses
    luck = np.where(rng.random(rows) < together, rng.random(rows)[question], rng.random(rows))
    verdict = (luck < passes).astype(int)
    return [
        Row(
            question=f"q{question[i]}",
            reference="r",
            response="x",
            verdict=int(verdict[i]),
            label=int(label[i]),
            source="teacher" if teacher[i] else "student",
            option="ABCD"[option[i]],
            length=int(length[i]),
        )
        for i in range(rows)
    ]


def audits(seeds: int = SEEDS, **how: Any) -> list[AuditResult]:
    return [audit(simulated(seed, **how), resamples=100) for seed in range(seeds)]


def found(result: AuditResult, kind: str, level: str | None = None) -> bool:
    return any(b.flagged and b.kind == kind and b.level == level for b in result.biases)


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"right": 0.8},
        {"wrong_when_long": 1.0},
        {"responses": 4, "together": 0.7},
        {"rows": 120},
    ],
    ids=["balanced", "mostly right", "long ones are wrong", "responses that share their luck", "few rows"],
)
def test_an_unbiased_judge_passes(how: dict[str, Any]) -> None:
    """At most 5 % false alarms over all tests together (they are adjusted together)."""
    alarms = sum(result.flagged for result in audits(**how))
    assert alarms / SEEDS <= 0.05


@pytest.mark.parametrize(("bias", "level"), [("length", None), ("option", "A"), ("source", None)])
def test_a_planted_bias_is_flagged_and_the_others_are_not(bias: str, level: str | None) -> None:
    results = audits(200, bias=bias)
    assert np.mean([found(result, bias, level) for result in results]) >= 0.95
    others = {"length", "option", "source"} - {bias}
    for kind in others:
        alarms = [any(b.flagged and b.kind == kind for b in result.biases) for result in results]
        assert np.mean(alarms) <= 0.05


def test_dependence_within_a_question_is_what_the_clusters_are_for() -> None:
    """The same rows under names of their own, so that each counts as independent, alarm too often."""
    alarms = {}
    for name in ("clustered", "independent"):
        count = 0
        for seed in range(60):
            rows = simulated(seed, responses=20, together=0.95, rows=800)
            by_question = np.random.default_rng(seed).random(40)
            rows = [  # the length is the question's: what its responses share looks like a trend
                row.model_copy(update={"length": int(1000 * by_question[int(row.question[1:])])})
                for row in rows
            ]
            if name == "independent":
                rows = [row.model_copy(update={"id": str(i)}) for i, row in enumerate(rows)]
            count += found(audit(rows, resamples=10), "length")
        alarms[name] = count / 60
    assert alarms["clustered"] <= 0.05
    assert alarms["independent"] > 3 * max(alarms["clustered"], 0.02)


def test_effects_are_in_points_of_the_verdict() -> None:
    results = audits(100, bias="length")
    among = [next(b for b in r.biases if b.kind == "length" and b.among == "wrong") for r in results]
    assert np.mean([b.effect for b in among]) == pytest.approx(0.6, abs=0.03)
    assert 0.9 <= np.mean([b.low <= 0.6 <= b.high for b in among]) <= 1
    result = audit(simulated(0, bias="length"))
    assert any(flag.startswith("longer wrong responses pass more easily: +") for flag in result.flags)
    result = audit(simulated(0, bias="option"))
    assert any(flag.startswith("responses that choose A pass more easily: +") for flag in result.flags)


def test_a_judge_that_guesses_is_flagged() -> None:
    result = audit(simulated(0, bias="noise"))
    assert result.flagged
    assert any("below 80%" in flag for flag in result.flags)
    assert any("better than chance" in flag for flag in result.flags)


def test_a_judge_that_always_says_yes_is_flagged_however_often_it_agrees() -> None:
    rows = [row.model_copy(update={"verdict": 1}) for row in simulated(0, right=0.95)]
    result = audit(rows)
    assert result.agreement.share > 0.9
    assert result.kappa.value == 0
    assert result.flags == ("the judge is not shown to be better than chance: kappa 0.00 (0.00 to 0.00)",)


def test_labels_without_variety_cannot_tell() -> None:
    rows = [row for row in simulated(0) if row.label == 1]
    assert "every label is 1, so this file cannot tell" in audit(rows).flags[0]


def test_figures_by_hand() -> None:
    """Cohen's own example: 20 both yes, 5 and 10 mixed, 15 both no: agreement 0.7, kappa 0.4."""
    cells = [(1, 1)] * 20 + [(1, 0)] * 5 + [(0, 1)] * 10 + [(0, 0)] * 15
    rows = [
        Row(question=f"{i}", reference="r", response="x", verdict=v, label=y)
        for i, (v, y) in enumerate(cells)
    ]
    result = audit(rows)
    assert result.agreement.share == 0.7
    assert result.kappa.value == pytest.approx(0.4)
    assert result.kappa.low < 0.4 < result.kappa.high
    assert (result.false_positive.count, result.false_positive.n) == (5, 20)
    assert (result.false_negative.count, result.false_negative.n) == (10, 30)
    assert result.agreement.low == pytest.approx(0.5624, abs=1e-4)  # Wilson, 35 of 50
    assert result.agreement.high == pytest.approx(0.8090, abs=1e-4)


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed: int) -> None:
    rng = np.random.default_rng(seed)
    verdict, label = rng.integers(0, 2, 60), rng.integers(0, 2, 60)
    table = np.bincount(2 * verdict + label, minlength=4)
    assert agreement.kappa(table) == pytest.approx(cohen_kappa_score(verdict, label))


def test_kappas_interval_holds_the_truth() -> None:
    """90 % right on balanced labels: kappa 0.8. About 95 of 100 intervals hold it."""
    inside = [
        r.kappa.low <= 0.8 <= r.kappa.high for r in (audit(simulated(s), resamples=400) for s in range(200))
    ]
    assert 0.90 <= np.mean(inside) <= 0.99


def test_the_score_test_is_a_permutation_test() -> None:
    """Its p-value against 20,000 permutations of the verdicts within strata."""
    rng = np.random.default_rng(3)
    stratum, exposure = rng.integers(0, 3, 80), rng.random(80)
    verdict = (rng.random(80) < 0.3 + 0.3 * exposure).astype(np.int64)
    got = agreement.shift(verdict, exposure, stratum, np.arange(80))
    centred = exposure - np.array([exposure[stratum == s].mean() for s in range(3)])[stratum]
    scores = []
    for _ in range(20000):
        shuffled = verdict.copy()
        for s in range(3):
            shuffled[stratum == s] = rng.permutation(verdict[stratum == s])
        scores.append(abs(centred @ shuffled))
    assert got.p_value == pytest.approx(np.mean(np.array(scores) >= abs(centred @ verdict) - 1e-12), abs=0.02)


def test_a_two_sided_exposure_is_a_difference_of_shares() -> None:
    verdict = np.array([1, 1, 0, 1, 0, 0, 0, 1])
    exposure = np.array([1, 1, 1, 1, 0, 0, 0, 0], float)
    got = agreement.shift(verdict, exposure, np.zeros(8, int), np.arange(8))
    assert got.effect == pytest.approx(3 / 4 - 1 / 4)
    none = agreement.shift(np.ones(8, int), exposure, np.zeros(8, int), np.arange(8))
    assert (none.effect, none.p_value) == (0, 1)


def test_ranks_and_holm() -> None:
    assert agreement.ranks([10, 30, 20]).tolist() == [0, 1, 0.5]
    assert agreement.ranks([5, 5, 7]).tolist() == [0.25, 0.25, 1]
    assert agreement.ranks([5]).tolist() == [0]
    assert agreement.holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert agreement.holm([0.9, 0.8]) == [1, 1]
    assert agreement.holm([]) == []


def test_what_cannot_be_tested_is_named() -> None:
    rows = [
        Row(question="q", reference="r", response="x" * (i % 3), verdict=i % 2, label=i % 2)
        for i in range(10)
    ]
    result = audit(rows)
    assert result.biases == ()
    assert [line.split(":")[0] for line in result.skipped] == [
        "length",
        "length",
        "source",
        "source",
        "option",
        "dependence within a question",
    ]
    with pytest.raises(InputError, match="no rows"):
        audit([])


def test_json_round_trip_and_schema() -> None:
    result = audit(simulated(1, bias="length", rows=200))
    text = result.model_dump_json()
    assert AuditResult.model_validate_json(text) == result
    assert json.loads(text)["format"] == "pocketvlm-judge-audit/1"
    assert set(judge_audit.schema()["properties"]) == set(json.loads(text))
    assert audit([row.model_dump() for row in simulated(1, bias="length", rows=200)]) == result


def test_the_table_marks_what_is_flagged() -> None:
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(judge_audit.table(audit(simulated(0, bias="option"))))
    shown = console.export_text()
    line = next(line for line in shown.splitlines() if "option A - others" in line and " all " in line)
    assert "biased" in line
    assert "Cohen's kappa" in shown
    assert "…" not in shown


def test_files_and_directories_of_shards(tmp_path: Path) -> None:
    rows = simulated(2, rows=6)
    judge_audit.write(tmp_path / "one.jsonl", rows)
    assert judge_audit.read(tmp_path / "one.jsonl") == rows
    shards = tmp_path / "judge"
    for i in range(3):
        part = [row.model_dump(exclude_none=True) for row in rows[2 * i : 2 * i + 2]]
        files.write_shard(shards / f"{i:05d}.jsonl", part)
    assert judge_audit.read(shards) == rows
    damaged = shards / "00001.jsonl"
    damaged.write_text(damaged.read_text().replace('"verdict":', '"verdict" :', 1))
    with pytest.raises(Exception, match=r"00001\.jsonl: the shard's seal"):
        judge_audit.read(shards)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"question": "q"', "line 2: no JSON"),
        ('{"question": "q", "reference": "r", "response": "x", "label": 1}', "line 2: no 'verdict'"),
        (
            '{"question": "q", "reference": "r", "response": "x", "label": 1, "verdict": 1, "soruce": "t"}',
            "line 2: unknown key 'soruce'; wanted source",
        ),
        (
            '{"question": "q", "reference": "r", "response": "x", "label": 2, "verdict": 1}',
            "line 2: label: .*got 2",
        ),
        ("[]", "line 2: the row: "),
    ],
)
def test_bad_rows_are_named(tmp_path: Path, line: str, says: str) -> None:
    path = tmp_path / "a.jsonl"
    judge_audit.write(path, simulated(0, rows=1))
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=says):
        judge_audit.read(path)


def test_missing_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="cannot be read"):
        judge_audit.read(tmp_path / "none.jsonl")
    with pytest.raises(InputError, match="holds no"):
        judge_audit.read(tmp_path)
