"""Decoder graphs of standard operators and fixed shapes: a chunk of a prompt, or one token.

In: a transformers text model and its LM head. Out: an `onnx_ir.Model`: `inputs_embeds, position_ids,
past_mask, past_key_values.N.key|value [, logits_index] [, deepstack_embeds] -> logits, present.N.key|value`.
Not here: graphs of moving shapes (`decoder.py`), the other parts (`static.py`).

The past is read where it lies and never written: attention is taken over two pieces, the buffers and the new
tokens, whose scores meet in one softmax. So no graph has a scatter or a copy of the cache, and its outputs
are the new entries alone. Keys lie transposed, (1, KV, D, context), ready to be multiplied. Heads that share
keys are stacked as rows of one matrix, so nothing is repeated. What overflows float16 is scaled first
(`_rms_norm`); rotary angles come from tables, because cosines computed in float16 drift with the position.
All changes to transformers are scoped: they end with `_traceable`, also on an error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from export.decoder import (
    DEEPSTACK_INPUT,
    DecoderShape,
    _deepstacked,
    _frequencies,
    _PassThroughCache,
    to_onnx,
)
from export.targets import MASKED
from runtime.errors import CheckpointError

_KEY = "pocketvlm_static"


@dataclass(frozen=True)
class StaticSizes:
    """`context`: tokens that the buffers hold. `chunk`: tokens of a prefill run. `masked`: added to the score
    of a token that must not be seen."""

    context: int
    chunk: int
    masked: float = MASKED


@dataclass
class _Trace:
    """What the attention function of one trace reads and fills. Keys (1, KV, D, L), values (1, KV, L, D)."""

    past: Sequence[torch.Tensor] = ()
    present: dict[int, torch.Tensor] = field(default_factory=dict)
    past_mask: torch.Tensor | None = None
    causal: torch.Tensor | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    deepstack: torch.Tensor | None = None

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """(1, H, S, D), (1, KV, S, D) twice -> (1, S, H, D), as transformers' attention interface."""
        if sliding_window is not None or softcap is not None:
            raise CheckpointError("attention with a window or a cap on scores has no static graph here")
        assert self.past_mask is not None
        heads, length, width = query.shape[1:]
        kv_heads, layer = key.shape[1], int(module.layer_idx)  # type: ignore[arg-type]
        past_key, past_value = self.past[2 * layer], self.past[2 * layer + 1]
        rows = heads // kv_heads * length
        # the scale goes to the query: a product of float16 then overflows last
        scaled = query * float(scaling if scaling is not None else width**-0.5)
        stacked = scaled.reshape(1, kv_heads, rows, width)
        new_key = key.transpose(2, 3)
        before = stacked @ past_key + self.past_mask
        among = stacked @ new_key
        if self.causal is not None:
            among = among + self.causal
        weights = torch.cat([before, among], dim=-1).softmax(dim=-1)
        context = past_key.shape[3]
        out = weights[..., :context] @ past_value + weights[..., context:] @ value
        self.present[2 * layer], self.present[2 * layer + 1] = new_key, value
        return out.reshape(1, heads, length, width).transpose(1, 2), None


def _rms_norm(module: Any, hidden: torch.Tensor) -> torch.Tensor:
    """Stands in for an RMSNorm's forward during the trace; (..., hidden) -> same.

    x / sqrt(mean(x^2) + eps) = y / sqrt(mean(y^2) + eps / s^2) with y = x / s, where s is the largest
    magnitude (at least sqrt(eps)): squares are then at most 1, while x^2 overflows float16 above 256.
    """
    root = math.sqrt(float(getattr(module, "variance_epsilon", None) or module.eps))
    scale = hidden.abs().amax(dim=-1, keepdim=True).clamp(min=root)
    small = hidden / scale
    share = torch.tensor(root) / scale
    mean = (small * small).mean(dim=-1, keepdim=True) + share * share
    return small / mean.sqrt() * module.static_weight


class _Decoder(nn.Module):
    """Flat inputs around a text model: fixed shapes, the past as buffers."""

    def __init__(
        self, text: nn.Module, head: nn.Module, shape: DecoderShape, sizes: StaticSizes, length: int
    ) -> None:
        super().__init__()
        self.text, self.head, self._shape, self.trace = text, head, shape, _Trace()
        self._whole = length == 1
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.rows: torch.Tensor
        self.causal: torch.Tensor
        cos, sin = _rope_tables(text, sizes.context)
        self.register_buffer("cos", cos)
        self.register_buffer("sin", sin)
        if shape.position_rows > 1:
            owners = (_frequencies(text, shape) != 0).float()
            self.register_buffer("rows", torch.cat([owners, owners], -1)[:, :, None])
        later = torch.triu(torch.full((length, length), sizes.masked), diagonal=1)
        self.register_buffer("causal", later.repeat(shape.heads // shape.kv_heads, 1)[None, None])

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        past_mask: torch.Tensor,
        past: list[torch.Tensor],
        more: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """(1, S, hidden), (1, S) or (3, 1, S), (1, 1, 1, L), buffers, [(1,)] [(n, 1, S, hidden)]
        -> logits (1, 1, vocab), new entries."""
        trace, rest = self.trace, list(more)
        trace.past, trace.present, trace.past_mask = past, {}, past_mask
        trace.causal = None if self._whole else self.causal
        trace.rope = self._rotary(position_ids)
        last = None if self._whole else rest.pop(0)
        trace.deepstack = rest.pop(0) if rest else None
        out = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            position_ids=torch.zeros(1, inputs_embeds.shape[1], dtype=torch.long),  # the tables are asked
            past_key_values=_PassThroughCache(past[1].shape[2]),
            use_cache=True,
        )
        hidden = out.last_hidden_state
        if last is not None:  # the head is a quarter of a small model: one position is enough
            hidden = functional.embedding(last, hidden.reshape(-1, hidden.shape[-1]))[None]
        return (self.head(hidden), *(trace.present[i] for i in range(2 * self._shape.layers)))

    def _rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, S, D); with three rows of positions each frequency from the row that owns it."""
        found = [functional.embedding(position_ids, table) for table in (self.cos, self.sin)]
        if self._shape.position_rows > 1:
            found = [(table * self.rows).sum(0) for table in found]
        return found[0], found[1]


def _rope_tables(text: Any, context: int) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin (context, D) from the model's own rotary module."""
    with torch.no_grad():
        cos, sin = text.rotary_emb(torch.zeros(1, 1, 1), torch.arange(context)[None])
    return cos[0].clone().contiguous(), sin[0].clone().contiguous()


def _norm_weight(norm: Any) -> torch.Tensor:
    """What an RMSNorm multiplies by: its weight, or one more than it. Asked of the module itself."""
    with torch.no_grad():
        ones = torch.ones_like(norm.weight)
        got = norm(ones[None, None])[0, 0] * math.sqrt(
            1 + float(getattr(norm, "variance_epsilon", None) or norm.eps)
        )
        for weight in (norm.weight.detach(), norm.weight.detach() + 1.0):
            if torch.allclose(got, weight, rtol=1e-4, atol=1e-5):
                return weight.clone()
    raise CheckpointError(f"{type(norm).__name__}: multiplies by something else than its weight")


@contextlib.contextmanager
def normed(model: nn.Module) -> Iterator[None]:
    """Every RMSNorm of `model` is one that float16 does not overflow, inside this block only."""
    with contextlib.ExitStack() as undo:
        for norm in [m for m in model.modules() if type(m).__name__.endswith("RMSNorm")]:
            norm.register_buffer("static_weight", _norm_weight(norm), persistent=False)
            undo.callback(norm._buffers.pop, "static_weight", None)
            norm.forward = _rms_norm.__get__(norm)
            undo.callback(norm.__dict__.pop, "forward", None)
        yield


@contextlib.contextmanager
def _traceable(text: Any, trace: _Trace) -> Iterator[None]:
    """Attention, RMSNorm and rotary angles of `text` are the static ones inside this block only."""
    before = text.config._attn_implementation
    with contextlib.ExitStack() as undo:
        AttentionInterface.register(_KEY, trace.attention)
        undo.callback(AttentionInterface._global_mapping.pop, _KEY, None)
        AttentionMaskInterface.register(_KEY, lambda *_, **__: None)
        undo.callback(AttentionMaskInterface._global_mapping.pop, _KEY, None)
        text.config._attn_implementation = _KEY
        undo.callback(setattr, text.config, "_attn_implementation", before)
        undo.enter_context(normed(text))
        text.rotary_emb.forward = lambda *_, **__: trace.rope
        undo.callback(text.rotary_emb.__dict__.pop, "forward", None)
        yield


def io_names(shape: DecoderShape, *, chunked: bool) -> tuple[list[str], list[str]]:
    """Graph input and output names."""
    cache = [f"{i}.{kind}" for i in range(shape.layers) for kind in ("key", "value")]
    more = [*(["logits_index"] if chunked else []), *([DEEPSTACK_INPUT] if shape.deepstack_layers else [])]
    past = [f"past_key_values.{x}" for x in cache]
    return ["inputs_embeds", "position_ids", "past_mask", *past, *more], [
        "logits",
        *(f"present.{x}" for x in cache),
    ]


def trace_static(
    text: nn.Module, head: nn.Module, shape: DecoderShape, sizes: StaticSizes, length: int
) -> ir.Model:
    """Trace in float32 for `length` tokens a run. The modules are left as they were."""
    decoder = _Decoder(text, head, shape, sizes, length).eval()
    keys = (1, shape.kv_heads, shape.head_dim, sizes.context)
    values = (1, shape.kv_heads, sizes.context, shape.head_dim)
    rows = (shape.position_rows,) if shape.position_rows > 1 else ()
    stack = shape.deepstack_layers
    more = [torch.zeros(1, dtype=torch.int32)] if length > 1 else []
    more += [torch.zeros(stack, 1, length, shape.hidden)] if stack else []
    example = (
        torch.zeros(1, length, shape.hidden),
        torch.zeros(*rows, 1, length, dtype=torch.int32),
        torch.zeros(1, 1, 1, sizes.context),
        [torch.zeros(size) for _ in range(shape.layers) for size in (keys, values)],
        more,
    )
    inputs, outputs = io_names(shape, chunked=length > 1)
    with _traceable(text, decoder.trace), _deepstacked(text, decoder.trace, stack):  # type: ignore[arg-type]
        return to_onnx(decoder, example, inputs, outputs, None)
