"""Tiny checkpoints that llama.cpp runs: one window size, deepstack in fewer layers than there are, a picture
inside of Gemma's window, and its tokenizer."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from tests.checkpoints import CHATML_TOKENS, FAMILIES, GEMMA3_TOKENS, VARIANTS, WORDS


def write(family: str, out: Path, **shape: int) -> Path:
    """A checkpoint of the family, changed where llama.cpp would refuse it."""
    maker = FAMILIES.get(family) or VARIANTS[family]
    maker(out, **shape, **({"tokenizer": gemma_tokenizer()} if family == "gemma3" else {}))
    if family == "gemma3":
        edit(out, lambda config: config["text_config"].update(sliding_window=20))
        weights = load_file(out / "model.safetensors")
        (table,) = (name for name in weights if name.endswith("embed_tokens.weight"))
        weights[table] *= 0.1  # it is scaled by the model again: an answer would repeat the last token
        save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    if family == "qwen2_5_vl":
        edit(out, lambda config: config["vision_config"].update(window_size=112))
    if family == "qwen3_vl":
        edit(out, lambda config: config["vision_config"].update(deepstack_visual_indexes=[0]))
        weights = load_file(out / "model.safetensors")
        kept = {name: each for name, each in weights.items() if "deepstack_merger_list.1" not in name}
        save_file(kept, out / "model.safetensors", metadata={"format": "pt"})
    return out


def gemma_tokenizer(texts: Sequence[str] = (WORDS,), pieces: int = 120) -> PreTrainedTokenizerFast:
    """As Gemma's: spaces written \u2581, bytes for what has no token, merges for all ways to cut a token."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Metaspace(replacement="\u2581", prepend_scheme="never")
    trainer = trainers.BpeTrainer(vocab_size=pieces, show_progress=False)
    trained.train_from_iterator([*texts, *texts, "\n \n\n  12"], trainer)
    found = sorted(trained.get_vocab(), key=trained.get_vocab().__getitem__)
    found.sort(key=lambda text: len(text) == 1)  # characters last
    special = ["<unk>", *dict.fromkeys(GEMMA3_TOKENS.values())]
    every = dict.fromkeys([*special, *(f"<0x{byte:02X}>" for byte in range(256)), "\n\n", *found])
    places = {text: place for place, text in enumerate(every)}
    cuts = [(text[:at], text[at:]) for text in places for at in range(1, len(text))]
    merges = [each for each in cuts if each[0] in places and each[1] in places]
    merges.sort(key=lambda each: (places["".join(each)], len(each[0])))
    tokenizer = Tokenizer(
        models.BPE(vocab=places, merges=merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    )
    tokenizer.normalizer = normalizers.Replace(" ", "\u2581")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    tokenizer.add_tokens([AddedToken("\n\n", normalized=False)])
    standard = {role: text for role, text in GEMMA3_TOKENS.items() if role in CHATML_TOKENS}
    extra = {role: text for role, text in GEMMA3_TOKENS.items() if role not in CHATML_TOKENS}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        extra_special_tokens=extra,
        clean_up_tokenization_spaces=False,
        **standard,
    )


def edit(checkpoint: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change config.json in place."""
    path = checkpoint / "config.json"
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))
