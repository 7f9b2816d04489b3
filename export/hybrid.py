"""Decoders whose layers are attention or short gated convolutions, traced into one graph.

In: a transformers text model, its LM head and a `HybridShape`. Out: an `onnx_ir.Model` in the layout of
`decoder.py`, where a convolution layer N has `past_conv.N -> present_conv.N` instead of keys and values.
Not here: attention and RMSNorm (`decoder.py`), graph clean-up (`passes.py`).

A convolution's state holds the last L inputs of its kernel of size L, zeros at the start of a sequence. The
graph appends the step's inputs to it, convolves, and hands on the last L columns: the same nodes serve
prefill, decode and continuation. Padding would enter the state, so rows of a batch must have one length, and
a state cannot be cut back to an earlier token.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import onnx_ir as ir
import torch
from torch import nn

from export.decoder import DecoderShape, _Decoder, _Trace, _traceable, to_onnx

LayerKind = Literal["attention", "conv"]


@dataclass(frozen=True, kw_only=True)
class HybridShape(DecoderShape):
    """`kinds`: what each layer is; `conv_columns`: width of a convolution's state, its kernel size."""

    kinds: tuple[LayerKind, ...]
    conv_columns: int


def io_names(kinds: tuple[LayerKind, ...]) -> tuple[list[str], list[str]]:
    """Graph input and output names; layers keep their numbers, whatever their kind."""
    past, present = [], []
    for index, kind in enumerate(kinds):
        for name in ("key", "value") if kind == "attention" else ():
            past.append(f"past_key_values.{index}.{name}")
            present.append(f"present.{index}.{name}")
        if kind == "conv":
            past.append(f"past_conv.{index}")
            present.append(f"present_conv.{index}")
    return ["inputs_embeds", "attention_mask", "position_ids", *past], ["logits", *present]


def state_shape(shape: HybridShape, name: str, batch: int, past: int) -> tuple[int, ...]:
    """Dimensions of the state tensor called `name` after `past` tokens."""
    if "conv" in name:
        return batch, shape.hidden, shape.conv_columns
    return batch, shape.kv_heads, past, shape.head_dim


class _HybridDecoder(_Decoder):
    """Flat inputs around a text model, as `decoder.py` has them, with states of two kinds."""

    def __init__(self, text: nn.Module, head: nn.Module, shape: HybridShape, trace: _Trace) -> None:
        super().__init__(text, head, shape, trace)
        self._kinds = shape.kinds
        self.conv_states: dict[int, torch.Tensor] = {}

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """(B, S, hidden), (B, P + S), (B, S), states in the order of their names -> logits, new states."""
        left, keys = iter(past), {}
        self.conv_states.clear()
        for layer, kind in enumerate(self._kinds):
            if kind == "conv":
                self.conv_states[layer] = next(left)
            else:
                keys[2 * layer], keys[2 * layer + 1] = next(left), next(left)
        logits = self._logits(inputs_embeds, attention_mask, position_ids, keys)
        present: list[torch.Tensor] = []
        for layer, kind in enumerate(self._kinds):
            if kind == "conv":
                present.append(self.conv_states[layer])
            else:
                present += [self._trace.present[2 * layer], self._trace.present[2 * layer + 1]]
        return (logits, *present)


def _short_conv(
    module: Any, states: dict[int, torch.Tensor], hidden_states: torch.Tensor, **_: Any
) -> torch.Tensor:
    """Stands in for a short convolution's forward; (B, S, hidden) -> same, and its state moves on.

    `out_proj(C * conv(B * x))` with B, C, x from `in_proj`, causal and by channel: what transformers computes
    from a cache of the last L columns, in one form for every length.
    """
    before, after, values = module.in_proj(hidden_states).chunk(3, dim=-1)
    layer, columns = int(module.layer_idx), int(module.conv_kernel_size)
    full = torch.cat([states[layer], (before * values).transpose(1, 2)], dim=-1)  # (B, hidden, L + S)
    states[layer] = full[..., -columns:]
    mixed = nn.functional.conv1d(
        full[..., 1:], module.conv.weight, module.conv.bias, groups=module.conv.groups
    )
    return module.out_proj(after * mixed.transpose(1, 2))


@contextlib.contextmanager
def _convolving(text: nn.Module, states: dict[int, torch.Tensor]) -> Iterator[None]:
    """Short convolutions of `text` read and write `states` inside this block only."""
    with contextlib.ExitStack() as undo:
        for module in text.modules():
            if type(module).__name__.endswith("ShortConv"):
                module.forward = partial(_short_conv, module, states)
                undo.callback(module.__dict__.pop, "forward", None)
        yield


def trace_hybrid(text: nn.Module, head: nn.Module, shape: HybridShape) -> ir.Model:
    """Trace in float32 with dynamic batch, sequence and past. The modules are left as they were."""
    trace = _Trace()
    decoder = _HybridDecoder(text, head, shape, trace).eval()
    batch, length, past = 2, 5, 7
    inputs, outputs = io_names(shape.kinds)
    states = [
        torch.zeros(state_shape(shape, name, batch, past)) for name in inputs if name.startswith("past")
    ]
    example = (
        torch.zeros(batch, length, shape.hidden),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length).expand(batch, length).contiguous(),
        states,
    )
    auto = torch.export.Dim.DYNAMIC
    both = {0: auto, 1: auto}
    dynamic = (both, both, both, [{0: auto, 2: auto} if state.ndim == 4 else {0: auto} for state in states])
    with _traceable(text, trace, shape.folds_rope), _convolving(text, decoder.conv_states):
        return to_onnx(decoder, example, inputs, outputs, dynamic)
