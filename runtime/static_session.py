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
from runtime.errors import BundleError
from runtime.image import ImageFeatures, View, join_features
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
        found = self.run("vision_encoder", names, inputs)
        features, *stack = (each.astype(np.float32, copy=False) for each in found)
        features = features.reshape(-1, features.shape[-1])
        return ImageFeatures(features, (view.grid,), stack[0].reshape(-1, *features.shape) if stack else None)

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
        joined = join_features(images) if images else None
        is_image = ids == self._manifest.merge.token
        # the how-manieth image token each one is, for the features that belong to a chunk
        nth = np.cumsum(is_image) - 1
        logits: NDArray[Any] = np.zeros(0, np.float32)
        for first in range(0, len(ids), self._static.chunk):
            part = slice(first, min(first + self._static.chunk, len(ids)))
            places = np.flatnonzero(is_image[part])
            chosen = nth[part][places]
            features = None if joined is None else joined.tokens[chosen]
            stack = None if joined is None or joined.deepstack is None else joined.deepstack[:, chosen]
            logits = self._chunk(ids[part], positions[:, part], places, features, stack)
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

    def _chunk(
        self,
        ids: TokenIds,
        positions: TokenIds,
        places: NDArray[np.int64],
        features: Floats | None,
        stack: Floats | None,
    ) -> NDArray[Any]:
        """Append at most one chunk of ids (n,); `features` (m, hidden) and `stack` go to `places` (m,)."""
        role, count = ("decoder" if len(ids) == 1 else "decoder_prefill"), len(ids)
        embeds = self._embeddings(ids)
        if features is not None:
            embeds[0, places] = features
        wanted = self._steps[role]
        size = wanted["inputs_embeds"][1][1]
        step: dict[str, NDArray[Any]] = {
            "inputs_embeds": embeds[:, :size],
            "position_ids": _padded(positions if len(positions) == 1 else positions[:, None], size),
            "past_mask": self._mask,
            "logits_index": np.array([count - 1]),
        }
        if deepstack := self._manifest.deepstack:
            dense = np.zeros((deepstack.layers, 1, size, embeds.shape[-1]), np.float32)
            if stack is not None:
                dense[:, 0, places] = stack
            step[deepstack.input] = dense
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
        padded = _as(spec.dtype, _padded(ids[None], self._static.chunk))
        return self.run("embed_tokens", [part.outputs[0].name], {spec.name: padded})[0]


def _padded(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """(..., n) with zeros after it, to (..., size)."""
    room = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
    return np.pad(values, room)


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
