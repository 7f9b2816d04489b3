"""Resizing with a named filter in the fixed-point arithmetic that torchvision uses for byte images on a CPU.

In: uint8 pixels (height, width, channels). Out: uint8 pixels of the wanted size, equal byte for byte to
`torch.nn.functional.interpolate(uint8, antialias=True)`. Not here: which size to make (`runtime/image.py`).

Pillow's own resize keeps 22 fractional bits where torch keeps as many as fit 16-bit weights, and so differs
by one or two in a byte; the checkpoint's processor runs torchvision, so this file follows torch. The
definition in words is in docs/bundle.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

Bytes = NDArray[np.uint8]
Doubles = NDArray[np.float64]

WEIGHT_LIMIT = 1 << 15  # a weight is a signed 16-bit integer
MAX_PRECISION = 22  # fractional bits
PRODUCT = 250_000  # multiplications in one matrix product: fits a cache, and BLAS wakes no threads for it


def _bilinear(x: Doubles) -> Doubles:
    return np.maximum(1.0 - np.abs(x), 0.0)


def _bicubic(x: Doubles) -> Doubles:
    a, x = -0.5, np.abs(x)
    near = ((a + 2.0) * x - (a + 3.0)) * x * x + 1.0
    far = (((x - 5.0) * x + 8.0) * x - 4.0) * a
    return np.where(x < 1.0, near, np.where(x < 2.0, far, 0.0))


def _lanczos(x: Doubles) -> Doubles:
    return np.where(np.abs(x) < 3.0, np.sinc(x) * np.sinc(x / 3.0), 0.0)


FILTERS: dict[str, tuple[float, Callable[[Doubles], Doubles]]] = {
    "bilinear": (1.0, _bilinear),
    "bicubic": (2.0, _bicubic),
    "lanczos": (3.0, _lanczos),
}


class Taps:
    """Integer weights of one axis: output i is `weights[i] @ input[first[i]:]`, shifted by `precision`."""

    def __init__(self, size_in: int, size_out: int, filter_name: str) -> None:
        radius, function = FILTERS[filter_name]
        scale = size_in / size_out
        support: float = radius * max(scale, 1.0)
        shrink = 1.0 / scale if scale >= 1.0 else 1.0
        self.run = max(4, round(2 * support / scale))
        self.first: list[int] = []
        rows: list[Doubles] = []
        for i in range(size_out):
            centre = scale * (i + 0.5)
            low = max(int(centre - support + 0.5), 0)
            high = min(int(centre + support + 0.5), size_in)
            raw = function((np.arange(low, high, dtype=np.float64) - centre + 0.5) * shrink)
            rows.append(
                raw / float(np.cumsum(raw)[-1])
            )  # cumsum adds from left to right, as the reference does
            self.first.append(low)
        largest = max(float(row.max()) for row in rows)
        self.precision = 0
        while self.precision < MAX_PRECISION and int(0.5 + largest * (2 << self.precision)) < WEIGHT_LIMIT:
            self.precision += 1
        self.weights = [self._to_integer(row) for row in rows]
        self.blocks = self._blocks()

    def _to_integer(self, row: Doubles) -> Doubles:
        scaled = row * (1 << self.precision)
        return np.trunc(scaled + np.copysign(0.5, scaled))  # half away from zero; held as doubles, exact

    def _blocks(self) -> list[tuple[int, int, int, Doubles]]:
        """(first output, first input, end of inputs, weights (outputs, inputs)) of each run of outputs.

        A run has about as many outputs as the inputs of one output span, so that few weights are zero.
        """
        found = []
        for start in range(0, len(self.first), self.run):
            stop = min(start + self.run, len(self.first))
            low = self.first[start]
            high = max(self.first[i] + len(self.weights[i]) for i in range(start, stop))
            dense = np.zeros((stop - start, high - low))
            for i in range(start, stop):
                offset = self.first[i] - low
                dense[i - start, offset : offset + len(self.weights[i])] = self.weights[i]
            found.append((start, low, high, dense))
        return found


@lru_cache(maxsize=32)
def _taps(size_in: int, size_out: int, filter_name: str) -> Taps:
    return Taps(size_in, size_out, filter_name)


def _to_bytes(sums: Doubles, precision: int) -> Bytes:
    """Round half up at `precision` fractional bits and saturate; sums are integers below 2^53, so exact."""
    rounded = np.floor((sums + (1 << (precision - 1))) * math.ldexp(1.0, -precision))
    return np.clip(rounded, 0, 255).astype(np.uint8)


def _along_first(samples: Bytes, size: int, filter_name: str) -> Bytes:
    """Resample the first axis of (n, columns) to (size, columns)."""
    taps = _taps(samples.shape[0], size, filter_name)
    out = np.empty((size, samples.shape[1]), dtype=np.uint8)
    for start, low, high, dense in taps.blocks:
        step = max(64, PRODUCT // dense.size)
        for left in range(0, samples.shape[1], step):
            piece = samples[low:high, left : left + step].astype(np.float64)
            out[start : start + len(dense), left : left + step] = _to_bytes(dense @ piece, taps.precision)
    return out


def resize(pixels: Bytes, height: int, width: int, filter_name: str) -> Bytes:
    """Pixels (H, W, C) uint8 to (height, width, C) uint8: width first, rounded to bytes, then height.

    An axis that keeps its size is not touched.
    """
    channels = pixels.shape[2]
    if pixels.shape[1] != width:
        turned = pixels.transpose(1, 0, 2)  # (W, H, C)
        resized = _along_first(turned.reshape(len(turned), -1), width, filter_name)
        pixels = resized.reshape(width, pixels.shape[0], channels).transpose(1, 0, 2)
    if pixels.shape[0] != height:
        resized = _along_first(pixels.reshape(len(pixels), -1), height, filter_name)
        pixels = resized.reshape(height, width, channels)
    return pixels
