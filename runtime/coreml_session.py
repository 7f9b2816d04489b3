"""Runs a Core ML bundle: prompts in chunks, answers token by token, the cache a state of the decoder.

In: a bundle directory and a manifest with `coreml`. Out: a `Backend` (`runtime/backend.py`).
Not here: what runs the parts (`runtime/coreml_engine.py`), pictures, text, sampling.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.backend import RowsState
from runtime.chunks import Chunk, cut, padded
from runtime.coreml_engine import Engine, Signature, open_engine
from runtime.errors import BundleError
from runtime.image import ImageFeatures, View, features_of
from runtime.manifest import Manifest
from runtime.onnx_state import MARKS
from runtime.providers import RunSettings

Array = NDArray[Any]
Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]

NEEDED_INPUTS = {"inputs_embeds", "position_ids", "start"}


class CoremlBackend:
    """Three parts and one sequence."""

    no_rows = "the state of an ML program holds one sequence"

    def __init__(
        self, directory: Path, manifest: Manifest, settings: RunSettings, engine: Engine | None = None
    ) -> None:
        assert manifest.coreml is not None
        self._manifest, self._coreml = manifest, manifest.coreml
        self._engine = open_engine(directory, manifest, settings) if engine is None else engine
        self.providers = self._engine.providers
        self._moving = [state.input for state in manifest.state if not state.rewindable]
        self.rewindable = not self._moving
        self._length = 0
        self._marks: dict[int, dict[str, Array]] = {}
        for role, functions in manifest.coreml.functions.items():
            for function in functions:
                self._check(role, function)

    @property
    def state_bytes(self) -> int:
        """What the states take on a device; they are as long as the context in any case."""
        return sum(state.bytes(self._coreml.context) for state in self._manifest.state)

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision part makes of one view, which has the one shape that the part takes."""
        deepstack = self._manifest.deepstack
        (function,) = self._coreml.functions["vision_encoder"]
        wanted = self._engine.inputs("vision_encoder", function)
        found = self._engine.run("vision_encoder", function, _as(wanted, view.inputs))
        names = ["image_features", *([deepstack.output] if deepstack else [])]
        return features_of(view, [found[name] for name in names])

    def rewind(self, length: int) -> int:
        """Forget what follows the first `length` tokens, or the last mark before them."""
        if length >= self._length:
            return self._length
        if not self.rewindable:
            length = max((place for place in self._marks if place <= length), default=0)
        if length == 0:
            self._engine.clear()
            self._marks.clear()
        for name, value in self._marks.get(length, {}).items():
            self._engine.write(name, value)
        self._marks = {place: kept for place, kept in self._marks.items() if place <= length}
        self._length = length
        return length

    def mark(self) -> None:
        """Keep the states that cannot be cut back, so that `rewind` can come here."""
        if self.rewindable or not self._length:
            return
        self._marks[self._length] = {name: self._engine.read(name) for name in self._moving}
        while len(self._marks) > MARKS:
            del self._marks[min(self._marks)]

    def rows(self, rows: int, capacity: int) -> RowsState:
        """Not here; `no_rows` says so."""
        raise BundleError(f"batch: {self.no_rows}; ask one by one")

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (rows, S), chunk by chunk; logits (vocab,) of the last."""
        logits: Array = np.zeros(0, np.float32)
        sizes = list(self._sizes(len(ids)))
        for chunk in cut(ids, positions, images, self._manifest.merge.token, sizes):
            logits = self._chunk(chunk)
        return logits.reshape(-1).astype(np.float32)

    def close(self) -> None:
        """Free the models and the state."""
        self._engine.close()

    def _sizes(self, left: int) -> Iterator[int]:
        """Tokens of each run: a chunk, padded when it is not full, as long as it lies within the context."""
        most, place = self._coreml.chunk, self._length
        while left:
            size = min(left, most) if place + most <= self._coreml.context else 1
            yield size
            place, left = place + size, left - size

    def _chunk(self, chunk: Chunk) -> Array:
        """Append one chunk; logits of its last token."""
        function, size, count = self._function(chunk)
        embeds = self._embeddings(chunk.ids, function, size)
        chunk.put_features(embeds)
        embeds[:, count:] = 0
        step: dict[str, Array] = {
            "inputs_embeds": embeds,
            "position_ids": padded(chunk.positions, size),
            "start": np.array([self._length]),
            "last": np.array([count - 1]),
        }
        if deepstack := self._manifest.deepstack:
            step[deepstack.input] = chunk.dense_deepstack(deepstack.layers, size, embeds.shape[-1])
        wanted = self._engine.inputs("decoder", function)
        logits = self._engine.run("decoder", function, _as(wanted, step))["logits"]
        self._length += count
        return logits

    def _function(self, chunk: Chunk) -> tuple[str, int, int]:
        """(function, tokens that it takes, tokens that there are)."""
        return ("decode", 1, 1) if len(chunk) == 1 else ("prefill", self._coreml.chunk, len(chunk))

    def _embeddings(self, ids: TokenIds, function: str, size: int) -> Array:
        """Embeddings (1, size, hidden) of ids (n,) and of id 0 behind them, to be written into."""
        part = self._manifest.part("embed_tokens")
        wanted = self._engine.inputs("embed_tokens", function)
        inputs = _as(wanted, {part.inputs[0].name: padded(ids[None], size)})
        found = self._engine.run("embed_tokens", function, inputs)[part.outputs[0].name]
        return np.array(found, np.float32)

    def _check(self, role: str, function: str) -> None:
        """A function's inputs are those of the manifest; of the decoder, such that somebody fills them."""
        found = set(self._engine.inputs(role, function))
        part = self._manifest.part(role)
        named = {spec.name for spec in part.inputs}
        if not found <= named:
            odd = ", ".join(sorted(found - named))
            raise BundleError(f"{part.path}: {function} takes {odd}, which the manifest lacks; re-export")
        if role != "decoder":
            return
        deepstack = self._manifest.deepstack
        known = {*NEEDED_INPUTS, "last", *([deepstack.input] if deepstack else [])}
        if unknown := sorted(found - known):
            raise BundleError(
                f"{part.path}: {function} takes {', '.join(unknown)}, which this runtime does not fill; "
                "update pocketvlm or re-export"
            )
        if missing := sorted(NEEDED_INPUTS - found):
            raise BundleError(f"{part.path}: {function} has no input {', '.join(missing)}; re-export")


def _as(wanted: Signature, given: dict[str, Array]) -> dict[str, Array]:
    """Those of the arrays that a function takes, in its types."""
    return {name: np.ascontiguousarray(given[name], dtype=kind.numpy) for name, kind in wanted.items()}
