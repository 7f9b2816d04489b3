"""What a tokenizer.json says in llama.cpp's words: texts, types, scores of tokens, how a text is split.

In: the content of a tokenizer.json. Out: lists by id. Not here: a file (`gguf_tokenizer.py`), proving that
llama.cpp then gives the same ids (`gguf_gate.py` does, on many texts). This module needs no `gguf`.

Two kinds are known. *Byte-level* BPE: llama.cpp holds pre-tokenizers as names of rules in its code, so the
rule in tokenizer.json is matched by its structure. BPE *made from a SentencePiece model* (spaces are written
▁, no pre-tokenizer, unknown characters as bytes): llama.cpp has it as `llama`, which joins by scores of
tokens instead of merges. Any other fails the export: a wrong one would give wrong ids without an error.
"""

from __future__ import annotations

import json
from enum import IntEnum
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer, normalizers

from runtime.errors import CheckpointError

_REGEXES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}
"""`Split` by this pattern, then bytes without a pattern of their own."""


class Kind(IntEnum):
    """What a token is to llama.cpp."""

    NORMAL = 1
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


# --- byte-level -------------------------------------------------------


def merged(tokenizer: Tokenizer, content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    """Token texts and types of byte-level BPE; ids without a token are unused."""
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [int(Kind.UNUSED)] * vocabulary
    for text, place in content["model"]["vocab"].items():
        tokens[place], types[place] = text, int(Kind.NORMAL)
    for added in content["added_tokens"]:
        text = added["content"]
        if not added["normalized"]:
            text = tokenizer.decode(
                tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
            )
        tokens[added["id"]] = text
        special = _looks_special({**added, "content": text})
        types[added["id"]] = int(Kind.CONTROL if special else Kind.USER_DEFINED)
    return tokens, types


def _looks_special(added: dict[str, Any]) -> bool:
    """Whether llama.cpp is to take an added token for one that is no text."""
    text = added["content"]
    framed = any(text.startswith(first) and text.endswith(last) for first, last in _FRAMES)
    return bool(added["special"] or framed or text in _NAMED_SPECIAL)


_FRAMES = (("<|", "|>"), ("<\uff5c", "\uff5c>"), ("<unused", ">"))
_NAMED_SPECIAL = ("<pad>", "<mask>", "<2mass>", "[@BOS@]")
"""As llama.cpp's own converter has them."""


NAMED_ENDS = frozenset({
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "</s>", "<|eom_id|>", "<EOT>",
    "<|end_of_text|>", "<end_of_utterance>", "<eos>",
})  # fmt: skip
"""Tokens at which llama.cpp ends an answer because of their text."""


def unread_flags(tokenizer: Tokenizer) -> dict[str, str]:
    """Added tokens that take blanks beside them, or whole words alone, with what they do; llama.cpp has no
    such rules. A prompt that comes as ids does not need them."""
    flags = ("lstrip", "rstrip", "single_word")
    return {
        token.content: next(flag for flag in flags if getattr(token, flag))
        for token in tokenizer.get_added_tokens_decoder().values()
        if any(getattr(token, flag) for flag in flags)
    }


def check_normalizer(content: dict[str, Any], path: Path) -> None:
    """Raises CheckpointError for a normalizer of byte-level BPE that does more than to compose characters."""
    found = content.get("normalizer")
    if found not in (None, {"type": "NFC"}, {"type": "Sequence", "normalizers": []}):
        raise CheckpointError(
            f"{path}/tokenizer.json: normalizer {json.dumps(found)[:200]} has no counterpart in llama.cpp; "
            "known with byte-level BPE: none, NFC"
        )


def written_blanks(tokenizer: Tokenizer) -> list[str]:
    """Added tokens that are runs of the sign for a blank (Gemma has them for 2 to 31), the longest last. They
    stand for blanks; nobody writes the sign itself."""
    found = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    return sorted((text for text in found if len(text) > 1 and not text.strip(BLANK)), key=len)


def composer(tokenizer: Tokenizer) -> Any | None:
    """The tokenizer's step that composes characters (NFC, as Qwen's has it), which llama.cpp leaves out."""
    return tokenizer.normalizer if isinstance(tokenizer.normalizer, normalizers.NFC) else None


def pre_tokenizer(content: dict[str, Any], path: Path) -> str:
    """llama.cpp's name for the `pre_tokenizer` of a tokenizer.json. CheckpointError for another one."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    bytes_alone = last.get("use_regex", True) is False
    if kinds[-1] == "ByteLevel" and not last.get("add_prefix_space", False):
        if kinds == ["ByteLevel"] and not bytes_alone:
            return "gpt-2"
        if kinds == ["Digits", "ByteLevel"] and steps[0].get("individual_digits") and not bytes_alone:
            return "smollm"
        if kinds == ["Split", "ByteLevel"] and bytes_alone and steps[0].get("behavior") == "Isolated":
            name = _REGEXES.get(steps[0].get("pattern", {}).get("Regex", ""))
            if name is not None:
                return name
    raise CheckpointError(
        f"{path}/tokenizer.json: pre_tokenizer {json.dumps(found)[:200]} has no known counterpart in "
        "llama.cpp; known: ByteLevel, Digits + ByteLevel, the Split patterns of Qwen2 and of Llama 3"
    )


# --- by scores --------------------------------------------------------

BLANK = "\u2581"
_SPACES = {"type": "Replace", "pattern": {"String": " "}, "content": BLANK}
_NO_SPLIT = (
    None,
    {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
)
"""No space is left to split at."""

_UNUSED_SCORE, _ADDED_SCORE = -10000.0, -1000.0


def scored(content: dict[str, Any], vocabulary: int, path: Path) -> tuple[list[str], list[float], list[int]]:
    """Token texts, scores and types. Raises CheckpointError where llama.cpp has no such rules.

    A token's score is minus its place among the tokens that merges make, in the order of their first one: so
    SentencePiece numbers them, and of two pairs the one joins first that makes the higher score.
    """
    if content.get("normalizer") != _SPACES or content.get("pre_tokenizer") not in _NO_SPLIT:
        raise CheckpointError(
            f"{path}/tokenizer.json: BPE with byte_fallback, of which only the kind is known here whose "
            "normalizer replaces spaces by \u2581 and which has no other rule (as Gemma's)"
        )
    model = content["model"]
    if model.get("ignore_merges") or model.get("dropout"):
        raise CheckpointError(
            f"{path}/tokenizer.json: ignore_merges or dropout has no counterpart in llama.cpp"
        )
    # in Gemma's first tokenizers a tab stands where its byte was
    if lacking := [text for text, byte in _BYTES.items() if not {text, byte} & model["vocab"].keys()]:
        raise CheckpointError(
            f"{path}/tokenizer.json: has no token {lacking[0]}; llama.cpp needs all 256 bytes"
        )
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [int(Kind.UNUSED)] * vocabulary
    scores = [_UNUSED_SCORE] * vocabulary
    order = _in_order(model, {added["content"] for added in content["added_tokens"]})
    for text, place in model["vocab"].items():
        tokens[place], types[place] = text, int(Kind.BYTE if text in _BYTES else Kind.NORMAL)
        scores[place] = -float(order.get(text, 0))
    for added in content["added_tokens"]:
        special = _looks_special(added)
        place, text = added["id"], added["content"]
        # llama.cpp looks for such a text before it replaces spaces
        tokens[place] = text if special else text.replace("\u2581", " ")
        types[place] = int(Kind.CONTROL if special else Kind.USER_DEFINED)
        scores[place] = _ADDED_SCORE
    return tokens, scores, types


_BYTES = {f"<0x{value:02X}>": chr(value) if value < 128 else "" for value in range(256)}
"""Token of a byte, and the character that it is."""


def _in_order(model: dict[str, Any], added: set[str]) -> dict[str, int]:
    """Place of every token that is not added apart: those that merges make first, then the others by id."""
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"])
    merged = dict.fromkeys(left + right for left, right in pairs)
    others = sorted(model["vocab"].keys() - merged.keys() - _BYTES.keys(), key=model["vocab"].__getitem__)
    return {text: place for place, text in enumerate(t for t in (*merged, *others) if t not in added)}
