"""Models of `benchmarks/onnx.py`: one random checkpoint in the shape of SmolVLM-256M, for every arm.

    python onnx_models.py WORK [--tiny]          the checkpoint, a picture and a question
    python onnx_models.py WORK --gguf            two GGUF files of it
    python onnx_models.py WORK --bundle int4     a bundle of it, WORK/int4

In: a directory. Out: `checkpoint/` (SmolVLM, a 512 px picture is 64 tokens), `llama/` (its text part as a
Llama checkpoint with the same weights, for onnxruntime-genai's builder), `picture.png`, `question.txt` (with
it a prompt has 64 image tokens and 64 of text), `prompt.txt` (the whole prompt, `<picture>` in the picture's
place). No peer is needed for any of it.
"""

from __future__ import annotations

import argparse
import itertools
import os
import string
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).parent
sys.path[:] = [str(HERE.parents[1]), *(x for x in sys.path if Path(x or ".").resolve() != HERE.parent)]

CHECKPOINT, LLAMA, PICTURE = "checkpoint", "llama", "picture.png"
QUESTION, PROMPT = "question.txt", "prompt.txt"
TEXT_TOKENS = 64
RULES = [("*norm*", 1.0), ("*bias", 0.02), ("*embed*", 0.05), ("*", 0.03)]
SPECIAL = {
    "pad_token": "<|endoftext|>",
    "bos_token": "<|im_start|>",
    "eos_token": "<end_of_utterance>",
    "image_token": "<image>",
    "fake_image_token": "<fake_token_around_image>",
    "global_image_token": "<global-img>",
    "end_of_utterance_token": "<end_of_utterance>",
}
TEMPLATE = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize }}"
    "{% if message['content'][0]['type'] == 'image' %}{{ ':' }}{% else %}{{ ': ' }}{% endif %}"
    "{% for line in message['content'] %}{% if line['type'] == 'text' %}{{ line['text'] }}"
    "{% elif line['type'] == 'image' %}{{ '<image>' }}{% endif %}{% endfor %}<end_of_utterance>{{ '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)


@dataclass(frozen=True)
class Shape:
    """Sizes of a SmolVLM; a head of the text part has `head_dim` values."""

    text_hidden: int = 576
    text_layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 49_280
    positions: int = 8192
    side: int = 512
    patch: int = 16
    vision_hidden: int = 768
    vision_layers: int = 12
    shuffle: int = 4

    @property
    def image_tokens(self) -> int:
        return (self.side // self.patch // self.shuffle) ** 2


FULL = Shape()
TINY = Shape(64, 2, 4, 2, 128, 2048, 1024, 64, 8, 64, 2, 2)


def words(number: int) -> Iterator[tuple[str, str]]:
    """`number` merges that make words of two, three and four letters from shorter ones."""
    letters = string.ascii_lowercase
    pairs = ["".join(p) for p in itertools.product(letters, repeat=2)]
    triples = [(a, b) for a in pairs for b in letters]
    fours = ((a + b, c) for a, b in triples for c in letters)
    return itertools.islice(itertools.chain(((p[0], p[1]) for p in pairs), triples, fours), number)


def tokenizer(vocab: int) -> Any:
    """A byte-level BPE of exactly `vocab` tokens, nearly all of them words of letters: any token is text."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    special = list(dict.fromkeys(SPECIAL.values()))
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(words(vocab - len(special) - len(alphabet)))
    tokens = [*special, *alphabet, *(a + b for a, b in merges)]
    made = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    made.add_special_tokens(special)
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.ByteLevel(trim_offsets=False)
    standard = {k: v for k, v in SPECIAL.items() if k in ("pad_token", "bos_token", "eos_token")}
    extra = {k: v for k, v in SPECIAL.items() if k not in standard}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, extra_special_tokens=extra, clean_up_tokenization_spaces=False, **standard
    )


def config(shape: Shape) -> dict[str, Any]:
    return {
        "model_type": "smolvlm",
        "image_token_id": {"token": "<image>"},
        "pad_token_id": {"token": "<|endoftext|>"},
        "scale_factor": shape.shuffle,
        "tie_word_embeddings": True,
        "vision_config": {
            "hidden_size": shape.vision_hidden,
            "intermediate_size": 4 * shape.vision_hidden,
            "num_hidden_layers": shape.vision_layers,
            "num_attention_heads": max(1, shape.vision_hidden // 64),
            "image_size": shape.side,
            "patch_size": shape.patch,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": shape.text_hidden,
            "intermediate_size": shape.intermediate,
            "num_hidden_layers": shape.text_layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.text_hidden // shape.heads,
            "max_position_embeddings": shape.positions,
            "rms_norm_eps": 1e-5,
            "rope_theta": 100_000.0,
            "pad_token_id": {"token": "<|endoftext|>"},
            "bos_token_id": {"token": "<|im_start|>"},
            "eos_token_id": {"token": "<end_of_utterance>"},
            "tie_word_embeddings": True,
        },
    }


def processor(shape: Shape) -> dict[str, Any]:
    sizes = {"size": {"longest_edge": shape.side}, "max_image_size": {"longest_edge": shape.side}}
    means = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}
    image = {"image_processor_type": "SmolVLMImageProcessor", "do_image_splitting": False, **sizes, **means}
    return {
        "processor_class": "SmolVLMProcessor",
        "image_seq_len": shape.image_tokens,
        "image_processor": image,
        "video_processor": {"video_processor_type": "SmolVLMVideoProcessor", **sizes},
    }


def write_checkpoint(work: Path, shape: Shape) -> Path:
    from distill import fresh

    made = tokenizer(shape.vocab)
    return fresh.write_checkpoint(
        work / CHECKPOINT, config(shape), made, processor(shape), TEMPLATE, rules=RULES
    )


def write_llama(work: Path) -> Path:
    """The text part alone, same weights, under Llama's names."""
    import torch
    from transformers import AutoModelForImageTextToText, AutoTokenizer, LlamaConfig, LlamaForCausalLM

    whole: Any = AutoModelForImageTextToText.from_pretrained(work / CHECKPOINT, dtype=torch.float32)
    settings = whole.config.text_config.to_dict()
    settings.pop("model_type")
    text = LlamaForCausalLM(LlamaConfig(**settings))
    text.model.load_state_dict(whole.model.text_model.state_dict())
    text.tie_weights()
    text.save_pretrained(work / LLAMA)
    AutoTokenizer.from_pretrained(work / CHECKPOINT).save_pretrained(work / LLAMA)
    return work / LLAMA


def write_picture(work: Path, side: int) -> Path:
    """A PNG of `side` pixels, smooth colours and some noise."""
    import numpy as np
    from PIL import Image

    y, x = np.mgrid[0:side, 0:side]
    waves = [128 + 90 * np.sin(x / (9 + 4 * c)) * np.cos(y / (13 + 5 * c)) for c in range(3)]
    noise = np.random.default_rng(0).integers(0, 24, (side, side, 3))
    Image.fromarray(np.clip(np.stack(waves, -1) + noise, 0, 255).astype(np.uint8)).save(work / PICTURE)
    return work / PICTURE


def write_question(work: Path, shape: Shape) -> str:
    """A question with which the prompt has TEXT_TOKENS tokens beside those of the picture."""
    from transformers import AutoProcessor

    made: Any = AutoProcessor.from_pretrained(work / CHECKPOINT)

    def rest(question: str) -> int:
        content = [{"type": "image"}, {"type": "text", "text": question}]
        text = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
        edges = 3  # <fake_token_around_image><global-img> ... <fake_token_around_image>
        return len(made.tokenizer(text.replace("<image>", "")).input_ids) + edges

    question = "what"
    while rest(question) < TEXT_TOKENS:
        question += " word" if rest(question + " word") <= TEXT_TOKENS else "."
    (work / QUESTION).write_text(question)
    content = [{"type": "image"}, {"type": "text", "text": question}]
    text = made.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    edge = SPECIAL["fake_image_token"]
    around = f"{edge}{SPECIAL['global_image_token']}<picture>{edge}"
    (work / PROMPT).write_text(text.replace("<image>", around))
    return question


def write_gguf(work: Path) -> None:
    """text-f16.gguf and mmproj-f16.gguf, by the project's own converter."""
    from export.families.gguf import gguf_family
    from export.gguf_source import open_source
    from export.gguf_write import write

    source = open_source(work / CHECKPOINT)
    family = gguf_family(str(source.config["model_type"]))
    text = family.text(source.config, source.names)
    vision = family.vision(source.config, source.preprocessor, source.names)
    write(text, source, work / "text-f16.gguf", "f16")
    write(vision, source, work / "mmproj-f16.gguf", "f16")


def write_bundle(work: Path, precision: str) -> None:
    from export import export_checkpoint

    export_checkpoint(work / CHECKPOINT, work / precision, precision=precision)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--gguf", action="store_true")
    parser.add_argument("--bundle")
    options = parser.parse_args()
    if options.gguf:
        write_gguf(options.work)
    elif options.bundle:
        write_bundle(options.work, options.bundle)
    else:
        write_all(options.work, TINY if options.tiny else FULL)


def write_all(work: Path, shape: Shape) -> None:
    """What every arm starts from."""
    work.mkdir(parents=True, exist_ok=True)
    write_checkpoint(work, shape)
    write_llama(work)
    write_picture(work, shape.side)
    write_question(work, shape)


if __name__ == "__main__":
    main()
