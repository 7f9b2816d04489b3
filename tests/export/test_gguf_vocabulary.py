"""What is asked of a GGUF bundle, and a tokenizer in llama.cpp's words: all that needs no llama.cpp.

Tokens with scores are held against a small reading of llama.cpp's own loop, on any text.
"""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from distill.fresh import train_tokenizer
from export.gguf_kinds import TensorRule, check, read_rules
from export.gguf_vocabulary import Kind, merged, pre_tokenizer, scored
from runtime.errors import CheckpointError, InputError
from tests.checkpoints import CHATML_TOKENS, WORDS
from tests.cli import ROOT
from tests.gguf_checkpoints import gemma_tokenizer

HERE = Path("checkpoint")
TEXT = (ROOT / "LICENSE").read_text()
GEMMA: Tokenizer = gemma_tokenizer(TEXT.splitlines(), 700).backend_tokenizer
CONTENT: dict[str, Any] = json.loads(GEMMA.to_str())
SIZE = GEMMA.get_vocab_size() + 3


def content(**changed: Any) -> dict[str, Any]:
    return {**json.loads(json.dumps(CONTENT)), **changed}


# --- by scores --------------------------------------------------------


def ids_by_scores(text: str, tokens: list[str], scores: list[float], types: list[int]) -> list[int]:
    """As llama.cpp does it: whole tokens first, the longest before others; then of all neighbours those join
    that make the token with the highest score, the left ones first; what is no token becomes bytes."""
    places = {token: place for place, token in enumerate(tokens)}
    whole = [t for t, kind in zip(tokens, types, strict=True) if kind in (Kind.CONTROL, Kind.USER_DEFINED)]
    pieces: list[str | int] = [text]
    for token in sorted(whole, key=len, reverse=True):
        pieces = [part for piece in pieces for part in (cut(piece, token, places[token]))]
    found: list[int] = []
    for piece in pieces:
        if isinstance(piece, int):
            found.append(piece)
            continue
        symbols = list(piece.replace(" ", "\u2581"))
        while True:
            pairs = [left + right for left, right in itertools.pairwise(symbols)]
            known = [(-scores[places[pair]], at) for at, pair in enumerate(pairs) if pair in places]
            if not known:
                break
            at = min(known)[1]
            symbols[at : at + 2] = [pairs[at]]
        for symbol in symbols:
            spelled = [symbol] if symbol in places else [f"<0x{byte:02X}>" for byte in symbol.encode()]
            found += [places[each] for each in spelled]
    return found


def cut(piece: str | int, token: str, place: int) -> list[str | int]:
    if isinstance(piece, int):
        return [piece]
    parts: list[str | int] = []
    for text in piece.split(token):
        parts += [text, place]
    return [part for part in parts[:-1] if part != ""]


TEXTS = st.lists(
    st.one_of(
        st.sampled_from([*GEMMA.get_vocab(), " ", "  ", "\n", "\n\n", "12"]),
        st.integers(0, len(TEXT)).map(lambda start: TEXT[start : start + 30]),
        st.text(max_size=4),
    ),
    max_size=12,
).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS)
def test_tokens_with_scores_give_the_tokenizers_ids(text: str) -> None:
    vocabulary = scored(content(), SIZE, HERE)
    assert ids_by_scores(text, *vocabulary) == GEMMA.encode(text, add_special_tokens=False).ids


def test_the_order_of_scores_matters_here() -> None:
    """Else the test above would show nothing."""
    tokens, scores, types = scored(content(), SIZE, HERE)
    lines = [line for line in TEXT.splitlines() if line]
    for other in ([0.0] * SIZE, [-score for score in scores]):
        wrong = [
            line
            for line in lines
            if ids_by_scores(line, tokens, other, types) != GEMMA.encode(line, add_special_tokens=False).ids
        ]
        assert len(wrong) > len(lines) / 2


def test_scores_and_types() -> None:
    tokens, scores, types = scored(content(), SIZE, HERE)
    by_text = {token: (score, kind) for token, score, kind in zip(tokens, scores, types, strict=True)}
    assert by_text["<0x0A>"][1] == Kind.BYTE and by_text["\n\n"] == (-1000.0, Kind.USER_DEFINED)
    assert by_text["<start_of_image>"] == (-1000.0, Kind.CONTROL)
    assert by_text[f"[PAD{SIZE - 1}]"] == (-10000.0, Kind.UNUSED)
    order = sorted((-score, token) for token, (score, kind) in by_text.items() if kind == Kind.NORMAL)
    assert [place for place, _ in order] == list(range(len(order)))
    made = dict.fromkeys("".join(pair) for pair in CONTENT["model"]["merges"])
    del made["\n\n"]
    assert [token for _, token in order][: len(made)] == list(made)


def test_a_merge_that_makes_its_token_later_moves_it() -> None:
    other = content()
    other["model"]["merges"].reverse()
    tokens, scores, _ = scored(other, SIZE, HERE)
    last = "".join(CONTENT["model"]["merges"][-1])
    assert scores[tokens.index(last)] == 0.0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"normalizer": {"type": "NFC"}}, "BPE with byte_fallback"),
        ({"normalizer": None}, "BPE with byte_fallback"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "BPE with byte_fallback"),
        ({"model": {**CONTENT["model"], "ignore_merges": True}}, "ignore_merges"),
        ({"model": {**CONTENT["model"], "vocab": {"a": 0}}}, "has no token <0x00>"),
    ],
)
def test_rules_without_a_counterpart_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        scored(content(**change), SIZE, HERE)


def test_a_tab_may_stand_where_its_byte_was() -> None:
    """As in Gemma's first tokenizers."""
    other = content()
    other["model"]["vocab"]["\t"] = other["model"]["vocab"].pop("<0x09>")
    tokens, _, types = scored(other, SIZE, HERE)
    assert types[tokens.index("\t")] == Kind.NORMAL


# --- byte-level -------------------------------------------------------


def test_byte_level_tokens() -> None:
    tokenizer: Tokenizer = train_tokenizer([WORDS], CHATML_TOKENS, 300).backend_tokenizer
    found = json.loads(tokenizer.to_str())
    tokens, types = merged(tokenizer, found, tokenizer.get_vocab_size() + 1)
    assert tokens[:-1] == [tokenizer.id_to_token(place) for place in range(len(tokens) - 1)]
    assert types[-1] == Kind.UNUSED and types[tokens.index("<|im_end|>")] == Kind.CONTROL
    assert pre_tokenizer(found, HERE) == "smollm"


@pytest.mark.parametrize(
    "rule",
    [
        None,
        {"type": "Whitespace"},
        {"type": "ByteLevel", "add_prefix_space": True},
        {"type": "ByteLevel", "use_regex": False},
        {"type": "Sequence", "pretokenizers": [{"type": "Digits"}, {"type": "ByteLevel"}]},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": r"\\p{L}+"}, "behavior": "Isolated"},
                {"type": "ByteLevel", "use_regex": False},
            ],
        },
    ],
)
def test_an_unknown_pre_tokenizer_fails(rule: dict[str, Any] | None) -> None:
    with pytest.raises(CheckpointError, match="no known counterpart"):
        pre_tokenizer({"pre_tokenizer": rule}, HERE)


# --- what is asked ----------------------------------------------------


def test_unknown_types_are_told() -> None:
    with pytest.raises(InputError, match="did you mean q4_k_m"):
        check("q4_km")
    with pytest.raises(InputError, match="choose from f32, f16"):
        check("int4")
    assert check("Q4_K_M") == check("q4-k-m") == "q4_k_m"


def test_rules_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "rules.yaml"
    path.write_text("rules: [{tensor: 'blk.*.ffn_down.*', type: q8_0}]")
    assert read_rules(path) == (TensorRule("blk.*.ffn_down.*", "q8_0"),)
    path.write_text("rules: [{tensors: x, type: q8_0}]")
    with pytest.raises(InputError, match=r"rules\.0\.tensor"):
        read_rules(path)
    path.write_text("rules: [")
    with pytest.raises(InputError, match="expected rules"):
        read_rules(path)
