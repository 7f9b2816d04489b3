"""State that cannot be cut, M-RoPE and deepstack, by a decoder that is a few lines of numpy."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from runtime import prompt
from runtime.generation import GenerationOptions
from runtime.onnx_session import OnnxBackend
from runtime.providers import RunSettings
from runtime.session import Session
from tests.runtime.graphs import SCALE, WIDTH, HandMade, hand_made
from tests.runtime.test_session import QUESTION, png

SHORT = GenerationOptions(max_new_tokens=6)
TOLERANCE = {"atol": 2e-4, "rtol": 1e-4}  # float32 sums in another order


@pytest.fixture(scope="module", params=list(itertools.product((True, False), repeat=3)))
def made(request: Any, session: Session, tmp_path_factory: pytest.TempPathFactory) -> HandMade:
    conv, deepstack, mrope = request.param
    directory = tmp_path_factory.mktemp("made")
    return hand_made(directory, session.manifest, conv=conv, deepstack=deepstack, mrope=mrope)


def opened(made: HandMade, session: Session, **more: Any) -> Session:
    backend = OnnxBackend(made.directory, made.manifest, RunSettings(threads=1), 256)
    return Session(made.manifest, backend, session.tokenizer, **more)


@pytest.fixture
def ours(made: HandMade, session: Session) -> Iterator[Session]:
    with opened(made, session) as found:
        yield found


def has_conv(made: HandMade) -> bool:
    return any(state.kind == "conv" for state in made.manifest.state)


def expected(
    made: HandMade, session: Session, ids: Any, seeds: tuple[int, ...], more: tuple[int, ...] = ()
) -> Any:
    prepared = [session.prepare(png(seed)) for seed in seeds]
    features = [session.encode_image(each) for each in prepared]
    whole = np.array([*ids, *more], dtype=np.int64)
    return made.logits(whole, session.positions(whole, prepared), features)


def test_prefill_and_decode_are_the_numpy_model(made: HandMade, ours: Session) -> None:
    prepared = [ours.prepare(png(seed)) for seed in (1, 2)]
    features = [ours.encode_image(each) for each in prepared]
    ids = ours.prompt_ids(QUESTION, prepared)
    np.testing.assert_allclose(ours.prefill(ids, features), expected(made, ours, ids, (1, 2)), **TOLERANCE)
    for n, token in enumerate((7, 8, 9), start=1):
        wanted = expected(made, ours, ids, (1, 2), (7, 8, 9)[:n])
        np.testing.assert_allclose(ours.decode(token), wanted, **TOLERANCE)


def test_another_question_about_the_same_picture(made: HandMade, ours: Session) -> None:
    """With a conv state the end of the picture is where the state can go back to."""
    ours.ask(png(1), QUESTION, SHORT)
    prepared = ours.prepare(png(1))
    ids = ours.prompt_ids("and how large is it?", [prepared])
    got = ours.prefill(ids, [ours.encode_image(prepared)], reuse=True)
    np.testing.assert_allclose(got, expected(made, ours, ids, (1,)), **TOLERANCE)
    answer = ours.ask(png(1), "what else?", SHORT)
    last_image = int(np.flatnonzero(ids == made.manifest.merge.token)[-1])
    assert answer.stats.encoded_images == 0
    if has_conv(made):
        assert answer.stats.reused_tokens == last_image + 1
    else:
        assert answer.stats.reused_tokens > last_image


def test_a_later_turn_and_its_retry(made: HandMade, ours: Session) -> None:
    chat = ours.chat(png(1))
    first = chat.ask(QUESTION, SHORT)
    fed = first.stats.prompt_tokens + first.stats.new_tokens - 1  # the last one was not run
    for question in ("is it big?", "is it red?"):
        answer = chat.ask(question, SHORT)
        assert answer.stats.reused_tokens >= fed
        assert answer.stats.encoded_images == 0
        prepared = ours.prepare(png(1))
        ids = ours.prompt_ids(question, (), chat.turns[:1])
        wanted = made.logits(ids, ours.positions(ids, [prepared]), [ours.encode_image(prepared)])
        assert answer.token_ids[0] == int(wanted.argmax())
        chat.undo()
        assert len(chat.turns) == 1


def test_a_second_picture_in_a_later_turn(made: HandMade, ours: Session) -> None:
    chat = ours.chat(png(1))
    chat.ask(QUESTION, SHORT)
    chat.show(png(2))
    answer = chat.ask("and this one?", SHORT)
    assert answer.stats.encoded_images == 1
    prepared = [ours.prepare(png(seed)) for seed in (1, 2)]
    ids = ours.prompt_ids("and this one?", prepared[1:], chat.turns[:1])
    features = [ours.encode_image(each) for each in prepared]
    wanted = made.logits(ids, ours.positions(ids, prepared), features)
    assert answer.token_ids[0] == int(wanted.argmax())
    np.testing.assert_allclose(ours.prefill(ids, features), wanted, **TOLERANCE)


def test_choices_walk_and_come_back(made: HandMade, ours: Session) -> None:
    """Going back over a conv state needs marks at every fork."""
    names = ["red circle", "red square", "red", "blue"]
    answer = ours.ask(png(3), QUESTION, choices=names)
    assert answer.scores is not None
    prepared = ours.prepare(png(3))
    prompt_ids = ours.prompt_ids(QUESTION, [prepared])
    features = ours.encode_image(prepared)
    later = made.manifest.prompt.later
    assert later is not None
    for name, got in zip(names, answer.scores.log_probabilities, strict=True):
        tokens = prompt.encode(ours.tokenizer, later.answer_before + name)
        total, ids = 0.0, prompt_ids
        for token in [*tokens, None]:
            logits = made.logits(ids, ours.positions(ids, [prepared]), [features]).astype(np.float64)
            logs = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
            total += np.logaddexp.reduce(logs[list(ours.stop_ids)]) if token is None else logs[token]
            ids = np.append(ids, token if token is not None else 0)
        assert got == pytest.approx(total, abs=2e-3)


def test_rows_that_cannot_be_padded_run_one_by_one(made: HandMade, ours: Session) -> None:
    found = ours.ask_batch([(png(1), QUESTION), (png(2), "is it?")], SHORT)
    assert [answer.token_ids for answer in found] == [
        ours.ask(png(1), QUESTION, SHORT).token_ids,
        ours.ask(png(2), "is it?", SHORT).token_ids,
    ]
    reason = "past_conv.0" if has_conv(made) else "past_key_values.0.key"
    assert all(reason in answer.stats.one_by_one for answer in found)


def test_state_bytes_are_those_of_the_manifest(made: HandMade, ours: Session) -> None:
    conv = 2 * WIDTH * 2 * 4 if has_conv(made) else 0
    assert ours.kv_bytes == 256 * WIDTH * 4 + conv


def test_a_rounded_state_has_the_manifests_type(session: Session, tmp_path: Path) -> None:
    """int8 keys: zeros of that type to begin with, a quarter of the bytes, logits within the rounding."""
    made = hand_made(tmp_path, session.manifest, conv=False, deepstack=False, mrope=False, int8=True)
    with opened(made, session) as ours:
        assert ours.kv_bytes == 256 * WIDTH
        prepared = ours.prepare(png(1))
        ids, features = ours.prompt_ids(QUESTION, [prepared]), ours.encode_image(prepared)
        wanted = expected(made, ours, ids, (1,))
        most = len(ids) * SCALE / 2 * np.abs(made.head).sum(0)  # half a step for every token
        got = ours.prefill(ids, [features])
        assert (np.abs(got - wanted) <= most).all()
        assert np.abs(got - wanted).max() > 1e-3
        ours.decode(7)
        again = ours.prompt_ids("why?", [prepared])
        whole = ours.prefill(again, [features])
        ours.prefill(ids, [features])
        np.testing.assert_allclose(ours.prefill(again, [features], reuse=True), whole, **TOLERANCE)
