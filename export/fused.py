"""Operators of `com.microsoft` that a traced module asks for by name; plain torch outside of `emitting`.

In: torch tensors inside a module's forward. Out: one ONNX node each, where `emitting` is on, else the same
function in torch operators (for eager tests, and for graphs of standard operators).
Not here: attention with a cache (`decoder.py`), fusions of what transformers wrote (`passes.py`).
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

_EMITTING = contextvars.ContextVar("emitting", default=False)


@contextlib.contextmanager
def emitting() -> Iterator[None]:
    """Inside this block the functions of this module become single nodes."""
    token = _EMITTING.set(True)
    try:
        yield
    finally:
        _EMITTING.reset(token)


@contextlib.contextmanager
def rms_norms(model: nn.Module) -> Iterator[None]:
    """Every RMSNorm of `model` becomes one `SimplifiedLayerNormalization` inside this block."""
    norms = [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]
    with contextlib.ExitStack() as undo:
        for norm in norms:
            norm.forward = _rms_norm.__get__(norm)
            undo.callback(norm.__dict__.pop, "forward", None)
        yield


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Stands in for an RMSNorm's forward during the trace; (..., hidden) -> same."""
    epsilon: float = getattr(module, "variance_epsilon", None) or module.eps
    return torch.onnx.ops.symbolic(
        "SimplifiedLayerNormalization",
        (hidden, module.weight),
        {"axis": -1, "epsilon": float(epsilon), "stash_type": 1},
        dtype=hidden.dtype,
        shape=hidden.shape,
        version=1,
    )


def rotate(
    x: torch.Tensor, row_ids: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, heads: int
) -> torch.Tensor:
    """Rotary embedding, halves rotated (arXiv 2104.09864): (B, S, heads * D) -> same.

    `cos`, `sin` (rows, D / 2), at least S rows; `row_ids` (B, S) int64 says which row a token takes.
    """
    if _EMITTING.get():
        return torch.onnx.ops.symbolic(
            "com.microsoft::RotaryEmbedding",
            (x, row_ids, cos, sin),
            {"interleaved": 0},
            dtype=x.dtype,
            shape=x.shape,
            version=1,
        )
    first, second = x.unflatten(-1, (heads, -1)).chunk(2, dim=-1)
    c, s = cos[row_ids][:, :, None], sin[row_ids][:, :, None]
    return torch.cat((first * c - second * s, second * c + first * s), dim=-1).flatten(-2)


def attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    heads: int,
    scale: float,
    keep: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention without order: three of (B, S, heads * D) -> (B, S, heads * D).

    `keep` (B, S) int32: 0 hides a key from every query.
    """
    if _EMITTING.get():
        inputs = [query, key, value, *([] if keep is None else [None, keep])]
        return torch.onnx.ops.symbolic(
            "com.microsoft::MultiHeadAttention",
            inputs,
            {"num_heads": heads, "scale": scale},
            dtype=query.dtype,
            shape=query.shape,
            version=1,
        )
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (query, key, value))
    mask = None if keep is None else keep.bool()[:, None, None]
    usual = math.isclose(scale, q.shape[-1] ** -0.5, rel_tol=1e-6)  # a converter may know no other
    out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=None if usual else scale)
    return out.transpose(1, 2).flatten(-2)


def quotient(number: torch.Tensor, divisor: torch.Tensor | int) -> torch.Tensor:
    """Whole quotient of non-negative int64 numbers; the tracer's own takes eight nodes, for signs."""
    if _EMITTING.get():
        if isinstance(divisor, int):
            divisor = torch.tensor(divisor)
        shape = torch.broadcast_shapes(number.shape, divisor.shape)
        return torch.onnx.ops.symbolic("Div", (number, divisor), dtype=number.dtype, shape=shape)
    return torch.div(number, divisor, rounding_mode="floor")
