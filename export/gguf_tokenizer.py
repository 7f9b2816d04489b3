"""A checkpoint's tokenizer in GGUF: tokens, types, merges, and the name of its pre-tokenizer.

In: tokenizer.json and tokenizer_config.json. Out: key-value pairs. Not here: proving that llama.cpp then
gives the same ids (`gguf_gate.py` does, on many texts: the names below only say which rule to try).

llama.cpp holds pre-tokenizers as names of rules in its code, so the rule in tokenizer.json is matched by its
structure. An unknown one fails the export: a wrong one would give wrong ids without an error.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import gguf
from gguf import TokenType
from tokenizers import Tokenizer

from runtime.errors import CheckpointError

_REGEXES = {
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "qwen2",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+": "llama-bpe",
}
"""`Split` by this pattern, then bytes without a pattern of their own."""


def write_tokenizer(writer: Any, path: Path, vocabulary: int) -> None:
    """Add the tokenizer of the checkpoint at `path`; ids without a token up to `vocabulary` are unused."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    if content["model"].get("type", "BPE") != "BPE" or content["model"].get("byte_fallback"):
        kind = content["model"].get("type")
        raise CheckpointError(
            f"{path}/tokenizer.json: only byte-level BPE has a GGUF export here, not {kind}"
        )
    if (highest := max(tokenizer.get_vocab().values())) >= vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has id {highest}, the model has {vocabulary} embeddings"
        )
    tokens, types = _tokens(tokenizer, content, vocabulary)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(content, path))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    config = path / "tokenizer_config.json"
    prefix = (
        json.loads(config.read_text(encoding="utf-8")).get("add_prefix_space") if config.is_file() else None
    )
    if prefix is not None:
        writer.add_add_space_prefix(prefix)
    special = gguf.SpecialVocab(path, load_merges=True)
    special.add_special_token |= _added(tokenizer)
    special.add_to_gguf(writer)


def _added(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether the tokenizer puts a token before and after every text; llama.cpp would guess from its rule."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return {"bos": full[: len(plain)] != plain, "eos": full[-len(plain) :] != plain}


def _tokens(tokenizer: Tokenizer, content: dict[str, Any], vocabulary: int) -> tuple[list[str], list[int]]:
    tokens, types = [f"[PAD{i}]" for i in range(vocabulary)], [int(TokenType.UNUSED)] * vocabulary
    for text, place in content["model"]["vocab"].items():
        tokens[place], types[place] = text, int(TokenType.NORMAL)
    for added in content["added_tokens"]:
        text = added["content"]
        if not added["normalized"]:
            text = tokenizer.decode(
                tokenizer.encode(text, add_special_tokens=False).ids, skip_special_tokens=False
            )
        looks_special = text.startswith("<|") and text.endswith("|>")
        special = added["special"] or looks_special or text in ("<pad>", "<mask>")
        tokens[added["id"]] = text
        types[added["id"]] = int(TokenType.CONTROL if special else TokenType.USER_DEFINED)
    return tokens, types


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
