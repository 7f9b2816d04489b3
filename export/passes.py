"""Graph passes over a traced decoder: names, last-token logits, folded reshapes, packed and fused nodes.

In: the `onnx_ir.Model` of `decoder.py` (or a vision graph, for the naming passes). Out: the same model,
changed in place, computing the same function. Not here: tracing, quantization.
Each pass returns how many places it changed, so that a test can tell "fused" from "found nothing".
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import common

MICROSOFT = "com.microsoft"
KEEP_INPUT = "num_logits_to_keep"
"""Scalar int64 input of the decoder: how many last positions get logits; 0 means all of them."""


def constant(value: ir.Value | None) -> np.ndarray | None:
    """The array behind an initializer, or None when the value is computed."""
    if value is None or value.const_value is None:
        return None
    return value.const_value.numpy()


def weight_of(node: ir.Node) -> np.ndarray:
    """The constant second input of a MatMul or Add."""
    array = constant(node.inputs[1])
    assert array is not None
    return array


def producer(value: ir.Value | None, op_type: str) -> ir.Node | None:
    """The node that computes `value`, if it is an `op_type`."""
    node = value.producer() if value is not None else None
    return node if node is not None and node.op_type == op_type else None


def add_initializer(graph: ir.Graph, name: str, array: np.ndarray) -> ir.Value:
    """Register `array` as a weight called `name`."""
    tensor = ir.tensor(np.ascontiguousarray(array).reshape(array.shape), name=name)  # a scalar stays one
    value = ir.Value(
        name=name, const_value=tensor, shape=ir.Shape(array.shape), type=ir.TensorType(tensor.dtype)
    )
    graph.register_initializer(value)
    return value


def _node(
    op_type: str, inputs: list[ir.Value | None], name: str, like: ir.Value, **kwargs: object
) -> ir.Node:
    node = ir.node(op_type, inputs, name=name, **kwargs)  # type: ignore[arg-type]
    for index, output in enumerate(node.outputs):
        output.name = f"{name}.out" if index == 0 else f"{name}.out{index}"
        if like.dtype is not None:
            output.dtype = like.dtype
    return node


def name_weights(model: ir.Model) -> int:
    """Call each MatMul and its weight by the module it came from: `text.layers.0.mlp.up_proj.weight`."""
    named, seen = 0, set(model.graph.initializers)
    for node in model.graph:
        if node.op_type != "MatMul" or constant(node.inputs[1]) is None:
            continue
        scopes = re.findall(r"'([^']*)'", node.metadata_props.get("pkg.torch.onnx.name_scopes", ""))
        if len(scopes) < 2:
            continue
        node.name, name = scopes[-2], f"{scopes[-2]}.weight"
        weight = node.inputs[1]
        if weight is not None and name not in seen:
            _rename_initializer(model.graph, weight, name)
            seen.add(name)
            named += 1
    return named


def _rename_initializer(graph: ir.Graph, value: ir.Value, name: str) -> None:
    old = value.name
    if old is not None:
        graph.initializers.pop(old)
    value.name = name
    if value.const_value is not None:
        value.const_value.name = name
    graph.register_initializer(value)


def name_dimensions(model: ir.Model, names: Sequence[tuple[str, Sequence[str | None]]]) -> int:
    """Give graph inputs and outputs the symbolic dimension names of the layout; None keeps a dimension.

    `names`: patterns as in fnmatch with one entry a dimension; the first that fits name and rank counts.
    """
    changed = 0
    for value in [*model.graph.inputs, *model.graph.outputs]:
        for pattern, dims in names:
            old = list(value.shape) if value.shape is not None else []
            if fnmatch.fnmatchcase(str(value.name), pattern) and len(old) == len(dims):
                value.shape = ir.Shape([new if new is not None else old[i] for i, new in enumerate(dims)])
                changed += 1
                break
    for node in model.graph:  # inner shapes carry the tracer's symbols, which no longer mean anything
        for output in node.outputs:
            if not output.is_graph_output():
                output.shape = None
    return changed


def keep_last_logits(model: ir.Model) -> int:
    """Cut the hidden states to the last `num_logits_to_keep` positions before the LM head."""
    graph = model.graph
    head = producer(next(out for out in graph.outputs if out.name == "logits"), "MatMul")
    if head is None:
        return 0
    keep = ir.Value(name=KEEP_INPUT, shape=ir.Shape([]), type=ir.TensorType(ir.DataType.INT64))
    graph.inputs.append(keep)
    hidden = head.inputs[0]
    assert hidden is not None
    one, end, axis = (
        add_initializer(graph, f"keep.{name}", np.array([number], np.int64))
        for name, number in (("shape", 1), ("end", np.iinfo(np.int64).max), ("axis", 1))
    )
    negative = _node("Neg", [keep], "keep.negative", keep)
    start = _node("Reshape", [negative.outputs[0], one], "keep.start", keep)
    last = _node("Slice", [hidden, start.outputs[0], end, axis], "keep.last", hidden)
    graph.insert_before(head, [negative, start, last])
    head.replace_input_with(0, last.outputs[0])
    return 1


def _before_reshapes(value: ir.Value | None) -> ir.Value | None:
    """The 3-D value that a chain of reshapes started from; a 4-D one (a per-head norm) stays."""
    found, seen = value, value
    while (node := producer(seen, "Reshape")) is not None:
        seen = node.inputs[0]
        if seen is not None and seen.shape is not None and len(seen.shape) == 3:
            found = seen
    return found


def fold_reshapes(model: ir.Model) -> int:
    """Drop the (B, S, H*D) -> (B, S, H, D) -> (B, S, H*D) round trips around each attention node."""
    changed = 0
    places = {"GroupQueryAttention": 3, "MultiHeadAttention": 3, "RotaryEmbedding": 1}
    for node in list(model.graph):
        if node.op_type not in places:
            continue
        for index in range(places[node.op_type]):
            direct = _before_reshapes(node.inputs[index])
            if direct is not node.inputs[index]:
                node.replace_input_with(index, direct)
                changed += 1
        out = node.outputs[0]
        for user, _ in list(out.uses()):
            for second, _ in list(user.outputs[0].uses()) if user.op_type == "Reshape" else []:
                if second.op_type == "Reshape":
                    second.outputs[0].replace_all_uses_with(out)
                    changed += 1
    common.RemoveUnusedNodesPass()(model)
    return changed


def _projection(value: ir.Value | None) -> tuple[ir.Node, ir.Node | None] | None:
    """(MatMul, bias Add or None) with constant weights behind `value`."""
    bias = producer(value, "Add")
    matmul = producer(bias.inputs[0] if bias is not None else value, "MatMul")
    if matmul is None or constant(matmul.inputs[1]) is None:
        return None
    if bias is not None and constant(bias.inputs[1]) is None:
        return None
    return matmul, bias


def _packable(parts: list[tuple[ir.Node, ir.Node | None]]) -> bool:
    """Whether the projections have one input, and all of them a bias or none."""
    same_input = len({id(matmul.inputs[0]) for matmul, _ in parts}) == 1
    return same_input and len({bias is None for _, bias in parts}) == 1


def _pack(
    graph: ir.Graph, parts: list[tuple[ir.Node, ir.Node | None]], name: str, like: ir.Value
) -> tuple[list[ir.Node], ir.Value]:
    """New nodes (a MatMul, and an Add for biases) for projections side by side, and their output."""
    weight = np.concatenate([weight_of(matmul) for matmul, _ in parts], axis=1)
    source = parts[0][0].inputs[0]
    new = [_node("MatMul", [source, add_initializer(graph, f"{name}.weight", weight)], name, like)]
    biases = [weight_of(bias) for _, bias in parts if bias is not None]
    if biases:
        value = add_initializer(graph, f"{name}.bias", np.concatenate(biases))
        new.append(_node("Add", [new[0].outputs[0], value], f"{name}.add", like))
    return new, new[-1].outputs[0]


def _split(
    graph: ir.Graph, parts: list[tuple[ir.Node, ir.Node | None]], name: str, packed: ir.Value
) -> ir.Node:
    """A Split whose outputs take the place of the projections' own."""
    widths = np.array([weight_of(matmul).shape[1] for matmul, _ in parts], np.int64)
    sizes = add_initializer(graph, f"{name}.sizes", widths)
    split = _node(
        "Split", [packed, sizes], f"{name}.split", packed, attributes={"axis": -1}, num_outputs=len(parts)
    )
    for (matmul, bias), output in zip(parts, split.outputs, strict=True):
        (bias or matmul).outputs[0].replace_all_uses_with(output)
    return split


def _before_rotation(value: ir.Value | None) -> ir.Value | None:
    """What a query or key was before its per-head norm and rotary embedding."""
    while (node := value.producer() if value is not None else None) is not None:
        if node.op_type not in ("RotaryEmbedding", "SimplifiedLayerNormalization", "Reshape"):
            break
        value = node.inputs[0]
    return value


def pack_qkv(model: ir.Model) -> int:
    """One MatMul (and one bias) for query, key and value.

    The attention node takes them packed; where a norm or a rotary embedding stands between, a Split follows.
    """
    graph, packed = model.graph, 0
    for node in list(graph):
        if node.op_type != "GroupQueryAttention":
            continue
        direct = [found for x in node.inputs[:3] if (found := _projection(x)) is not None]
        parts = [found for x in node.inputs[:3] if (found := _projection(_before_rotation(x))) is not None]
        if len(parts) != 3 or not _packable(parts):
            continue
        first, like = parts[0][0], node.inputs[0]
        name = (first.name or f"attention.{packed}.q_proj").replace("q_proj", "qkv_proj")
        assert like is not None
        new, out = _pack(graph, parts, name, like)
        if len(direct) == 3:
            node.replace_input_with(0, out)
            node.replace_input_with(1, None)
            node.replace_input_with(2, None)
        else:
            new.append(_split(graph, parts, name, out))
        graph.insert_before(first, new)
        packed += 1
    common.RemoveUnusedNodesPass()(model)
    return packed


def pack_gate_up(model: ir.Model) -> int:
    """One MatMul (and one bias) for the gate and up projections of a gated MLP, then a Split."""
    graph, packed = model.graph, 0
    for node in list(graph):
        gate = _projection(node.inputs[0]) if node.op_type in ("Sigmoid", "Gelu") else None
        up = _gated_partner(node) if gate is not None else None
        if gate is None or up is None or not _packable([gate, up]):
            continue
        name = (gate[0].name or f"mlp.{packed}.gate_proj").rpartition(".")[0] + ".gate_up_proj"
        new, out = _pack(graph, [gate, up], name, gate[0].outputs[0])
        graph.insert_before(gate[0], [*new, _split(graph, [gate, up], name, out)])
        packed += 1
    common.RemoveUnusedNodesPass()(model)
    return packed


def _gated_partner(sigmoid: ir.Node) -> tuple[ir.Node, ir.Node | None] | None:
    """The up projection in `gate * sigmoid(gate) * up` or `gelu(gate) * up`, in any order of the factors."""
    if sigmoid.op_type == "Gelu":
        users = [user for user, _ in sigmoid.outputs[0].uses()]
        others = [
            x for user in users if user.op_type == "Mul" for x in user.inputs if x is not sigmoid.outputs[0]
        ]
        return _projection(others[0]) if len(users) == len(others) == 1 else None
    for user, _ in sigmoid.outputs[0].uses():
        if user.op_type != "Mul" or sigmoid.inputs[0] not in user.inputs:
            continue
        for last, _ in user.outputs[0].uses():
            others = [x for x in last.inputs if x is not user.outputs[0]]
            if last.op_type == "Mul" and len(others) == 1:
                return _projection(others[0])
    return None


def fuse_skip_norm(model: ir.Model) -> int:
    """Residual add followed by RMSNorm -> `com.microsoft::SkipSimplifiedLayerNormalization`."""
    graph, fused = model.graph, 0
    for node in list(graph):
        add = producer(node.inputs[0], "Add") if node.op_type == "SimplifiedLayerNormalization" else None
        if add is None or any(constant(value) is not None for value in add.inputs):
            continue
        skip = _node(
            "SkipSimplifiedLayerNormalization",
            [add.inputs[0], add.inputs[1], node.inputs[1]],
            f"{node.name}.skip",
            node.outputs[0],
            attributes={"epsilon": node.attributes["epsilon"].as_float()},
            domain=MICROSOFT,
            num_outputs=4,
        )
        graph.insert_before(node, skip)
        node.outputs[0].replace_all_uses_with(skip.outputs[0])
        add.outputs[0].replace_all_uses_with(skip.outputs[3])
        graph.remove([node, add], safe=True)
        fused += 1
    return fused


DECODER_PASSES: tuple[Callable[[ir.Model], int], ...] = (
    name_weights,
    fold_reshapes,
    pack_qkv,
    pack_gate_up,
    fuse_skip_norm,
    keep_last_logits,
)
"""In order. Names come first (packing builds on them), the logits cut last (it adds a graph input)."""


def run(model: ir.Model, passes: Iterable[Callable[[ir.Model], int]]) -> dict[str, int]:
    """Run `passes`, then sort and drop what became unused. Returns the number of changes per pass."""
    changes = {step.__name__: step(model) for step in passes}
    model.opset_imports[MICROSOFT] = 1
    common.RemoveUnusedNodesPass()(model)
    common.CommonSubexpressionEliminationPass()(model)
    common.TopologicalSortPass()(model)
    return changes


def strip(model: ir.Model) -> None:
    """Drop what only the tracer understands: node metadata, doc strings, operator sets that nothing uses."""
    for node in model.graph:
        node.metadata_props.clear()
        node.doc_string = None
    for value in [*model.graph.initializers.values(), *model.graph.inputs, *model.graph.outputs]:
        value.metadata_props.clear()
    model.graph.metadata_props.clear()
    model.metadata_props.clear()
    used = {node.domain for node in model.graph} | {""}
    for domain in set(model.opset_imports) - used:
        del model.opset_imports[domain]
