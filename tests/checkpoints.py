"""Tiny random-weight checkpoints for tests: real architectures, real processors, no training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from distill import fresh

RECIPE = Path(fresh.__file__).parent / "recipes" / "demo.yaml"


def smolvlm_config(hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2) -> dict[str, Any]:
    return {
        "model_type": "smolvlm",
        "image_token_id": {"token": "<image>"},
        "pad_token_id": {"token": "<|endoftext|>"},
        "scale_factor": 2,
        "tie_word_embeddings": True,
        "vision_config": {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": 64,
            "patch_size": 8,
        },
        "text_config": {
            "model_type": "llama",
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "max_position_embeddings": 256,
            "rms_norm_eps": 1e-5,
            "pad_token_id": {"token": "<|endoftext|>"},
            "bos_token_id": {"token": "<|im_start|>"},
            "eos_token_id": {"token": "<end_of_utterance>"},
            "tie_word_embeddings": True,
        },
    }


def write_smolvlm(out: Path, *, seed: int = 0, **shape: int) -> Path:
    """A SmolVLM whose layers, not the tied embedding, decide the next token: greedy text then varies."""
    recipe = yaml.safe_load(RECIPE.read_text())
    words = "what color is the shape? is there a red circle in the image? black blue green yes no"
    tokenizer = fresh.train_tokenizer([words] * 4, recipe["tokenizer"]["special"], 352)
    rules = [("*norm*", 1.0), ("*bias", 0.02), ("*embed*", 0.3), ("*lm_head*", 0.3), ("*", 0.25)]
    return fresh.write_checkpoint(
        out,
        smolvlm_config(**shape),
        tokenizer,
        recipe["processor"],
        recipe["chat_template"],
        rules=rules,
        seed=seed,
    )
