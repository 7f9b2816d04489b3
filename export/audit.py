"""Proof that a quantized part is the float32 part with rounded weights, and nothing else.

In: the float32 model and the quantized one. Out: the float twin (the quantized model with its nodes
written back as float nodes on dequantized weights), or a ParityError. Not here: running anything.

Judging a quantized graph by its answers alone cannot work: on some weights correct int4 is far from
float32, on others a wrong wire moves little. So structure and weights are checked exactly here, and what
remains (rounded activations, the kernels) is a small difference between the quantized part and its twin.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import add_initializer, constant, producer
from runtime.errors import ParityError

_ROUNDING = 0.5 + 1e-3
"""Steps between a weight and its rounded value: half, and float32 noise in the division."""

_CLIPPED = 1.0 + 1e-3
"""ORT's symmetric 4-bit grid is -8..7 with the largest weight on -8: one of the other sign is clipped."""


@dataclass(frozen=True)
class Twin:
    """`model`: float32 graph on the stored weights. `steps`: by weight, its grid and steps allowed."""

    model: ir.Model
    steps: dict[str, tuple[np.ndarray, float]]


def float_twin(quantized: ir.Model) -> Twin:
    """Write MatMulNBits, MatMulInteger and int8 rows back as MatMul and Gather on dequantized weights."""
    model = ir.from_proto(ir.to_proto(quantized))
    steps: dict[str, tuple[np.ndarray, float]] = {}
    for node in list(model.graph):
        if node.op_type == "MatMulNBits":
            _blocks_to_float(model.graph, node, steps)
        elif node.op_type == "MatMulInteger":
            _dynamic_to_float(model.graph, node, steps)
        elif node.op_type == "Gather":
            _rows_to_float(model.graph, node, steps)
    common.RemoveUnusedNodesPass()(model)
    common.TopologicalSortPass()(model)
    return Twin(model, steps)


def _blocks_to_float(graph: ir.Graph, node: ir.Node, steps: dict[str, tuple[np.ndarray, float]]) -> None:
    packed, scales = constant(node.inputs[1]), constant(node.inputs[2])
    if packed is None or scales is None or len(node.inputs) > 3:
        raise ParityError(f"{node.name}: MatMulNBits without constant symmetric blocks; re-export")
    width, columns, block = (node.attributes[key].as_int() for key in ("K", "N", "block_size"))
    low, high = packed & 15, packed >> 4
    grid = np.stack([low, high], axis=-1).reshape(columns, -1, block).astype(np.float32) - 8.0
    scale = scales.reshape(columns, -1, 1)
    weight = (grid * scale).reshape(columns, -1)[:, :width].T
    step = np.broadcast_to(np.abs(scale), grid.shape).reshape(columns, -1)[:, :width].T
    _replace(graph, node, "MatMul", [node.inputs[0]], weight, (step, _CLIPPED), steps)


def _dynamic_to_float(graph: ir.Graph, node: ir.Node, steps: dict[str, tuple[np.ndarray, float]]) -> None:
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
    dequantized = (weight.astype(np.float32) - shift) * scale
    step = np.broadcast_to(np.abs(scale), dequantized.shape)
    _replace(graph, last, "MatMul", [dynamic.inputs[0]], dequantized, (step, _ROUNDING), steps)


def _rows_to_float(graph: ir.Graph, node: ir.Node, steps: dict[str, tuple[np.ndarray, float]]) -> None:
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
    step = np.broadcast_to(np.abs(scale), rows.shape)
    weight = rows.astype(np.float32) * scale
    name = f"{product.name}.float"
    table = add_initializer(graph, f"{name}.weight", weight)
    steps[f"{name}.weight"] = (step, _ROUNDING)
    _swap(graph, product, ir.node("Gather", [table, node.inputs[1]], attributes={"axis": 0}, name=name))


def _replace(
    graph: ir.Graph,
    node: ir.Node,
    op_type: str,
    inputs: list[ir.Value | None],
    weight: np.ndarray,
    step: tuple[np.ndarray, float],
    steps: dict[str, tuple[np.ndarray, float]],
) -> None:
    name = f"{node.name}.float"
    value = add_initializer(graph, f"{name}.weight", np.ascontiguousarray(weight, dtype=np.float32))
    steps[f"{name}.weight"] = step
    _swap(graph, node, ir.node(op_type, [*inputs, value], name=name))


def _swap(graph: ir.Graph, old: ir.Node, new: ir.Node) -> None:
    graph.insert_before(old, new)
    before, after = old.outputs[0], new.outputs[0]
    after.dtype, after.shape, name = ir.DataType.FLOAT, before.shape, before.name
    before.replace_all_uses_with(after, replace_graph_outputs=True)
    graph.remove(old, safe=True)
    after.name = name


def _only_user(node: ir.Node | None, op_type: str) -> ir.Node | None:
    users = [user for user, _ in node.outputs[0].uses()] if node is not None else []
    return users[0] if len(users) == 1 and users[0].op_type == op_type else None


def same_but_rounded(original: ir.Model, twin: Twin, where: str) -> float:
    """Walk both graphs in step from their outputs. Returns the largest weight error, in grid steps.

    Raises ParityError at the first node, wire, attribute or weight that differs by more than rounding.
    """
    pairs = list(zip(original.graph.outputs, twin.model.graph.outputs, strict=False))
    names = [[value.name for value in m.graph.outputs] for m in (original, twin.model)]
    inputs = [[value.name for value in m.graph.inputs] for m in (original, twin.model)]
    if names[0] != names[1] or inputs[0] != inputs[1]:
        raise ParityError(
            f"{where}: inputs or outputs differ from the float32 part: {inputs[1]} -> {names[1]}"
        )
    seen: set[tuple[int, int]] = set()
    worst = 0.0
    while pairs:
        left, right = pairs.pop()
        if (id(left), id(right)) in seen:
            continue
        seen.add((id(left), id(right)))
        if (array := constant(left)) is not None:
            worst = max(worst, _weight_error(left, array, right, twin, where))
            continue
        first, second = left.producer(), right.producer()
        if first is None or second is None:
            if first is not second or left.name != right.name:
                raise ParityError(f"{where}: {right.name} stands where the float32 part has {left.name}")
            continue
        _same_node(first, second, left.index(), right.index(), where)
        for one, other in zip(first.inputs, second.inputs, strict=True):
            if (one is None) != (other is None):
                raise ParityError(f"{where}: {second.name} has other optional inputs than {first.name}")
            if one is not None and other is not None:
                pairs.append((one, other))
    return worst


def _same_node(first: ir.Node, second: ir.Node, out: int | None, other_out: int | None, where: str) -> None:
    def shape(node: ir.Node) -> tuple[object, ...]:
        attributes = {
            key: repr(value.value) for key, value in node.attributes.items() if value.value is not None
        }
        return node.domain, node.op_type, sorted(attributes.items())

    trimmed = [_trim(list(node.inputs)) for node in (first, second)]
    if shape(first) != shape(second) or out != other_out or len(trimmed[0]) != len(trimmed[1]):
        raise ParityError(
            f"{where}: {second.op_type} {second.name} stands where the float32 part has "
            f"{first.op_type} {first.name}"
        )


def _trim(inputs: list[ir.Value | None]) -> list[ir.Value | None]:
    while inputs and inputs[-1] is None:
        inputs.pop()
    return inputs


def _weight_error(left: ir.Value, array: np.ndarray, right: ir.Value, twin: Twin, where: str) -> float:
    other = constant(right)
    if other is None or other.shape != array.shape:
        raise ParityError(f"{where}: weight {left.name} is missing or has another shape")
    if str(right.name) not in twin.steps:
        if not np.array_equal(array, other):
            raise ParityError(f"{where}: weight {left.name} differs, though no rule rounds it")
        return 0.0
    step, allowed = twin.steps[str(right.name)]
    safe = np.where(step > 0, step, 1.0)
    error = np.abs(array - other) / safe
    worst = float(error.max())
    if not worst <= allowed:
        place = tuple(int(i) for i in np.unravel_index(int(error.argmax()), error.shape))
        raise ParityError(
            f"{where}: weight {left.name}{list(place)} is {worst:.3g} grid steps from the float32 weight, "
            f"rounding gives at most {allowed:.3g}; the part does not hold the checkpoint's weights"
        )
    return worst
