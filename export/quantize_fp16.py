"""float16 weights and arithmetic, node by node, with casts only where float16 meets float32.

In: a float32 `onnx_ir.Model` and names of its nodes. Out: the model, changed in place. Not here: which nodes.

onnxruntime's converter gives the fused graph's nodes mixed types. Here every chosen node is wrapped in casts,
which cannot be wrong, and pairs of casts between chosen nodes are taken out again. Inputs and outputs stay
float32, except the cache, which has the type of its attention node. Where a provider has no float16 kernel
(many operators on x86), onnxruntime computes that node in float32: the file is half as large all the same.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes import common

from export.passes import MICROSOFT, add_initializer, constant
from export.quantize_schemes import drop_unused_weights

HALF, SINGLE = ".half", ".single"
"""Ends of the names of the casts, which the audit takes out again."""

_OPSET = 20
_LARGEST = float(np.finfo(np.float16).max)
_FUSED: dict[tuple[str, str], tuple[int, ...]] = {
    (MICROSOFT, "GroupQueryAttention"): (0, 1, 2, 3, 4, 7, 8, 10),
    (MICROSOFT, "MultiHeadAttention"): (0, 1, 2, 3, 5, 6, 7),
    (MICROSOFT, "SkipSimplifiedLayerNormalization"): (0, 1, 2, 3),
    (MICROSOFT, "SkipLayerNormalization"): (0, 1, 2, 3, 4),
    (MICROSOFT, "RotaryEmbedding"): (0, 2, 3),
    (MICROSOFT, "MatMulNBits"): (0, 2),
    (MICROSOFT, "FastGelu"): (0, 1),
    (MICROSOFT, "Gelu"): (0,),
    (MICROSOFT, "QuickGelu"): (0,),
    ("", "SimplifiedLayerNormalization"): (0, 1),
}
"""Float inputs of operators that onnx has no schema for."""

_SAME_TYPE = {"SkipSimplifiedLayerNormalization": (0, 3), "SkipLayerNormalization": (0, 3)}
"""Outputs with the inputs' type, where not all have it: mean and deviation stay float32."""

_FLOAT32_ONLY = frozenset({"Cast", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear", "Resize"})


def refusal(node: ir.Node) -> str | None:
    """Why a node cannot be float16; "" when it has no float input at all."""
    places = _float_inputs(node)
    arrays = [array for value in node.inputs if (array := constant(value)) is not None]
    floats = [array for array in arrays if array.dtype == np.float32 and array.size]
    if places is None:
        return f"{node.op_type} has no float16" if any(array.size > 1 for array in floats) else ""
    if not places:
        return ""
    if _counted(node):
        large = any(array.size > 1 for array in floats)
        return "computed from whole numbers, which float16 has up to 2048" if large else ""
    if any(np.abs(array).max() > _LARGEST for array in floats):
        return f"a constant is larger than {_LARGEST:.0f}"
    return None


def _counted(node: ir.Node) -> bool:
    """Whether its computed floats all come from integers: positions, and the angles made of them."""
    left, seen = [node], set()
    while left:
        each = left.pop()
        places = _float_inputs(each) or ()
        computed = [x for i in places if (x := each.inputs[i]) is not None and constant(x) is None]
        if not computed or each.op_type == "MatMul":
            return False
        for value in computed:
            source = value.producer()
            if source is None:
                return False
            if not _from_integers(source) and source not in seen:
                seen.add(source)
                left.append(source)
    return True


def _from_integers(node: ir.Node) -> bool:
    source = node.inputs[0] if node.op_type == "Cast" else None
    return source is not None and source.dtype in (ir.DataType.INT64, ir.DataType.INT32)


def _float_inputs(node: ir.Node) -> tuple[int, ...] | None:
    """Places of the inputs that become float16; None when the operator does not take it."""
    if node.op_type in _FLOAT32_ONLY:
        return None
    found = _FUSED.get((node.domain, node.op_type)) or _by_schema(node)
    if found is None:
        return None
    return tuple(i for i in found if i < len(node.inputs) and _is_float(node.inputs[i]))


def _by_schema(node: ir.Node) -> tuple[int, ...] | None:
    if node.domain or not onnx.defs.has(node.op_type, max_inclusive_version=_OPSET):
        return None
    schema = onnx.defs.get_schema(node.op_type, max_inclusive_version=_OPSET)
    types = {each.type_param_str: each.allowed_type_strs for each in schema.type_constraints}
    found = []
    for i in range(len(node.inputs)):
        formal = schema.inputs[min(i, len(schema.inputs) - 1)]
        allowed = types.get(formal.type_str, [formal.type_str])
        if "tensor(float)" in allowed:
            if "tensor(float16)" not in allowed:
                return None
            found.append(i)
    return tuple(found)


def _float_outputs(node: ir.Node) -> tuple[int, ...]:
    places = _SAME_TYPE.get(node.op_type, tuple(range(len(node.outputs))))
    found = tuple(i for i in places if i < len(node.outputs) and _is_float(node.outputs[i]))
    if node.domain or not onnx.defs.has(node.op_type, max_inclusive_version=_OPSET):
        return found
    formal = onnx.defs.get_schema(node.op_type, max_inclusive_version=_OPSET).outputs
    inputs = onnx.defs.get_schema(node.op_type, max_inclusive_version=_OPSET).inputs
    types = {inputs[min(i, len(inputs) - 1)].type_str for i in _by_schema(node) or ()}
    return tuple(i for i in found if formal[min(i, len(formal) - 1)].type_str in types)


def _is_float(value: ir.Value | None) -> bool:
    return value is not None and value.dtype == ir.DataType.FLOAT


def to_half(model: ir.Model, names: Iterable[str]) -> None:
    """Make the nodes called `names` float16; each must be free of a `refusal`.

    A changed value gets a type of its own: a clone of a model shares the type objects.
    """
    wanted, graph = set(names), model.graph
    halves: dict[str, ir.Value] = {}
    for node in [n for n in graph if n.name in wanted]:
        for place in _float_inputs(node) or ():
            value = node.inputs[place]
            assert value is not None
            if str(value.name) not in halves:
                halves[str(value.name)] = _half(graph, node, value)
            node.replace_input_with(place, halves[str(value.name)])
        for place in _float_outputs(node):
            _back_to_single(graph, node, node.outputs[place])
    common.TopologicalSortPass()(model)
    _drop_pairs(graph)
    _retype_cache(graph)
    common.RemoveUnusedNodesPass()(model)
    drop_unused_weights(model)


def follow(model: ir.Model) -> None:
    """Blocks of 4 or 8 bits whose input comes from a float16 node take and give float16, their scales too."""
    names = [
        str(node.name)
        for node in model.graph
        if node.op_type == "MatMulNBits"
        and (source := node.inputs[0].producer() if node.inputs[0] is not None else None) is not None
        and str(source.name).endswith(SINGLE)
    ]
    for node in model.graph:
        if node.name in names:
            for value in (node.inputs[0], node.inputs[2], node.outputs[0]):
                assert value is not None
                value.type = ir.TensorType(ir.DataType.FLOAT)  # the quantizer does not say so
    if names:
        to_half(model, names)


def _half(graph: ir.Graph, node: ir.Node, value: ir.Value) -> ir.Value:
    """`value` as float16: a weight is rounded, anything else goes through a cast."""
    name = f"{value.name}{HALF}"
    array = constant(value)
    if array is not None:
        return add_initializer(graph, name, array.astype(np.float16))
    cast = ir.node("Cast", [value], attributes={"to": ir.DataType.FLOAT16}, name=name)
    graph.insert_before(node, cast)
    out = cast.outputs[0]
    out.name, out.type, out.shape = name, ir.TensorType(ir.DataType.FLOAT16), value.shape
    return out


def _back_to_single(graph: ir.Graph, node: ir.Node, output: ir.Value) -> None:
    name = str(output.name)
    cast = ir.node("Cast", [output], attributes={"to": ir.DataType.FLOAT}, name=f"{name}{SINGLE}")
    new = cast.outputs[0]
    new.type, new.shape = ir.TensorType(ir.DataType.FLOAT), output.shape
    graph.insert_after(node, cast)
    output.replace_all_uses_with(new, replace_graph_outputs=True)
    cast.replace_input_with(0, output)
    output.type, output.name, new.name = ir.TensorType(ir.DataType.FLOAT16), f"{name}.float16", name


def _drop_pairs(graph: ir.Graph) -> None:
    """float16 -> float32 -> float16 is the value itself."""
    for node in list(graph):
        if node.op_type != "Cast" or not str(node.name).endswith(HALF):
            continue
        source = node.inputs[0].producer() if node.inputs[0] is not None else None
        if source is not None and str(source.name).endswith(SINGLE) and source.op_type == "Cast":
            direct = source.inputs[0]
            assert direct is not None
            node.outputs[0].replace_all_uses_with(direct)


def _retype_cache(graph: ir.Graph) -> None:
    """A cache that only float16 attention reads and writes is float16 outside, too."""
    for node in [n for n in graph if n.op_type == "GroupQueryAttention"]:
        for place in (3, 4):
            given = node.inputs[place]
            cast = given.producer() if given is not None else None
            past = cast.inputs[0] if cast is not None and str(cast.name).endswith(HALF) else None
            if past is not None and past.is_graph_input() and len(list(past.uses())) == 1:
                past.type = ir.TensorType(ir.DataType.FLOAT16)
                node.replace_input_with(place, past)
        for output in node.outputs[1:]:
            users = [user for user, _ in output.uses()]
            if len(users) == 1 and str(users[0].name).endswith(SINGLE):
                outer = users[0].outputs[0]
                name = outer.name
                outer.replace_all_uses_with(output, replace_graph_outputs=True)
                graph.remove(users[0], safe=True)
                output.name = name
