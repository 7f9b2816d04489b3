"""A prompt that begins as the running sequence does runs only its rest, and gives what a fresh one gives."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evals.torch_session import TorchSession
from runtime.answer import Turn
from runtime.errors import InputError
from runtime.feature_memory import FeatureMemory, picture_key
from runtime.generation import GenerationOptions
from runtime.image import ImageFeatures
from runtime.sequence import shared_length
from runtime.session import DEFAULT_CONTEXT, Session, context_of, open_bundle
from tests.runtime.test_session import QUESTION, png, with_state

SHORT = GenerationOptions(max_new_tokens=6)
CLOSE = {"atol": 1e-4, "rtol": 0}  # float32, another order of summation
IMAGE = 4  # an image token in sequences by hand


@pytest.fixture
def fresh(tiny_bundle: Path) -> Iterator[Session]:
    """A session without a past, which tests may leave in any state."""
    with open_bundle(tiny_bundle, threads=1, verify=False) as opened:
        yield opened


def logits(session: Session, question: str, seeds: Sequence[int] = (0,), *, reuse: bool, **more: Any) -> Any:
    prepared = [session.prepare(png(seed)) for seed in seeds]
    ids = session.prompt_ids(question, prepared, **more)
    return session.prefill(ids, [session.encode_image(each) for each in prepared], reuse=reuse)


# --- the same logits --------------------------------------------------


@pytest.mark.parametrize("in_place", [True, False])
def test_any_prompt_after_any_other(tiny_bundle: Path, session: Session, in_place: bool) -> None:
    """Pictures and questions changed, added, dropped; one after the other over one state."""
    prompts: list[tuple[str, tuple[int, ...]]] = [
        (QUESTION, (0,)),
        (QUESTION, (0,)),
        ("what shape is it?", (0,)),
        (QUESTION, (1,)),
        (QUESTION, (1, 0)),
        (QUESTION, (1, 2)),
        (QUESTION, ()),
        ("no?", (2,)),
    ]
    with with_state(session, tiny_bundle, in_place) as changed:
        for question, seeds in prompts:
            wanted = logits(session, question, seeds, reuse=False)
            np.testing.assert_allclose(logits(changed, question, seeds, reuse=True), wanted, **CLOSE)
            np.testing.assert_allclose(changed.decode(7), session.decode(7), **CLOSE)


def test_a_second_question_runs_neither_the_picture_nor_its_tokens(fresh: Session) -> None:
    first = fresh.ask(png(), QUESTION, SHORT).stats
    second = fresh.ask(png(), "what shape is it?", SHORT).stats
    assert (first.encoded_images, first.reused_tokens) == (1, 0)
    assert (second.encoded_images, second.image_tokens) == (0, first.image_tokens)
    assert second.reused_tokens > second.image_tokens
    other = fresh.ask(png(1), "what shape is it?", SHORT).stats
    assert other.encoded_images == 1
    assert other.reused_tokens < other.prompt_tokens - other.image_tokens


def test_without_reuse_everything_is_run(tiny_bundle: Path) -> None:
    with open_bundle(tiny_bundle, threads=1, reuse=False) as plain:
        for _ in range(2):
            stats = plain.ask(png(), QUESTION, SHORT).stats
            assert (stats.encoded_images, stats.reused_tokens) == (1, 0)


def test_an_interrupted_answer_leaves_nothing_behind(fresh: Session, session: Session) -> None:
    pieces = fresh.stream(png(), QUESTION, GenerationOptions(max_new_tokens=20))
    for _ in range(3):
        next(pieces)
    pieces.close()
    for question in (QUESTION, "what shape is it?"):
        wanted = logits(session, question, reuse=False)
        np.testing.assert_allclose(logits(fresh, question, reuse=True), wanted, **CLOSE)


def test_a_failed_step_is_forgotten(
    fresh: Session, session: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    fresh.ask(png(), QUESTION, SHORT)
    with monkeypatch.context() as broken:

        def fail(*_: Any) -> Any:
            raise MemoryError("no room")

        broken.setattr(fresh._backend, "extend", fail)
        for call in (lambda: fresh.decode(7), lambda: logits(fresh, "why?", reuse=True)):
            with pytest.raises(MemoryError):
                call()
    with pytest.raises(InputError, match="call prefill first"):
        fresh.decode(7)
    assert fresh.ask(png(), QUESTION, SHORT).token_ids == session.ask(png(), QUESTION, SHORT).token_ids


def test_a_prompt_that_is_too_long_changes_nothing(fresh: Session, session: Session) -> None:
    before = fresh.ask(png(), QUESTION, SHORT)
    with pytest.raises(InputError, match=r"needs \d+ tokens \(16 of them of images\), 256 are available"):
        fresh.ask(png(), "why? " * 300, SHORT)
    again = fresh.ask(png(), QUESTION, SHORT)
    assert again.token_ids == before.token_ids
    assert again.stats.reused_tokens == again.stats.prompt_tokens - 1


def test_a_prompt_of_nothing(fresh: Session) -> None:
    with pytest.raises(InputError, match="has no tokens"):
        fresh.prefill(np.zeros(0, np.int64))


def test_going_back_further_than_there_is(fresh: Session) -> None:
    fresh.prefill(np.array([7, 8, 9]))
    for wrong in (0, 4):
        with pytest.raises(InputError, match=f"to {wrong} tokens, 3 are there"):
            fresh.go_back(wrong)


def test_features_that_changed_in_place_are_other_features(fresh: Session, session: Session) -> None:
    prepared = fresh.prepare(png())
    ids, features = fresh.prompt_ids(QUESTION, [prepared]), fresh.encode_image(prepared)
    fresh.prefill(ids, [features])
    features.tokens[:] = features.tokens[::-1].copy()
    wanted = session.prefill(ids, [features])
    np.testing.assert_allclose(fresh.prefill(ids, [features], reuse=True), wanted, **CLOSE)


# --- conversations ----------------------------------------------------


def test_a_chat_runs_only_what_is_new(fresh: Session, tiny_bundle: Path) -> None:
    chat, held = fresh.chat(png()), 0
    with open_bundle(tiny_bundle, threads=1, reuse=False) as plain:
        same = plain.chat(png())
        for question in (QUESTION, "is it big?", "and blue?"):
            answer, wanted = chat.ask(question, SHORT), same.ask(question, SHORT)
            assert answer.token_ids == wanted.token_ids
            assert answer.stats.reused_tokens == held
            held = answer.stats.prompt_tokens + len(answer.token_ids) - 1  # the last one was not run
    assert [turn.question for turn in chat.turns] == [QUESTION, "is it big?", "and blue?"]


def test_history_as_text_is_the_chat_template(session: Session, tiny_checkpoint: Path) -> None:
    """Ids, and then the answer: the checkpoint's own template and model are the judge."""
    with TorchSession(tiny_checkpoint) as reference:
        turns = [(QUESTION, "red"), ("is it big?", "yes, it is")]
        wanted = reference.ask(png(), "and blue?", SHORT, history=turns)
        answer = session.ask(png(), "and blue?", SHORT, history=turns)
        assert answer.token_ids == wanted.token_ids
        found = []
        for side in (session, reference):
            prepared = side.prepare(png())
            history = [Turn(*turns[0], (prepared,)), Turn(*turns[1])]
            found.append(side.prompt_ids("and blue?", (), history).tolist())
        assert found[0] == found[1]


def test_two_chats_take_turns(fresh: Session) -> None:
    chats = [fresh.chat(png(seed)) for seed in (1, 2)]
    mixed = [chat.ask(question, SHORT).token_ids for question in (QUESTION, "why?") for chat in chats]
    alone = []
    for seed in (1, 2):
        chat = fresh.chat(png(seed))
        alone.append([chat.ask(question, SHORT).token_ids for question in (QUESTION, "why?")])
    assert mixed == [alone[0][0], alone[1][0], alone[0][1], alone[1][1]]


def test_a_turn_can_be_undone(fresh: Session) -> None:
    chat = fresh.chat(png())
    chat.ask(QUESTION, SHORT)
    first = chat.ask("is it big?", SHORT).token_ids
    chat.undo()
    assert chat.ask("is it big?", SHORT).token_ids == first
    assert len(chat.turns) == 2
    while chat.turns:
        chat.undo()
    assert chat.ask(QUESTION, SHORT).stats.image_tokens == 16


def test_a_question_that_fails_is_no_turn(fresh: Session) -> None:
    chat = fresh.chat(png())
    with pytest.raises(InputError):
        chat.ask("why? " * 300)
    pieces = chat.stream("why? " * 300)
    with pytest.raises(InputError):
        next(pieces)
    assert chat.turns == []
    assert chat.ask(QUESTION, SHORT).stats.image_tokens == 16


def test_one_turn_only_where_the_template_cannot_be_cut(session: Session, tiny_bundle: Path) -> None:
    spec = session.manifest.prompt.model_copy(update={"later": None})
    changed = session.manifest.model_copy(update={"prompt": spec})
    with Session.from_manifest(tiny_bundle, changed, threads=1) as single:
        chat = single.chat(png())
        chat.ask(QUESTION, SHORT)
        with pytest.raises(InputError, match="one question at a time"):
            chat.ask("and now?", SHORT)


@pytest.mark.parametrize("history", [[("only a question",)], [("a", "b", "c")], [(1, 2)]])
def test_history_that_is_no_pairs(session: Session, history: Any) -> None:
    with pytest.raises(InputError, match="history: expected pairs"):
        session.ask(png(), QUESTION, history=history)


# --- what is shared, by hand ------------------------------------------


def picture(content: int, tokens: int) -> ImageFeatures:
    return ImageFeatures(np.full((tokens, 2), content, np.float32), ((1, tokens),))


sequences = st.lists(
    st.one_of(
        st.integers(5, 6).map(lambda token: ([token], None)),
        st.tuples(st.integers(0, 1), st.integers(1, 3)).map(
            lambda found: ([IMAGE] * found[1], picture(*found))
        ),
    ),
    min_size=1,
    max_size=8,
)


@settings(max_examples=300, deadline=None)
@given(sequences, sequences)
def test_shared_length_is_that_of_a_loop(old: Any, new: Any) -> None:
    """The loop compares piece by piece: a token, or a picture with everything that it is."""

    def flat(pieces: Any) -> tuple[Any, list[ImageFeatures]]:
        ids = np.array([token for tokens, _ in pieces for token in tokens], dtype=np.int64)
        return ids, [image for _, image in pieces if image is not None]

    expected = 0
    for (a, image_a), (b, image_b) in zip(old, new, strict=False):
        if a != b or (image_a is None) != (image_b is None):
            break
        if image_a is not None and not np.array_equal(image_a.tokens, image_b.tokens):
            break
        expected += len(a)
    total = sum(len(tokens) for tokens, _ in new)
    if expected == total:  # the last token is run in any case, and a picture as a whole
        expected -= len(new[-1][0])
    assert shared_length(flat(old), flat(new), IMAGE) == expected


def test_pictures_are_remembered_up_to_their_bytes(session: Session) -> None:
    memory = FeatureMemory(2 * picture(0, 4).tokens.nbytes)
    for key in (b"a", b"b"):
        memory.put(key, picture(0, 4))
    assert memory.get(b"a") is not None
    memory.put(b"c", picture(0, 4))
    assert [memory.get(key) is not None for key in (b"a", b"b", b"c")] == [True, False, True]
    memory.put(b"d", picture(0, 40))
    assert len(memory) == 0


def test_a_picture_is_known_by_its_pixels(session: Session) -> None:
    keys = {picture_key(session.prepare(png(seed))) for seed in (0, 0, 1)}
    assert len(keys) == 2


# --- context ----------------------------------------------------------


def test_the_context_is_the_models_or_a_few_thousand(session: Session) -> None:
    manifest = session.manifest
    large = manifest.model_copy(update={"limits": manifest.limits.model_copy(update={"context": 100_000})})
    assert session.max_context == manifest.limits.context
    assert context_of(large, None) == DEFAULT_CONTEXT
    pictures = large.model_copy(update={"image": large.image.model_copy(update={"max_tokens": 16_384})})
    assert context_of(pictures, None) > 16_384
    assert context_of(large, 100_000) == 100_000
    for wrong in (0, -1, 100_001):
        with pytest.raises(InputError, match=f"max_context: got {wrong}, this bundle takes 1 to 100000"):
            context_of(large, wrong)


def test_a_smaller_context_takes_less_and_says_so(tiny_bundle: Path, session: Session) -> None:
    with open_bundle(tiny_bundle, threads=1, max_context=64) as small:
        assert small.kv_bytes * 4 == session.kv_bytes
        assert small.kv_bytes == sum(state.bytes(64) for state in small.manifest.state)
        with pytest.raises(InputError, match=r"64 are available.*max_context up to 256"):
            small.ask(png(), "why? " * 20)


def test_an_answer_ends_with_the_context(tiny_bundle: Path, session: Session) -> None:
    endless = session.manifest.tokenizer.model_copy(update={"stop_ids": (10**6,)})
    changed = session.manifest.model_copy(update={"tokenizer": endless})
    with Session.from_manifest(tiny_bundle, changed, threads=1, max_context=64) as small:
        answer = small.ask(png(), QUESTION, GenerationOptions(max_new_tokens=100))
        assert answer.finish_reason == "context"
        assert answer.stats.prompt_tokens + len(answer.token_ids) == 64 + 1
        with pytest.raises(InputError, match="decode: needs 65 tokens, 64 are available"):
            small.decode(7)
