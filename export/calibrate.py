"""What flows through the float decoder on prompts about pictures: cache scales and calibrated blocks.

In: a session over the float32 parts, their graphs, and questions about pictures with forced answers. Out: a
`Calibration`. Not here: the rounding of a weight (`gptq.py`), writing nodes (`quantize_schemes.py`).

Activations are read from the graph itself (its inner values become outputs), not from torch: this needs to
know nothing about a family, and packed projections are seen as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from evals.parity.parity import ParityCase
from export import gptq, storage
from export.passes import constant
from runtime.errors import InputError
from runtime.generation import GenerationOptions
from runtime.image import ImageInput, join_features
from runtime.manifest import ImageAttention
from runtime.positions import position_ids
from runtime.session import Session

Feeds = dict[str, NDArray[Any]]
Example = tuple[ImageInput, str]
"""A picture and a question about it."""

ANSWER_TOKENS = 16
PROBES = 64
"""Rows of held-out activations kept for each weight: they choose between the roundings, and the audit."""

_HESSIAN_FLOATS = 64_000_000
"""Weights are calibrated in groups whose second moments fit this many float32."""


@dataclass
class Calibration:
    """Decoder graph and its inputs for each prompt; the last quarter (at least one) only judges."""

    decoder: ir.Model
    feeds: Sequence[Feeds]

    def __post_init__(self) -> None:
        if len(self.feeds) < 2:
            raise InputError(
                f"calibration: got {len(self.feeds)} prompts, wanted at least 2; give more images"
            )
        self._rounded: dict[tuple[str, int], gptq.Rounded] = {}

    @cached_property
    def scales(self) -> dict[str, NDArray[np.float32]]:
        """By cache output, (kv heads * head size,): the largest value of each channel over 127."""
        names = [str(out.name) for node in self._attention() for out in node.outputs[1:3]]
        keys = {str(node.outputs[1].name) for node in self._attention()}
        most: dict[str, NDArray[np.float32]] = {}
        for found in self._run(names, self.feeds):
            for name, cache in found.items():
                largest = _largest(cache, paired=name in keys)
                most[name] = np.maximum(most.get(name, largest), largest)
        tiny = np.finfo(np.float32).tiny
        return {
            name: np.maximum(each.reshape(-1) / 127.0, tiny).astype(np.float32) for name, each in most.items()
        }

    def rounded(self, node: str, size: int) -> gptq.Rounded:
        """The calibrated 4-bit blocks of the MatMul called `node`."""
        if (node, size) not in self._rounded:
            self._round_all(size, node)
        return self._rounded[node, size]

    def _round_all(self, size: int, wanted: str) -> None:
        """Calibrate the group of weights that holds `wanted`: every run of the graph serves all of them."""
        for group in self._groups():
            if wanted not in [str(node.name) for node in group]:
                continue
            taps = {str(node.name): str(node.inputs[0].name) for node in group if node.inputs[0] is not None}
            moments, probes = self._moments(sorted(set(taps.values())))
            for node in group:
                weight, tap = constant(node.inputs[1]), taps[str(node.name)]
                assert weight is not None
                self._rounded[str(node.name), size] = gptq.better(weight, moments[tap], probes[tap], size)

    def _groups(self) -> Iterator[list[ir.Node]]:
        group: list[ir.Node] = []
        floats = 0
        for node in self.decoder.graph:
            weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
            if weight is None or weight.ndim != 2:
                continue
            if group and floats + len(weight) ** 2 > _HESSIAN_FLOATS:
                yield group
                group, floats = [], 0
            group.append(node)
            floats += len(weight) ** 2
        if group:
            yield group

    def _moments(self, taps: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Second moments (K, K) over the fitting prompts, and (up to PROBES, K) rows of the judging ones."""
        held = max(1, len(self.feeds) // 4)
        moments: dict[str, Any] = {}
        for found in self._run(taps, self.feeds[:-held]):
            for name, value in found.items():
                rows = value.reshape(-1, value.shape[-1]).astype(np.float32)
                moments[name] = moments.get(name, 0.0) + rows.T @ rows
        rows_of: dict[str, list[Any]] = {name: [] for name in taps}
        for found in self._run(taps, self.feeds[-held:]):
            for name, value in found.items():
                rows_of[name].append(value.reshape(-1, value.shape[-1]))
        return moments, {name: _thinned(np.concatenate(rows)) for name, rows in rows_of.items()}

    def _attention(self) -> list[ir.Node]:
        return [node for node in self.decoder.graph if node.op_type == "GroupQueryAttention"]

    def _run(self, names: Sequence[str], feeds: Sequence[Feeds]) -> Iterator[Feeds]:
        for each in feeds:
            yield dict(zip(names, self._session.run(list(names), each), strict=True))

    @cached_property
    def _session(self) -> Any:
        """The decoder with the inputs of its MatMuls among the outputs."""
        model = ir.from_proto(ir.to_proto(self.decoder))
        known = {str(value.name) for value in [*model.graph.inputs, *model.graph.outputs]}
        for node in list(model.graph):
            tap = node.inputs[0] if node.op_type == "MatMul" else None
            if tap is None or str(tap.name) in known or constant(node.inputs[1]) is None:
                continue
            tap.type, tap.shape = ir.TensorType(ir.DataType.FLOAT), None
            known.add(str(tap.name))
            model.graph.outputs.append(tap)
        return _opened(model)


def _opened(model: ir.Model) -> Any:
    """An InferenceSession of a model of any size."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        path, *_ = storage.save(model, Path(folder) / "model.onnx")
        return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _largest(cache: NDArray[Any], *, paired: bool) -> NDArray[np.float32]:
    """Largest absolute value (KV, D) over batch and positions of a cache (B, KV, S, D).

    Rotary embedding turns channels i and i + D/2 of a key into each other as positions grow, so keys take
    the pair's length: it bounds both at every position, also beyond the calibrated ones.
    """
    values = np.abs(cache.astype(np.float32))
    if paired:
        low, high = np.split(values, 2, axis=-1)
        length = np.sqrt(low**2 + high**2)
        values = np.concatenate([length, length], axis=-1)
    return values.max(axis=(0, 2))


def _thinned(rows: NDArray[Any]) -> NDArray[Any]:
    """At most PROBES rows, evenly from all."""
    return rows[np.linspace(0, len(rows) - 1, min(PROBES, len(rows))).astype(int)].astype(np.float32)


def answered(reference: Any, examples: Sequence[Example]) -> list[ParityCase]:
    """Examples with the checkpoint's own answers, so that the tokens of an answer are seen, too."""
    cases = []
    for index, (image, question) in enumerate(examples):
        prepared = reference.prepare(image)
        ids = reference.prompt_ids(question, [prepared])
        options = GenerationOptions(max_new_tokens=ANSWER_TOKENS)
        answer = reference.complete(ids, [reference.encode_image(prepared)], options)
        cases.append(ParityCase(f"example-{index}", question, image, tuple(answer.token_ids)))
    return cases


def collect(session: Session, embed: ir.Model, decoder: ir.Model, cases: Sequence[ParityCase]) -> Calibration:
    """Decoder inputs of every case: its prompt and its forced answer, in one pass."""
    run = _opened(embed)
    return Calibration(decoder, [_feeds(session, run, decoder, case) for case in cases])


def _feeds(session: Session, embed: Any, decoder: ir.Model, case: ParityCase) -> Feeds:
    manifest = session.manifest
    prepared = [session.prepare(each) for each in case.images]
    prompt = session.prompt_ids(case.question, prepared)
    ids = np.concatenate([prompt, np.asarray(case.forced, dtype=np.int64)])
    is_image = ids == manifest.merge.token
    is_image[len(prompt) :] = False  # an answer's tokens are text, whichever they are
    grids = [view.grid for each in prepared for view in each.views]
    positions = position_ids(manifest.positions, is_image, grids, 0)[0]
    (embeds,) = embed.run(None, {embed.get_inputs()[0].name: ids[None]})
    feeds: Feeds = {
        "attention_mask": np.ones((1, len(ids)), dtype=np.int64),
        "position_ids": positions if len(positions) == 1 else positions[:, None],
        "num_logits_to_keep": np.array(1, dtype=np.int64),
    }
    if isinstance(manifest.attention, ImageAttention):
        feeds[manifest.attention.input] = is_image.astype(np.int64)[None]
    stack = None
    if manifest.deepstack is not None:
        stack = np.zeros((manifest.deepstack.layers, *embeds.shape), dtype=np.float32)
        feeds[manifest.deepstack.input] = stack
    if prepared:
        features = join_features([session.encode_image(each) for each in prepared])
        embeds[0, is_image] = features.tokens
        if stack is not None:
            stack[:, 0, is_image] = features.deepstack
    feeds["inputs_embeds"] = embeds
    for state in manifest.state:
        shape = [size if isinstance(size, int) else 1 for size in state.shape]
        if state.sequence_axis is not None:
            shape[state.sequence_axis] = 0
        feeds[state.input] = np.zeros(shape, dtype=state.dtype)
    return {str(value.name): feeds[str(value.name)] for value in decoder.graph.inputs}
