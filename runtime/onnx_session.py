"""Runs a bundle's ONNX parts with onnxruntime.

In: a bundle directory and its manifest. Out: a `Backend` (`runtime/session.py`).
Not here: pictures, text, sampling.

Batch 1. Which tensors exist, their types and shapes come from the manifest; the graphs are checked against it
when they are opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime import bundle
from runtime.errors import BundleError, MissingExtra
from runtime.image import ImageFeatures, View, join_features
from runtime.manifest import Manifest, Part, StateTensor

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]

ORT_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(int64)": "int64",
    "tensor(int32)": "int32",
    "tensor(int8)": "int8",
    "tensor(uint8)": "uint8",
    "tensor(bool)": "bool",
}
GROWTH = 256  # tokens of room beyond the prompt; a full buffer doubles
STEP_INPUTS = ("inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep")


class OnnxBackend:
    """The three parts of a bundle in onnxruntime, and the state of one sequence."""

    def __init__(self, directory: Path, manifest: Manifest, *, threads: int, spin: bool) -> None:
        ort = _import_onnxruntime()
        options = _session_options(ort, threads, spin)
        self._manifest = manifest
        self._vision = _open_part(ort, directory, manifest.part("vision_encoder"), options)
        self._embed = _open_part(ort, directory, manifest.part("embed_tokens"), options)
        self._decoder = _open_part(ort, directory, manifest.part("decoder"), options)
        self._step_inputs = _step_inputs(manifest)
        in_place = all(state.in_place for state in manifest.state)
        self._state = (InPlaceState if in_place else HandedState)(ort, self._decoder, manifest.state)
        self._length = 0

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision part makes of one view."""
        part, deepstack = self._manifest.part("vision_encoder"), self._manifest.deepstack
        inputs = {spec.name: view.inputs[spec.name] for spec in part.inputs}
        names = ["image_features", *([deepstack.output] if deepstack else [])]
        features, *stack = (found.astype(np.float32, copy=False) for found in self._vision.run(names, inputs))
        features = features.reshape(-1, features.shape[-1])
        return ImageFeatures(features, (view.grid,), stack[0].reshape(-1, *features.shape) if stack else None)

    def start(self, capacity: int) -> None:
        """Forget the sequence; a new one of about `capacity` tokens begins."""
        self._length = 0
        self._state.start(capacity)

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (rows, S); logits (vocab,) of the last."""
        embeds = self._embeddings(ids)
        step: dict[str, NDArray[Any]] = {}
        is_image = ids == self._manifest.merge.token
        if images:
            embeds[0, is_image] = join_features(images).tokens
        if deepstack := self._manifest.deepstack:
            stack = np.zeros((deepstack.layers, *embeds.shape), dtype=embeds.dtype)
            if images:
                stack[:, 0, is_image] = join_features(images).deepstack
            step[deepstack.input] = stack
        return self._step(embeds, positions, step)

    def close(self) -> None:
        """Free the models and the state."""
        del self._vision, self._embed, self._decoder, self._state

    def _embeddings(self, ids: TokenIds) -> NDArray[Any]:
        """Embeddings (1, S, hidden) of ids (S,)."""
        part = self._manifest.part("embed_tokens")
        return self._embed.run([part.outputs[0].name], {part.inputs[0].name: ids[None]})[0]

    def _step(self, embeds: NDArray[Any], positions: TokenIds, more: dict[str, NDArray[Any]]) -> Floats:
        """Run the decoder on further embeddings (1, S, hidden); logits (vocab,) of the last one."""
        total = self._length + embeds.shape[1]
        step = {
            "inputs_embeds": embeds,
            "attention_mask": np.ones((1, total), dtype=np.int64),
            # (batch, S), or (3, batch, S) with M-RoPE
            "position_ids": positions if len(positions) == 1 else positions[:, None],
            "num_logits_to_keep": np.array(1, dtype=np.int64),
            **more,
        }
        logits = self._state.run({name: step[name] for name in self._step_inputs}, total)
        self._length = total
        return logits[0, -1].astype(np.float32)  # a copy: the next step may reuse the buffer


class HandedState:
    """The state as the layout has it: each step's output is the next step's input."""

    def __init__(self, ort: Any, decoder: Any, states: Sequence[StateTensor]) -> None:
        self._ort, self._decoder, self._states = ort, decoder, states
        self._values: dict[str, Any] = {}

    def start(self, _: int) -> None:
        """Empty state for a new sequence."""
        empty = {state.input: np.zeros(_shape(state, 0), dtype=state.dtype) for state in self._states}
        self._values = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in empty.items()}

    def run(self, step: dict[str, NDArray[Any]], _: int) -> NDArray[Any]:
        """Logits (1, kept, vocab) of one step."""
        feeds = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in step.items()}
        names = ["logits", *(state.output for state in self._states)]
        outputs = self._decoder.run_with_ort_values(names, {**feeds, **self._values})
        for state, value in zip(self._states, outputs[1:], strict=True):
            self._values[state.input] = value
        return outputs[0].numpy()


class InPlaceState:
    """The state in one buffer per tensor, extended where it lies: no step copies the past."""

    def __init__(self, ort: Any, decoder: Any, states: Sequence[StateTensor]) -> None:
        self._ort, self._decoder, self._states = ort, decoder, states
        self._buffers: list[NDArray[Any]] = []
        self._binding: Any = None
        self._capacity = 0

    def start(self, prompt_tokens: int) -> None:
        """Buffers for a new sequence; those of the last one are kept when they are long enough."""
        if self._capacity < prompt_tokens + 1:
            self._buffers = []
            self._allocate(prompt_tokens + GROWTH)

    def run(self, step: dict[str, NDArray[Any]], total: int) -> NDArray[Any]:
        """Logits (1, kept, vocab) of one step, after which the sequence has `total` tokens."""
        if total > self._capacity:
            self._allocate(2 * self._capacity)
        self._binding.bind_output("logits", "cpu")
        for name, array in step.items():
            self._binding.bind_cpu_input(name, array)
        self._decoder.run_with_iobinding(self._binding)
        return self._binding.get_outputs()[0].numpy()

    def _allocate(self, capacity: int) -> None:
        """Buffers of `capacity` tokens that begin with what the old ones hold."""
        old, self._buffers = self._buffers, []
        self._binding = self._decoder.io_binding()
        self._binding.bind_output("logits", "cpu")  # first, so that it is the first output
        for i, state in enumerate(self._states):
            buffer = np.zeros(_shape(state, capacity), dtype=state.dtype)
            if old:
                assert state.sequence_axis is not None  # only such a state is in place
                filled = (slice(None),) * state.sequence_axis + (slice(self._capacity),)
                buffer[filled] = old[i]
            value = self._ort.OrtValue.ortvalue_from_numpy(buffer)  # shares the buffer's memory
            self._binding.bind_ortvalue_input(state.input, value)
            self._binding.bind_ortvalue_output(state.output, value)
            self._buffers.append(buffer)
        self._capacity = capacity


def _shape(state: StateTensor, length: int) -> list[int]:
    """The state's shape for batch 1 and a sequence of `length`."""
    sizes = [size if isinstance(size, int) else 1 for size in state.shape]
    if state.sequence_axis is not None:
        sizes[state.sequence_axis] = length
    return sizes


def _import_onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise MissingExtra("onnxruntime", "onnx") from error
    return onnxruntime


def _session_options(ort: Any, threads: int, spin: bool) -> Any:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3  # errors only; they are raised as well
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if spin else "0")
    return options


def _open_part(ort: Any, directory: Path, part: Part, options: Any) -> Any:
    """An InferenceSession of one part whose inputs and outputs are those of the manifest."""
    path = bundle.locate(directory, part.path)
    where = f"{directory.name}/{part.path}"
    try:
        session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime has a class for each status
        first_line = (str(error).splitlines() or [""])[0]
        raise BundleError(
            f"{where}: onnxruntime {ort.__version__} cannot open it ({first_line}); re-export"
        ) from error
    for kind, wanted, found in (
        ("input", part.inputs, session.get_inputs()),
        ("output", part.outputs, session.get_outputs()),
    ):
        manifest_types = {spec.name: spec.dtype for spec in wanted}
        graph_types = {spec.name: ORT_TYPES.get(spec.type, spec.type) for spec in found}
        if manifest_types != graph_types:
            raise BundleError(
                f"{where}: {kind}s are {graph_types}, the manifest says {manifest_types}; re-export"
            )
    return session


def _step_inputs(manifest: Manifest) -> Sequence[str]:
    """The decoder's inputs that are no state; one that nobody fills is refused."""
    names = [spec.name for spec in manifest.part("decoder").inputs]
    states = {state.input for state in manifest.state}
    step = [name for name in names if name not in states]
    known = {*STEP_INPUTS, *([manifest.deepstack.input] if manifest.deepstack else [])}
    if unknown := [name for name in step if name not in known]:
        raise BundleError(
            f"decoder: has inputs {', '.join(unknown)}, which this runtime does not fill; "
            "update pocketvlm or re-export"
        )
    return step
