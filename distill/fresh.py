"""A new checkpoint directory from data: configuration, initial weights, tokenizer and processor.

In: a configuration in Hugging Face's own words and a text corpus. Out: a directory that
`AutoModelForImageTextToText` and `AutoProcessor` load with no code of ours. Not here: training.
Used by the demo and by tests, where no pretrained checkpoint can be had.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from runtime import files


def train_tokenizer(
    texts: Iterable[str], special: Mapping[str, str], vocab_size: int
) -> PreTrainedTokenizerFast:
    """A byte-level BPE whose pre-tokenizer (single digits, then byte level) llama.cpp knows as `smollm`.

    `special` maps roles (`bos_token`, `eos_token`, `pad_token`, `image_token`, ...) to token texts.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(dict.fromkeys(special.values())),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    standard = {k: v for k, v in special.items() if k in {"bos_token", "eos_token", "pad_token", "unk_token"}}
    extra = {k: v for k, v in special.items() if k not in standard}
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, extra_special_tokens=extra, clean_up_tokenization_spaces=False, **standard
    )


def initialise(model: PreTrainedModel, rules: Sequence[tuple[str, float]], seed: int) -> None:
    """Redraw the parameters that a rule's pattern names from N(0, std); the first match wins."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            for pattern, std in rules:
                if fnmatch.fnmatch(name, pattern):
                    parameter.normal_(0.0, std, generator=generator)
                    break


def write_processor(
    tokenizer: PreTrainedTokenizerFast, processor: Mapping[str, Any], template: str, out: Path
) -> None:
    """Save tokenizer, chat template and processor settings, then read them back through AutoProcessor."""
    tokenizer.save_pretrained(out)
    files.write_json(out / "processor_config.json", dict(processor))
    files.write_text(out / "chat_template.jinja", template)
    AutoProcessor.from_pretrained(out).save_pretrained(out)


def write_checkpoint(
    out: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    processor: Mapping[str, Any],
    template: str,
    *,
    rules: Sequence[tuple[str, float]] = (),
    seed: int = 0,
) -> Path:
    """Write a randomly initialised checkpoint directory.

    `config` is a model configuration with `model_type`; token ids that are strings in it
    (`image_token_id: "<image>"`) are looked up in the tokenizer. The same seed gives the same bytes.
    """
    settings = {key: _ids(value, tokenizer) for key, value in config.items()}
    settings["text_config"] = {**settings["text_config"], "vocab_size": len(tokenizer)}
    model_type = settings.pop("model_type")
    torch.manual_seed(seed)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **settings))
    initialise(model, rules, seed)
    model.tie_weights()
    model.generation_config.update(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_processor(tokenizer, processor, template, out)
    model.save_pretrained(out)
    return out


def _ids(value: Any, tokenizer: PreTrainedTokenizerFast) -> Any:
    """Replace `{"token": TEXT}` by the token's id, at any depth."""
    if isinstance(value, Mapping):
        if set(value) == {"token"}:
            return tokenizer.convert_tokens_to_ids(value["token"])
        return {key: _ids(inner, tokenizer) for key, inner in value.items()}
    return value
