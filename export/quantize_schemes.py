"""How each scheme writes its nodes: int8 rows, dynamic int8, 4 and 8 bit blocks, the int8 KV cache.

In: an `onnx_ir.Model` and names of its nodes. Out: the model with these nodes rewritten. Not here: which node
gets what (`quantize.py`), float16 (`quantize_fp16.py`), calibrated blocks (`gptq.py`).
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir

from export import storage
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
    """Weights to symmetric int8 per output channel, activations to uint8 per tensor at run time."""
    from onnxruntime.quantization import QuantType, quantize_dynamic

    with tempfile.TemporaryDirectory() as folder, _quiet_root():
        source, target = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        proto = ir.to_proto(model)
        del proto.graph.value_info[:]
        large = len(storage.save(ir.from_proto(proto), source)) > 1
        del proto
        quantize_dynamic(
            source,
            target,
            op_types_to_quantize=["MatMul"],
            nodes_to_quantize=list(names),
            per_channel=True,
            weight_type=QuantType.QInt8,
            use_external_data_format=large,
            # custom operators stop its shape inference, so it must be told what their outputs are
            extra_options={"MatMulConstBOnly": True, "DefaultTensorType": onnx.TensorProto.FLOAT},
        )
        found = ir.from_proto(onnx.load(target))
    found.ir_version = model.ir_version
    return found


def matmul_to_blocks(model: ir.Model, names: Iterable[str], bits: int, size: int) -> ir.Model:
    """`com.microsoft::MatMulNBits`: symmetric blocks of `size` along the input width, rounded to nearest."""
    from onnxruntime.quantization.matmul_nbits_quantizer import MatMulNBitsQuantizer

    wanted = set(names)
    with _quiet_root():
        quantizer = MatMulNBitsQuantizer(
            ir.to_proto(model),
            bits=bits,
            block_size=size,
            is_symmetric=True,
            accuracy_level=ACCURACY_LEVEL,
            # its own `nodes_to_include` only adds to all the MatMuls that it takes anyway
            nodes_to_exclude=[str(n.name) for n in model.graph if n.name not in wanted],
        )
        quantizer.process()
    found = ir.from_proto(quantizer.model.model)
    found.ir_version = model.ir_version
    return found


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


class _quiet_root:
    """The quantizers log to the root logger (some at warning level, about shape inference)."""

    def __enter__(self) -> None:
        self._level = logging.getLogger().level
        logging.getLogger().setLevel(logging.ERROR)

    def __exit__(self, *_: object) -> None:
        logging.getLogger().setLevel(self._level)
