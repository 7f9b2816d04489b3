"""Operations of ML programs, element by element and along axes: arithmetic, comparisons, activations, sums.

In: numpy arrays by parameter name. Out: arrays. Not here: the table of all operations (`runtime/mil_ops.py`),
rounding to the declared type (`runtime/mil.py`). Floats come as float32, whatever type is declared.
Definitions: coremltools, `converters/mil/mil/ops/defs`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Op = Callable[..., "Array | tuple[Array, ...]"]

_BLOCK = 1 << 15  # values that stay in the processor's cache
# erf(x) = x P(x^2) / Q(x^2) on [-4, 4], float32 to its last places: Eigen's `erf_impl<float>`
_ERF_P = (
    *(-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05),
    *(-7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02),
)
_ERF_Q = (
    *(-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03),
    *(-7.37332916720468e-03, -1.42647390514189e-02),
)

_CAST = {"fp16": "float32", "fp32": "float32", "fp64": "float64"}


def erf(x: Array) -> Array:
    """The error function of float32 values."""
    flat = np.ascontiguousarray(x, np.float32).reshape(-1)
    found = np.empty_like(flat)
    for first in range(0, len(flat), _BLOCK):
        part = np.clip(flat[first : first + _BLOCK], -4, 4)
        square = part * part
        found[first : first + _BLOCK] = part * _polynomial(_ERF_P, square) / _polynomial(_ERF_Q, square)
    return found.reshape(np.shape(x))


def _polynomial(coefficients: tuple[float, ...], x: Array) -> Array:
    found = np.full_like(x, coefficients[0])
    for coefficient in coefficients[1:]:
        found *= x
        found += np.float32(coefficient)
    return found


def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def gelu(x: Array, mode: str = "EXACT") -> Array:
    if mode == "TANH_APPROXIMATION":
        return 0.5 * x * (1 + np.tanh(np.float32(np.sqrt(2 / np.pi)) * (x + 0.044715 * x * x * x)))
    if mode == "SIGMOID_APPROXIMATION":
        return x * sigmoid(np.float32(1.702) * x)
    if mode != "EXACT":
        raise ValueError(f"mode {mode!r} is none that this runtime knows")
    return 0.5 * x * (1 + erf(x * np.float32(np.sqrt(0.5))))


def softplus(x: Array) -> Array:
    return np.logaddexp(x, np.zeros((), x.dtype))


def elu(x: Array, alpha: Array) -> Array:
    return np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def prelu(x: Array, alpha: Array) -> Array:
    return np.where(x >= 0, x, x * _channels(alpha, x))


def softplus_parametric(x: Array, alpha: Array, beta: Array) -> Array:
    return _channels(alpha, x) * softplus(x * _channels(beta, x))


def _channels(values: Array, x: Array) -> Array:
    """(C,) against x (B, C, ...)."""
    return values.reshape(-1, *(1,) * (x.ndim - 2))


def softmax(x: Array, axis: Array | int = -1) -> Array:
    place = int(axis)
    found = np.exp(x - x.max(axis=place, keepdims=True))
    found /= found.sum(axis=place, keepdims=True)
    return found


def power(x: Array, y: Array) -> Array:
    return np.square(x) if y.size == 1 and y.reshape(-1)[0] == 2 and y.ndim <= x.ndim else np.power(x, y)


def cast(x: Array, dtype: str) -> Array:
    """Floats lose what follows the point when they become whole numbers; the declared type rounds fp16."""
    if dtype == "bool":
        return x != 0
    return x.astype(_CAST.get(dtype, dtype))


def clip(x: Array, alpha: Array, beta: Array) -> Array:
    return np.clip(x, alpha, beta)


def select(cond: Array, a: Array, b: Array) -> Array:
    return np.where(cond, a, b)


def cumsum(x: Array, axis: Array | int = 0, exclusive: Any = False, reverse: Any = False) -> Array:
    place = int(axis)
    found = np.flip(x, place) if reverse else x
    summed = np.cumsum(found, axis=place, dtype=x.dtype)
    if exclusive:
        summed = summed - found
    return np.flip(summed, place) if reverse else summed


def quantize(input: Array, scale: Array, output_dtype: str, zero_point: Any = 0, axis: Any = None) -> Array:
    """round(input / scale) + zero_point, held inside of the type; halves go to the even number."""
    limits = np.iinfo(output_dtype)
    shifted = np.rint(input / _along(scale, input, axis)) + _along(zero_point, input, axis)
    return np.clip(shifted, limits.min, limits.max).astype(output_dtype)


def dequantize(input: Array, scale: Array, zero_point: Any = 0, axis: Any = None) -> Array:
    shifted = input.astype(np.float32) - _along(zero_point, input, axis)
    return (shifted * _along(scale, input, axis)).astype(np.float32)


def _along(values: Any, x: Array, axis: Any) -> Array:
    """A scalar, or (n,) along an axis of x."""
    found = np.asarray(values, np.float32)
    if found.ndim == 0:
        return found
    sizes = [1] * x.ndim
    sizes[int(axis)] = -1
    return found.reshape(sizes)


def _reduce(function: Callable[..., Array]) -> Op:
    def reduced(x: Array, axes: Any = None, keep_dims: Any = False) -> Array:
        places = None if axes is None else tuple(int(axis) for axis in np.atleast_1d(axes))
        return function(x, axis=places, keepdims=bool(keep_dims))

    return reduced


def _arg(function: Callable[..., Array]) -> Op:
    def found(x: Array, axis: Any = -1, keep_dims: Any = False, output_dtype: str = "int32") -> Array:
        return function(x, axis=int(axis), keepdims=bool(keep_dims)).astype(output_dtype)

    return found


def _log_sum_exp(x: Array, axis: Any, keepdims: bool) -> Array:
    largest = x.max(axis=axis, keepdims=True)
    summed = np.log(np.exp(x - largest).sum(axis=axis, keepdims=True)) + largest
    return summed if keepdims else summed.squeeze(axis)


OPS: dict[str, Op] = {
    "abs": lambda x: np.abs(x),
    "acos": lambda x: np.arccos(x),
    "add": lambda x, y: x + y,
    "asin": lambda x: np.arcsin(x),
    "atan": lambda x: np.arctan(x),
    "atanh": lambda x: np.arctanh(x),
    "cast": cast,
    "ceil": lambda x: np.ceil(x),
    "clamped_relu": lambda x, alpha, beta: np.minimum(np.where(x >= 0, x, alpha * x), beta),
    "clip": clip,
    "cos": lambda x: np.cos(x),
    "cosh": lambda x: np.cosh(x),
    "cumsum": cumsum,
    "dequantize": dequantize,
    "elu": elu,
    "equal": lambda x, y: x == y,
    "erf": erf,
    "exp": lambda x: np.exp(x),
    "exp2": lambda x: np.exp2(x),
    "floor": lambda x: np.floor(x),
    "floor_div": lambda x, y: np.floor_divide(x, y),
    "gelu": gelu,
    "greater": lambda x, y: x > y,
    "greater_equal": lambda x, y: x >= y,
    "identity": lambda x: x,
    "inverse": lambda x, epsilon=1e-4: 1 / (x + epsilon),
    "leaky_relu": lambda x, alpha: np.where(x >= 0, x, alpha * x),
    "less": lambda x, y: x < y,
    "less_equal": lambda x, y: x <= y,
    "linear_activation": lambda x, alpha, beta: alpha * x + beta,
    "log": lambda x, epsilon=1e-45: np.log(x + epsilon),
    "logical_and": lambda x, y: np.logical_and(x, y),
    "logical_not": lambda x: np.logical_not(x),
    "logical_or": lambda x, y: np.logical_or(x, y),
    "logical_xor": lambda x, y: np.logical_xor(x, y),
    "maximum": lambda x, y: np.maximum(x, y),
    "minimum": lambda x, y: np.minimum(x, y),
    "mod": lambda x, y: np.mod(x, y),
    "mul": lambda x, y: x * y,
    "not_equal": lambda x, y: x != y,
    "pow": power,
    "prelu": prelu,
    "quantize": quantize,
    "real_div": lambda x, y: x / y,
    "reduce_argmax": _arg(np.argmax),
    "reduce_argmin": _arg(np.argmin),
    "reduce_l1_norm": _reduce(lambda x, axis, keepdims: np.abs(x).sum(axis=axis, keepdims=keepdims)),
    "reduce_l2_norm": _reduce(
        lambda x, axis, keepdims: np.sqrt(np.square(x).sum(axis=axis, keepdims=keepdims))
    ),
    "reduce_log_sum": _reduce(lambda x, axis, keepdims: np.log(x.sum(axis=axis, keepdims=keepdims))),
    "reduce_log_sum_exp": _reduce(_log_sum_exp),
    "reduce_max": _reduce(np.max),
    "reduce_mean": _reduce(np.mean),
    "reduce_min": _reduce(np.min),
    "reduce_prod": _reduce(np.prod),
    "reduce_sum": _reduce(np.sum),
    "reduce_sum_square": _reduce(lambda x, axis, keepdims: np.square(x).sum(axis=axis, keepdims=keepdims)),
    "relu": lambda x: np.maximum(x, 0),
    "relu6": lambda x: np.clip(x, 0, 6),
    "round": lambda x: np.rint(x),
    "rsqrt": lambda x, epsilon=1e-12: 1 / np.sqrt(x + epsilon),
    "scaled_tanh": lambda x, alpha, beta: alpha * np.tanh(x * beta),
    "select": select,
    "sigmoid": sigmoid,
    "sigmoid_hard": lambda x, alpha, beta: np.clip(alpha * x + beta, 0, 1),
    "sign": lambda x: np.sign(x),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sin": lambda x: np.sin(x),
    "sinh": lambda x: np.sinh(x),
    "softmax": softmax,
    "softplus": softplus,
    "softplus_parametric": softplus_parametric,
    "softsign": lambda x: x / (1 + np.abs(x)),
    "sqrt": lambda x: np.sqrt(x),
    "square": lambda x: np.square(x),
    "sub": lambda x, y: x - y,
    "tan": lambda x: np.tan(x),
    "tanh": lambda x: np.tanh(x),
    "threshold": lambda x, alpha: np.maximum(x, alpha),
    "thresholded_relu": lambda x, alpha: np.where(x >= alpha, x, 0),
}
