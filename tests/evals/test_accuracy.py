from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from evals import stats
from evals.accuracy import AccuracyResult, compare_answers, compare_methods, evaluate, split_margins
from evals.easy_vqa import Question
from evals.gather import data_uri, examples


@dataclass
class Reply:
    text: str
    token_ids: list[int]


class Asks:
    """The least a session offers."""

    def __init__(self, replies: dict[str, Reply]) -> None:
        self.replies, self.asked = replies, 0

    def ask(self, source: Any, question: str, options: Any = None) -> Reply:
        assert options.max_new_tokens >= 1 and options.temperature == 0
        self.asked += 1
        return self.replies[question]


class Steps(Asks):
    """A session with its steps open; counts what it encodes. Logits depend on the tokens so far."""

    encoded = 0
    context: tuple[int, ...] = ()

    def prepare(self, source: Any) -> Any:
        return source

    def encode_image(self, prepared: Any) -> Any:
        self.encoded += 1
        return prepared

    def prompt_ids(self, question: str, images: Sequence[Any]) -> Any:
        assert len(images) == 1
        return question

    def complete(self, ids: Any, features: Any, options: Any = None) -> Reply:
        return self.ask(features[0], ids, options)

    def prefill(self, ids: Any, features: Any) -> np.ndarray:
        self.context = ()
        return self._logits()

    def decode(self, token_id: int) -> np.ndarray:
        self.context += (token_id,)
        return self._logits()

    def _logits(self) -> np.ndarray:
        gap = {0: 3.0, 1: 5e-5, 2: 0.5}[len(self.context)]
        return np.array([1.0, 1.0 + gap, -2.0, -3.0], np.float32)


@pytest.fixture
def items(tmp_path: Path) -> list[Question]:
    """Six questions about three images, two in a row about each."""
    paths = [tmp_path / f"{i}.png" for i in range(3)]
    for i, path in enumerate(paths):
        Image.new("RGB", (300, 200), (80 * i, 0, 0)).save(path)
    return [Question(i, i // 2, paths[i // 2], f"question {i}?", "yes" if i % 2 else "no") for i in range(6)]


def _replies(items: list[Question], wrong: Sequence[int] = ()) -> dict[str, Reply]:
    flipped = {"yes": "no", "no": "yes"}
    return {
        item.question: Reply(
            f"red: {flipped[item.answer] if item.id in wrong else item.answer}", [1, item.id]
        )
        for item in items
    }


def test_an_image_is_encoded_once_for_questions_in_a_row(items: list[Question]) -> None:
    session, seen = Steps(_replies(items, wrong=[4])), []
    result = evaluate(session, items, lambda done, total: seen.append((done, total)))
    assert session.asked == 6 and session.encoded == 3
    assert seen == [(i + 1, 6) for i in range(6)]
    assert result.outcomes == [True, True, True, True, False, True]
    assert (result.score.right, result.score.n) == (5, 6)
    first = result.predictions[0]
    assert (first.id, first.image_id, first.text, first.token_ids) == ("0", "0", "red: no", [1, 0])


def test_a_session_that_only_asks_gives_the_same(items: list[Question]) -> None:
    replies = _replies(items, wrong=[2])
    assert evaluate(Asks(replies), items) == evaluate(Steps(replies), items)


def test_texts_made_elsewhere_score_the_same_and_survive_a_file(
    items: list[Question], tmp_path: Path
) -> None:
    replies = _replies(items, wrong=[2])
    texts = [replies[item.question].text for item in items]
    result = AccuracyResult.of(items, texts, [replies[item.question].token_ids for item in items])
    assert result == evaluate(Asks(replies), items)
    assert AccuracyResult.read(result.write(tmp_path / "predictions.json")) == result
    with pytest.raises(ValueError, match=r"\[6, 5, 6\]"):
        AccuracyResult.of(items, texts[:5])


def test_flips_are_counted_by_direction(items: list[Question]) -> None:
    before, after = (evaluate(Asks(_replies(items, wrong=wrong)), items) for wrong in ([0], [3, 4]))
    found = compare_methods("S", ("kd", "masters"), before, after)
    assert (found.reference, found.candidate, found.n) == ("kd", "masters", 6)
    assert (found.right_to_wrong, found.wrong_to_right) == (2, 1)
    assert found.difference == pytest.approx(-1 / 6) and found.low <= found.difference <= found.high
    assert found.p_value == 1.0


def test_agreement_counts_answers_not_only_flips(items: list[Question]) -> None:
    replies = _replies(items)
    other = {
        q: replace(r, text=r.text.replace("red", "blue")) if q == "question 1?" else r
        for q, r in replies.items()
    }
    before, after = evaluate(Asks(replies), items), evaluate(Asks(other), items)
    found = compare_answers(before, after)
    assert (found.same, found.n, found.right_to_wrong, found.wrong_to_right, found.near_ties) == (
        5,
        6,
        0,
        0,
        0,
    )
    assert [(f.id, f.checkpoint_text, f.bundle_text, f.margin) for f in found.differing] == [
        ("1", "red: yes", "blue: yes", None)
    ]
    same = compare_answers(before, before)
    assert same.differing == [] and same.high == -same.low
    assert same.high == pytest.approx(stats.wilson(0, 3).high)  # three images without a flip, not certainty


def test_near_ties_are_found_at_the_first_token_that_differs(items: list[Question]) -> None:
    before = AccuracyResult.of(items, ["a"] * 6, [[1, 1, 1]] * 6)
    texts = ["b", "b", "b", "b", "a", "a"]
    tokens = [[0, 1, 1], [1, 0, 1], [1, 1, 0], [1, 1], [1, 0, 1], [1, 1, 1]]
    after = AccuracyResult.of(items, texts, tokens)
    margins = split_margins(Steps({}), items, before, after)
    assert margins == pytest.approx(
        {"0": 3.0, "1": 5e-5, "2": 0.5}, rel=1e-2
    )  # 3: a beginning; 4, 5: same text
    found = compare_answers(before, after, margins=margins)
    assert (found.same, found.near_ties) == (2, 1)
    assert found.differing[0].id == "1" and found.differing[0].near_tie  # near ties come first
    assert [flip.near_tie for flip in found.differing[1:]] == [False, False, False]
    assert len(compare_answers(before, after, margins=margins, keep=1).differing) == 1
    assert compare_answers(before, after, margins=margins, tie_margin=1e-6).near_ties == 0


def test_runs_over_other_questions_are_not_compared(items: list[Question]) -> None:
    result = evaluate(Asks(_replies(items)), items)
    fewer = AccuracyResult(predictions=result.predictions[:5])
    with pytest.raises(ValueError, match="6 and 5 predictions are not of the same questions"):
        compare_answers(result, fewer)
    with pytest.raises(ValueError, match="not of the same questions"):
        compare_answers(AccuracyResult(predictions=[]), AccuracyResult(predictions=[]))


def test_examples_show_disagreement_first_and_an_image_once(items: list[Question]) -> None:
    answers = {
        "teacher": evaluate(Asks(_replies(items)), items),
        "student": evaluate(Asks(_replies(items, wrong=[5])), items),
    }
    found = examples(items, answers, count=3)
    assert found[0].id == "5" and [a.right for a in found[0].answers] == [True, False]
    assert len(found) == 3 and len({example.image for example in found}) == 3
    assert examples(items, answers, count=3) == found
    assert examples(items, {}, count=3) == []


def test_a_picture_in_the_report_is_small(items: list[Question]) -> None:
    import base64
    import io

    uri = data_uri(items[0].image_path)
    picture = Image.open(io.BytesIO(base64.b64decode(uri.partition(",")[2])))
    assert uri.startswith("data:image/png;base64,") and picture.size == (128, 85)
