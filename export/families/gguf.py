"""Families in llama.cpp's files: which tensors and key-value pairs each has, and what is laid out anew.

In: config.json, the preprocessor's configuration and tensor names. Out: a `Plan` for the text model and one
for the mmproj. Not here: what families share (`gguf_layout.py`), reading tensors (`gguf_source.py`), writing
files (`gguf_write.py`), tokenizers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import Any

import gguf

from export.families.gguf_gemma3 import Gemma3Gguf
from export.families.gguf_internvl import InternVlGguf
from export.families.gguf_layout import (
    ARCH,
    GELUS,
    KEYS,
    LFM2,
    QWEN,
    SIGLIP,
    Config,
    check_act,
    head_dim,
    rotate_half_to_pairs,
    text_pieces,
    text_values,
    vision_pieces,
    vision_values,
)
from export.gguf_plan import Change, GgufFamily, Piece, Plan
from runtime.errors import CheckpointError


class SmolVlmGguf:
    """SmolVLM and Idefics3: Llama text, SigLIP vision, one matrix after the pixel shuffle."""

    model_types = ("smolvlm", "idefics3")

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        text = config["text_config"]
        heads = {"attn_q": int(text["num_attention_heads"]), "attn_k": int(text["num_key_value_heads"])}

        def change(target: str) -> Change | None:
            kind = target.split(".")[-2]
            return rotate_half_to_pairs(heads[kind]) if kind in heads else None

        def values(writer: Any) -> None:
            text_values(writer, config)
            writer.add_vocab_size(text["vocab_size"])
            writer.add_rope_dimension_count(head_dim(text))

        pieces = text_pieces(ARCH.LLAMA, config, names, change)
        return Plan(KEYS[ARCH.LLAMA], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        check_act(config, "vision_config", "hidden_act", GELUS)
        vision, scale = config["vision_config"], int(config.get("scale_factor", 2))
        _check_merge("scale_factor", scale)
        # the processor may give other pictures than the size that the encoder was trained with
        image = int((preprocessor.get("max_image_size") or {}).get("longest_edge", vision["image_size"]))
        patch = int(vision["patch_size"])
        rows = _positions(image // patch, int(vision["image_size"]) // patch)

        def special(rest: str, source: str) -> list[Piece] | None:
            if rest == "embeddings.position_embedding.weight" and rows is not None:
                return [Piece("v.position_embd.weight", source, lambda table: table[rows], "f32")]
            return None

        def values(writer: Any) -> None:
            vision_values(
                writer,
                config,
                preprocessor,
                image=image,
                heads="num_attention_heads",
                layers="num_hidden_layers",
            )
            writer.add_clip_projector_type(gguf.VisionProjectorType.IDEFICS3)
            writer.add_vision_attention_layernorm_eps(float(vision.get("layer_norm_eps", 1e-5)))
            writer.add_vision_projector_scale_factor(scale)
            writer.add_vision_use_gelu(True)
            # llama.cpp cuts tiles out of this size; the encoder's own size means none
            whole = int((preprocessor.get("size") or {}).get("longest_edge", image))
            writer.add_vision_preproc_image_size(whole if preprocessor.get("do_image_splitting") else image)

        needed = ("\n\n", "<fake_token_around_image>", "<global-img>")
        pieces = vision_pieces(SIGLIP, names, special)
        return Plan("clip", "vision", pieces, values, has_tokenizer=False, tools_need=needed)


def _check_merge(name: str, factor: int) -> None:
    """llama.cpp's pixel shuffle stops the process at 1."""
    if factor < _PAIR:
        raise CheckpointError(f"{name} {factor}: llama.cpp knows {_PAIR} or more")


def _positions(side: int, table: int) -> Any:
    """Rows of a table of table x table positions for side x side patches; None where each has its own.

    The model finds a patch's row by its share of the picture, in float32, as `SmolVLMVisionEmbeddings` does;
    llama.cpp counts patches.
    """
    import torch

    edges = torch.arange(1 / table, 1.0, 1 / table)
    share = torch.clamp(torch.arange(side, dtype=torch.float32) * (1.0 / torch.tensor(side)), max=1.0 - 1e-6)
    place = torch.bucketize(share, edges, right=True)
    rows = (place[:, None] * table + place[None, :]).flatten()
    return None if torch.equal(rows, torch.arange(table * table)) else rows


class QwenVlGguf:
    """Qwen2.5-VL and Qwen3-VL (with deepstack); their 3-D patch convolution becomes two 2-D ones."""

    model_types = ("qwen2_5_vl", "qwen3_vl")

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        arch = ARCH.QWEN3VL if config["model_type"] == "qwen3_vl" else ARCH.QWEN2VL

        def values(writer: Any) -> None:
            text_values(writer, config)
            if arch == ARCH.QWEN3VL:
                writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))

        pieces = text_pieces(arch, config, names, lambda _: None)
        return Plan(KEYS[arch], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        vision, newer = config["vision_config"], config["model_type"] == "qwen3_vl"
        check_act(config, "vision_config", "hidden_act", GELUS if newer else ("silu", "swish"))
        indexes = vision.get("deepstack_visual_indexes", [])
        for name in ("spatial_merge_size", "temporal_patch_size"):
            if int(vision[name]) != _PAIR:
                raise CheckpointError(f"vision_config.{name} {vision[name]}: llama.cpp knows {_PAIR} alone")
        if not newer:
            _window_pattern(vision)
        table = int(vision.get("num_position_embeddings", 0))
        if math.isqrt(table) ** 2 != table:
            raise CheckpointError(
                f"vision_config.num_position_embeddings {table}: llama.cpp knows a square of them alone"
            )
        if len(indexes) >= int(config["text_config"]["num_hidden_layers"]):
            raise CheckpointError(
                f"{len(indexes)} deepstack layers: llama.cpp needs more text layers than that "
                f"({config['text_config']['num_hidden_layers']})"
            )

        def special(rest: str, source: str) -> list[Piece] | None:
            if rest == "patch_embed.proj.weight":
                return [
                    Piece("v.patch_embd.weight", source, lambda t: t[:, :, 0], "f16"),
                    Piece("v.patch_embd.weight.1", source, lambda t: t[:, :, 1], "f16"),
                ]
            if not newer and (match := re.fullmatch(r"blocks\.(\d+)\.attn\.qkv\.(weight|bias)", rest)):
                return [
                    Piece(f"v.blk.{match[1]}.attn_{part}.{match[2]}", source, _third(place))
                    for place, part in enumerate("qkv")
                ]
            if match := re.fullmatch(
                r"deepstack_merger_list\.(\d+)\.(norm|linear_fc1|linear_fc2)\.(\w+)", rest
            ):
                name = {"norm": "norm", "linear_fc1": "fc1", "linear_fc2": "fc2"}[match[2]]
                return [Piece(f"v.deepstack.{indexes[int(match[1])]}.{name}.{match[3]}", source)]
            return None

        def values(writer: Any) -> None:
            self._values(writer, config, preprocessor)

        return Plan("clip", "vision", vision_pieces(QWEN, names, special), values, has_tokenizer=False)

    def _values(self, writer: Any, config: Config, preprocessor: Config) -> None:
        vision = config["vision_config"]
        if config["model_type"] == "qwen3_vl":
            image = math.isqrt(int(vision["num_position_embeddings"])) * int(vision["patch_size"])
            vision_values(writer, config, preprocessor, image=image, heads="num_heads", layers="depth")
            writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
            writer.add_vision_use_gelu(True)
            writer.add_vision_spatial_merge_size(int(vision["spatial_merge_size"]))
            writer.add_vision_attention_layernorm_eps(float(config["text_config"].get("rms_norm_eps", 1e-6)))
            marks = [layer in vision["deepstack_visual_indexes"] for layer in range(int(vision["depth"]))]
            writer.add_vision_is_deepstack_layers(marks)
            return
        image = int(vision.get("image_size", 560))
        vision_values(writer, config, preprocessor, image=image, heads="num_heads", layers="depth")
        writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN25VL)
        writer.add_vision_use_silu(True)
        # 1 would be windows in no layer, which llama.cpp stops at; 0 it takes for a model without any
        pattern = _window_pattern(vision)
        writer.add_vision_n_wa_pattern(pattern if pattern > 1 else 0)
        writer.add_vision_attention_layernorm_eps(float(config.get("rms_norm_eps", 1e-6)))


def _window_pattern(vision: Config) -> int:
    """Every so many layers one has no windows. Raises CheckpointError for what llama.cpp does not know."""
    if int(vision.get("window_size", 112)) != 112:
        raise CheckpointError(f"vision_config.window_size {vision['window_size']}: llama.cpp knows 112 alone")
    depth = int(vision["depth"])
    full = [int(layer) for layer in vision["fullatt_block_indexes"]]
    pattern = full[0] + 1 if full else depth + 1
    if full != list(range(pattern - 1, depth, pattern)):
        raise CheckpointError(
            f"vision_config.fullatt_block_indexes {full}: of {depth} layers llama.cpp knows only evenly "
            "spaced ones"
        )
    return pattern


_PAIR = 2
"""Patches of a token along one side, and pictures of a patch, in llama.cpp's graphs."""


def _third(place: int) -> Change:
    """The query, key or value rows of a joined projection."""
    return lambda tensor: tensor.chunk(3, 0)[place]


class Lfm2VlGguf:
    """LFM2-VL: short convolutions and attention in the text model, SigLIP2 with any shape of picture."""

    model_types = ("lfm2_vl",)

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        text = config["text_config"]

        def change(target: str) -> Change | None:
            return (lambda tensor: tensor.squeeze(1)) if target.endswith("shortconv.conv.weight") else None

        def values(writer: Any) -> None:
            heads = [
                0 if kind == "conv" else int(text["num_key_value_heads"]) for kind in text["layer_types"]
            ]
            text_values(writer, config, kv_heads=heads, feed_forward=_feed_forward(text))
            writer.add_vocab_size(text["vocab_size"])
            writer.add_shortconv_l_cache(text["conv_L_cache"])

        pieces = text_pieces(ARCH.LFM2, config, names, change)
        return Plan(KEYS[ARCH.LFM2], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        patch = int(config["vision_config"]["patch_size"])
        if int(config.get("vision_feature_layer", -1)) != -1:
            raise CheckpointError("vision_feature_layer: only -1, the last layer, has a GGUF export here")
        check_act(config, "vision_config", "hidden_act", GELUS)
        check_act(config, "", "projector_hidden_act", GELUS)
        _check_merge("downsample_factor", int(config.get("downsample_factor", 2)))

        normed = bool(config.get("projector_use_layernorm", True))

        def special(rest: str, source: str) -> list[Piece] | None:
            if rest.startswith("head."):
                return []  # SigLIP's own, for one vector of a whole picture
            if rest.startswith("layer_norm.") and not normed:
                return []  # stored, but neither trained nor read; llama.cpp applies what it finds
            if rest == "embeddings.patch_embedding.weight":  # (hidden, patch * patch * 3) -> a convolution
                change = lambda t: t.view(t.shape[0], patch, patch, 3).permute(0, 3, 1, 2)  # noqa: E731
                return [Piece("v.patch_embd.weight", source, change, "f16")]
            return None

        def values(writer: Any) -> None:
            vision = config["vision_config"]
            # the size is per picture; llama.cpp wants a number
            vision_values(
                writer,
                config,
                preprocessor,
                image=256,
                heads="num_attention_heads",
                layers="num_hidden_layers",
            )
            writer.add_clip_projector_type(gguf.VisionProjectorType.LFM2)
            writer.add_vision_attention_layernorm_eps(float(vision["layer_norm_eps"]))
            writer.add_vision_projector_scale_factor(int(config.get("downsample_factor", 2)))
            writer.add_vision_use_gelu(True)

        return Plan("clip", "vision", vision_pieces(LFM2, names, special), values, has_tokenizer=False)


def _feed_forward(text: Config) -> int:
    """The width that the text model really has: its configuration gives it before two adjustments."""
    width = int(text.get("block_ff_dim", text["intermediate_size"]))
    if not text.get("block_auto_adjust_ff_dim", False):
        return width
    width = int(2 * width / 3)
    if (factor := text.get("block_ffn_dim_multiplier")) is not None:
        width = int(float(factor) * width)
    step = int(text.get("block_multiple_of", 256))
    return step * -(-width // step)


GGUF_FAMILIES: tuple[GgufFamily, ...] = (
    SmolVlmGguf(),
    InternVlGguf(),
    QwenVlGguf(),
    Lfm2VlGguf(),
    Gemma3Gguf(),
)


def gguf_family(model_type: str) -> GgufFamily:
    """The family of a `model_type`. Raises CheckpointError naming what is known."""
    for family in GGUF_FAMILIES:
        if model_type in family.model_types:
            return family
    known = ", ".join(sorted(name for family in GGUF_FAMILIES for name in family.model_types))
    raise CheckpointError(
        f"model_type {model_type!r} has no GGUF export; known: {known}; to add it, write a class in "
        "export/families/gguf.py and list it in GGUF_FAMILIES"
    )
