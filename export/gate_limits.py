"""What the gate allows, with reasons, and how it measures two sets of logits.

In: figures. Out: nothing, or a ParityError that names the figure, the limit and its reason.
Not here: running anything.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runtime.errors import ParityError


@dataclass(frozen=True)
class Limit:
    """A figure and the most it may be, with the reason for that number."""

    figure: str
    most: float
    reason: str


FP32_LIMITS = (
    Limit("feature_max_diff", 1e-4, "float32 sums in another order: 1e-6 to 1e-5 seen, growing with depth"),
    Limit("logit_rel_diff", 1e-4, "the same, through vision and text; 1.2e-4 absolute seen at 30 layers"),
)

ROUNDED_LIMITS = (
    Limit("feature_rms_error", 0.25, "uint8 activations per tensor: 1-5 % seen, more with outlier channels"),
    # 0.25 is seen on random weights: a text model can make four times as much of 6 % in the features
    Limit("logit_rms_error", 0.4, "the same through both models; unrelated logits give about 1.4"),
)

LATER_FP32 = Limit(
    "later_logit_rel_diff", 1e-4, "as logit_rel_diff: the cache holds what a fresh pass computes"
)
LATER_ROUNDED = Limit("later_logit_rms_error", 0.4, "as logit_rms_error: activations are rounded per call")

BATCH_EXACT = Limit("batch_logit_rms_error", 1e-4, "no row enters another's sums: 0 to 1e-6 seen")
BATCH_BLOCKS = Limit(
    "batch_logit_rms_error", 0.1, "blocks of one row and of several take other kernels: 1 % at 30 layers"
)
BATCH_SHARED = Limit(
    "batch_logit_rms_error", 0.4, "rows share the grid of an activation tensor: 4-11 % seen, 1.4 unrelated"
)


def rel_diff(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """Largest |difference| of a row (..., vocab) over the row's largest |reference|; inf with a NaN."""
    peaks = np.maximum(np.abs(reference).max(axis=-1), 1e-30)
    return _nan_is_worst((np.abs(reference - other).max(axis=-1) / peaks).max())


def rms_error(reference: NDArray[Any], other: NDArray[Any]) -> float:
    """rms of the difference over rms of the reference, both centred over the vocabulary; inf with a NaN."""
    left, right = (np.asarray(x, np.float64) - np.mean(x, axis=-1, keepdims=True) for x in (reference, other))
    return _nan_is_worst(np.sqrt(np.mean((left - right) ** 2) / max(float(np.mean(left**2)), 1e-30)))


def _nan_is_worst(value: Any) -> float:
    return float("inf") if np.isnan(value) else float(value)


def hold(figures: Mapping[str, float], limits: Sequence[Limit], case: str, against: str) -> None:
    """Raises ParityError at the first figure beyond its limit."""
    for limit in limits:
        got = figures[limit.figure]
        if not got <= limit.most:
            raise ParityError(
                f"gate: case {case!r}: {limit.figure} against the {against} is {got:.3g}, at most "
                f"{limit.most:.3g} allowed ({limit.reason}); a part is wrong, no bundle was written"
            )
