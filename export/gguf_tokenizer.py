"""A checkpoint's tokenizer in GGUF: tokens, types, merges or scores, and the name of its pre-tokenizer.

In: tokenizer.json and tokenizer_config.json. Out: key-value pairs. Not here: which tokens and which rule
(`gguf_vocabulary.py`), proving that llama.cpp then gives the same ids (`gguf_gate.py`).
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
from tokenizers import Tokenizer

from export.gguf_vocabulary import NAMED_ENDS, check_normalizer, merged, pre_tokenizer, scored
from runtime.errors import CheckpointError


def write_tokenizer(writer: Any, path: Path, vocabulary: int) -> None:
    """Add the tokenizer of the checkpoint at `path`; ids without a token up to `vocabulary` are unused."""
    tokenizer = Tokenizer.from_file(str(path / "tokenizer.json"))
    content = json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))
    if (kind := content["model"].get("type", "BPE")) != "BPE":
        raise CheckpointError(f"{path}/tokenizer.json: only BPE has a GGUF export here, not {kind}")
    if (highest := max(tokenizer.get_vocab().values())) >= vocabulary:
        raise CheckpointError(
            f"{path}: the tokenizer has id {highest}, the model has {vocabulary} embeddings; save the model "
            "after resize_token_embeddings, or the tokenizer without the tokens that were added"
        )
    by_scores = bool(content["model"].get("byte_fallback"))
    if by_scores:
        _write_scored(writer, content, vocabulary, path)
    else:
        _write_merged(writer, tokenizer, content, vocabulary, path)
    special = _special(path, load_merges=not by_scores)
    special.add_special_token |= _added(tokenizer)
    if (template := _template(path)) is not None:
        special.chat_template = template
    special.add_to_gguf(writer)
    _write_ends(writer, path, tokenizer, special.special_token_ids)


def _special(path: Path, *, load_merges: bool) -> Any:
    """What `gguf` finds, without its line about a separator of two texts (for Gemma and LFM2 the token that
    begins a text): no prompt has a pair."""
    log = logging.getLogger("gguf.vocab")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        return gguf.SpecialVocab(path, load_merges=load_merges)
    finally:
        log.setLevel(level)


def _template(path: Path) -> str | None:
    """The chat template that transformers' processor takes, before any in tokenizer_config.json."""
    jinja, older = path / "chat_template.jinja", path / "chat_template.json"
    if jinja.is_file():
        return jinja.read_text(encoding="utf-8")
    found = json.loads(older.read_text(encoding="utf-8")).get("chat_template") if older.is_file() else None
    return found if isinstance(found, str) else None


def _write_ends(writer: Any, path: Path, tokenizer: Tokenizer, known: Mapping[str, int]) -> None:
    """Further tokens that end an answer. llama.cpp has keys for two, and knows some more by their text."""
    settings = path / "generation_config.json"
    content = json.loads(settings.read_text(encoding="utf-8")) if settings.is_file() else {}
    found = content.get("eos_token_id")
    ids = found if isinstance(found, list) else [found]
    told = {known.get(role) for role in ("eos", "eot", "eom")}
    others = [
        each for each in ids
        if each is not None and each not in told and tokenizer.id_to_token(each) not in NAMED_ENDS
    ]  # fmt: skip
    for role, place in zip((role for role in ("eot", "eom") if role not in known), others, strict=False):
        getattr(writer, f"add_{role}_token_id")(place)


def _write_merged(
    writer: Any, tokenizer: Tokenizer, content: dict[str, Any], vocabulary: int, path: Path
) -> None:
    """Byte-level BPE; its merges are added with the special tokens."""
    check_normalizer(content, path)
    tokens, types = merged(tokenizer, content, vocabulary)
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


def _write_scored(writer: Any, content: dict[str, Any], vocabulary: int, path: Path) -> None:
    """What came from a SentencePiece model."""
    tokens, scores, types = scored(content, vocabulary, path)
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(tokens)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_add_space_prefix(False)


def _added(tokenizer: Tokenizer) -> dict[str, bool]:
    """Whether the tokenizer puts a token before and after every text; llama.cpp would guess from its rule."""
    plain, full = (tokenizer.encode("a", add_special_tokens=special).ids for special in (False, True))
    return {"bos": full[: len(plain)] != plain, "eos": full[-len(plain) :] != plain}
