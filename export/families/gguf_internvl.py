"""InternVL in llama.cpp's files: a class token whose position comes last, a pixel shuffle, tiles by number.

In: config.json, the preprocessor's configuration and tensor names. Out: a `Plan` for the text model and one
for the mmproj. Not here: what families share (`gguf_layout.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gguf

from export.families.gguf_layout import (
    ARCH,
    GELUS,
    INTERNVL,
    KEYS,
    Config,
    check_act,
    first,
    text_pieces,
    text_values,
    vision_pieces,
    vision_values,
)
from export.gguf_plan import Piece, Plan
from runtime.errors import CheckpointError

_INTERNVL_TEXT = {"qwen2": ARCH.QWEN2, "qwen3": ARCH.QWEN3}
_RMS_SHAPE = (3200, 45)
"""Width and layers of the one vision encoder whose norms llama.cpp takes for RMS norms."""


class InternVlGguf:
    """InternVL in the layout of transformers (`-hf`): Qwen2 or Qwen3 text, InternViT, two-layer projector."""

    model_types = ("internvl",)

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        kind = config["text_config"]["model_type"]
        if kind not in _INTERNVL_TEXT:
            raise CheckpointError(
                f"text_config.model_type {kind!r} has no GGUF export here; known: {', '.join(_INTERNVL_TEXT)}"
            )
        arch = _INTERNVL_TEXT[kind]
        pieces = text_pieces(arch, config, names, lambda _: None)
        return Plan(
            KEYS[arch], "text", pieces, lambda writer: text_values(writer, config), has_tokenizer=True
        )

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        _check_internvl(config)
        pooled = bool(config["vision_config"].get("use_mean_pooling", True))

        def special(rest: str, source: str) -> list[Piece] | None:
            if rest == "embeddings.mask_token" or (pooled and rest.startswith("layernorm.")):
                return []  # of its training; a norm that transformers does not read either
            if rest == "embeddings.cls_token":
                return [Piece("v.class_embd", source, lambda t: t.reshape(-1), "f32")]
            if rest == "embeddings.position_embeddings":
                # llama.cpp's graph puts the class token after the patches
                return [Piece("v.position_embd.weight", source, lambda t: t[0].roll(-1, 0), "f32")]
            return None

        def values(writer: Any) -> None:
            vision = config["vision_config"]
            vision_values(
                writer, config, preprocessor, image=first(vision["image_size"]),
                heads="num_attention_heads", layers="num_hidden_layers",
            )  # fmt: skip
            writer.add_clip_projector_type(gguf.VisionProjectorType.INTERNVL)
            writer.add_vision_attention_layernorm_eps(float(vision["layer_norm_eps"]))
            writer.add_vision_use_gelu(True)
            writer.add_vision_projector_scale_factor(round(1 / float(config["downsample_ratio"])))
            # published files say crop_to_patches false, and transformers' processor cuts all the same
            writer.add_vision_preproc_min_tiles(int(preprocessor.get("min_patches", 1)))
            writer.add_vision_preproc_max_tiles(int(preprocessor.get("max_patches", 12)))

        return Plan("clip", "vision", vision_pieces(INTERNVL, names, special), values, has_tokenizer=False)


def _check_internvl(config: Config) -> None:
    """Refuse, naming the setting, what llama.cpp's graph does in its own way."""
    vision = config["vision_config"]
    check_act(config, "vision_config", "hidden_act", GELUS)
    check_act(config, "", "projector_hidden_act", GELUS)
    large = (int(vision["hidden_size"]), int(vision["num_hidden_layers"])) == _RMS_SHAPE
    for name, got, known in (
        ("vision_feature_layer", config.get("vision_feature_layer", -1), -1),
        (
            "vision_feature_select_strategy",
            config.get("vision_feature_select_strategy", "default"),
            "default",
        ),
        (
            "vision_config.norm_type",
            vision.get("norm_type", "layer_norm"),
            "rms_norm" if large else "layer_norm",
        ),
        (
            "vision_config.use_absolute_position_embeddings",
            vision.get("use_absolute_position_embeddings", True),
            True,
        ),
    ):
        if got != known:
            raise CheckpointError(f"{name} is {got!r}; only {known!r} has a GGUF export here")
