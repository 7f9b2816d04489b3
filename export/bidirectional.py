"""Decoders in which the tokens of a picture see each other, and some layers see a window only.

In: a transformers text model, its LM head and a `WindowedShape`. Out: an `onnx_ir.Model` in the layout of
`decoder.py` with one more input, `token_type_ids` (B, S), 1 for image tokens. Not here: the text decoder's
step (`decoder.py`), clean-up (`passes.py`).

`GroupQueryAttention` is causal. So each attention node becomes an `If`: a step without image tokens takes it
as it is; one with them takes standard operators with a mask. Weights stand outside and are stored once, and
both branches fill the same keys and values, handed on or in place. Masks are made once, for all layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir.passes import common
from torch import nn

from export.decoder import DecoderShape, _Decoder, _Trace, _traceable, to_onnx
from export.decoder import io_names as plain_names
from export.passes import MICROSOFT, add_initializer, producer

TYPES_INPUT = "token_type_ids"
_HIDDEN = float(np.finfo(np.float32).min)  # what transformers adds to a score that is masked
_END = np.iinfo(np.int64).max


@dataclass(frozen=True, kw_only=True)
class WindowedShape(DecoderShape):
    """`kinds`: each layer's name in the configuration. `windows`: by layer, tokens seen back with itself.

    A kind has its own rotary embedding; a window of None sees everything.
    """

    kinds: tuple[str, ...]
    windows: tuple[int | None, ...]

    @property
    def folds_rope(self) -> bool:
        """Never: both branches take rotated queries and keys."""
        return False


class _WindowedDecoder(_Decoder):
    """The plain step with angles by kind of layer, computed from positions: tables would be long."""

    def __init__(self, text: nn.Module, head: nn.Module, shape: WindowedShape, trace: _Trace) -> None:
        nn.Module.__init__(self)
        self.text, self.head, self._shape, self._trace = text, head, shape, trace
        self.rows_of: dict[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = {}

    def forward(  # type: ignore[override]
        self,
        inputs_embeds: torch.Tensor,
        attention_mask: torch.Tensor,
        position_ids: torch.Tensor,
        past: list[torch.Tensor],
    ) -> tuple[torch.Tensor, ...]:
        """As the plain decoder, 1-D positions; image tokens get their attention in `attend_both_ways`."""
        batch, length = position_ids.shape
        numbers = torch.arange(batch * length).view(batch, length)
        rotary: Any = self.text.rotary_emb
        for kind in sorted(set(self._shape.kinds)):  # type: ignore[attr-defined]
            angles = position_ids.reshape(-1, 1).float() * getattr(rotary, f"{kind}_inv_freq")
            scale = float(getattr(rotary, f"{kind}_attention_scaling"))
            cos, sin = (wave if scale == 1.0 else wave * scale for wave in (angles.cos(), angles.sin()))
            self.rows_of[kind] = numbers, cos, sin
        logits = self._logits(inputs_embeds, attention_mask, position_ids, past)
        return (logits, *(self._trace.present[i] for i in range(2 * self._shape.layers)))

    def _rows(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self.rows_of[self._shape.kinds[0]]  # type: ignore[attr-defined]


@contextlib.contextmanager
def _by_kind(text: Any, decoder: _WindowedDecoder, trace: _Trace, kinds: tuple[str, ...]) -> Iterator[None]:
    """Each layer of `text` rotates by its own kind's angles inside this block."""

    def choose(kind: str, *_: Any) -> None:
        trace.rows = decoder.rows_of[kind]

    with contextlib.ExitStack() as undo:
        for layer, kind in zip(text.layers, kinds, strict=True):
            undo.callback(layer.register_forward_pre_hook(partial(choose, kind)).remove)
        yield


@contextlib.contextmanager
def one_centred(*modules: nn.Module) -> Iterator[None]:
    """RMSNorms that multiply by 1 + weight have that factor as their weight inside this block."""
    norms = [m for module in modules for m in module.modules() if type(m).__name__.endswith("RMSNorm")]
    before = [norm.weight for norm in norms]
    try:
        for norm in norms:
            norm.weight = nn.Parameter(1.0 + norm.weight.detach(), requires_grad=False)  # type: ignore
        yield
    finally:
        for norm, weight in zip(norms, before, strict=True):
            norm.weight = weight


def trace_windowed(text: nn.Module, head: nn.Module, shape: WindowedShape) -> ir.Model:
    """Trace in float32 with dynamic batch, sequence and past. The modules are left as they were."""
    trace = _Trace()
    decoder = _WindowedDecoder(text, head, shape, trace).eval()
    batch, length, past = 2, 5, 7
    cache = [torch.zeros(batch, shape.kv_heads, past, shape.head_dim) for _ in range(2 * shape.layers)]
    example = (
        torch.zeros(batch, length, shape.hidden),
        torch.ones(batch, past + length, dtype=torch.long),
        torch.arange(past, past + length).expand(batch, length).contiguous(),
        cache,
    )
    auto = torch.export.Dim.DYNAMIC
    both = {0: auto, 1: auto}
    dynamic = (both, both, both, [{0: auto, 2: auto} for _ in cache])
    inputs, outputs = plain_names(shape.layers)
    with (
        one_centred(text),
        _traceable(text, trace, fold_rope=False),
        _by_kind(text, decoder, trace, shape.kinds),
    ):
        model = to_onnx(decoder, example, inputs, outputs, dynamic)
    drop_transposes(model)
    return model


def drop_transposes(model: ir.Model) -> int:
    """A norm of the last axis between two transposes that undo each other needs neither."""
    graph, changed = model.graph, 0
    for node in list(graph):
        norm = producer(node.inputs[0], "SimplifiedLayerNormalization") if _swaps_heads(node) else None
        first = norm.inputs[0].producer() if norm is not None and norm.inputs[0] is not None else None
        if norm is None or first is None or not _swaps_heads(first) or len(list(norm.outputs[0].uses())) > 1:
            continue
        source = first.inputs[0]
        assert source is not None
        norm.replace_input_with(0, source)
        norm.outputs[0].shape = source.shape
        node.outputs[0].replace_all_uses_with(norm.outputs[0])
        graph.remove(node, safe=True)
        changed += 1
    common.RemoveUnusedNodesPass()(model)
    return changed


def _swaps_heads(node: ir.Node) -> bool:
    return node.op_type == "Transpose" and list(node.attributes["perm"].as_ints()) == [0, 2, 1, 3]


# --- both ways --------------------------------------------------------


def attend_both_ways(model: ir.Model) -> int:
    """Give every attention node the branch for steps with image tokens, and the graph their input."""
    graph = model.graph
    nodes = [node for node in graph if node.op_type == "GroupQueryAttention"]
    inputs = {str(value.name): value for value in graph.inputs}
    types = ir.Value(
        name=TYPES_INPUT,
        shape=ir.Shape(["batch_size", "sequence_length"]),
        type=ir.TensorType(ir.DataType.INT64),
    )
    graph.inputs.append(types)
    build = _Builder(graph)
    front = _Front(build, types, inputs["attention_mask"], [_window(node) for node in nodes])
    graph.insert_before(graph[0], build.take())
    for node in nodes:
        _branch(graph, node, front)
    return len(nodes)


def _window(node: ir.Node) -> int | None:
    found = node.attributes.get("local_window_size")
    return None if found is None or found.as_int() < 0 else found.as_int()


class _Builder:
    """Nodes in order, with constants as weights of the outer graph."""

    def __init__(self, graph: ir.Graph, prefix: str = "both") -> None:
        self._graph, self._prefix, self._nodes = graph, prefix, list[ir.Node]()

    def __call__(
        self, op_type: str, *inputs: ir.Value | None, dtype: ir.DataType | None = None, **attributes: Any
    ) -> ir.Value:
        name = f"{self._prefix}.{op_type}_{len(self._nodes)}"
        node = ir.node(op_type, list(inputs), attributes=attributes, name=name)
        node.outputs[0].name = f"{name}.out"
        found = dtype or next((x.dtype for x in inputs if x is not None), None)
        if found is not None:
            node.outputs[0].dtype = found
        self._nodes.append(node)
        return node.outputs[0]

    def number(self, value: Any, dtype: Any = np.int64) -> ir.Value:
        """A constant, one for equal ones."""
        array = np.asarray(value, dtype)
        name = f"both.{array.dtype}.{'_'.join(map(str, array.ravel().tolist()))}.{array.ndim}"
        found = self._graph.initializers.get(name)
        return found if found is not None else add_initializer(self._graph, name, array)

    def take(self) -> list[ir.Node]:
        """The nodes so far; the builder is empty again."""
        nodes, self._nodes = self._nodes, []
        return nodes

    def within(self, prefix: str) -> _Builder:
        """Another one over the same graph's constants."""
        return _Builder(self._graph, prefix)


class _Front:
    """What all layers share: whether the step has image tokens, its lengths, and the masks of its windows."""

    def __init__(self, build: _Builder, types: ir.Value, mask: ir.Value, windows: list[int | None]) -> None:
        bool_, self.build = ir.DataType.BOOL, build
        n = build.number
        self.has_images = build(
            "Greater", build("ReduceMax", types, n([0, 1]), keepdims=0), n(0), dtype=bool_
        )
        self.total = build("Shape", mask, start=1, end=2, dtype=ir.DataType.INT64)
        self.past = build("Sub", self.total, build("Shape", types, start=1, end=2))
        self.masks: dict[int | None, ir.Value] = {}
        distinct = sorted(set(windows), key=lambda w: w or 0)
        then, otherwise = build.within("both.masks"), build.within("both.nothing")
        found = [self._mask(then, types, mask, window) for window in distinct]
        empty = [otherwise("Identity", n(np.zeros((1,) * 5), np.float32)) for _ in distinct]
        node = _if(self.has_images, (then, found), (otherwise, empty), "both.masks")
        build._nodes.append(node)
        self.masks = dict(zip(distinct, node.outputs, strict=True))

    def _mask(self, b: _Builder, types: ir.Value, mask: ir.Value, window: int | None) -> ir.Value:
        """(B, 1, 1, S, L): 0 where token s sees token l, else a large negative number.

        Before it, itself, or in the same run of image tokens; no further back than the window; no padding
        (transformers, `create_masks_for_vision_model` of the models that have it).
        """
        n, bool_, whole = b.number, ir.DataType.BOOL, ir.DataType.INT64
        image = b("Cast", types, to=whole, dtype=whole)
        before = b("Pad", b("Slice", image, n([0]), n([-1]), n([1])), n([0, 1, 0, 0]), n(0))
        starts = b("Mul", image, b("Sub", n(1), before))
        run = b("Mul", b("CumSum", starts, n(1)), image)  # (B, S): 0 for text, else the picture's number
        ahead = b("Concat", n([0, 0, 0]), self.past, axis=0)  # zeros in front, for tokens of the past
        pads = b("Gather", ahead, n([0, 3, 1, 2]))
        runs = b("Pad", run, pads, n(0))  # (B, L)
        key = b("Range", n(0), b("Squeeze", self.total), n(1))
        query = b("Slice", key, self.past, n([_END]), n([0]))
        column = b("Unsqueeze", query, n([1]))
        seen = b("LessOrEqual", key, column, dtype=bool_)
        same = b("Equal", b("Unsqueeze", run, n([2])), b("Unsqueeze", runs, n([1])), dtype=bool_)
        picture = b("Greater", b("Unsqueeze", run, n([2])), n(0), dtype=bool_)
        seen = b("Or", seen, b("And", same, picture))
        if window is not None:
            seen = b("And", seen, b("Greater", key, b("Sub", column, n(window)), dtype=bool_))
        real = b("Greater", b("Unsqueeze", mask, n([1])), n(0), dtype=bool_)
        seen = b("And", seen, real)
        score = b("Where", seen, n(0.0, np.float32), n(_HIDDEN, np.float32), dtype=ir.DataType.FLOAT)
        return b("Unsqueeze", score, n([1, 2]))


def _if(
    condition: ir.Value,
    then: tuple[_Builder, list[ir.Value]],
    otherwise: tuple[_Builder | list[ir.Node], list[ir.Value]],
    name: str,
) -> ir.Node:
    """An If node; both branches have no inputs of their own and read the outer graph's values."""
    graphs = []
    for (builder, outputs), branch in ((then, "then"), (otherwise, "else")):
        nodes = builder.take() if isinstance(builder, _Builder) else builder
        graphs.append(ir.Graph([], outputs, nodes=nodes, name=f"{name}.{branch}"))
    count = len(then[1])
    attributes = {"then_branch": graphs[0], "else_branch": graphs[1]}
    node = ir.node("If", [condition], attributes=attributes, num_outputs=count, name=name)
    for index, (output, like) in enumerate(zip(node.outputs, then[1], strict=True)):
        output.name = f"{name}.out{index}"
        if like.dtype is not None:
            output.dtype = like.dtype
    return node


def _branch(graph: ir.Graph, node: ir.Node, front: _Front) -> None:
    """Replace one GroupQueryAttention by an If around it."""
    name = node.name or "attention"
    then = front.build.within(f"{name}.both")
    outputs = _attention(then, node, front)
    inside = ir.node(
        node.op_type,
        list(node.inputs),
        attributes=dict(node.attributes),
        domain=MICROSOFT,
        num_outputs=3,
        name=f"{name}.causal",
    )
    for output, like, kind in zip(inside.outputs, outputs, ("out", "key", "value"), strict=True):
        output.name = f"{name}.causal.{kind}"
        if like.dtype is not None:
            output.dtype = like.dtype
    whole = _if(front.has_images, (then, outputs), ([inside], list(inside.outputs)), f"{name}.if")
    graph.insert_before(node, whole)
    for old, new in zip(node.outputs, whole.outputs, strict=True):
        wanted, new.shape = old.name, old.shape
        old.replace_all_uses_with(new, replace_graph_outputs=True)
        if new.is_graph_output():
            new.name = wanted
    graph.remove(node, safe=True)


def _attention(b: _Builder, node: ir.Node, front: _Front) -> list[ir.Value]:
    """Output (B, S, H * D), keys and values (B, KV, longest of past buffer and total, D)."""
    query, key, value, past_key, past_value = node.inputs[:5]
    assert query is not None and past_key is not None and past_value is not None
    n, heads = b.number, node.attributes["num_heads"].as_int()
    kv = node.attributes["kv_num_heads"].as_int()
    presents, so_far = [], []
    for new, past in ((key, past_key), (value, past_value)):
        split = b("Transpose", b("Reshape", new, n([0, 0, kv, -1])), perm=[0, 2, 1, 3])
        start = b("Slice", past, n([0]), front.past, n([2]))
        rest = b("Slice", past, front.total, n([_END]), n([2]))
        so_far.append(b("Concat", start, split, axis=2))
        presents.append(b("Concat", start, split, rest, axis=2))
    scaled = b("Mul", query, n(node.attributes["scale"].as_float(), np.float32))
    grouped = b(
        "Transpose", b("Reshape", scaled, n([0, 0, kv, heads // kv, -1])), perm=[0, 2, 3, 1, 4]
    )  # (B, KV, G, S, D)
    keys = b("Unsqueeze", b("Transpose", so_far[0], perm=[0, 1, 3, 2]), n([2]))
    scores = b("Add", b("MatMul", grouped, keys), front.masks[_window(node)])
    mixed = b("MatMul", b("Softmax", scores, axis=-1), b("Unsqueeze", so_far[1], n([2])))
    out = b("Reshape", b("Transpose", mixed, perm=[0, 3, 1, 2, 4]), n([0, 0, -1]))
    return [out, *presents]
