"""gate.yaml: read strictly, and every rule against evidence whose answer is known."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.ship import ship_checks, ship_gate, ship_load
from evals.ship.ship_evidence import Evidence
from evals.ship.ship_gate import Gate, Rule
from evals.ship.ship_results import Check
from runtime.errors import InputError
from tests.evals import ship_data as data

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    """fp32 answers as its checkpoint; int8 loses 2 points of 2,000, int4 about 6."""
    losses = {"student-fp32": (0.0, 0.0), "student-int8": (0.02, 0.0), "student-int4": (0.07, 0.01)}
    folder = tmp_path_factory.mktemp("found")
    data.save(
        folder,
        a=data.bench("Board A", grid=("small", "large")),
        b=data.bench("Board B", scale=3, seed=1),
        shapes=data.evaluation(losses, n=2000, variants=data.VARIANTS),
        parity=data.parity(),
    )
    return ship_load.load([folder])


def _check(
    evidence: Evidence, bundle: str = "student-int8", *, gate: dict[str, Any] | None = None, **rule: Any
) -> list[Check]:
    found = Gate(candidates=(bundle,), rules=(Rule(**rule),), **(gate or {}))
    return list(ship_checks.decide(evidence, found).checks)


# --- the file ---------------------------------------------------------


def test_the_published_schema_is_the_code_s() -> None:
    published = (ROOT / "docs" / "gate.schema.json").read_text()
    assert published == ship_gate.json_schema(), "run: python -m evals.ship.ship_gate > docs/gate.schema.json"


def test_the_example_is_a_gate() -> None:
    found = ship_gate.read(ROOT / "examples" / "gate.yaml")
    assert len(found.rules) >= 6 and found.candidates


def test_a_gate_survives_json() -> None:
    found = ship_gate.read(ROOT / "examples" / "gate.yaml")
    assert Gate.model_validate(json.loads(found.model_dump_json(by_alias=True))) == found


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("rules: []", "rules"),
        (
            "rules: [{quantity: ttft_ms, max: 1}]\ncandidate: [a]",
            "candidate: unknown key; did you mean candidates",
        ),
        ("rules: [{quantity: ttft_msec, max: 1}]", "rules.0.quantity"),
        ("rules: [{quantity: ttft_ms}]", "wanted min or max"),
        ("rules: [{quantity: ttft_ms, min: 3, max: 2}]", "min 3 is above max 2"),
        ("rules: [{quantity: ttft_ms, max: 3, task: x}]", "task does not select it"),
        (
            "rules: [{quantity: download_mb, max: 3, percentile: 90}]",
            "percentile does not select it (selectors: none)",
        ),
        ("rules: [{quantity: ttft_ms, max: .nan}]", "rules.0.max"),
        ("rules: [{quantity: ttft_ms, max: 1, max: 2}]", "stands twice"),
        ("- a", "wanted a mapping of gate keys"),
        ("rules: [", "cannot be read as YAML"),
    ],
)
def test_mistakes_are_one_line_that_names_them(tmp_path: Path, text: str, told: str) -> None:
    path = tmp_path / "gate.yaml"
    path.write_text(text)
    with pytest.raises(InputError) as caught:
        ship_gate.read(path)
    assert told in str(caught.value) and str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


# --- states -----------------------------------------------------------


@pytest.mark.parametrize(
    ("rule", "state"),
    [
        ({"quantity": "accuracy_drop_points", "max": 4}, "passed"),
        ({"quantity": "accuracy_drop_points", "max": 1.8}, "unproven"),
        ({"quantity": "accuracy_drop_points", "max": 0.5}, "failed"),
        ({"quantity": "accuracy_percent", "min": 80}, "passed"),
        ({"quantity": "accuracy_percent", "min": 99}, "failed"),
        ({"quantity": "failed_questions", "max": 0}, "passed"),
        ({"quantity": "ttft_ms", "max": 100, "point": "small", "device": "Board A"}, "passed"),
        ({"quantity": "ttft_ms", "max": 20, "point": "small", "device": "Board A"}, "failed"),
        ({"quantity": "ttft_ms", "percentile": 99, "max": 99, "point": "small", "device": "*A"}, "passed"),
        ({"quantity": "decode_tok_s", "min": 100, "point": "small", "device": "Board A"}, "passed"),
        ({"quantity": "decode_tok_s", "min": 1000, "point": "small", "device": "Board A"}, "failed"),
        ({"quantity": "peak_rss_mib", "max": 300, "point": "small", "device": "Board A"}, "passed"),
        ({"quantity": "download_mb", "max": 33}, "passed"),
        ({"quantity": "download_mb", "max": 32.9}, "failed"),
        ({"quantity": "kl_mean_nats", "max": 0.01}, "passed"),
        ({"quantity": "kl_mean_nats", "max": 0.0021}, "unproven"),
        ({"quantity": "kl_p99_nats", "max": 0.02}, "passed"),
        ({"quantity": "top1_percent", "min": 98}, "passed"),
        ({"quantity": "prompts_equal_percent", "min": 100}, "passed"),
        ({"quantity": "greedy_prefix_percent", "min": 99.5}, "failed"),
        ({"quantity": "joule_per_answer", "max": 5, "device": "Board A", "point": "small"}, "missing"),
        ({"quantity": "sustained_slowdown_percent", "max": 5, "device": "*A", "point": "small"}, "missing"),
        ({"quantity": "accuracy_percent", "task": "no-such", "min": 1}, "missing"),
        ({"quantity": "accuracy_drop_points", "reference": "teacher", "max": 4}, "passed"),
    ],
)  # fmt: skip
def test_a_rule_by_itself(evidence: Evidence, rule: dict[str, Any], state: str) -> None:
    (check,) = _check(evidence, **rule)
    assert check.state == state, check.text


def test_a_pattern_selects_places(evidence: Evidence) -> None:
    found = _check(evidence, quantity="accuracy_percent", variant="blur-*", min=1)
    assert [one.variant for one in found] == ["blur-1", "blur-3", "blur-5"]
    places = {(one.device, one.point) for one in _check(evidence, quantity="ttft_ms", max=1)}
    assert places == {("Board A", "small"), ("Board A", "large"), ("Board B", "small")}


def test_the_estimate_may_decide(evidence: Evidence) -> None:
    rule = {"quantity": "accuracy_drop_points", "max": 1.8}
    assert _check(evidence, gate={"evidence": "estimate"}, **rule)[0].state == "passed"
    (check,) = _check(evidence, **rule)
    assert "the interval reaches across the limit, about" in check.text


def test_a_drop_is_told_with_its_interval(evidence: Evidence) -> None:
    (check,) = _check(evidence, quantity="accuracy_drop_points", max=4)
    assert check.value is not None and check.low is not None and check.high is not None
    assert (
        0.5 < check.low < check.value < check.high < 3 and check.basis == "against student, 2,000 questions"
    )


def test_one_process_proves_nothing(tmp_path: Path) -> None:
    data.save(tmp_path, bench=data.bench(processes=1))
    evidence = ship_load.load([tmp_path])
    (check,) = _check(evidence, quantity="ttft_ms", max=1000)
    assert check.state == "unproven" and "an interval needs 3 processes" in check.text
    (check,) = _check(evidence, quantity="ttft_ms", max=1)
    assert check.state == "failed"
    assert _check(evidence, gate={"evidence": "estimate"}, quantity="ttft_ms", max=1000)[0].state == "passed"


def test_emulated_times_keep_no_limit(tmp_path: Path) -> None:
    data.save(tmp_path, bench=data.bench(source="evaluator", emulated=True, emulated_why="an evaluator"))
    evidence = ship_load.load([tmp_path])
    (check,) = _check(evidence, quantity="ttft_ms", max=1e6)
    assert check.state == "missing" and "emulated: an evaluator" in check.text
    assert _check(evidence, quantity="download_mb", max=40)[0].state == "passed"


# --- verdicts ---------------------------------------------------------

TTFT = Rule(quantity="ttft_ms", max=160, point="small")
DROP = Rule(quantity="accuracy_drop_points", max=4)


def test_the_preferred_of_those_that_pass_is_chosen(evidence: Evidence) -> None:
    rules = (Rule(quantity="ttft_ms", max=300, point="small"), DROP)
    for prefer, name in (("size", "student-int8"), ("speed", "student-int8"), ("accuracy", "student-fp32")):
        found = ship_checks.decide(evidence, Gate(rules=rules, prefer=prefer))
        assert found.ship and set(found.chosen.values()) == {name} and name in found.headline


def test_every_device_needs_a_candidate(evidence: Evidence) -> None:
    slow = ship_checks.decide(evidence, Gate(rules=(Rule(quantity="ttft_ms", max=90, point="small"), DROP)))
    assert not slow.ship and slow.chosen == {"Board A": "student-int8", "Board B": None}
    assert any(text.startswith("On Board B, no candidate of 3") for text in slow.sentences)
    assert any("time to first text on Board B" in text for text in slow.sentences)
    one = Gate(devices=("Board A",), rules=(Rule(quantity="ttft_ms", max=90, point="small"), DROP))
    assert ship_checks.decide(evidence, one).ship


def test_all_means_all(evidence: Evidence) -> None:
    rules = (DROP,)
    assert ship_checks.decide(evidence, Gate(rules=rules)).ship
    every = ship_checks.decide(evidence, Gate(rules=rules, require="all"))
    assert not every.ship and any(text.startswith("student-int4: accuracy lost") for text in every.sentences)
    two = Gate(rules=rules, require="all", candidates=("student-fp32", "student-int8"))
    assert ship_checks.decide(evidence, two).ship


def test_what_was_not_measured_is_not_kept_unless_told(evidence: Evidence) -> None:
    rules = (DROP, Rule(quantity="joule_per_answer", max=1))
    assert not ship_checks.decide(evidence, Gate(rules=rules)).ship
    passed_over = ship_checks.decide(evidence, Gate(rules=rules, missing="ignore"))
    assert passed_over.ship and "were not measured" in passed_over.sentences[0]
    nothing = Gate(rules=rules[1:], missing="ignore")
    assert not ship_checks.decide(evidence, nothing).ship, "gaps alone are no reason to ship"


def test_rules_for_one_bundle_hold_for_it_alone(evidence: Evidence) -> None:
    rules = (DROP, Rule(quantity="download_mb", max=1, bundle="student-int8"))
    found = ship_checks.decide(evidence, Gate(rules=rules))
    assert set(found.chosen.values()) == {"student-fp32"}


def test_without_devices_the_rest_decides(tmp_path: Path) -> None:
    data.save(tmp_path, shapes=data.evaluation(n=1000))
    found = ship_checks.decide(ship_load.load([tmp_path]), ship_gate.DEFAULT)
    assert found.devices == () and found.chosen == {"": "student-fp32"} and found.ship
    assert found.sentences[0].startswith("student-fp32 keeps all 2 limits")


@pytest.mark.parametrize(
    ("gate", "told"),
    [
        ({"candidates": ("student-int9",)}, "'student-int9' is no bundle of the files"),
        ({"devices": ("Board C",)}, "'Board C' is in no bench.json"),
    ],
)
def test_a_gate_of_another_product_is_refused(evidence: Evidence, gate: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        ship_checks.decide(evidence, Gate(rules=(DROP,), **gate))
