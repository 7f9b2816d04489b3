"""Rows of a batch must get what each of them gets alone.

In: a session over the parts just written, and prompts with their image features.
Out: logits of each row alone and of all rows together. Not here: what difference is allowed (`gate.py`).

Rows differ in length and picture; the shorter ones are padded on the right, in the prefill (an empty past)
and in the decode steps after it. A state that cannot be rewound (a convolution's) takes no padding, so such a
model gets rows of one length.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evals.parity.parity import ParityCase
from runtime.image import ImageFeatures, join_features
from runtime.manifest import ImageAttention, StateTensor
from runtime.onnx_session import OnnxBackend
from runtime.session import Session

ROWS = 3


@dataclass(frozen=True)
class Row:
    """A prompt as the decoder takes it: ids (S,), positions (rows, S), features of its pictures."""

    ids: NDArray[np.int64]
    positions: NDArray[np.int64]
    images: tuple[ImageFeatures, ...]


def rows_of(session: Session, cases: Sequence[ParityCase]) -> list[Row]:
    """Prompts of the shortest, the longest and another case; of one length where padding is no option."""
    if any(not state.rewindable for state in session.manifest.state):
        question = cases[0].question  # with one question, lengths differ by the pictures alone
        rows = [_row(session, question, case) for case in cases if case.image is not None]
        lengths = [len(row.ids) for row in rows]
        length = max(lengths, key=lengths.count)
        return [row for row in rows if len(row.ids) == length][:ROWS]
    found = sorted((_row(session, case.question, case) for case in cases), key=lambda row: len(row.ids))
    return [found[0], found[len(found) // 2], found[-1]]


def _row(session: Session, question: str, case: ParityCase) -> Row:
    prepared = [session.prepare(each) for each in case.images]
    ids = session.prompt_ids(question, prepared)
    features = tuple(session.encode_image(each) for each in prepared)
    return Row(ids, session.positions(ids, prepared), features)


class BatchDecoder:
    """The embedding and the decoder of an open session, for any number of rows."""

    def __init__(self, session: Session) -> None:
        backend, manifest = session.backend, session.manifest
        assert isinstance(backend, OnnxBackend)
        self._manifest = manifest
        self._embed, self._decoder = backend.parts["embed_tokens"], backend.parts["decoder"]
        self._inputs = {spec.name: spec for spec in manifest.part("decoder").inputs}

    def run(self, rows: Sequence[Row], forced_t: Sequence[int]) -> NDArray[np.float32]:
        """Logits (B, 1 + T, vocab): after each prompt and after each forced token."""
        lengths = np.array([len(row.ids) for row in rows])
        steps = [self._padded(rows, int(lengths.max()))]
        last = [row.positions.max(axis=1) for row in rows]  # all rows of positions go on from the largest
        for step, token in enumerate(forced_t):
            ids = np.full((len(rows), 1), token, dtype=np.int64)
            positions = np.stack([np.full((len(p), 1), p.max() + 1 + step) for p in last], axis=1)
            steps.append((self._embeddings(ids), positions, None))
        found = []
        self._start(len(rows))
        for step, (embeds, positions, stack) in enumerate(steps):
            logits = self._step(embeds, positions, stack, lengths + step)
            place = lengths - lengths.max() - 1 if step == 0 else np.full(len(rows), -1)
            found.append(logits[np.arange(len(rows)), place])
        return np.stack(found, axis=1).astype(np.float32)

    def _padded(self, rows: Sequence[Row], length: int) -> tuple[Any, NDArray[np.int64], Any]:
        """Embeddings (B, S, hidden), positions (rows, B, S) and deepstack (layers, B, S, hidden) or None."""
        ids = np.stack([np.pad(row.ids, (0, length - len(row.ids))) for row in rows])
        positions = np.stack(
            [np.pad(row.positions, ((0, 0), (0, length - len(row.ids)))) for row in rows], axis=1
        )
        embeds, deepstack = self._embeddings(ids), self._manifest.deepstack
        stack = None if deepstack is None else np.zeros((deepstack.layers, *embeds.shape), embeds.dtype)
        for index, row in enumerate(rows):
            places = np.flatnonzero(row.ids == self._manifest.merge.token)
            if row.images:
                joined = join_features(row.images)
                embeds[index, places] = joined.tokens
                if stack is not None:
                    stack[:, index, places] = joined.deepstack
        return embeds, positions, stack

    def _embeddings(self, ids: NDArray[np.int64]) -> Any:
        part = self._manifest.part("embed_tokens")
        self._types = (ids == self._manifest.merge.token).astype(np.int64)
        return self._embed.run([part.outputs[0].name], {part.inputs[0].name: ids})[0]

    def _start(self, batch: int) -> None:
        self._values = {
            state.input: np.zeros(_empty(state, batch), dtype=state.dtype) for state in self._manifest.state
        }

    def _step(self, embeds: Any, positions: Any, stack: Any, lengths: NDArray[Any]) -> NDArray[Any]:
        """Logits (B, kept, vocab) of one step, after which the rows have `lengths` tokens."""
        step: dict[str, Any] = {
            "inputs_embeds": embeds,
            "attention_mask": (np.arange(lengths.max()) < lengths[:, None]).astype(np.int64),
            "position_ids": positions[0] if len(positions) == 1 else positions,
            "num_logits_to_keep": np.array(lengths.max() - lengths.min() + 1, dtype=np.int64),
        }
        if isinstance(attention := self._manifest.attention, ImageAttention):
            step[attention.input] = self._types
        if deepstack := self._manifest.deepstack:
            zeros = np.zeros((deepstack.layers, *embeds.shape), embeds.dtype)
            step[deepstack.input] = zeros if stack is None else stack
        if embeds.shape[1] == 1:
            step["num_logits_to_keep"] = np.array(1, dtype=np.int64)
        feeds = {name: value for name, value in {**step, **self._values}.items() if name in self._inputs}
        states = self._manifest.state
        logits, *present = self._decoder.run(["logits", *(state.output for state in states)], feeds)
        self._values = {state.input: value for state, value in zip(states, present, strict=True)}
        return logits


def _empty(state: StateTensor, batch: int) -> list[int]:
    """The shape of a state before the first token."""
    sizes = [size if isinstance(size, int) else batch for size in state.shape]
    if state.sequence_axis is not None:
        sizes[state.sequence_axis] = 0
    return sizes


def compare_rows(
    decoder: BatchDecoder, rows: Sequence[Row], forced_t: Sequence[int]
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """(each row alone, all rows together), logits (B, 1 + T, vocab) both."""
    alone = np.concatenate([decoder.run([row], forced_t) for row in rows])
    return alone, decoder.run(rows, forced_t)
