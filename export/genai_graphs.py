"""The graphs that onnxruntime-genai wants otherwise than a bundle has them, over the same weights.

In: a written part, read back. Out: an `onnx_ir` model whose weights still lie in the part's data files.
Not here: the configuration and which bundles get it (`genai.py`).

Its pipeline (`MultiModalLanguageModel`) runs vision -> `image_features`, embedding (ids and features) ->
`inputs_embeds`, decoder -> `logits`, one tensor between two graphs. What else a decoder takes of a picture
travels inside that tensor as further columns (`Passenger`): zero for text, and the decoder cuts them off.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import onnx_ir as ir

from export.passes import KEEP_INPUT, add_initializer
from runtime.manifest import ImageAttention, Manifest

FEATURES, EMBEDS = "image_features", "inputs_embeds"
MASK = "pixel_attention_mask"
_PREFIX = "genai"
_Dims: TypeAlias = Sequence[int | str | ir.SymbolicDim]


@dataclass(frozen=True)
class Passenger:
    """The decoder's input `name`, and how it comes with the embeddings.

    `layers`: deepstack, as many times `hidden` columns, the vision part's output `source`. 0: whether a token
    is one of a picture, one column of 0 and 1.
    """

    name: str
    source: str = ""
    layers: int = 0

    def columns(self, hidden: int) -> int:
        """How much wider a row is."""
        return self.layers * hidden or 1


def passenger(draft: Manifest) -> Passenger | None:
    """What the decoder takes of a picture besides its features."""
    if draft.deepstack is not None:
        return Passenger(draft.deepstack.input, draft.deepstack.output, draft.deepstack.layers)
    return Passenger(draft.attention.input) if isinstance(draft.attention, ImageAttention) else None


def embedding(path: Path, token: int, features: ir.DataType, rider: Passenger | None) -> ir.Model:
    """Ids (B, S) and features (T, width) -> (B, S, width), the n-th `token` replaced by the n-th feature.

    `width` is hidden and the rider's columns. The features' rank is open: a vision graph of pictures of one
    size gives (N, T / N, width). A `token` without a feature keeps its embedding: an answer may contain one.
    """
    model = ir.load(path)
    graph = model.graph
    ids, text = graph.inputs[0], graph.outputs[0]
    hidden, dtype = _width(text), _dtype(text)
    width = hidden + (rider.columns(hidden) if rider else 0)
    assert text.shape is not None
    dims = [*list(text.shape)[:-1], width]
    text.name = f"{_PREFIX}.text"
    graph.outputs.clear()
    given = ir.Value(name=FEATURES, type=ir.TensorType(features))
    graph.inputs.append(given)
    rows = _add(graph, "Reshape", [given, _vector(graph, "flat", -1, width)], "rows")
    if features != dtype:
        rows = _add(graph, "Cast", [rows], "rows.cast", to=dtype)
    if rider is not None:
        text = _widened(graph, text, width - hidden, 0)
    image = add_initializer(graph, f"{_PREFIX}.token", np.array(token, _dtype(ids).numpy()))
    places = _add(graph, "NonZero", [_add(graph, "Equal", [ids, image], "is_image")], "places.t")
    places = _add(graph, "Transpose", [places], "places.all", perm=[1, 0])
    count = _add(graph, "Shape", [rows], "count", start=0, end=1)
    places = _add(graph, "Slice", [places, _vector(graph, "first", 0), count], "places")
    return _finished(model, _add(graph, "ScatterND", [text, places, rows], "merged"), EMBEDS, dtype, dims)


def decoder(path: Path, rider: Passenger | None) -> ir.Model:
    """The decoder with logits of the last position only, as a fixed size; the rider comes with the embeds."""
    model = ir.load(path)
    graph = model.graph
    inputs = {str(value.name): value for value in graph.inputs}
    logits = next(value for value in graph.outputs if value.name == "logits")
    assert logits.shape is not None
    _replace(graph, inputs[KEEP_INPUT], add_initializer(graph, f"{_PREFIX}.keep", np.array(1, np.int64)))
    logits.shape = ir.Shape([logits.shape[0], 1, logits.shape[2]])
    if rider is not None:
        _unpack(graph, inputs[EMBEDS], inputs[rider.name], rider)
    return model


def vision(path: Path, rider: Passenger | None, *, mask: bool) -> ir.Model | None:
    """The vision part with the rider's columns beside the features, and an input for a mask that it can do
    without; None where the part serves as it is."""
    if rider is None and not mask:
        return None
    model = ir.load(path)
    graph = model.graph
    if mask:  # its image processor asks for the name; padding is cut by the shape already
        dims = ir.Shape(["num_images", "padded_patches"])
        graph.inputs.append(ir.Value(name=MASK, shape=dims, type=ir.TensorType(ir.DataType.INT64)))
    if rider is not None:
        outputs = {str(value.name): value for value in graph.outputs}
        features = outputs[FEATURES]
        hidden = _width(features)
        columns = rider.columns(hidden)
        assert features.shape is not None
        dims_out = [*list(features.shape)[:-1], hidden + columns]
        features.name = f"{_PREFIX}.features"
        graph.outputs.clear()
        if rider.layers:
            rows = _add(graph, "Transpose", [outputs[rider.source]], "by_token", perm=[1, 0, 2])
            rows = _add(graph, "Reshape", [rows, _vector(graph, "flat", 0, columns)], "rows")
            packed = _add(graph, "Concat", [features, rows], "packed", axis=-1)
        else:
            packed = _widened(graph, features, columns, 1)
        return _finished(model, packed, FEATURES, _dtype(features), dims_out)
    return model


def _widened(graph: ir.Graph, value: ir.Value, columns: int, number: int) -> ir.Value:
    """`value` (..., width) with so many columns of `number` after its own."""
    one = add_initializer(graph, f"{_PREFIX}.number", np.array(number, _dtype(value).numpy()))
    rows = _add(graph, "Shape", [value], "leading", start=0, end=-1)
    shape = _add(graph, "Concat", [rows, _vector(graph, "columns", columns)], "shape", axis=0)
    return _add(graph, "Concat", [value, _add(graph, "Expand", [one, shape], "filled")], "wide", axis=-1)


def _unpack(graph: ir.Graph, embeds: ir.Value, other: ir.Value, rider: Passenger) -> None:
    """`inputs_embeds` (B, S, width) becomes the embeds and what rides with them."""
    hidden = _width(embeds)
    columns = rider.columns(hidden)
    assert embeds.shape is not None
    shape = ir.Shape([*list(embeds.shape)[:-1], hidden + columns])
    packed = ir.Value(name=EMBEDS, shape=shape, type=ir.TensorType(_dtype(embeds)))
    cut = ir.node(
        "Split",
        [packed, _vector(graph, "sizes", hidden, columns)],
        {"axis": -1},
        num_outputs=2,
        name=f"{_PREFIX}.cut",
    )
    cut.outputs[0].name, cut.outputs[1].name = f"{_PREFIX}.embeds", f"{_PREFIX}.rider"
    if rider.layers:  # (B, S, layers x hidden) -> (layers, B, S, hidden)
        sizes = _vector(graph, "by_layer", 0, 0, rider.layers, hidden)
        apart = _node("Reshape", [cut.outputs[1], sizes], "apart")
        last = _node("Transpose", [apart.outputs[0]], "turned", perm=[2, 0, 1, 3])
    else:  # (B, S, 1) -> (B, S)
        apart = _node("Squeeze", [cut.outputs[1], _vector(graph, "axis", -1)], "apart")
        last = _node("Cast", [apart.outputs[0]], "types", to=_dtype(other))
    first, place = graph[0], list(graph.inputs).index(embeds)
    _replace(graph, other, last.outputs[0])
    _replace(graph, embeds, cut.outputs[0])
    graph.inputs.insert(place, packed)
    graph.insert_before(first, [cut, apart, last])


def _replace(graph: ir.Graph, value: ir.Value, by: ir.Value) -> None:
    """`by` wherever the graph input `value` was used, which is then an input no more."""
    for node, index in list(value.uses()):
        node.replace_input_with(index, by)
    graph.inputs.remove(value)


def _width(value: ir.Value) -> int:
    assert value.shape is not None and isinstance(value.shape[-1], int)
    return value.shape[-1]


def _dtype(value: ir.Value) -> ir.DataType:
    assert value.dtype is not None
    return value.dtype


def _vector(graph: ir.Graph, name: str, *numbers: int) -> ir.Value:
    return add_initializer(graph, f"{_PREFIX}.{name}", np.array(numbers, np.int64))


def _node(op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: object) -> ir.Node:
    node = ir.node(op_type, inputs, attributes, name=f"{_PREFIX}.{name}")  # type: ignore[arg-type]
    node.outputs[0].name = f"{_PREFIX}.{name}.out"
    return node


def _add(
    graph: ir.Graph, op_type: str, inputs: Sequence[ir.Value], name: str, **attributes: object
) -> ir.Value:
    """The output of one more node at the end of the graph."""
    node = _node(op_type, inputs, name, **attributes)
    graph.append(node)
    return node.outputs[0]


def _finished(model: ir.Model, value: ir.Value, name: str, dtype: ir.DataType, dims: _Dims) -> ir.Model:
    """`value` becomes the graph's only output."""
    value.name, value.dtype, value.shape = name, dtype, ir.Shape(dims)
    model.graph.outputs.append(value)
    return model
