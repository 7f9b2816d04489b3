"""One decoder graph for prefill, decode and continuation, with the fused attention emitted at trace time.

In: a transformers text model and its LM head. Out: an `onnx_ir.Model` in the onnx-community layout:
`inputs_embeds, attention_mask, position_ids, past_key_values.N.key|value -> logits, present.N.key|value`.
Not here: graph clean-up and fusions (`passes.py`), quantization (`quantize.py`).

Attention is `com.microsoft::GroupQueryAttention`, which appends to the cache itself. Rows of a batch may
differ in length when the padding is on the right and either the past is empty or one token is fed.
All changes to transformers are scoped: they end with `_traceable`, also on an error.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import onnx_ir as ir
import torch
from torch import nn
from transformers import AttentionInterface, DynamicCache
from transformers.masking_utils import AttentionMaskInterface

from runtime.errors import CheckpointError

OPSET = 20
"""Floor of onnxruntime 1.23, the last one with a Python 3.10 wheel for aarch64 (it accepts up to 23)."""

IR_VERSION = 10
"""onnxruntime 1.23.2 refuses IR 12 and later."""

_KEY = "pocketvlm_group_query"
_FOLDED_HEAD_MULTIPLE = 16  # CPU kernel with do_rotary=1: "head_size shall be a multiple of 16"
_HEAD_MULTIPLE = 8  # CPU kernel in any case: "head_size must be a multiple of 8"


@dataclass(frozen=True)
class DecoderShape:
    """The numbers of a text decoder that the cache and the attention node need."""

    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    vocab: int
    max_positions: int

    @property
    def folds_rope(self) -> bool:
        """Whether the attention node applies the rotary embedding itself."""
        return self.head_dim % _FOLDED_HEAD_MULTIPLE == 0

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

    past: Sequence[torch.Tensor] = ()
    present: dict[int, torch.Tensor] = field(default_factory=dict)
    last_index_b: torch.Tensor | None = None
    total: torch.Tensor | None = None
    position_ids_bs: torch.Tensor | None = None
    rope: tuple[torch.Tensor, torch.Tensor] | None = None

    def attention(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        scaling: float | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """(B, H, S, D), (B, KV, S, D) twice -> (B, S, H, D), as transformers' attention interface."""
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
            },
            dtypes=[query.dtype] * 3,
            shapes=[(batch, length, heads * width), cache_shape, cache_shape],
            version=1,
        )
        self.present[2 * layer], self.present[2 * layer + 1] = present_key, present_value
        return out.view(batch, length, heads, width), None


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


class _Decoder(nn.Module):
    """Flat inputs around a text model, so that the exporter needs no cache class."""

    def __init__(self, text: nn.Module, head: nn.Module, shape: DecoderShape, trace: _Trace) -> None:
        super().__init__()
        self.text, self.head, self._shape, self._trace = text, head, shape, trace
        self.cos_cache: torch.Tensor
        self.sin_cache: torch.Tensor
        if shape.folds_rope:
            cos, sin = _rope_tables(text, shape)
            self.register_buffer("cos_cache", cos)
            self.register_buffer("sin_cache", sin)

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """(B, S, hidden), (B, P + S), (B, S), 2 x layers (B, KV, P, D) -> logits (B, S, vocab), presents."""
        trace = self._trace
        trace.past, trace.present = past, {}
        trace.last_index_b = (attention_mask.sum(1) - 1).to(torch.int32)
        trace.total = (attention_mask[0].numel() * torch.ones((), dtype=torch.int32)).to(torch.int32)
        trace.position_ids_bs = position_ids
        trace.rope = (self.cos_cache, self.sin_cache) if self._shape.folds_rope else None
        out = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            position_ids=position_ids,
            past_key_values=_PassThroughCache(past[0].shape[2]),
            use_cache=True,
        )
        logits = self.head(out.last_hidden_state)
        return (logits, *(trace.present[i] for i in range(2 * self._shape.layers)))


def _rope_tables(text: nn.Module, shape: DecoderShape) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin of every position, (positions, head_dim / 2) each, from the model's own rotary module."""
    with torch.no_grad():
        positions = torch.arange(shape.max_positions)[None]
        cos, sin = text.rotary_emb(torch.zeros(1, 1, 1), positions)  # type: ignore[operator]
    half = shape.head_dim // 2
    return cos[0, :, :half].clone().contiguous(), sin[0, :, :half].clone().contiguous()


@contextlib.contextmanager
def _traceable(text: Any, trace: _Trace, fold_rope: bool) -> Iterator[None]:
    """Attention, RMSNorm and (when folded) RoPE of `text` emit ONNX nodes inside this block only."""
    norms = [module for module in text.modules() if type(module).__name__.endswith("RMSNorm")]
    before = text.config._attn_implementation
    home = sys.modules[type(text).__module__]
    with contextlib.ExitStack() as undo:
        AttentionInterface.register(_KEY, trace.attention)
        undo.callback(AttentionInterface._global_mapping.pop, _KEY, None)
        AttentionMaskInterface.register(_KEY, lambda *_, **__: None)
        undo.callback(AttentionMaskInterface._global_mapping.pop, _KEY, None)
        text.config._attn_implementation = _KEY
        undo.callback(setattr, text.config, "_attn_implementation", before)
        for norm in norms:
            norm.forward = _rms_norm.__get__(norm)
            undo.callback(norm.__dict__.pop, "forward", None)
        if fold_rope:
            rotate = home.apply_rotary_pos_emb
            home.apply_rotary_pos_emb = lambda q, k, *_, **__: (q, k)  # type: ignore[attr-defined]
            undo.callback(setattr, home, "apply_rotary_pos_emb", rotate)
        yield


def io_names(layers: int) -> tuple[list[str], list[str]]:
    """Graph input and output names of the onnx-community layout."""
    cache = [f"{i}.{kind}" for i in range(layers) for kind in ("key", "value")]
    inputs = ["inputs_embeds", "attention_mask", "position_ids", *(f"past_key_values.{x}" for x in cache)]
    return inputs, ["logits", *(f"present.{x}" for x in cache)]


def trace_decoder(text: nn.Module, head: nn.Module, shape: DecoderShape) -> ir.Model:
    """Trace in float32 with dynamic batch, sequence and past. The modules are left as they were."""
    trace = _Trace()
    decoder = _Decoder(text, head, shape, trace).eval()
    batch, length, past = 2, 5, 7
    cache = [torch.zeros(batch, shape.kv_heads, past, shape.head_dim) for _ in range(2 * shape.layers)]
    example = (
        torch.zeros(batch, length, shape.hidden),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length).expand(batch, length).contiguous(),
        cache,
    )
    auto = torch.export.Dim.DYNAMIC
    dynamic = (
        {0: auto, 1: auto},
        {0: auto, 1: auto},
        {0: auto, 1: auto},
        [{0: auto, 2: auto} for _ in cache],
    )
    inputs, outputs = io_names(shape.layers)
    with _traceable(text, trace, shape.folds_rope):
        return to_onnx(decoder, example, inputs, outputs, dynamic)


def to_onnx(
    module: nn.Module,
    example: tuple[Any, ...],
    inputs: list[str],
    outputs: list[str],
    dynamic: tuple[Any, ...],
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
    return program.model
