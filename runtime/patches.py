"""A view's pixels as patches, in the order that a vision part wants them.

In: a view's normalised pixels (H, W, 3) float32, H and W multiples of a patch. Out: tensors by name.
Not here: resizing to such sizes, what the vision part does with patches.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import BundleError, InputError
from runtime.image_spec import PatchifyBlocks, PatchifyPadded

Floats = NDArray[np.float32]
Tensors = dict[str, NDArray[Any]]


def blocks(pixels: Floats, layout: PatchifyBlocks) -> Tensors:
    """`patchify.blocks@1`: patches of one block beside each other, each channel, frame, row, column."""
    size, merge = layout.patch, layout.merge
    rows, columns = _grid(pixels, size * merge)
    # (block row, row in block, y, block column, column in block, x, channel)
    pieces = pixels.reshape(rows, merge, size, columns, merge, size, 3).transpose(0, 3, 1, 4, 6, 2, 5)
    frames = np.repeat(pieces[:, :, :, :, :, None], layout.frames, axis=5)
    return {
        "pixel_values": frames.reshape(rows * columns * merge * merge, -1),
        "image_grid_thw": np.array([[1, rows * merge, columns * merge]], dtype=np.int64),
    }


def padded(pixels: Floats, layout: PatchifyPadded) -> Tensors:
    """`patchify.padded@1`: patches in reading order, each row, column, channel, and zeros up to `length`.

    Raises InputError when there are more patches.
    """
    size = layout.patch
    rows, columns = _grid(pixels, size)
    count = rows * columns
    refuse_needle(pixels.shape[0], pixels.shape[1], layout)
    pieces = pixels.reshape(rows, size, columns, size, 3).transpose(0, 2, 1, 3, 4)
    values = np.zeros((1, layout.length, size * size * 3), dtype=np.float32)
    values[0, :count] = pieces.reshape(count, -1)
    return {
        "pixel_values": values,
        "pixel_attention_mask": (np.arange(layout.length) < count).astype(np.int32)[None],
        "spatial_shapes": np.array([[rows, columns]], dtype=np.int64),
    }


def refuse_needle(height: int, width: int, layout: PatchifyPadded) -> None:
    """Raise InputError for a view of more than `length` patches; to be asked before its pixels are made."""
    rows, columns = height // layout.patch, width // layout.patch
    if rows * columns > layout.length:
        raise InputError(
            f"image: is too long and thin: {columns} x {rows} patches, the most is {layout.length}; crop it"
        )


def _grid(pixels: Floats, step: int) -> tuple[int, int]:
    """(rows, columns) of squares of `step` pixels."""
    height, width = pixels.shape[:2]
    if height % step or width % step:
        raise BundleError(
            f"image operations: give {width} x {height} pixels, which no patches of {step} fill; re-export"
        )
    return height // step, width // step
