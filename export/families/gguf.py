"""Families in llama.cpp's files: tensor names, key-value pairs, and the few tensors that are laid out anew.

In: config.json, the preprocessor's configuration and tensor names. Out: a `Plan` for the text model and one
for the mmproj. Not here: reading tensors (`gguf_source.py`), writing files (`gguf_write.py`), tokenizers.

Text names come from the table of the `gguf` package. Vision names are written out here: its table lacks the
layout that transformers writes for most families. Older and newer prefixes of transformers are both known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from export.gguf_plan import Change, GgufFamily, Keep, Piece, Plan
from runtime.errors import CheckpointError

Config = Mapping[str, Any]
_ARCH, _KEYS = gguf.MODEL_ARCH, gguf.MODEL_ARCH_NAMES

_TEXT = re.compile(
    r"^(?:model\.)?(?:language_model\.|text_model\.)?(?:model\.)?"
    r"(?P<rest>layers\..*|embed_tokens\..*|norm\.weight|embedding_norm\.weight|lm_head\.weight)$"
)
_VISION = re.compile(
    r"^(?:model\.)?(?P<part>vision_model|vision_tower(?:\.vision_model)?|visual|connector|multi_modal_projector)"
    r"\.(?P<rest>.+)$"
)
_SIGLIP_LAYER = {
    "layer_norm1": "ln1",
    "layer_norm2": "ln2",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.out_proj": "attn_out",
    "mlp.fc1": "ffn_up",
    "mlp.fc2": "ffn_down",
}


@dataclass(frozen=True)
class Vision:
    """Names of a vision encoder: `layer` is the pattern of a layer's tensors, with number and rest."""

    layer: str
    layers: Mapping[str, str]
    others: Mapping[str, str]
    keep: Mapping[str, Keep]


SIGLIP = Vision(
    r"encoder\.layers\.(\d+)\.(.+)\.(weight|bias)",
    _SIGLIP_LAYER,
    {
        "embeddings.patch_embedding": "v.patch_embd",
        "embeddings.position_embedding": "v.position_embd",
        "post_layernorm": "v.post_ln",
        "modality_projection.proj": "mm.model.fc",
    },
    {"v.patch_embd.weight": "f32", "v.position_embd.weight": "f32"},
)
LFM2 = Vision(
    SIGLIP.layer,
    _SIGLIP_LAYER,
    {
        "embeddings.patch_embedding": "v.patch_embd",
        "embeddings.position_embedding": "v.position_embd",
        "post_layernorm": "v.post_ln",
        "layer_norm": "mm.input_norm",
        "linear_1": "mm.1",
        "linear_2": "mm.2",
    },
    {"v.patch_embd.weight": "f16", "v.position_embd.weight": "f32"},
)
INTERNVL = Vision(
    r"encoder\.layer\.(\d+)\.(.+?)(?:\.(weight|bias))?",
    {
        "layernorm_before": "ln1",
        "layernorm_after": "ln2",
        "attention.q_proj": "attn_q",
        "attention.k_proj": "attn_k",
        "attention.v_proj": "attn_v",
        "attention.projection_layer": "attn_out",
        "attention.q_norm": "attn_q_norm",
        "attention.k_norm": "attn_k_norm",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
        "lambda_1": "ls1",
        "lambda_2": "ls2",
    },
    {
        "embeddings.patch_embeddings.projection": "v.patch_embd",
        "layer_norm": "mm.model.mlp.0",
        "linear_1": "mm.model.mlp.1",
        "linear_2": "mm.model.mlp.3",
    },
    {"v.patch_embd.weight": "f16"},
)
QWEN = Vision(
    r"blocks\.(\d+)\.(.+)\.(weight|bias)",
    {
        "norm1": "ln1",
        "norm2": "ln2",
        "attn.q": "attn_q",
        "attn.k": "attn_k",
        "attn.v": "attn_v",
        "attn.qkv": "attn_qkv",
        "attn.proj": "attn_out",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
        "mlp.fc1": "ffn_up",
        "mlp.fc2": "ffn_down",
        "mlp.linear_fc1": "ffn_up",
        "mlp.linear_fc2": "ffn_down",
    },
    {
        "patch_embed.proj": "v.patch_embd",
        "pos_embed": "v.position_embd",
        "merger.ln_q": "v.post_ln",
        "merger.mlp.0": "mm.0",
        "merger.mlp.2": "mm.2",
        "merger.norm": "v.post_ln",
        "merger.linear_fc1": "mm.0",
        "merger.linear_fc2": "mm.2",
    },
    {"v.patch_embd.weight": "f16", "v.position_embd.weight": "f32"},
)


# --- text -------------------------------------------------------------


def _text_names(names: Sequence[str]) -> dict[str, str]:
    """Checkpoint name by its name in the text model alone."""
    return {short: name for name in names if (short := text_name(name))}


def text_name(name: str) -> str:
    """A tensor's name in the text model alone; "" for what is no part of it."""
    return "" if _VISION.match(name) or not (match := _TEXT.match(name)) else match["rest"]


def _text_pieces(
    arch: Any, config: Config, names: Sequence[str], change: Callable[[str], Change | None]
) -> tuple[Piece, ...]:
    text = config["text_config"]
    table = gguf.get_tensor_name_map(arch, int(text["num_hidden_layers"]))
    pieces = []
    for name, source in _text_names(names).items():
        if name == "lm_head.weight" and _tied(config):
            continue
        full = name if name.startswith("lm_head") else f"model.{name}"
        target = table.get_name(full, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise CheckpointError(
                f"{source}: no name for it in GGUF's {_KEYS[arch]}; this model has a part not known here"
            )
        keep: Keep = "f32" if target.endswith("shortconv.conv.weight") else None
        pieces.append(Piece(target, source, change(target), keep))
    return tuple(pieces)


def _tied(config: Config) -> bool:
    return bool(config.get("tie_word_embeddings", config["text_config"].get("tie_word_embeddings", False)))


def _rope(text: Config) -> Config:
    """Rotary parameters, wherever this version of transformers wrote them."""
    found = dict(text.get("rope_parameters") or text.get("rope_scaling") or {})
    kind = str(found.get("rope_type", found.get("type", "default")))
    if kind not in ("default", "mrope"):
        raise CheckpointError(f"text_config: rope_type {kind!r} has no GGUF export here; known: default")
    if "rope_theta" not in found:
        found["rope_theta"] = text.get("rope_theta", 10000.0)
    return found


def _text_values(writer: Any, config: Config, kv_heads: Any = None, feed_forward: int | None = None) -> None:
    text = config["text_config"]
    rope = _rope(text)
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(feed_forward or text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(kv_heads or text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text.get("rms_norm_eps", text.get("norm_eps", 1e-6)))
    writer.add_rope_freq_base(float(rope["rope_theta"]))
    if "mrope_section" in rope:
        writer.add_rope_dimension_sections([*rope["mrope_section"], 0, 0, 0, 0][:4])
    if text.get("head_dim"):
        writer.add_key_length(text["head_dim"])
        writer.add_value_length(text["head_dim"])


def _head_dim(text: Config) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def _rotate_half_to_pairs(heads: int) -> Change:
    """Rows of a query or key projection from transformers' order (halves) to ggml's (pairs)."""

    def change(tensor: Any) -> Any:
        rows = tensor.shape[0]
        halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    return change


# --- vision -----------------------------------------------------------


def _vision_pieces(
    shape: Vision, names: Sequence[str], special: Callable[[str, str], list[Piece] | None]
) -> tuple[Piece, ...]:
    """`special(rest, source)` handles what is no plain renaming; None leaves a tensor to the table."""
    pieces: list[Piece] = []
    for source in names:
        match = _VISION.match(source)
        if match is None:
            continue
        rest = match["rest"]
        if (found := special(rest, source)) is not None:
            pieces += found
        else:
            pieces.append(_renamed(shape, rest, source))
    if not pieces:
        raise CheckpointError("no vision tensors under a known name; an empty mmproj would say nothing of it")
    return tuple(pieces)


def _renamed(shape: Vision, rest: str, source: str) -> Piece:
    if layer := re.fullmatch(shape.layer, rest):
        base, suffix = shape.layers.get(layer[2]), layer[3] or "weight"
        name = None if base is None else f"v.blk.{layer[1]}.{base}.{suffix}"
    else:
        stem, suffix = rest.rsplit(".", 1)
        base = shape.others.get(stem)
        name = None if base is None else f"{base}.{suffix}"
    if name is None:
        raise CheckpointError(
            f"{source}: no name for it in GGUF; this vision encoder has a part that is not known here"
        )
    return Piece(name, source, keep=shape.keep.get(name))


def _vision_values(
    writer: Any, config: Config, preprocessor: Config, *, image: int, heads: str, layers: str
) -> None:
    vision = config["vision_config"]
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(image)
    writer.add_vision_patch_size(_first(vision["patch_size"]))
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision[layers])
    writer.add_vision_head_count(vision[heads])
    writer.add_vision_image_mean([float(x) for x in preprocessor["image_mean"]])
    writer.add_vision_image_std([float(x) for x in preprocessor["image_std"]])


def _first(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)


def _none(_: str, __: str) -> None:
    return None


# --- families ---------------------------------------------------------


class SmolVlmGguf:
    """SmolVLM and Idefics3: Llama text, SigLIP vision, one matrix after the pixel shuffle."""

    model_types = ("smolvlm", "idefics3")

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        text = config["text_config"]
        heads = {"attn_q": int(text["num_attention_heads"]), "attn_k": int(text["num_key_value_heads"])}

        def change(target: str) -> Change | None:
            kind = target.split(".")[-2]
            return _rotate_half_to_pairs(heads[kind]) if kind in heads else None

        def values(writer: Any) -> None:
            _text_values(writer, config)
            writer.add_vocab_size(text["vocab_size"])
            writer.add_rope_dimension_count(_head_dim(text))

        pieces = _text_pieces(_ARCH.LLAMA, config, names, change)
        return Plan(_KEYS[_ARCH.LLAMA], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        def values(writer: Any) -> None:
            vision = config["vision_config"]
            image = int(vision["image_size"])
            _vision_values(
                writer,
                config,
                preprocessor,
                image=image,
                heads="num_attention_heads",
                layers="num_hidden_layers",
            )
            writer.add_clip_projector_type(gguf.VisionProjectorType.IDEFICS3)
            writer.add_vision_attention_layernorm_eps(float(vision.get("layer_norm_eps", 1e-5)))
            writer.add_vision_projector_scale_factor(int(config.get("scale_factor", 2)))
            writer.add_vision_use_gelu(True)
            # llama.cpp cuts tiles out of this size; the encoder's own size means none
            whole = int((preprocessor.get("size") or {}).get("longest_edge", image))
            writer.add_vision_preproc_image_size(whole if preprocessor.get("do_image_splitting") else image)

        needed = ("\n\n", "<fake_token_around_image>", "<global-img>")
        pieces = _vision_pieces(SIGLIP, names, _none)
        return Plan("clip", "vision", pieces, values, has_tokenizer=False, tools_need=needed)


_INTERNVL_TEXT = {"qwen2": _ARCH.QWEN2, "qwen3": _ARCH.QWEN3}


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
        pieces = _text_pieces(arch, config, names, lambda _: None)
        return Plan(
            _KEYS[arch], "text", pieces, lambda writer: _text_values(writer, config), has_tokenizer=True
        )

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        def special(rest: str, source: str) -> list[Piece] | None:
            if rest == "embeddings.cls_token":
                return [Piece("v.class_embd", source, lambda t: t.reshape(-1), "f32")]
            if rest == "embeddings.position_embeddings":
                # llama.cpp's graph puts the class token after the patches
                return [Piece("v.position_embd.weight", source, lambda t: t[0].roll(-1, 0), "f32")]
            return None

        def values(writer: Any) -> None:
            vision = config["vision_config"]
            _vision_values(
                writer, config, preprocessor, image=_first(vision["image_size"]),
                heads="num_attention_heads", layers="num_hidden_layers",
            )  # fmt: skip
            writer.add_clip_projector_type(gguf.VisionProjectorType.INTERNVL)
            writer.add_vision_attention_layernorm_eps(float(vision["layer_norm_eps"]))
            if vision["hidden_act"] != "gelu":
                raise CheckpointError(
                    f"vision_config.hidden_act is {vision['hidden_act']!r}; only 'gelu' is known here"
                )
            writer.add_vision_use_gelu(True)
            writer.add_vision_projector_scale_factor(round(1 / float(config["downsample_ratio"])))
            if preprocessor.get("crop_to_patches"):
                writer.add_vision_preproc_min_tiles(int(preprocessor.get("min_patches", 1)))
                writer.add_vision_preproc_max_tiles(int(preprocessor.get("max_patches", 12)))

        return Plan("clip", "vision", _vision_pieces(INTERNVL, names, special), values, has_tokenizer=False)


class QwenVlGguf:
    """Qwen2.5-VL and Qwen3-VL (with deepstack); their 3-D patch convolution becomes two 2-D ones."""

    model_types = ("qwen2_5_vl", "qwen3_vl")

    def text(self, config: Config, names: Sequence[str]) -> Plan:
        arch = _ARCH.QWEN3VL if config["model_type"] == "qwen3_vl" else _ARCH.QWEN2VL

        def values(writer: Any) -> None:
            _text_values(writer, config)
            if arch == _ARCH.QWEN3VL:
                writer.add_num_deepstack_layers(len(config["vision_config"]["deepstack_visual_indexes"]))

        pieces = _text_pieces(arch, config, names, lambda _: None)
        return Plan(_KEYS[arch], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        vision, newer = config["vision_config"], config["model_type"] == "qwen3_vl"
        indexes = vision.get("deepstack_visual_indexes", [])
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

        return Plan("clip", "vision", _vision_pieces(QWEN, names, special), values, has_tokenizer=False)

    def _values(self, writer: Any, config: Config, preprocessor: Config) -> None:
        vision = config["vision_config"]
        if config["model_type"] == "qwen3_vl":
            image = int(vision["num_position_embeddings"] ** 0.5 * vision["patch_size"])
            _vision_values(writer, config, preprocessor, image=image, heads="num_heads", layers="depth")
            writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN3VL)
            writer.add_vision_use_gelu(True)
            writer.add_vision_spatial_merge_size(int(vision["spatial_merge_size"]))
            writer.add_vision_attention_layernorm_eps(float(config["text_config"].get("rms_norm_eps", 1e-6)))
            marks = [layer in vision["deepstack_visual_indexes"] for layer in range(int(vision["depth"]))]
            writer.add_vision_is_deepstack_layers(marks)
            return
        if int(vision.get("window_size", 112)) != 112:
            raise CheckpointError(
                f"vision_config.window_size {vision['window_size']}: llama.cpp knows 112 alone"
            )
        full = [int(layer) for layer in vision["fullatt_block_indexes"]]
        pattern = full[0] + 1
        if full != list(range(pattern - 1, int(vision["depth"]), pattern))[: len(full)]:
            raise CheckpointError(
                f"vision_config.fullatt_block_indexes {full}: llama.cpp knows only evenly spaced ones"
            )
        image = int(vision.get("image_size", 560))
        _vision_values(writer, config, preprocessor, image=image, heads="num_heads", layers="depth")
        writer.add_clip_projector_type(gguf.VisionProjectorType.QWEN25VL)
        writer.add_vision_use_silu(True)
        writer.add_vision_n_wa_pattern(pattern)
        writer.add_vision_attention_layernorm_eps(float(config.get("rms_norm_eps", 1e-6)))


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
            _text_values(writer, config, kv_heads=heads, feed_forward=_feed_forward(text))
            writer.add_vocab_size(text["vocab_size"])
            writer.add_shortconv_l_cache(text["conv_L_cache"])

        pieces = _text_pieces(_ARCH.LFM2, config, names, change)
        return Plan(_KEYS[_ARCH.LFM2], "text", pieces, values, has_tokenizer=True)

    def vision(self, config: Config, preprocessor: Config, names: Sequence[str]) -> Plan:
        patch = int(config["vision_config"]["patch_size"])
        if int(config.get("vision_feature_layer", -1)) != -1:
            raise CheckpointError("vision_feature_layer: only -1, the last layer, has a GGUF export here")

        def special(rest: str, source: str) -> list[Piece] | None:
            if rest == "embeddings.patch_embedding.weight":  # (hidden, patch * patch * 3) -> a convolution
                change = lambda t: t.view(t.shape[0], patch, patch, 3).permute(0, 3, 1, 2)  # noqa: E731
                return [Piece("v.patch_embd.weight", source, change, "f16")]
            return None

        def values(writer: Any) -> None:
            vision = config["vision_config"]
            # the size is per picture; llama.cpp wants a number
            _vision_values(
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

        return Plan("clip", "vision", _vision_pieces(LFM2, names, special), values, has_tokenizer=False)


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


GGUF_FAMILIES: tuple[GgufFamily, ...] = (SmolVlmGguf(), InternVlGguf(), QwenVlGguf(), Lfm2VlGguf())


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
