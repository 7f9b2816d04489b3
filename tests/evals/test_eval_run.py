"""Asking, resuming, scoring and judging; with written-down answers, and with a real checkpoint and bundle."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from evals.asking import eval_judge, eval_layouts, eval_results, eval_run
from evals.asking.eval_results import ORIGINAL, EvalResults, Variant
from evals.asking.subjects import describe_all
from evals.tasks.catalogue import open_task
from evals.tasks.question import Question, Task
from runtime.errors import InputError, StateError
from tests.evals.task_files import Told, png, told, write_jsonl, write_tsv
from tests.faults import FaultServer, completion

ROOT = Path(__file__).parent.parent.parent


def task(count: int = 6, scorer: str = "exact", **changes: Any) -> Task:
    """Questions `q0`.. with the answer `a0`.., two on every picture."""
    questions = tuple(
        Question(str(i), f"g{i // 2}", f"q{i}", f"q{i}", (png(i // 2),), (f"a{i}",)) for i in range(count)
    )
    return Task("t", "lmms-jsonl", "test", "t.jsonl", questions, scorer, **changes)


def right(*numbers: int) -> dict[str, str]:
    """Answers that are right for these questions, others are `none`."""
    return {f"q{i}": f"It is a{i}" for i in numbers}


def scores(results: EvalResults, name: str) -> list[float]:
    return [one.score for one in results.subject(name).answers]


def test_models_are_asked_scored_and_compared(tmp_path: Path) -> None:
    first, second = told("first", right(0, 1, 2, 3)), told("second", right(0, 1, 4))
    found = eval_run.run([first, second], task(), tmp_path)
    assert scores(found, "first") == [1, 1, 1, 1, 0, 0]
    assert scores(found, "second") == [1, 1, 0, 0, 1, 0]
    (change,) = found.changes
    assert (change.right_to_wrong, change.wrong_to_right, change.both_right) == (2, 1, 2)
    assert change.same_text == 3
    assert found.summary("first", ORIGINAL).value == pytest.approx(4 / 6)  # type: ignore[union-attr]
    assert found.subject("first").answers[0].read == "a0"
    assert found == eval_results.read(tmp_path / "eval.json")
    assert first.script.encoded == 3, "a picture is encoded once for consecutive questions"


def test_a_second_call_asks_nobody_again_whatever_scores(tmp_path: Path) -> None:
    model = told("m", {"q0": "A0", "q1": "It is a1"})
    before = eval_run.run([model], task(2), tmp_path)
    asked = list(model.script.asked)
    again = eval_run.run([model], task(2), tmp_path)
    other = eval_run.run([model], task(2, "relaxed"), tmp_path)
    assert model.script.asked == asked
    assert again.subjects == before.subjects
    assert scores(before, "m") == [1, 1]
    assert scores(other, "m") == [1, 0], "relaxed compares the whole answer"


def test_a_changed_question_or_length_is_asked_again(tmp_path: Path) -> None:
    model, plain = told("m"), task(2)
    eval_run.run([model], plain, tmp_path)
    reworded = dataclasses.replace(plain.questions[1], prompt="another")
    changed = dataclasses.replace(plain, questions=(plain.questions[0], reworded))
    eval_run.run([model], changed, tmp_path)
    assert model.script.asked == ["q0", "q1", "q0", "another"]
    repainted = dataclasses.replace(plain.questions[0], images=(png(99),))
    eval_run.run([model], dataclasses.replace(plain, questions=(repainted, *plain.questions[1:])), tmp_path)
    eval_run.run([model], dataclasses.replace(plain, max_new_tokens=5), tmp_path)
    assert len(model.script.asked) == 8


def test_other_versions_of_what_runs_a_model_ask_it_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """eval.json names the versions that are installed: answers of older ones would be under a wrong name."""
    model, versions = told("m"), dict.fromkeys(("onnxruntime", "llama-cpp-python", "numpy"), "1")
    object.__setattr__(model, "format", "onnx")
    monkeypatch.setattr(eval_run, "installed", lambda name: versions.get(name))
    for package, asked in (("", 2), ("llama-cpp-python", 2), ("onnxruntime", 4), ("numpy", 6), ("", 6)):
        versions |= {package: "2"}
        eval_run.run([model], task(2), tmp_path)
        assert len(model.script.asked) == asked


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from evals.asking import eval_run
from tests.evals.task_files import Script, told
from tests.evals.test_eval_run import right, task

log = Path({log!r})

class Dying(Script):
    def complete(self, ids, features, options=None):
        with log.open("a") as stream:
            stream.write(ids + "\\n")
        if {limit} and len(log.read_text().split()) == {limit}:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().complete(ids, features, options)

eval_run.CHUNK = 2
model = told("m", right(0, 2, 5))
object.__setattr__(model, "script", Dying(model.script.replies))
eval_run.run([model], task(), Path({out!r}))
"""


def test_a_killed_run_goes_on_after_its_last_shard(tmp_path: Path) -> None:
    log, out = tmp_path / "log", tmp_path / "out"
    for limit, code in ((4, -signal.SIGKILL), (0, 0)):
        script = KILLED.format(root=str(ROOT), log=str(log), out=str(out), limit=limit)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT)
        assert done.returncode == code, done.stderr
    # the second chunk was not sealed when its last answer died: its two questions are asked again
    assert log.read_text().split() == ["q0", "q1", "q2", "q3", "q2", "q3", "q4", "q5"]
    assert scores(eval_results.read(out / "eval.json"), "m") == [1, 0, 1, 0, 0, 1]


def test_a_damaged_shard_is_refused_by_name(tmp_path: Path) -> None:
    eval_run.run([told("m")], task(2), tmp_path)
    (shard,) = (tmp_path / "work").rglob("*.jsonl")
    shard.write_text(shard.read_text().replace("none", "a0"))
    with pytest.raises(StateError, match=shard.name):
        eval_run.run([told("m")], task(2), tmp_path)


def test_a_directory_in_use_is_refused(tmp_path: Path) -> None:
    from runtime import files

    with files.lock(tmp_path), pytest.raises(StateError, match="another run is using it"):
        eval_run.run([told("m")], task(2), tmp_path)


def test_what_cannot_be_asked_is_wrong_and_told(tmp_path: Path) -> None:
    plain = task(3)
    long = dataclasses.replace(plain.questions[1], prompt="q1 too long")
    asked = dataclasses.replace(plain, questions=(plain.questions[0], long, plain.questions[2]))
    found = eval_run.run([told("m", {"q0": "a0", "q2": "a2 ..", "q1 too long": "a1"})], asked, tmp_path)
    failed = found.subject("m").answers[1]
    assert (failed.finish, failed.score, failed.new_tokens) == ("failed", 0, None)
    assert "needs 9 tokens" in str(failed.error)
    summary = found.summary("m")
    assert summary is not None
    assert (summary.failed, summary.cut, summary.right) == (1, 1, 2)
    assert [gap.what for gap in found.missing] == ["m: 1 of 3 questions", "m: the end of 1 of 3 answers"]


def test_a_model_that_takes_no_question_is_an_error(tmp_path: Path) -> None:
    plain = task(2)
    long = tuple(dataclasses.replace(one, prompt=f"{one.prompt} too long") for one in plain.questions)
    with pytest.raises(InputError, match="no question could be asked; the first: prompt: needs 9 tokens"):
        eval_run.run([told("m")], dataclasses.replace(plain, questions=long), tmp_path)


def test_a_reference_that_no_rule_can_use_fails_before_anything_is_asked(tmp_path: Path) -> None:
    model = told("m")
    with pytest.raises(InputError, match=r"question 0: numeric: the reference .* holds no number"):
        bad = dataclasses.replace(task(1, "numeric").questions[0], references=("none",))
        eval_run.run([model], dataclasses.replace(task(1, "numeric"), questions=(bad,)), tmp_path)
    with pytest.raises(InputError, match="add --judge URL"):
        eval_run.run([model], task(1, "judge"), tmp_path)
    assert model.script.asked == []


def test_variants_have_their_own_answers(tmp_path: Path) -> None:
    plain = task(4)
    worded = tuple(dataclasses.replace(one, prompt=f"{one.prompt}, please") for one in plain.questions[:3])
    variant = Variant(name="wording-1", family="wording", severity=1)
    model = told("m", {**right(0, 1, 2, 3), "q0, please": "a0"})
    found = eval_run.run(
        [model], plain, tmp_path, variants=[(variant, dataclasses.replace(plain, questions=worded))]
    )
    (change,) = found.changes
    assert (change.reference_variant, change.variant) == (ORIGINAL, "wording-1")
    assert (change.units, change.right_to_wrong) == (3, 2)
    assert [one.asked for one in found.subject("m").answers if one.variant == "wording-1"] == [
        "q0, please", "q1, please", "q2, please",
    ]  # fmt: skip
    assert found.unit_scores("m", "wording-1") == {"0": 1.0, "1": 0.0, "2": 0.0}


def test_orders_of_one_question_count_once(tmp_path: Path) -> None:
    rows = [
        {"index": group + turn * 10**6, "question": f"q{group}", "answer": "AB"[turn], "A": "x", "B": "y"}
        for group in (1, 2)
        for turn in range(2)
    ]
    asked = open_task(str(write_tsv(tmp_path / "MMBench_DEV_EN.tsv", rows)))
    replies = {one.prompt: "A" for one in asked.questions if one.unit == "1"}
    replies |= {one.prompt: one.references[0] for one in asked.questions if one.unit == "2"}
    # both orders of a question have one prompt here, so the script answers both alike: unit 1 with A, A
    found = eval_run.run([told("m", replies)], asked, tmp_path / "out")
    summary = found.summary("m")
    assert summary is not None
    assert (summary.units, summary.right) == (2, 0)
    assert found.task.circular


# --- judges -----------------------------------------------------------


def grader(right_word: str) -> Any:
    """A server that grades 1 what holds a word; its second call reads the first one's tag."""

    def answer(body: dict[str, Any]) -> dict[str, Any]:
        content = body["messages"][-1]["content"]
        text = content if isinstance(content, str) else content[-1]["text"]
        if "<response>" not in text:
            return completion(["1" if "<answer>1" in text else "0"])
        response = text.split("<response>\n")[1].split("\n</response>")[0]
        return completion([f"Because. <answer>{int(right_word in response)}</answer>"])

    return answer


def test_a_judge_scores_every_answer_once(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    model = told("m", {"q0": "surely right", "q1": "wrong", "q2": ""})
    with FaultServer(grader("right")) as server:
        settings = eval_run.Settings(judge=eval_judge.Settings(server.url, "grader"))
        found = eval_run.run([model], task(3, "judge"), tmp_path, settings=settings)
        seen = server.seen
        again = eval_run.run([model], task(3, "judge"), tmp_path, settings=settings)
        assert server.seen == seen == 4, "two calls an answer, none for an empty one, none again"
    assert scores(found, "m") == scores(again, "m") == [1, 0, 0]
    assert found.task.judge == "grader"
    assert [one.read for one in found.subject("m").answers] == ["judged", "judged", "empty"]


def test_a_judge_is_asked_only_what_the_rule_cannot_read(tmp_path: Path) -> None:
    pytest.importorskip("openai")
    row = {"question": "which?", "answer": "B", "A": "cat", "B": "dog"}
    rows = [{"index": i, **row, "question": f"q{i}"} for i in range(3)]
    asked = open_task(str(write_tsv(tmp_path / "AI2D.tsv", rows)))
    texts = ("B", "A", "the animal that barks")
    model = told("m", {one.prompt: text for one, text in zip(asked.questions, texts, strict=True)})
    with FaultServer(grader("barks")) as server:
        settings = eval_run.Settings(judge=eval_judge.Settings(server.url, "grader"))
        found = eval_run.run([model], asked, tmp_path / "out", settings=settings)
        (body, _) = server.bodies
    assert scores(found, "m") == [1, 0, 1]
    text = json.dumps(body)
    assert "A. cat" in text
    assert "B. dog" in text


# --- the harnesses' layouts -------------------------------------------


def test_answers_are_written_as_the_harnesses_have_them(tmp_path: Path) -> None:
    row = {"answer": "B", "A": "cat", "B": 'a "dog"\tbig', "category": "c"}
    rows = [{"index": i, "question": f"line\nbreak {i}", **row} for i in range(2)]
    asked = open_task(str(write_tsv(tmp_path / "AI2D_TEST.tsv", rows)))
    model = told("m", {one.prompt: "It's B.\n" for one in asked.questions})
    found = eval_run.run([model], asked, tmp_path / "out")
    for _ in range(2):  # a second time the files are replaced
        eval_layouts.write(found, asked, tmp_path / "out")
    pandas = pytest.importorskip("pandas")
    (path,) = (tmp_path / "out" / "vlmevalkit").rglob("*.tsv")
    assert path.name == "m_AI2D_TEST.tsv"
    table = pandas.read_csv(path, sep="\t")
    assert list(table.columns) == ["index", "question", "answer", "A", "B", "category", "prediction"]
    assert list(table["B"]) == ['a "dog"\tbig'] * 2
    assert list(table["prediction"]) == ["It's B.\n"] * 2
    assert list(table["question"]) == ["line\nbreak 0", "line\nbreak 1"]
    (path,) = (tmp_path / "out" / "lmms-eval").rglob("*.jsonl")
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["doc_id"] for line in lines] == [0, 1]
    assert lines[0] | {"doc_hash": ""} == {
        "doc_id": 0, "target": "B", "filtered_resps": "B", "resps": ["It's B.\n"], "doc_hash": "",
        "score": 1.0, "input": asked.questions[0].prompt,
    }  # fmt: skip


def test_a_workbook_holds_the_same(tmp_path: Path) -> None:
    openpyxl = pytest.importorskip("openpyxl")
    asked = task(1)
    found = eval_run.run([told("m", {"q0": "a\x07b" + "=1"})], asked, tmp_path)
    eval_layouts.write(found, asked, tmp_path)
    (path,) = (tmp_path / "vlmevalkit").rglob("*.xlsx")
    rows = list(openpyxl.load_workbook(path).active.values)
    assert rows == [("index", "question", "answer", "prediction"), ("0", "q0", "a0", "ab=1")]


# --- real models ------------------------------------------------------


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    for number in range(2):
        (tmp_path / f"{number}.png").write_bytes(png(40 * number, side=64))
    rows = [
        {"question": f"what is {i}?", "image": f"{i % 2}.png", "answer": "yes", "id": f"x{i}"}
        for i in range(3)
    ]
    return write_jsonl(tmp_path / "tiny.jsonl", rows)


def test_a_bundle_answers_as_its_checkpoint(
    jsonl: Path, tiny_checkpoint: Path, tiny_bundle: Path, tmp_path: Path
) -> None:
    models = describe_all([tiny_checkpoint, tiny_bundle])
    asked = open_task(str(jsonl), max_new_tokens=4)
    told_of: list[tuple[str, int, int]] = []
    found = eval_run.run(
        models,
        asked,
        tmp_path / "out",
        settings=eval_run.Settings(threads=1),
        progress=lambda *one: told_of.append(one),
    )
    checkpoint, bundle = found.subjects
    assert [one.answer for one in checkpoint.answers] == [one.answer for one in bundle.answers]
    assert (checkpoint.kind, bundle.kind) == ("checkpoint", "bundle")
    assert (bundle.format, bundle.precision) == ("onnx", "fp32")
    assert bundle.backend.startswith("onnxruntime ")
    assert bundle.emulated == ""
    assert all(one.new_tokens == 4 and one.finish == "length" for one in bundle.answers)
    assert told_of == [(model.name, done, 3) for model in models for done in (1, 2, 3)]
    assert len(found.examples) == 2, "one a picture"
    assert len(list((tmp_path / "out" / "work").iterdir())) == 2, "a directory a model"


def test_a_teacher_is_told_from_a_checkpoint(tmp_path: Path) -> None:
    models: list[Told] = [told("m"), told("t")]
    settings = eval_run.Settings(teachers=frozenset({"t"}))
    found = eval_run.run(models, task(1), tmp_path, settings=settings)
    assert [one.kind for one in found.subjects] == ["checkpoint", "teacher"]
