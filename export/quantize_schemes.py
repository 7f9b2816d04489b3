"""How each scheme writes its nodes: int8 rows, dynamic int8, 4 and 8 bit blocks, the int8 KV cache.

In: an `onnx_ir.Model` and names of its nodes. Out: the model with these nodes rewritten. Not here: which node
gets what (`quantize.py`), float16 (`quantize_fp16.py`), calibrated blocks (`gptq.py`).
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping

import numpy as np
import onnx
import onnx_ir as ir

from export.passes import add_initializer, constant

ACCURACY_LEVEL = 4  # activations rounded to int8 per block: the fast CPU kernel
KEY_SCALE, VALUE_SCALE = 12, 13
"""Inputs of GroupQueryAttention."""


def rows_to_int8(model: ir.Model, names: Iterable[str]) -> ir.Model:
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
        swap_output(graph, node, product)
    return model


def matmul_to_int8(model: ir.Model, names: Iterable[str]) -> ir.Model:
    """Weights to symmetric int8 per output channel, activations to uint8 per tensor at run time.

    The nodes that onnxruntime's `quantize_dynamic` writes, and its numbers, one weight after the other: that
    quantizer holds the whole part several times in memory.
    """
    wanted, graph = set(names), model.graph
    rounded: dict[int, ir.Node] = {}  # one DynamicQuantizeLinear for all that read the same activations
    for node in [n for n in graph if n.name in wanted]:
        source, table = node.inputs
        assert source is not None and table is not None
        if id(source) not in rounded:
            rounded[id(source)] = ir.node(
                "DynamicQuantizeLinear", [source], num_outputs=3, name=f"{source.name}_QuantizeLinear"
            )
            graph.insert_before(node, rounded[id(source)])
        activations, scale, zero = rounded[id(source)].outputs
        weight = _columns(graph, table)
        factor = ir.node("Mul", [scale, weight[1]], name=f"{node.name}_quant_scales_mul")
        product = ir.node(
            "MatMulInteger", [activations, weight[0], zero, weight[2]], name=f"{node.name}_quant"
        )
        cast = ir.node(
            "Cast", [product.outputs[0]], attributes={"to": ir.DataType.FLOAT}, name=f"{node.name}_quant_cast"
        )
        scaled = ir.node(
            "Mul", [cast.outputs[0], factor.outputs[0]], name=f"{node.name}_quant_output_scale_mul"
        )
        graph.insert_before(node, [factor, product, cast, scaled])
        swap_output(graph, node, scaled)
        drop_unused_weights(model)  # the float one
    return model


def _columns(graph: ir.Graph, table: ir.Value) -> tuple[ir.Value, ir.Value, ir.Value]:
    """A weight (K, N) as int8, its scales (N,) and zero points (N,); made once for all that read it."""
    named = [f"{table.name}_{part}" for part in ("quantized", "scale", "zero_point")]
    if named[0] not in graph.initializers:
        weight = constant(table)
        assert weight is not None
        scale = np.abs(weight).max(axis=0) / np.float32(127)
        scale[scale < np.finfo(np.float32).tiny] = 1.0  # a column of zeros
        levels = np.clip(np.rint(weight / scale), -127, 127).astype(np.int8)
        for name, array in zip(named, (levels, scale, np.zeros(len(scale), np.int8)), strict=True):
            add_initializer(graph, name, array)
    found = [graph.initializers[name] for name in named]
    return found[0], found[1], found[2]


def matmul_to_blocks(model: ir.Model, names: Iterable[str], bits: int, size: int) -> ir.Model:
    """`com.microsoft::MatMulNBits`: symmetric blocks of `size` along the input width, rounded to nearest."""
    wanted, graph = set(names), model.graph
    for node in [n for n in graph if n.name in wanted]:
        source, table = node.inputs
        assert table is not None
        alone = _blocks_of(str(node.name), str(table.name), constant(table), bits, size)
        (made,) = alone.graph.node
        stored = [ir.from_proto(each) for each in alone.graph.initializer]
        found = {str(each.name): each for each in stored}
        weights = [
            graph.initializers.get(name) or add_initializer(graph, name, found[name].numpy())
            for name in made.input[1:]
        ]
        attributes = {each.name: onnx.helper.get_attribute_value(each) for each in made.attribute}
        new = ir.node(
            made.op_type, [source, *weights], attributes=attributes, domain=made.domain, name=made.name
        )
        graph.insert_before(node, new)
        swap_output(graph, node, new)
        drop_unused_weights(model)  # the float one
    graph.opset_imports.setdefault("com.microsoft", 1)
    return model


def _blocks_of(name: str, weight: str, array: np.ndarray | None, bits: int, size: int) -> onnx.ModelProto:
    """A model of one MatMul after onnxruntime's quantizer, which copies whole models that it is given."""
    assert array is not None
    borders = [
        onnx.helper.make_tensor_value_info(side, onnx.TensorProto.FLOAT, ["rows", width])
        for side, width in zip(("x", "y"), array.shape, strict=True)
    ]
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("MatMul", ["x", weight], ["y"], name=name)],
        "one",
        borders[:1],
        borders[1:],
        [onnx.numpy_helper.from_array(np.ascontiguousarray(array), weight)],
    )
    with quiet_root():
        from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

        quantizer = MatMulNBitsQuantizer(
            onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)]),
            bits=bits,
            block_size=size,
            is_symmetric=True,
            accuracy_level=ACCURACY_LEVEL,
        )
        quantizer.process()
    return quantizer.model.model


def cache_to_int8(model: ir.Model, names: Iterable[str], scales: Mapping[str, np.ndarray]) -> ir.Model:
    """Cached keys and values of attention nodes as int8, one scale for each head and channel.

    `scales`: by name of the cache's output, (kv heads * head size,) float32. The kernel rounds what it
    appends: q = clip(rint(x / scale), -128, 127).
    """
    wanted, graph = set(names), model.graph
    for node in [n for n in graph if n.name in wanted]:
        inputs = [*node.inputs, *[None] * (KEY_SCALE - len(node.inputs))]
        for output in (1, 2):
            name = str(node.outputs[output].name)
            inputs.append(add_initializer(graph, f"{name}.scale", scales[name]))
        kinds = {"k_quant_type": "PER_CHANNEL", "v_quant_type": "PER_CHANNEL", "kv_cache_bit_width": 8}
        attributes = {key: value.value for key, value in node.attributes.items()}
        new = ir.node(
            node.op_type,
            inputs,
            attributes={**attributes, **kinds},  # type: ignore[dict-item]
            domain=node.domain,
            num_outputs=3,
            name=node.name,
        )
        graph.insert_before(node, new)
        for before, after in zip(node.outputs, new.outputs, strict=True):
            after.type, after.shape, name = before.type, before.shape, str(before.name)
            before.replace_all_uses_with(after, replace_graph_outputs=True)
            before.name, after.name = None, name
        graph.remove(node, safe=True)
        for cached in (new.inputs[3], new.inputs[4], *new.outputs[1:]):
            assert cached is not None
            cached.type = ir.TensorType(ir.DataType.INT8)
    return model


def swap_output(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    """`new`'s only output takes the place, name and type of `old`'s."""
    before, after = old.outputs[0], new.outputs[0]
    after.type, after.shape, name = ir.TensorType(ir.DataType.FLOAT), before.shape, before.name
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name


def drop_unused_weights(model: ir.Model) -> None:
    """Initializers that no node reads."""
    for name, value in list(model.graph.initializers.items()):
        if not list(value.uses()) and not value.is_graph_output():
            del model.graph.initializers[name]


class quiet_root:
    """The quantizers log to the root logger, and importing one sets it to print every remark of everybody."""

    def __enter__(self) -> None:
        root = logging.getLogger()
        self._level, self._handlers = root.level, list(root.handlers)
        root.setLevel(logging.ERROR)
        root.addHandler(logging.NullHandler())  # with any handler, basicConfig does nothing

    def __exit__(self, *_: object) -> None:
        root = logging.getLogger()
        root.handlers[:] = self._handlers
        root.setLevel(self._level)
