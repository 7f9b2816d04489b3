"""Cutting a picture into views: tiles row by row, then the whole.

In: a picture's bytes (H, W, 3) and the operation. Out: the views' bytes and the (rows, columns) of tiles,
(0, 0) without any. Not here: which sizes (`runtime/geometry.py`), what a view becomes (`runtime/image.py`).
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from runtime import geometry, resample
from runtime.image_spec import GridTiles, ResizeExact, SmartResize, SplitTiles

Bytes = NDArray[np.uint8]
Cut = tuple[list[Bytes], tuple[int, int]]


def split(pixels: Bytes, tiles: SplitTiles) -> Cut:
    """`tiles.split@1`: squares of `side`, then the stretched picture made one square."""
    side = tiles.side
    height, width = geometry.split_size(pixels.shape[0], pixels.shape[1], side)
    pixels = resample.resize(pixels, height, width, tiles.filter)
    if (height, width) == (side, side):
        return [pixels], (0, 0)
    grid = height // side, width // side
    return [*_cut(pixels, grid), resample.resize(pixels, side, side, tiles.filter)], grid


def grid(pixels: Bytes, tiles: GridTiles) -> Cut:
    """`tiles.grid@1`: tiles of the nearest grid; the whole view is made from the picture as it came."""
    (rows, columns), whole = geometry.grid_plan(pixels.shape[0], pixels.shape[1], tiles)
    views = []
    if rows * columns:
        stretched = resample.resize(pixels, tiles.height * rows, tiles.width * columns, tiles.filter)
        views = _cut(stretched, (rows, columns))
    if whole is not None:
        views.append(resample.resize(pixels, *whole, tiles.whole.filter))
    return views, (rows, columns)


def resized(pixels: Bytes, resize: ResizeExact | SmartResize) -> Bytes:
    """The picture at the size of either operation."""
    size = geometry.resized_size(pixels.shape[0], pixels.shape[1], resize)
    return resample.resize(pixels, *size, resize.filter)


def _cut(pixels: Bytes, grid: tuple[int, int]) -> list[Bytes]:
    """Equal pieces, row by row."""
    return [piece for row in np.split(pixels, grid[0], axis=0) for piece in np.split(row, grid[1], axis=1)]
