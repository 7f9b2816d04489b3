from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evals import results as contract
from evals.results import Latency, Parity, Percentiles, Results, Score, TrainingCurve
from runtime.errors import StateError
from tests.evals import synthetic


def _changed(**changes: Any) -> dict[str, Any]:
    return {**synthetic.results().model_dump(), **changes}


def test_written_results_read_back_equal(tmp_path: Path) -> None:
    results = synthetic.results()
    path = contract.write(results, tmp_path / "results.json")
    assert contract.read(path) == results
    assert [file.name for file in tmp_path.iterdir()] == ["results.json"]


def test_an_unknown_key_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    data = _changed()
    data["run"]["sede"] = 1
    path.write_text(json.dumps(data))
    with pytest.raises(StateError, match=r"results.json: run.sede: Extra inputs") as caught:
        contract.read(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"schema_version": 2}'])
def test_a_damaged_or_foreign_file_is_one_line(tmp_path: Path, content: str) -> None:
    path = tmp_path / "results.json"
    path.write_text(content)
    with pytest.raises(StateError) as caught:
        contract.read(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_an_absent_file_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"cannot be read .* again"):
        contract.read(tmp_path / "none.json")


def test_numbers_that_are_not_finite_become_none_in_curves_and_are_refused_elsewhere() -> None:
    curve = TrainingCurve(student="S", method="sft", steps=[1, 2], loss=[float("nan"), float("inf")])
    assert curve.loss == [None, None]
    with pytest.raises(ValidationError, match="finite"):
        Percentiles(p50=float("nan"), p90=1, p99=1, n=1)


def test_a_curve_of_another_length_is_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="r_acc: 1 values for 2 steps"):
        TrainingCurve(student="S", method="masters", steps=[1, 2], loss=[1.0, 1.0], r_acc=[0.5])


def test_a_score_must_be_its_own_count() -> None:
    score = Score.of(98, 100)
    assert score.accuracy == 0.98 and 0.92 < score.low < 0.95 and 0.99 < score.high < 1
    with pytest.raises(ValidationError, match="is not 97/100"):
        Score(**{**score.model_dump(), "right": 97})
    with pytest.raises(ValueError, match="n is 0"):
        Score.of(0, 0)


def test_results_know_their_models() -> None:
    results = synthetic.results()
    assert results.teacher.name == "teacher" and [s.name for s in results.students] == ["S", "XS"]
    row = results.method("S", "masters")
    assert row is not None and row.test.right == synthetic.RIGHT["S"]["masters"]
    assert results.method("S", "none") is None
    assert results.comparison("S", "kd", "masters") is not None
    with pytest.raises(ValidationError, match="exactly one teacher"):
        Results.model_validate(_changed(models=[m for m in _changed()["models"] if m["role"] == "student"]))
    with pytest.raises(ValidationError, match="student 'XXL' is not in models"):
        Results.model_validate(_changed(methods=[{**_changed()["methods"][0], "student": "XXL"}]))


def test_percentiles_of_values() -> None:
    found = Percentiles.of([float(i) for i in range(101)])
    assert (found.p50, found.p90, found.p99, found.n) == (50, 90, 99, 101)


def test_parity_from_a_manifest_judges_its_limits() -> None:
    figures = {
        "positions": 54.0, "kl_mean": 1e-9, "kl_median": 1e-9, "kl_p99": 1e-8, "logit_max_diff": 1e-5,
        "top1_agreement": 1.0, "ids_equal": 1.0, "logit_rel_diff": 1e-6,
    }  # fmt: skip
    found = Parity.of(figures, {"logit_rel_diff": 1e-4})
    assert found.passed and found.positions == 54 and found.ids_equal is True
    assert not Parity.of(figures, {"logit_rel_diff": 1e-7}).passed


def test_every_measured_field_carries_its_unit() -> None:
    units = ("_ms", "_mib", "_bytes", "_tok_s", "_tokens")
    bare = {"threads", "rounds", "warmup", "repeats", "page_cache", "device"}
    assert {name for name in Latency.model_fields if not name.endswith(units)} == bare
