"""Calibrated 4-bit blocks on the grid of MatMulNBits.

In: a weight, second moments of its input, held-out inputs. Out: `Rounded`. Not here: capturing inputs
(`calibrate.py`), proof (`audit.py`).

GPTQ (Frantar et al. 2022, arXiv:2210.17323): columns are rounded in order, and what rounding one of them
changed in the output is made good by those still to come, by the inverse of the inputs' second moments.
optimum's GPTQ would be the same method, but it needs gptqmodel and replaces torch modules, where the
projections here are packed; the grid of onnxruntime (-8..7 with one scale, no zero point) is not its own.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from export.passes import MICROSOFT, add_initializer
from export.quantize_facts import GPTQ
from export.quantize_schemes import ACCURACY_LEVEL, swap_output

Floats = NDArray[np.float32]

DAMPING = 0.01  # of the mean second moment, on the diagonal: the paper's
_COLUMNS = 128  # columns between two updates of the rest, which is one large product
_SHRINK = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75)
"""Scales that are tried for a block, as shares of the one that clips nothing."""


@dataclass(frozen=True)
class Rounded:
    """A weight (K, N) on its grid.

    grid: (N, blocks, size) of 0..15, standing for -8..7; scale: (N, blocks); probe: (rows, K) held-out
    inputs; error, nearest_error: |probe (W - Q)|^2 / |probe W|^2 of these blocks and of rounding to nearest.
    """

    grid: NDArray[np.uint8]
    scale: Floats
    width: int
    probe: Floats
    error: float
    nearest_error: float
    calibrated: bool

    @property
    def weight(self) -> Floats:
        """(K, N) float32, as the kernel reads it."""
        return dequantized(self.grid, self.scale, self.width)


def better(weight: Floats, moments: Floats, probe: Floats, size: int) -> Rounded:
    """GPTQ's blocks where they lose less than rounding to nearest on inputs that they were not fitted to."""
    grid, scale = nearest(weight, size)
    plain = _rounded(grid, scale, weight, probe, None)
    fitted = _rounded(*calibrated(weight, moments, size), weight, probe, plain.error)
    return fitted if fitted.error < plain.error else plain


def _rounded(grid: Any, scale: Any, weight: Floats, probe: Floats, nearest_error: float | None) -> Rounded:
    new = Rounded(grid, scale, len(weight), probe, 0.0, 0.0, nearest_error is not None)
    error = output_error(weight, new.weight, probe)
    rival = error if nearest_error is None else nearest_error
    return Rounded(grid, scale, len(weight), probe, error, rival, new.calibrated)


def dequantized(grid: NDArray[np.uint8], scale: Floats, width: int) -> Floats:
    """(N, blocks, size) and (N, blocks) -> (K = width, N) float32."""
    values = (grid.astype(np.float32) - 8.0) * scale[..., None]
    return np.ascontiguousarray(values.reshape(len(values), -1)[:, :width].T)


def output_error(weight: Floats, rounded: Floats, probe: Floats) -> float:
    """|probe (W - Q)|^2 / |probe W|^2."""
    lost = np.square(probe @ (weight - rounded), dtype=np.float64).sum()
    return float(lost / max(np.square(probe @ weight, dtype=np.float64).sum(), 1e-30))


def nearest(weight: Floats, size: int) -> tuple[NDArray[np.uint8], Floats]:
    """(N, blocks, size) and (N, blocks): onnxruntime's rule, the largest value of a block on -8."""
    blocks = _blocks(weight, size)
    scale = _scale(blocks)
    return _round(blocks, scale), scale


def calibrated(weight: Floats, moments: Floats, size: int) -> tuple[NDArray[np.uint8], Floats]:
    """GPTQ with one scale a block, chosen when the block is reached. weight (K, N), moments (K, K)."""
    width, columns = weight.shape
    work = np.ascontiguousarray(weight.T, dtype=np.float32).copy()  # (N, K)
    upper, seen = _inverse_factor(moments)
    count = -(-width // size)
    grid = np.full((columns, count * size), 8, dtype=np.uint8)
    scales = np.zeros((columns, count), dtype=np.float32)
    for start in range(0, width, _COLUMNS):
        end = min(start + _COLUMNS, width)
        errors = np.zeros((columns, end - start), dtype=np.float32)
        for i in range(start, end):
            if i % size == 0:
                block = work[:, i : i + size]
                scales[:, i // size] = _best_scale(block, seen[i : i + size])
            scale = scales[:, i // size]
            level = np.clip(np.rint(_divide(work[:, i], scale)), -8, 7)
            grid[:, i] = (level + 8).astype(np.uint8)
            errors[:, i - start] = (work[:, i] - level * scale) / upper[i, i]
            work[:, i:end] -= np.outer(errors[:, i - start], upper[i, i:end])
        work[:, end:] -= errors @ upper[start:end, end:]
    return grid.reshape(columns, count, size), scales


def _inverse_factor(moments: Floats) -> tuple[Floats, Floats]:
    """Upper Cholesky factor of the inverse of the damped moments, and their diagonal.

    An input that is always 0 leaves its column to plain rounding.
    """
    damped = np.asarray(moments, dtype=np.float64).copy()
    diagonal = np.diag(damped).copy()
    dead = diagonal <= 0
    damped[dead, dead] = 1.0
    damped[np.diag_indices_from(damped)] += DAMPING * max(float(diagonal.mean()), 1e-12)
    inverse = np.linalg.inv(damped)
    upper = np.linalg.cholesky((inverse + inverse.T) / 2).T
    return upper.astype(np.float32), np.maximum(diagonal, 0).astype(np.float32)


def _best_scale(block: Floats, importance: Floats) -> Floats:
    """(N,) scale of a block (N, size): the share of the widest, either way up, that loses least."""
    widest = _scale(block[:, None])[:, 0]
    best, least = widest, np.full(len(block), np.inf, dtype=np.float32)
    for share in (*_SHRINK, *(-x for x in _SHRINK)):
        scale = widest * np.float32(share)
        level = np.clip(np.rint(_divide(block, scale[:, None])), -8, 7)
        lost = (np.square(block - level * scale[:, None]) * importance).sum(axis=1)
        best, least = np.where(lost < least, scale, best), np.minimum(lost, least)
    return best.astype(np.float16).astype(np.float32)  # so that a float16 graph stores the same scale


def _blocks(weight: Floats, size: int) -> Floats:
    """(K, N) -> (N, blocks, size), zeros behind."""
    width, columns = weight.shape
    padded = np.zeros((columns, -(-width // size) * size), dtype=np.float32)
    padded[:, :width] = weight.T
    return padded.reshape(columns, -1, size)


def _scale(blocks: Floats) -> Floats:
    place = np.abs(blocks).argmax(axis=-1)
    return (np.take_along_axis(blocks, place[..., None], axis=-1)[..., 0] / -8.0).astype(np.float32)


def _round(blocks: Floats, scale: Floats) -> NDArray[np.uint8]:
    return (np.clip(np.rint(_divide(blocks, scale[..., None])), -8, 7) + 8).astype(np.uint8)


def _divide(values: Floats, scale: Floats) -> Floats:
    return values / np.where(scale == 0, np.float32(1), scale)


def write(model: ir.Model, rounded: Mapping[str, Rounded]) -> None:
    """MatMuls by name -> MatMulNBits with these blocks."""
    graph = model.graph
    for node in [n for n in graph if n.name in rounded]:
        found, name = rounded[str(node.name)], f"{node.name}{GPTQ}"
        packed = (found.grid[..., 0::2] | (found.grid[..., 1::2] << 4)).astype(np.uint8)
        columns, _, size = found.grid.shape
        new = ir.node(
            "MatMulNBits",
            [
                node.inputs[0],
                add_initializer(graph, f"{name}.blocks", packed),
                add_initializer(graph, f"{name}.scales", found.scale),
            ],
            attributes={
                "K": found.width,
                "N": columns,
                "bits": 4,
                "block_size": size,
                "accuracy_level": ACCURACY_LEVEL,
            },
            domain=MICROSOFT,
            name=name,
        )
        graph.insert_before(node, new)
        swap_output(graph, node, new)
