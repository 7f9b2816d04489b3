"""One decoder graph for prefill, decode and continuation, with the fused attention emitted at trace time.

In: a transformers text model and its LM head. Out: an `onnx_ir.Model` in the onnx-community layout:
`inputs_embeds, attention_mask, position_ids, past_key_values.N.key|value [, deepstack_embeds] -> logits,
present.N.key|value`.
Not here: graph clean-up and fusions (`passes.py`), quantization (`quantize.py`).

Attention is `com.microsoft::GroupQueryAttention`, which appends to the cache itself. Rows of a batch may
differ in length when the padding is on the right and either the past is empty or one token is fed.
Positions of one row are rotated by that node; narrow heads and positions of three rows (M-RoPE) by
`RotaryEmbedding` before it, on cosines that all layers share.
All changes to transformers are scoped: they end with `_traceable`, also on an error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from onnxscript import rewriter
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from export import fused
from runtime.errors import CheckpointError

OPSET = 20
"""Floor of onnxruntime 1.23, the last one with a Python 3.10 wheel for aarch64 (it accepts up to 23)."""

IR_VERSION = 10
"""onnxruntime 1.23.2 refuses IR 12 and later."""

DEEPSTACK_INPUT = "deepstack_embeds"
"""Decoder input (layers, B, S, hidden): what is added after the first layers."""

_KEY = "pocketvlm_group_query"
_FOLDED_HEAD_MULTIPLE = 16  # CPU kernel with do_rotary=1: "head_size shall be a multiple of 16"
_HEAD_MULTIPLE = 8  # CPU kernel in any case: "head_size must be a multiple of 8"


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a text decoder that the cache and the attention node need.

    `position_rows`: 1, or 3 with M-RoPE. `deepstack_layers`: after how many layers something is added.
    """

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    max_positions: int
    position_rows: int = 1
    deepstack_layers: int = 0

    @property
    def folds_rope(self) -> bool:
        """Whether the attention node applies the rotary embedding itself."""
        return self.position_rows == 1 and self.head_dim % _FOLDED_HEAD_MULTIPLE == 0

    def check(self, where: str) -> None:
        """Raises CheckpointError when the fused attention cannot run this shape."""
        if self.head_dim % _HEAD_MULTIPLE:
            raise CheckpointError(
                f"{where}: text_config.head_dim is {self.head_dim}; GroupQueryAttention needs a multiple of "
                f"{_HEAD_MULTIPLE} (of {_FOLDED_HEAD_MULTIPLE} to fold RoPE); choose another head size"
            )


class _PassThroughCache(DynamicCache):
    """Returns new keys and values unchanged: the attention node does the append."""

    def __init__(self, past_length: int) -> None:
        super().__init__()
        self._past_length = past_length

    def update(self, key_states: Any, value_states: Any, layer_idx: int, *_: Any, **__: Any) -> Any:
        return key_states, value_states

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return self._past_length

    def get_mask_sizes(self, query_length: Any, layer_idx: int = 0) -> tuple[int, int]:
        return self._past_length + query_length, 0


@dataclass
class _Trace:
    """What the attention function of one trace reads and fills; (B, KV, P, D) per past tensor."""

    past: Sequence[torch.Tensor] | Mapping[int, torch.Tensor] = ()
    present: dict[int, torch.Tensor] = field(default_factory=dict)
    last_index_b: torch.Tensor | None = None
    total: torch.Tensor | None = None
    position_ids_bs: torch.Tensor | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None
    rows: tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None = None  # (B, S) into cos, sin (rows, D / 2)
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
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, H, S, D), (B, KV, S, D) twice -> (B, S, H, D), as transformers' attention interface.

        `sliding_window`: a token sees so many, itself included.
        """
        batch, heads, length, width = query.shape
        kv_heads, layer = key.shape[1], int(module.layer_idx)  # type: ignore[arg-type]
        past_key, past_value = self.past[2 * layer], self.past[2 * layer + 1]
        flat = [x.transpose(1, 2).reshape(batch, length, -1) for x in (query, key, value)]
        inputs = [*flat, past_key, past_value, self.last_index_b, self.total]
        if self.rope is not None:
            inputs += [*self.rope, self.position_ids_bs]
        cache_shape = (batch, kv_heads, past_key.shape[2] + length, width)
        out, present_key, present_value = torch.onnx.ops.symbolic_multi_out(
            "com.microsoft::GroupQueryAttention",
            inputs,
            {
                "num_heads": heads,
                "kv_num_heads": kv_heads,
                "scale": float(scaling if scaling is not None else width**-0.5),
                "do_rotary": int(self.rope is not None),
                "rotary_interleaved": 0,
                **({} if sliding_window is None else {"local_window_size": sliding_window}),
            },
            dtypes=[query.dtype] * 3,
            shapes=[(batch, length, heads * width), cache_shape, cache_shape],
            version=1,
        )
        self.present[2 * layer], self.present[2 * layer + 1] = present_key, present_value
        return out.view(batch, length, heads, width), None

    def rotated(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Query and key (B, H, S, D) by the rows of this step."""
        assert self.rows is not None
        out = []
        for tensor in tensors:
            batch, heads, length, width = tensor.shape
            flat = tensor.transpose(1, 2).reshape(batch, length, heads * width)
            turned = fused.rotate(flat, *self.rows, heads)
            out.append(turned.view(batch, length, heads, width).transpose(1, 2))
        return tuple(out)


class _Decoder(nn.Module):
    """Flat inputs around a text model, so that the exporter needs no cache class."""

    def __init__(self, text: nn.Module, head: nn.Module, shape: DecoderShape, trace: _Trace) -> None:
        super().__init__()
        self.text, self.head, self._shape, self._trace = text, head, shape, trace
        self.cos_cache: torch.Tensor
        self.sin_cache: torch.Tensor
        self.frequencies: torch.Tensor
        if shape.position_rows == 1:
            cos, sin = _rope_tables(text, shape)
            self.register_buffer("cos_cache", cos)
            self.register_buffer("sin_cache", sin)
        else:
            self.register_buffer("frequencies", _frequencies(text, shape))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
        deepstack_embeds: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, ...]:
        """(B, S, hidden), (B, P + S), (B, S) or (3, B, S), 2 x layers (B, KV, P, D) [, (n, B, S, hidden)]
        -> logits (B, S, vocab), presents."""
        self._trace.deepstack = deepstack_embeds
        logits = self._logits(inputs_embeds, attention_mask, position_ids, past)
        return (logits, *(self._trace.present[i] for i in range(2 * self._shape.layers)))

    def _logits(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: Sequence[torch.Tensor] | Mapping[int, torch.Tensor],
    ) -> torch.Tensor:
        """The step itself; keys of layer i are `past[2 * i]`, its values `past[2 * i + 1]`."""
        trace = self._trace
        trace.past, trace.present = past, {}
        trace.last_index_b = (attention_mask.sum(1) - 1).to(torch.int32)
        trace.total = (attention_mask[0].numel() * torch.ones((), dtype=torch.int32)).to(torch.int32)
        trace.position_ids_bs = position_ids
        trace.rope = (self.cos_cache, self.sin_cache) if self._shape.folds_rope else None
        trace.rows = None if self._shape.folds_rope else self._rows(position_ids)
        keys = next(iter(past.values())) if isinstance(past, Mapping) else past[0]
        out = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=_PassThroughCache(keys.shape[2]),
            use_cache=True,
        )
        return self.head(out.last_hidden_state)

    def _rows(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Row numbers (B, S) and the cosines and sines (rows, D / 2) that they point into."""
        if self._shape.position_rows == 1:
            return position_ids, self.cos_cache, self.sin_cache
        batch, length = position_ids.shape[1:]
        # one of the three products is no zero, so the sum is as exact as that product
        angles = (position_ids.reshape(3, -1, 1).float() * self.frequencies).sum(0)
        scale = float(self.text.rotary_emb.attention_scaling)  # type: ignore[union-attr, arg-type]
        cos, sin = (wave if scale == 1.0 else wave * scale for wave in (angles.cos(), angles.sin()))
        return torch.arange(batch * length).view(batch, length), cos, sin


def _rope_tables(text: nn.Module, shape: DecoderShape) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, (positions, head_dim / 2) each, from the model's own rotary module."""
    with torch.no_grad():
        positions = torch.arange(shape.max_positions)[None]
        cos, sin = text.rotary_emb(torch.zeros(1, 1, 1), positions)  # type: ignore[operator]
    half = shape.head_dim // 2
    return cos[0, :, :half].clone().contiguous(), sin[0, :, :half].clone().contiguous()


def _frequencies(text: Any, shape: DecoderShape) -> torch.Tensor:
    """(3, 1, head_dim / 2): each frequency in the position row that turns it, zero in the others.

    Which row that is comes from the model's own rotary module: only its own position moves a frequency.
    """
    half = shape.head_dim // 2
    found = torch.zeros(3, 1, half)
    with torch.no_grad():
        for row in range(3):
            positions = torch.zeros(3, 1, 1, dtype=torch.long)
            positions[row] = 1
            _, sin = text.rotary_emb(torch.zeros(1, 1, 1), positions)
            found[row, 0] = (sin[0, 0, :half] != 0) * text.rotary_emb.inv_freq
    if not ((found != 0).sum(0) == 1).all():
        raise CheckpointError("rotary embedding: a frequency is not turned by exactly one of three positions")
    return found


@contextlib.contextmanager
def _traceable(text: Any, trace: _Trace, fold_rope: bool) -> Iterator[None]:
    """Attention, RMSNorm and RoPE of `text` emit ONNX nodes inside this block only."""
    before = text.config._attn_implementation
    home = sys.modules[type(text).__module__]
    rotate = home.apply_rotary_pos_emb

    def rotated(q: torch.Tensor, k: torch.Tensor, *args: Any, **more: Any) -> Any:
        if fold_rope:
            return q, k
        return trace.rotated(q, k) if trace.rows is not None else rotate(q, k, *args, **more)

    with fused.emitting(), fused.rms_norms(text), contextlib.ExitStack() as undo:
        AttentionInterface.register(_KEY, trace.attention)
        undo.callback(AttentionInterface._global_mapping.pop, _KEY, None)
        AttentionMaskInterface.register(_KEY, lambda *_, **__: None)
        undo.callback(AttentionMaskInterface._global_mapping.pop, _KEY, None)
        text.config._attn_implementation = _KEY
        undo.callback(setattr, text.config, "_attn_implementation", before)
        home.apply_rotary_pos_emb = rotated  # type: ignore[attr-defined]
        undo.callback(setattr, home, "apply_rotary_pos_emb", rotate)
        yield


@contextlib.contextmanager
def _deepstacked(text: Any, trace: _Trace, layers: int) -> Iterator[None]:
    """Row i of `trace.deepstack` is added after layer i of `text` inside this block."""

    def add(index: int) -> Any:
        return lambda _, __, hidden: hidden + trace.deepstack[index]  # type: ignore[index]

    with contextlib.ExitStack() as undo:
        for index in range(layers):
            undo.callback(text.layers[index].register_forward_hook(add(index)).remove)
        yield


def io_names(layers: int, *, deepstack: bool = False) -> tuple[list[str], list[str]]:
    """Graph input and output names of the onnx-community layout."""
    cache = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{x}" for x in cache)]
    return [*inputs, *([DEEPSTACK_INPUT] if deepstack else [])], ["logits", *(f"present.{x}" for x in cache)]


def trace_decoder(text: nn.Module, head: nn.Module, shape: DecoderShape) -> ir.Model:
    """Trace in float32 with dynamic batch, sequence and past. The modules are left as they were."""
    trace = _Trace()
    decoder = _Decoder(text, head, shape, trace).eval()
    batch, length, past = 2, 5, 7
    cache = [torch.zeros(batch, shape.kv_heads, past, shape.head_dim) for _ in range(2 * shape.layers)]
    rows = (shape.position_rows,) if shape.position_rows > 1 else ()
    stack = shape.deepstack_layers
    example = (
        torch.zeros(batch, length, shape.hidden),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length).expand(*rows, batch, length).contiguous(),
        cache,
        *([torch.zeros(stack, batch, length, shape.hidden)] if stack else []),
    )
    auto = torch.export.Dim.DYNAMIC
    both, later = {0: auto, 1: auto}, {1: auto, 2: auto}
    dynamic = (
        both,
        both,
        later if rows else both,
        [{0: auto, 2: auto} for _ in cache],
        *([later] if stack else []),
    )
    inputs, outputs = io_names(shape.layers, deepstack=stack > 0)
    with _traceable(text, trace, shape.folds_rope), _deepstacked(text, trace, stack):
        return to_onnx(decoder, example, inputs, outputs, dynamic)


def to_onnx(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: tuple[Any, ...] | None,
) -> ir.Model:
    """`torch.onnx.export` at our opset and IR floor, without its chatter."""
    noisy = logging.getLogger("torch.onnx")
    level = noisy.level
    noisy.setLevel(logging.ERROR)
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.onnx.export(
                module,
                example,
                dynamo=True,
                input_names=inputs,
                output_names=outputs,
                dynamic_shapes=dynamic,
                opset_version=OPSET,
                verbose=False,
            )
    finally:
        noisy.setLevel(level)
    assert program is not None
    program.model.ir_version = IR_VERSION
    _let_go()
    return program.model


def _let_go() -> None:
    """onnxscript's rewrite rules hold the last graph that they saw, its weights too: show them another."""
    value = ir.Value(name="x", type=ir.TensorType(ir.DataType.FLOAT), shape=ir.Shape([1]))
    node = ir.node("Identity", [value])
    rewriter.rewrite(
        ir.Model(
            ir.Graph([value], node.outputs, nodes=[node], opset_imports={"": OPSET}), ir_version=IR_VERSION
        )
    )
