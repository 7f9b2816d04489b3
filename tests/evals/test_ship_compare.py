"""`report --compare`: planted losses are found, nothing is not; what was measured otherwise is left out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from evals.ship import ship_compare, ship_compare_page, ship_compare_results, ship_load, ship_markdown
from evals.ship.ship_compare_results import Comparison
from evals.ship.ship_evidence import Evidence
from evals.ship.ship_gate import CompareRules, Tolerance
from runtime.errors import InputError
from tests.evals import ship_data as data

ROOT = Path(__file__).parents[2]


def _evidence(folder: Path, **found: Any) -> Evidence:
    folder.mkdir(parents=True)
    return ship_load.load([data.save(folder, **found)])


def _findings(found: Comparison, **wanted: str) -> dict[tuple[str, str], str]:
    """(bundle, label) to finding, of tests with these attributes."""
    return {
        (one.bundle, one.label): one.finding
        for one in found.tests
        if all(getattr(one, key) == value for key, value in wanted.items())
    }


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Evidence:
    return _evidence(
        tmp_path_factory.mktemp("old") / "a",
        bench=data.bench(),
        shapes=data.evaluation(),
        parity=data.parity(),
    )


def test_the_published_schema_is_the_code_s() -> None:
    published = (ROOT / "docs" / "compare.schema.json").read_text()
    assert published == ship_compare_results.json_schema(), (
        "run: python -m evals.ship.ship_compare_results > docs/compare.schema.json"
    )


def test_a_report_against_itself_has_no_regression(old: Evidence) -> None:
    found = ship_compare.compare(old, old)
    assert not found.regressed and found.headline == "No regression"
    assert {one.finding for one in found.tests} == {"unchanged", "shown"}
    assert {one.finding for one in found.facts} == {"unchanged"}
    assert sum(one.level for one in found.families) == pytest.approx(ship_compare.ALPHA)
    assert found.not_compared == () and "sessions of their own" in found.caveats[0]


def test_each_kind_of_loss_is_found_where_it_is(old: Evidence, tmp_path: Path) -> None:
    new = _evidence(
        tmp_path / "new",
        bench=data.bench(bundles={**data.BUNDLES, "student-int8": 0.7 * 1.12}),
        shapes=data.evaluation({"student-fp32": (0.0, 0.0), "student-int8": (0.06, 0.0)}),
        parity=data.parity(kl=0.004, prompts_equal=49),
    )
    found = ship_compare.compare(old, new)
    assert found.regressed and "regressions" in found.headline
    accuracy = _findings(found, family="accuracy")
    assert accuracy == {
        ("student", "accuracy"): "unchanged",
        ("student-fp32", "accuracy"): "unchanged",
        ("student-int8", "accuracy"): "worse",
    }
    speed = _findings(found, family="speed")
    assert {name for (name, _), finding in speed.items() if finding == "worse"} == {"student-int8"}
    assert speed["student-int8", "time to first text"] == "worse"
    assert speed["student-int8", "peak memory"] == "unchanged"
    facts = {(one.bundle, one.label): one.finding for one in found.facts}
    assert facts["student-int8", "mean KL"] == "worse" and facts["student-fp32", "mean KL"] == "tolerated"
    assert facts["student-int8", "prompts with equal ids"] == "worse"
    assert facts["student-int8", "download"] == "unchanged"
    again = ship_compare.compare(new, old)
    assert not again.regressed and "improvement" in again.headline


def test_tolerance_forgives_and_says_so(old: Evidence, tmp_path: Path) -> None:
    new = _evidence(tmp_path / "new", bench=data.bench(scale=1.1), shapes=data.evaluation())
    assert ship_compare.compare(old, new).regressed
    rules = CompareRules(tolerance=Tolerance(slowdown_percent=15))
    found = ship_compare.compare(old, new, rules)
    assert not found.regressed and "tolerated" in _findings(found, family="speed").values()


def test_a_control_takes_the_machine_s_drift_away(old: Evidence, tmp_path: Path) -> None:
    slower = {**data.BUNDLES, "student-int4": 0.6 * 1.15}
    new = _evidence(tmp_path / "new", bench=data.bench(bundles=slower, scale=1.1, scatter=0.02, seed=3))
    plain = ship_compare.compare(old, new)
    assert _findings(plain, family="speed")["student-int8", "time to first text"] == "worse"
    found = ship_compare.compare(old, new, CompareRules(control=("student-fp32",)))
    speed = _findings(found, family="speed")
    assert speed["student-int8", "time to first text"] == "unchanged"
    assert speed["student-int4", "time to first text"] == "worse"
    assert not any(name == "student-fp32" for name, _ in speed)
    assert "relative to the control" in found.caveats[0]
    with pytest.raises(InputError, match="control 'nobody' is not in both"):
        ship_compare.compare(old, new, CompareRules(control=("nobody",)))


# --- who is compared with whom ----------------------------------------


def test_a_bundle_that_was_renamed_is_found_or_named(tmp_path: Path) -> None:
    one = _evidence(tmp_path / "1", bench=data.bench(bundles={"v1-int8": 1.0}))
    two = _evidence(tmp_path / "2", bench=data.bench(bundles={"v2-int8": 1.3}))
    found = ship_compare.compare(one, two)
    assert found.regressed and {(t.old_bundle, t.bundle) for t in found.tests} == {("v1-int8", "v2-int8")}
    more = _evidence(tmp_path / "3", bench=data.bench(bundles={"v2-int8": 1.3, "v2-int4": 0.8}))
    with pytest.raises(InputError, match=r"nothing can be compared .*v2-int8: only in new"):
        ship_compare.compare(one, more)
    named = ship_compare.compare(one, more, pairs={"v1-int8": "v2-int8"})
    assert named.regressed and [r.what for r in named.not_compared] == ["v2-int4"]
    with pytest.raises(InputError, match="v9 is not in old"):
        ship_compare.compare(one, more, pairs={"v9": "v2-int8"})


@pytest.mark.parametrize(
    ("changed", "told"),
    [
        ({"device": "Board B"}, "only in new"),
        (
            {"source": "evaluator", "emulated": True, "emulated_why": "no phone here"},
            "emulated: no phone here",
        ),
    ],
)
def test_another_or_an_emulated_device_is_not_compared(
    old: Evidence, tmp_path: Path, changed: dict[str, Any], told: str
) -> None:
    new = _evidence(tmp_path / "new", bench=data.bench(**changed), shapes=data.evaluation())
    found = ship_compare.compare(old, new)
    assert not _findings(found, family="speed") and _findings(found, family="accuracy")
    assert any(told in one.why for one in found.not_compared)


def test_other_conditions_are_not_compared(old: Evidence, tmp_path: Path) -> None:
    bench = data.bench()
    saving = bench.device.model_copy(update={"power_mode": "15W"})
    new = _evidence(
        tmp_path / "mode", bench=bench.model_copy(update={"device": saving}), shapes=data.evaluation()
    )
    assert "power mode differs: MAXN before, 15W now" in ship_compare.compare(old, new).not_compared[0].why
    policy = bench.policy.model_copy(update={"threads": 4})
    new = _evidence(
        tmp_path / "threads", bench=bench.model_copy(update={"policy": policy}), shapes=data.evaluation()
    )
    assert {one.why for one in ship_compare.compare(old, new).not_compared} == {
        "threads differs: 2 before, 4 now"
    }


def test_other_questions_are_not_compared(old: Evidence, tmp_path: Path) -> None:
    new = _evidence(tmp_path / "new", bench=data.bench(), shapes=data.evaluation(n=500))
    found = ship_compare.compare(old, new)
    assert not _findings(found, family="accuracy")
    assert "data sha256 differs" in found.not_compared[0].why


def test_another_picture_of_the_same_name_is_not_compared(old: Evidence, tmp_path: Path) -> None:
    found = data.bench()
    grid = tuple(one.model_copy(update={"image_sha256": data.sha("other")}) for one in found.grid)
    bench = found.model_copy(update={"grid": grid})
    compared = ship_compare.compare(old, _evidence(tmp_path / "new", bench=bench, shapes=data.evaluation()))
    assert not _findings(compared, family="speed")
    assert "picture sha256 differs" in compared.not_compared[0].why


def test_what_only_the_old_side_has_is_told_and_may_fail(old: Evidence, tmp_path: Path) -> None:
    new = _evidence(tmp_path / "new", bench=data.bench(), more=data.evaluation(task="more"))
    found = ship_compare.compare(old, new)
    assert not found.regressed and found.headline == "No regression, 1 not compared"
    reasons = {(one.what, one.why) for one in found.not_compared}
    assert reasons == {("shapes", "only in old"), ("more", "only in new")}
    strict = ship_compare.compare(old, new, CompareRules(missing="fail"))
    assert strict.regressed and strict.headline == "Incomplete, 1 not compared"
    same = ship_compare.compare(old, old, CompareRules(missing="fail"))
    assert not same.regressed


def test_too_few_processes_are_told(old: Evidence, tmp_path: Path) -> None:
    new = _evidence(tmp_path / "new", bench=data.bench(processes=2), shapes=data.evaluation())
    found = ship_compare.compare(old, new)
    assert not _findings(found, family="speed")
    assert any("2 processes; a test needs 3 a side" in one.why for one in found.not_compared)


# --- how often it is right --------------------------------------------


def test_one_point_in_ten_thousand_questions_is_found_among_twelve_bundles() -> None:
    draw = np.random.default_rng(11)
    right = draw.random(10_000) < 0.9
    names = [f"bundle-{i}" for i in range(12)]
    old = data.asked(dict.fromkeys(names, right))
    hits, trials = 0, 20
    for trial in range(trials):
        hurt = names[trial % 12]
        after = {name: data.flipped(draw, right, 0.01) if name == hurt else right for name in names}
        found = ship_compare.compare(old, data.asked(after))
        worse = [one.bundle for one in found.tests if one.finding == "worse"]
        assert set(worse) <= {hurt}
        hits += bool(worse)
    assert hits >= 0.9 * trials


def test_a_null_change_is_flagged_in_at_most_five_of_a_hundred() -> None:
    """Two bundles: accuracy with 5 % discordant questions and every timing drawn anew, for both sides."""
    draw = np.random.default_rng(12)
    right = draw.random(2_000) < 0.9
    flagged = 0
    for trial in range(100):
        sides = []
        for side in range(2):
            rights = {name: data.flipped(draw, right, 0.0, 0.025) for name in ("fp32", "int8")}
            timed = data.timed(1000 + 2 * trial + side)
            sides.append(timed.model_copy(update={"tasks": data.asked(rights).tasks}))
        found = ship_compare.compare(*sides)
        assert {one.family for one in found.families} == {"accuracy", "speed"}
        flagged += found.regressed
    assert flagged <= 5


def test_five_percent_slower_is_found() -> None:
    """One bundle of two, 5 % slower in everything."""
    hits, trials = 0, 50
    for trial in range(trials):
        found = ship_compare.compare(data.timed(5000 + 2 * trial), data.timed(5001 + 2 * trial, int8=1.05))
        hits += any(one.finding == "worse" and one.bundle == "int8" for one in found.tests)
    assert hits >= 0.9 * trials


# --- page and Markdown ------------------------------------------------


def test_page_and_markdown_tell_the_same(old: Evidence, tmp_path: Path) -> None:
    new = _evidence(tmp_path / "new", bench=data.bench(scale=1.2), shapes=data.evaluation())
    found = ship_compare.compare(old, new, version="1.2.3")
    text = ship_markdown.comparison(found)
    assert text.startswith("## ❌ ") and "time to first text" in text
    pytest.importorskip("jinja2")
    page, markdown = ship_compare_page.write(found, tmp_path / "out", markdown=True)
    assert markdown.read_text() == text and found.headline in page.read_text()
    assert Comparison.model_validate_json((tmp_path / "out" / "compare.json").read_text()) == found
    assert "<script" not in page.read_text() and "http" not in page.read_text()
