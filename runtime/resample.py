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
BLOCK = 32  # outputs computed by one matrix product
ROWS = 256  # rows held in double precision at a time


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

    def _to_integer(self, row: Doubles) -> Doubles:
        scaled = row * (1 << self.precision)
        return np.trunc(scaled + np.copysign(0.5, scaled))  # half away from zero; held as doubles, exact

    def blocks(self) -> list[tuple[int, int, int, Doubles]]:
        """(first output, first input, end of inputs, weights (outputs, inputs)) of each run of outputs."""
        found = []
        for start in range(0, len(self.first), BLOCK):
            stop = min(start + BLOCK, len(self.first))
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


def _along_width(pixels: Bytes, width: int, filter_name: str) -> Bytes:
    height, size_in, channels = pixels.shape
    taps = _taps(size_in, width, filter_name)
    blocks = taps.blocks()
    out = np.empty((height, width, channels), dtype=np.uint8)
    for top in range(0, height, ROWS):
        rows = pixels[top : top + ROWS].astype(np.float64)
        for start, low, high, dense in blocks:
            sums = np.matmul(dense, rows[:, low:high])  # (rows, outputs, channels)
            out[top : top + ROWS, start : start + len(dense)] = _to_bytes(sums, taps.precision)
    return out


def _along_height(pixels: Bytes, height: int, filter_name: str) -> Bytes:
    size_in, width, channels = pixels.shape
    taps = _taps(size_in, height, filter_name)
    flat = pixels.reshape(size_in, width * channels)
    out = np.empty((height, width * channels), dtype=np.uint8)
    for start, low, high, dense in taps.blocks():
        out[start : start + len(dense)] = _to_bytes(dense @ flat[low:high].astype(np.float64), taps.precision)
    return out.reshape(height, width, channels)


def resize(pixels: Bytes, height: int, width: int, filter_name: str) -> Bytes:
    """Pixels (H, W, C) uint8 to (height, width, C) uint8: width first, rounded to bytes, then height.

    An axis that keeps its size is not touched.
    """
    if pixels.shape[1] != width:
        pixels = _along_width(pixels, width, filter_name)
    if pixels.shape[0] != height:
        pixels = _along_height(pixels, height, filter_name)
    return pixels
