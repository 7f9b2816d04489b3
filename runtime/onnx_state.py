"""The decoder graphs of a bundle and the state of the sequences that they extend.

In: embeddings and what belongs to them, step by step. Out: logits. Not here: embeddings, features, positions
(`runtime/onnx_session.py`), which tokens.

A state that may lie in place has one buffer, as long as the context, bound to both sides once: no step copies
the past, and the sequence is cut back by forgetting its length. A state of fixed shape has two buffers that
swap. Any other is handed from step to step. Buffers of a single-token step are bound once, too: such a step
writes its values, binds the mask of its length, and runs.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError
from runtime.manifest import ImageAttention, Manifest, StateTensor, TensorSpec

MARKS = 32  # states that are kept to go back to, where a state cannot be cut
STEP_INPUTS = ("inputs_embeds", "attention_mask", "position_ids", "num_logits_to_keep")

Array = NDArray[Any]


class Decoder:
    """`rows` sequences of at most `capacity` tokens. `runs`: `decoder` and perhaps `decoder_prefill`."""

    def __init__(
        self, ort: Any, runs: Mapping[str, Any], manifest: Manifest, rows: int, capacity: int, device: str
    ) -> None:
        self.rows, self.capacity, self.length = rows, capacity, 0
        self._ort, self._runs, self._device = ort, runs, device
        self._states = manifest.state
        self.rewindable = all(state.rewindable for state in manifest.state)
        specs = step_inputs(manifest)
        self.buffers = {name: _step_buffer(spec, rows, manifest) for name, spec in specs.items()}
        self._mask = self.buffers.pop("attention_mask", None)
        self._mask_type = np.dtype(specs["attention_mask"].dtype) if "attention_mask" in specs else None
        self._ones = np.ones((1, capacity), dtype=self._mask_type or np.int64)
        self._logits = _logits_buffer(manifest, rows) if "num_logits_to_keep" in specs else None
        self._fixed = {
            state.input: self._value(state, capacity) for state in self._states if _in_place(state)
        }
        self._handed: dict[str, Any] = {}
        self._swapped: dict[str, list[Any]] = {}
        self._parity = 0
        self._bindings: dict[tuple[str, bool, int], Any] = {}
        self._marks: dict[int, dict[str, Array]] = {}
        self.reset()

    # --- the sequence -------------------------------------------------

    def reset(self) -> None:
        """An empty sequence."""
        self.length = 0
        self._marks.clear()
        for state in self._states:
            if state.kind == "conv":
                if state.input not in self._swapped:
                    self._swapped[state.input] = [self._value(state, 0) for _ in range(2)]
                else:
                    value = self._swapped[state.input][self._parity]
                    value.update_inplace(np.zeros(state.sizes(0, self.rows), dtype=state.dtype))
            elif not _in_place(state):
                self._handed[state.input] = self._value(state, 0)

    def mark(self) -> None:
        """Keep what could not be cut back, so that `rewind` can come here."""
        if self.rewindable or not self.length:
            return
        kept = {state.input: self._read(state).copy() for state in self._states if not state.rewindable}
        self._marks[self.length] = kept
        while len(self._marks) > MARKS:
            del self._marks[min(self._marks)]

    def rewind(self, length: int) -> int:
        """Go back to `length` tokens, or to the last mark before; the length that is left."""
        if length >= self.length:
            return self.length
        if not self.rewindable:
            length = max((place for place in self._marks if place <= length), default=0)
        if length == 0:
            self.reset()
            return 0
        for state in self._states:
            if not state.rewindable:
                self._write(state, self._marks[length][state.input])
            elif not _in_place(state):
                assert state.sequence_axis is not None
                cut = (slice(None),) * state.sequence_axis + (slice(length),)
                self._write(state, self._read(state)[cut])
        self._marks = {place: kept for place, kept in self._marks.items() if place <= length}
        self.length = length
        return length

    # --- steps --------------------------------------------------------

    def extend(self, step: Mapping[str, Array], mask: Array | None = None) -> Array:
        """Append embeddings (rows, S, hidden) and what belongs to them; logits (rows, kept, vocab).

        `mask` (rows, tokens) of rows of unequal lengths; without, all tokens so far and of this step.
        The logits are valid until the next run.
        """
        count = step["inputs_embeds"].shape[1]
        role = "decoder_prefill" if count > 1 and "decoder_prefill" in self._runs else "decoder"
        binding = self._binding(role, single=False)
        names = [name for name in self.buffers if name not in step]
        for name, array in [*step.items(), *((name, self.buffers[name]) for name in names)]:
            if name in self.buffers:
                binding.bind_cpu_input(name, np.asarray(array, dtype=self.buffers[name].dtype, order="C"))
        return self._run(role, binding, count, mask)

    def step(self, mask: Array | None = None) -> Array:
        """Append the token whose values were written into `buffers`; logits (rows, 1, vocab)."""
        return self._run("decoder", self._binding("decoder", single=True), 1, mask)

    def _run(self, role: str, binding: Any, count: int, mask: Array | None) -> Array:
        total = self.length + count
        if self._mask_type is not None:
            found = (
                self._ones[:, :total] if mask is None else np.ascontiguousarray(mask, dtype=self._mask_type)
            )
            binding.bind_cpu_input("attention_mask", found)
        for state in self._states:
            if state.input in self._handed:
                binding.bind_ortvalue_input(state.input, self._handed[state.input])
                binding.bind_output(state.output, self._device)
        self._runs[role].run_with_iobinding(binding)
        outputs = binding.get_outputs() if self._handed or self._logits is None else []
        for place, name in enumerate(self._handed, start=1):
            self._handed[name] = outputs[place]
        self._parity ^= bool(self._swapped)
        self.length = total
        return self._logits if self._logits is not None else outputs[0].numpy()

    def _binding(self, role: str, single: bool) -> Any:
        """Everything that does not change from step to step, bound once."""
        key = (role, single, self._parity)
        if key in self._bindings:
            return self._bindings[key]
        binding = self._bindings[key] = self._runs[role].io_binding()
        value = self._ort.OrtValue.ortvalue_from_numpy  # on the CPU it shares the array's memory
        if self._logits is not None:
            binding.bind_ortvalue_output("logits", value(self._logits))
        else:
            binding.bind_output("logits", "cpu")
        handed = [state for state in self._states if state.input in self._handed]
        for state in handed:  # right behind the logits: `_run` finds them by their place
            binding.bind_output(state.output, self._device)
        for state in self._states:
            if state.input in self._fixed:
                binding.bind_ortvalue_input(state.input, self._fixed[state.input])
                binding.bind_ortvalue_output(state.output, self._fixed[state.input])
            elif state.input in self._swapped:
                pair = self._swapped[state.input]
                binding.bind_ortvalue_input(state.input, pair[self._parity])
                binding.bind_ortvalue_output(state.output, pair[1 - self._parity])
        if single:
            for name, array in self.buffers.items():
                binding.bind_ortvalue_input(name, value(array))
        return binding

    # --- one state ----------------------------------------------------

    def _value(self, state: StateTensor, length: int) -> Any:
        zeros = np.zeros(state.sizes(length, self.rows), dtype=state.dtype)
        return self._ort.OrtValue.ortvalue_from_numpy(zeros, self._device)

    def _read(self, state: StateTensor) -> Array:
        if state.input in self._swapped:
            return self._swapped[state.input][self._parity].numpy()
        return (self._fixed if state.input in self._fixed else self._handed)[state.input].numpy()

    def _write(self, state: StateTensor, array: Array) -> None:
        array = np.ascontiguousarray(array)
        if state.input in self._handed:
            self._handed[state.input] = self._ort.OrtValue.ortvalue_from_numpy(array, self._device)
        elif state.input in self._swapped:
            self._swapped[state.input][self._parity].update_inplace(array)
        else:
            self._fixed[state.input].update_inplace(array)


def step_inputs(manifest: Manifest) -> dict[str, TensorSpec]:
    """The decoder's inputs that are no state; one that nobody fills is refused."""
    states = {state.input for state in manifest.state}
    step = {spec.name: spec for spec in manifest.part("decoder").inputs if spec.name not in states}
    types = types_input(manifest)
    known = {
        *STEP_INPUTS,
        *([manifest.deepstack.input] if manifest.deepstack else []),
        *([types] if types else []),
    }
    if unknown := [name for name in step if name not in known]:
        raise BundleError(
            f"decoder: has inputs {', '.join(unknown)}, which this runtime does not fill; "
            "update pocketvlm or re-export"
        )
    return step


def types_input(manifest: Manifest) -> str | None:
    """The decoder's input that tells image tokens from others, if it has one."""
    return manifest.attention.input if isinstance(manifest.attention, ImageAttention) else None


def _in_place(state: StateTensor) -> bool:
    return state.in_place and state.kind == "kv"


def _step_buffer(spec: TensorSpec, rows: int, manifest: Manifest) -> Array:
    """What one token takes: a named dimension is the rows, or 1 where tokens are counted."""
    if spec.name == "num_logits_to_keep":
        return np.ones([1 for _ in spec.shape], dtype=spec.dtype)
    if spec.name == "position_ids":
        lead = [] if len(spec.shape) == 2 else [spec.shape[0] if isinstance(spec.shape[0], int) else 3]
        return np.zeros([*lead, rows, 1], dtype=spec.dtype)
    if spec.name in ("attention_mask", types_input(manifest)):
        return np.zeros([rows, 1], dtype=spec.dtype)
    width = spec.shape[-1]
    if not isinstance(width, int):
        raise BundleError(f"decoder: {spec.name} has the shape {list(spec.shape)}, expected a fixed last one")
    layers = (
        [manifest.deepstack.layers] if manifest.deepstack and spec.name == manifest.deepstack.input else []
    )
    return np.zeros([*layers, rows, 1, width], dtype=spec.dtype)


def _logits_buffer(manifest: Manifest, rows: int) -> Array | None:
    """(rows, 1, vocab), if the manifest says how many ids there are."""
    spec = next(spec for spec in manifest.part("decoder").outputs if spec.name == "logits")
    vocab = spec.shape[-1]
    return np.zeros([rows, 1, vocab], dtype=spec.dtype) if isinstance(vocab, int) else None
