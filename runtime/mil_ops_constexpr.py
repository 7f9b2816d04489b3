"""Weights of ML programs that are stored compressed: what `constexpr_*` operations make of them.

In: stored arrays, values under a byte in a whole one. Out: the dense array, in the type of its scales or
table. Not here: reading them (`runtime/mil_weights.py`).
Definitions: coremltools, `converters/mil/mil/ops/defs`, in constexpr_ops.py and compression.py; those of
iOS 16 have the packed bytes and the shape of the result, those of iOS 18 have shaped arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.mil_program import TensorType, unpack

Array = NDArray[Any]
Op = Callable[..., "Array | tuple[Array, ...]"]


def blockwise_shift_scale(data: Array, scale: Array, offset: Array | None = None) -> Array:
    """scale * (data - offset), each scale for a block whose size is data's over scale's, axis by axis."""
    blocks = _blocks(data.shape, scale.shape)
    found = data.reshape(blocks).astype(np.float32)
    lone = [size for count in scale.shape for size in (count, 1)]
    if offset is not None:
        found -= offset.reshape(lone).astype(np.float32)
    found *= scale.reshape(lone).astype(np.float32)
    return found.reshape(data.shape).astype(scale.dtype)


def affine_dequantize(quantized_data: Array, zero_point: Array, scale: Array, axis: Array) -> Array:
    """scale * (data - zero point), each a scalar or one value for each place on the axis."""
    sizes = [1] * quantized_data.ndim
    sizes[int(axis)] = -1
    wide = [sizes if each.ndim else [1] * quantized_data.ndim for each in (scale, zero_point)]
    offset = zero_point.reshape(wide[1]).astype(np.float32)
    found = (quantized_data.astype(np.float32) - offset) * scale.reshape(wide[0]).astype(np.float32)
    return found.astype(scale.dtype)


def lut_to_dense(
    indices: Array, lut: Array, vector_axis: Array | None = None, shape: Array | None = None
) -> Array:
    """Places in a table to its values: lut (*groups, palette, vector) for indices of as many axes as groups.

    A vector of more than one value spreads along `vector_axis`. With `shape`: iOS 16, one table (palette,).
    """
    if shape is not None:
        bits = int(lut.size - 1).bit_length()
        kind = TensorType(f"uint{bits}", tuple(int(size) for size in shape))
        return lut[unpack(np.ascontiguousarray(indices, np.uint8), kind)]
    *groups, palette, width = lut.shape
    blocks = _blocks(indices.shape, groups)
    lone = [size for count in groups for size in (count, 1)]
    first = np.arange(int(np.prod(groups)), dtype=np.int32).reshape(lone) * np.int32(palette)
    places = (indices.reshape(blocks) + first).reshape(indices.shape)
    found = lut.reshape(-1, width)[places]
    if width == 1:
        return found[..., 0]
    if vector_axis is None:
        raise ValueError("a table of vectors needs a vector_axis")
    axis = int(vector_axis) % indices.ndim
    sizes = list(indices.shape)
    sizes[axis] *= width
    return np.moveaxis(found, -1, axis + 1).reshape(sizes)


def sparse_to_dense(nonzero_data: Array, mask: Array, shape: Array | None = None) -> Array:
    """The values where the mask is 1, zeros elsewhere."""
    if shape is not None:
        kind = TensorType("uint1", tuple(int(size) for size in shape))
        mask = unpack(np.ascontiguousarray(mask, np.uint8), kind)
    found = np.zeros(mask.shape, nonzero_data.dtype)
    found[mask.astype(bool)] = nonzero_data
    return found


def lut_to_sparse(
    indices_mask: Array, indices_nonzero_data: Array, lut: Array, vector_axis: Array | None = None
) -> tuple[Array, Array]:
    """(mask, values) of a sparse array whose values are places in a table."""
    dense = lut_to_dense(sparse_to_dense(indices_nonzero_data, indices_mask), lut, vector_axis)
    mask = indices_mask
    if vector_axis is not None:
        mask = mask.repeat(lut.shape[-1], axis=int(vector_axis))
    return mask, dense[mask.astype(bool)]


def sparse_blockwise_shift_scale(
    data_mask: Array, nonzero_data: Array, scale: Array, offset: Array | None = None
) -> tuple[Array, Array]:
    """(mask, values) of a sparse array whose values are quantized."""
    dense = blockwise_shift_scale(sparse_to_dense(nonzero_data, data_mask), scale, offset)
    return data_mask, dense[data_mask.astype(bool)]


def _blocks(sizes: Sequence[int], counts: Sequence[int]) -> list[int]:
    """(count, block) of each axis, one after the other."""
    if len(sizes) != len(counts) or any(size % count for size, count in zip(sizes, counts, strict=True)):
        raise ValueError(f"blocks of {list(counts)} do not divide {list(sizes)}")
    return [part for size, count in zip(sizes, counts, strict=True) for part in (count, size // count)]


OPS: dict[str, Op] = {
    "constexpr_affine_dequantize": affine_dequantize,
    "constexpr_blockwise_shift_scale": blockwise_shift_scale,
    "constexpr_cast": lambda source_val, output_dtype: source_val.astype(
        {"fp32": "float32", "fp16": "float16"}.get(output_dtype, output_dtype)
    ),
    "constexpr_lut_to_dense": lut_to_dense,
    "constexpr_lut_to_sparse": lut_to_sparse,
    "constexpr_sparse_blockwise_shift_scale": sparse_blockwise_shift_scale,
    "constexpr_sparse_to_dense": sparse_to_dense,
}
