"""The verbs of distillation from the command line: one line for a fault, the result on stdout."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import yaml

from tests.checkpoints import FAMILIES
from tests.cli import call, refusal


@pytest.fixture(scope="module")
def recipe(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("verbs")
    checkpoint = str(FAMILIES["smolvlm"](root / "model"))
    path = root / "recipe.yaml"
    settings = {
        "name": "verbs",
        "student": {"checkpoint": checkpoint},
        "teachers": [{"checkpoint": checkpoint, "mask": {"r_max": 0.2, "gate": None}}],
        "data": {"train": [{"format": "easy-vqa", "split": "test", "limit": 20}]},
        "pool": {"sampling": {"max_new_tokens": 6}},
        "train": {"questions_per_step": 4, "precision": "float32"},
    }
    path.write_text(yaml.safe_dump(settings))
    return path


@pytest.mark.parametrize("verb", ["distill", "plan", "ablate", "judge-audit"])
def test_help_is_there_with_examples(verb: str) -> None:
    text = call(verb, "--help").stdout
    assert "Examples" in text and f"pocketvlm {verb}" in text


def test_a_wrong_setting_is_one_line(recipe: Path) -> None:
    text = refusal("plan", recipe, "--set", "train.lrr=1")
    assert text.endswith("train.lrr: unknown key; did you mean lr?")
    assert "there is no such recipe file" in refusal("distill", recipe.parent / "none.yaml")
    assert "--strategy: got pp" in refusal("plan", recipe, "--strategy", "pp")


def test_only_the_first_process_complains_about_a_recipe(recipe: Path) -> None:
    done = call("distill", recipe, "--set", "seed=-1", code=2, env={**os.environ, "RANK": "1"})
    assert done.stdout == done.stderr == ""


def test_plan_prints_tables_or_json(recipe: Path) -> None:
    found = json.loads(call("plan", recipe, "--json", "--processes", "2").stdout)
    assert (found["recipe"], found["processes"], found["questions"]) == ("verbs", 2, 20)
    assert {"training", "drawing, teacher", "drawing, student"} == {row["phase"] for row in found["memory"]}
    text = call("plan", recipe).stdout
    for word in ("optimizer states", "disk", "pool: teachers answer", "total"):
        assert word in text


def test_judge_audit_says_what_it_found(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [
        {
            "id": str(i),
            "question": f"what is {i}?",
            "reference": "yes",
            "response": "yes " * (1 + i % 7),
            "verdict": i % 2,
            "label": i % 2,
            "source": "teacher",
        }
        for i in range(200)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = json.loads(call("judge-audit", path, "--json").stdout)
    assert found["agreement"]["share"] == 1.0 and not found["flagged"]
    for row in rows:
        row["verdict"] = 1 - int(str(row["label"]))
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "agreement" in call("judge-audit", path, code=2).stdout
    assert "none.jsonl" in refusal("judge-audit", tmp_path / "none.jsonl")
