"""What a session asks of a bundle's format.

In: views, token ids, positions, features. Out: features, logits. Not here: the formats themselves
(`runtime/onnx_session.py`, `runtime/static_session.py`), pictures, text.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from runtime.image import ImageFeatures, View
from runtime.providers import ProviderReport

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


class RowsState(Protocol):
    """Several sequences side by side, each its own length."""

    def prefill(
        self,
        ids: Sequence[TokenIds],
        positions: Sequence[TokenIds],
        images: Sequence[Sequence[ImageFeatures]],
    ) -> None:
        """Fill empty rows with ids (S_row,) at positions (1 or 3, S_row)."""

    def step(self, tokens: TokenIds, positions: TokenIds, live: NDArray[np.bool_]) -> Floats:
        """Append tokens (rows,) at positions (1 or 3, rows) where `live` (rows,); logits (rows, vocab)."""


class Backend(Protocol):
    """What a format offers; one sequence at a time."""

    rewindable: bool
    """Whether `rewind` reaches every length; else the marked ones only."""

    providers: tuple[ProviderReport, ...]

    @property
    def state_bytes(self) -> int:
        """What the state of one sequence takes when the context is full."""

    @property
    def no_rows(self) -> str:
        """Why `rows` cannot be had; empty when it can."""

    def encode_view(self, view: View) -> ImageFeatures:
        """What the vision part makes of one view."""

    def rewind(self, length: int) -> int:
        """Cut the sequence to `length` tokens or as near before as can be; the length that is left."""

    def mark(self) -> None:
        """Make the present length one that `rewind` reaches."""

    def extend(self, ids: TokenIds, positions: TokenIds, images: Sequence[ImageFeatures]) -> Floats:
        """Append ids (S,) at positions (rows, S), with features for image tokens; the last's logits."""

    def rows(self, rows: int, capacity: int) -> RowsState:
        """A state of its own for so many sequences of at most `capacity` tokens."""

    def close(self) -> None:
        """Free the models."""
