"""Operations of ML programs with weights and windows: products, convolutions, norms, pools, attention.

In: numpy arrays by parameter name, floats as float32. Out: arrays. Not here: the table of all operations
(`runtime/mil_ops.py`). Definitions: coremltools, `converters/mil/mil/ops/defs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from runtime.mil_ops_math import softmax

Array = NDArray[Any]
Op = Callable[..., "Array | tuple[Array, ...]"]


def linear(x: Array, weight: Array, bias: Array | None = None) -> Array:
    """x (..., I) by weight (O, I) and bias (O,): (..., O)."""
    found = x.reshape(-1, x.shape[-1]) @ weight.T
    if bias is not None:
        found += bias
    return found.reshape(*x.shape[:-1], weight.shape[0])


def matmul(x: Array, y: Array, transpose_x: Any = False, transpose_y: Any = False) -> Array:
    left = x.swapaxes(-1, -2) if transpose_x and x.ndim > 1 else x
    right = y.swapaxes(-1, -2) if transpose_y and y.ndim > 1 else y
    return np.matmul(left, right)


def einsum(values: Sequence[Array], equation: str) -> Array:
    return np.einsum(equation, *values, optimize=True)


def scaled_dot_product_attention(
    query: Array, key: Array, value: Array, attn_mask: Array | None = None
) -> Array:
    """query (..., L, E), key (..., S, E), value (..., S, V): (..., L, V); a bool mask is True where seen."""
    weights = np.matmul(query * np.float32(1 / math.sqrt(query.shape[-1])), key.swapaxes(-1, -2))
    if attn_mask is not None:
        if attn_mask.dtype == np.bool_:
            weights = np.where(attn_mask, weights, np.float32(-np.inf))
        else:
            weights += attn_mask
    return np.matmul(softmax(weights), value)


# --- norms ------------------------------------------------------------


def layer_norm(
    x: Array, axes: Any = None, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    places = (
        tuple(range(x.ndim)) if axes is None else tuple(int(axis) % x.ndim for axis in np.atleast_1d(axes))
    )
    sizes = [x.shape[axis] if axis in places else 1 for axis in range(x.ndim)]
    found = x - x.mean(axis=places, keepdims=True)
    found /= np.sqrt(np.square(found).mean(axis=places, keepdims=True) + epsilon)
    if gamma is not None:
        found = found * gamma.reshape(sizes)
    return found if beta is None else found + beta.reshape(sizes)


def batch_norm(
    x: Array,
    mean: Array,
    variance: Array,
    gamma: Array | None = None,
    beta: Array | None = None,
    epsilon: Any = 1e-5,
) -> Array:
    sizes = (-1, *(1,) * (x.ndim - 2))
    found = (x - mean.reshape(sizes)) / np.sqrt(variance.reshape(sizes) + epsilon)
    if gamma is not None:
        found = found * gamma.reshape(sizes)
    return found if beta is None else found + beta.reshape(sizes)


def instance_norm(
    x: Array, gamma: Array | None = None, beta: Array | None = None, epsilon: Any = 1e-5
) -> Array:
    sizes = (-1, *(1,) * (x.ndim - 2))
    found = layer_norm(x, np.arange(2, x.ndim), epsilon=epsilon)
    if gamma is not None:
        found = found * gamma.reshape(sizes)
    return found if beta is None else found + beta.reshape(sizes)


def l2_norm(x: Array, epsilon: Any = 1e-6) -> Array:
    """Over the last three axes."""
    return x / np.sqrt(np.square(x).sum(axis=(-3, -2, -1), keepdims=True) + epsilon)


# --- windows ----------------------------------------------------------


def conv(
    x: Array,
    weight: Array,
    bias: Array | None = None,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    dilations: Any = None,
    groups: Any = 1,
) -> Array:
    """x (N, C, *D) by weight (O, C / groups, *K): (N, O, *out), in one to three dimensions."""
    kernel, parts = weight.shape[2:], int(groups)
    windows = _windows(x, kernel, strides, pad_type, pad, dilations)
    axes = len(kernel)
    n, c, *out = windows.shape[: 2 + axes]
    # (N, groups, places, C / groups * K) by (groups, C / groups * K, O / groups)
    spread = windows.reshape(n, parts, c // parts, *out, *kernel)
    columns = np.moveaxis(spread, 2, 2 + axes).reshape(n, parts, math.prod(out), -1)
    matrices = weight.reshape(parts, weight.shape[0] // parts, -1).swapaxes(1, 2)
    found = np.matmul(columns, matrices).swapaxes(2, 3).reshape(n, weight.shape[0], *out)
    return found if bias is None else found + bias.reshape(-1, *(1,) * axes)


def avg_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    exclude_padding_from_average: Any = False,
    ceil_mode: Any = False,
) -> Array:
    kernel = _pool_kernel(kernel_sizes, ceil_mode)
    axes = tuple(range(-len(kernel), 0))
    summed = _windows(x, kernel, strides, pad_type, pad).sum(axis=axes)
    if not exclude_padding_from_average:
        return summed / np.float32(math.prod(kernel))
    return summed / _windows(np.ones_like(x), kernel, strides, pad_type, pad).sum(axis=axes)


def max_pool(
    x: Array,
    kernel_sizes: Array,
    strides: Any = None,
    pad_type: str = "valid",
    pad: Any = None,
    ceil_mode: Any = False,
) -> Array:
    kernel = _pool_kernel(kernel_sizes, ceil_mode)
    windows = _windows(x, kernel, strides, pad_type, pad, outside=-np.inf)
    return windows.max(axis=tuple(range(-len(kernel), 0)))


def _pool_kernel(kernel_sizes: Array, ceil_mode: Any) -> tuple[int, ...]:
    if ceil_mode:
        raise ValueError("ceil_mode is not known to this runtime")
    return tuple(int(size) for size in kernel_sizes)


def _windows(
    x: Array,
    kernel: Sequence[int],
    strides: Any,
    pad_type: str,
    pad: Any,
    dilations: Any = None,
    outside: float = 0.0,
) -> Array:
    """Views (N, C, *out, *kernel) of x (N, C, *D), which is padded with `outside`."""
    axes = len(kernel)
    steps = [1] * axes if strides is None else [int(step) for step in strides]
    gaps = [1] * axes if dilations is None else [int(gap) for gap in dilations]
    spans = [(size - 1) * gap + 1 for size, gap in zip(kernel, gaps, strict=True)]
    room = _padding(x.shape[2:], spans, steps, pad_type, pad)
    if any(before or after for before, after in room):
        x = np.pad(x, [(0, 0), (0, 0), *room], constant_values=outside)
    windows = sliding_window_view(x, tuple(spans), axis=tuple(range(2, 2 + axes)))  # type: ignore[call-overload]
    taken = (*(slice(None, None, step) for step in steps), *(slice(None, None, gap) for gap in gaps))
    return windows[(slice(None), slice(None), *taken)]


def _padding(
    sizes: Sequence[int], spans: Sequence[int], steps: Sequence[int], pad_type: str, pad: Any
) -> list[tuple[int, int]]:
    """(before, after) of each axis."""
    if pad_type == "valid":
        return [(0, 0)] * len(sizes)
    if pad_type == "custom":
        pairs = np.zeros((len(sizes), 2), int) if pad is None else np.asarray(pad).reshape(-1, 2)
        return [(int(before), int(after)) for before, after in pairs]
    if pad_type not in ("same", "same_lower"):
        raise ValueError(f"pad_type {pad_type!r} is none that this runtime knows")
    found = []
    for size, span, step in zip(sizes, spans, steps, strict=True):
        needed = max(0, (math.ceil(size / step) - 1) * step + span - size)
        small, large = needed // 2, needed - needed // 2
        found.append((small, large) if pad_type == "same" else (large, small))
    return found


OPS: dict[str, Op] = {
    "avg_pool": avg_pool,
    "batch_norm": batch_norm,
    "conv": conv,
    "einsum": einsum,
    "instance_norm": instance_norm,
    "l2_norm": l2_norm,
    "layer_norm": layer_norm,
    "linear": linear,
    "matmul": matmul,
    "max_pool": max_pool,
    "scaled_dot_product_attention": scaled_dot_product_attention,
}
