"""R_acc by rule and by judge, an engine and a server as the judge's `generate`, rows of an audit."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from distill.answers import judging, probe
from distill.answers.engines import HfEngine
from distill.answers.judging import Rule
from distill.answers.responses import Reference, Response
from distill.inputs.data import Sample, SampleError
from distill.inputs.encoding import Encoder
from evals import judge_audit
from evals.client import Client, ServerError
from evals.judge import Judge, Verdict
from evals.tasks.images import ImageSource
from tests.evals.test_judge import Grader
from tests.faults import FaultServer, completion

TEXTS = {1: "it is red", 2: "it is blue", 3: "", 4: "red red red red", 5: "the answer is B"}


def text(ids: Any) -> str:
    return TEXTS[ids[0]]


def response(number: int, teacher: int = 1, student: int = 0) -> Response:
    return Response((number, 9), {"teacher": teacher, "student": student}, None)


def sample(name: str, answer: str | None = "red", scorer: str = "exact", choices: Any = ()) -> Sample:
    content = [{"type": "text", "text": "What color is it?"}]
    return Sample(name, ({"role": "user", "content": content},), (), answer, scorer, choices, "tests", 7)


def label(answer: str, pseudo: bool = False) -> Reference:
    return Reference(answer, pseudo, 1.0)


def test_a_rule_scores_each_response_with_its_samples_scorer() -> None:
    samples = [sample("a"), sample("a"), sample("a"), sample("a"), sample("b", "B", "choice", ("x", "y"))]
    references = {"a": label("red"), "b": label("B")}
    found = judging.correct(
        samples, [response(i) for i in range(1, 6)], Rule(), references=references, text=text
    )
    assert found == [1, 0, 0, 0, 1]


def test_fractions_and_thresholds() -> None:
    answers = json.dumps(["it is red"] + ["blue"] * 9)  # one of ten: 0.3
    samples, references = [sample("a", answers, "vqa")], {"a": label(answers)}

    def by(rule: Rule) -> list[float]:
        return judging.correct(samples, [response(1)], rule, references=references, text=text)

    assert by(Rule()) == [0]
    assert by(Rule(right_from=0.3)) == [1]
    assert by(Rule(fractions=True)) == [pytest.approx(0.3)]


def test_a_voted_reference_counts_like_a_label_and_an_empty_one_makes_nothing_right() -> None:
    samples = [sample("a", None), sample("b", None)]
    references = {"a": label("red", pseudo=True), "b": Reference("", True, 0.0)}
    for by in (Rule(), Judge(Grader())):
        assert judging.correct(samples, [response(1), response(1)], by, references=references, text=text) == [
            1,
            0,
        ]


def test_a_pool_keeps_its_order() -> None:
    pool = {"a": [response(2), response(1)], "b": [response(1)], "c": [response(1)]}
    references = {"a": label("red"), "b": label("blue")}
    found = judging.correct_pool(
        [sample("b", "blue"), sample("a"), sample("z")], pool, Rule(), references=references, text=text
    )
    assert found == {"a": [0, 1], "b": [0]}


def test_a_judge_asks_for_what_the_rule_cannot_see() -> None:
    grader = Grader()
    ticks: list[tuple[int, int]] = []
    found = judging.judged(
        [sample("a")] * 4,
        [response(i) for i in range(1, 5)],
        Judge(grader),
        references={"a": label("red")},
        text=text,
        progress=lambda done, of: ticks.append((done, of)),
    )
    assert [verdict.score for verdict in found] == [1, 0, 0, 0]
    assert [verdict.how for verdict in found] == ["judged", "judged", "empty", "repetitive"]
    assert len(grader.first) == 2
    assert ticks == [(4, 4)]


def test_each_source_may_have_its_own_judge() -> None:
    teacher, student = Grader(), Grader(explanation="no <answer>0</answer>", reply="0")
    responses = [response(1, 2, 1), response(1, 1, 2), response(1, 1, 1), response(1, 0, 1)]
    found = judging.correct(
        [sample("a")] * 4,
        responses,
        {"teacher": Judge(teacher), "student": Judge(student)},
        references={"a": label("red")},
        text=text,
    )
    assert found == [1, 0, 1, 0]


def test_the_judge_sees_images_where_it_is_told_to(tmp_path: Path) -> None:
    path = tmp_path / "red.png"
    Image.new("RGB", (4, 4), "red").save(path)
    content = [{"type": "image"}, {"type": "text", "text": "What color is it?"}]
    shown = Sample("a", ({"role": "user", "content": content},), (ImageSource(path=path),), "red")
    grader = Grader()
    judging.judged(
        [shown], [response(1)], Judge(grader), references={"a": label("red")}, text=text, show_images=True
    )
    assert grader.first[0][0]["content"][0]["image"].getpixel((0, 0)) == (255, 0, 0)


def test_a_label_that_the_rule_cannot_use_is_named() -> None:
    wrong = sample("a", "several", "numeric")
    with pytest.raises(SampleError, match=r"tests\[7\].*holds no number"):
        judging.check(wrong)
    judging.check(sample("b", "5", "numeric"))
    judging.check(sample("c", None, "numeric"))


def test_rows_of_an_audit(tmp_path: Path) -> None:
    samples = [sample("a"), sample("a"), sample("n", None), sample("b", "A", "choice", ("x", "y"))]
    responses = [response(1), response(2, 0, 3), response(1), response(5)]
    verdicts = [Verdict(1, "judged"), Verdict(1, "judged"), Verdict(1, "judged"), Verdict(0, "unparsable")]
    judge_audit.write(tmp_path / "audit.jsonl", judging.audit_rows(samples, responses, verdicts, text=text))
    rows = judge_audit.read(tmp_path / "audit.jsonl")
    assert [(row.id, row.verdict, row.label, row.source, row.option, row.length) for row in rows] == [
        ("a", 1, 1, "teacher", None, 2),
        ("a", 1, 0, "student", None, 2),
        ("b", 0, 0, "teacher", "B", 2),
    ]
    assert rows[2].how == "unparsable"


def test_an_audit_of_a_pool() -> None:
    pool = {"a": [response(1), response(2)], "n": [response(1)], "b": [response(5)]}
    samples = [sample("a"), sample("n", None), sample("b", "B", "choice", ("x", "y"))]
    judge = Judge(Grader(explanation="<answer>1</answer>", reply="1"))
    rows = judging.audit_pool(samples, pool, judge, text=text)
    assert [(row.id, row.verdict, row.label) for row in rows] == [("a", 1, 1), ("a", 1, 0), ("b", 1, 1)]


def chat(question: str, image: Image.Image | None = None) -> list[dict[str, Any]]:
    pictures = [] if image is None else [{"type": "image", "image": image}]
    return [{"role": "user", "content": [*pictures, {"type": "text", "text": question}]}]


CHATS = [
    chat("is there a red circle in the image?", probe.image(0, 64)),
    chat("what color is the shape?"),
    chat("what color is the shape?", probe.image(1, 64)),
    chat("is it blue? yes or no"),
]


def test_an_engine_generates_what_transformers_does(tiny_model: Any, processor: Any) -> None:
    encoder = Encoder(processor)
    found = judging.in_process(HfEngine(tiny_model, encoder, rows_per_batch=2), encoder, max_new_tokens=12)(
        CHATS
    )
    wanted = []
    for messages in CHATS:
        inputs = processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            ids = tiny_model.generate(
                **inputs,
                max_new_tokens=12,
                do_sample=False,
                suppress_tokens=[tiny_model.config.image_token_id],
            )
        wanted.append(encoder.text(ids[0, inputs["input_ids"].shape[1] :].tolist()))
    assert found == wanted
    assert len(set(found)) > 1


def test_a_chat_that_is_too_long_costs_itself_alone(tiny_model: Any, processor: Any) -> None:
    encoder = Encoder(processor, max_prompt_tokens=100)
    generate = judging.in_process(HfEngine(tiny_model, encoder), encoder, max_new_tokens=4)
    found = generate([CHATS[1], chat("red circle " * 100)])
    assert found[0] != "" and found[1] == ""


def test_a_tiny_model_judges_a_pool(tiny_model: Any, processor: Any, tmp_path: Path) -> None:
    """A random model names no score: each verdict is unreadable, 0, and read again from the cache."""
    encoder = Encoder(processor)
    generate = judging.in_process(HfEngine(tiny_model, encoder), encoder, max_new_tokens=4)
    samples, responses = [sample("a"), sample("a")], [response(1), response(2)]
    results = []
    for _ in range(2):
        judge = Judge(generate, tmp_path / "verdicts.jsonl", model="tiny")
        results.append(judging.judged(samples, responses, judge, references={"a": label("red")}, text=text))
    assert results[0] == results[1]
    assert [verdict.how for verdict in results[0]] == ["unparsable"] * 2
    assert (judge.statistics.cached, judge.statistics.calls) == (2, 0)


@pytest.fixture
def server() -> Iterator[FaultServer]:
    grader = Grader()

    def answer(body: Any) -> Any:
        shown = body["messages"][0]["content"]
        return completion([grader.answer([{"content": shown}])])

    with FaultServer(answer) as running:
        yield running


def judge_of(server: FaultServer, **options: Any) -> list[Verdict]:
    with Client(server.url, "m", retries=2, pause_seconds=0.01, concurrency=1, **options) as client:
        return judging.judged(
            [sample("a")] * 2,
            [response(1), response(2)],
            Judge(judging.served(client), model="m"),
            references={"a": label("red")},
            text=text,
        )


def test_a_server_judges_through_faults(server: FaultServer) -> None:
    server.plan.extend(["500", "half", "", "429"])
    assert [verdict.score for verdict in judge_of(server)] == [1, 0]
    assert server.seen == 7


def test_a_chat_that_the_server_refuses_is_unreadable_and_the_others_are_judged(server: FaultServer) -> None:
    server.plan.extend(["", "400", "", "400"])  # the second response's first call, twice
    found = judge_of(server)
    assert [(verdict.score, verdict.how) for verdict in found] == [(1, "judged"), (0, "unparsable")]


def test_a_server_that_stays_broken_is_an_error(server: FaultServer) -> None:
    server.plan.append("dead")
    with pytest.raises(ServerError):
        judge_of(server)
