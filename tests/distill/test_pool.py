"""The pool: sealed shards, resuming, merged duplicates, the majority answer."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch

from distill.demo import pool
from distill.demo.pool import Response, Row
from distill.demo.vqa import VqaData
from distill.forward import tree
from distill.forward.sampling import Sampling
from evals import scorers
from runtime.errors import StateError


@pytest.fixture
def rows(data: VqaData, monkeypatch: pytest.MonkeyPatch) -> list[Row]:
    """Five visits in shards of two; image 0 is visited twice, with other questions."""
    monkeypatch.setattr(pool, "ROWS_PER_SHARD", 2)
    asked = {image: [q.id for q in questions] for image, questions in data.by_image.items()}
    return [
        Row(0, tuple(asked[0][:2])), Row(3, tuple(asked[3][:1])), Row(5, tuple(asked[5][1:4])),
        Row(0, tuple(asked[0][2:3])), Row(7, tuple(asked[7][:2])),
    ]  # fmt: skip


def draw(model: Any, data: VqaData, rows: list[Row], directory: Path, **options: Any) -> pool.Responses:
    settings: dict[str, Any] = {"seed": 3, "sampling": Sampling(max_new_tokens=4, top_k=3), **options}
    return pool.draw(model, data, rows, 4, settings.pop("source", "teacher"), directory, **settings)


def test_every_question_is_answered_as_often_as_asked(
    tiny_model: Any, data: VqaData, rows: list[Row], tmp_path: Path
) -> None:
    seen: list[tuple[int, int]] = []
    found = draw(tiny_model, data, rows, tmp_path, progress=lambda *done: seen.append(done))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert list(found) == [question for row in rows for question in row.questions]
    for responses in found.values():
        assert sum(r.teacher for r in responses) == 4 and all(r.student == 0 for r in responses)
        assert len({r.ids for r in responses}) == len(responses), "duplicates are merged"
        assert all(len(r.mu) == len(r.ids) for r in responses)
    assert any(len(responses) < 4 for responses in found.values()), "the case needs duplicates"


def test_recorded_log_probs_are_the_models(
    tiny_model: Any, data: VqaData, rows: list[Row], tmp_path: Path
) -> None:
    found = draw(tiny_model, data, rows, tmp_path)
    for row in rows:
        for question in row.questions:
            group = data.group(question, [r.ids for r in found[question]])
            batch = tree.pack(tiny_model, [[group]], 0)
            with torch.no_grad():
                scored = tree.log_probs(tiny_model, batch)
            chosen = scored.gather(-1, batch.target_t[:, None])[:, 0].tolist()
            recorded = [value for r in found[question] for value in r.mu]
            assert recorded == pytest.approx(chosen, abs=2e-5)  # shards keep six decimals


def test_students_are_counted_as_students(
    tiny_model: Any, data: VqaData, rows: list[Row], tmp_path: Path
) -> None:
    found = draw(tiny_model, data, rows, tmp_path, source="student")
    assert {sum(r.student for r in responses) for responses in found.values()} == {4}
    assert {r.teacher for responses in found.values() for r in responses} == {0}


@pytest.mark.parametrize("lost", ["00000.jsonl", "00002.jsonl"])
def test_a_lost_shard_is_drawn_again_the_same(
    tiny_model: Any, data: VqaData, rows: list[Row], tmp_path: Path, lost: str
) -> None:
    """A shard depends on (seed, shard) alone: not on what was drawn before it in this process."""
    whole = draw(tiny_model, data, rows, tmp_path)
    kept = {path.name: path.stat().st_mtime_ns for path in tmp_path.iterdir() if path.name != lost}
    body = (tmp_path / lost).read_bytes()
    (tmp_path / lost).unlink()
    assert draw(tiny_model, data, rows, tmp_path) == whole
    assert (tmp_path / lost).read_bytes() == body
    assert {name: (tmp_path / name).stat().st_mtime_ns for name in kept} == kept, "the others are read"


def test_the_seed_decides(tiny_model: Any, data: VqaData, rows: list[Row], tmp_path: Path) -> None:
    first = draw(tiny_model, data, rows, tmp_path / "a")
    assert draw(tiny_model, data, rows, tmp_path / "b") == first
    assert draw(tiny_model, data, rows, tmp_path / "c", seed=4) != first


def test_a_damaged_shard_is_refused(tiny_model: Any, data: VqaData, rows: list[Row], tmp_path: Path) -> None:
    draw(tiny_model, data, rows, tmp_path)
    shard = tmp_path / "00001.jsonl"
    body = shard.read_text()
    for damaged in (body.replace(",", ";", 1), body[:-80], ""):
        shard.write_text(damaged)
        with pytest.raises(StateError, match=r"00001\.jsonl: the shard's seal .* delete this file and run"):
            draw(tiny_model, data, rows, tmp_path)


def test_a_question_visited_twice_is_merged(tiny_model: Any, data: VqaData, tmp_path: Path) -> None:
    """With several passes over the data one stage may ask a question twice: all responses count once."""
    question = data.by_image[0][0].id
    found = draw(tiny_model, data, [Row(0, (question,)), Row(0, (question,))], tmp_path)[question]
    assert sum(r.count for r in found) == 8
    assert len({r.ids for r in found}) == len(found)
    both = pool.merge(found, [Response(found[0].ids, 0, 1, found[0].mu)])
    assert sum(r.count for r in both) == 9


# --- merging ----------------------------------------------------------


def test_merge() -> None:
    """Counts add up by source; what both drew has the count-weighted mean probability, token by token."""
    teacher = [Response((1, 2), 3, 0, (math.log(0.5), math.log(0.9))), Response((3,), 1, 0, (-1.0,))]
    student = [Response((1, 2), 0, 1, (math.log(0.1), math.log(0.5))), Response((4,), 0, 3, (-2.0,))]
    both, *others = pool.merge(teacher, student)
    assert (both.ids, both.teacher, both.student, both.count) == ((1, 2), 3, 1, 4)
    assert both.mu == pytest.approx((math.log(0.75 * 0.5 + 0.25 * 0.1), math.log(0.75 * 0.9 + 0.25 * 0.5)))
    assert others == [Response((3,), 1, 0, (-1.0,)), Response((4,), 0, 3, (-2.0,))]


def test_merging_leaves_its_inputs_alone() -> None:
    first, second = [Response((1,), 2, 0, (-1.0,))], [Response((1,), 0, 2, (-3.0,))]
    pool.merge(first, second)
    assert first == [Response((1,), 2, 0, (-1.0,))] and second == [Response((1,), 0, 2, (-3.0,))]


def test_majority_counts_responses_by_their_answer() -> None:
    """Two wordings of `no` outvote one of `yes`, each weighing as often as it was drawn."""
    texts = {(1,): "red circle: yes", (2,): "blue circle: no", (3,): "No.", (4,): ""}

    def text(ids: Any) -> str:
        return texts[tuple(ids)]

    def vote(*counts: tuple[int, int]) -> str:
        responses = [Response((ids,), count, 0, (-1.0,)) for ids, count in counts]
        return pool.majority(responses, text, scorers.last_word)

    assert vote((1, 3), (2, 2), (3, 2)) == "no"
    assert vote((1, 3), (2, 1), (3, 1)) == "yes"
    assert vote((4, 5), (2, 1)) == "no", "silence is no vote"
    assert vote((4, 5)) == "", "but where nobody said anything there is no answer"
