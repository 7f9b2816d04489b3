"""A bundle by hand whose decoder is a few lines of numpy: it feels position ids, deepstack and a conv state.

The logits after a sequence are `(sum over tokens of h * cos(angle) + three taps over the last h) @ head`,
where h is the embedding (or feature) plus the deepstack layers, and the angle a weighted sum of position ids.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from runtime.contract import TensorSpec
from runtime.image import ImageFeatures, join_features
from runtime.manifest import Deepstack, Manifest, Part, Positions1d, PositionsMrope, StateTensor

WIDTH = 8
LAYERS = 2
SCALE = 1 / 16
NAMES = {"float32": TensorProto.FLOAT, "int64": TensorProto.INT64, "int8": TensorProto.INT8}
ANGLES = np.array([0.3, 0.7, 1.1], np.float32)
TAPS = np.array([0.5, -1.5, 2.0], np.float32)
Array = NDArray[Any]


@dataclass(frozen=True)
class HandMade:
    """The manifest of the parts in `directory`, and their numbers."""

    directory: Path
    manifest: Manifest
    table: Array
    head: Array

    def logits(self, ids: Array, positions: Array, images: Sequence[ImageFeatures]) -> Array:
        """(vocab,) after ids (S,) at positions (1 or 3, S)."""
        hidden = self.table[ids].copy()
        places = np.flatnonzero(ids == self.manifest.merge.token)
        if images:
            joined = join_features(images)
            hidden[places] = joined.tokens
            if joined.deepstack is not None:
                hidden[places] += joined.deepstack.sum(0)
        angles = (positions * ANGLES[: len(positions), None]).sum(0)
        total = (hidden * np.cos(angles)[:, None]).sum(0)
        if any(state.kind == "conv" for state in self.manifest.state):
            total = total + TAPS @ np.concatenate([np.zeros((2, WIDTH), np.float32), hidden])[-3:]
        return total @ self.head


def hand_made(
    directory: Path, base: Manifest, *, conv: bool, deepstack: bool, mrope: bool, int8: bool = False
) -> HandMade:
    """Write the parts; image section, prompt and tokenizer are those of `base`.

    `int8`: the key state is rounded in the graph, in steps of `SCALE`.
    """
    random = np.random.default_rng(5)
    vocab = next(spec.shape[-1] for spec in base.part("decoder").outputs if spec.name == "logits")
    assert isinstance(vocab, int)
    table, head = (random.normal(size=shape).astype(np.float32) for shape in ((vocab, WIDTH), (WIDTH, vocab)))
    tokens = base.image.max_tokens
    directory.mkdir(parents=True, exist_ok=True)
    models = {
        "vision_encoder": _vision(tokens, deepstack),
        "embed_tokens": _embed(table),
        "decoder": _decoder(head, conv, deepstack, mrope, int8),
    }
    states = [_kv("right" if conv else None, "int8" if int8 else "float32")] + ([_conv()] if conv else [])
    parts = tuple(_part(directory, role, model) for role, model in models.items())
    positions = PositionsMrope(sections=(2, 1, 1), interleaved=False) if mrope else Positions1d()
    stack = Deepstack(layers=LAYERS, output="deepstack_features", input="deepstack_embeds")
    changes = {
        "parts": parts,
        "state": tuple(states),
        "positions": positions,
        "deepstack": stack if deepstack else None,
        "limits": base.limits.model_copy(update={"images": 4}),
    }
    return HandMade(directory, base.model_copy(update=changes), table, head)


def _kv(padding_side: Literal["right"] | None, dtype: Literal["int8", "float32"]) -> StateTensor:
    """Nothing here looks at the mask: no rows of unequal lengths."""
    return StateTensor(
        input="past_key_values.0.key",
        output="present.0.key",
        kind="kv",
        dtype=dtype,
        shape=("batch", 1, "past", WIDTH),
        sequence_axis=2,
        rewindable=True,
        padding_side=padding_side,
    )


def _conv() -> StateTensor:
    return StateTensor(
        input="past_conv.0",
        output="present_conv.0",
        kind="conv",
        dtype="float32",
        shape=("batch", WIDTH, 2),
        rewindable=False,
    )


def _vision(tokens: int, deepstack: bool) -> onnx.ModelProto:
    """A feature is a slice of the pixels; deepstack layer i is that times i + 1."""
    shape = [1, tokens, WIDTH]
    nodes = [
        helper.make_node("Reshape", ["pixel_values", "flat"], ["line"]),
        helper.make_node("Slice", ["line", "zero", "count", "zero"], ["some"]),
        helper.make_node("Reshape", ["some", "shape"], ["image_features"]),
    ]
    constants: dict[str, Any] = {
        "flat": np.array([-1]),
        "zero": np.array([0]),
        "count": np.array([tokens * WIDTH]),
        "shape": np.array(shape),
    }
    outputs = [("image_features", np.float32, shape)]
    if deepstack:
        nodes.append(helper.make_node("Mul", ["image_features", "layers"], ["deepstack_features"]))
        constants["layers"] = np.arange(1, LAYERS + 1, dtype=np.float32).reshape(-1, 1, 1)
        outputs.append(("deepstack_features", np.float32, [LAYERS, tokens, WIDTH]))
    return _model(nodes, [("pixel_values", np.float32, ["n", 3, "h", "w"])], outputs, constants)


def _embed(table: Array) -> onnx.ModelProto:
    nodes = [helper.make_node("Gather", ["table", "input_ids"], ["inputs_embeds"])]
    return _model(
        nodes,
        [("input_ids", np.int64, ["batch", "length"])],
        [("inputs_embeds", np.float32, ["batch", "length", WIDTH])],
        {"table": table},
    )


def _decoder(head: Array, conv: bool, deepstack: bool, mrope: bool, int8: bool) -> onnx.ModelProto:
    node = helper.make_node
    axes, kept = (3 if mrope else 1), (np.int8 if int8 else np.float32)
    inputs: list[Any] = [
        ("inputs_embeds", np.float32, ["batch", "length", WIDTH]),
        ("attention_mask", np.int64, ["batch", "total"]),
        ("position_ids", np.int64, [*([3] if mrope else []), "batch", "length"]),
        ("num_logits_to_keep", np.int64, []),
        ("past_key_values.0.key", kept, ["batch", 1, "past", WIDTH]),
    ]
    outputs: list[Any] = [
        ("logits", np.float32, ["batch", 1, head.shape[1]]),
        ("present.0.key", kept, ["batch", 1, "total", WIDTH]),
    ]
    nodes = [node("Cast", ["position_ids"], ["places"], to=TensorProto.FLOAT)]
    if not mrope:
        nodes.append(node("Unsqueeze", ["places", "0"], ["places_3"]))
    hidden = "inputs_embeds"
    if deepstack:
        inputs.append(("deepstack_embeds", np.float32, [LAYERS, "batch", "length", WIDTH]))
        nodes += [
            node("ReduceSum", ["deepstack_embeds", "0"], ["stack"], keepdims=0),
            node("Add", ["inputs_embeds", "stack"], ["hidden"]),
        ]
        hidden = "hidden"
    nodes += [
        node("Mul", ["places" if mrope else "places_3", "angles"], ["angle_parts"]),
        node("ReduceSum", ["angle_parts", "0"], ["angle"], keepdims=0),
        node("Cos", ["angle"], ["cos"]),
        node("Unsqueeze", ["cos", "-1"], ["cos_3"]),
        node("Mul", [hidden, "cos_3"], ["turned"]),
        node("Unsqueeze", ["turned", "1"], ["exact" if int8 else "key"]),
        *([node("QuantizeLinear", ["exact", "scale", "middle"], ["key"])] if int8 else []),
        node("Concat", ["past_key_values.0.key", "key"], ["present.0.key"], axis=2),
        *([node("DequantizeLinear", ["present.0.key", "scale", "middle"], ["read"])] if int8 else []),
        node("ReduceSum", ["read" if int8 else "present.0.key", "1 2"], ["total"], keepdims=0),
    ]
    result = "total"
    if conv:
        inputs.append(("past_conv.0", np.float32, ["batch", WIDTH, 2]))
        outputs.append(("present_conv.0", np.float32, ["batch", WIDTH, 2]))
        nodes += [
            node("Transpose", [hidden], ["columns"], perm=[0, 2, 1]),
            node("Concat", ["past_conv.0", "columns"], ["window"], axis=2),
            node("Slice", ["window", "-2", "end", "2"], ["present_conv.0"]),
            node("Slice", ["window", "-3", "end", "2"], ["last"]),
            node("Mul", ["last", "taps"], ["tapped"]),
            node("ReduceSum", ["tapped", "2"], ["conv"], keepdims=0),
            node("Add", ["total", "conv"], ["both"]),
        ]
        result = "both"
    nodes += [
        node("MatMul", [result, "head"], ["flat_logits"]),
        node("Unsqueeze", ["flat_logits", "1"], ["logits"]),
    ]
    constants = {
        "angles": ANGLES[:axes].reshape(-1, 1, 1),
        "taps": TAPS,
        "head": head,
        "end": np.array([2**31]),
        "scale": np.float32(SCALE),
        "middle": np.int8(0),
        "1 2": np.array([1, 2]),
        **{str(n): np.array([n]) for n in (-3, -2, -1, 0, 1, 2)},
    }
    return _model(nodes, inputs, outputs, constants)


def _model(
    nodes: list[Any], inputs: list[Any], outputs: list[Any], constants: dict[str, Any]
) -> onnx.ModelProto:
    def info(name: str, kind: Any, shape: list[Any]) -> Any:
        return helper.make_tensor_value_info(name, NAMES[np.dtype(kind).name], shape)

    graph = helper.make_graph(
        nodes,
        "by hand",
        [info(*each) for each in inputs],
        [info(*each) for each in outputs],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)


def _part(directory: Path, role: str, model: onnx.ModelProto) -> Part:
    onnx.save(model, directory / f"{role}.onnx")

    def spec(value: Any) -> TensorSpec:
        kind = value.type.tensor_type
        dtype = next(name for name, number in NAMES.items() if number == kind.elem_type)
        shape = tuple(dim.dim_param or dim.dim_value for dim in kind.shape.dim)
        return TensorSpec(name=value.name, dtype=dtype, shape=shape)  # type: ignore[arg-type]

    return Part(
        role=role,  # type: ignore[arg-type]
        path=f"{role}.onnx",
        sha256="0" * 64,
        bytes=0,
        inputs=tuple(map(spec, model.graph.input)),
        outputs=tuple(map(spec, model.graph.output)),
        bits=(),
    )
