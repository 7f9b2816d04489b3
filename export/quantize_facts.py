"""What a written part really holds: bits of its weights, its file suffix, the runtime it needs.

In: a model as it is in the file. Out: facts for the manifest. Not here: choosing or rounding.
"""

from __future__ import annotations

import collections

import numpy as np
import onnx_ir as ir

from export.passes import constant
from runtime.manifest import WeightBits

FLOOR = "1.23"
"""onnxruntime that opens every scheme but those in `min_onnxruntime`; tiny bundles were run there."""

INT8_CACHE = "1.27"
"""First onnxruntime whose CPU kernel takes an int8 KV cache."""

GPTQ = ".gptq"
"""End of the name of a node whose blocks were calibrated."""

_SUFFIXES = {4: "_q4", 8: "_int8", 16: "_fp16"}
"""File suffixes of the onnx-community layout, by the fewest bits in the part."""


_INDICES = (np.int64, np.int32, np.bool_)
"""Shapes, positions and masks are no weights."""


def weight_bits(model: ir.Model) -> tuple[WeightBits, ...]:
    """What is really stored: parameters by bits and scheme, weights and scales apart, largest bits last."""
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    for value in model.graph.initializers.values():
        array = constant(value)
        if array is None or array.size <= 1 or array.dtype in _INDICES or _is_zero_point(value):
            continue
        counts[_storage(value)] += _logical_size(value, array)
    return tuple(
        WeightBits(bits=bits, parameters=number, scheme=scheme)
        for (bits, scheme), number in sorted(counts.items())
    )


def suffix(model: ir.Model) -> str:
    """`_q4`, `_q4f16`, `_int8`, `_fp16` or nothing, by what the part holds (int4's vision is `_int8`)."""
    bits = {entry.bits for entry in weight_bits(model)}
    return "_q4f16" if {4, 16} <= bits else _SUFFIXES.get(min(bits, default=32), "")


def min_onnxruntime(model: ir.Model) -> str:
    """The oldest onnxruntime that runs the part on the CPU."""
    cached = any("k_quant_type" in n.attributes for n in model.graph if n.op_type == "GroupQueryAttention")
    return INT8_CACHE if cached else FLOOR


def _is_zero_point(value: ir.Value) -> bool:
    places = (("MatMulInteger", 3), ("QuantizeLinear", 2), ("DequantizeLinear", 2))
    return any((node.op_type, index) in places for node, index in value.uses())


def _storage(value: ir.Value) -> tuple[int, str]:
    users = {node.op_type for node, _ in value.uses()}
    array = constant(value)
    assert array is not None
    if "MatMulNBits" in users and array.dtype == np.uint8:
        node = next(node for node, _ in value.uses())
        bits, size = node.attributes["bits"].as_int(), node.attributes["block_size"].as_int()
        return bits, f"int{bits}-block{size}{'-gptq' if str(node.name).endswith(GPTQ) else ''}"
    if "DequantizeLinear" in users:
        return 8 * array.dtype.itemsize, f"qdq-{array.dtype}"
    if array.dtype in (np.int8, np.uint8):
        return 8, "int8-dynamic" if "MatMulInteger" in users else "int8-row"
    if array.dtype == np.float16:
        return 16, "fp16"
    return 8 * array.dtype.itemsize, str(array.dtype)


def _logical_size(value: ir.Value, array: np.ndarray) -> int:
    """Parameters that a stored array holds: packed blocks have K x N of them, without their padding."""
    for node, _ in value.uses():
        if node.op_type == "MatMulNBits" and array.dtype == np.uint8:
            return int(node.attributes["K"].as_int() * node.attributes["N"].as_int())
    return int(array.size)
