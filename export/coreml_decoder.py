"""The text decoder as Core ML takes it: a chunk of a prompt or one token, keys and values in states.

In: a transformers text model and its LM head. Out: a torch module with flat inputs (`inputs_embeds,
position_ids, start, last [, deepstack_embeds] -> logits`) whose cache is in buffers, and an example of its
inputs. Not here: conversion (`coreml_convert.py`), decoders with the cache outside (`static_decoder.py`).

New keys and values are written at `start`; attention then reads whole buffers, under a mask that is computed
from `start`. What padding wrote is masked until a later token overwrites it. Heads that share keys are rows
of one matrix, so nothing is repeated, and the scale of the scores goes to the query: so attention stays one
operation. A short convolution's state goes on from `last`, so padding does not enter it. Norms and rotary
tables are those of `static_decoder.py`, which float16 does not break.
All changes to transformers are scoped: they end with `traceable`, also on an error.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from export.bidirectional import WindowedShape
from export.decoder import DEEPSTACK_INPUT, DecoderShape, _deepstacked, _frequencies, _PassThroughCache
from export.hybrid import HybridShape
from export.static_decoder import StaticSizes, _rope_tables, _traceable
from runtime.errors import CheckpointError

KEYS, VALUES, CONVOLUTIONS = "key_cache", "value_cache", "conv_state"
"""Names of the states: (attention layers, KV heads, context, head), the same, (conv layers, hidden, L)."""


@dataclass
class _Trace:
    """What attention and convolutions of one trace read; tensors of the step that is being traced."""

    decoder: Any = None
    start: torch.Tensor | None = None
    last: torch.Tensor | None = None
    mask: torch.Tensor | None = None
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
            raise CheckpointError("attention with a window or a cap on scores has no Core ML part here")
        assert self.start is not None and self.mask is not None
        heads, length, width = query.shape[1:]
        kv_heads = key.shape[1]
        place = self.decoder.places[int(module.layer_idx)]  # type: ignore[arg-type]
        begin = self.start[0]
        end = begin + length
        keys, values = self.decoder.key_cache, self.decoder.value_cache
        keys[place : place + 1, :, begin:end, :] = key
        values[place : place + 1, :, begin:end, :] = value
        stacked = scaled(query, scaling).reshape(1, kv_heads, heads // kv_heads * length, width)
        out = functional.scaled_dot_product_attention(
            stacked, keys[place : place + 1], values[place : place + 1], attn_mask=self.mask
        )
        return out.reshape(1, heads, length, width).transpose(1, 2), None

    def convolution(self, module: Any, hidden_states: torch.Tensor, **_: Any) -> torch.Tensor:
        """Stands in for a short convolution's forward; (1, S, hidden) -> same, and its state moves on.

        As `hybrid._short_conv`, but the new state ends at `last`: what is after it is padding.
        """
        assert self.last is not None
        before, after, values = module.in_proj(hidden_states).chunk(3, dim=-1)
        place, columns = self.decoder.places[int(module.layer_idx)], int(module.conv_kernel_size)
        states = self.decoder.conv_state
        full = torch.cat([states[place : place + 1], (before * values).transpose(1, 2)], dim=-1)
        kept = self.last + 1 + torch.arange(columns, dtype=torch.int32)
        states[place : place + 1] = full.index_select(2, kept)
        mixed = functional.conv1d(
            full[..., 1:], module.conv.weight, module.conv.bias, groups=module.conv.groups
        )
        return module.out_proj(after * mixed.transpose(1, 2))


def scaled(query: torch.Tensor, scaling: float | None) -> torch.Tensor:
    """The query for attention that divides scores by sqrt(D) itself: unchanged where that is the scale."""
    width = query.shape[-1]
    factor = 1.0 if scaling is None else float(scaling) * math.sqrt(width)
    return query if math.isclose(factor, 1.0, rel_tol=1e-6) else query * factor


class CoremlDecoder(nn.Module):
    """Flat inputs around a text model; buffers become states."""

    def __init__(
        self, text: nn.Module, head: nn.Module, shape: DecoderShape, sizes: StaticSizes, length: int
    ) -> None:
        super().__init__()
        self.head, self.text = head, text  # the head first: a matrix that both have is called the head's
        self.shape, self.sizes, self.length = shape, sizes, length
        self.trace = _Trace(decoder=self)
        self.places = places(shape)
        self.cos: torch.Tensor
        self.sin: torch.Tensor
        self.rows: torch.Tensor
        for name, table in zip(("cos", "sin"), _rope_tables(text, sizes.context), strict=True):
            self.register_buffer(name, table)
        if shape.position_rows > 1:
            owners = (_frequencies(text, shape) != 0).float()
            self.register_buffer("rows", torch.cat([owners, owners], -1)[:, :, None])
        for name, size in state_shapes(shape, sizes.context).items():
            self.register_buffer(name, torch.zeros(size))

    def forward(
        self,
        inputs_embeds: torch.Tensor,
        position_ids: torch.Tensor,
        start: torch.Tensor,
        last: torch.Tensor,
        deepstack_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """(1, S, hidden), (1 or 3, S), (1,), (1,) [, (n, 1, S, hidden)] -> logits (1, 1, vocab)."""
        trace = self.trace
        trace.start, trace.last, trace.deepstack = start, last, deepstack_embeds
        trace.mask, trace.rope = self._mask(start), self._rotary(position_ids)
        out = self.text(
            inputs_embeds=inputs_embeds,
            attention_mask=None,
            position_ids=torch.zeros(1, self.length, dtype=torch.long),  # the tables are asked
            past_key_values=_PassThroughCache(0),
            use_cache=True,
        )
        hidden = out.last_hidden_state  # the head is a quarter of a small model: one position is enough
        return self.head(hidden.index_select(1, last))

    def _mask(self, start: torch.Tensor) -> torch.Tensor:
        """(1, 1, rows, context): 0 where a token sees, else what float16 holds and softmax makes 0."""
        row = start + torch.arange(self.length, dtype=torch.int32)
        column = torch.arange(self.sizes.context, dtype=torch.int32)
        zero, masked = torch.zeros(1), torch.full((1,), self.sizes.masked)
        mask = torch.where(column[None] <= row[:, None], zero, masked)
        return mask.repeat(self.shape.heads // self.shape.kv_heads, 1)[None, None]

    def _rotary(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """cos and sin (1, S, D); with three rows of positions each frequency from the row that owns it."""
        found = [functional.embedding(position_ids, table) for table in (self.cos, self.sin)]
        if self.shape.position_rows > 1:
            found = [(table[:, None] * self.rows).sum(0) for table in found]
        return found[0], found[1]

    def example(self) -> dict[str, torch.Tensor]:
        """Inputs by name. No two are one object: a trace would take them for one input."""
        stack, hidden = self.shape.deepstack_layers, self.shape.hidden
        return {
            "inputs_embeds": torch.zeros(1, self.length, hidden),
            "position_ids": torch.zeros(self.shape.position_rows, self.length, dtype=torch.int32),
            "start": torch.zeros(1, dtype=torch.int32),
            "last": torch.zeros(1, dtype=torch.int32),
            **({DEEPSTACK_INPUT: torch.zeros(stack, 1, self.length, hidden)} if stack else {}),
        }


def check_shape(shape: DecoderShape, where: str) -> None:
    """Raises CheckpointError for a decoder that sees both ways or through windows."""
    if isinstance(shape, WindowedShape):
        raise CheckpointError(
            f"{where}: pictures whose tokens see each other, and windows, have no Core ML decoder here; "
            "use --to onnx"
        )


def kinds(shape: DecoderShape) -> tuple[str, ...]:
    """`attention` or `conv` by layer."""
    return shape.kinds if isinstance(shape, HybridShape) else ("attention",) * shape.layers


def places(shape: DecoderShape) -> tuple[int, ...]:
    """The row of each layer in the states of its kind."""
    by_layer = kinds(shape)
    return tuple(by_layer[:index].count(kind) for index, kind in enumerate(by_layer))


def state_shapes(shape: DecoderShape, context: int) -> dict[str, tuple[int, ...]]:
    """States by name."""
    layers = kinds(shape).count("attention")
    size = (layers, shape.kv_heads, context, shape.head_dim)
    found: dict[str, tuple[int, ...]] = {KEYS: size, VALUES: size}
    if isinstance(shape, HybridShape) and "conv" in shape.kinds:
        found[CONVOLUTIONS] = (shape.kinds.count("conv"), shape.hidden, shape.conv_columns)
    return found


@contextlib.contextmanager
def traceable(decoder: CoremlDecoder) -> Iterator[None]:
    """Attention, norms, rotary angles and short convolutions are this module's inside this block only."""
    text, trace = decoder.text, decoder.trace
    with (
        _traceable(text, trace),  # type: ignore[arg-type]
        _deepstacked(text, trace, decoder.shape.deepstack_layers),  # type: ignore[arg-type]
        contextlib.ExitStack() as undo,
    ):
        for module in text.modules():
            if type(module).__name__.endswith("ShortConv"):
                module.forward = partial(trace.convolution, module)
                undo.callback(module.__dict__.pop, "forward", None)
        yield
