"""Sampling has transformers' definitions; the text stream never breaks a character."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers.generation import logits_process as reference

from runtime import generation, prompt
from runtime.errors import InputError
from runtime.generation import Detokenizer, GenerationOptions, Sampler, StopStrings, Writer

VOCAB = 50
logits_vectors = st.builds(
    lambda seed, scale: (np.random.default_rng(seed).normal(size=VOCAB) * scale).astype(np.float32),
    st.integers(0, 10_000),
    st.sampled_from([0.1, 1.0, 8.0]),
)


@settings(max_examples=80, deadline=None)
@given(
    logits=logits_vectors,
    temperature=st.sampled_from([0.05, 0.7, 1.0, 3.0]),
    top_k=st.sampled_from([0, 1, 3, 49, 50, 51, 500]),
    top_p=st.sampled_from([0.01, 0.5, 0.9, 0.999, 1.0]),
    min_p=st.sampled_from([0.0, 0.01, 0.1, 0.5, 1.0]),
)
def test_distribution_is_that_of_transformers(
    logits: np.ndarray, temperature: float, top_k: int, top_p: float, min_p: float
) -> None:
    ids, scores = torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits)[None].double()
    scores = reference.TemperatureLogitsWarper(temperature)(ids, scores)
    if top_k:
        scores = reference.TopKLogitsWarper(top_k)(ids, scores)
    if top_p < 1:
        scores = reference.TopPLogitsWarper(top_p)(ids, scores)
    if min_p:
        scores = reference.MinPLogitsWarper(min_p)(ids, scores)
    options = GenerationOptions(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)
    got = generation.distribution(logits, options)
    # float64 on both sides: only the order of summation differs
    np.testing.assert_allclose(got, scores.softmax(-1)[0].numpy(), rtol=1e-9, atol=1e-12)


@settings(max_examples=50, deadline=None)
@given(
    logits=logits_vectors,
    seen=st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=30),
    penalty=st.sampled_from([0.5, 1.0, 1.3, 10.0]),
)
def test_repetition_penalty_is_that_of_transformers(
    logits: np.ndarray, seen: list[int], penalty: float
) -> None:
    expected = reference.RepetitionPenaltyLogitsProcessor(penalty)(
        torch.tensor([seen]), torch.from_numpy(logits)[None]
    )
    before = logits.copy()
    got = generation.penalise(logits, sorted(set(seen)), penalty)
    np.testing.assert_allclose(got, expected[0].numpy(), rtol=1e-6)
    assert np.array_equal(logits, before)


def test_the_order_is_that_of_generate() -> None:
    """What transformers' `generate` would build for these options, applied as it is built."""
    from transformers import GenerationConfig
    from transformers.generation.utils import GenerationMixin

    asked = {"temperature": 0.8, "top_k": 20, "top_p": 0.7, "min_p": 0.05, "repetition_penalty": 1.3}
    config = GenerationConfig(do_sample=True, **asked)
    owner = GenerationMixin()
    owner.config = type("Config", (), {"is_encoder_decoder": False})()
    ids = torch.tensor([[3, 7, 7, 11]])
    found = owner._get_logits_processor(config, input_ids_seq_length=4, device="cpu", model_kwargs={})
    random = np.random.default_rng(1)
    for _ in range(20):
        logits = (random.normal(size=VOCAB) * 4).astype(np.float32)
        wanted = found(ids, torch.from_numpy(logits)[None]).softmax(-1)[0].numpy()
        options = GenerationOptions(**asked)
        got = generation.distribution(generation.penalise(logits, [3, 7, 11], 1.3), options)
        np.testing.assert_allclose(got, wanted, rtol=1e-4, atol=1e-6)  # float32 there, float64 here


@given(logits=logits_vectors, k=st.integers(1, 5), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_top_k_only_draws_from_the_best(logits: np.ndarray, k: int, seed: int) -> None:
    sampler = Sampler(GenerationOptions(temperature=5.0, top_k=k, seed=seed), [])
    best = set(np.argsort(logits)[-k:].tolist())
    assert {sampler.pick(logits) for _ in range(20)} <= best


def test_greedy_is_the_default_and_ties_go_to_the_lowest_id() -> None:
    assert Sampler(GenerationOptions(), []).pick(np.array([0, 3, 3, 1], dtype=np.float32)) == 1


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_logits_that_are_no_numbers_are_no_answer(bad: float, temperature: float) -> None:
    """As where float16 overflows on a device; what was masked out (-inf) may stand beside numbers."""
    sampler = Sampler(GenerationOptions(temperature=temperature), [])
    with pytest.raises(InputError, match=r"the largest logit is (nan|inf), wanted a number"):
        sampler.pick(np.array([0.0, bad, 1.0], np.float32))
    with pytest.raises(InputError, match="the largest logit is -inf"):
        sampler.pick(np.full(3, -np.inf, np.float32))
    assert sampler.pick(np.array([-np.inf, 1.0, -np.inf], np.float32)) == 1


def test_a_seed_repeats_and_another_does_not() -> None:
    logits = np.zeros(1000, dtype=np.float32)

    def draw(seed: int) -> list[int]:
        sampler = Sampler(GenerationOptions(temperature=1.0, seed=seed), [])
        return [sampler.pick(logits) for _ in range(8)]

    assert draw(1) == draw(1)
    assert draw(1) != draw(2)


def test_sampling_follows_the_distribution() -> None:
    logits = np.log(np.array([0.7, 0.2, 0.1], dtype=np.float32))
    sampler = Sampler(GenerationOptions(temperature=1.0, seed=3), [])
    share = np.bincount([sampler.pick(logits) for _ in range(4000)], minlength=3) / 4000
    np.testing.assert_allclose(share, [0.7, 0.2, 0.1], atol=0.03)  # 4 standard errors


def test_the_penalty_remembers_the_prompt_and_the_answer() -> None:
    sampler = Sampler(GenerationOptions(repetition_penalty=4.0), [0])
    logits = np.array([3.0, 2.0, 1.0], dtype=np.float32)
    assert [sampler.pick(logits) for _ in range(2)] == [1, 2]


@pytest.mark.parametrize(
    "bad",
    [
        {"max_new_tokens": 0},
        {"temperature": -1},
        {"temperature": float("nan")},
        {"top_p": 0},
        {"top_p": 1.1},
        {"repetition_penalty": 0},
        {"seed": -1},
        {"min_p": -0.1},
        {"min_p": 1.5},
        {"stop": ("",)},
        {"stop": "a bare string"},
        {"topk": 3},
    ],
)
def test_options_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        GenerationOptions(**bad)


# --- text stream ------------------------------------------------------


@pytest.fixture(scope="module")
def tokenizer(tiny_checkpoint: Path) -> Tokenizer:
    return prompt.load_tokenizer(tiny_checkpoint / "tokenizer.json")


def stream(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    detokenizer = Detokenizer(tokenizer)
    return [*(detokenizer.push(token) for token in ids), detokenizer.flush()]


@settings(max_examples=80, deadline=None)
@given(text=st.text(max_size=30))
def test_pieces_join_to_the_text(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False).ids
    pieces = stream(tokenizer, ids)
    assert "".join(pieces) == tokenizer.decode(ids)
    if "\N{REPLACEMENT CHARACTER}" not in text:
        assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_ids_join_to_what_decode_gives(tokenizer: Tokenizer, data: st.DataObject) -> None:
    """Broken UTF-8 too: what decode shows as U+FFFD the stream shows as U+FFFD, at the same place."""
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=25))
    assert "".join(stream(tokenizer, ids)) == tokenizer.decode(ids)


def test_an_emoji_comes_whole(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("a🙂b", add_special_tokens=False).ids
    assert len(ids) == 6
    assert stream(tokenizer, ids) == ["a", "", "", "", "🙂", "b", ""]


def test_special_tokens_are_silent(tokenizer: Tokenizer) -> None:
    stop = tokenizer.token_to_id("<end_of_utterance>")
    assert "".join(stream(tokenizer, [stop, *tokenizer.encode("yes").ids, stop])) == "yes"


def test_leading_spaces_of_a_metaspace_tokenizer_survive() -> None:
    """Such a decoder strips the first space of whatever it is given: the pieces must keep their spaces."""
    vocab = {"▁the": 0, "▁red": 1, "▁circle": 2, "s": 3}
    metaspace = Tokenizer(models.WordLevel(vocab, unk_token="s"))
    metaspace.pre_tokenizer, metaspace.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    assert stream(metaspace, [0, 1, 2, 3]) == ["the", " red", " circle", "s", ""]


# --- stop strings -----------------------------------------------------


@settings(max_examples=300, deadline=None)
@given(
    text=st.text("ab", max_size=14),
    stop=st.lists(st.text("ab", min_size=1, max_size=4), max_size=3),
    cuts=st.lists(st.integers(0, 14), max_size=6),
)
def test_the_text_ends_before_the_first_stop_string(text: str, stop: list[str], cuts: list[int]) -> None:
    """However the text comes in pieces; what was given out is never taken back."""
    places = sorted({0, len(text), *(cut for cut in cuts if cut < len(text))})
    found = StopStrings(stop)
    given = ""
    spans = [(place + len(word), place) for word in stop if (place := text.find(word)) >= 0]
    wanted = text[: min(spans)[1]] if spans else text  # the one that is complete first
    for start, end in itertools.pairwise(places):
        given += found.push(text[start:end])
        assert given == wanted[: len(given)]
    assert found.found == bool(spans)
    if not found.found:
        given += found.flush()
    assert given == wanted


def test_only_what_may_become_a_stop_string_is_held_back() -> None:
    found = StopStrings(["END."])
    assert [found.push(piece) for piece in ("an ", "E", "N", "d", " EN", "D", ".", "x")] == [
        *("an ", "", "", "ENd", " ", "", "", ""),
    ]
    assert found.found


def written(tokenizer: Tokenizer, ids: list[int], **options: object) -> tuple[list[str], Writer]:
    """Pieces of a greedy answer whose best tokens are `ids`."""
    writer = Writer(GenerationOptions(**options), [], tokenizer, (0,))  # type: ignore[arg-type]
    pieces = []
    for token in ids:
        logits = np.zeros(tokenizer.get_vocab_size(), dtype=np.float32)
        logits[token] = 1
        pieces.append(writer.take(logits))
        if writer.reason:
            break
    return pieces, writer


def test_a_stop_string_spans_tokens_and_characters(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("red 🙂! blue", add_special_tokens=False).ids
    pieces, writer = written(tokenizer, ids, stop=("🙂!",))
    assert ("".join(pieces), writer.reason) == ("red ", "stop")
    assert writer.text == "red "
    assert len(writer.tokens) < len(ids)


@pytest.mark.parametrize(("length", "text"), [(1, "a"), (3, "a\N{REPLACEMENT CHARACTER}")])
def test_what_is_left_at_the_end_is_given(tokenizer: Tokenizer, length: int, text: str) -> None:
    """Held-back text and half characters come out when the length ends the answer."""
    ids = tokenizer.encode("a🙂", add_special_tokens=False).ids
    pieces, writer = written(tokenizer, ids, max_new_tokens=length, stop=("a🙂never",))
    assert ("".join(pieces), writer.reason) == (text, "length")


def test_a_cancelled_answer_gives_what_was_held_back(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("red", add_special_tokens=False).ids
    pieces, writer = written(tokenizer, ids, stop=("reddish",))
    assert "".join(pieces) == ""
    assert writer.cancel() == "red"
    assert (writer.reason, writer.text) == ("cancelled", "red")


def test_room_ends_an_answer(tokenizer: Tokenizer) -> None:
    writer = Writer(GenerationOptions(), [], tokenizer, (0,))
    logits = np.zeros(tokenizer.get_vocab_size(), dtype=np.float32)
    logits[9] = 1
    writer.take(logits, 1)
    assert writer.reason is None
    writer.take(logits, 0)
    assert writer.reason == "context"
