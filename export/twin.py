"""The float twin of a quantized part: its nodes written back as float32 nodes on dequantized weights.

In: a quantized model. Out: a `Twin`, with the grid of every rounded weight. Not here: whether it is the
checkpoint's (`audit.py`), running it (`gate.py`).

Weights and grids are computed when they are looked at and not kept: in float32 all of them together take four
to eight times what the quantized part takes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export import storage
from export.passes import constant, producer
from export.quantize_facts import GPTQ
from export.quantize_fp16 import HALF, SINGLE
from export.quantize_schemes import KEY_SCALE, VALUE_SCALE, swap_output
from runtime.contract import TensorSpec
from runtime.errors import ParityError
from runtime.manifest import Manifest

ROUNDING = 0.5 + 1e-3
"""Steps between a weight and its rounded value: half, and float32 noise in the division."""

_CLIPPED = 1.0 + 1e-3
"""ORT's symmetric grids (-8..7) have the largest weight on -8: one of the other sign is clipped."""

Made = Callable[[], np.ndarray]
Steps = dict[str, tuple[Made, float]]


@dataclass(frozen=True)
class Twin:
    """`model`: float32 graph on the stored weights. `steps`: by weight, its grid and steps allowed.

    `calibrated`: by weight, the MatMul whose blocks a calibration made, and their size; `caches`: the scales
    of int8 caches by output.
    """

    model: ir.Model
    steps: Steps
    calibrated: dict[str, tuple[str, int]] = field(default_factory=dict)
    caches: dict[str, np.ndarray] = field(default_factory=dict)


def float_twin(quantized: ir.Model) -> Twin:
    """Write rounded nodes back as float32 MatMul, Gather and attention on dequantized weights."""
    twin = Twin(storage.as_from_file(quantized), {})
    model, graph = twin.model, twin.model.graph
    _halves_to_float(graph, twin.steps)
    for node in list(graph):
        if node.op_type == "MatMulNBits":
            _blocks_to_float(graph, node, twin)
        elif node.op_type == "MatMulInteger":
            _dynamic_to_float(graph, node, twin.steps)
        elif node.op_type == "Gather":
            _rows_to_float(graph, node, twin.steps)
        elif node.op_type == "GroupQueryAttention" and "k_quant_type" in node.attributes:
            _cache_to_float(graph, node, twin)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return twin


def twin_manifest(draft: Manifest) -> Manifest:
    """The manifest of the float twins of a bundle's parts: what is float16 or int8 outside is float32."""

    def single(spec: TensorSpec) -> TensorSpec:
        return spec.model_copy(update={"dtype": "float32"}) if spec.dtype in ("float16", "int8") else spec

    parts = tuple(
        part.model_copy(
            update={"inputs": tuple(map(single, part.inputs)), "outputs": tuple(map(single, part.outputs))}
        )
        for part in draft.parts
    )
    state = tuple(each.model_copy(update={"dtype": "float32"}) for each in draft.state)
    return draft.model_copy(update={"parts": parts, "state": state})


def _halves_to_float(graph: ir.Graph, steps: Steps) -> None:
    """float16 weights as float32, and no casts around them."""
    for name, value in list(graph.initializers.items()):
        array = constant(value)
        if array is None or array.dtype != np.float16:
            continue
        single = _weight(graph, f"{name}.float", array.shape, functools.partial(array.astype, np.float32))
        value.replace_all_uses_with(single)
        steps[f"{name}.float"] = (functools.partial(_half_steps, array), ROUNDING)
    for node in list(graph):
        for output in node.outputs:
            if output.dtype == ir.DataType.FLOAT16:
                output.type = ir.TensorType(ir.DataType.FLOAT)
        if node.op_type == "Cast" and str(node.name).endswith((HALF, SINGLE)):
            inner, outer = node.inputs[0], node.outputs[0]
            assert inner is not None
            outside = str(outer.name) if outer.is_graph_output() else None
            outer.replace_all_uses_with(inner, replace_graph_outputs=True)
            graph.remove(node, safe=True)
            if outside is not None:
                inner.name = outside
    for value in graph.inputs:
        if value.dtype == ir.DataType.FLOAT16:
            value.type = ir.TensorType(ir.DataType.FLOAT)


def _cache_to_float(graph: ir.Graph, node: ir.Node, twin: Twin) -> None:
    """The node without quantization of its cache, whose scales are kept aside."""
    attributes = {
        key: node.attributes.get(key) for key in ("k_quant_type", "v_quant_type", "kv_cache_bit_width")
    }
    found = [None if value is None else value.value for value in attributes.values()]
    scales = [constant(node.inputs[place]) for place in (KEY_SCALE, VALUE_SCALE)]
    if found != ["PER_CHANNEL", "PER_CHANNEL", 8] or any(each is None for each in scales):
        raise ParityError(f"{node.name}: cache quantized as {found}, not as this exporter does; re-export")
    for output, scale in zip(node.outputs[1:], scales, strict=True):
        assert scale is not None
        twin.caches[str(output.name)] = scale
    for key in attributes:
        del node.attributes[key]
    node.replace_input_with(KEY_SCALE, None)
    node.replace_input_with(VALUE_SCALE, None)
    for value in (node.inputs[3], node.inputs[4], *node.outputs[1:]):
        assert value is not None
        value.type = ir.TensorType(ir.DataType.FLOAT)


def _blocks_to_float(graph: ir.Graph, node: ir.Node, twin: Twin) -> None:
    packed, scales = constant(node.inputs[1]), constant(node.inputs[2])
    if packed is None or scales is None or len(node.inputs) > 3:
        raise ParityError(f"{node.name}: MatMulNBits without constant symmetric blocks; re-export")
    width, columns, block, bits = (node.attributes[key].as_int() for key in ("K", "N", "block_size", "bits"))
    scale = scales.reshape(columns, -1, 1)

    def levels() -> np.ndarray:
        stored = np.stack([packed & 15, packed >> 4], axis=-1) if bits == 4 else packed
        grid = stored.reshape(columns, -1, block).astype(np.float32)
        grid -= 2.0 ** (bits - 1)
        return grid

    def flat(blocks: np.ndarray) -> np.ndarray:
        return blocks.reshape(columns, -1)[:, :width].T

    def step() -> np.ndarray:
        return flat(np.broadcast_to(np.abs(scale), (columns, scale.shape[1], block)))

    if str(node.name).endswith(GPTQ):
        twin.calibrated[f"{node.name}.float.weight"] = (str(node.name).removesuffix(GPTQ), block)
    half = node.inputs[2] is not None and str(node.inputs[2].name).endswith(f"{HALF}.float")
    # a scale that is off by half a float16 step (2^-11) moves the outermost level by so many grid steps
    moved = 2.0 ** (bits - 1) * 2.0**-11 if half else 0.0
    weight = _Weight((width, columns), lambda: flat(levels() * scale), step, _CLIPPED + moved)
    _replace(graph, node, "MatMul", [node.inputs[0]], weight, twin.steps)


def _dynamic_to_float(graph: ir.Graph, node: ir.Node, steps: Steps) -> None:
    """DynamicQuantizeLinear -> MatMulInteger -> Cast -> Mul(activation scale x weight scale)."""
    dynamic = producer(node.inputs[0], "DynamicQuantizeLinear")
    last = _only_user(_only_user(node, "Cast"), "Mul")
    weight, zero = constant(node.inputs[1]), constant(node.inputs[3])
    if dynamic is None or last is None or weight is None or node.inputs[2] is not dynamic.outputs[2]:
        raise ParityError(f"{node.name}: unknown wiring around MatMulInteger; re-export")
    factor = next((p for value in last.inputs if (p := producer(value, "Mul")) is not None), None)
    scale = (
        None if factor is None else next((c for v in factor.inputs if (c := constant(v)) is not None), None)
    )
    if factor is None or scale is None or dynamic.outputs[1] not in factor.inputs:
        raise ParityError(f"{node.name}: MatMulInteger without the scales of its own input; re-export")
    shift = np.zeros(1) if zero is None else zero.astype(np.float32)
    made = _Weight(
        weight.shape,
        lambda: (weight.astype(np.float32) - shift) * scale,
        lambda: np.broadcast_to(np.abs(scale), weight.shape),
        ROUNDING,
    )
    _replace(graph, last, "MatMul", [dynamic.inputs[0]], made, steps)


def _rows_to_float(graph: ir.Graph, node: ir.Node, steps: Steps) -> None:
    rows = constant(node.inputs[0])
    if rows is None or rows.dtype != np.int8:
        return
    product = _only_user(_only_user(node, "Cast"), "Mul")
    factor = None
    if product is not None:
        factor = next((p for value in product.inputs if (p := producer(value, "Gather")) is not None), None)
    scale = constant(factor.inputs[0]) if factor is not None else None
    if product is None or factor is None or scale is None or factor.inputs[1] is not node.inputs[1]:
        raise ParityError(f"{node.name}: int8 rows without the scales of the same rows; re-export")
    name = f"{product.name}.float"
    table = _weight(graph, f"{name}.weight", rows.shape, lambda: rows.astype(np.float32) * scale)
    steps[f"{name}.weight"] = (lambda: np.broadcast_to(np.abs(scale), rows.shape), ROUNDING)
    _swap(graph, product, ir.node("Gather", [table, node.inputs[1]], attributes={"axis": 0}, name=name))


@dataclass(frozen=True)
class _Weight:
    """Float32 values, the step of their grid at each, and steps allowed."""

    shape: Sequence[int]
    values: Made
    step: Made
    allowed: float


def _replace(
    graph: ir.Graph, node: ir.Node, op_type: str, inputs: list[ir.Value | None], weight: _Weight, steps: Steps
) -> None:
    name = f"{node.name}.float"
    value = _weight(graph, f"{name}.weight", weight.shape, weight.values)
    steps[f"{name}.weight"] = (weight.step, weight.allowed)
    _swap(graph, node, ir.node(op_type, [*inputs, value], name=name))


def _weight(graph: ir.Graph, name: str, shape: Sequence[int], values: Made) -> ir.Value:
    """An initializer of float32 whose `values` are made whenever they are read."""

    def tensor() -> ir.Tensor:
        found = np.ascontiguousarray(values(), dtype=np.float32)
        return ir.Tensor(found.reshape(shape), name=name)  # a scalar stays one

    sizes = ir.Shape([int(size) for size in shape])
    made = ir.LazyTensor(tensor, ir.DataType.FLOAT, sizes, name=name)
    value = ir.Value(name=name, const_value=made, shape=sizes, type=ir.TensorType(ir.DataType.FLOAT))
    graph.register_initializer(value)
    return value


def _half_steps(array: np.ndarray) -> np.ndarray:
    """Distance to the next float16 number at each value."""
    return np.spacing(np.abs(array)).astype(np.float32)


def _swap(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    graph.insert_before(old, new)
    swap_output(graph, old, new)


def _only_user(node: ir.Node | None, op_type: str) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()] if node is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None
