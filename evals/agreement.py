"""Does a judge agree with labels, and does anything beside the label move its verdicts?

In: arrays of verdicts and labels (0/1) over n rows, what might bias the judge, strata, clusters.
Out: Cohen's kappa with an interval; shifts with an effect, an interval and a p-value.
Not here: rows and files (`evals/judge_audit.py`). numpy only. Intervals are two-sided at 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from evals.stats import Z_95, FloatArray, Interval

IntArray = npt.NDArray[np.int64]


def numbered(keys: Sequence[Hashable]) -> IntArray:
    """Keys as numbers 0, 1, ... in order of first appearance, (n,)."""
    index: dict[Hashable, int] = {}
    return np.asarray([index.setdefault(key, len(index)) for key in keys], np.int64)


def kappa(cells: npt.ArrayLike) -> FloatArray:
    """Cohen's kappa (1960) of tables (..., 4): counts of (verdict, label) = 00, 01, 10, 11.

    Agreement beyond chance: (p_o - p_e) / (1 - p_e). 0 where verdicts or labels are all the same.
    """
    share = np.asarray(cells, np.float64)
    share = share / share.sum(-1, keepdims=True)
    verdict, label = share[..., 2] + share[..., 3], share[..., 1] + share[..., 3]
    chance = verdict * label + (1 - verdict) * (1 - label)
    beyond = share[..., 0] + share[..., 3] - chance
    undefined = np.isclose(chance, 1.0)
    return np.where(undefined, 0.0, beyond / np.where(undefined, 1.0, 1 - chance))


def kappa_interval(
    verdict_n: IntArray, label_n: IntArray, cluster_n: IntArray, *, resamples: int, seed: int
) -> Interval:
    """Percentile bootstrap interval of kappa; whole clusters are resampled."""
    cells = np.zeros((int(cluster_n.max()) + 1, 4))
    np.add.at(cells, (cluster_n, 2 * verdict_n + label_n), 1)
    # equal clusters are interchangeable: draw how often each kind occurs
    kinds, counts = np.unique(cells, axis=0, return_counts=True)
    rng = np.random.default_rng(seed)
    draws = rng.multinomial(len(cells), counts / len(cells), size=resamples)
    low, high = np.percentile(kappa(draws @ kinds), [2.5, 97.5])
    return Interval(float(low), float(high))


@dataclass(frozen=True)
class Shift:
    """How P(verdict = 1) changes as an exposure goes from 0 to 1 within strata: a share, its interval, and
    the p-value of no change."""

    effect: float
    interval: Interval
    z: float
    p_value: float


def shift(verdict_n: IntArray, exposure_n: FloatArray, stratum_n: IntArray, cluster_n: IntArray) -> Shift:
    """Linear effect of an exposure on the verdict within strata, and a score test of none.

    With x and v centred in their stratum: effect = sum x v / sum x^2 (for a 0/1 exposure, a weighted mean
    over strata of the difference of shares). The score is sum x v, over clusters sum U_c. Its variance under
    the hypothesis is the larger of two: that of all permutations within strata, sum_s Sxx Svv / (n - 1),
    right with few verdicts of a kind, and sum U_c^2 * C / (C - 1), right where rows of a question depend on
    each other.
    An exposure or a verdict that is constant in every stratum gives effect 0 and p = 1.
    """
    x, v = _centred(exposure_n, stratum_n), _centred(verdict_n, stratum_n)
    spread = float((x * x).sum())
    clusters = int(cluster_n.max()) + 1
    score_c = np.bincount(cluster_n, weights=x * v, minlength=clusters)
    small = clusters / max(clusters - 1, 1)
    free_s = np.maximum(np.bincount(stratum_n) - 1, 1)
    squares_s = np.bincount(stratum_n, weights=x * x) * np.bincount(stratum_n, weights=v * v)
    permuted = float((squares_s / free_s).sum())
    variance = max(permuted, float((score_c**2).sum()) * small)
    if spread < 1e-9 or variance < 1e-12:
        return Shift(0.0, Interval(0.0, 0.0), 0.0, 1.0)
    effect = float(score_c.sum()) / spread
    left_c = np.bincount(cluster_n, weights=x * (v - effect * x), minlength=clusters)
    half = Z_95 * math.sqrt(float((left_c**2).sum()) * small) / spread
    z = float(score_c.sum()) / math.sqrt(variance)
    return Shift(effect, Interval(effect - half, effect + half), z, math.erfc(abs(z) / math.sqrt(2)))


def ranks(values: Sequence[float]) -> FloatArray:
    """Mid-ranks scaled to [0, 1]: 0 for the smallest of all values, 1 for the largest, (n,)."""
    array = np.asarray(values, np.float64)
    _, inverse, counts = np.unique(array, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    middle = last - (counts + 1) / 2
    return (middle / max(len(array) - 1, 1))[inverse]


def holm(p_values: Sequence[float]) -> list[float]:
    """Holm's step-down adjusted p-values (1979): the chance of any false alarm among all of them."""
    order = sorted(range(len(p_values)), key=p_values.__getitem__)
    adjusted, largest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, p_values[i] * (len(p_values) - place)))
        adjusted[i] = largest
    return adjusted


def _centred(values_n: npt.NDArray[np.generic], stratum_n: IntArray) -> FloatArray:
    values = values_n.astype(np.float64)
    sizes = np.bincount(stratum_n)
    means = np.bincount(stratum_n, weights=values) / np.maximum(sizes, 1)
    return values - means[stratum_n]
