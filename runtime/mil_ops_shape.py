"""Operations of ML programs that move values: slices, shapes, joins, gathers, scatters.

In: numpy arrays by parameter name. Out: arrays, views of the inputs where they can be.
Not here: the table of all operations (`runtime/mil_ops.py`).
Definitions: coremltools, `converters/mil/mil/ops/defs`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Op = Callable[..., "Array | tuple[Array, ...]"]
Index = tuple[Any, ...]


def slices(
    x: Array,
    begin: Array,
    end: Array,
    stride: Array | None = None,
    begin_mask: Array | None = None,
    end_mask: Array | None = None,
    squeeze_mask: Array | None = None,
) -> Index:
    """The numpy index of `slice_by_index` and `slice_update`; a masked end is the axis's own."""
    if len(begin) != x.ndim or len(end) != x.ndim:
        raise ValueError(f"begin and end have {len(begin)} and {len(end)} places, x has {x.ndim} axes")
    found: list[Any] = []
    for axis in range(x.ndim):
        if squeeze_mask is not None and squeeze_mask[axis]:
            found.append(0 if begin_mask is not None and begin_mask[axis] else int(begin[axis]))
            continue
        first = None if begin_mask is not None and begin_mask[axis] else int(begin[axis])
        last = None if end_mask is not None and end_mask[axis] else int(end[axis])
        found.append(slice(first, last, None if stride is None else int(stride[axis])))
    return tuple(found)


def slice_by_index(x: Array, begin: Array, end: Array, **masks: Any) -> Array:
    return np.asarray(x[slices(x, begin, end, **masks)])


def slice_update(x: Array, update: Array, begin: Array, end: Array, **masks: Any) -> Array:
    """A copy of x with `update` in the slice, whose shape it must have."""
    found = x.copy()
    put(found, update, slices(x, begin, end, **masks))
    return found


def put(x: Array, update: Array, index: Index) -> None:
    """Write `update` into x; a slice that is cut off by x's end is an error, not a smaller one."""
    target = x[index]
    if target.shape != update.shape:
        raise ValueError(f"the slice has the shape {target.shape}, the update {update.shape}")
    x[index] = update


def slice_by_size(x: Array, begin: Array, size: Array) -> Array:
    index = [
        slice(int(first), None if count == -1 else int(first) + int(count))
        for first, count in zip(begin, size, strict=True)
    ]
    return x[tuple(index)]


def reshape(x: Array, shape: Array) -> Array:
    """0 keeps the size of that axis where there are as many, -1 is worked out."""
    kept = x.shape if len(shape) == x.ndim else [0] * len(shape)
    sizes = [int(size) or old for size, old in zip(shape, kept, strict=True)]
    return x.reshape(sizes)


def squeeze(x: Array, axes: Array | None = None) -> Array:
    return x.squeeze() if axes is None else x.squeeze(tuple(int(axis) for axis in axes))


def expand_dims(x: Array, axes: Array) -> Array:
    return np.expand_dims(x, tuple(int(axis) for axis in np.atleast_1d(axes)))


def concat(values: Sequence[Array], axis: Array, interleave: Any = False) -> Array:
    place = int(axis)
    if not interleave:
        return np.stack(values) if values[0].ndim == 0 else np.concatenate(values, axis=place)
    stacked = np.stack(values, axis=place + 1 if place >= 0 else place)
    sizes = list(values[0].shape)
    sizes[place] *= len(values)
    return stacked.reshape(sizes)


def split(
    x: Array, axis: Array, num_splits: Any = None, split_sizes: Array | None = None
) -> tuple[Array, ...]:
    if split_sizes is not None:
        return tuple(np.split(x, np.cumsum(split_sizes)[:-1], axis=int(axis)))
    return tuple(np.split(x, int(num_splits), axis=int(axis)))


def pad(x: Array, pad: Array, mode: str = "constant", constant_val: Any = 0) -> Array:
    """(before, after) of the last axes."""
    pairs = np.asarray(pad).reshape(-1, 2)
    room = [(0, 0)] * (x.ndim - len(pairs)) + [(int(before), int(after)) for before, after in pairs]
    if mode == "constant":
        return np.pad(x, room, constant_values=np.asarray(constant_val).astype(x.dtype))
    if mode not in ("reflect", "replicate"):
        raise ValueError(f"mode {mode!r} is none that this runtime knows")
    return np.pad(x, room, mode="reflect" if mode == "reflect" else "edge")


def band_part(x: Array, lower: Any = -1, upper: Any = -1) -> Array:
    """What lies so far from the diagonal at most; -1: everything on that side."""
    below, above = int(lower), int(upper)
    found = x if above < 0 else np.tril(x, above)
    return found if below < 0 else np.triu(found, -below)


def one_hot(
    indices: Array, one_hot_vector_size: Any, axis: Any = -1, on_value: Any = 1, off_value: Any = 0
) -> Array:
    hot = np.expand_dims(indices, int(axis)) == np.arange(int(one_hot_vector_size)).reshape(
        [-1 if place == int(axis) % (indices.ndim + 1) else 1 for place in range(indices.ndim + 1)]
    )
    return np.where(hot, on_value, off_value)


def argsort(x: Array, axis: Any = -1, ascending: Any = False) -> Array:
    order = np.argsort(x if ascending else -x.astype(np.float64), axis=int(axis), kind="stable")
    return order.astype(np.int32)


def topk(
    x: Array,
    k: Any = 1,
    axis: Any = -1,
    ascending: Any = False,
    sort: Any = True,
    return_indices: Any = True,
    output_indices_dtype: str = "int32",
) -> tuple[Array, ...]:
    """The k largest (`ascending`: smallest) values, sorted, and their places."""
    order = argsort(x, axis, ascending).take(np.arange(int(k)), axis=int(axis))
    values = np.take_along_axis(x, order, int(axis))
    return (values, order.astype(output_indices_dtype)) if return_indices else (values,)


# --- gather and scatter -----------------------------------------------


def gather(
    x: Array, indices: Array, axis: Any = 0, batch_dims: Any = 0, validate_indices: Any = False
) -> Array:
    """x at `indices` along an axis; the first `batch_dims` axes of both go together."""
    _check(indices, x.shape[int(axis)])
    batch, place = int(batch_dims), int(axis)
    if not batch:
        return x.take(indices, axis=place)
    place = place % x.ndim
    rows = [x[index].take(indices[index], axis=place - batch) for index in np.ndindex(*x.shape[:batch])]
    return np.stack(rows).reshape(*x.shape[:batch], *rows[0].shape)


def gather_along_axis(x: Array, indices: Array, axis: Any = 0, validate_indices: Any = False) -> Array:
    _check(indices, x.shape[int(axis)])
    return np.take_along_axis(x, indices.astype(np.int64), int(axis))


def gather_nd(x: Array, indices: Array, batch_dims: Any = 0, validate_indices: Any = False) -> Array:
    batch = int(batch_dims)
    for axis, places in enumerate(np.moveaxis(indices, -1, 0), start=batch):
        _check(places, x.shape[axis])
    grid = np.ix_(*(np.arange(size) for size in indices.shape[:batch]))
    spread = [each.reshape(*each.shape, *(1,) * (indices.ndim - 1 - batch)) for each in grid]
    return x[(*spread, *np.moveaxis(indices, -1, 0))]


_MODES: dict[str, np.ufunc] = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "div": np.divide,
    "max": np.maximum,
    "min": np.minimum,
}


def _check(indices: Array, size: int) -> None:
    """What lies outside is undefined on a device, negative places too since iOS 17: here it is an error."""
    if indices.size and (indices.min() < 0 or indices.max() >= size):
        odd = indices.min() if indices.min() < 0 else indices.max()
        raise IndexError(f"index {odd} is outside of 0 to {size - 1}")


def _scattered(data: Array, index: Index, updates: Array, mode: str) -> Array:
    found = data.copy()
    if mode == "update":
        found[index] = updates
    elif mode in _MODES:
        _MODES[mode].at(found, index, updates)
    else:
        raise ValueError(f"mode {mode!r} is none that this runtime knows")
    return found


def scatter(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> Array:
    _check(indices, data.shape[int(axis)])
    index = (*[slice(None)] * (int(axis) % data.ndim), indices)
    return _scattered(data, index, updates, mode)


def scatter_along_axis(
    data: Array,
    indices: Array,
    updates: Array,
    axis: Any = 0,
    mode: str = "add",
    validate_indices: Any = False,
) -> Array:
    _check(indices, data.shape[int(axis)])
    index: list[Any] = list(np.ogrid[tuple(slice(size) for size in indices.shape)])
    index[int(axis)] = indices
    return _scattered(data, tuple(index), updates, mode)


def scatter_nd(
    data: Array, indices: Array, updates: Array, mode: str = "add", validate_indices: Any = False
) -> Array:
    index = tuple(np.moveaxis(indices, -1, 0))
    for axis, places in enumerate(index):
        _check(places, data.shape[axis])
    return _scattered(data, index, updates, mode)


# --- blocks of pixels -------------------------------------------------


def depth_to_space(x: Array, block_size: Any) -> Array:
    """(B, C, H, W) to (B, C / b^2, H b, W b); the channel counts the block first."""
    b, (n, c, h, w) = int(block_size), x.shape
    return x.reshape(n, b, b, c // b**2, h, w).transpose(0, 3, 4, 1, 5, 2).reshape(n, -1, h * b, w * b)


def space_to_depth(x: Array, block_size: Any) -> Array:
    b, (n, c, h, w) = int(block_size), x.shape
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 3, 5, 1, 2, 4).reshape(n, -1, h // b, w // b)


def pixel_shuffle(x: Array, upscale_factor: Any) -> Array:
    """As depth_to_space, but the channel counts the block last (torch)."""
    b, (n, c, h, w) = int(upscale_factor), x.shape
    return x.reshape(n, c // b**2, b, b, h, w).transpose(0, 1, 4, 2, 5, 3).reshape(n, -1, h * b, w * b)


def pixel_unshuffle(x: Array, downscale_factor: Any) -> Array:
    b, (n, c, h, w) = int(downscale_factor), x.shape
    return x.reshape(n, c, h // b, b, w // b, b).transpose(0, 1, 3, 5, 2, 4).reshape(n, -1, h // b, w // b)


def upsample_nearest_neighbor(x: Array, scale_factor_height: Any = 1, scale_factor_width: Any = 1) -> Array:
    """Whole factors only."""
    factors = (float(scale_factor_height), float(scale_factor_width))
    if any(factor != int(factor) for factor in factors):
        raise ValueError(f"factors {factors} are no whole numbers, which this runtime does not know")
    return x.repeat(int(factors[0]), axis=-2).repeat(int(factors[1]), axis=-1)


OPS: dict[str, Op] = {
    "argsort": argsort,
    "band_part": band_part,
    "concat": concat,
    "depth_to_space": depth_to_space,
    "expand_dims": expand_dims,
    "fill": lambda shape, value=0.0: np.full([int(size) for size in shape], value),
    "fill_like": lambda ref_tensor, value=0.0: np.full(ref_tensor.shape, value),
    "flatten2d": lambda x, axis=1: x.reshape(int(np.prod(x.shape[: int(axis)])), -1),
    "gather": gather,
    "gather_along_axis": gather_along_axis,
    "gather_nd": gather_nd,
    "non_zero": lambda x: np.argwhere(x).astype(np.int32),
    "one_hot": one_hot,
    "pad": pad,
    "pixel_shuffle": pixel_shuffle,
    "pixel_unshuffle": pixel_unshuffle,
    "range_1d": lambda end, start, step: np.arange(start.item(), end.item(), step.item()),
    "reshape": reshape,
    "reverse": lambda x, axes=None: np.flip(x, None if axes is None else tuple(int(axis) for axis in axes)),
    "scatter": scatter,
    "scatter_along_axis": scatter_along_axis,
    "scatter_nd": scatter_nd,
    "shape": lambda x: np.array(x.shape, np.int32),
    "slice_by_index": slice_by_index,
    "slice_by_size": slice_by_size,
    "slice_update": slice_update,
    "space_to_depth": space_to_depth,
    "split": split,
    "squeeze": squeeze,
    "stack": lambda values, axis: np.stack(values, axis=int(axis)),
    "tile": lambda x, reps: np.tile(x, tuple(int(count) for count in reps)),
    "topk": topk,
    "transpose": lambda x, perm: x.transpose([int(axis) for axis in perm]),
    "upsample_nearest_neighbor": upsample_nearest_neighbor,
}
