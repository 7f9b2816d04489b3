"""Tiny random-weight checkpoints for tests: real architectures, real processors, no training.

`FAMILIES` maps a name to its maker. All makers share one signature:
`write_X(out, *, seed=0, hidden=64, layers=2, heads=4, kv_heads=2) -> out`; the directory loads with
`AutoModelForImageTextToText` and `AutoProcessor`. Same seed, same bytes; the tokenizer of a family does not
depend on seed or shape, so two of them make a teacher and a student.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml
from transformers import PreTrainedTokenizerFast

from distill import fresh

RECIPE = Path(fresh.__file__).parent / "recipes" / "demo.yaml"
WORDS = "what color is the shape? is there a red circle in the image? black blue green yes no"
RULES = [("*norm*", 1.0), ("*bias", 0.02), ("*embed*", 0.3), ("*lm_head*", 0.3), ("*", 0.25)]
"""The layers, not a tied embedding, decide the next token: greedy text then varies."""

CHATML = (
    "{%- for message in messages -%}<|im_start|>{{ message['role'] + '\n' }}"
    "{%- if message['content'] is string -%}{{ message['content'] }}"
    "{%- else -%}{%- for part in message['content'] -%}"
    "{%- if part['type'] == 'image' -%}IMAGE"
    "{%- elif part['type'] == 'text' -%}{{ part['text'] }}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}<|im_end|>{{ '\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|im_start|>assistant{{ '\n' }}{%- endif -%}"
)
CHATML_TOKENS = {"pad_token": "<|endoftext|>", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>"}


def text_config(hidden: int, layers: int, heads: int, kv_heads: int, **more: Any) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": 2048,
        "pad_token_id": {"token": "<|endoftext|>"},
        "bos_token_id": {"token": "<|im_start|>"},
        "eos_token_id": {"token": "<|im_end|>"},
        **more,
    }


def write(
    out: Path,
    config: Mapping[str, Any],
    special: Mapping[str, str],
    processor: Mapping[str, Any],
    template: str,
    seed: int,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> Path:
    tokenizer = tokenizer or fresh.train_tokenizer([WORDS] * 4, special, 352)
    return fresh.write_checkpoint(out, config, tokenizer, processor, template, rules=RULES, seed=seed)


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
    """One 64 px image is 16 tokens; no tiles."""
    recipe = yaml.safe_load(RECIPE.read_text())
    special = recipe["tokenizer"]["special"]
    return write(out, smolvlm_config(**shape), special, recipe["processor"], recipe["chat_template"], seed)


def write_qwen3_vl(
    out: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Path:
    """Deepstack after every vision layer but the last, interleaved M-RoPE, any image size; 16 px a token."""
    half = hidden // heads // 2
    side = half * 5 // 16
    config = {
        "model_type": "qwen3_vl",
        "tie_word_embeddings": True,
        **_qwen_ids(),
        "vision_config": {
            "depth": layers + 1,
            "hidden_size": hidden,
            "out_hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": heads,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "num_position_embeddings": 36,
            "deepstack_visual_indexes": list(range(layers)),
        },
        "text_config": text_config(
            hidden, layers, heads, kv_heads,
            head_dim=hidden // heads,
            tie_word_embeddings=True,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_interleaved": True,
                "mrope_section": [half - 2 * side, side, side],
            },
        ),
    }  # fmt: skip
    return _write_qwen(out, config, "Qwen3VL", 8, seed)


def write_qwen2_5_vl(
    out: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Path:
    """Windowed vision attention but in the last layer, sectioned M-RoPE, untied head; 16 px a token."""
    half = hidden // heads // 2
    side = half * 3 // 8
    config = {
        "model_type": "qwen2_5_vl",
        "tie_word_embeddings": False,
        **_qwen_ids(),
        "vision_config": {
            "depth": layers,
            "hidden_size": hidden,
            "out_hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_heads": heads,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 32,
            "fullatt_block_indexes": [layers - 1],
        },
        "text_config": text_config(
            hidden, layers, heads, kv_heads,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * side, side, side],
            },
        ),
    }  # fmt: skip
    return _write_qwen(out, config, "Qwen2_5_VL", 8, seed)


def _qwen_ids() -> dict[str, Any]:
    return {
        "image_token_id": {"token": "<|image_pad|>"},
        "video_token_id": {"token": "<|video_pad|>"},
        "vision_start_token_id": {"token": "<|vision_start|>"},
        "vision_end_token_id": {"token": "<|vision_end|>"},
    }


def _write_qwen(
    out: Path, config: Mapping[str, Any], name: str, patch: int, seed: int, template: str = CHATML
) -> Path:
    special = {
        **CHATML_TOKENS,
        "vision_start_token": "<|vision_start|>",
        "vision_end_token": "<|vision_end|>",
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
    }
    pixels = (2 * patch) ** 2
    patches = {
        "patch_size": patch, "merge_size": 2, "temporal_patch_size": 2,
        "size": {"shortest_edge": 4 * pixels, "longest_edge": 64 * pixels},
    }  # fmt: skip
    video = "Qwen3VLVideoProcessor" if name == "Qwen3VL" else "Qwen2VLVideoProcessor"
    processor = {
        "processor_class": f"{name}Processor",
        "image_processor": {"image_processor_type": "Qwen2VLImageProcessor", **patches},
        "video_processor": {"video_processor_type": video, **patches},
    }
    template = template.replace("IMAGE", "<|vision_start|><|image_pad|><|vision_end|>")
    return write(out, config, special, processor, template, seed)


def write_internvl(
    out: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    text: Mapping[str, Any] | None = None,
    vision: Mapping[str, Any] | None = None,
    more: Mapping[str, Any] | None = None,
) -> Path:
    """The `-HF` layout: 32 px tiles of 4 tokens, up to 4 and a thumbnail for an image; 1-D positions."""
    config = {
        "model_type": "internvl",
        "image_token_id": {"token": "<IMG_CONTEXT>"},
        "image_seq_length": 4,
        "downsample_ratio": 0.5,
        "tie_word_embeddings": True,
        "vision_config": {
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "attention_bias": True,
            "image_size": [32, 32],
            "patch_size": [8, 8],
            **(vision or {}),
        },
        "text_config": text_config(
            hidden,
            layers,
            heads,
            kv_heads,
            **{"model_type": "qwen2", "tie_word_embeddings": True, **(text or {})},
        ),
        **(more or {}),
    }
    special = {
        **CHATML_TOKENS,
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    size = {"size": {"height": 32, "width": 32}}
    tiles = {"crop_to_patches": True, "min_patches": 1, "max_patches": 4}
    processor = {
        "processor_class": "InternVLProcessor",
        "image_seq_length": 4,
        "image_processor": {"image_processor_type": "GotOcr2ImageProcessor", **size, **tiles},
        "video_processor": {"video_processor_type": "InternVLVideoProcessor", **size},
    }
    template = CHATML.replace("IMAGE", "<IMG_CONTEXT>{{ '\n' }}")
    return write(out, config, special, processor, template, seed)


def write_lfm2_vl(
    out: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Path:
    """`layers` pairs of a short convolution and an attention layer; any image size, 64 px tiles if large."""
    config = {
        "model_type": "lfm2_vl",
        "image_token_id": {"token": "<image>"},
        "downsample_factor": 2,
        "projector_hidden_size": hidden,
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "siglip2_vision_model",
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "patch_size": 8,
            "num_patches": 64,
            "vision_use_head": False,
        },
        "text_config": text_config(
            hidden, 2 * layers, heads, kv_heads,
            model_type="lfm2",
            layer_types=["conv", "full_attention"] * layers,
            block_auto_adjust_ff_dim=False,
            tie_word_embeddings=True,
        ),
    }  # fmt: skip
    special = {
        **CHATML_TOKENS,
        "image_token": "<image>",
        "image_start_token": "<|image_start|>",
        "image_end_token": "<|image_end|>",
        "image_thumbnail_token": "<|img_thumbnail|>",
        **{f"tile_{r}_{c}": f"<|img_row_{r}_col_{c}|>" for r in (1, 2) for c in (1, 2)},
    }
    processor = {
        "processor_class": "Lfm2VlProcessor",
        "image_processor": {
            "image_processor_type": "Lfm2VlImageProcessor",
            "encoder_patch_size": 8,
            "downsample_factor": 2,
            "tile_size": 64,
            "min_tiles": 2,
            "max_tiles": 4,
            "min_image_tokens": 4,
            "max_image_tokens": 16,
        },
    }
    return write(out, config, special, processor, CHATML.replace("IMAGE", "<image>"), seed)


# --- variants of a family, for the exporter ---------------------------


def write_smolvlm_tiles(out: Path, *, seed: int = 0, **shape: int) -> Path:
    """Pictures are cut: up to 4 x 4 tiles of 64 px and the whole, 16 tokens each; tile names are tokens."""
    recipe = yaml.safe_load(RECIPE.read_text())
    names = [f"row_{row}_col_{column}" for row in range(1, 5) for column in range(1, 5)]
    special = {**recipe["tokenizer"]["special"], **{f"{name}_token": f"<{name}>" for name in names}}
    processor = {**recipe["processor"], "image_processor": _tiles(recipe["processor"]["image_processor"])}
    return write(out, _long(smolvlm_config(**shape)), special, processor, recipe["chat_template"], seed)


def write_idefics3_tiles(out: Path, *, seed: int = 0, **shape: int) -> Path:
    """As `smolvlm_tiles` with the other processor, another filter, and tile names that are plain text."""
    recipe = yaml.safe_load(RECIPE.read_text())
    image = {"image_processor_type": "Idefics3ImageProcessor", "resample": 3}
    processor = {
        "processor_class": "Idefics3Processor",
        "image_seq_len": 16,
        "image_processor": {**_tiles({"max_image_size": {"longest_edge": 64}}), **image},
    }
    config = {**_long(smolvlm_config(**shape)), "model_type": "idefics3"}
    return write(out, config, recipe["tokenizer"]["special"], processor, recipe["chat_template"], seed)


def _tiles(image: Mapping[str, Any]) -> dict[str, Any]:
    return {**image, "do_image_splitting": True, "size": {"longest_edge": 256}}


def _long(config: dict[str, Any]) -> dict[str, Any]:
    return {**config, "text_config": {**config["text_config"], "max_position_embeddings": 2048}}


def write_internvl_qwen3(out: Path, **options: Any) -> Path:
    """Qwen3 text (a norm on queries and keys), the same norms in vision, the features of an inner layer."""
    vision = {
        "norm_type": "rms_norm",
        "use_qk_norm": True,
        "attention_bias": False,
        "use_mean_pooling": False,
    }
    more = {"vision_feature_layer": -2}
    return write_internvl(
        out, text={"model_type": "qwen3", "head_dim": 16}, vision=vision, more=more, **options
    )


def write_internvl_llama(out: Path, **options: Any) -> Path:
    """Llama text, a context that ends after a few tiles."""
    text = {"model_type": "llama", "max_position_embeddings": 256}
    return write_internvl(out, text=text, **options)


def write_qwen2_vl(
    out: Path, *, seed: int = 0, hidden: int = 64, layers: int = 2, heads: int = 4, kv_heads: int = 2
) -> Path:
    """No windows, LayerNorm and quick GELU in vision; the template has a system turn of its own."""
    half = hidden // heads // 2
    side = half * 3 // 8
    config = {
        "model_type": "qwen2_vl",
        "tie_word_embeddings": True,
        **_qwen_ids(),
        "vision_config": {
            "depth": layers,
            "embed_dim": hidden,
            "hidden_size": hidden,
            "mlp_ratio": 2,
            "num_heads": heads,
            "patch_size": 8,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
        },
        "text_config": text_config(
            hidden, layers, heads, kv_heads,
            rope_parameters={
                "rope_type": "default", "rope_theta": 1e4, "mrope_section": [half - 2 * side, side, side],
            },
        ),
    }  # fmt: skip
    system = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    first = (
        "{%- if messages[0]['role'] != 'system' -%}{{ '" + system.replace("\n", "\\n") + "' }}{%- endif -%}"
    )
    return _write_qwen(out, config, "Qwen2VL", 8, seed, first + CHATML)


GEMMA3_TOKENS = {
    **CHATML_TOKENS,
    "boi_token": "<start_of_image>",
    "eoi_token": "<end_of_image>",
    "image_token": "<image_soft_token>",
}


def write_gemma3(
    out: Path,
    *,
    seed: int = 0,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    tokenizer: PreTrainedTokenizerFast | None = None,
    side: int = 64,
    tokens: int = 16,
) -> Path:
    """`layers` pairs of a layer with a window of 12 tokens and one without; 64 px pictures of 16 tokens."""
    rope = {"rope_type": "default"}
    config = {
        "model_type": "gemma3",
        "mm_tokens_per_image": tokens,
        "boi_token_index": {"token": "<start_of_image>"},
        "eoi_token_index": {"token": "<end_of_image>"},
        "image_token_index": {"token": "<image_soft_token>"},
        "tie_word_embeddings": True,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": hidden,
            "intermediate_size": 2 * hidden,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "image_size": side,
            "patch_size": 8,
            "vision_use_head": False,
        },
        "text_config": text_config(
            hidden, 2 * layers, heads, kv_heads,
            head_dim=hidden // heads,
            query_pre_attn_scalar=24,
            sliding_window=12,
            layer_types=["sliding_attention", "full_attention"] * layers,
            rope_parameters={
                "sliding_attention": {**rope, "rope_theta": 1e3},
                "full_attention": {**rope, "rope_theta": 1e5, "rope_type": "linear", "factor": 2.0},
            },
            tie_word_embeddings=True,
        ),
    }  # fmt: skip
    processor = {
        "processor_class": "Gemma3Processor",
        "image_seq_length": tokens,
        "image_processor": {
            "image_processor_type": "Gemma3ImageProcessor",
            "size": {"height": side, "width": side},
        },
    }
    trimmed = CHATML.replace("part['text']", "part['text'] | trim")  # as the published one does
    template = trimmed.replace("IMAGE", "<start_of_image>")
    return write(out, config, GEMMA3_TOKENS, processor, template, seed, tokenizer)


VARIANTS: dict[str, Callable[..., Path]] = {
    "gemma3": write_gemma3,
    "qwen2_vl": write_qwen2_vl,
    "smolvlm_tiles": write_smolvlm_tiles,
    "idefics3_tiles": write_idefics3_tiles,
    "internvl_qwen3": write_internvl_qwen3,
    "internvl_llama": write_internvl_llama,
}

FAMILIES: dict[str, Callable[..., Path]] = {
    "smolvlm": write_smolvlm,
    "qwen3_vl": write_qwen3_vl,
    "qwen2_5_vl": write_qwen2_5_vl,
    "internvl": write_internvl,
    "lfm2_vl": write_lfm2_vl,
}
