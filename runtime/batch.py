"""Several questions side by side: one pass of the decoder a token for all of them.

In: a session's prompts. Out: an `Answer` for each, equal to what it would be alone.
Not here: the state (`runtime/onnx_session.py`), preparing questions (`runtime/session.py`).

Rows are prefilled together but for their last token, padded on the right; each row's last token is then its
first single step, so that no row needs the logits of padding. A row that has ended is carried along.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from runtime.answering import Run, ms_since
from runtime.backend import RowsState
from runtime.generation import Writer
from runtime.image import ImageFeatures

TokenIds = NDArray[np.int64]


@dataclass
class Row:
    """One question: its prompt with positions (1 or 3, S), and where its answer stands."""

    run: Run
    ids: TokenIds
    images: Sequence[ImageFeatures]
    positions: TokenIds
    next_position: int


def refusal(rows: Sequence[Row], image_token: int) -> str:
    """Why these rows do not run side by side; empty when they do."""
    if len(rows) < 2:
        return "it is one question"
    if any(len(row.ids) < 2 or row.ids[-1] == image_token for row in rows):
        return "a prompt has no text to end with"
    return ""


def most_tokens(rows: Sequence[Row], context: int) -> int:
    """The length that the longest row may reach."""
    return max(min(len(row.ids) + row.run.options.max_new_tokens, context) for row in rows)


def generate(
    state: RowsState,
    rows: Sequence[Row],
    context: int,
    tokenizer: Tokenizer,
    stop_ids: Sequence[int],
    cancelled: Callable[[], bool],
) -> None:
    """Write every row's answer. Prompts have two tokens or more, the last of them no picture's."""
    for row in rows:
        row.run.writer = Writer(row.run.options, row.ids, tokenizer, stop_ids)
        row.run.stats.prompt_tokens, row.run.stats.image_tokens = len(row.ids), sum(map(len, row.images))
        row.run.stats.batch_rows = len(rows)
    mark = time.perf_counter()
    state.prefill(
        [row.ids[:-1] for row in rows], [row.positions[:, :-1] for row in rows], [row.images for row in rows]
    )
    live = np.ones(len(rows), dtype=bool)
    tokens = np.array([row.ids[-1] for row in rows])
    positions = np.stack([row.positions[:, -1] for row in rows], axis=1)
    logits = state.step(tokens, positions, live)
    for row in rows:
        row.run.stats.prefill_ms = ms_since(mark)
    while True:
        for index in np.flatnonzero(live):
            live[index] = _take(rows[index], logits[index], context, cancelled)
        if not live.any():
            return
        mark = time.perf_counter()
        for index in np.flatnonzero(live):
            row = rows[index]
            tokens[index], positions[:, index] = _writer(row).tokens[-1], row.next_position
            row.next_position += 1
        logits = state.step(tokens, positions, live)
        for index in np.flatnonzero(live):
            rows[index].run.stats.decode_ms.append(ms_since(mark))


def _take(row: Row, logits: Any, context: int, cancelled: Callable[[], bool]) -> bool:
    """Choose the row's next token; whether the row goes on."""
    writer = _writer(row)
    piece = writer.take(logits, context - len(row.ids) - len(writer.tokens))
    row.run.stats.new_tokens = len(writer.tokens)
    if piece or writer.reason:
        row.run.first_text()
    if writer.reason is None and cancelled():
        writer.cancel()
    return writer.reason is None


def _writer(row: Row) -> Writer:
    assert row.run.writer is not None
    return row.run.writer
