"""`pocketvlm eval` as a user has it."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import pocketvlm
from evals.asking import eval_results
from tests.cli import call, refusal
from tests.evals.task_files import png, write_jsonl, write_tsv


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    (tmp_path / "p.png").write_bytes(png(1, side=64))
    rows = [{"question": f"what is {i}?", "image": "p.png", "answer": "yes"} for i in range(3)]
    return write_jsonl(tmp_path / "tiny.jsonl", rows)


def test_eval_prints_where_its_results_are(questions: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ("--task", questions, "--limit", "2", "--max-new-tokens", "2", "--threads", "1", "--out", out)
    done = call("eval", tiny_bundle, *options)
    assert done.stdout.splitlines() == [str(out / "eval.json")]
    assert "tiny.jsonl" not in done.stderr
    assert "2 questions" in done.stderr
    assert eval_results.read(out / "eval.json").task.available == 3
    told = json.loads(call("eval", tiny_bundle, *options, "--json").stdout)
    assert [one["units"] for one in told["summaries"]] == [2]
    assert len(told["files"]) >= 3
    assert all(Path(name).is_file() for name in told["files"])


def test_what_eval_refuses(questions: Path, tiny_bundle: Path, tmp_path: Path) -> None:
    assert "no such task and no such file" in refusal("eval", tiny_bundle, "--task", "nothing.tsv")
    assert "wanted both" in refusal("eval", tiny_bundle, "--task", questions, "--judge", "http://x")
    assert "no manifest.json" in refusal("eval", tmp_path, "--task", questions)
    assert "name a bundle, too" in refusal("eval", tiny_bundle, "--task", questions, "--parity")


def test_a_judge_without_its_client_is_told_before_any_question(
    questions: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "openai" else find(name))
    out = tmp_path / "out"
    judge = ("--judge", "http://127.0.0.1:9/v1", "--judge-model", "m")
    words = ["eval", str(tiny_bundle), "--task", str(questions), *judge, "--out", str(out)]
    done = CliRunner().invoke(pocketvlm.app, words)
    assert done.exit_code == 2
    assert "openai is not installed; run: pip install 'pocketvlm[distill]'" in done.output
    assert not out.exists()


def test_a_faulty_row_is_named(tiny_bundle: Path, tmp_path: Path) -> None:
    path = write_tsv(tmp_path / "AI2D.tsv", [{"index": 1, "question": "q", "answer": ""}])
    assert "AI2D.tsv, row 1: has no answer" in refusal("eval", tiny_bundle, "--task", path)
