"""Position ids of a stretch of a sequence, by the scheme that a manifest names.

In: which ids are image tokens, the grids of the views behind them, and where the stretch begins.
Out: position ids and where the next stretch begins. Not here: what the decoder does with them.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from runtime.errors import InputError
from runtime.manifest import Positions, Positions1d


def position_ids(
    scheme: Positions, is_image: NDArray[np.bool_], grids: Sequence[tuple[int, int]], first: int
) -> tuple[NDArray[np.int64], int]:
    """Position ids (rows, S) for S tokens of which `is_image` (S,), and the first position after them.

    `positions.1d@1` has one row, `positions.mrope@1` three (arXiv 2409.12191, section 2.1, one
    frame a picture). `grids`: (rows, columns) of each view whose tokens are in the stretch, in order.
    Raises InputError when grids and image tokens do not agree.
    """
    if isinstance(scheme, Positions1d):
        return np.arange(first, first + len(is_image), dtype=np.int64)[None], first + len(is_image)
    if int(is_image.sum()) != sum(rows * columns for rows, columns in grids):
        raise InputError(f"prompt: {int(is_image.sum())} image tokens do not fill views of {list(grids)}")
    pieces: list[NDArray[np.int64]] = []
    left = iter(grids)
    place = 0
    while place < len(is_image):
        if is_image[place]:
            rows, columns = next(left)
            grid = np.indices((rows, columns)).reshape(2, -1)
            pieces.append(first + np.stack([np.zeros(rows * columns, np.int64), *grid]))
            first, place = first + max(rows, columns), place + rows * columns
        else:
            images = np.flatnonzero(is_image[place:])
            count = int(images[0]) if len(images) else len(is_image) - place
            pieces.append(np.broadcast_to(np.arange(first, first + count, dtype=np.int64), (3, count)))
            first, place = first + count, place + count
    return np.concatenate(pieces, axis=1) if pieces else np.zeros((3, 0), np.int64), first
