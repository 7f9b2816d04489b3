"""Fused attention and norms in a vision encoder's graph (`ort-fused`).

In: a torch vision module about to be traced, then its `onnx_ir` graph. Out: the same function with
`com.microsoft::MultiHeadAttention` and `SkipLayerNormalization`. Not here: the text decoder (`decoder.py`).

Attention without a mask is emitted at trace time, through transformers' `AttentionInterface`; one with a mask
(windows, padded patches) stays as it is. All changes to transformers end with `emitted_attention`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from export import passes

_KEY = "pocketvlm_multi_head"


def _attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **more: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(B, H, S, D) three times -> (B, S, H, D), as transformers' attention interface."""
    batch, heads, length, width = query.shape
    if attention_mask is not None or more.get("is_causal") or key.shape[1] != heads:
        plain: Any = AttentionInterface()["sdpa"]
        return plain(module, query, key, value, attention_mask, scaling=scaling, **more)
    flat = [x.transpose(1, 2).reshape(x.shape[0], x.shape[2], heads * width) for x in (query, key, value)]
    out = torch.onnx.ops.symbolic(
        "com.microsoft::MultiHeadAttention",
        flat,
        {"num_heads": heads, "scale": float(scaling if scaling is not None else width**-0.5)},
        dtype=query.dtype,
        shape=(batch, length, heads * width),
        version=1,
    )
    return out.view(batch, length, heads, width), None


@contextlib.contextmanager
def emitted_attention(module: nn.Module) -> Iterator[None]:
    """Attention layers of `module` emit `MultiHeadAttention` inside this block only."""
    layers = [each for each in module.modules() if type(each).__name__.endswith("Attention")]
    configs: dict[int, Any] = {
        id(each.config): each.config
        for each in layers
        if hasattr(getattr(each, "config", None), "_attn_implementation")
    }
    with contextlib.ExitStack() as undo:
        AttentionInterface.register(_KEY, _attention)
        undo.callback(AttentionInterface._global_mapping.pop, _KEY, None)
        AttentionMaskInterface.register(_KEY, AttentionMaskInterface()["sdpa"])
        undo.callback(AttentionMaskInterface._global_mapping.pop, _KEY, None)
        for config in configs.values():
            undo.callback(setattr, config, "_attn_implementation", config._attn_implementation)
            config._attn_implementation = _KEY
        yield


def drop_reshape_after_attention(model: ir.Model) -> int:
    """The tracer joins (B, S, H*D) -> (B, S, H, D) -> (B, S, H*D) into one Reshape that changes nothing."""
    dropped = 0
    for node in list(model.graph):
        if node.op_type != "MultiHeadAttention":
            continue
        out = node.outputs[0]
        for user, _ in list(out.uses()):
            if user.op_type == "Reshape" and _dimensions(user.outputs[0]) == _dimensions(out) is not None:
                user.outputs[0].replace_all_uses_with(out)
                model.graph.remove(user, safe=True)
                dropped += 1
    return dropped


def fuse_skip_layer_norm(model: ir.Model) -> int:
    """Residual add followed by LayerNorm -> `com.microsoft::SkipLayerNormalization`."""
    graph, fused = model.graph, 0
    for node in list(graph):
        add = passes.producer(node.inputs[0], "Add") if node.op_type == "LayerNormalization" else None
        if add is None or len(node.inputs) != 3 or not _same_shape(*add.inputs) or _axis(node) != -1:
            continue
        skip = ir.node(
            "SkipLayerNormalization",
            [add.inputs[0], add.inputs[1], node.inputs[1], node.inputs[2]],
            attributes={"epsilon": _epsilon(node)},
            domain=passes.MICROSOFT,
            num_outputs=4,
            name=f"{node.name}.skip",
        )
        for index, (output, like) in enumerate(
            zip(skip.outputs, (node.outputs[0], None, None, add.outputs[0]), strict=True)
        ):
            output.name = f"{node.name}.skip.out{index}"
            if like is not None:
                output.type, output.shape = like.type, like.shape
        graph.insert_before(node, skip)
        node.outputs[0].replace_all_uses_with(skip.outputs[0])
        add.outputs[0].replace_all_uses_with(skip.outputs[3])
        graph.remove([node, add], safe=True)
        fused += 1
    return fused


def _same_shape(first: ir.Value | None, second: ir.Value | None) -> bool:
    """Whether both are computed and of one known shape: the fused node broadcasts nothing."""
    if passes.constant(first) is not None or passes.constant(second) is not None:
        return False
    return _dimensions(first) == _dimensions(second) is not None


def _dimensions(value: ir.Value | None) -> list[str] | None:
    """Sizes and symbols of a known shape."""
    return None if value is None or value.shape is None else list(map(str, value.shape))


def _axis(node: ir.Node) -> int:
    """-1 (the default) also where the last axis is written as a number."""
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else -1
    shape = node.inputs[0].shape if node.inputs[0] is not None else None
    return -1 if shape is not None and axis == len(shape) - 1 else axis


def _epsilon(node: ir.Node) -> float:
    return node.attributes["epsilon"].as_float() if "epsilon" in node.attributes else 1e-5


VISION_PASSES: tuple[Callable[[ir.Model], int], ...] = (
    passes.name_weights,
    passes.fold_reshapes,
    drop_reshape_after_attention,
    fuse_skip_layer_norm,
)
"""In order; each changes nothing where its pattern does not occur."""
