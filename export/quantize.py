"""Weight precision as ordered rules per part, and the rounding itself.

In: a float32 `onnx_ir.Model` of a part. Out: a quantized model and the bits its weights really have.
Not here: proof that only the weights changed (`audit.py`), tracing.

The first rule that matches a node decides. A node that its scheme does not allow stays float32, and the
bits recorded for the part show it.
"""

from __future__ import annotations

import collections
import fnmatch
import logging
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import add_initializer, constant
from runtime.errors import InputError
from runtime.manifest import WeightBits

Scheme = Literal["keep", "int8-dynamic", "int8-row", "int4-block32"]

BLOCK = 32
ACCURACY_LEVEL = 4  # activations rounded to int8 per block: the fast CPU kernel


@dataclass(frozen=True)
class Rule:
    """Nodes of `part` whose `op_type:name` matches `node` get `scheme`. Patterns as in fnmatch."""

    part: str
    node: str
    scheme: Scheme


POLICIES: dict[str, tuple[Rule, ...]] = {
    "fp32": (Rule("*", "*", "keep"),),
    "int8": (
        Rule("embed_tokens", "Gather:*", "int8-row"),
        Rule("*", "MatMul:*", "int8-dynamic"),
        Rule("*", "*", "keep"),
    ),
    # int4 vision loses 29 % (relative error) for no gain in speed, so vision stays at 8 bits
    "int4": (
        Rule("embed_tokens", "Gather:*", "int8-row"),
        Rule("decoder", "MatMul:*", "int4-block32"),
        Rule("vision_encoder", "MatMul:*", "int8-dynamic"),
        Rule("*", "*", "keep"),
    ),
}

_SUFFIXES = {4: "_q4", 8: "_int8"}
"""File suffixes of the onnx-community layout, by the fewest bits in the part."""


def policy(precision: str) -> tuple[Rule, ...]:
    """The rules of a named precision. Raises InputError naming the known ones."""
    try:
        return POLICIES[precision]
    except KeyError:
        raise InputError(f"precision {precision!r} is not known; choose from {', '.join(POLICIES)}") from None


def scheme_of(node: ir.Node, part: str, rules: Sequence[Rule]) -> Scheme:
    """The scheme of the first matching rule; `keep` when none matches or the node has no fitting weight."""
    label = f"{node.op_type}:{node.name}"
    for rule in rules:
        if fnmatch.fnmatchcase(part, rule.part) and fnmatch.fnmatchcase(label, rule.node):
            return rule.scheme if rule.scheme == "keep" or _allowed(node, rule.scheme) else "keep"
    return "keep"


def _allowed(node: ir.Node, scheme: Scheme) -> bool:
    """Whether the node has a constant two-dimensional float weight where the scheme expects it."""
    index = 0 if scheme == "int8-row" else 1
    weight = constant(node.inputs[index]) if len(node.inputs) > index else None
    if weight is None or weight.ndim != 2 or weight.dtype != np.float32:
        return False
    return scheme != "int4-block32" or weight.shape[0] >= BLOCK  # else more padding than weights


def quantize(model: ir.Model, part: str, rules: Sequence[Rule]) -> ir.Model:
    """A quantized copy of `model`; `model` itself is not changed."""
    _name_nodes(model)
    chosen: dict[Scheme, list[str]] = collections.defaultdict(list)
    for node in model.graph:
        chosen[scheme_of(node, part, rules)].append(str(node.name))
    result = ir.from_proto(ir.to_proto(model))
    for scheme, apply in _APPLY.items():
        if chosen[scheme]:
            result = apply(result, chosen[scheme])
    common.RemoveUnusedNodesPass()(result)
    return result


def _name_nodes(model: ir.Model) -> None:
    """The quantizers address nodes by name: give every node one of its own."""
    seen: set[str] = set()
    for index, node in enumerate(model.graph):
        if not node.name or node.name in seen:
            node.name = f"{node.op_type}_{index}"
        seen.add(node.name)


def _rows_to_int8(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Embedding table -> int8 rows with one symmetric scale each; standard operators only."""
    wanted, graph = set(names), model.graph
    for node in [n for n in graph if n.name in wanted]:
        table, indices = node.inputs
        weight = constant(table)
        assert weight is not None and table is not None
        scale = np.maximum(np.abs(weight).max(axis=1, keepdims=True) / 127.0, np.finfo(np.float32).tiny)
        rounded = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        quantized = add_initializer(graph, f"{table.name}.int8", rounded)
        scales = add_initializer(graph, f"{table.name}.scale", scale.astype(np.float32))
        axis = {"axis": 0}
        rows = ir.node("Gather", [quantized, indices], attributes=axis, name=f"{node.name}.rows")
        cast = ir.node(
            "Cast", [rows.outputs[0]], attributes={"to": ir.DataType.FLOAT}, name=f"{node.name}.cast"
        )
        factor = ir.node("Gather", [scales, indices], attributes=axis, name=f"{node.name}.scale")
        product = ir.node("Mul", [cast.outputs[0], factor.outputs[0]], name=f"{node.name}.product")
        graph.insert_before(node, [rows, cast, factor, product])
        old, new = node.outputs[0], product.outputs[0]
        new.dtype, new.shape, name = ir.DataType.FLOAT, old.shape, old.name
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        graph.remove(node, safe=True)
        new.name = name
    _drop_unused_weights(model)
    return model


def _matmul_to_int8(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Weights to symmetric int8 per output channel, activations to uint8 per tensor at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet_root():
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        proto = ir.to_proto(model)
        del proto.graph.value_info[:]
        onnx.save(proto, source)
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            weight_type=QuantType.QInt8,
            # custom operators stop its shape inference, so it must be told what their outputs are
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        found = ir.from_proto(onnx.load(target))
    found.ir_version = model.ir_version
    return found


def _matmul_to_int4(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """`com.microsoft::MatMulNBits`: symmetric 4-bit blocks of 32 along the input width."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    with _quiet_root():
        quantizer = MatMulNBitsQuantizer(
            ir.to_proto(model),
            bits=4,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=ACCURACY_LEVEL,
            nodes_to_include=list(names),
        )
        quantizer.process()
    found = ir.from_proto(quantizer.model.model)
    found.ir_version = model.ir_version
    return found


_APPLY: dict[Scheme, Callable[[ir.Model, Iterable[str]], ir.Model]] = {
    "int8-row": _rows_to_int8,
    "int4-block32": _matmul_to_int4,
    "int8-dynamic": _matmul_to_int8,
}


class _quiet_root:
    """The quantizers log to the root logger (some at warning level, about shape inference)."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)


def _drop_unused_weights(model: ir.Model) -> None:
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output():
            del model.graph.initializers[name]


def weight_bits(model: ir.Model) -> tuple[WeightBits, ...]:
    """What is really stored: parameters by bits and scheme, weights and scales apart, largest bits last."""
    counts: collections.Counter[tuple[int, str]] = collections.Counter()
    for value in model.graph.initializers.values():
        array = constant(value)
        if array is None or array.size <= 1 or array.dtype == np.int64 or _is_zero_point(value):
            continue  # int64 are shapes
        counts[_storage(value)] += _logical_size(value, array)
    return tuple(
        WeightBits(bits=bits, parameters=number, scheme=scheme)
        for (bits, scheme), number in sorted(counts.items())
    )


def _is_zero_point(value: ir.Value) -> bool:
    return any(node.op_type == "MatMulInteger" and index == 3 for node, index in value.uses())


def suffix(model: ir.Model) -> str:
    """`_q4`, `_int8` or nothing: what the part really holds, so an int4 bundle's vision is `_int8`."""
    return _SUFFIXES.get(min((entry.bits for entry in weight_bits(model)), default=32), "")


def _storage(value: ir.Value) -> tuple[int, str]:
    users = {node.op_type for node, _ in value.uses()}
    array = constant(value)
    assert array is not None
    if "MatMulNBits" in users and array.dtype == np.uint8:
        return 4, "int4-block32"
    if array.dtype in (np.int8, np.uint8):
        return 8, "int8-dynamic" if "MatMulInteger" in users else "int8-row"
    return 8 * array.dtype.itemsize, str(array.dtype)


def _logical_size(value: ir.Value, array: np.ndarray) -> int:
    """Parameters that a stored array holds: a packed int4 array has K x N of them, without its padding."""
    for node, _ in value.uses():
        if node.op_type == "MatMulNBits" and array.dtype == np.uint8:
            return int(node.attributes["K"].as_int() * node.attributes["N"].as_int())
    return int(array.size)
