"""Runs a bundle's ONNX parts with onnxruntime.

In: a bundle directory and its manifest. Out: a `Backend` (`runtime/session.py`).
Not here: pictures, text, sampling; the decoder's state (`runtime/onnx_state.py`); graphs of fixed shapes
(`runtime/static_session.py`).

Which tensors exist, their types and shapes come from the manifest; the graphs are checked against it when
they are opened.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.image import ImageFeatures, View, features_of, join_features
from runtime.manifest import Manifest
from runtime.onnx_state import Decoder, step_inputs, types_input
from runtime.providers import PartOpener, ProviderReport, RunSettings

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class OnnxBackend:
    """The parts of a bundle in onnxruntime, and the state of one sequence of at most `context` tokens.

    `parts`: onnxruntime's sessions by role.
    """

    def __init__(self, directory: Path, manifest: Manifest, settings: RunSettings, context: int) -> None:
        opener = PartOpener(settings)
        step_inputs(manifest)  # refused before the parts are loaded
        self._ort, self._manifest, self._context = opener.ort, manifest, context
        self.parts: dict[str, Any] = {part.role: opener.open(directory, part) for part in manifest.parts}
        self._vision, self._embed = self.parts["vision_encoder"], self.parts["embed_tokens"]
        self._device = opener.device(self.parts["decoder"])
        self.providers: tuple[ProviderReport, ...] = opener.reports()
        self._decoder = Decoder(self._ort, self.parts, manifest, 1, context, self._device)
        self._token = SingleTokens(self._ort, self._embed, manifest, self._decoder)
        self.rewindable = self._decoder.rewindable

    @property
    def state_bytes(self) -> int:
        """What the state takes when it is full; a state of fixed shape is there twice."""
        return state_bytes(self._manifest, self._context)

    @property
    def no_rows(self) -> str:
        """Why several sequences cannot run side by side; empty when they can."""
        odd = [state.input for state in self._manifest.state if state.padding_side != "right"]
        return f"{odd[0]} takes no rows of unequal lengths" if odd else ""

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision part makes of one view."""
        part, deepstack = self._manifest.part("vision_encoder"), self._manifest.deepstack
        inputs = {spec.name: view.inputs[spec.name].astype(spec.dtype, copy=False) for spec in part.inputs}
        names = ["image_features", *([deepstack.output] if deepstack else [])]
        return features_of(view, self._vision.run(names, inputs))

    def rewind(self, length: int) -> int:
        """Go back to `length` tokens or as near before as the state can; the length that is left."""
        return self._decoder.rewind(length)

    def mark(self) -> None:
        """Make the present length one that `rewind` can go back to."""
        self._decoder.mark()

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (rows, S); logits (vocab,) of the last."""
        if len(ids) == 1 and not images:
            logits = self._token.run(ids[:, None], positions[:, None])
        else:
            step = embedded(self._embed, self._manifest, [ids], [images])
            step["position_ids"] = _positions(positions[:, None])
            logits = self._decoder.extend(step)
        return logits[0, -1].astype(np.float32)  # a copy: the next step may reuse the buffer

    def rows(self, rows: int, capacity: int) -> Rows:
        """A state of its own for so many sequences side by side."""
        decoder = Decoder(self._ort, self.parts, self._manifest, rows, capacity, self._device)
        return Rows(self._ort, self._embed, self._manifest, decoder)

    def close(self) -> None:
        """Free the models and the state."""
        del self._vision, self._embed, self._decoder, self._token, self.parts


class SingleTokens:
    """Steps of one token a row over buffers that are bound once: ids to embeddings to the decoder."""

    def __init__(self, ort: Any, embed: Any, manifest: Manifest, decoder: Decoder) -> None:
        part = manifest.part("embed_tokens")
        source, found = part.inputs[0], part.outputs[0]
        self._embed, self._decoder = embed, decoder
        self._ids = np.zeros((decoder.rows, 1), dtype=source.dtype)
        target = decoder.buffers["inputs_embeds"]
        self._embeds = target if found.dtype == target.dtype else np.zeros_like(target, dtype=found.dtype)
        self._binding = embed.io_binding()
        self._binding.bind_ortvalue_input(source.name, ort.OrtValue.ortvalue_from_numpy(self._ids))
        self._binding.bind_ortvalue_output(found.name, ort.OrtValue.ortvalue_from_numpy(self._embeds))

    def run(self, ids: TokenIds, positions: TokenIds, mask: NDArray[Any] | None = None) -> NDArray[Any]:
        """ids (rows, 1) at positions (1 or 3, rows, 1); logits (rows, 1, vocab), valid until the next run."""
        self._ids[...] = ids
        self._embed.run_with_iobinding(self._binding)
        if self._embeds is not self._decoder.buffers["inputs_embeds"]:
            self._decoder.buffers["inputs_embeds"][...] = self._embeds
        if "position_ids" in self._decoder.buffers:
            self._decoder.buffers["position_ids"][...] = _positions(positions)
        return self._decoder.step(mask)


class Rows:
    """Several sequences side by side: padded on the right to begin with, then a token each."""

    def __init__(self, ort: Any, embed: Any, manifest: Manifest, decoder: Decoder) -> None:
        self._embed, self._manifest, self._decoder = embed, manifest, decoder
        self._token = SingleTokens(ort, embed, manifest, decoder)
        self._lengths = np.zeros(decoder.rows, dtype=np.int64)

    def prefill(
        self,
        ids: Sequence[TokenIds],
        positions: Sequence[TokenIds],
        images: Sequence[Sequence[ImageFeatures]],
    ) -> None:
        """Fill empty rows with ids (S_row,) at positions (1 or 3, S_row), S_row at least 1. No logits."""
        self._lengths[:] = [len(row) for row in ids]
        longest = int(self._lengths.max())
        step = embedded(self._embed, self._manifest, ids, images)
        padded = [np.pad(row, ((0, 0), (0, longest - row.shape[1]))) for row in positions]
        step["position_ids"] = _positions(np.stack(padded, axis=1))
        self._decoder.extend(step, self._mask(longest))

    def step(
        self, tokens: NDArray[np.int64], positions: TokenIds, live: NDArray[np.bool_]
    ) -> NDArray[np.float32]:
        """Append tokens (rows,) at positions (1 or 3, rows) where `live` (rows,); logits (rows, vocab).

        What a row that is not live gets is overwritten by its next token.
        """
        self._lengths[~live] = np.minimum(self._lengths[~live], self._decoder.capacity - 1)
        self._lengths += 1
        mask = self._mask(int(self._lengths.max()))
        logits = self._token.run(tokens[:, None], positions[..., None], mask)
        self._lengths -= ~live
        return logits[:, -1].astype(np.float32)

    def _mask(self, width: int) -> NDArray[np.bool_]:
        return np.arange(width) < self._lengths[:, None]


def embedded(
    embed: Any, manifest: Manifest, ids: Sequence[TokenIds], images: Sequence[Sequence[ImageFeatures]]
) -> dict[str, NDArray[Any]]:
    """Embeddings (rows, S, hidden) of rows of ids, features in their places; deepstack if there is any."""
    part, longest = manifest.part("embed_tokens"), max(map(len, ids))
    padded = np.stack([np.pad(row, (0, longest - len(row))) for row in ids])
    feeds = {part.inputs[0].name: padded.astype(part.inputs[0].dtype, copy=False)}
    embeds = embed.run([part.outputs[0].name], feeds)[0]
    step: dict[str, NDArray[Any]] = {"inputs_embeds": embeds}
    if types := types_input(manifest):
        step[types] = (padded == manifest.merge.token).astype(np.int64)
    deepstack = manifest.deepstack
    if deepstack:
        step[deepstack.input] = np.zeros((deepstack.layers, *embeds.shape), dtype=np.float32)
    for row, (row_ids, row_images) in enumerate(zip(ids, images, strict=True)):
        if row_images:
            places = np.flatnonzero(row_ids == manifest.merge.token)
            joined = join_features(row_images)
            embeds[row, places] = joined.tokens
            if deepstack:
                step[deepstack.input][:, row, places] = joined.deepstack
    return step


def state_bytes(manifest: Manifest, context: int, rows: int = 1) -> int:
    """Bytes of the whole state for so many sequences of `context` tokens."""
    return sum(state.bytes(context, rows) * (2 if state.kind == "conv" else 1) for state in manifest.state)


def _positions(positions: TokenIds) -> TokenIds:
    """(1 or 3, rows, S) as the graph takes it: (rows, S), or (3, rows, S) with M-RoPE."""
    return positions[0] if len(positions) == 1 else positions
