"""The graphs that onnxruntime-genai wants otherwise than a bundle has them, over the same weights.

In: a written part, read back. Out: an `onnx_ir` model whose weights still lie in the part's data files.
Not here: the configuration and which bundles get it (`genai.py`).

Its pipeline (`MultiModalLanguageModel`) runs vision -> `image_features`, embedding (ids and features) ->
`inputs_embeds`, decoder -> `logits`, one tensor between two graphs. Where a family also adds features to
early layers (deepstack), these travel inside that tensor: a row is the embedding and then the addition of
each layer, so it is `layers + 1` times as wide, and the decoder cuts it up again.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir

from export.passes import KEEP_INPUT, add_initializer
from runtime.manifest import Deepstack

FEATURES, EMBEDS = "image_features", "inputs_embeds"
MASK = "pixel_attention_mask"
_PREFIX = "genai"


def embedding(path: Path, token: int, features: ir.DataType, layers: int) -> ir.Model:
    """Ids (B, S) and features (T, width) -> (B, S, width), the n-th `token` replaced by the n-th feature.

    `width` is hidden x (layers + 1): what deepstack adds to a token of text is zero. A `token` without a
    feature keeps its embedding: an answer may contain one.
    """
    model = ir.load(path)
    graph = model.graph
    ids, embeds = graph.inputs[0], graph.outputs[0]
    assert embeds.shape is not None and embeds.dtype is not None
    hidden = int(embeds.shape[-1])  # type: ignore[arg-type]
    dims = [*list(embeds.shape)[:-1], hidden * (layers + 1)]
    embeds.name = f"{_PREFIX}.text"
    graph.outputs.clear()
    rows = _input(graph, FEATURES, features, ["num_image_tokens", dims[-1]])
    found = embeds
    if layers:
        zero = add_initializer(graph, f"{_PREFIX}.zero", np.array(0, embeds.dtype.numpy()))
        wide = _vector(graph, "wide", hidden * layers)
        shape = _add(graph, "Concat", [_add(graph, "Shape", [ids], "ids.shape"), wide], "shape", axis=0)
        found = _add(
            graph, "Concat", [embeds, _add(graph, "Expand", [zero, shape], "none")], "padded", axis=-1
        )
    if features != embeds.dtype:
        rows = _add(graph, "Cast", [rows], "rows", to=embeds.dtype)
    image = add_initializer(graph, f"{_PREFIX}.token", np.array(token, ids.dtype.numpy()))  # type: ignore[union-attr]
    places = _add(graph, "NonZero", [_add(graph, "Equal", [ids, image], "is_image")], "places.t")
    places = _add(graph, "Transpose", [places], "places.all", perm=[1, 0])
    count = _add(graph, "Shape", [rows], "count", start=0, end=1)
    places = _add(graph, "Slice", [places, _vector(graph, "first", 0), count], "places")
    merged = _add(graph, "ScatterND", [found, places, rows], "merged")
    return _finished(model, merged, EMBEDS, embeds.dtype, dims)


def decoder(path: Path, deepstack: Deepstack | None) -> ir.Model:
    """The decoder with logits of the last position only, as a fixed size; deepstack comes with the embeds."""
    model = ir.load(path)
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    _replace(graph, inputs[KEEP_INPUT], add_initializer(graph, f"{_PREFIX}.keep", np.array(1, np.int64)))
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
    if deepstack is not None:
        _unpack(graph, inputs[EMBEDS], inputs[deepstack.input], deepstack.layers)
    return model


def vision(path: Path, deepstack: Deepstack | None, *, mask: bool) -> ir.Model | None:
    """The vision part with deepstack's features beside the others, and an input for a mask that it can do
    without; None where the part serves as it is."""
    if deepstack is None and not mask:
        return None
    model = ir.load(path)
    graph = model.graph
    if mask:  # its image processor asks for the name; padding is cut by the shape already
        _input(graph, MASK, ir.DataType.INT64, ["num_images", "padded_patches"])
    if deepstack is not None:
        features, stack = (_output(graph, name) for name in (FEATURES, deepstack.output))
        assert features.shape is not None and features.dtype is not None
        hidden = int(features.shape[-1])  # type: ignore[arg-type]
        dims = [features.shape[0], hidden * (deepstack.layers + 1)]
        features.name = f"{_PREFIX}.features"
        graph.outputs.clear()
        rows = _add(graph, "Transpose", [stack], "by_token", perm=[1, 0, 2])
        rows = _add(graph, "Reshape", [rows, _vector(graph, "flat", 0, hidden * deepstack.layers)], "rows")
        packed = _add(graph, "Concat", [features, rows], "packed", axis=-1)
        return _finished(model, packed, FEATURES, features.dtype, dims)
    return model


def _unpack(graph: ir.Graph, embeds: ir.Value, stack: ir.Value, layers: int) -> None:
    """`inputs_embeds` (B, S, (layers + 1) x hidden) becomes the embeds and (layers, B, S, hidden)."""
    assert embeds.shape is not None and embeds.dtype is not None
    hidden = int(embeds.shape[-1])  # type: ignore[arg-type]
    shape = [*list(embeds.shape)[:-1], hidden * (layers + 1)]
    packed = ir.Value(name=EMBEDS, shape=ir.Shape(shape), type=ir.TensorType(embeds.dtype))
    sizes = _vector(graph, "sizes", hidden, hidden * layers)
    cut = ir.node("Split", [packed, sizes], {"axis": -1}, num_outputs=2, name=f"{_PREFIX}.cut")
    cut.outputs[0].name, cut.outputs[1].name = f"{_PREFIX}.embeds", f"{_PREFIX}.additions"
    split = ir.node(
        "Reshape", [cut.outputs[1], _vector(graph, "by_layer", 0, 0, layers, hidden)], name=f"{_PREFIX}.split"
    )
    split.outputs[0].name = f"{_PREFIX}.split.out"
    turned = ir.node("Transpose", [split.outputs[0]], {"perm": [2, 0, 1, 3]}, name=f"{_PREFIX}.turned")
    turned.outputs[0].name = f"{_PREFIX}.turned.out"
    first = graph[0]
    _replace(graph, stack, turned.outputs[0])
    place = list(graph.inputs).index(embeds)
    _replace(graph, embeds, cut.outputs[0])
    graph.inputs.insert(place, packed)
    graph.insert_before(first, [cut, split, turned])


def _replace(graph: ir.Graph, value: ir.Value, by: ir.Value) -> None:
    """`by` wherever the graph input `value` was used, which is then an input no more."""
    for node, index in list(value.uses()):
        node.replace_input_with(index, by)
    graph.inputs.remove(value)


def _input(graph: ir.Graph, name: str, dtype: ir.DataType, dims: list[int | str]) -> ir.Value:
    value = ir.Value(name=name, shape=ir.Shape(dims), type=ir.TensorType(dtype))
    graph.inputs.append(value)
    return value


def _output(graph: ir.Graph, name: str) -> ir.Value:
    return next(value for value in graph.outputs if value.name == name)


def _vector(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    return add_initializer(graph, f"{_PREFIX}.{name}", np.array(numbers, np.int64))


def _add(graph: ir.Graph, op_type: str, inputs: list[ir.Value], name: str, **attributes: object) -> ir.Value:
    """The output of one more node at the end of the graph."""
    node = ir.node(op_type, inputs, attributes, name=f"{_PREFIX}.{name}")  # type: ignore[arg-type]
    node.outputs[0].name = f"{_PREFIX}.{name}.out"
    graph.append(node)
    return node.outputs[0]


def _finished(
    model: ir.Model, value: ir.Value, name: str, dtype: ir.DataType, dims: list[object]
) -> ir.Model:
    """`value` becomes the graph's only output."""
    value.name, value.dtype, value.shape = name, dtype, ir.Shape(dims)  # type: ignore[arg-type]
    model.graph.outputs.append(value)
    return model
