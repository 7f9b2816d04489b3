"""A prompt cut into pieces for graphs of fixed shapes, each with the image features that belong to it.

In: ids, positions, features of the pictures. Out: `Chunk`s and their padded arrays. Not here: running any
(`runtime/static_session.py`, `runtime/coreml_session.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.image import ImageFeatures, join_features

Floats = NDArray[np.float32]
TokenIds = NDArray[np.int64]


@dataclass(frozen=True)
class Chunk:
    """ids (n,) at positions (rows, n); at places (m,) features (m, hidden), deepstack (layers, m, hidden)."""

    ids: TokenIds
    positions: TokenIds
    places: NDArray[np.int64]
    features: Floats | None
    deepstack: Floats | None

    def __len__(self) -> int:
        return len(self.ids)

    def put_features(self, embeddings: NDArray[Any]) -> None:
        """Overwrite embeddings (1, n or more, hidden) at image tokens."""
        if self.features is not None:
            embeddings[0, self.places] = self.features

    def dense_deepstack(self, layers: int, size: int, hidden: int) -> Floats:
        """(layers, 1, size, hidden), zeros where no image token is."""
        dense = np.zeros((layers, 1, size, hidden), np.float32)
        if self.deepstack is not None:
            dense[:, 0, self.places] = self.deepstack
        return dense


def cut(
    ids: TokenIds,
    positions: TokenIds,
    images: Sequence[ImageFeatures],
    image_token: int,
    sizes: Iterable[int],
) -> Iterator[Chunk]:
    """Pieces of ids (S,) at positions (rows, S) by their sizes, which add up to S."""
    joined = join_features(images) if images else None
    is_image = ids == image_token
    # the how-manieth image token each one is, for the features that belong to a chunk
    nth = np.cumsum(is_image) - 1
    first = 0
    for size in sizes:
        part = slice(first, first + size)
        places = np.flatnonzero(is_image[part])
        chosen = nth[part][places]
        features = None if joined is None else joined.tokens[chosen]
        stack = None if joined is None or joined.deepstack is None else joined.deepstack[:, chosen]
        yield Chunk(ids[part], positions[:, part], places, features, stack)
        first += size


def padded(values: NDArray[np.int64], size: int) -> NDArray[np.int64]:
    """(..., n) with zeros after it, to (..., size)."""
    room = [(0, 0)] * (values.ndim - 1) + [(0, size - values.shape[-1])]
    return np.pad(values, room)
