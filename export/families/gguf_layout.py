"""Names and key-value pairs that families share in llama.cpp's files, and tables of their vision encoders.

In: config.json, the preprocessor's configuration and tensor names. Out: pieces and values of a `Plan`.
Not here: which family takes what (`gguf.py`, `gguf_gemma3.py`), reading or writing files.

Text names come from the table of the `gguf` package. Vision names are written out here: its table lacks the
layout that transformers writes for most families. Older and newer prefixes of transformers are both known.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import gguf

from export.families import gguf_rope
from export.gguf_plan import Change, Keep, Piece
from runtime.errors import CheckpointError

Config = Mapping[str, Any]
ARCH, KEYS = gguf.MODEL_ARCH, gguf.MODEL_ARCH_NAMES

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


class UnknownNames(CheckpointError):
    """Tensors that no table has; why, may show only when transformers reads them."""


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
        "layernorm": "v.post_ln",
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
    """Checkpoint name by its name in the text model alone; a head that stands for both is the embedding."""
    found = {short: name for name in names if (short := text_name(name))}
    if "lm_head.weight" in found and "embed_tokens.weight" not in found:
        found["embed_tokens.weight"] = found.pop("lm_head.weight")
    return found


def text_name(name: str) -> str:
    """A tensor's name in the text model alone; "" for what is no part of it."""
    return "" if _VISION.match(name) or not (match := _TEXT.match(name)) else match["rest"]


def text_pieces(
    arch: Any, config: Config, names: Sequence[str], change: Callable[[str], Change | None]
) -> tuple[Piece, ...]:
    """Every tensor of the text model under its name in GGUF; an output matrix only where it is not tied."""
    text = config["text_config"]
    _check_text(arch, text)
    table = gguf.get_tensor_name_map(arch, int(text["num_hidden_layers"]))
    pieces = []
    for name, source in _text_names(names).items():
        if _COMPUTED.search(name):
            continue
        full = name if name.startswith("lm_head") else f"model.{name}"
        target = table.get_name(full, try_suffixes=(".weight", ".bias"))
        if target is None:
            raise UnknownNames(
                f"{source}: no name for it in GGUF's {KEYS[arch]}; this model has a part not known here"
            )
        if target.endswith("attn_output.bias") and arch != ARCH.LLAMA:
            raise CheckpointError(
                f"{source}: llama.cpp's {KEYS[arch]} has no bias there; text_config.attention_bias cannot be "
                "exported to GGUF"
            )
        keep: Keep = "f32" if target.endswith("shortconv.conv.weight") else None
        pieces.append(Piece(target, source, change(target), keep))
    return (*pieces, *_scaling(arch, text, pieces))


def _check_text(arch: Any, text: Config) -> None:
    """Refuse, naming the setting, what llama.cpp's graph of this architecture does in its own way."""
    act = str(text.get("hidden_act", "silu"))
    if arch in _SILU and act not in ("silu", "swish"):
        raise CheckpointError(
            f"text_config.hidden_act is {act!r}; llama.cpp's {KEYS[arch]} knows 'silu' alone"
        )
    width = head_dim(text) * int(text["num_attention_heads"])
    if arch in _SQUARE and width != int(text["hidden_size"]):
        raise CheckpointError(
            f"text_config: heads are {width} wide together (head_dim {head_dim(text)}), hidden_size is "
            f"{text['hidden_size']}; llama.cpp's {KEYS[arch]} needs both equal"
        )
    if arch == ARCH.QWEN2VL and float(text["rms_norm_eps"]) > _UNREAD_EPSILON:
        raise CheckpointError(
            f"text_config.rms_norm_eps is {text['rms_norm_eps']}; llama.cpp takes 0 for {KEYS[arch]}, which "
            f"is near enough to {_UNREAD_EPSILON} at most"
        )


_SILU = (ARCH.LLAMA, ARCH.QWEN2, ARCH.QWEN3, ARCH.QWEN2VL, ARCH.QWEN3VL)
_SQUARE = (ARCH.QWEN2, ARCH.QWEN2VL, ARCH.LFM2)
_UNREAD_EPSILON = 1e-5
_COMPUTED = re.compile(r"(?:rotary_emb\.inv_freq|position_ids)$")
"""Buffers that older versions of transformers saved with the weights; no model reads them again."""


def _scaling(arch: Any, text: Config, pieces: Sequence[Piece]) -> tuple[Piece, ...]:
    """What divides the frequencies, where a kind of rotary scaling needs a tensor for it."""
    if arch == ARCH.GEMMA3 or (found := gguf_rope.divisors(text, head_dim(text))) is None:
        return ()
    if arch != ARCH.LLAMA:
        raise CheckpointError(f"text_config: rope_type 'llama3'; llama.cpp's {KEYS[arch]} does not know it")
    any_norm = next(piece.source for piece in pieces if piece.name == "output_norm.weight")
    return (Piece("rope_freqs.weight", any_norm, lambda tensor: tensor.new_tensor(found), "f32"),)


def text_values(
    writer: Any,
    config: Config,
    *,
    kv_heads: Any = None,
    feed_forward: int | None = None,
    rope_base: float | None = None,
) -> None:
    """Dimensions of a text model; what differs from its configuration may be given."""
    text = config["text_config"]
    writer.add_block_count(text["num_hidden_layers"])
    writer.add_context_length(text["max_position_embeddings"])
    writer.add_embedding_length(text["hidden_size"])
    writer.add_feed_forward_length(feed_forward or text["intermediate_size"])
    writer.add_head_count(text["num_attention_heads"])
    writer.add_head_count_kv(kv_heads or text["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(text.get("rms_norm_eps", text.get("norm_eps", 1e-6)))
    if rope_base is None:
        gguf_rope.write_values(writer, text)
    else:
        writer.add_rope_freq_base(rope_base)
    if text.get("head_dim"):
        writer.add_key_length(text["head_dim"])
        writer.add_value_length(text["head_dim"])


def head_dim(text: Config) -> int:
    return int(text.get("head_dim") or text["hidden_size"] // text["num_attention_heads"])


def rotate_half_to_pairs(heads: int) -> Change:
    """Rows of a query or key projection from transformers' order (halves) to ggml's (pairs)."""

    def change(tensor: Any) -> Any:
        rows = tensor.shape[0]
        halves = tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:])
        return halves.transpose(1, 2).reshape(tensor.shape)

    return change


# --- vision -----------------------------------------------------------


def vision_pieces(
    shape: Vision, names: Sequence[str], special: Callable[[str, str], list[Piece] | None]
) -> tuple[Piece, ...]:
    """`special(rest, source)` handles what is no plain renaming; None leaves a tensor to the table."""
    pieces: list[Piece] = []
    for source in names:
        match = _VISION.match(source)
        if match is None or _COMPUTED.search(source):
            continue
        rest = match["rest"]
        if (found := special(rest, source)) is not None:
            pieces += found
        else:
            pieces.append(_renamed(shape, rest, source))
    if not pieces:
        raise UnknownNames(
            "no vision tensors under a known name; an empty mmproj would say nothing of it"
            + (f" (tensors are called as {names[0]})" if names else "")
        )
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
        raise UnknownNames(
            f"{source}: no name for it in GGUF; this vision encoder has a part that is not known here"
        )
    return Piece(name, source, keep=shape.keep.get(name))


def check_act(config: Config, section: str, setting: str, known: Sequence[str]) -> None:
    """Raises CheckpointError naming an activation that llama.cpp's graph does not compute."""
    got = (config[section] if section else config).get(setting, known[0])
    if got not in known:
        place = f"{section}.{setting}" if section else setting
        raise CheckpointError(f"{place} is {got!r}; known with GGUF: {', '.join(known)}")


GELUS = ("gelu_pytorch_tanh", "gelu", "gelu_new")
"""ggml has one table for them, of float16 numbers."""


def vision_values(
    writer: Any, config: Config, preprocessor: Config, *, image: int, heads: str, layers: str
) -> None:
    vision = config["vision_config"]
    # llama.cpp divides bytes by 255; another factor of the processor goes into what is subtracted and divided
    scale = float(preprocessor.get("rescale_factor", 1 / 255)) * 255
    scale = 1.0 if abs(scale - 1) < 1e-6 else scale
    writer.add_clip_has_vision_encoder(True)
    writer.add_vision_projection_dim(config["text_config"]["hidden_size"])
    writer.add_vision_image_size(image)
    writer.add_vision_patch_size(first(vision["patch_size"]))
    writer.add_vision_embedding_length(vision["hidden_size"])
    writer.add_vision_feed_forward_length(vision["intermediate_size"])
    writer.add_vision_block_count(vision[layers])
    writer.add_vision_head_count(vision[heads])
    writer.add_vision_image_mean([float(x) / scale for x in preprocessor["image_mean"]])
    writer.add_vision_image_std([float(x) / scale for x in preprocessor["image_std"]])


def first(value: Any) -> int:
    return int(value[0] if isinstance(value, (list, tuple)) else value)
