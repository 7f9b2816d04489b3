"""Runs a bundle whose graphs have fixed shapes: chunks are padded, the cache is a buffer of the reader's.

In: a bundle directory and a manifest with `static`. Out: a `Backend` (`runtime/session.py`).
Not here: pictures, text, sampling; graphs of moving shapes (`runtime/onnx_session.py`).

A run sees the buffers of the past through `past_mask` and gives the entries of the new tokens, which are
copied to their places; so a sequence can be cut back by forgetting its length alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backend import RowsState
from runtime.chunks import Chunk, cut, padded
from runtime.errors import BundleError
from runtime.image import ImageFeatures, View, features_of
from runtime.manifest import Manifest, Part, StateTensor
from runtime.providers import PartOpener, RunSettings

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]

STEP_INPUTS = ("inputs_embeds", "position_ids", "past_mask", "logits_index")


class StaticBackend:
    """The four parts of a bundle of fixed shapes in onnxruntime, and the state of one sequence."""

    rewindable = True
    no_rows = "graphs of fixed shapes take one sequence"

    def __init__(self, directory: Path, manifest: Manifest, settings: RunSettings) -> None:
        assert manifest.static is not None
        opener = PartOpener(settings)
        ort = opener.ort
        self._manifest, self._static = manifest, manifest.static
        self._runs: dict[str, Any] = {part.role: opener.open(directory, part) for part in manifest.parts}
        self.providers = opener.reports()
        self._steps = {role: _step_inputs(manifest, role) for role in ("decoder_prefill", "decoder")}
        self._buffers = {state.input: _buffer(state) for state in manifest.state}
        self._values = {
            name: ort.OrtValue.ortvalue_from_numpy(buffer)  # shares the buffer's memory
            for name, buffer in self._buffers.items()
        }
        self._ort = ort
        mask = self._steps["decoder"]["past_mask"]
        self._mask = np.full(mask[1], self._static.masked, dtype=mask[0])
        self._length = 0

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision part makes of one view, which has the one shape that the part takes."""
        part, deepstack = self._manifest.part("vision_encoder"), self._manifest.deepstack
        inputs = {spec.name: _as(spec.dtype, view.inputs[spec.name]) for spec in part.inputs}
        names = ["image_features", *([deepstack.output] if deepstack else [])]
        return features_of(view, self.run("vision_encoder", names, inputs))

    @property
    def state_bytes(self) -> int:
        """What the buffers take; they are as long as the context in any case."""
        return sum(buffer.nbytes for buffer in self._buffers.values())

    def rewind(self, length: int) -> int:
        """Forget what follows the first `length` tokens."""
        self._length = min(length, self._length)
        self._mask[..., self._length :] = self._static.masked
        return self._length

    def mark(self) -> None:
        """Nothing to keep: every length can be gone back to."""

    def rows(self, rows: int, capacity: int) -> RowsState:
        """Not for fixed shapes; `no_rows` says so."""
        raise BundleError(f"batch: {self.no_rows}; ask one by one")

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (rows, S), chunk by chunk; logits (vocab,) of the last."""
        sizes = [min(self._static.chunk, len(ids) - n) for n in range(0, len(ids), self._static.chunk)]
        logits: NDArray[Any] = np.zeros(0, np.float32)
        for chunk in cut(ids, positions, images, self._manifest.merge.token, sizes):
            logits = self._chunk(chunk)
        return logits.reshape(-1).astype(np.float32)

    def close(self) -> None:
        """Free the models and the state."""
        del self._runs, self._values, self._buffers

    def run(self, role: str, outputs: Sequence[str], inputs: dict[str, NDArray[Any]]) -> list[NDArray[Any]]:
        """One run of a part on its step inputs; a decoder's buffers join them. Calibration looks on here."""
        values = {name: self._ort.OrtValue.ortvalue_from_numpy(array) for name, array in inputs.items()}
        if role in self._steps:
            values.update(self._values)
        return [value.numpy() for value in self._runs[role].run_with_ort_values(outputs, values)]

    def _chunk(self, chunk: Chunk) -> NDArray[Any]:
        """Append at most one chunk of the graph."""
        role, count = ("decoder" if len(chunk) == 1 else "decoder_prefill"), len(chunk)
        embeds = self._embeddings(chunk.ids)
        chunk.put_features(embeds)
        wanted, positions = self._steps[role], chunk.positions
        size = wanted["inputs_embeds"][1][1]
        step: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[:, :size],
            "position_ids": padded(positions if len(positions) == 1 else positions[:, None], size),
            "past_mask": self._mask,
            "logits_index": np.array([count - 1]),
        }
        if deepstack := self._manifest.deepstack:
            step[deepstack.input] = chunk.dense_deepstack(deepstack.layers, size, embeds.shape[-1])
        names = ["logits", *(state.output for state in self._manifest.state)]
        feeds = {name: _as(dtype, step[name]) for name, (dtype, _) in wanted.items()}
        logits, *rows = self.run(role, names, feeds)
        self._keep(rows, count)
        return logits

    def _keep(self, rows: Sequence[NDArray[Any]], count: int) -> None:
        """Copy the first `count` new entries of each state to their place, and unmask it."""
        new = slice(self._length, self._length + count)
        for state, array in zip(self._manifest.state, rows, strict=True):
            assert state.sequence_axis is not None
            before = (slice(None),) * state.sequence_axis
            self._buffers[state.input][(*before, new)] = array[(*before, slice(count))]
        self._mask[..., new] = 0
        self._length += count

    def _embeddings(self, ids: TokenIds) -> NDArray[Any]:
        """Embeddings (1, chunk, hidden) of ids (n,), padded with those of id 0."""
        part = self._manifest.part("embed_tokens")
        spec = part.inputs[0]
        inputs = {spec.name: _as(spec.dtype, padded(ids[None], self._static.chunk))}
        return self.run("embed_tokens", [part.outputs[0].name], inputs)[0]


def _as(dtype: str, values: NDArray[Any]) -> NDArray[Any]:
    return np.ascontiguousarray(values, dtype=np.dtype(dtype))


def _fixed(name: str, shape: Sequence[int | str]) -> tuple[int, ...]:
    sizes = tuple(size for size in shape if isinstance(size, int))
    if len(sizes) != len(shape):
        raise BundleError(f"{name}: has the shape {list(shape)}, static needs numbers alone; re-export")
    return sizes


def _buffer(state: StateTensor) -> NDArray[Any]:
    return np.zeros(_fixed(state.input, state.shape), dtype=np.dtype(state.dtype))


def _step_inputs(manifest: Manifest, role: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """A decoder graph's inputs that are no state, as (dtype, shape); one that nobody fills is refused."""
    part: Part = manifest.part(role)
    states = {state.input for state in manifest.state}
    step = {
        spec.name: (str(spec.dtype), _fixed(spec.name, spec.shape))
        for spec in part.inputs
        if spec.name not in states
    }
    known = {*STEP_INPUTS, *([manifest.deepstack.input] if manifest.deepstack else [])}
    if unknown := [name for name in step if name not in known]:
        raise BundleError(
            f"{role}: has inputs {', '.join(unknown)}, which this runtime does not fill; "
            "update pocketvlm or re-export"
        )
    if missing := sorted({"inputs_embeds", "position_ids", "past_mask"} - set(step)):
        raise BundleError(f"{role}: has no input {', '.join(missing)}; re-export")
    return step
