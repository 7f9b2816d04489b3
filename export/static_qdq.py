"""Static rounding of graphs with fixed shapes: pairs of QuantizeLinear and DequantizeLinear.

In: a float32 part, what it was fed on real pictures and prompts, a provider's recipe. Out: the part with
rounded weights and calibrated activations, and its float twin. Not here: schemes without calibration
(`quantize.py`).

Ranges are the least and the largest value seen. A recipe follows its provider's documentation: TensorRT takes
symmetric int8 (zero point 0), a scale per output channel of a weight, a pair of nodes for each user, and no
rounded outputs of weighted operators; QNN takes 16-bit activations and 8-bit weights of one scale each,
around every operator, because what is not rounded runs on the CPU.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import onnx_ir as ir
from numpy.typing import NDArray
from onnx_ir.passes import common

from evals.parity.parity import ParityCase, forced_logits
from export import audit, gate_turns
from export import quantize as rules
from export.passes import add_initializer, constant
from export.quantize_schemes import quiet_root
from runtime.errors import InputError, ParityError
from runtime.image import ImageFeatures, join_features
from runtime.positions import position_ids
from runtime.session import Session
from runtime.static_session import StaticBackend

Provider = Literal["tensorrt", "qnn"]
OPSET_16_BIT = 21
"""QuantizeLinear of the standard takes 16 bits from here on; onnxruntime 1.18 knows it."""

WEIGHTED = ("MatMul", "Gemm", "Conv")
REPLAYED = 64
"""Tokens of each prompt that also go through the graph of one token. Answers alone do not show it the first
tokens, whose activations are the largest of a sequence, and what is out of range is cut off."""


@dataclass(frozen=True)
class Recipe:
    """`masked`: what is added to a masked score, whose range 16 bits must share; None: the graph's own.

    `most_error`: relative rms of the logits to the float twin's, at most; `reason`: of that number.
    """

    provider: Provider
    activation_bits: int
    weight_bits: int
    most_error: float
    reason: str
    masked: float | None = None


RECIPES: dict[str, Recipe] = {
    "qdq-int8": Recipe(
        "tensorrt",
        activation_bits=8,
        weight_bits=8,
        most_error=0.4,
        reason="255 steps for a whole tensor: 11 to 27 % seen on random weights, unrelated logits give 140 %",
    ),
    "qdq-a16w8": Recipe(
        "qnn",
        activation_bits=16,
        weight_bits=8,
        most_error=0.1,
        reason="65,535 steps: below 1 % seen; a range that calibration missed is cut off and gives 40 %",
        masked=-100.0,
    ),
}


# --- what the parts see -----------------------------------------------


@dataclass(frozen=True)
class Feed:
    """Inputs of one run. Of a buffer only the `filled` entries along its axis are kept: the rest is zero."""

    inputs: dict[str, NDArray[Any]]
    buffers: dict[str, tuple[NDArray[Any], int]]  # the filled part, and the axis
    context: int

    def whole(self) -> dict[str, NDArray[Any]]:
        """Every input in full."""
        found = dict(self.inputs)
        for name, (array, axis) in self.buffers.items():
            room = [(0, 0)] * array.ndim
            room[axis] = (0, self.context - array.shape[axis])
            found[name] = np.pad(array, room)
        return found


Feeds = list[Feed]


def record(
    session: Session, cases: Sequence[ParityCase], talk: gate_turns.Conversation | None = None
) -> dict[str, Feeds]:
    """What each part is fed while the session answers the cases with their forced tokens, and a conversation.

    Later turns reach values that no first turn has; a range without them cuts those off. The beginning of
    every prompt then goes through the graph of one token as well.
    """
    backend = session.backend
    assert isinstance(backend, StaticBackend)
    found: dict[str, Feeds] = {part.role: [] for part in session.manifest.parts}
    run, context = backend.run, session.manifest.limits.context

    def looking_on(role: str, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        buffers = {}
        if role.startswith("decoder"):
            filled = int((inputs["past_mask"] == 0).sum())
            for state in session.manifest.state:
                axis = state.sequence_axis or 0
                part = (slice(None),) * axis + (slice(filled),)
                buffers[state.input] = (backend._buffers[state.input][part].copy(), axis)
        copied = {name: array.copy() for name, array in inputs.items()}
        found[role].append(Feed(copied, buffers, context))
        return run(role, outputs, inputs)

    backend.run = looking_on  # type: ignore[method-assign]
    try:
        for case in cases:
            pictures = [session.prepare(each) for each in case.images]
            features = [session.encode_image(each) for each in pictures]
            ids = session.prompt_ids(case.question, pictures)
            forced_logits(session, ids, features, case.forced)
            _replay(session, ids[:REPLAYED], features)
        if talk is not None:
            gate_turns.going_on(session, talk)
    finally:
        del backend.run
    return found


def _replay(session: Session, ids: NDArray[np.int64], features: Sequence[ImageFeatures]) -> None:
    """The prompt's ids one by one, each image token with its own feature."""
    backend = session.backend
    assert isinstance(backend, StaticBackend)
    joined = join_features(features) if features else None
    grids = [grid for each in features for grid in each.grids]
    is_image = ids == session.manifest.merge.token
    whole = np.full(sum(rows * columns for rows, columns in grids), session.manifest.merge.token)
    known = np.concatenate([ids, whole[int(is_image.sum()) :]])  # a picture that is cut off still has a grid
    positions, _ = position_ids(session.manifest.positions, known == session.manifest.merge.token, grids, 0)
    backend.rewind(0)
    for place in range(len(ids)):
        images = []
        if is_image[place] and joined is not None:
            nth = int(is_image[:place].sum())
            stack = None if joined.deepstack is None else joined.deepstack[:, nth : nth + 1]
            images = [ImageFeatures(joined.tokens[nth : nth + 1], ((1, 1),), stack)]
        backend.extend(ids[place : place + 1], positions[:, place : place + 1], images)


class _Reader:
    """The feeds of one part, as onnxruntime's calibrators read them."""

    def __init__(self, feeds: Feeds) -> None:
        self._left: Iterator[Feed] = iter(feeds)
        self._count = len(feeds)

    def get_next(self) -> dict[str, NDArray[Any]] | None:
        feed = next(self._left, None)
        return None if feed is None else feed.whole()

    def __iter__(self) -> _Reader:
        return self

    def __next__(self) -> dict[str, NDArray[Any]]:
        feed = self.get_next()
        if feed is None:
            raise StopIteration
        return feed

    def __len__(self) -> int:
        return self._count


# --- rounding ---------------------------------------------------------


def quantize(model: ir.Model, role: str, recipe: Recipe, feeds: Feeds) -> ir.Model:
    """A rounded copy; the embedding's rows get one scale each, without calibration. Raises InputError."""
    if role == "embed_tokens":
        return rules.quantize(model, role, rules.policy("int8"))
    if not feeds:
        raise InputError(f"{role}: nothing was fed to calibrate on; give sample images")
    named = ir.from_proto(ir.to_proto(model))
    for index, node in enumerate(named.graph):
        node.name = f"{node.op_type}_{index}"
    if recipe.activation_bits == 16:
        named.opset_imports[""] = OPSET_16_BIT
    with tempfile.TemporaryDirectory() as folder, quiet_root():
        source, out = Path(folder) / "in.onnx", Path(folder) / "out.onnx"
        ir.save(named, source, external_data="in.data")
        apply = _tensorrt if recipe.provider == "tensorrt" else _qnn
        apply(named, source, out, _Reader(feeds))
        found = ir.load(out)
        for value in found.graph.initializers.values():  # the folder goes away
            if value.const_value is not None:
                value.const_value = ir.tensor(np.array(value.const_value.numpy()), name=value.name)
    found.ir_version = model.ir_version
    return found


def _tensorrt(model: ir.Model, source: Path, out: Path, reader: _Reader) -> None:
    from onnxruntime.quantization import QuantFormat, QuantType, quantize_static

    weighted = [
        str(node.name)
        for node in model.graph
        if node.op_type in WEIGHTED and constant(node.inputs[1]) is not None
    ]
    quantize_static(
        source,
        out,
        reader,
        quant_format=QuantFormat.QDQ,
        op_types_to_quantize=list(WEIGHTED),
        nodes_to_quantize=weighted,
        per_channel=True,
        activation_type=QuantType.QInt8,
        weight_type=QuantType.QInt8,
        use_external_data_format=True,
        extra_options={
            "ActivationSymmetric": True,
            "WeightSymmetric": True,
            "QuantizeBias": False,
            "DedicatedQDQPair": True,
            "OpTypesToExcludeOutputQuantization": list(WEIGHTED),
            "QDQOpTypePerChannelSupportToAxis": {"MatMul": 1},
        },
    )


def _qnn(_: ir.Model, source: Path, out: Path, reader: _Reader) -> None:
    from onnxruntime.quantization import QuantType
    from onnxruntime.quantization import quantize as run
    from onnxruntime.quantization.execution_providers.qnn import get_qnn_qdq_config

    config = get_qnn_qdq_config(
        onnx.load(source),
        reader,
        activation_type=QuantType.QUInt16,
        weight_type=QuantType.QUInt8,
        keep_removable_activations=True,  # a Clip keeps the norms' divisors from zero
    )
    config.use_external_data_format = True
    run(source, out, config)


# --- the float twin ---------------------------------------------------


def float_twin(rounded: ir.Model) -> audit.Twin:
    """The part in float32 on its stored weights, without rounded activations."""
    twin = audit.float_twin(rounded)
    graph = twin.model.graph
    for node in list(graph):
        if node.op_type != "DequantizeLinear":
            continue
        stored = constant(node.inputs[0])
        if stored is not None:
            _weight_to_float(graph, node, stored, twin.steps)
            continue
        before = node.inputs[0].producer() if node.inputs[0] is not None else None
        if before is None or before.op_type != "QuantizeLinear":
            raise ParityError(f"{node.name}: DequantizeLinear of no rounded value; re-export")
        if any(not _equal(*pair) for pair in zip(before.inputs[1:], node.inputs[1:], strict=True)):
            raise ParityError(f"{node.name}: other scale or zero point than its QuantizeLinear; re-export")
        _replace(node.outputs[0], before.inputs[0])
    common.RemoveUnusedNodesPass()(twin.model)
    common.TopologicalSortPass()(twin.model)
    return twin


def _equal(left: ir.Value | None, right: ir.Value | None) -> bool:
    """Whether two scales or zero points are the same constant."""
    one, other = constant(left), constant(right)
    return one is not None and other is not None and np.array_equal(one, other)


def _weight_to_float(graph: ir.Graph, node: ir.Node, stored: NDArray[Any], steps: audit.Steps) -> None:
    scale = constant(node.inputs[1])
    zero = constant(node.inputs[2]) if len(node.inputs) > 2 else None
    assert scale is not None
    axis = node.attributes["axis"].as_int() if "axis" in node.attributes else 1
    shape = [-1 if place == axis else 1 for place in range(stored.ndim)] if scale.size > 1 else []
    scale, zero = scale.reshape(shape), None if zero is None else zero.reshape(shape)
    shift = np.zeros((), np.float32) if zero is None else zero.astype(np.float32)
    value = ((stored.astype(np.float32) - shift) * scale).astype(np.float32)
    name = f"{node.outputs[0].name}.float"
    steps[name] = (lambda: np.broadcast_to(np.abs(scale), stored.shape), audit.ROUNDING)
    _replace(node.outputs[0], add_initializer(graph, name, value))


def _replace(old: ir.Value, new: ir.Value | None) -> None:
    """Users of `old`, the graph's outputs among them, get `new`, which then has its name outside."""
    assert new is not None
    outside, name = old.is_graph_output(), old.name
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    if outside:
        old.name = f"{name}.rounded"
        new.name = name
