"""Gemma 3 in llama.cpp's files: norms that multiply by 1 + weight, windows by layer, a pooled picture.

In: config.json, the preprocessor's configuration and tensor names. Out: a `Plan` for the text model and one
for the mmproj. Not here: what families share (`gguf_layout.py`), its tokenizer (`export/gguf_tokenizer.py`),
the attention of a picture's tokens to each other, which the one who runs the file must ask for
(`runtime/gguf_session.py`).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import gguf

from export.families.gguf_layout import (
    ARCH,
    KEYS,
    SIGLIP,
    Config,
    head_dim,
    text_pieces,
    text_values,
    vision_pieces,
    vision_values,
)
from export.gguf_plan import Change, Piece, Plan
from runtime.errors import CheckpointError

_FULL, _WINDOW = "full_attention", "sliding_attention"
_EVERY = 6
"""llama.cpp takes every sixth layer for one without a window unless a file says otherwise."""
_SIDE = 4
"""Patches of a token along one side, unless a file says otherwise."""
_LAYERS_OF_27B = 62
"""llama.cpp knows this size by its number of layers and scales its queries by another head size."""
_GELU = "gelu_pytorch_tanh"


class Gemma3Gguf:
    """Gemma 3 with pictures."""

    model_types = ("gemma3",)

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        text = config["text_config"]
        _check(config)
        kinds = list(text["layer_types"])
        full, window = (dict(text["rope_parameters"].get(kind) or {}) for kind in (_FULL, _WINDOW))
        query = math.sqrt(_squared_scale(text) / float(text["query_pre_attn_scalar"]))

        def values(writer: Any) -> None:
            text_values(writer, config, rope_base=float((full or window)["rope_theta"]))
            if full.get("rope_type", "default") == "linear":
                writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
                writer.add_rope_scaling_factor(float(full["factor"]))
            if _WINDOW in kinds:
                writer.add_sliding_window(int(text["sliding_window"]))
                writer.add_rope_freq_base_swa(float(window["rope_theta"]))
                if kinds != [_WINDOW if (layer + 1) % _EVERY else _FULL for layer in range(len(kinds))]:
                    writer.add_sliding_window_pattern([kind == _WINDOW for kind in kinds])

        pieces = text_pieces(ARCH.GEMMA3, config, names, lambda target: _change(target, query))
        return Plan(KEYS[ARCH.GEMMA3], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        vision = config["vision_config"]
        if vision["hidden_act"] != _GELU:
            raise CheckpointError(f"vision_config.hidden_act is {vision['hidden_act']!r}; known: {_GELU!r}")
        patches = int(vision["image_size"]) // int(vision["patch_size"])
        side = patches // math.isqrt(int(config["mm_tokens_per_image"]))

        def special(rest: str, source: str) -> list[Piece] | None:
            if rest.startswith("head."):
                return []  # SigLIP's own, for one vector of a whole picture
            if rest == "mm_input_projection_weight":  # (vision, text), which llama.cpp turns by itself
                return [Piece("mm.input_projection.weight", source, keep="half")]
            if rest == "mm_soft_emb_norm.weight":
                return [Piece("mm.soft_emb_norm.weight", source, _one_more, "f32")]
            return None

        def values(writer: Any) -> None:
            vision_values(
                writer, config, preprocessor, image=int(vision["image_size"]),
                heads="num_attention_heads", layers="num_hidden_layers",
            )  # fmt: skip
            writer.add_clip_projector_type(gguf.VisionProjectorType.GEMMA3)
            writer.add_vision_attention_layernorm_eps(float(vision["layer_norm_eps"]))
            writer.add_vision_use_gelu(True)
            if side != _SIDE:
                writer.add_vision_projector_scale_factor(side)

        return Plan("clip", "vision", vision_pieces(SIGLIP, names, special), values, has_tokenizer=False)


def _check(config: Config) -> None:
    """Refuse what llama.cpp's graph of this architecture does not do."""
    text = config["text_config"]
    act = text.get("hidden_activation", _GELU)
    if act != _GELU:
        raise CheckpointError(f"text_config.hidden_activation is {act!r}; llama.cpp knows {_GELU!r} alone")
    kinds, ropes = set(text["layer_types"]), text["rope_parameters"]
    if unknown := sorted(kinds - {_FULL, _WINDOW}):
        raise CheckpointError(f"text_config.layer_types: {unknown[0]!r} has no GGUF export here")
    known = {_FULL: ("default", "dynamic", "linear"), _WINDOW: ("default", "dynamic")}
    for kind in sorted(kinds):
        if (rope := (ropes.get(kind) or {}).get("rope_type", "default")) not in known[kind]:
            raise CheckpointError(
                f"text_config.rope_parameters.{kind}: rope_type {rope!r} has no GGUF export here; known: "
                f"{', '.join(known[kind])}"
            )
    tokens = int(config["mm_tokens_per_image"])
    if _WINDOW in kinds and tokens > int(text["sliding_window"]):
        raise CheckpointError(
            f"a picture has {tokens} tokens and text_config.sliding_window is {text['sliding_window']}: in "
            "llama.cpp the last token of such a picture would not see the first, as it does in transformers"
        )


def _squared_scale(text: Config) -> float:
    """One over the square of the factor that llama.cpp gives queries."""
    heads = int(text["num_attention_heads"])
    layers = int(text["num_hidden_layers"])
    return float(text["hidden_size"] // heads if layers == _LAYERS_OF_27B else head_dim(text))


def _change(target: str, query: float) -> Change | None:
    """Norms store the factor itself; that of queries also what llama.cpp's own scale lacks, if anything."""
    if not target.endswith("norm.weight"):
        return None
    if target.endswith("attn_q_norm.weight") and query != 1.0:
        return lambda tensor: (tensor.float() + 1) * query
    return _one_more


def _one_more(tensor: Any) -> Any:
    return tensor.float() + 1
