"""The contract of eval.json: its published schema, its checks, reading and writing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evals.asking import eval_results
from evals.asking.eval_results import EvalResults, Given, Question, Subject, Summary, TaskInfo, Variant
from runtime.errors import StateError

ROOT = Path(__file__).parent.parent.parent


def results(**changes: object) -> EvalResults:
    """Two subjects, three questions, the last two in one unit."""
    questions = [
        Question(id=str(i), unit=unit, group="g", question="q?", prompt="q?", references=["yes"])
        for i, unit in enumerate(("a", "b", "b"))
    ]
    plain = {
        "created": "2026-01-01T00:00:00Z",
        "version": "0",
        "task": TaskInfo(
            name="t", format="digits", split="test", source="s", data_sha256="0" * 64, questions=3,
            available=3, groups=1, scorer="exact", rules="pocketvlm", right_from=1, prompt="raw",
            max_new_tokens=4,
        ),
        "variants": [Variant(name="original", family="original")],
        "questions": questions,
        "subjects": [
            Subject(
                name=name, kind="checkpoint", path=name, format="safetensors", precision="fp32",
                answers=[
                    Given(id=str(i), answer=f"{name}{i}" if i else "yes", score=score, finish="stop")
                    for i, score in enumerate(scores)
                ],
            )
            for name, scores in (("one", (1, 1, 0)), ("two", (1, 1, 1)))
        ],
        "summaries": [
            Summary(
                subject="one", units=2, groups=1, value=0.5, low=0, high=1, interval="bootstrap", right=1
            )
        ],
    }  # fmt: skip
    return EvalResults.model_validate({**plain, **changes})


def test_the_schema_is_published() -> None:
    published = (ROOT / "docs" / "eval.schema.json").read_text()
    assert published == eval_results.json_schema(), (
        "run: python -m evals.asking.eval_results > docs/eval.schema.json"
    )


def test_what_is_written_is_read(tmp_path: Path) -> None:
    path = eval_results.write(results(), tmp_path / "eval.json")
    assert json.loads(path.read_text())["schema"] == "pocketvlm.eval@1"
    assert eval_results.read(path) == results()


def test_a_unit_is_as_right_as_its_worst_question() -> None:
    found = results()
    assert found.unit_scores("one") == {"a": 1.0, "b": 0.0}
    assert found.unit_scores("two") == {"a": 1.0, "b": 1.0}
    assert [before.id for before, _ in found.differing("one", "two")] == ["1", "2"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"schema": "pocketvlm.eval@2"}, "pocketvlm.eval@1"),
        ({"variants": []}, "at least 1"),
        ({"variants": [{"name": "blur", "family": "blur"}]}, "answers unknown"),
        ({"questions": results().questions[:2]}, "answers unknown"),
        ({"questions": [*results().questions, results().questions[0]]}, "question '0' is there twice"),
        ({"subjects": [results().subjects[0]] * 2}, "subject 'one' is there twice"),
        ({"speed": 1}, "Extra inputs"),
    ],
)
def test_a_file_that_contradicts_itself_is_refused(change: dict[str, Any], says: str, tmp_path: Path) -> None:
    value = json.loads(results().model_dump_json(by_alias=True))
    for key, new in change.items():
        plain = isinstance(new, list)
        value[key] = [one if isinstance(one, dict) else one.model_dump() for one in new] if plain else new
    (tmp_path / "eval.json").write_text(json.dumps(value))
    with pytest.raises(StateError, match=r"eval\.json") as caught:
        eval_results.read(tmp_path / "eval.json")
    assert says in str(caught.value)


def test_no_file_says_so(tmp_path: Path) -> None:
    with pytest.raises(StateError, match="run `pocketvlm eval` again"):
        eval_results.read(tmp_path / "eval.json")
